//! What guest and host agree on: where things are, how the guest tells of its steps, and what it does in them.

/// Where things are in the guest's RAM.
pub(super) mod ram {
    /// Segment descriptors: none, 64-bit code, data.
    pub(in super::super) const GDT: u64 = 0x1000;
    /// Interrupt gates, which the program writes.
    pub(in super::super) const IDT: u64 = 0x2000;
    /// Page tables: the root, the next level, then one directory for each GiB that is there.
    pub(in super::super) const PAGE_TABLES: u64 = 0x3000;
    /// End of the stack.
    pub(in super::super) const STACK: u64 = 0x9_0000;
    /// The program.
    pub(in super::super) const CODE: u64 = 0x10_0000;
    /// Interrupts so far, by vector of the GPU, 4 bytes each.
    pub(in super::super) const COUNTS: u64 = 0x20_0000;
    /// What `lidt` reads.
    pub(in super::super) const IDTR: u64 = 0x20_0100;
    /// Ring of the queue.
    pub(in super::super) const RING: u64 = 0x30_0000;
    /// Word that fences store to.
    pub(in super::super) const FENCE: u64 = 0x31_0000;
    /// The write pointer that kicks are for.
    pub(in super::super) const WPTR: u64 = 0x31_0040;
    /// What is copied; the host writes it before.
    pub(in super::super) const SOURCE: u64 = 0x40_0000;
}

/// Port of a value that belongs to the step at hand, 32 bits.
pub(super) const PORT_VALUE: u16 = 0x700;
/// Port of a step that is done, by its number.
pub(super) const PORT_STEP: u16 = 0x704;
/// Port of a step that failed, by its number, with [`EXCEPTION`] or [`TOO_LONG`].
pub(super) const PORT_FAILED: u16 = 0x708;
/// The step ended with an exception of the processor.
pub(super) const EXCEPTION: u32 = 1 << 16;
/// The host's patience was at an end.
pub(super) const TOO_LONG: u32 = 1 << 17;

/// Vector of the processor for vector `v` of the GPU is this plus `v`.
pub(super) const VECTORS: u8 = 0x40;
/// Vector by which the host says that its patience is at an end.
pub(super) const VECTOR_TOO_LONG: u8 = 0x51;
/// Where messages to the first processor go (Intel SDM volume 3, section 11.11.1).
pub(super) const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// Bytes copied.
pub(super) const LEN: u64 = 0x4000;
/// Where in the HBM.
pub(super) const TARGET: u64 = 0x40_2000;
/// Bytes of the ring.
pub(super) const RING_SIZE: u32 = 4096;
/// Token of the driver.
pub(super) const TOKEN: u64 = 0x00d2_17e2_ab1e;
/// What the fences store.
pub(super) const FENCES: [u32; 2] = [0x600d_0001, 0x600d_0002];
/// Contexts of the traps.
pub(super) const CONTEXTS: [u32; 2] = [0x51, 0x52];
/// What the second submission fills with.
pub(super) const FILL: u32 = 0xa5c3_0f69;

/// How often the steps that are timed do what they do.
pub(super) const OFTEN: u32 = 256;
/// What is read so often, from `IDENTITY.SCRATCH`.
pub(super) const SCRATCH: u32 = 0x5c2a_7c11;

/// Where the program puts the GPU's BARs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// First address of ECAM.
    pub(super) ecam: u64,
    /// BAR 0.
    pub(super) registers: u32,
    /// BAR 1.
    pub(super) msix: u32,
    /// BAR 2.
    pub(super) doorbells: u64,
}

/// Steps of the program, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Start = 1,
    Find,
    FindByPorts,
    SizeBars,
    Decode,
    Msix,
    Boot,
    Hbm,
    Claim,
    ReadZeros,
    Enable,
    Copy,
    Compare,
    Kick,
    ReadOften,
    KickOften,
    Release,
    Refusal,
}

impl Step {
    pub(super) const ALL: [Step; 18] = [
        Step::Start,
        Step::Find,
        Step::FindByPorts,
        Step::SizeBars,
        Step::Decode,
        Step::Msix,
        Step::Boot,
        Step::Hbm,
        Step::Claim,
        Step::ReadZeros,
        Step::Enable,
        Step::Copy,
        Step::Compare,
        Step::Kick,
        Step::ReadOften,
        Step::KickOften,
        Step::Release,
        Step::Refusal,
    ];
}

/// Selector of 64-bit code.
pub(super) const CODE_SELECTOR: u16 = 8;
