//! The client's memory: what it mapped, and the function's way to it.
//!
//! An access holds the map that it uses, not a lock: maps come and go beside it, accesses may nest, and an unmap
//! returns only when no access can use the memory any more.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};
use std::time::Duration;

use numagpu_devices::bus::{BackingId, DmaAccess, DmaError, DmaPort, Mapped};
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::MAX_DMA_MAPS;
pub use super::map_error::MapError;
use super::wire::DmaMap;

/// `DMA_MAP` flag: the server may read.
pub const READABLE: u32 = 1 << 0;

/// `DMA_MAP` flag: the server may write.
pub const WRITABLE: u32 = 1 << 1;

/// Maps that may show a partition together; with more it counts as mapped in part.
const MAX_PIECES: usize = 4096;

/// How long an unmap sleeps before it looks again; accesses that end wake it before.
const UNMAP_POLL: Duration = Duration::from_millis(1);

/// One map. Its memory is unmapped when the last user drops it.
#[derive(Debug)]
struct Map {
    address: u64,
    size: u64,
    flags: u32,
    offset: u64,
    memory: Option<Memory>,
}

/// What a map with a file descriptor shows.
#[derive(Debug)]
struct Memory {
    id: BackingId,
    region: MmapRegion,
}

impl Map {
    /// The last address; sizes are never 0.
    fn last(&self) -> u64 {
        self.address + (self.size - 1)
    }

    fn contains(&self, address: u64) -> bool {
        (self.address..=self.last()).contains(&address)
    }

    fn writable(&self) -> bool {
        self.flags & WRITABLE != 0
    }

    /// Whether a request describes this very map.
    fn is(&self, request: &DmaMap, id: Option<BackingId>) -> bool {
        let memory = self.memory.as_ref().map(|memory| memory.id);
        (self.address, self.size, self.flags, self.offset, memory)
            == (
                request.address,
                request.size,
                request.flags,
                request.offset,
                id,
            )
    }

    /// Whether the map's memory can be reached that way.
    fn check(&self, address: u64, len: u64, access: DmaAccess) -> Result<(), DmaError> {
        let readable = self.flags & READABLE != 0;
        match access {
            DmaAccess::Write if !self.writable() => Err(DmaError::ReadOnly { address }),
            DmaAccess::Read if !readable => Err(DmaError::Unmapped { address, len }),
            _ if self.memory.is_none() => Err(DmaError::Unmapped { address, len }),
            _ => Ok(()),
        }
    }

    /// What the map shows from `address` on, which is inside.
    fn shown(&self, address: u64) -> Mapped {
        match &self.memory {
            None => Mapped::NoFd,
            Some(memory) => Mapped::File {
                id: memory.id,
                offset: self.offset + (address - self.address),
                writable: self.writable(),
            },
        }
    }

    /// `len` bytes from `address`, both inside the map.
    fn slice(&self, address: u64, len: u64) -> Option<VolatileSlice<'_>> {
        let region = &self.memory.as_ref()?.region;
        let offset = usize::try_from(address.checked_sub(self.address)?).ok()?;
        region.get_slice(offset, usize::try_from(len).ok()?).ok()
    }
}

/// One file may back many maps: its descriptor is kept once per way it was opened.
type FileKey = (BackingId, OFlags);

#[derive(Debug, Default)]
struct Maps {
    disconnected: bool,
    by_address: BTreeMap<u64, Arc<Map>>,
    files: HashMap<FileKey, Weak<File>>,
}

impl Maps {
    fn at(&self, address: u64) -> Option<&Arc<Map>> {
        let (_, map) = self.by_address.range(..=address).next_back()?;
        map.contains(address).then_some(map)
    }

    /// The map with the lowest address that shares a byte with `first..=last`.
    fn any_in(&self, first: u64, last: u64) -> Option<&Arc<Map>> {
        let next = || self.by_address.range(first..=last).next().map(|(_, m)| m);
        self.at(first).or_else(next)
    }

