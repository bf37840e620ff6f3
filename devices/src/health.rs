//! Memory errors: which lines of the HBM are poisoned, which pages are out of use.
//!
//! An uncorrectable error poisons a line. An engine that reads a poisoned line stops with a fault; whoever writes all
//! of it, or scrubs it, makes it good again. A retired page is closed to engines for good. CPUs reach HBM without the
//! device, so they see neither: a machine's own memory errors reach them by machine checks, which are the VMM's.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use numagpu_spec::regs::{MAX_RETIRED, NO_ENTRY, QueueFault, RAS_PAGE, RasKind, RasResult};

use crate::state::{RestoreError, SavedHealth};

/// Bytes of a line: what an error spoils, and what one write has to cover to make it good.
pub const LINE: u64 = 64;
/// Lines that can be poisoned at a time.
pub const MAX_POISONED: usize = 4096;

#[derive(Default)]
struct Bad {
    /// First addresses of lines.
    poisoned: BTreeSet<u64>,
    /// First addresses of pages, in the order in which they were retired.
    retired: Vec<u64>,
}

/// The memory errors of one GPU. Its lock is a leaf.
#[derive(Default)]
pub struct Health {
    bad: Mutex<Bad>,
    /// Whether anything is bad: engines look at this alone while all is well.
    any: AtomicBool,
    correctable: AtomicU32,
    uncorrectable: AtomicU32,
    last_address: AtomicU64,
    last_kind: AtomicU32,
    result: AtomicU32,
}

/// Snapshot for registers and people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HealthStatus {
    /// Correctable errors since reset.
    pub correctable: u32,
    /// Uncorrectable errors since reset.
    pub uncorrectable: u32,
    /// Pages with a poisoned line in them that are not retired.
    pub poisoned: u32,
    /// Retired pages.
    pub retired: u32,
}

/// An address that an engine must not touch, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMemory {
    /// [`QueueFault::Poisoned`] or [`QueueFault::Retired`].
    pub code: QueueFault,
    /// First bad address of the access.
    pub address: u64,
}

const fn page(address: u64) -> u64 {
    address - address % RAS_PAGE
}

