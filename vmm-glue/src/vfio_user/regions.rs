//! The regions of a PCI device and the accesses they take (specification, "Device Regions").

use numagpu_devices::bus::{Area, Bar, PciFunction};

use super::PAGE_SIZES;
use super::refusal::Refusal;
use super::wire::{Access, Files, Reply};

/// Number of regions of a PCI device: six BARs, ROM, configuration space, VGA (`VFIO_PCI_NUM_REGIONS`).
pub const COUNT: u32 = 9;

/// Index of configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const CONFIG: u32 = 7;

/// `VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE`.
const READ_WRITE: u32 = 0b11;

/// `VFIO_REGION_INFO_FLAG_MMAP`.
const MMAP: u32 = 1 << 2;

/// `VFIO_REGION_INFO_FLAG_CAPS`.
const CAPS: u32 = 1 << 3;

/// Bytes of `struct vfio_region_info`; a capability follows it.
const INFO_SIZE: u32 = 32;

/// `VFIO_REGION_INFO_CAP_SPARSE_MMAP`, version 1.
const SPARSE_MMAP: (u16, u16) = (1, 1);

/// Bytes of the capability without its areas, and of each area.
const SPARSE_SIZE: u32 = 16;
const AREA_SIZE: u32 = 16;

/// Most areas of one region that can be mapped; a region with more cannot be mapped at all.
const MAX_AREAS: usize = 64;

/// Offsets in configuration space, and the bit of `COMMAND` that lets memory be reached (PCIe Base 6.0 section
/// 7.5.1).
const COMMAND: u32 = 0x04;
const MEMORY_SPACE: u32 = 1 << 1;
const FIRST_BAR: u32 = 0x10;

/// A region of a function.
#[derive(Clone, Debug, Default)]
struct Region {
    size: u64,
    is_64bit: bool,
    /// What a client may map; the function has a file for it.
    mappable: Vec<Area>,
}

/// The regions of a function.
#[derive(Clone, Debug)]
pub struct Regions {
    all: [Region; COUNT as usize],
}

/// A place inside a region, with the whole access inside too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In configuration space.
    Config(u32),
    /// In a BAR.
    Bar(u8, u64),
}

impl Regions {
    /// The regions of a function.
    #[must_use]
    pub fn new(function: &dyn PciFunction) -> Self {
        let layout = function.layout();
        let mut all: [Region; COUNT as usize] = Default::default();
        for bar in layout.bars.iter().filter(|bar| bar.index < 6) {
            if let Some(region) = all.get_mut(usize::from(bar.index)) {
                region.size = bar.size;
                region.is_64bit = bar.is_64bit;
                if is_mappable(bar) && function.bar_file(bar.index).is_some() {
                    region.mappable.clone_from(&bar.mappable);
                }
            }
        }
        if let Some(region) = all.get_mut(CONFIG as usize) {
            region.size = u64::from(layout.config_size);
        }
        Self { all }
    }

    fn region(&self, index: u32) -> Result<&Region, Refusal> {
        self.all
            .get(index as usize)
            .ok_or(Refusal::Region { index })
    }

    /// Bytes of a region; 0 if the function has none there.
    ///
    /// # Errors
    /// [`Refusal::Region`] if the index is not below [`COUNT`].
    pub fn size(&self, index: u32) -> Result<u64, Refusal> {
        Ok(self.region(index)?.size)
    }

    /// Puts the body of a reply to `DEVICE_GET_REGION_INFO` for a client that has room for `argsz` bytes. Where the
    /// capability does not fit, the body does not speak of it, but for its `argsz`, which says how much room is needed.
    /// A client that takes no descriptors (`takes_fds`) can map nothing.
    ///
    /// # Errors
    /// [`Refusal::Region`] if the index is not below [`COUNT`].
    pub fn describe(
        &self,
        index: u32,
        argsz: u32,
        takes_fds: bool,
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        let Region { size, mappable, .. } = self.region(index)?;
        let mappable: &[Area] = if takes_fds { mappable } else { &[] };
        let whole = Area {
            offset: 0,
            size: *size,
        };
        let (mut need, mut flags, mut cap_offset) = (INFO_SIZE, 0, 0);
        if *size > 0 {
            flags |= READ_WRITE;
        }
        if let (false, Ok(bar)) = (mappable.is_empty(), u8::try_from(index)) {
            flags |= MMAP;
            reply.with(Files::Bar(bar));
        }
        let areas = if *mappable == [whole] { &[] } else { mappable };
        if !areas.is_empty() {
            need += SPARSE_SIZE + AREA_SIZE * u32::try_from(areas.len()).unwrap_or(0);
        }
        let fits = argsz >= need && !areas.is_empty();
        if fits {
            flags |= CAPS;
            cap_offset = INFO_SIZE;
        }
        reply.u32(need).u32(flags).u32(index).u32(cap_offset);
        reply.u64(*size).u64(0);
        if fits {
            let (id, version) = SPARSE_MMAP;
            reply.u16(id).u16(version).u32(0);
            reply.u32(u32::try_from(areas.len()).unwrap_or(0)).u32(0);
            for area in areas {
                reply.u64(area.offset).u64(area.size);
            }
        }
        Ok(())
    }

