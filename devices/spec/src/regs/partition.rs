//! `PARTITION`: one instance for each HBM partition; range, coherent attach and ownership.

use super::MAX_PARTITIONS;
use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

/// Offset of the first instance.
pub const BASE: u32 = 0x2000;
/// Bytes between instances.
pub const STRIDE: u32 = 0x100;
/// First address of the HBM as packets name it: its guest physical address, or with an aperture an address that
/// only GPUs use.
pub const HBM_BASE: Reg = Reg::ro("HBM_BASE", 0x00, W8, "first address, as packets name it");
/// Bytes of HBM.
pub const HBM_SIZE: Reg = Reg::ro("HBM_SIZE", 0x08, W8, "bytes");
/// ACPI proximity domain of the HBM, or [`super::NO_PXM`].
pub const PXM: Reg = Reg::ro("PXM", 0x10, W4, "proximity domain, 0xffffffff = none");
/// One of [`super::Coherence`].
pub const COHERENCE: Reg = Reg::ro(
    "COHERENCE",
    0x14,
    W4,
    "whether the VMM maps this HBM at HBM_BASE, and if not, why",
);
/// One of [`super::OwnerState`].
pub const STATE: Reg = Reg::ro(
    "STATE",
    0x18,
    W4,
    "0 FREE, 1 CLAIMED, 2 RELEASING, 3 FAULTED",
);
/// Grows by one whenever the partition is claimed or becomes free.
pub const GENERATION: Reg = Reg::ro("GENERATION", 0x1c, W4, "counts claims and frees");
/// Token of the driver that commands; reads as zero, so that no token leaks. Each command clears it and
/// `NEW_TOKEN`, so that nobody commands with what another driver left there: write it before each command.
pub const TOKEN: Reg = Reg::rw(
    "TOKEN",
    0x20,
    W8,
    "token of the commanding driver; reads 0, cleared by each command",
)
.hidden();
/// One of [`super::OwnerCommand`]; executed when written.
pub const COMMAND: Reg = Reg::rw(
    "COMMAND",
    0x28,
    W4,
    "1 CLAIM, 2 RELEASE, 3 TRANSFER, 4 RENEW; reads 0",
)
.effect()
.hidden();
/// One of [`super::OwnerResult`], of the last command.
pub const RESULT: Reg = Reg::ro("RESULT", 0x2c, W4, "result of the last command");
/// Token of the driver that TRANSFER makes the owner; reads as zero.
pub const NEW_TOKEN: Reg = Reg::rw(
    "NEW_TOKEN",
    0x30,
    W8,
    "token of the next owner, for TRANSFER; reads 0",
)
.hidden();
/// How long the lease is that CLAIM, TRANSFER and RENEW begin. An owner that does not renew it in time loses the
/// partition: so the HBM of a driver that died comes back.
pub const LEASE_MS: Reg = Reg::rw(
    "LEASE_MS",
    0x38,
    W4,
    "lease that CLAIM, TRANSFER and RENEW begin, in ms; 0 = without end",
);
/// What is left of the owner's lease.
pub const LEASE_LEFT_MS: Reg = Reg::ro(
    "LEASE_LEFT_MS",
    0x3c,
    W4,
    "ms left of the lease, 0xffffffff = without end, 0 = no owner",
);
/// One of [`super::OwnerLoss`].
pub const LOSS: Reg = Reg::ro(
    "LOSS",
    0x40,
    W4,
    "why an owner last lost the partition without asking",
);
/// Steps of the ownership that the device remembers, across resets.
pub const HISTORY_COUNT: Reg = Reg::ro("HISTORY_COUNT", 0x44, W4, "steps remembered");
/// Which step `HISTORY_STEP` and `HISTORY_NS` show.
pub const HISTORY_INDEX: Reg = Reg::rw(
    "HISTORY_INDEX",
    0x48,
    W4,
    "which step the next two show, 0 = the newest",
);
/// The step: state before, [`super::OwnerEvent`], state after.
pub const HISTORY_STEP: Reg = Reg::ro(
    "HISTORY_STEP",
    0x4c,
    W4,
    "state before (7:0), event (15:8), state after (23:16); 0 = no such step",
);
/// When it was.
pub const HISTORY_NS: Reg = Reg::ro("HISTORY_NS", 0x50, W8, "`CLOCK.NS` of the step");
/// The block.
pub const BLOCK: Block = Block {
    name: "PARTITION",
    base: BASE,
    stride: STRIDE,
    count: MAX_PARTITIONS,
    regs: &[
        HBM_BASE,
        HBM_SIZE,
        PXM,
        COHERENCE,
        STATE,
        GENERATION,
        TOKEN,
        COMMAND,
        RESULT,
        NEW_TOKEN,
        LEASE_MS,
        LEASE_LEFT_MS,
        LOSS,
        HISTORY_COUNT,
        HISTORY_INDEX,
        HISTORY_STEP,
        HISTORY_NS,
    ],
    doc: "HBM range, coherent attach, ownership",
};
