//! The seam between a device and whatever carries it.
//!
//! A transport (vfio-user, an in-process test, a VMM's own PCI bus) knows a device as a [`PciFunction`], and
//! gives it two things in return: a [`DmaPort`] to reach guest memory and an [`InterruptSink`]. Devices know no
//! transport; transports know no GPU.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use thiserror::Error;
use vm_memory::{VolatileMemoryError, VolatileSlice};

/// A part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// Size and kind of one base address register.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bar {
    /// BAR number, 0 to 5; a 64-bit BAR also takes the next number.
    pub index: u8,
    /// Bytes, a power of two from 16 up.
    pub size: u64,
    /// Whether it decodes 64-bit addresses.
    pub is_64bit: bool,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// Parts that a client may map from [`PciFunction::bar_file`] instead of asking for each access: multiples of
    /// 4096 bytes, ascending, disjoint. They are plain memory, without side effects. Empty where there is no file.
    pub mappable: Vec<Area>,
}

/// A place in a BAR where a write of any value and width does the same: a transport may carry it as an event without a
/// value, as KVM's ioeventfd does, and then write what it likes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kick {
    /// BAR.
    pub bar: u8,
    /// Offset in the BAR.
    pub offset: u64,
}

/// A part of a BAR whose writes may come as events: who serves the guest's accesses can tell its kernel to signal the
/// descriptor (`KVM_IOEVENTFD`) and send nothing. What was written is then not known.
#[derive(Clone, Copy, Debug)]
pub struct IoFd<'f> {
    /// First byte in the BAR.
    pub offset: u64,
    /// Bytes of a write; 0 for any.
    pub size: u64,
    /// Which value is meant; none for any.
    pub datamatch: Option<u64>,
    /// An event descriptor, which several parts may share.
    pub event: BorrowedFd<'f>,
}

/// What a transport has to know of a function before it serves it. Constant for the function's life.
#[derive(Clone, Debug)]
pub struct FunctionLayout {
    /// BARs in use, ascending.
    pub bars: Vec<Bar>,
    /// Bytes of configuration space: 256 or 4096.
    pub config_size: u32,
    /// Number of MSI-X vectors; 0 if it has none.
    pub msix_vectors: u16,
}

/// Why a function is reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetKind {
    /// Function-level reset by the driver (PCIe Base 6.0 section 6.6.2).
    Function,
    /// Hot reset of the bus (PCIe Base 6.0 section 6.6.1): the VMM asks for it, when the machine is reset too.
    Hot,
    /// The VMM went away; the next one starts with a device fresh from power-on.
    Disconnect,
}

/// Why a DMA did not happen.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DmaError {
    /// Nothing is mapped there, or not all of the range is.
    #[error("nothing is mapped at {address:#x}..+{len:#x}")]
    Unmapped {
        /// First address.
        address: u64,
        /// Bytes.
        len: u64,
    },
    /// A write to memory mapped for reading only.
    #[error("{address:#x} is mapped for reading only")]
    ReadOnly {
        /// First address.
        address: u64,
    },
    /// The VMM, which has to be asked for this memory, did not give or take it; or it took the memory away during the
    /// access.
    #[error("the VMM did not move the memory at {address:#x}, or took it away")]
    Failed {
        /// First address of what was asked for.
        address: u64,
    },
    /// The transport is gone.
    #[error("no VMM is connected")]
    Disconnected,
}

/// Direction of a DMA, as the guest's memory sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// The device reads memory.
    Read,
    /// The device writes memory, all of it: what it does not write is zero afterwards where the VMM is asked.
    Write,
    /// The device reads memory and writes it, or a part of it.
    Change,
}

impl DmaAccess {
    /// Whether the device sees what is there.
    #[must_use]
    pub fn reads(self) -> bool {
        self != DmaAccess::Write
    }

    /// Whether memory may be different afterwards.
    #[must_use]
    pub fn writes(self) -> bool {
        self != DmaAccess::Read
    }
}

