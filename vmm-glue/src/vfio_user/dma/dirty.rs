//! Which pages the device wrote (specification, `VFIO_DEVICE_FEATURE_DMA_LOGGING_START` and the next).
//!
//! Bits are set after the bytes are written and taken before the client copies the page, so no write is lost between
//! two reports. While nothing is logged a write costs one load; while something is, threads share a lock for reading
//! and set bits in words of their own time. Bitmaps are in leaves that the first write to their part makes.
//!
//! HBM that engines write as HBM has no address of the client's until it is looked for: all maps that show the part of
//! the file then have it marked ([`super::DmaTable`]'s `wrote`).

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::io::Errno;
use thiserror::Error;

use super::super::MAX_TRANSFER;

/// Smallest unit that is logged.
pub const MIN_PAGE: u64 = 4096;

/// Largest unit that is logged.
const MAX_PAGE: u64 = 1 << 30;

/// Most ranges of one start. Linux takes 256 (`drivers/vfio/vfio_main.c`, `LOG_MAX_RANGES`).
pub const MAX_RANGES: usize = 256;

/// Most bytes of all bitmaps: the pages of 2 TiB of 4 KiB each.
pub const MAX_BITMAP: u64 = 64 << 20;

/// Most ranges that are logged, maps that came later among them.
const MAX_LOGGED: usize = 4096;

/// Words of a leaf: 128 MiB of pages of 4 KiB.
const LEAF_WORDS: u64 = 512;

/// Why logging cannot be started, or pages cannot be reported.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum DirtyError {
    /// No power of two.
    #[error("a page size of {0:#x}, which is no power of two")]
    PageSize(u64),
    /// Empty, or past the last address.
    #[error("{length:#x} bytes at {address:#x} are no range")]
    Range {
        /// First address.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// Two ranges share an address.
    #[error("ranges overlap at {address:#x}")]
    Overlap {
        /// First address of the later one.
        address: u64,
    },
    /// Too many ranges.
    #[error("{0} ranges; at most {MAX_RANGES} are taken")]
    TooMany(usize),
    /// Bitmaps that are too large.
    #[error("bitmaps of {bytes} bytes; at most {max} are kept or sent")]
    TooLarge {
        /// Bytes they would have.
        bytes: u64,
        /// Most there may be.
        max: u64,
    },
    /// A bitmap of another size than its range has pages.
    #[error("a bitmap of {have} bytes; the range has {want}")]
    BitmapSize {
        /// Bytes given.
        have: u64,
        /// Bytes it takes.
        want: u64,
    },
    /// Logging is on with other ranges.
    #[error("writes are logged already")]
    Started,
    /// Logging is off.
    #[error("writes are not logged")]
    Stopped,
}

impl DirtyError {
    /// The error number for the client.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::TooMany(_) | Self::TooLarge { .. } => Errno::TOOBIG,
            _ => Errno::INVAL,
        }
    }
}

/// First and last address.
pub type Span = (u64, u64);

/// The writes of one connection's device.
#[derive(Debug, Default)]
pub struct DirtyLog {
    on: AtomicBool,
    log: RwLock<Option<Log>>,
}

#[derive(Debug)]
struct Log {
    page: u64,
    /// As the client asked; empty for all writes.
    asked: Vec<Span>,
    ranges: Vec<Range>,
    /// Bytes of all bitmaps, made or not.
    bytes: u64,
    /// More had to be logged than there is room for: everything counts as written.
    lost: bool,
}