    /// What maps show that follow each other without a gap, in memory and in their file, as if they were one. An IOMMU in
    /// front of the device maps in pages.
    fn run(&self, address: u64, last: u64) -> Option<Mapped> {
        // Looked for first: while pages come in one after the other, this ends it.
        self.at(last)?;
        let first = self.at(address)?;
        let whole = first.shown(address);
        let mut end = first.last();
        for (_, map) in self.by_address.range(address..=last).take(MAX_PIECES) {
            if map.address <= end {
                // The first of them, which begins at `address`.
                continue;
            }
            let expected = match whole {
                Mapped::File {
                    id,
                    offset,
                    writable,
                } => Mapped::File {
                    id,
                    offset: offset.checked_add(map.address - address)?,
                    writable,
                },
                other => other,
            };
            if map.address - 1 != end || map.shown(map.address) != expected {
                return None;
            }
            end = map.last();
        }
        (end >= last).then_some(whole)
    }
}

/// The maps of one connection. Once disconnected it stays so: the next client gets a table of its own.
#[derive(Debug, Default)]
pub struct DmaTable {
    maps: RwLock<Maps>,
    /// Unmaps that wait for accesses to end.
    waiting: AtomicUsize,
    gate: Mutex<()>,
    ended: Condvar,
}

/// A map in use by an access.
struct InUse<'a> {
    table: &'a DmaTable,
    map: Option<Arc<Map>>,
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        drop(self.map.take());
        if self.table.waiting.load(Ordering::SeqCst) > 0 {
            let gate = self.table.gate.lock();
            self.table.ended.notify_all();
            drop(gate);
        }
    }
}

impl DmaTable {
    /// An empty table.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of maps.
    #[must_use]
    pub fn len(&self) -> usize {
        self.read().by_address.len()
    }

    /// Whether there are no maps.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a map, of `fd`'s file if there is one. The descriptor is closed or kept by the table. A map that is
    /// there already, the same in everything, is accepted and stays.
    ///
    /// # Errors
    /// [`MapError`]; the table is then as before.
    pub fn map(&self, request: &DmaMap, fd: Option<OwnedFd>) -> Result<(), MapError> {
        let last = check(request)?;
        let file = fd.map(|fd| open(request, fd)).transpose()?;
        let mut maps = self.write();
        if let Some(other) = maps.any_in(request.address, last) {
            if other.is(request, file.as_ref().map(|((id, _), _)| *id)) {
                return Ok(());
            }
            return Err(MapError::Overlap {
                address: request.address,
                size: request.size,
                other: other.address,
                other_size: other.size,
            });
        }
        if maps.by_address.len() >= MAX_DMA_MAPS {
            return Err(MapError::TooMany);
        }
        let memory = file
            .map(|(key, file)| {
                let file = maps.share(key, file);
                memory(request, key.0, file)
            })
            .transpose()?;
        let map = Map {
            address: request.address,
            size: request.size,
            flags: request.flags,
            offset: request.offset,
            memory,
        };
        maps.by_address.insert(request.address, Arc::new(map));
        Ok(())
    }

    /// Removes the maps in this range, as VFIO's type 1 version 2 does: a VMM with an IOMMU before the device unmaps more at
    /// once than it mapped. When this returns no access uses them any more.
    ///
    /// # Errors
    /// [`MapError::NotMapped`] if there is none, or one that lies in the range in part; the table is then as before.
    pub fn unmap(&self, address: u64, size: u64) -> Result<(), MapError> {
        let none = || MapError::NotMapped { address, size };
        let more = size.checked_sub(1).ok_or_else(none)?;
        let last = address.checked_add(more).ok_or_else(none)?;
        let mut maps = self.write();
        let is_cut = |at: u64| {
            let map = maps.at(at);
            map.is_some_and(|map| map.address < address || map.last() > last)
        };
        if is_cut(address) || is_cut(last) {
            return Err(none());
        }
        let inside: Vec<u64> = maps
            .by_address
            .range(address..=last)
            .map(|(at, _)| *at)
            .collect();
        let gone: Vec<Arc<Map>> = inside
            .iter()
            .filter_map(|at| maps.by_address.remove(at))
            .collect();
        drop(maps);
        if gone.is_empty() {
            return Err(none());
        }
        gone.into_iter().for_each(|map| self.retire(map));
        Ok(())
    }