    /// Which mappable part of a BAR is at `size` bytes from a bus address, as configuration space has it now: BAR and
    /// offset in its file.
    #[must_use]
    pub fn at_bus_address(
        &self,
        function: &dyn PciFunction,
        address: u64,
        size: u64,
    ) -> Option<(u8, u64)> {
        let register = |offset| {
            let mut value = [0; 4];
            function.config_read(offset, &mut value);
            u32::from_le_bytes(value)
        };
        if self.all.iter().all(|region| region.mappable.is_empty())
            || register(COMMAND) & MEMORY_SPACE == 0
        {
            return None;
        }
        (0..6_u8).zip(&self.all).find_map(|(bar, region)| {
            let first = FIRST_BAR + 4 * u32::from(bar);
            let high = match region.mappable.is_empty() {
                true => return None,
                false if region.is_64bit => u64::from(register(first + 4)),
                false => 0,
            };
            let base = high << 32 | u64::from(register(first) & !0xf);
            let offset = address.checked_sub(base).filter(|_| base != 0)?;
            let end = offset.checked_add(size)?;
            let inside = |area: &Area| area.offset <= offset && end <= area.offset + area.size;
            region.mappable.iter().any(inside).then_some((bar, offset))
        })
    }

    /// Where an access goes; none if it has no bytes.
    ///
    /// # Errors
    /// [`Refusal::Region`] if there is no such region, [`Refusal::Range`] if the access is not inside it.
    pub fn place(&self, access: &Access) -> Result<Option<Place>, Refusal> {
        let size = self.size(access.region)?;
        let count = u64::from(access.count);
        if access
            .offset
            .checked_add(count)
            .is_none_or(|end| end > size)
        {
            return Err(Refusal::Range {
                index: access.region,
                offset: access.offset,
                count,
                size,
            });
        }
        if count == 0 {
            return Ok(None);
        }
        Ok(match (access.region, u8::try_from(access.region)) {
            (CONFIG, _) => u32::try_from(access.offset).ok().map(Place::Config),
            (_, Ok(bar)) => Some(Place::Bar(bar, access.offset)),
            _ => None,
        })
    }
}

/// Whether the areas of a BAR are what they have to be: a client that maps what is not there dies of it.
fn is_mappable(bar: &Bar) -> bool {
    let mut end = 0;
    let sound = |area: &Area| {
        let Area { offset, size } = *area;
        let starts = offset >= end && size > 0;
        end = offset.saturating_add(size);
        starts && (offset | size).is_multiple_of(PAGE_SIZES) && end <= bar.size
    };
    bar.mappable.len() <= MAX_AREAS && bar.mappable.iter().all(sound)
}

impl Place {
    /// Reads from the function.
    pub fn read(self, function: &dyn PciFunction, data: &mut [u8]) {
        match self {
            Self::Config(offset) => function.config_read(offset, data),
            Self::Bar(bar, offset) => function.bar_read(bar, offset, data),
        }
    }

    /// Writes to the function.
    pub fn write(self, function: &dyn PciFunction, data: &[u8]) {
        match self {
            Self::Config(offset) => function.config_write(offset, data),
            Self::Bar(bar, offset) => function.bar_write(bar, offset, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_inside_the_bar_one_behind_the_other_are_mappable() {
        let bar = |areas: &[(u64, u64)]| Bar {
            index: 0,
            size: 0x10_0000,
            is_64bit: true,
            prefetchable: true,
            mappable: areas
                .iter()
                .map(|&(offset, size)| Area { offset, size })
                .collect(),
        };
        let good: [&[_]; 4] = [
            &[],
            &[(0, 0x10_0000)],
            &[(0x1000, 0x1000), (0x2000, 0x1000)],
            &[(0, 0x1000), (0xf_f000, 0x1000)],
        ];
        for areas in good {
            assert!(is_mappable(&bar(areas)), "{areas:x?}");
        }
        let bad: [&[_]; 8] = [
            &[(0, 0)],
            &[(0, 0x800)],
            &[(0x800, 0x1000)],
            &[(0, 0x10_1000)],
            &[(0x10_0000, 0x1000)],
            &[(0xffff_ffff_ffff_f000, 0x1000)],
            &[(0, 0x2000), (0x1000, 0x1000)],
            &[(0x2000, 0x1000), (0, 0x1000)],
        ];
        for areas in bad {
            assert!(!is_mappable(&bar(areas)), "{areas:x?}");
        }
        let many: Vec<_> = (0..=MAX_AREAS as u64)
            .map(|at| (at << 13, 0x1000))
            .collect();
        assert!(is_mappable(&bar(&many[1..])));
        assert!(!is_mappable(&bar(&many)));
    }
}