#[derive(Debug)]
struct Range {
    /// Multiple of the page size.
    first: u64,
    last: u64,
    leaves: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

/// Bytes of the bitmap of a range: whole 64-bit words.
///
/// # Errors
/// [`DirtyError`] if it is no range, the page size no power of two, or the bitmap more than a reply takes.
pub fn bitmap_bytes(address: u64, length: u64, page: u64) -> Result<usize, DirtyError> {
    span(address, length)?;
    if !page.is_power_of_two() {
        return Err(DirtyError::PageSize(page));
    }
    let bytes = length.div_ceil(page).div_ceil(64).saturating_mul(8);
    let max = MAX_TRANSFER as u64;
    match usize::try_from(bytes) {
        Ok(len) if bytes <= max => Ok(len),
        _ => Err(DirtyError::TooLarge { bytes, max }),
    }
}

fn span(address: u64, length: u64) -> Result<Span, DirtyError> {
    let more = length.checked_sub(1);
    let last = more.and_then(|more| address.checked_add(more));
    let last = last.ok_or(DirtyError::Range { address, length })?;
    Ok((address, last))
}

impl DirtyLog {
    /// Logs writes to ranges from now on, or to all that is and will be mapped if there are none: `mapped` are the
    /// maps of now. Gives the page size that is used. To start again with the same ranges changes nothing.
    ///
    /// # Errors
    /// [`DirtyError`]; nothing has changed then.
    pub fn start(
        &self,
        page_hint: u64,
        ranges: &[(u64, u64)],
        mapped: impl Iterator<Item = Span>,
    ) -> Result<u64, DirtyError> {
        if !page_hint.is_power_of_two() {
            return Err(DirtyError::PageSize(page_hint));
        }
        if ranges.len() > MAX_RANGES {
            return Err(DirtyError::TooMany(ranges.len()));
        }
        let page = page_hint.clamp(MIN_PAGE, MAX_PAGE);
        let asked = ranges
            .iter()
            .map(|(address, length)| span(*address, *length));
        let mut asked = asked.collect::<Result<Vec<_>, _>>()?;
        asked.sort_unstable();
        for ((_, last), (next, _)) in asked.iter().zip(asked.iter().skip(1)) {
            if next <= last {
                return Err(DirtyError::Overlap { address: *next });
            }
        }
        let mut place = self.write();
        if let Some(log) = &*place {
            return match (log.page, &log.asked) == (page, &asked) {
                true => Ok(page),
                false => Err(DirtyError::Started),
            };
        }
        let mut log = Log {
            page,
            asked,
            ranges: Vec::new(),
            bytes: 0,
            lost: false,
        };
        let spans: Vec<_> = match ranges.is_empty() {
            true => mapped.collect(),
            false => log.asked.clone(),
        };
        for span in joined(spans) {
            log.add(span)?;
        }
        *place = Some(log);
        self.on.store(true, Ordering::SeqCst);
        Ok(page)
    }

    /// Logs nothing any more. What was logged is forgotten.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        *self.write() = None;
    }

