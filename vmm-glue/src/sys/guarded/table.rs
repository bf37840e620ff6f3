//! The address ranges that are guarded, to be looked up by a signal handler: lookups take no lock, allocate nothing and
//! never wait.
//!
//! A slot is written under a lock, and its version is odd meanwhile. A lookup that meets a change passes the slot over:
//! the range that it looks for is in use by the access that it is for, so its own slot does not change.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Slots of the first block; each next one has twice as many.
const FIRST: usize = 256;

/// Blocks, of 2^32 slots in all.
const BLOCKS: usize = 24;

/// The range shows its file.
const WHOLE: u32 = 0;
/// It was lost; what stands in for it is being put there, or is there.
const LOST: u32 = 1;
/// The same, and somebody has said so.
const TOLD: u32 = 2;

/// One range, or none.
#[derive(Debug, Default)]
struct Slot {
    /// Odd while the others change.
    version: AtomicUsize,
    start: AtomicUsize,
    end: AtomicUsize,
    /// Protection of the pages, as `mmap` takes it.
    protection: AtomicI32,
    state: AtomicU32,
}

impl Slot {
    fn write(&self, range: Range<usize>, protection: i32) {
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
        self.protection.store(protection, Ordering::Relaxed);
        self.state.store(WHOLE, Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// Range and protection, unless they change just now.
    fn read(&self) -> Option<(Range<usize>, i32)> {
        let before = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let end = self.end.load(Ordering::Relaxed);
        let protection = self.protection.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2)).then_some((start..end, protection))
    }
}

#[derive(Debug, Default)]
struct Free {
    slots: Vec<&'static Slot>,
    blocks: usize,
    used: usize,
}

/// Ranges of the address space. Its memory only grows: a handler may look at any slot at any time.
#[derive(Debug)]
pub(super) struct Table {
    blocks: [OnceLock<Box<[Slot]>>; BLOCKS],
    free: Mutex<Free>,
    /// Whether any range was ever lost. While none was, nobody has to look at a slot.
    any_lost: AtomicBool,
}

/// A range in a table, until this is dropped.
#[derive(Debug)]
pub(super) struct Entry {
    table: &'static Table,
    slot: &'static Slot,
}

impl Table {
    /// An empty table.
    pub(super) const fn new() -> Table {
        Table {
            blocks: [const { OnceLock::new() }; BLOCKS],
            free: Mutex::new(Free {
                slots: Vec::new(),
                blocks: 0,
                used: 0,
            }),
            any_lost: AtomicBool::new(false),
        }
    }

    /// Enters a range that overlaps no other; none if the table is full.
    pub(super) fn enter(&'static self, range: Range<usize>, protection: i32) -> Option<Entry> {
        let mut free = self.free();
        if free.slots.is_empty() {
            let block = self.blocks.get(free.blocks)?;
            let slots = block.get_or_init(|| {
                let len = FIRST << free.blocks;
                (0..len).map(|_| Slot::default()).collect()
            });
            free.blocks += 1;
            free.slots.extend(slots.iter().rev());
        }
        let slot = free.slots.pop()?;
        free.used += 1;
        slot.write(range, protection);
        Some(Entry { table: self, slot })
    }

    /// Ranges in the table.
    pub(super) fn len(&self) -> usize {
        self.free().used
    }

