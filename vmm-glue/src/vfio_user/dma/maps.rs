//! The maps of a connection, to be found by address and by what they show.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use numagpu_devices::bus::{BackingId, Mapped};

use super::dirty::Span;
use super::files::Files;
use super::map::Map;

/// Maps that may show a partition together; with more it counts as mapped in part.
const MAX_PIECES: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Maps {
    pub(super) disconnected: bool,
    pub(super) files: Files,
    by_address: BTreeMap<u64, Arc<Map>>,
    by_file: HashMap<BackingId, Shown>,
}

/// The parts of one file that maps show.
#[derive(Debug, Default)]
struct Shown {
    /// Bytes, less one, by first offset in the file and first address.
    parts: BTreeMap<(u64, u64), u64>,
    /// The most bytes, less one, that a part had: one that begins further down does not reach.
    longest: u64,
}

impl Shown {
    fn add(&mut self, offset: u64, address: u64, more: u64) {
        self.parts.insert((offset, address), more);
        self.longest = self.longest.max(more);
    }
}

impl Maps {
    pub(super) fn len(&self) -> usize {
        self.by_address.len()
    }

    /// In order of their addresses.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Map>> {
        self.by_address.values()
    }

    /// Adds a map that shares no byte with another.
    pub(super) fn add(&mut self, map: Map) {
        if let Some((file, offset)) = map.shows() {
            let shown = self.by_file.entry(file).or_default();
            shown.add(offset, map.address, map.last() - map.address);
        }
        self.by_address.insert(map.address, Arc::new(map));
    }

    /// Takes out the maps that begin in `first..=last`.
    pub(super) fn take(&mut self, first: u64, last: u64) -> Vec<Arc<Map>> {
        let inside = self.by_address.range(first..=last);
        let inside: Vec<u64> = inside.map(|(address, _)| *address).collect();
        let mut gone = Vec::with_capacity(inside.len());
        for map in inside.iter().filter_map(|at| self.by_address.remove(at)) {
            if let Some((file, offset)) = map.shows()
                && let Some(shown) = self.by_file.get_mut(&file)
            {
                shown.parts.remove(&(offset, map.address));
                if shown.parts.is_empty() {
                    self.by_file.remove(&file);
                }
            }
            gone.push(map);
        }
        gone
    }

    pub(super) fn at(&self, address: u64) -> Option<&Arc<Map>> {
        let (_, map) = self.by_address.range(..=address).next_back()?;
        map.contains(address).then_some(map)
    }

    /// The map with the lowest address that shares a byte with `first..=last`.
    pub(super) fn any_in(&self, first: u64, last: u64) -> Option<&Arc<Map>> {
        let next = || self.by_address.range(first..=last).next().map(|(_, m)| m);
        self.at(first).or_else(next)
    }

    /// What maps show that follow each other without a gap, in memory and in their file, as if they were one. An IOMMU in
    /// front of the device maps in pages.
    pub(super) fn run(&self, address: u64, last: u64) -> Option<Mapped> {
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

    /// The addresses at which bytes `first..=last` of a file are mapped.
    pub(super) fn showing(
        &self,
        file: BackingId,
        first: u64,
        last: u64,
    ) -> impl Iterator<Item = Span> {
        let parts = self.by_file.get(&file).into_iter().flat_map(move |shown| {
            let lowest = first.saturating_sub(shown.longest);
            shown.parts.range((lowest, 0)..=(last, u64::MAX))
        });
        parts.filter_map(move |((offset, address), more)| {
            let (from, to) = (first.max(*offset), last.min(offset.saturating_add(*more)));
            // Inside the map, so in 64 bits.
            let place = |at: u64| address.checked_add(at.checked_sub(*offset)?);
            (from <= to).then(|| Some((place(from)?, place(to)?)))?
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::files::View;
    use super::super::map::Backing;
    use super::*;

    const PAGE: u64 = 4096;

    /// A map of a file with this number; nobody looks at its memory.
    fn map(inode: u64, address: u64, offset: u64, size: u64) -> Map {
        let id = BackingId { device: 1, inode };
        Map {
            address,
            size,
            flags: 3,
            offset,
            backing: Backing::File(id, View::nowhere()),
        }
    }

    /// Maps of all sizes that show parts of two files in any order come and go.
    #[test]
    fn what_shows_a_part_of_a_file_is_what_looking_at_every_map_finds() {
        let mut seed = 3_u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        let mut maps = Maps::default();
        let mut model: Vec<(u64, u64, u64, u64)> = Vec::new();
        let mut found = 0;
        for _ in 0..4000 {
            // Places of 64 pages, so that no two share a byte.
            let address = 64 * PAGE * random(40);
            if random(3) == 0 {
                let last = address + 64 * PAGE * random(3);
                let gone = maps.take(address, last);
                let before = model.len();
                model.retain(|(_, at, ..)| !(address..=last).contains(at));
                assert_eq!(gone.len(), before - model.len());
            } else if maps.at(address).is_none() {
                let (inode, offset) = (random(2), PAGE * random(200));
                let most = 1 << random(7);
                let size = PAGE * (1 + random(most));
                maps.add(map(inode, address, offset, size));
                model.push((inode, address, offset, size));
            }
            let (inode, first) = (random(2), random(220 * PAGE));
            let last = first + random(3 * PAGE);
            let mut want: Vec<Span> = Vec::new();
            for (_, address, offset, size) in model.iter().filter(|it| it.0 == inode) {
                let (from, to) = (first.max(*offset), last.min(offset + size - 1));
                if from <= to {
                    want.push((address + from - offset, address + to - offset));
                }
            }
            let mut have: Vec<Span> = maps
                .showing(BackingId { device: 1, inode }, first, last)
                .collect();
            want.sort_unstable();
            have.sort_unstable();
            assert_eq!(have, want);
            found += have.len();
        }
        assert!(found > 1000, "{found}");
        maps.take(0, u64::MAX);
        assert!(maps.by_file.is_empty());
    }

    #[test]
    fn the_ends_of_addresses_and_files_are_found() {
        let mut maps = Maps::default();
        let end = u64::MAX / 2 - PAGE + 1;
        maps.add(map(0, !(PAGE - 1), end, PAGE));
        let id = BackingId {
            device: 1,
            inode: 0,
        };
        let spans: Vec<Span> = maps.showing(id, 0, u64::MAX).collect();
        assert_eq!(spans, [(!(PAGE - 1), u64::MAX)]);
        assert_eq!(maps.showing(id, u64::MAX / 2 + 1, u64::MAX).count(), 0);
    }
}
