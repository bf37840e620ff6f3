//! Codes and bits that fields of registers take.

use bitflags::bitflags;

/// A table of codes, for documents and headers.
#[derive(Clone, Copy, Debug)]
pub struct CodeTable {
    /// Name of the type.
    pub name: &'static str,
    /// Number and name of each code, ascending.
    pub codes: &'static [(u32, &'static str)],
}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $value:literal,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
            #[repr(u32)]
            pub enum $name { $($(#[$vdoc])* $variant = $value,)* }
            impl $name {
                /// Every code.
                pub const ALL: &'static [$name] = &[$($name::$variant),*];
                /// The code with this number, if there is one.
                pub const fn from_code(code: u32) -> Option<$name> {
                    match code { $($value => Some($name::$variant),)* _ => None }
                }
                /// The number that the register shows.
                pub const fn code(self) -> u32 { self as u32 }
                /// Name as in documents.
                pub const fn name(self) -> &'static str {
                    match self { $($name::$variant => stringify!($variant),)* }
                }
            }
        )*
        /// Every table of codes.
        pub const CODES: &[CodeTable] = &[$(CodeTable {
            name: stringify!($name),
            codes: &[$(($value, stringify!($variant)),)*],
        },)*];
    };
}

bitflags! {
    /// Bits of `IDENTITY.CAPS`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Caps: u64 {
        /// CPUs reach the HBM coherently: it is memory of the guest's physical address space (exposure `spm`), or its
        /// aperture is coherent (exposure `bar`).
        const COHERENT_HBM = 1 << 0;
        /// Queues reach the HBM of the other GPUs of the hive.
        const PEER_COPY = 1 << 1;
        /// CPUs reach the HBM through [`crate::pci::BAR_APERTURE`] (exposures `bar` and `private`); `HBM_BASE` is then
        /// an address of the device's own.
        const HBM_APERTURE = 1 << 2;
        /// The number of partitions can be changed, by `TOPOLOGY.PARTITION_REQUEST`.
        const PARTITION_MODES = 1 << 3;
        /// Time stamps are those of a model, see `CLOCK.MODE`.
        const MODELLED_TIME = 1 << 4;
        /// Queues have [`crate::pci::kick`] and `QUEUE.WPTR_POLL`; not where VMMs map the doorbells.
        const KICKS = 1 << 5;
    }
}

bitflags! {
    /// Bits of `IRQ.STATUS` and `IRQ.ENABLE`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IrqBits: u32 {
        /// A queue stopped with a fault; vector [`crate::pci::VECTOR_EVENTS`].
        const FAULT = 1 << 0;
        /// A partition changed hands without its owner asking; vector [`crate::pci::VECTOR_EVENTS`].
        const OWNERSHIP = 1 << 1;
        /// A memory error, see the `RAS` block; vector [`crate::pci::VECTOR_EVENTS`].
        const RAS = 1 << 2;
        /// A link changed its state or its width; vector [`crate::pci::VECTOR_EVENTS`].
        const LINK = 1 << 3;
        /// Queue 0 executed a TRAP packet; vector [`crate::pci::VECTOR_QUEUE0`]. Queue `q` has bit `8 + q`.
        const QUEUE0 = 1 << 8;
        /// Trap bits of the other queues.
        const _ = !0;
    }
}

