//! The ways in which the HBM of a GPU can be divided into partitions.
//!
//! The machine's firmware tables are written once, so a mode can divide what the plan has and not move it: each planned
//! partition is cut into equal parts, which stay in its proximity domain. Every mode has partitions of its own over
//! the same memory; one mode is in force at a time, and the partitions of the others have no owner.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use numagpu_spec::regs::MAX_PARTITIONS;
use vm_memory::{VolatileMemoryError, VolatileSlice};

use crate::bus::{BackingId, HbmStore};
use crate::config::PartitionConfig;
use crate::health::Health;
use crate::partition::Partition;

/// Parts are multiples of this, in bytes: the size of a huge page on x86-64.
const GRAIN: u64 = 2 << 20;

/// All modes of one GPU, and which one is in force.
pub(crate) struct Modes {
    /// By number of partitions, ascending; the first is the planned one.
    modes: Vec<Vec<Arc<Partition>>>,
    active: AtomicUsize,
}

impl Modes {
    /// The modes of a GPU whose planned partitions passed the check; the planned one is in force.
    pub(crate) fn new(
        planned: &[PartitionConfig],
        in_aperture: bool,
        health: &Arc<Health>,
    ) -> Modes {
        let most = MAX_PARTITIONS as usize / planned.len().max(1);
        let ways = 1..=if planned.is_empty() { 1 } else { most as u64 };
        let fits = |ways: &u64| {
            let grain = ways.saturating_mul(GRAIN);
            *ways == 1 || planned.iter().all(|it| it.size.is_multiple_of(grain))
        };
        let mode = |ways: u64| {
            let parts = planned.iter().flat_map(|whole| divide(whole, ways));
            let partition = |part| Arc::new(Partition::new(&part, in_aperture, health));
            parts.map(partition).collect()
        };
        Modes {
            modes: ways.filter(fits).map(mode).collect(),
            active: AtomicUsize::new(0),
        }
    }

    /// The partitions of the mode in force.
    pub(crate) fn active(&self) -> &[Arc<Partition>] {
        self.mode(self.active.load(Ordering::Acquire))
    }

    /// The planned partitions.
    pub(crate) fn planned(&self) -> &[Arc<Partition>] {
        self.mode(0)
    }

    /// The partitions of every mode.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Partition>> {
        self.modes.iter().flatten()
    }

    /// Bit `n` is set if `n` partitions are possible.
    pub(crate) fn possible(&self) -> u32 {
        let bit = |mode: &Vec<_>| 1_u32.checked_shl(u32::try_from(mode.len()).ok()?);
        self.modes.iter().filter_map(bit).sum()
    }

    /// The partitions of the mode with `count` of them, if it is not in force.
    pub(crate) fn other(&self, count: u64) -> Option<&[Arc<Partition>]> {
        let found = self.modes.iter().find(|mode| mode.len() as u64 == count)?;
        (found.len() != self.active().len()).then_some(found.as_slice())
    }

    /// Puts the mode with `count` partitions in force; does nothing if there is none.
    pub(crate) fn activate(&self, count: usize) {
        if let Some(index) = self.modes.iter().position(|mode| mode.len() == count) {
            self.active.store(index, Ordering::Release);
        }
    }

    /// Every mode, and the number of the one in force.
    pub(crate) fn modes(&self) -> (&[Vec<Arc<Partition>>], usize) {
        (&self.modes, self.active.load(Ordering::Acquire))
    }

    fn mode(&self, index: usize) -> &[Arc<Partition>] {
        self.modes.get(index).map_or(&[], Vec::as_slice)
    }
}

/// A partition cut into `ways` equal parts.
fn divide(whole: &PartitionConfig, ways: u64) -> impl Iterator<Item = PartitionConfig> {
    let size = whole.size.checked_div(ways).unwrap_or(whole.size);
    (0..ways).map(move |index| {
        let offset = size.saturating_mul(index);
        let store: Arc<dyn HbmStore> = match ways {
            1 => Arc::clone(&whole.store),
            _ => Arc::new(Part {
                whole: Arc::clone(&whole.store),
                offset,
                size,
            }),
        };
        PartitionConfig {
            base: whole.base.saturating_add(offset),
            size,
            pxm: whole.pxm,
            store,
        }
    })
}