/// Identity of a file that backs memory: two mappings with equal identity and offset show the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackingId {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// What the VMM maps over an address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// Nothing.
    Nothing,
    /// Only a part of the range, or parts of several maps that are not as one.
    Partial,
    /// All of it, but without a file descriptor.
    NoFd,
    /// All of it, by one file, the bytes in their order.
    File {
        /// Which file.
        id: BackingId,
        /// Offset in the file of the first byte of the range.
        offset: u64,
        /// Whether the device may write.
        writable: bool,
    },
}

/// Guest memory by bus address (IOVA). Every call checks the mapping that is in force when it is made; a
/// mapping cannot go away while a call uses it.
///
/// Memory that the VMM maps without a file ([`Mapped::NoFd`]) is moved by asking the VMM. That takes tens of
/// microseconds, is not atomic to the guest's processors, and can fail half-way. It cannot be done by the thread that
/// calls the [`PciFunction`]: that thread would wait for itself, so for it such memory fails at once.
pub trait DmaPort: Send + Sync {
    /// Calls `f` with each piece of `len` bytes from `address`, in order, as directly accessible memory.
    ///
    /// # Errors
    /// [`DmaError`] if any part is not mapped for `access`; then `f` was not called. After [`DmaError::Failed`] or
    /// [`DmaError::Disconnected`] it may have been, and a part may be written.
    fn access(
        &self,
        address: u64,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), DmaError>;

    /// Copies `len` bytes from one range of addresses to another, from mapping to mapping without a buffer
    /// between. Where the ranges overlap, it is as if all bytes were read before any is written; where one memory
    /// is mapped at several addresses, only the addresses count.
    ///
    /// # Errors
    /// [`DmaError`] with the range's address, if any part of `source` is not mapped for reading or any of
    /// `destination` not for writing; then nothing was copied. [`DmaError::Failed`] may leave a part copied.
    fn copy(&self, source: u64, destination: u64, len: u64) -> Result<(), DmaError>;

    /// What the VMM maps over `address..address + len`.
    fn mapped(&self, address: u64, len: u64) -> Mapped;

    /// The device wrote `len` bytes from `offset` of a file, or may have, and not by this port: HBM, which the VMM may
    /// show to its guest. A port that logs writes has one at each address where it shows these bytes. Called after the
    /// write, for each chunk of work, so it costs next to nothing while nothing is logged; never from within
    /// [`DmaPort::access`].
    fn wrote(&self, _file: BackingId, _offset: u64, _len: u64) {}
}

/// Interrupts besides MSI-X, with the index that VFIO gives them (`linux/vfio.h`, `VFIO_PCI_INTX_IRQ_INDEX` and the next).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherInterrupt {
    /// The pin.
    Intx = 0,
    /// MSI.
    Msi = 1,
    /// An uncorrectable error was met.
    Error = 3,
    /// The device is wanted back.
    Request = 4,
}

/// Where a function's MSI-X messages go.
pub trait InterruptSink: Send + Sync {
    /// Sends the message of `vector`. False if nobody listens to that vector now.
    fn trigger(&self, vector: u16) -> bool;

    /// Sends an interrupt of another kind. False if nobody listens to it now, or the transport has none.
    fn trigger_other(&self, _kind: OtherInterrupt, _vector: u16) -> bool {
        false
    }
}

/// What a transport hands to a function when a VMM connects.
#[derive(Clone)]
pub struct Attachment {
    /// Guest memory.
    pub dma: Arc<dyn DmaPort>,
    /// Interrupts.
    pub irq: Arc<dyn InterruptSink>,
}

