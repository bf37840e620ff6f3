//! The client's memory: what it mapped, and the function's way to it.
//!
//! An access holds the map that it uses, not a lock: maps come and go beside it, accesses may nest, and an unmap
//! returns only when no access can use the memory any more.

pub mod dirty;
mod files;
mod map;
mod maps;
pub mod room;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use numagpu_devices::bus::{BackingId, DmaAccess, DmaError, DmaPort, Mapped};
use vm_memory::VolatileSlice;

use dirty::{DirtyError, DirtyLog};
pub use map::MapError;
use map::{Backing, Map};
use maps::Maps;

use super::MAX_DMA_MAPS;
use super::bounce::Bounce;
use super::client::{Client, Failure, Remote};
use super::wire::DmaMap;

/// `DMA_MAP` flag: the server may read.
pub const READABLE: u32 = 1 << 0;

/// `DMA_MAP` flag: the server may write.
pub const WRITABLE: u32 = 1 << 1;

/// How long an unmap sleeps before it looks again; accesses that end wake it before.
const UNMAP_POLL: Duration = Duration::from_millis(1);

/// The maps of one connection. Once disconnected it stays so: the next client gets a table of its own.
#[derive(Debug)]
pub struct DmaTable {
    maps: RwLock<Maps>,
    /// Unmaps that wait for accesses to end.
    waiting: AtomicUsize,
    gate: Mutex<()>,
    ended: Condvar,
    /// Who is asked for memory that comes without a file; without, it cannot be reached.
    client: Option<Arc<Client>>,
    dirty: DirtyLog,
    max_maps: usize,
}

impl Default for DmaTable {
    fn default() -> Self {
        Self {
            maps: RwLock::default(),
            waiting: AtomicUsize::new(0),
            gate: Mutex::default(),
            ended: Condvar::new(),
            client: None,
            dirty: DirtyLog::default(),
            max_maps: MAX_DMA_MAPS,
        }
    }
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

    /// An empty table, of so many maps at most, of a client that can be asked for memory.
    #[must_use]
    pub fn with_client(client: Arc<Client>, max_maps: usize) -> Self {
        Self {
            client: Some(client),
            max_maps,
            ..Self::default()
        }
    }

    /// Number of maps.
    #[must_use]
    pub fn len(&self) -> usize {
        self.read().len()
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
        let last = map::check(request)?;
        match fd {
            None => self.insert(request, last, None, |_| {
                Ok(Backing::Client(Remote::default()))
            }),
            Some(fd) => {
                let opened = files::open(request, fd)?;
                let id = opened.id();
                self.insert(request, last, Some(id), |maps| {
                    Ok(Backing::File(id, maps.files.view(request, opened)?))
                })
            }
        }
    }

    /// Adds a map that came without a descriptor and shows memory of the function itself: `file` from `offset` on.
    ///
    /// # Errors
    /// As [`DmaTable::map`].
    pub fn map_own(&self, request: &DmaMap, file: OwnedFd, offset: u64) -> Result<(), MapError> {
        let last = map::check(request)?;
        let own = DmaMap { offset, ..*request };
        map::check(&own)?;
        let opened = files::open(&own, file)?;
        self.insert(request, last, None, |maps| {
            Ok(Backing::Own {
                file: opened.id(),
                offset,
                memory: maps.files.view(&own, opened)?,
            })
        })
    }

    fn insert(
        &self,
        request: &DmaMap,
        last: u64,
        id: Option<BackingId>,
        backing: impl FnOnce(&mut Maps) -> Result<Backing, MapError>,
    ) -> Result<(), MapError> {
        let mut maps = self.write();
        if let Some(other) = maps.any_in(request.address, last) {
            if other.is(request, id) {
                return Ok(());
            }
            return Err(MapError::Overlap {
                address: request.address,
                size: request.size,
                other: other.address,
                other_size: other.size,
            });
        }
        let have = maps.len();
        if have >= self.max_maps {
            return Err(MapError::TooMany(have));
        }
        let map = Map {
            address: request.address,
            size: request.size,
            flags: request.flags,
            offset: request.offset,
            backing: backing(&mut maps)?,
        };
        maps.add(map);
        self.dirty.mapped(request.address, last);
        Ok(())
    }

    /// The log of the device's writes.
    #[must_use]
    pub fn dirty(&self) -> &DirtyLog {
        &self.dirty
    }

    /// Logs writes from now on, to ranges or to all that is and will be mapped.
    ///
    /// # Errors
    /// As [`DirtyLog::start`].
    pub fn start_log(&self, page_hint: u64, ranges: &[(u64, u64)]) -> Result<u64, DirtyError> {
        // No map comes or goes meanwhile: that is the calling thread's to do.
        let maps = self.read();
        // Those that are not writable too: they may show HBM, which engines write by another way.
        let mapped = maps.all().map(|map| (map.address, map.last()));
        self.dirty.start(page_hint, ranges, mapped)
    }

    /// Marks a part of a file wherever it is mapped.
    #[cold]
    fn mark_shown(&self, file: BackingId, offset: u64, len: u64) {
        let last = len.checked_sub(1).and_then(|it| offset.checked_add(it));
        let Some(last) = last else { return };
        let maps = self.read();
        for (first, last) in maps.showing(file, offset, last) {
            self.dirty.mark(first, last);
        }
    }

