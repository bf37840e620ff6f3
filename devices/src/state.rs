//! The state of a GPU as plain data: all that drivers can see and all that decides what happens next.
//!
//! [`Gpu::save`](crate::Gpu::save) takes it, [`Gpu::restore`](crate::Gpu::restore) puts it into another GPU of the same
//! configuration, perhaps on another host. It does not hold the contents of HBM and of guest memory, which are the
//! caller's to carry, nor the handles to VMM, files and threads. Each GPU of a hive is saved by itself.
//!
//! While the state is taken, queues pause: a packet that moves data is finished first, one that only waits (POLL, a
//! looping ATOMIC) begins anew afterwards and counts its tries anew, the rest of a paced packet's time passes
//! afterwards. Drivers see no change. Who carries memory too has to keep the queues from going on while it is copied:
//! that is [`Gpu::pause`](crate::Gpu::pause), with the guest's processors stopped.
//!
//! All times are nanoseconds of the device's clock, which goes on from [`GpuState::clock_ns`]. A restored queue has the
//! DMA of the VMM that is attached then; without one, and if one was attached when the state was saved, it waits until
//! one attaches. So a transport that learns of guest memory after it attached restores after that, too.
//!
//! A state is input like any other: every value is checked, and none makes the device panic. It has the tokens of
//! drivers in it, so keep it as secret as guest memory.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The version of [`GpuState`] that this crate writes and reads.
pub const VERSION: u32 = 2;
/// Latest time that a state may show: 292 years, so that time to come does not wrap.
pub(crate) const LATEST: u64 = u64::MAX / 2;

/// All of a GPU but its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuState {
    /// [`VERSION`].
    pub version: u32,
    /// What the GPU was made of.
    pub shape: Shape,
    /// Whether a VMM was attached.
    pub attached: bool,
    /// The device's clock.
    pub clock_ns: u64,
    /// Configuration space.
    pub config_space: Vec<u8>,
    /// Registers of BAR 0, as stored, in the order of the table.
    pub registers: Vec<u64>,
    /// Those of the doorbell page.
    pub doorbells: Vec<u64>,
    /// Those of the MSI-X page.
    pub msix: Vec<u64>,
    /// Boot handshake.
    pub boot: SavedBoot,
    /// Messages that get lost.
    pub lose_interrupts: u32,
    /// Causes of interrupts since power-on.
    pub causes: u64,
    /// Partitions of the mode in force.
    pub mode: usize,
    /// Partitions of every mode, in ascending order of their number; those of one that is not in force have no owner.
    pub modes: Vec<Vec<SavedPartition>>,
    /// Copy queues.
    pub queues: Vec<SavedQueue>,
    /// Links, own ends.
    pub links: Vec<SavedLink>,
    /// Memory errors.
    pub health: SavedHealth,
    /// When the function answers again; 0 = it does, all ones = never by itself.
    pub absent_until: u64,
    /// For how many nanoseconds it will be stuck in the next reset; 0 = it will not, all ones = for ever.
    pub stuck_ns: u64,
    /// Links that come up by themselves.
    pub flaps: Vec<SavedFlap>,
}

/// What a state and the GPU that takes it have to agree in: all that registers show of a configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Index in the machine.
    pub index: u32,
    /// Vendor, device, subsystem vendor, subsystem, class code, revision.
    pub ids: [u32; 6],
    /// Bytes of each BAR, 0 for one that is not there.
    pub bars: [u64; 6],
    /// Copy queues.
    pub queues: u32,
    /// Planned partitions: first address, bytes, proximity domain or all ones.
    pub partitions: Vec<[u64; 3]>,
    /// Hive.
    pub hive_id: u64,
    /// Position in the hive.
    pub node_id: u32,
    /// GPUs in the hive.
    pub hive_size: u32,
    /// Proximity domain of the CPU node.
    pub cpu_pxm: u32,
    /// Links: peer or all ones for the CPU, width, MB/s, latency in ns.
    pub links: Vec<[u32; 4]>,
    /// Modelled boot time in microseconds.
    pub boot_us: u32,
    /// Code of the timing mode.
    pub timing: u32,
}

