//! A VMM for tests: guest memory that can be mapped and unmapped, and interrupts that are written down.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use vm_memory::{Bytes as _, VolatileSlice};

use crate::bus::{
    Attachment, BackingId, DmaAccess, DmaError, DmaPort, HbmStore, InterruptSink, Mapped,
};
use crate::memory::AnonymousStore;

/// One mapping: `size` bytes of `store` from `offset` on, at `address`.
#[derive(Clone)]
pub struct Mapping {
    /// First bus address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// What is mapped.
    pub store: Arc<dyn HbmStore>,
    /// First byte of the store that is mapped.
    pub offset: u64,
    /// Whether the device may write.
    pub writable: bool,
    /// Whether the VMM gave a file descriptor.
    pub has_fd: bool,
}

/// One access that a device made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Direction.
    pub access: DmaAccess,
}

/// A write of HBM that a device told of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Written {
    /// Number of the file.
    pub inode: u64,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Guest memory made of mappings; remembers every access.
#[derive(Default)]
pub struct RecordingDma {
    mappings: RwLock<Vec<Mapping>>,
    accesses: Mutex<Vec<Access>>,
    written: Mutex<Vec<Written>>,
    stalled: Mutex<Option<u64>>,
    resumed: Condvar,
}

impl RecordingDma {
    /// Maps a whole store at `address`, writable, with a descriptor.
    pub fn map(&self, address: u64, store: Arc<dyn HbmStore>) {
        self.add(Mapping {
            address,
            size: store.size(),
            store,
            offset: 0,
            writable: true,
            has_fd: true,
        });
    }

    /// Maps `size` bytes of new memory at `address`, and gives the memory.
    ///
    /// # Errors
    /// If the host refuses the memory.
    pub fn map_ram(&self, address: u64, size: usize) -> std::io::Result<Arc<AnonymousStore>> {
        let store = Arc::new(AnonymousStore::new(size).map_err(std::io::Error::other)?);
        self.map(address, Arc::clone(&store) as Arc<dyn HbmStore>);
        Ok(store)
    }

    /// Adds a mapping.
    pub fn add(&self, mapping: Mapping) {
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        mappings.push(mapping);
    }

    /// Removes the mappings that start at `address`. When this returns no access uses them.
    pub fn unmap(&self, address: u64) {
        let mut mappings = self
            .mappings
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        mappings.retain(|mapping| mapping.address != address);
    }

    /// Makes accesses that cover `address` wait, until [`RecordingDma::resume`].
    pub fn stall(&self, address: u64) {
        *lock(&self.stalled) = Some(address);
    }

    /// Lets waiting accesses go on.
    pub fn resume(&self) {
        *lock(&self.stalled) = None;
        self.resumed.notify_all();
    }