    /// Removes all maps. When this returns no access uses any of them any more.
    pub fn unmap_all(&self) {
        let maps = std::mem::take(&mut self.write().by_address);
        maps.into_values().for_each(|map| self.retire(map));
    }

    /// Removes all maps, and answers every access from now on with [`DmaError::Disconnected`].
    pub fn disconnect(&self) {
        self.write().disconnected = true;
        self.unmap_all();
    }

    /// Waits until `map`, which is in the table no more, has no other user, and drops it.
    fn retire(&self, mut map: Arc<Map>) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match Arc::try_unwrap(map) {
                Ok(map) => {
                    drop(map);
                    break;
                }
                Err(used) => map = used,
            }
            (gate, _) = self
                .ended
                .wait_timeout(gate, UNMAP_POLL)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(gate);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// The maps that `address..=last` goes through, in order, each fit for `access`.
    fn pieces(
        &self,
        address: u64,
        last: u64,
        access: DmaAccess,
    ) -> Result<(InUse<'_>, Vec<InUse<'_>>), DmaError> {
        let len = last - address + 1;
        let maps = self.read();
        if maps.disconnected {
            return Err(DmaError::Disconnected);
        }
        let find = |at: u64| -> Result<(InUse<'_>, u64), DmaError> {
            let map = maps.at(at).ok_or(DmaError::Unmapped { address, len })?;
            map.check(address, len, access)?;
            let in_use = InUse {
                table: self,
                map: Some(Arc::clone(map)),
            };
            Ok((in_use, map.last()))
        };
        let (first, mut end) = find(address)?;
        let mut more = Vec::new();
        while end < last {
            let (piece, piece_end) = find(end + 1)?;
            more.push(piece);
            end = piece_end;
        }
        Ok((first, more))
    }

    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Maps {
    /// The descriptor kept for this file; `file` itself if there is none yet.
    fn share(&mut self, key: FileKey, file: File) -> Arc<File> {
        if let Some(kept) = self.files.get(&key).and_then(Weak::upgrade) {
            return kept;
        }
        self.files.retain(|_, file| file.strong_count() > 0);
        let file = Arc::new(file);
        self.files.insert(key, Arc::downgrade(&file));
        file
    }
}

/// Checks the numbers of a map; its last address.
fn check(request: &DmaMap) -> Result<u64, MapError> {
    let DmaMap {
        flags,
        offset,
        address,
        size,
    } = *request;
    if flags == 0 || flags & !(READABLE | WRITABLE) != 0 {
        return Err(MapError::Flags(flags));
    }
    if size == 0 {
        return Err(MapError::Empty { address });
    }
    // The end of a file is a signed 64-bit number.
    let file_end = offset.checked_add(size).map(i64::try_from);
    match (address.checked_add(size - 1), file_end) {
        (Some(last), Some(Ok(_))) => Ok(last),
        _ => Err(MapError::Wraps {
            address,
            size,
            offset,
        }),
    }
}

/// Checks that a map can never reach past the end of `fd`'s file as it is now.
fn open(request: &DmaMap, fd: OwnedFd) -> Result<(FileKey, File), MapError> {
    let host = |errno| MapError::Host {
        offset: request.offset,
        size: request.size,
        errno,
    };
    let stat = fstat(fd.as_fd()).map_err(host)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MapError::NotAFile);
    }
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    if request.offset + request.size > len {
        return Err(MapError::ShortFile {
            len,
            offset: request.offset,
            size: request.size,
        });
    }
    let mode = fcntl_getfl(fd.as_fd()).map_err(host)? & OFlags::RWMODE;
    let id = BackingId {
        device: stat.st_dev,
        inode: stat.st_ino,
    };
    Ok(((id, mode), File::from(fd)))
}