/// Boot handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedBoot {
    /// How far it is.
    pub progress: BootProgress,
    /// Code with which the boot that was started last fails; 0 = it does not.
    pub fault: u32,
    /// How the next one ends.
    pub next: NextBoot,
}

/// How far a boot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BootProgress {
    /// Not started.
    Reset,
    /// Started, and it never ends.
    Never,
    /// Started; over at this time.
    Until(u64),
}

/// How a boot that has not been started will end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NextBoot {
    /// As the configuration says.
    AsConfigured,
    /// With this code, which is not 0.
    Fault(u32),
    /// Never.
    Never,
}

/// Ownership of a partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPartition {
    /// Code of the state. What is RELEASING is scrubbed after the restore.
    pub state: u32,
    /// Token of the owner, 0 without one.
    pub owner: u64,
    /// Claims and frees.
    pub generation: u32,
    /// Code of the last command's result.
    pub result: u32,
    /// When the lease ends; 0 without an owner, all ones for one without end.
    pub lease_end: u64,
    /// Code of the last loss.
    pub loss: u32,
    /// Whether an owner will be told of its loss when the scrub is done.
    pub lost: bool,
    /// Whether the next scrub fails.
    pub fail_scrub: bool,
    /// Steps, oldest first: time, and the codes of state before, event and state after.
    pub history: Vec<(u64, u32, u32, u32)>,
}

/// A copy queue; fields as in its registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs, reason = "the registers' documentation says it")]
pub struct SavedQueue {
    pub state: u32,
    pub rptr: u64,
    pub wptr: u64,
    pub packets: u64,
    pub bytes: u64,
    pub fault: u32,
    pub fault_address: u64,
    pub fault_packet: u64,
    pub trap_context: u32,
    pub busy_ns: u64,
    pub stamp_start_ns: u64,
    pub stamp_end_ns: u64,
    /// Whether the engine stands still.
    pub hung: bool,
    /// Doorbells that get lost.
    pub lose_doorbells: u32,
    /// Setup of an idle or running queue.
    pub run: Option<SavedRun>,
}

/// What a queue was enabled with, and its time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedRun {
    /// `RING_BASE`.
    pub ring_base: u64,
    /// `RING_SIZE`.
    pub ring_size: u32,
    /// `RPTR_WRITEBACK`.
    pub writeback: u64,
    /// `WPTR_POLL`.
    pub wptr_poll: u64,
    /// Whether a kick came that the queue has not followed.
    pub kicked: bool,
    /// `PRIORITY`.
    pub priority: u32,
    /// `TOKEN`.
    pub token: u64,
    /// What the queue's local time is ahead of the device's clock, wrapping.
    pub time_offset: u64,
    /// When the last packet ended.
    pub reached_ns: u64,
    /// The write pointer when the worker last took note of a doorbell.
    pub seen_wptr: u64,
}

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedLink {
    /// Lanes that are up.
    pub lanes: u32,
    /// Errors since reset.
    pub errors: u32,
    /// Bytes that left since reset.
    pub bytes_out: u64,
    /// Bytes that came since reset.
    pub bytes_in: u64,
}

/// Memory errors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedHealth {
    /// Correctable errors since reset.
    pub correctable: u32,
    /// Uncorrectable errors since reset.
    pub uncorrectable: u32,
    /// Address of the last error.
    pub last_address: u64,
    /// Code of its kind.
    pub last_kind: u32,
    /// Code of the last command's result.
    pub result: u32,
    /// First addresses of poisoned lines.
    pub poisoned: Vec<u64>,
    /// First addresses of retired pages, in the order in which they were retired.
    pub retired: Vec<u64>,
}

/// A link that comes up by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedFlap {
    /// When.
    pub up_at: u64,
    /// Hive position of the peer.
    pub peer: u32,
}

/// Why queues cannot be paused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SaveError {
    /// A packet takes too long. The queues go on as if nothing had been asked.
    #[error("queue {queue} was not done with a packet after {waited_ms} ms")]
    Busy {
        /// Queue.
        queue: usize,
        /// How long it was waited for.
        waited_ms: u64,
    },
}

