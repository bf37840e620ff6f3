//! The regions of a PCI device and the accesses they take (specification, "Device Regions").

use numagpu_devices::bus::{FunctionLayout, PciFunction};

use super::refusal::Refusal;
use super::wire::Access;

/// Number of regions of a PCI device: six BARs, ROM, configuration space, VGA (`VFIO_PCI_NUM_REGIONS`).
pub const COUNT: u32 = 9;

/// Index of configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
pub const CONFIG: u32 = 7;

/// `VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE`.
const READ_WRITE: u32 = 0b11;

/// Sizes of a function's regions.
#[derive(Clone, Debug)]
pub struct Regions {
    sizes: [u64; COUNT as usize],
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
    pub fn new(layout: &FunctionLayout) -> Self {
        let mut sizes = [0; COUNT as usize];
        for bar in layout.bars.iter().filter(|bar| bar.index < 6) {
            if let Some(size) = sizes.get_mut(usize::from(bar.index)) {
                *size = bar.size;
            }
        }
        if let Some(size) = sizes.get_mut(CONFIG as usize) {
            *size = u64::from(layout.config_size);
        }
        Self { sizes }
    }

    /// Bytes of a region; 0 if the function has none there.
    ///
    /// # Errors
    /// [`Refusal::Region`] if the index is not below [`COUNT`].
    pub fn size(&self, index: u32) -> Result<u64, Refusal> {
        self.sizes
            .get(index as usize)
            .copied()
            .ok_or(Refusal::Region { index })
    }

    /// `VFIO_REGION_INFO_FLAG_*` of a region.
    ///
    /// # Errors
    /// [`Refusal::Region`] if the index is not below [`COUNT`].
    pub fn flags(&self, index: u32) -> Result<u32, Refusal> {
        Ok(if self.size(index)? == 0 {
            0
        } else {
            READ_WRITE
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