    /// A map was added.
    pub fn mapped(&self, first: u64, last: u64) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let mut log = self.write();
        let Some(log) = log.as_mut().filter(|log| log.asked.is_empty()) else {
            return;
        };
        let known = |range: &Range| range.first <= first && last <= range.last;
        if !log.ranges.iter().any(known) && log.add((first, last)).is_err() {
            log.lost = true;
        }
    }

    /// The device wrote. Not before it did.
    pub fn mark(&self, first: u64, last: u64) {
        if self.on.load(Ordering::Relaxed) {
            self.set(first, last);
        }
    }

    #[cold]
    fn set(&self, first: u64, last: u64) {
        let log = self.read();
        let Some(log) = &*log else { return };
        for range in &log.ranges {
            range.set(first, last, log.page);
        }
    }

    /// Whether writes are logged.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Sets a bit of `bitmap`, which is zero, for each page of the range that was written since the last report of
    /// it. The page size is that of [`bitmap_bytes`], which also gave the length of `bitmap`. A page of the log that
    /// is only partly in the range stays written.
    ///
    /// # Errors
    /// [`DirtyError::Stopped`], or that it is no range.
    pub fn report(
        &self,
        address: u64,
        length: u64,
        page: u64,
        bitmap: &mut [u8],
    ) -> Result<(), DirtyError> {
        let (first, last) = span(address, length)?;
        let log = self.read();
        let log = log.as_ref().ok_or(DirtyError::Stopped)?;
        let mut written = |from: u64, to: u64| {
            let (from, to) = (from.max(first), to.min(last));
            for bit in (from - first) / page..=(to - first) / page {
                set_bit(bitmap, bit);
            }
        };
        if log.lost {
            written(first, last);
        }
        for range in &log.ranges {
            range.take(first, last, log.page, &mut written);
        }
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, Option<Log>> {
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Option<Log>> {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ranges in order, neighbours as one.
fn joined(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut joined: Vec<Span> = Vec::new();
    for (first, last) in spans {
        match joined.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(first) => *end = last,
            _ => joined.push((first, last)),
        }
    }
    joined
}

/// A bit of an array of 64-bit words of the host.
fn set_bit(bitmap: &mut [u8], bit: u64) {
    let swap = if cfg!(target_endian = "big") { 7 } else { 0 };
    let byte = usize::try_from(bit / 8).ok().map(|byte| byte ^ swap);
    if let Some(byte) = byte.and_then(|byte| bitmap.get_mut(byte)) {
        *byte |= 1 << (bit % 8);
    }
}

impl Log {
    fn add(&mut self, (first, last): Span) -> Result<(), DirtyError> {
        let mask = self.page - 1;
        let (first, last) = (first & !mask, last | mask);
        let words = ((last - first) / self.page / 64).saturating_add(1);
        let bytes = self.bytes.saturating_add(words.saturating_mul(8));
        let too_large = DirtyError::TooLarge {
            bytes,
            max: MAX_BITMAP,
        };
        if bytes > MAX_BITMAP {
            return Err(too_large);
        }
        if self.ranges.len() >= MAX_LOGGED {
            return Err(DirtyError::TooMany(self.ranges.len()));
        }
        let leaves = words.div_ceil(LEAF_WORDS);
        self.ranges.push(Range {
            first,
            last,
            leaves: (0..leaves).map(|_| OnceLock::new()).collect(),
        });
        self.bytes = bytes;
        Ok(())
    }
}

impl Range {
    /// The numbers of the first and the last page of the range that lie in a span; none if none do.
    fn pages(&self, first: u64, last: u64, page: u64) -> Option<(u64, u64)> {
        let (first, last) = (first.max(self.first), last.min(self.last));
        let number = |address: u64| (address - self.first) / page;
        (first <= last).then(|| (number(first), number(last)))
    }

    fn set(&self, first: u64, last: u64, page: u64) {
        let Some((from, to)) = self.pages(first, last, page) else {
            return;
        };
        for word in from / 64..=to / 64 {
            let low = from.max(word * 64) - word * 64;
            let high = to.min(word * 64 + 63) - word * 64;
            let mask = (u64::MAX << low) & (u64::MAX >> (63 - high));
            let leaf = usize::try_from(word / LEAF_WORDS).ok();
            let Some(leaf) = leaf.and_then(|leaf| self.leaves.get(leaf)) else {
                return;
            };
            let words = leaf.get_or_init(|| (0..LEAF_WORDS).map(|_| AtomicU64::new(0)).collect());
            let place = usize::try_from(word % LEAF_WORDS).ok();
            if let Some(place) = place.and_then(|place| words.get(place)) {
                place.fetch_or(mask, Ordering::AcqRel);
            }
        }
    }

    /// Calls `written` with the span of each page that was written and lies in a span, at least in part. Those that
    /// lie in it wholly are not written any more.
    fn take(&self, first: u64, last: u64, page: u64, written: &mut dyn FnMut(u64, u64)) {
        let Some((from, to)) = self.pages(first, last, page) else {
            return;
        };
        let leaf_pages = LEAF_WORDS * 64;
        for leaf in from / leaf_pages..=to / leaf_pages {
            let words = usize::try_from(leaf).ok();
            let words = words.and_then(|leaf| self.leaves.get(leaf)?.get());
            for (index, word) in (leaf * LEAF_WORDS..).zip(words.into_iter().flatten()) {
                let bits = word.load(Ordering::Acquire);
                let mut taken = 0;
                let mut rest = bits;
                while rest != 0 {
                    let bit = u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    let number = index * 64 + bit;
                    if (from..=to).contains(&number) {
                        let start = self.first + number * page;
                        let end = start + (page - 1);
                        written(start, end);
                        if first <= start && end <= last {
                            taken |= 1 << bit;
                        }
                    }
                }
                if taken != 0 {
                    word.fetch_and(!taken, Ordering::AcqRel);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const KIB4: u64 = 4096;

    /// Numbers of the bits that a report sets.
    fn report(log: &DirtyLog, address: u64, length: u64, page: u64) -> BTreeSet<u64> {
        let len = bitmap_bytes(address, length, page).unwrap();
        let mut bitmap = vec![0; len];
        log.report(address, length, page, &mut bitmap).unwrap();
        let bits = (0..).zip(&bitmap).flat_map(|(at, byte): (u64, &u8)| {
            (0..8).filter_map(move |bit| (byte & (1 << bit) != 0).then_some(at * 8 + bit))
        });
        bits.collect()
    }

    fn started(page: u64, ranges: &[(u64, u64)]) -> DirtyLog {
        let log = DirtyLog::default();
        assert_eq!(log.start(page, ranges, std::iter::empty()), Ok(page));
        log
    }

    #[test]
    fn a_page_is_reported_once_for_each_time_it_is_written() {
        let log = started(KIB4, &[(0x10_0000, 0x10_0000)]);
        log.mark(0x10_1000, 0x10_1000);
        log.mark(0x10_2fff, 0x10_3000);
        log.mark(0, 0xf_ffff);
        log.mark(0x20_0000, u64::MAX);
        assert_eq!(report(&log, 0x10_0000, 0x10_0000, KIB4), [1, 2, 3].into());
        assert!(report(&log, 0x10_0000, 0x10_0000, KIB4).is_empty());
        log.mark(0x10_2000, 0x10_2000);
        assert_eq!(report(&log, 0x10_0000, 0x10_0000, KIB4), [2].into());
        log.stop();
        assert_eq!(log.report(0, 1, KIB4, &mut []), Err(DirtyError::Stopped));
    }

    /// Against a set of bytes as a model, with any page sizes.
    #[test]
    fn reports_of_any_range_and_page_size_agree_with_a_model() {
        let mut seed = 1_u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for page in [KIB4, 4 * KIB4, 1 << 20] {
            let (start, size) = (3 << 20, 300 << 20);
            let log = started(page, &[(start, size)]);
            let mut dirty = BTreeSet::new();
            for _ in 0..300 {
                let first = start + random(size);
                let last = (first + random(3 * page)).min(start + size - 1);
                log.mark(first, last);
                dirty.extend(first / page..=last / page);
                if random(4) > 0 {
                    continue;
                }
                let unit = KIB4 << random(10);
                let address = start + random(size / KIB4) * KIB4;
                let length = (1 + random(start + size - address)).min(200 << 20);
                let want: BTreeSet<_> = dirty
                    .iter()
                    .map(|number| (number * page, number * page + page - 1))
                    .filter(|(first, last)| *first < address + length && *last >= address)
                    .flat_map(|(first, last)| {
                        let (first, last) = (first.max(address), last.min(address + length - 1));
                        (first - address) / unit..=(last - address) / unit
                    })
                    .collect();
                assert_eq!(report(&log, address, length, unit), want);
                dirty.retain(|number| {
                    number * page < address || number * page + page > address + length
                });
            }
        }
    }

    #[test]
    fn the_end_of_all_addresses_can_be_logged() {
        let log = started(KIB4, &[(!0xfff, 0x1000), (0, 0x1000)]);
        log.mark(0, u64::MAX);
        assert_eq!(report(&log, !0x1fff, 0x2000, KIB4), [1].into());
        assert_eq!(report(&log, 0, 0x2000, 512), (0..8).collect());
    }

    #[test]
    fn all_writes_are_those_to_every_map_of_now_and_later() {
        let log = DirtyLog::default();
        let maps = [(0x1000, 0x1fff), (0x2000, 0x3fff)];
        assert_eq!(log.start(1, &[], maps.into_iter()), Ok(KIB4));
        log.mapped(0x10_0000, 0x10_0fff);
        log.mapped(0x10_0000, 0x10_0fff);
        log.mark(0, u64::MAX);
        let want: BTreeSet<_> = [1, 2, 3, 0x100].into();
        assert_eq!(report(&log, 0, 0x20_0000, KIB4), want);
        // More than is kept: what comes later counts as written, and so does all.
        log.mapped(1 << 40, (1 << 40) | (1 << 42));
        assert_eq!(report(&log, 0, 0x4000, KIB4), (0..4).collect());
    }

    #[test]
    fn nonsense_is_refused_with_a_number_and_changes_nothing() {
        let none = std::iter::empty;
        let log = DirtyLog::default();
        let refused = |page, ranges: &[_]| log.start(page, ranges, none()).unwrap_err();
        for (page, ranges, errno) in [
            (0, vec![], Errno::INVAL),
            (5000, vec![], Errno::INVAL),
            (KIB4, vec![(0, 0)], Errno::INVAL),
            (KIB4, vec![(!0xfff, 0x2000)], Errno::INVAL),
            (KIB4, vec![(0x2000, 0x1000), (0x1000, 0x1001)], Errno::INVAL),
            (KIB4, vec![(0, 1); 257], Errno::TOOBIG),
            (KIB4, vec![(0, 1 << 42)], Errno::TOOBIG),
            (KIB4, vec![(0, u64::MAX)], Errno::TOOBIG),
        ] {
            assert_eq!(refused(page, &ranges).errno(), errno, "{page} {ranges:?}");
            assert!(!log.is_on());
        }
        assert_eq!(log.start(KIB4, &[(0, 1 << 41)], none()), Ok(KIB4));
        assert_eq!(log.start(1, &[(0, 1 << 41)], none()), Ok(KIB4), "the same");
        assert_eq!(refused(KIB4, &[(0, 1 << 40)]), DirtyError::Started);
        assert_eq!(bitmap_bytes(0, 65 * KIB4, KIB4), Ok(16));
        let most = (8 * KIB4) << 20;
        assert_eq!(bitmap_bytes(0, most, KIB4), Ok(1 << 20));
        assert!(bitmap_bytes(0, most + 1, KIB4).is_err());
        assert!(bitmap_bytes(0, u64::MAX, 1).is_err());
        assert!(bitmap_bytes(0, 0, KIB4).is_err() && bitmap_bytes(0, 1, 3).is_err());
    }
}
