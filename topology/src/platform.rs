//! Where QEMU's q35 machine puts RAM and device memory.
//!
//! Source: QEMU 11.1 `hw/i386/pc.c` (`pc_memory_init`, `pc_get_device_memory_range`, `pc_max_used_gpa`) and
//! `hw/i386/pc_q35.c`.

use serde::Serialize;

use crate::ranges::{NoRoom, Range, Space};
use crate::size::{GIB, MIB};

/// First address above the 32-bit PCI hole.
pub const FOUR_GIB: u64 = 4 * GIB;
/// Range under 1 TiB that AMD's HyperTransport keeps for itself (AMD64 APM volume 2, `AMD_HT_START` in QEMU).
pub const AMD_HT: Range = Range {
    base: 0xfd_0000_0000,
    size: 0x3_0000_0000,
};
/// Size of the 64-bit PCI window that q35 reserves above all memory.
pub const PCI_HOLE64: u64 = 32 * GIB;
/// Legacy video and BIOS area, never RAM for a kernel.
pub const LEGACY_HOLE: Range = Range {
    base: 0xa_0000,
    size: MIB - 0xa_0000,
};

/// RAM and device memory of a q35 machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// RAM, ascending; at most two ranges.
    pub ram: Vec<Range>,
    /// Where the device-memory window begins.
    pub window_base: u64,
}

/// The holes of a q35 machine's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Holes {
    /// Most RAM below 4 GiB, where the PCI hole begins then (`max-ram-below-4g`); none for q35's own rule.
    pub below_4g: Option<u64>,
    /// Bytes of the PCI hole behind all memory (`q35-pcihost.pci-hole64-size`).
    pub pci_hole64: u64,
    /// Whether [`AMD_HT`] is reserved, as for AMD's CPUs.
    pub amd: bool,
}

impl Default for Holes {
    fn default() -> Holes {
        Holes {
            below_4g: None,
            pci_hole64: PCI_HOLE64,
            amd: true,
        }
    }
}

impl Holes {
    /// End of RAM below 4 GiB: with 2.75 GiB or more of RAM, q35 keeps 2 GiB there, otherwise all of it; less where the
    /// hole begins earlier.
    pub const fn low_ram_end(&self, ram: u64) -> u64 {
        const SPLIT: u64 = 0xb000_0000;
        let split = if ram >= SPLIT { 2 * GIB } else { SPLIT };
        let split = match self.below_4g {
            Some(wanted) if wanted < split => wanted,
            _ => split,
        };
        if ram >= split { split } else { ram }
    }

    /// Highest address that the machine uses, the 64-bit PCI hole included, plus one.
    pub const fn used_end(&self, window_end: u64) -> u64 {
        match window_end.checked_next_multiple_of(GIB) {
            Some(end) => end.saturating_add(self.pci_hole64),
            None => u64::MAX,
        }
    }

    /// Size of the smallest window, in whole GiB, that makes q35 move what is above 4 GiB beyond [`AMD_HT`], where the
    /// window would begin at `window_base` otherwise.
    pub const fn moving_window(&self, window_base: u64) -> u64 {
        let room = AMD_HT.base.saturating_sub(self.pci_hole64);
        room.saturating_sub(window_base) / GIB * GIB + GIB
    }

    /// Lays out `ram` bytes, with a device-memory window of `window` bytes above.
    ///
    /// Where all of it would reach [`AMD_HT`], what is above 4 GiB moves to 1 TiB, as QEMU does for AMD CPUs, which is
    /// what its own emulation presents.
    ///
    /// # Errors
    /// [`NoRoom`] if RAM does not fit under 2^52.
    pub fn layout(&self, ram: u64, window: u64) -> Result<Layout, NoRoom> {
        let at = |above: u64| -> Result<Layout, NoRoom> {
            let mut space = Space::new(1 << 52);
            let low = self.low_ram_end(ram);
            space.reserve(Range {
                base: low,
                size: above - low,
            });
            let pieces = space.fill(ram, 0)?;
            let end = pieces.last().map_or(0, Range::end).max(above);
            Ok(Layout {
                ram: pieces,
                window_base: end.next_multiple_of(GIB),
            })
        };
        let layout = at(FOUR_GIB)?;
        let end = layout.window_base.saturating_add(window);
        if self.amd && self.used_end(end) > AMD_HT.base {
            return at(AMD_HT.end());
        }
        Ok(layout)
    }
}

/// [`Holes::layout`] with q35's own holes.
///
/// # Errors
/// [`NoRoom`] if RAM does not fit under 2^52.
#[cfg(test)]
fn layout(ram: u64, window: u64) -> Result<Layout, NoRoom> {
    Holes::default().layout(ram, window)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_stays_below_the_hole() {
        let layout = layout(2 * GIB, 10 * GIB).unwrap();
        assert_eq!(
            layout.ram,
            [Range {
                base: 0,
                size: 2 * GIB
            }]
        );
        assert_eq!(layout.window_base, FOUR_GIB);
    }

    #[test]
    fn large_ram_is_split_at_two_gib() {
        let layout = layout(3 * GIB, 10 * GIB).unwrap();
        assert_eq!(
            layout.ram,
            [
                Range {
                    base: 0,
                    size: 2 * GIB
                },
                Range {
                    base: FOUR_GIB,
                    size: GIB
                }
            ]
        );
        assert_eq!(layout.window_base, 5 * GIB);
    }

    #[test]
    fn the_moving_window_is_the_smallest_that_moves() {
        for ram in [GIB, 4 * GIB, 700 * GIB] {
            let below = layout(ram, 0).unwrap();
            let window = Holes::default().moving_window(below.window_base);
            assert_eq!(layout(ram, window - GIB).unwrap(), below);
            assert!(layout(ram, window).unwrap().window_base >= 1 << 40);
        }
    }

    #[test]
    fn the_end_of_the_addresses_does_not_wrap() {
        assert_eq!(Holes::default().used_end(u64::MAX), u64::MAX);
        assert!(layout(u64::MAX, u64::MAX).is_err());
        assert!(layout(GIB, u64::MAX).is_ok());
    }

    #[test]
    fn what_reaches_the_hypertransport_range_moves_above_one_tib() {
        let layout = layout(3 * GIB, 1024 * GIB).unwrap();
        assert_eq!(
            layout.ram.last(),
            Some(&Range {
                base: 1 << 40,
                size: GIB
            })
        );
        assert_eq!(layout.window_base, (1 << 40) + GIB);
    }

    #[test]
    fn the_hole_below_four_gib_takes_ram_away_and_never_gives_any() {
        let holes = |below_4g| Holes {
            below_4g,
            ..Holes::default()
        };
        assert_eq!(holes(Some(GIB)).low_ram_end(2 * GIB), GIB);
        assert_eq!(holes(Some(GIB)).low_ram_end(GIB / 2), GIB / 2);
        // Measured: q35 with 3 GiB of RAM keeps 2 GiB low whatever more is asked for.
        assert_eq!(holes(Some(0xb000_0000)).low_ram_end(3 * GIB), 2 * GIB);
        let layout = holes(Some(GIB)).layout(2 * GIB, 0).unwrap();
        assert_eq!(layout.ram.last().map(|r| r.base), Some(FOUR_GIB));
    }

    #[test]
    fn without_amds_range_nothing_moves() {
        let holes = Holes {
            amd: false,
            ..Holes::default()
        };
        let layout = holes.layout(3 * GIB, 1024 * GIB).unwrap();
        assert_eq!(layout.window_base, 5 * GIB);
    }
}