const fn line(address: u64) -> u64 {
    address - address % LINE
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Bad {
    fn is_retired(&self, address: u64) -> bool {
        self.retired.contains(&page(address))
    }
}

impl Health {
    fn lock(&self) -> MutexGuard<'_, Bad> {
        self.bad.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, bad: &Bad) {
        let any = !bad.poisoned.is_empty() || !bad.retired.is_empty();
        self.any.store(any, Ordering::SeqCst);
    }

    fn note(&self, kind: RasKind, address: u64) {
        let counter = match kind {
            RasKind::Correctable => &self.correctable,
            _ => &self.uncorrectable,
        };
        // Counters of errors stay at their end rather than begin anew.
        let _at_end =
            counter.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_add(1));
        self.last_address.store(address, Ordering::Release);
        self.last_kind.store(kind.code(), Ordering::Release);
    }

    /// An error at `address` that was corrected.
    pub fn correctable(&self, address: u64) {
        self.note(RasKind::Correctable, address);
    }

    /// An error at `address` that spoils its line. False if [`MAX_POISONED`] lines are poisoned already.
    pub fn poison(&self, address: u64) -> bool {
        let mut bad = self.lock();
        if bad.poisoned.len() >= MAX_POISONED && !bad.poisoned.contains(&line(address)) {
            return false;
        }
        if !bad.is_retired(address) {
            bad.poisoned.insert(line(address));
        }
        self.publish(&bad);
        drop(bad);
        self.note(RasKind::Uncorrectable, address);
        true
    }

    /// Takes the page of `address`, which is in the GPU's HBM, out of use.
    pub fn retire(&self, address: u64) -> RasResult {
        let mut bad = self.lock();
        let page = page(address);
        if bad.retired.contains(&page) {
            return RasResult::Ok;
        }
        if bad.retired.len() >= MAX_RETIRED as usize {
            return RasResult::Full;
        }
        bad.retired.push(page);
        bad.poisoned.retain(|line| self::page(*line) != page);
        self.publish(&bad);
        RasResult::Ok
    }

    /// Whether an engine may read `len` bytes from `address`.
    ///
    /// # Errors
    /// The first bad address.
    pub fn check_read(&self, address: u64, len: u64) -> Result<(), BadMemory> {
        self.check(address, len, true)
    }

    /// Whether an engine may write `len` bytes from `address`: poison does not hinder it, retired pages do.
    ///
    /// # Errors
    /// The first bad address.
    pub fn check_write(&self, address: u64, len: u64) -> Result<(), BadMemory> {
        self.check(address, len, false)
    }

    fn check(&self, address: u64, len: u64, read: bool) -> Result<(), BadMemory> {
        if len == 0 || !self.any.load(Ordering::SeqCst) {
            return Ok(());
        }
        let bad = self.lock();
        let last = address.saturating_add(len - 1);
        let pages = page(address)..=page(last);
        let retired = bad.retired.iter().filter(|page| pages.contains(page)).min();
        let mut poisoned = bad.poisoned.range(line(address)..=line(last));
        let poisoned = poisoned.next().filter(|_| read);
        let retired = retired.map(|at| (at, QueueFault::Retired));
        let found = retired.into_iter();
        let found = found.chain(poisoned.map(|at| (at, QueueFault::Poisoned)));
        match found.min_by_key(|(at, _)| **at) {
            Some((at, code)) => Err(BadMemory {
                code,
                address: address.max(*at),
            }),
            None => Ok(()),
        }
    }

    /// `len` bytes from `address` have new contents: lines that are wholly among them are good again.
    pub fn wrote(&self, address: u64, len: u64) {
        if !self.any.load(Ordering::SeqCst) {
            return;
        }
        let mut bad = self.lock();
        let end = address.saturating_add(len);
        bad.poisoned
            .retain(|line| *line < address || end < line.saturating_add(LINE));
        self.publish(&bad);
    }

    /// Counts of now.
    pub fn status(&self) -> HealthStatus {
        let bad = self.lock();
        // A register access may ask: nothing is allocated. Lines of a page stand side by side.
        let mut before = None;
        let mut pages = 0;
        for line in &bad.poisoned {
            let page = Some(page(*line));
            pages += usize::from(page != before);
            before = page;
        }
        HealthStatus {
            correctable: self.correctable.load(Ordering::Acquire),
            uncorrectable: self.uncorrectable.load(Ordering::Acquire),
            poisoned: count(pages),
            retired: count(bad.retired.len()),
        }
    }

    /// Address and `RasKind` of the last error since power-on.
    pub fn last(&self) -> (u64, u32) {
        let address = self.last_address.load(Ordering::Acquire);
        (address, self.last_kind.load(Ordering::Acquire))
    }

    /// Address of the retired page with this number, or [`NO_ENTRY`].
    pub fn retired(&self, index: u64) -> u64 {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        self.lock().retired.get(index).copied().unwrap_or(NO_ENTRY)
    }

    /// `RAS.RESULT`.
    pub fn result_code(&self) -> u32 {
        self.result.load(Ordering::Acquire)
    }

    pub(crate) fn set_result(&self, result: RasResult) {
        self.result.store(result.code(), Ordering::Release);
    }

    /// All of it.
    pub(crate) fn save(&self) -> SavedHealth {
        let bad = self.lock();
        let (last_address, last_kind) = self.last();
        SavedHealth {
            correctable: self.correctable.load(Ordering::Acquire),
            uncorrectable: self.uncorrectable.load(Ordering::Acquire),
            last_address,
            last_kind,
            result: self.result_code(),
            poisoned: bad.poisoned.iter().copied().collect(),
            retired: bad.retired.clone(),
        }
    }

    /// As [`Health::save`] found it. The state has passed [`SavedHealth::check`].
    pub(crate) fn restore(&self, saved: &SavedHealth) {
        let mut bad = self.lock();
        bad.poisoned = saved.poisoned.iter().copied().collect();
        bad.retired.clone_from(&saved.retired);
        self.publish(&bad);
        for (cell, value) in [
            (&self.correctable, saved.correctable),
            (&self.uncorrectable, saved.uncorrectable),
            (&self.last_kind, saved.last_kind),
            (&self.result, saved.result),
        ] {
            cell.store(value, Ordering::Release);
        }
        self.last_address
            .store(saved.last_address, Ordering::Release);
    }

    /// A reset of the function: counters begin anew; what is bad stays bad.
    pub(crate) fn reset(&self) {
        let Health {
            bad: _,
            any: _,
            correctable,
            uncorrectable,
            last_address: _,
            last_kind: _,
            result,
        } = self;
        correctable.store(0, Ordering::Release);
        uncorrectable.store(0, Ordering::Release);
        result.store(RasResult::None.code(), Ordering::Release);
    }
}