    /// Whether there is a map of exactly this range.
    #[must_use]
    pub fn has(&self, address: u64, size: u64) -> bool {
        let maps = self.read();
        let map = maps.at(address);
        map.is_some_and(|map| (map.address, map.size) == (address, size))
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
        let gone = maps.take(address, last);
        drop(maps);
        if gone.is_empty() {
            return Err(none());
        }
        gone.iter().for_each(|map| self.forget(map));
        gone.into_iter().for_each(|map| self.retire(map));
        Ok(())
    }

    /// Removes all maps. When this returns no access uses any of them any more.
    pub fn unmap_all(&self) {
        let gone = self.write().take(0, u64::MAX);
        gone.iter().for_each(|map| self.forget(map));
        gone.into_iter().for_each(|map| self.retire(map));
    }

    /// Removes all maps, and answers every access from now on with [`DmaError::Disconnected`]. Whoever waits for the
    /// client waits no more, and nothing is sent any more.
    pub fn disconnect(&self) {
        if let Some(client) = &self.client {
            client.close();
        }
        self.write().disconnected = true;
        self.unmap_all();
    }

    /// Ends the commands that wait for the memory of `map`, which is in the table no more. They have been sent, so a
    /// client that takes messages in order has done them before it sees that its map is removed; what they would have
    /// brought is lost, and the access fails.
    fn forget(&self, map: &Map) {
        if let (Backing::Client(remote), Some(client)) = (&map.backing, &self.client) {
            client.forget(remote, map.address, map.last());
        }
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
            map.check(self.client.as_deref(), address, len, access)?;
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

/// A part of a copy, from one map to one map.
struct Part<'m> {
    read: &'m Map,
    read_at: u64,
    write: &'m Map,
    write_at: u64,
    /// Bytes, less one.
    more: u64,
}

impl DmaTable {
    /// Accesses memory that the client has to be asked for.
    fn ask(
        &self,
        remote: &Remote,
        address: u64,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), DmaError> {
        let unmapped = DmaError::Unmapped { address, len };
        let client = self.client.as_ref().ok_or(unmapped)?;
        let mut bounce = Bounce::default();
        let mut done = 0;
        while done < len {
            let at = address + done;
            let part = client.part(at, len - done);
            bounce.begin(at, usize::try_from(part).map_err(|_| unmapped)?);
            if access.reads() {
                let fetched = client.fetch(remote, &mut bounce);
                fetched.map_err(|failure| failed(failure, at, part))?;
            }
            f(VolatileSlice::from(bounce.bytes_mut()));
            if access.writes() {
                let stored = client.store(remote, &mut bounce);
                stored.map_err(|failure| failed(failure, at, part))?;
            }
            done += part.max(1);
        }
        Ok(())
    }

    /// Does a part of a copy; from its end if it may lie in what is still to be read.
    fn carry(&self, part: &Part<'_>, backward: bool) -> Result<(), DmaError> {
        let Part {
            read,
            read_at,
            write,
            write_at,
            more,
        } = *part;
        let len = more.saturating_add(1);
        if let (Some(from), Some(to)) = (read.slice(read_at, len), write.slice(write_at, len)) {
            from.copy_to_volatile_slice(to);
            return read.kept(read_at).and(write.kept(write_at));
        }
        let unmapped = DmaError::Unmapped {
            address: read_at,
            len,
        };
        let client = self.client.as_ref().ok_or(unmapped)?;
        let mut bounce = Bounce::default();
        let mut done = 0;
        while done < len {
            let step = client.part(0, len - done).max(1);
            let at = if backward { len - done - step } else { done };
            bounce.begin(read_at + at, usize::try_from(step).map_err(|_| unmapped)?);
            match (&read.backing, read.slice(read_at + at, step)) {
                (Backing::Client(remote), _) => {
                    let fetched = client.fetch(remote, &mut bounce);
                    fetched.map_err(|failure| failed(failure, read_at + at, step))?;
                }
                (_, from) => {
                    from.ok_or(unmapped)?.copy_to(bounce.bytes_mut());
                }
            }
            bounce.readdress(write_at + at);
            match (&write.backing, write.slice(write_at + at, step)) {
                (Backing::Client(remote), _) => {
                    let stored = client.store(remote, &mut bounce);
                    stored.map_err(|failure| failed(failure, write_at + at, step))?;
                }
                (_, to) => to.ok_or(unmapped)?.copy_from(bounce.bytes()),
            }
            done += step;
        }
        read.kept(read_at).and(write.kept(write_at))
    }
}

fn failed(failure: Failure, address: u64, len: u64) -> DmaError {
    match failure {
        Failure::Closed => DmaError::Disconnected,
        Failure::Unmapped => DmaError::Unmapped { address, len },
        _ => DmaError::Failed { address },
    }
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
            let done = match &map.backing {
                Backing::Client(remote) => self.ask(remote, at, end - at + 1, access, f),
                _ => map.show(at, end - at + 1, f),
            };
            if access.writes() {
                self.dirty.mark(at, end);
            }
            done?;
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
            parts.push(Part {
                read,
                read_at,
                write,
                write_at,
                more: part,
            });
            if part == more - done {
                break;
            }
            done += part + 1;
            from.next_if(|_| part == read_left);
            to.next_if(|_| part == write_left);
        }
        // A part that lies in the other range is read before it is written.
        let backward = source < destination;
        if backward {
            parts.reverse();
        }
        parts.iter().try_for_each(|part| {
            let done = self.carry(part, backward);
            self.dirty.mark(part.write_at, part.write_at + part.more);
            done
        })
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

    fn wrote(&self, file: BackingId, offset: u64, len: u64) {
        if self.dirty.is_on() {
            self.mark_shown(file, offset, len);
        }
    }
}