codes! {
    /// `BOOT.STATUS`.
    BootState {
        /// Waiting for the driver's START.
        Reset = 0,
        /// On its way.
        Booting = 1,
        /// Every block works.
        Ready = 2,
        /// Failed; a function-level reset gives another try.
        Fault = 3,
    }

    /// `CLOCK.MODE`.
    TimingMode {
        /// Time stamps are the host's time; work goes as fast as the host does it.
        Off = 0,
        /// Time stamps are what the machine's bandwidths and latencies give; work goes as fast as the host does it.
        Modelled = 1,
        /// The same, and work also takes that long.
        Paced = 2,
    }

    /// `DISCOVERY.BLOCK`.
    BlockId {
        /// No more blocks.
        End = 0,
        /// `IDENTITY`.
        Identity = 1,
        /// `BOOT`.
        Boot = 2,
        /// `IRQ`.
        Irq = 3,
        /// `CLOCK`.
        Clock = 4,
        /// `TOPOLOGY`.
        Topology = 5,
        /// `RAS`.
        Ras = 6,
        /// `DISCOVERY`.
        Discovery = 7,
        /// `LINK`.
        Link = 8,
        /// `PARTITION`.
        Partition = 9,
        /// `QUEUE`.
        Queue = 10,
    }

    /// `LINK.STATE`.
    LinkState {
        /// No such link.
        Absent = 0,
        /// All its lanes carry traffic.
        Up = 1,
        /// No lane does.
        Down = 2,
        /// Some of its lanes do.
        Degraded = 3,
    }

    /// `RAS.LAST_KIND`.
    RasKind {
        /// No error since power-on.
        None = 0,
        /// Corrected; the data is good.
        Correctable = 1,
        /// Not corrected; who reads the data through a queue gets a fault, until it is written anew.
        Uncorrectable = 2,
    }

    /// `RAS.COMMAND`.
    RasCommand {
        /// Takes the page at `ADDRESS` out of use for good.
        Retire = 1,
    }

    /// `RAS.RESULT`.
    RasResult {
        /// No command since reset.
        None = 0,
        /// Done, or done before.
        Ok = 1,
        /// Refused: `ADDRESS` is in no partition of this GPU.
        OutOfRange = 2,
        /// Refused: the list of retired pages is full.
        Full = 3,
        /// Refused: no such command.
        BadCommand = 4,
    }

    /// `PARTITION.COHERENCE`.
    Coherence {
        /// The VMM maps nothing at the planned address.
        NotMapped = 0,
        /// The VMM maps exactly this HBM's backing memory there.
        Coherent = 1,
        /// The VMM maps memory without a file descriptor there, so the device cannot tell what it is.
        NoFd = 2,
        /// The VMM maps another file there.
        OtherFile = 3,
        /// The right file, at another offset.
        OtherOffset = 4,
        /// Only a part of the range is mapped.
        Partial = 5,
        /// Mapped without write permission.
        ReadOnly = 6,
        /// Reached through the aperture, not mapped by the VMM; nothing to judge, and claims are allowed.
        Aperture = 7,
    }

    /// `PARTITION.STATE`.
    OwnerState {
        /// Nobody's; holds zeros.
        Free = 0,
        /// One driver's.
        Claimed = 1,
        /// Being scrubbed.
        Releasing = 2,
        /// Unusable until reset.
        Faulted = 3,
    }

    /// `PARTITION.COMMAND`.
    OwnerCommand {
        /// Makes the driver that `TOKEN` names the owner of a free partition.
        Claim = 1,
        /// Gives the partition back; it is scrubbed before it is free.
        Release = 2,
        /// Makes `NEW_TOKEN` the owner; contents stay.
        Transfer = 3,
        /// Begins the owner's lease anew, for `LEASE_MS` from now.
        Renew = 4,
    }

    /// `PARTITION.RESULT`.
    OwnerResult {
        /// No command since reset.
        None = 0,
        /// Done.
        Ok = 1,
        /// Refused: claimed by another driver, or by this one already.
        Busy = 2,
        /// Refused: `TOKEN` is not the owner's.
        NotOwner = 3,
        /// Refused: `BOOT.STATUS` is not READY.
        NotReady = 4,
        /// Refused: the VMM does not map this HBM where the plan says; see `COHERENCE`.
        NotCoherent = 5,
        /// Refused: token 0 is nobody's.
        BadToken = 6,
        /// Refused: the partition is faulted.
        Faulted = 7,
        /// Refused: being scrubbed; try again.
        Releasing = 8,
        /// Refused: no such command.
        BadCommand = 9,
    }

    /// `PARTITION.LOSS`.
    OwnerLoss {
        /// No owner lost it since power-on.
        None = 0,
        /// A function-level reset.
        FunctionReset = 1,
        /// A hot reset of the bus.
        HotReset = 2,
        /// The function's bus master bit was cleared.
        BusMasterOff = 3,
        /// The lease ended.
        LeaseExpired = 4,
        /// The number of partitions changed.
        PartitionChange = 5,
        /// The VMM went away.
        Disconnect = 6,
    }

    /// What happened, in `PARTITION.HISTORY_STEP`: a command with its circumstances already judged, or an incident.
    OwnerEvent {
        /// CLAIM with a token, while booted and coherent.
        Claim = 1,
        /// CLAIM with token 0.
        ClaimBadToken = 2,
        /// CLAIM before the boot is over.
        ClaimNotReady = 3,
        /// CLAIM while the VMM does not map this HBM where the plan says.
        ClaimNotCoherent = 4,
        /// RELEASE with the owner's token.
        Release = 5,
        /// RELEASE with another token.
        ReleaseByOther = 6,
        /// TRANSFER with the owner's token, to a token.
        Transfer = 7,
        /// TRANSFER with another token.
        TransferByOther = 8,
        /// TRANSFER with the owner's token, to token 0.
        TransferBadToken = 9,
        /// RENEW with the owner's token.
        Renew = 10,
        /// RENEW with another token.
        RenewByOther = 11,
        /// A command that does not exist.
        BadCommand = 12,
        /// A function-level reset.
        FunctionReset = 13,
        /// A hot reset of the bus.
        HotReset = 14,
        /// The function's bus master bit was cleared.
        BusMasterOff = 15,
        /// The lease ended.
        LeaseExpired = 16,
        /// The number of partitions changes.
        PartitionChange = 17,
        /// The VMM went away.
        Disconnect = 18,
        /// The scrubber is done.
        Scrubbed = 19,
        /// The scrubber failed.
        ScrubFailed = 20,
        /// What the VMM left in it stays: so it was asked of the server.
        Kept = 21,
    }

    /// `QUEUE.STATUS`.
    QueueState {
        /// Not enabled.
        Disabled = 0,
        /// Enabled, nothing to do.
        Idle = 1,
        /// Working.
        Running = 2,
        /// Stopped by a fault; `CONTROL` reset recovers it.
        Fault = 3,
    }

    /// `QUEUE.FAULT_CODE`.
    QueueFault {
        /// It did not stop.
        None = 0,
        /// Opcode or sub-opcode that the engine does not have.
        BadOpcode = 1,
        /// A field out of its range, such as a misaligned fence.
        BadField = 2,
        /// Nothing is mapped at the address, or not all of the length, or not for writing.
        Unmapped = 3,
        /// HBM that the queue's token does not own.
        NotOwned = 4,
        /// HBM of a partition that is neither coherently attached nor reached through an aperture.
        NotCoherent = 5,
        /// The function's bus master bit is off.
        BusMasterOff = 6,
        /// Ring base or size out of range when the queue was enabled.
        BadRing = 7,
        /// A doorbell value behind RPTR, beyond RPTR plus the ring's size, or not a multiple of 4.
        BadDoorbell = 8,
        /// No link to the peer is up.
        LinkDown = 9,
        /// The ring ends in the middle of a packet.
        Truncated = 10,
        /// A poll used up its retries.
        PollTimeout = 11,
        /// HBM with an uncorrectable error in it was read.
        Poisoned = 12,
        /// HBM of a page that is retired.
        Retired = 13,
    }
}