    /// Looks up an address that cannot be accessed. If it is in a range, that is lost: `replace` puts other memory there,
    /// and tells whether it could. True if the access can go on.
    ///
    /// For signal handlers. The access for which it is called keeps its range in the table until this returns.
    pub(super) fn rescue(
        &self,
        address: usize,
        replace: impl FnOnce(Range<usize>, i32) -> bool,
    ) -> bool {
        let blocks = self.blocks.iter().map_while(OnceLock::get);
        let found = blocks.flat_map(|block| block.iter()).find_map(|slot| {
            let (range, protection) = slot.read()?;
            range
                .contains(&address)
                .then_some((slot, range, protection))
        });
        let Some((slot, range, protection)) = found else {
            return false;
        };
        // Before the other memory is there: who sees that sees this too.
        self.any_lost.store(true, Ordering::SeqCst);
        let first = slot
            .state
            .compare_exchange(WHOLE, LOST, Ordering::SeqCst, Ordering::SeqCst);
        // If another thread was first, its memory is there, or will be: the access finds it, or comes here again.
        first.is_err() || replace(range, protection)
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Whether the range was lost, as whoever has accessed it sees it.
    pub(super) fn is_lost(&self) -> bool {
        fence(Ordering::Acquire);
        self.table.any_lost.load(Ordering::Relaxed)
            && self.slot.state.load(Ordering::Relaxed) != WHOLE
    }

    /// Whether the range was lost and nobody has been told so by this.
    pub(super) fn is_news(&self) -> bool {
        let told =
            self.slot
                .state
                .compare_exchange(LOST, TOLD, Ordering::Relaxed, Ordering::Relaxed);
        told.is_ok()
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut free = self.table.free();
        self.slot.write(0..0, 0);
        free.slots.push(self.slot);
        free.used = free.used.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> &'static Table {
        Box::leak(Box::new(Table::new()))
    }

    fn never(_: Range<usize>, _: i32) -> bool {
        panic!("replaced")
    }

    #[test]
    fn an_address_is_found_in_its_range_alone_and_lost_once() {
        let table = table();
        let low = table.enter(0x1000..0x3000, 1).unwrap();
        let high = table.enter(0x3000..0x4000, 3).unwrap();
        for outside in [0, 0xfff, 0x4000, usize::MAX] {
            assert!(!table.rescue(outside, never), "{outside:#x}");
        }
        assert!(!low.is_lost() && !high.is_lost() && !high.is_news());
        assert!(table.rescue(0x3000, |range, protection| {
            assert_eq!((range, protection), (0x3000..0x4000, 3));
            true
        }));
        assert!(high.is_lost() && !low.is_lost());
        assert!(table.rescue(0x3fff, never), "the access is tried again");
        assert!(high.is_news() && !high.is_news() && high.is_lost());
        assert!(!low.is_news());
        assert!(!table.rescue(0x2fff, |range, _| {
            assert_eq!(range, 0x1000..0x3000);
            false
        }));
        // The slot of a lost range serves the next one as new.
        drop(high);
        assert!(!table.rescue(0x3000, never));
        let next = table.enter(0x3000..0x4000, 3).unwrap();
        assert!(!next.is_lost());
        drop((low, next));
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn there_is_room_for_the_maps_of_many_clients_and_none_is_left() {
        let table = table();
        let range = |index: usize| index * 0x1000..(index + 1) * 0x1000;
        let entries: Vec<_> = (1..=70_000)
            .map(|index| table.enter(range(index), 3).unwrap())
            .collect();
        assert_eq!(table.len(), 70_000);
        for index in [1, 255, 256, 257, 768, 69_999, 70_000] {
            assert!(table.rescue(index * 0x1000 + 5, |found, _| found == range(index)));
        }
        assert_eq!(entries.iter().filter(|it| it.is_lost()).count(), 7);
        drop(entries);
        assert_eq!(table.len(), 0);
        assert!(!table.rescue(0x1005, never));
    }

    /// Ranges whose end and protection follow from their start: what a lookup puts together from two would show.
    #[test]
    fn a_lookup_beside_threads_that_enter_and_leave_sees_whole_ranges_only() {
        const THREADS: usize = 4;
        const LOOKS: u32 = 2_000_000;
        let table = table();
        let size = |start: usize| start / 0x10_0000 % 0x7000 + 1;
        let protection = |start: usize| i32::try_from(start % 1009).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let done = &done;
                scope.spawn(move || {
                    let mut entries = std::collections::VecDeque::new();
                    for round in 0.. {
                        if done.load(Ordering::Relaxed) {
                            break;
                        }
                        let start = (round * THREADS + thread + 1) << 20;
                        let range = start..start + size(start);
                        let entry = table.enter(range.clone(), protection(start)).unwrap();
                        if round.is_multiple_of(16) {
                            // Its own range is found, whatever the others do.
                            assert!(table.rescue(range.end - 1, |found, _| found == range));
                            assert!(entry.is_lost());
                        }
                        entries.push_back(entry);
                        entries.drain(..entries.len().saturating_sub(8));
                    }
                });
            }
            let mut seen = 0;
            let mut wrong = Vec::new();
            while seen < LOOKS {
                let blocks = table.blocks.iter().map_while(OnceLock::get);
                for (range, found) in blocks.flat_map(|block| block.iter()).filter_map(Slot::read) {
                    if range.start > 0 {
                        seen += 1;
                        let whole = (size(range.start), protection(range.start));
                        if (range.len(), found) != whole {
                            wrong.push((range, found));
                        }
                    }
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(wrong.is_empty(), "{wrong:x?}");
        });
        assert_eq!(table.len(), 0);
    }
}