    /// Writes an access down, and waits while it is to be stalled.
    fn record(&self, address: u64, len: u64, access: DmaAccess) {
        lock(&self.accesses).push(Access {
            address,
            len,
            access,
        });
        let mut stalled = lock(&self.stalled);
        while stalled.is_some_and(|at| at >= address && at - address < len) {
            stalled = self
                .resumed
                .wait(stalled)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The writes of HBM that were told of since the last call, in order.
    pub fn take_written(&self) -> Vec<Written> {
        std::mem::take(&mut *lock(&self.written))
    }

    /// Every access so far, in order; a copy is two.
    pub fn accesses(&self) -> Vec<Access> {
        lock(&self.accesses).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The memory of `len` bytes from `address`, in order.
fn pieces(
    mappings: &[Mapping],
    address: u64,
    len: u64,
    access: DmaAccess,
) -> Result<Vec<VolatileSlice<'_>>, DmaError> {
    let unmapped = DmaError::Unmapped { address, len };
    let end = address.checked_add(len).ok_or(unmapped)?;
    let mut pieces = Vec::new();
    let mut position = address;
    while position < end {
        let covers = |m: &&Mapping| (m.address..m.address + m.size).contains(&position);
        let mapping = mappings.iter().find(covers).ok_or(unmapped)?;
        if access.writes() && !mapping.writable {
            return Err(DmaError::ReadOnly { address: position });
        }
        let inside = position - mapping.address;
        let count = (end - position).min(mapping.size - inside);
        let slice = mapping.store.slice(mapping.offset + inside, count);
        pieces.push(slice.map_err(|_| unmapped)?);
        position += count;
    }
    Ok(pieces)
}

impl DmaPort for RecordingDma {
    fn access(
        &self,
        address: u64,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), DmaError> {
        self.record(address, len, access);
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let pieces = pieces(&mappings, address, len, access)?;
        pieces.into_iter().for_each(f);
        Ok(())
    }

    fn copy(&self, source: u64, destination: u64, len: u64) -> Result<(), DmaError> {
        self.record(source, len, DmaAccess::Read);
        self.record(destination, len, DmaAccess::Write);
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let from = pieces(&mappings, source, len, DmaAccess::Read)?;
        let to = pieces(&mappings, destination, len, DmaAccess::Write)?;
        let mut data = Vec::new();
        for piece in from {
            let start = data.len();
            data.resize(start + piece.len(), 0);
            // The buffer has just the piece's length.
            let _all = piece.read(data.get_mut(start..).unwrap_or_default(), 0);
        }
        let mut rest = data.as_slice();
        for piece in to {
            let (part, after) = rest.split_at_checked(piece.len()).unwrap_or_default();
            let _all = piece.write(part, 0);
            rest = after;
        }
        Ok(())
    }

    fn mapped(&self, address: u64, len: u64) -> Mapped {
        let mappings = self.mappings.read().unwrap_or_else(PoisonError::into_inner);
        let end = address.saturating_add(len);
        let mut touching = mappings
            .iter()
            .filter(|m| m.address < end && address < m.address + m.size);
        let Some(mapping) = touching.next() else {
            return Mapped::Nothing;
        };
        if mapping.address > address || mapping.address + mapping.size < end {
            return Mapped::Partial;
        }
        if !mapping.has_fd {
            return Mapped::NoFd;
        }
        let (id, start): (BackingId, u64) = mapping.store.backing();
        Mapped::File {
            id,
            offset: start + mapping.offset + (address - mapping.address),
            writable: mapping.writable,
        }
    }

    fn wrote(&self, file: BackingId, offset: u64, len: u64) {
        lock(&self.written).push(Written {
            inode: file.inode,
            offset,
            len,
        });
    }
}

/// Interrupts, written down.
#[derive(Default)]
pub struct RecordingIrq {
    vectors: Mutex<Vec<u16>>,
    arrived: Condvar,
}

impl RecordingIrq {
    /// Vectors triggered so far, in order.
    pub fn vectors(&self) -> Vec<u16> {
        lock(&self.vectors).clone()
    }

    /// How often `vector` was triggered so far.
    pub fn count(&self, vector: u16) -> usize {
        lock(&self.vectors).iter().filter(|v| **v == vector).count()
    }

    /// Waits until `vector` was triggered `count` times in all; false after `limit`.
    pub fn wait(&self, vector: u16, count: usize, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut vectors = lock(&self.vectors);
        while vectors.iter().filter(|v| **v == vector).count() < count {
            let Some(rest) = end.checked_duration_since(Instant::now()) else {
                return false;
            };
            let woken = self.arrived.wait_timeout(vectors, rest);
            vectors = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl InterruptSink for RecordingIrq {
    fn trigger(&self, vector: u16) -> bool {
        lock(&self.vectors).push(vector);
        self.arrived.notify_all();
        true
    }
}

/// A VMM without a guest.
#[derive(Clone, Default)]
pub struct TestVmm {
    /// Its memory.
    pub dma: Arc<RecordingDma>,
    /// Its interrupts.
    pub irq: Arc<RecordingIrq>,
}

impl TestVmm {
    /// What a transport hands to a function.
    pub fn attachment(&self) -> Attachment {
        Attachment {
            dma: Arc::clone(&self.dma) as Arc<dyn DmaPort>,
            irq: Arc::clone(&self.irq) as Arc<dyn InterruptSink>,
        }
    }
}