impl SavedHealth {
    /// Checks all values; `is_hbm` says whether an address is in the GPU's HBM.
    pub(crate) fn check(&self, is_hbm: impl Fn(u64) -> bool) -> Result<(), RestoreError> {
        let bad = |what, index, value| RestoreError::Bad { what, index, value };
        if RasKind::from_code(self.last_kind).is_none() {
            return Err(bad("LAST_KIND", 0, self.last_kind.into()));
        }
        if RasResult::from_code(self.result).is_none() {
            return Err(bad("RAS.RESULT", 0, self.result.into()));
        }
        let (lines, pages) = (self.poisoned.len(), self.retired.len());
        if lines > MAX_POISONED {
            return Err(bad("number of poisoned lines", 0, lines as u64));
        }
        if pages > MAX_RETIRED as usize {
            return Err(bad("number of retired pages", 0, pages as u64));
        }
        let mut retired = BTreeSet::new();
        for (index, at) in self.retired.iter().copied().enumerate() {
            if at != page(at) || !is_hbm(at) || !retired.insert(at) {
                return Err(bad("retired page", index, at));
            }
        }
        let mut poisoned = BTreeSet::new();
        for (index, at) in self.poisoned.iter().copied().enumerate() {
            let is_closed = retired.contains(&page(at));
            if at != line(at) || !is_hbm(at) || is_closed || !poisoned.insert(at) {
                return Err(bad("poisoned line", index, at));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x1_0000_0000;

    fn bad(code: QueueFault, address: u64) -> Result<(), BadMemory> {
        Err(BadMemory { code, address })
    }

    #[test]
    fn a_poisoned_line_is_read_by_nobody_until_all_of_it_is_written() {
        let health = Health::default();
        assert!(health.poison(BASE + 100));
        assert_eq!(health.check_read(BASE, 64), Ok(()));
        let poisoned = bad(QueueFault::Poisoned, BASE + 64);
        assert_eq!(health.check_read(BASE, 65), poisoned);
        assert_eq!(health.check_read(BASE, 1 << 20), poisoned);
        assert_eq!(health.check_read(BASE + 128, 64), Ok(()));
        // A read that begins in the line is told of its own first byte.
        let inside = bad(QueueFault::Poisoned, BASE + 70);
        assert_eq!(health.check_read(BASE + 70, 1), inside);
        assert_eq!(health.check_write(BASE, 1 << 20), Ok(()));
        health.wrote(BASE + 64, 63);
        health.wrote(BASE + 65, 64);
        assert_eq!(
            health.check_read(BASE, 65),
            poisoned,
            "a part is not enough"
        );
        health.wrote(BASE + 64, 64);
        assert_eq!(health.check_read(BASE, 65), Ok(()));
        assert_eq!(health.status().uncorrectable, 1);
    }

    #[test]
    fn a_page_with_several_poisoned_lines_counts_once() {
        let health = Health::default();
        for line in [0, 64, 4032, 4096, 8192, 8256] {
            health.poison(BASE + line);
        }
        assert_eq!(health.status().poisoned, 3);
    }

    #[test]
    fn a_retired_page_is_closed_for_good() {
        let health = Health::default();
        health.poison(BASE + 4096);
        assert_eq!(health.status().poisoned, 1);
        assert_eq!(health.retire(BASE + 5000), RasResult::Ok);
        assert_eq!(health.retire(BASE + 4096), RasResult::Ok, "as before");
        let status = health.status();
        assert_eq!((status.poisoned, status.retired), (0, 1));
        let closed = bad(QueueFault::Retired, BASE + 4096);
        assert_eq!(health.check_write(BASE, 8192), closed);
        assert_eq!(health.check_read(BASE, 4097), closed);
        health.wrote(BASE, 1 << 20);
        health.reset();
        assert!(health.check_read(BASE + 4096, 1).is_err());
        assert_eq!(health.retired(0), BASE + 4096);
        assert_eq!(health.retired(1), NO_ENTRY);
        assert_eq!(health.check_read(BASE, 4096), Ok(()));
    }

    #[test]
    fn the_first_bad_address_is_told() {
        let health = Health::default();
        health.retire(BASE + 8192);
        health.poison(BASE + 4096);
        assert_eq!(
            health.check_read(BASE, 1 << 20),
            bad(QueueFault::Poisoned, BASE + 4096)
        );
        assert_eq!(
            health.check_write(BASE, 1 << 20),
            bad(QueueFault::Retired, BASE + 8192)
        );
    }

    #[test]
    fn lists_are_bounded() {
        let health = Health::default();
        for index in 0..u64::from(MAX_RETIRED) {
            assert_eq!(health.retire(BASE + index * RAS_PAGE), RasResult::Ok);
        }
        assert_eq!(health.retire(0), RasResult::Full);
        for index in 0..MAX_POISONED as u64 {
            assert!(health.poison(index * LINE));
        }
        assert!(!health.poison(BASE - LINE));
        assert!(health.poison(0), "it is poisoned already");
    }

    #[test]
    fn the_end_of_the_address_space_is_harmless() {
        let health = Health::default();
        health.poison(u64::MAX);
        assert!(health.check_read(u64::MAX, 1).is_err());
        assert!(health.check_read(u64::MAX, u64::MAX).is_err());
        health.wrote(u64::MAX - 63, u64::MAX);
        health.wrote(0, 0);
        assert_eq!(health.check_read(0, 0), Ok(()));
    }
}