/// Maps a range of a file that was checked to be long enough.
fn memory(request: &DmaMap, id: BackingId, file: Arc<File>) -> Result<Memory, MapError> {
    let host = |errno| MapError::Host {
        offset: request.offset,
        size: request.size,
        errno,
    };
    let size = usize::try_from(request.size).map_err(|_| host(Errno::NOMEM))?;
    let prot = match request.flags & WRITABLE {
        0 => libc::PROT_READ,
        _ => libc::PROT_READ | libc::PROT_WRITE,
    };
    let region = MmapRegionBuilder::new(size)
        .with_mmap_prot(prot)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(file, request.offset))
        .build()
        .map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(error) => {
                host(Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))
            }
            _ => host(Errno::INVAL),
        })?;
    Ok(Memory { id, region })
}

impl DmaPort for DmaTable {
    fn access(
        &self,
        address: u64,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), DmaError> {
        let unmapped = DmaError::Unmapped { address, len };
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = address.checked_add(more).ok_or(unmapped)?;
        let (first, rest) = self.pieces(address, last, access)?;
        let mut at = address;
        for piece in std::iter::once(first).chain(rest) {
            let Some(map) = &piece.map else { continue };
            let end = map.last().min(last);
            let slice = map.slice(at, end - at + 1).ok_or(unmapped)?;
            f(slice);
            at = end.wrapping_add(1);
        }
        Ok(())
    }

    fn copy(&self, source: u64, destination: u64, len: u64) -> Result<(), DmaError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let range = |address: u64, access| {
            let unmapped = DmaError::Unmapped { address, len };
            let last = address.checked_add(more).ok_or(unmapped)?;
            self.pieces(address, last, access)
        };
        let (from, more_from) = range(source, DmaAccess::Read)?;
        let (to, more_to) = range(destination, DmaAccess::Write)?;
        let mut from = std::iter::once(&from).chain(&more_from).peekable();
        let mut to = std::iter::once(&to).chain(&more_to).peekable();
        let mut parts = Vec::with_capacity(1);
        let mut done = 0;
        while let (Some(Some(read)), Some(Some(write))) = (
            from.peek().map(|piece| piece.map.as_deref()),
            to.peek().map(|piece| piece.map.as_deref()),
        ) {
            let (read_at, write_at) = (source + done, destination + done);
            let (read_left, write_left) = (read.last() - read_at, write.last() - write_at);
            // Of this part, less one: 2^64 bytes do not fit.
            let part = read_left.min(write_left).min(more - done);
            let slices = (
                read.slice(read_at, part + 1),
                write.slice(write_at, part + 1),
            );
            parts.push(slices);
            if part == more - done {
                break;
            }
            done += part + 1;
            from.next_if(|_| part == read_left);
            to.next_if(|_| part == write_left);
        }
        // A part that lies in the other range is read before it is written.
        if source < destination {
            parts.reverse();
        }
        for part in parts {
            if let (Some(read), Some(write)) = part {
                read.copy_to_volatile_slice(write);
            }
        }
        Ok(())
    }

    fn mapped(&self, address: u64, len: u64) -> Mapped {
        let Some(last) = len
            .checked_sub(1)
            .and_then(|more| address.checked_add(more))
        else {
            return Mapped::Nothing;
        };
        let maps = self.read();
        match maps.any_in(address, last) {
            None => Mapped::Nothing,
            Some(first) if first.contains(address) && first.contains(last) => first.shown(address),
            Some(_) => maps.run(address, last).unwrap_or(Mapped::Partial),
        }
    }
}