/// Why a state cannot be restored. The GPU is as it was before.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RestoreError {
    /// Written by another version.
    #[error("the state has version {have}, this device reads {want}")]
    Version {
        /// The state's.
        have: u32,
        /// This crate's.
        want: u32,
    },
    /// The state of a GPU that is made otherwise.
    #[error("{what} {index}: the state has {have:#x}, this GPU {want:#x}")]
    Shape {
        /// What differs.
        what: &'static str,
        /// Which one, 0 if there is one only.
        index: usize,
        /// The state's.
        have: u64,
        /// This GPU's.
        want: u64,
    },
    /// A value that no GPU has.
    #[error("{what} {index} cannot be {value:#x}")]
    Bad {
        /// What it is.
        what: &'static str,
        /// Which one, 0 if there is one only.
        index: usize,
        /// Its value.
        value: u64,
    },
    /// The GPU is not as after power-on or a reset.
    #[error("{what} {index} is in use")]
    InUse {
        /// What is in use.
        what: &'static str,
        /// Which one.
        index: usize,
    },
    /// The host has no thread for a queue that has to go on.
    #[error("no thread for queue {queue}")]
    NoThread {
        /// Queue.
        queue: u32,
    },
}

impl Shape {
    /// Compares with the shape of the GPU that is to be restored, number by number.
    pub(crate) fn check(&self, gpu: &Shape) -> Result<(), RestoreError> {
        let Shape {
            index,
            ids,
            bars,
            queues,
            partitions,
            hive_id,
            node_id,
            hive_size,
            cpu_pxm,
            links,
            boot_us,
            timing,
        } = self;
        let one = |what, have: u64, want: u64| same(what, 0, have, want);
        one("GPU index", (*index).into(), gpu.index.into())?;
        all("id", ids.map(u64::from), gpu.ids.map(u64::from))?;
        all("size of BAR", *bars, gpu.bars)?;
        one("queues", (*queues).into(), gpu.queues.into())?;
        one(
            "partitions",
            partitions.len() as u64,
            gpu.partitions.len() as u64,
        )?;
        for (field, what) in [
            "HBM_BASE of partition",
            "HBM_SIZE of partition",
            "PXM of partition",
        ]
        .into_iter()
        .enumerate()
        {
            let of = |all: &[[u64; 3]]| -> Vec<u64> {
                all.iter().filter_map(|it| it.get(field).copied()).collect()
            };
            all(what, of(partitions), of(&gpu.partitions))?;
        }
        one("hive", *hive_id, gpu.hive_id)?;
        one("hive position", (*node_id).into(), gpu.node_id.into())?;
        one(
            "GPUs of the hive",
            (*hive_size).into(),
            gpu.hive_size.into(),
        )?;
        one("CPU_PXM", (*cpu_pxm).into(), gpu.cpu_pxm.into())?;
        one("links", links.len() as u64, gpu.links.len() as u64)?;
        for (field, what) in [
            "peer of link",
            "width of link",
            "MB/s of link",
            "latency of link",
        ]
        .into_iter()
        .enumerate()
        {
            let of = |all: &[[u32; 4]]| -> Vec<u64> {
                let field = all.iter().filter_map(|it| it.get(field));
                field.map(|it| u64::from(*it)).collect()
            };
            all(what, of(links), of(&gpu.links))?;
        }
        one("boot time in us", (*boot_us).into(), gpu.boot_us.into())?;
        one("timing mode", (*timing).into(), gpu.timing.into())
    }
}

fn all(
    what: &'static str,
    have: impl IntoIterator<Item = u64>,
    want: impl IntoIterator<Item = u64>,
) -> Result<(), RestoreError> {
    let mut pairs = have.into_iter().zip(want).enumerate();
    pairs.try_for_each(|(index, (have, want))| same(what, index, have, want))
}

/// Says what differs.
pub(crate) fn same(
    what: &'static str,
    index: usize,
    have: u64,
    want: u64,
) -> Result<(), RestoreError> {
    let differs = RestoreError::Shape {
        what,
        index,
        have,
        want,
    };
    (have == want).then_some(()).ok_or(differs)
}
