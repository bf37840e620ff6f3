//! A partition's HBM as the CPU sees it: through the GPU's aperture, or as a dax device.

use std::fs::OpenOptions;
use std::rc::Rc;

use numagpu_topology::ranges::Range;
use numagpu_topology::seen::DaxSeen;

use crate::device::{Aperture, Outcome};
use crate::sys::Mapping;

/// dax maps in units of 2 MiB.
pub const WINDOW: usize = 2 << 20;
/// A partition of a GPU.
pub struct Partition {
    /// Its addresses.
    pub range: Range,
    /// The GPU's aperture, if it has one.
    pub aperture: Option<Rc<Aperture>>,
    /// Its dax device, if it has one.
    pub dax: Option<DaxSeen>,
}

impl Partition {
    /// The 2 MiB of HBM at `offset`, through the GPU's aperture or the partition's dax device.
    pub fn map(&self, offset: u64) -> Outcome<Mapping> {
        if let Some(aperture) = &self.aperture {
            let address = self.range.base.checked_add(offset);
            return aperture.map(address.ok_or("an address beyond 64 bits")?, WINDOW);
        }
        let dax = self
            .dax
            .as_ref()
            .ok_or_else(|| format!("no dax device at {:#x}", self.range.base))?;
        let path = format!("/dev/{}", dax.name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|error| format!("{path}: {error}"))?;
        // A dax device is mapped in whole units of its alignment.
        let unit = dax.align.max(WINDOW as u64);
        let start = offset / unit * unit;
        let sizes = usize::try_from(unit)
            .ok()
            .zip(usize::try_from(offset - start).ok());
        let (len, inner) = sizes.ok_or("alignment of more than the address space")?;
        Mapping::file(&file, start, len)
            .map(|mapping| mapping.from(inner))
            .map_err(|error| format!("{path} at {start:#x}: {error}"))
    }

    /// Where the CPU writes: the first, a middle and the last 2 MiB.
    pub fn places(&self) -> [u64; 3] {
        let window = WINDOW as u64;
        [
            0,
            self.range.size / 2 / window * window,
            self.range.size.saturating_sub(window),
        ]
    }
}