/// A PCI function as a transport sees it.
///
/// Accesses never fail: a read of what does not exist fills `data` with what the function says (zeros or
/// ones), a write there is dropped. No call blocks on the guest, on another device or on a queue's work.
/// Accesses may have any length and alignment.
pub trait PciFunction: Send + Sync {
    /// BARs, configuration space size, interrupts.
    fn layout(&self) -> &FunctionLayout;
    /// A VMM connected. Called before any access.
    fn attach(&self, attachment: Attachment);
    /// The VMM is gone. When this returns the function uses the attachment no more, and is as after
    /// [`ResetKind::Disconnect`].
    fn detach(&self);
    /// The VMM's memory map changed; [`DmaPort::mapped`] may answer differently now.
    fn dma_changed(&self);
    /// Reads configuration space.
    fn config_read(&self, offset: u32, data: &mut [u8]);
    /// Writes configuration space.
    fn config_write(&self, offset: u32, data: &[u8]);
    /// Reads a BAR.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes a BAR.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);
    /// The file that a client maps the [mappable](Bar::mappable) parts of a BAR from, shared; offsets in it are
    /// offsets in the BAR. The same for the function's life. None if no part of the BAR is mappable.
    fn bar_file(&self, _bar: u8) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Where the value of a write does not matter. The same for the function's life.
    fn kicks(&self) -> &[Kick] {
        &[]
    }
    /// Parts of a BAR whose writes may come as events. The same for the function's life.
    fn io_fds(&self, _bar: u8) -> Vec<IoFd<'_>> {
        Vec::new()
    }
    /// How many interrupts it has besides MSI-X, of each kind at most once. The same for the function's life.
    fn other_interrupts(&self) -> &[(OtherInterrupt, u16)] {
        &[]
    }
    /// The way to carry the function's state elsewhere; none if it cannot be.
    fn migrate(&self) -> Option<&dyn Migrate> {
        None
    }
    /// Resets the function. HBM that drivers owned is scrubbed and free afterwards.
    fn reset(&self, kind: ResetKind);
}

/// Why a function's state is not carried.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MigrateError {
    /// It did not come to rest in time; it goes on as before.
    #[error("the device did not stop: {0}")]
    Busy(String),
    /// It is in use; it has to be as after power-on or a reset to take another one's state.
    #[error("the device is in use: {0}")]
    InUse(String),
    /// What was given is no state of such a function.
    #[error("no state of this device: {0}")]
    Bad(String),
}

/// A function whose state another function of the same configuration can take, in another process too.
///
/// The state is all but memory: guest memory and the contents of HBM are carried by whoever carries the machine.
pub trait Migrate {
    /// Comes to rest: work stops where it can go on elsewhere. Accesses are still answered, and resets and detaches
    /// work. Each success is followed by one [`Migrate::run`].
    ///
    /// # Errors
    /// [`MigrateError::Busy`].
    fn stop(&self) -> Result<(), MigrateError>;

    /// Goes on.
    fn run(&self);

    /// The state, while at rest: the same at every call if nobody accesses the function.
    ///
    /// # Errors
    /// [`MigrateError`].
    fn save(&self) -> Result<Vec<u8>, MigrateError>;

    /// Becomes the function whose state it is, while at rest. Memory has to be mapped and its contents there already.
    ///
    /// # Errors
    /// [`MigrateError`]; the function is then as before.
    fn load(&self, state: &[u8]) -> Result<(), MigrateError>;

    /// What a function has to agree in to take this one's state, as it is given while this one works: long before the
    /// state, so that nobody comes to rest for a target that does not fit. Empty if any function of its kind will do.
    ///
    /// # Errors
    /// [`MigrateError`].
    fn outline(&self) -> Result<Vec<u8>, MigrateError> {
        Ok(Vec::new())
    }

    /// Compares with [`Migrate::outline`] of another function, which is not empty.
    ///
    /// # Errors
    /// [`MigrateError::Bad`] if the state of that function would not be taken.
    fn fits(&self, outline: &[u8]) -> Result<(), MigrateError> {
        let bytes = outline.len();
        Err(MigrateError::Bad(format!(
            "{bytes} bytes that say what it has to be"
        )))
    }
}

/// The memory of one HBM partition.
pub trait HbmStore: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;
    /// `len` bytes from `offset`.
    ///
    /// # Errors
    /// If the range is not inside the store.
    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError>;
    /// Which file backs it, and at which offset of the file it starts.
    fn backing(&self) -> (BackingId, u64);
    /// The file that [`HbmStore::backing`] names, for a client to map. None if the memory is in no file.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Makes `len` bytes from `offset`, which are inside the store, read as zero and gives their pages back to the
    /// host.
    ///
    /// # Errors
    /// The host's error; the contents of the range are then undefined.
    fn scrub(&self, offset: u64, len: u64) -> std::io::Result<()>;
}