/// A part of a store; inside it by construction.
struct Part {
    whole: Arc<dyn HbmStore>,
    offset: u64,
    size: u64,
}

impl Part {
    /// Where a range of the part is in the whole; outside of it if it leaves the part.
    fn place(&self, offset: u64, len: u64) -> u64 {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => self.offset.saturating_add(offset),
            _ => u64::MAX,
        }
    }
}

impl HbmStore for Part {
    fn size(&self) -> u64 {
        self.size
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        self.whole.slice(self.place(offset, len), len)
    }

    fn backing(&self) -> (BackingId, u64) {
        let (id, offset) = self.whole.backing();
        (id, offset.saturating_add(self.offset))
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        self.whole.file()
    }

    fn scrub(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.whole.scrub(self.place(offset, len), len)
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    use super::*;
    use crate::memory::AnonymousStore;
    use vm_memory::Bytes;

    fn planned(sizes: &[u64]) -> Vec<PartitionConfig> {
        let one = |(index, size): (usize, &u64)| PartitionConfig {
            base: 0x1_0000_0000 * (1 + index as u64),
            size: *size,
            pxm: Some(4 + index as u32),
            store: Arc::new(AnonymousStore::new(*size as usize).unwrap()),
        };
        sizes.iter().enumerate().map(one).collect()
    }

    #[test]
    fn modes_divide_every_planned_partition_alike() {
        let cases: [(&[u64], u32); 5] = [
            (&[16 << 20], 1 << 1 | 1 << 2 | 1 << 4 | 1 << 8),
            (&[12 << 20], 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6),
            (&[8 << 20, 16 << 20], 1 << 2 | 1 << 4 | 1 << 8),
            (&[4096], 1 << 1),
            (&[], 1),
        ];
        for (sizes, possible) in cases {
            let modes = Modes::new(&planned(sizes), false, &Arc::default());
            assert_eq!(modes.possible(), possible, "{sizes:?}");
            assert_eq!(modes.active().len(), sizes.len());
        }
    }

    #[test]
    fn parts_cover_the_memory_and_nothing_else() {
        let planned = planned(&[8 << 20, 16 << 20]);
        let modes = Modes::new(&planned, false, &Arc::default());
        modes.activate(8);
        let parts = modes.active();
        let ranges: Vec<_> = parts
            .iter()
            .map(|p| (p.base(), p.size(), p.pxm()))
            .collect();
        let mut expected = Vec::new();
        for (base, size, pxm) in [(0x1_0000_0000, 2 << 20, 4), (0x2_0000_0000, 4 << 20, 5)] {
            expected.extend((0..4).map(|n| (base + n * size, size, Some(pxm))));
        }
        assert_eq!(ranges, expected);
        let divided: Vec<_> = planned.iter().flat_map(|it| divide(it, 4)).collect();
        let store = &divided[5].store;
        store.slice(0, 4).unwrap().write_slice(b"five", 0).unwrap();
        let mut seen = [0; 4];
        let whole = &planned[1].store;
        whole
            .slice(4 << 20, 4)
            .unwrap()
            .read_slice(&mut seen, 0)
            .unwrap();
        assert_eq!(&seen, b"five");
        assert_eq!(store.backing(), (whole.backing().0, 4 << 20));
        assert!(store.slice(4 << 20, 1).is_err());
        assert!(store.slice(u64::MAX, 2).is_err());
        assert!(store.scrub(1, 4 << 20).is_err());
        whole.slice(0, 4).unwrap().write_slice(b"zero", 0).unwrap();
        store.scrub(0, 4 << 20).unwrap();
        whole
            .slice(4 << 20, 4)
            .unwrap()
            .read_slice(&mut seen, 0)
            .unwrap();
        assert_eq!(seen, [0; 4]);
        whole.slice(0, 4).unwrap().read_slice(&mut seen, 0).unwrap();
        assert_eq!(&seen, b"zero", "only the part was scrubbed");
    }

    #[test]
    fn a_mode_that_is_not_there_is_not_activated() {
        let modes = Modes::new(&planned(&[16 << 20]), false, &Arc::default());
        assert!(modes.other(3).is_none());
        assert!(modes.other(1).is_none(), "it is in force");
        assert_eq!(modes.other(8).map(<[_]>::len), Some(8));
        modes.activate(3);
        assert_eq!(modes.active().len(), 1);
    }
}
