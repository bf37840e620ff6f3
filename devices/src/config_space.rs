//! PCI configuration space: a checked table of fields with writable masks.
//!
//! | offset | what |
//! |---|---|
//! | 0x00 | type 0 header |
//! | 0x40 | MSI-X capability, first in the list: clients walk the list at each access until they find it |
//! | 0x50 | PCI Express capability version 2, with function-level reset |
//! | 0x90 | power management capability, D0 and D3hot, state kept over D3hot |
//! | 0x100 | no extended capabilities |
//!
//! Sources: PCI Local Bus 3.0 chapter 6, PCI Express Base 6.0 section 7.5, PCI Power Management 1.2.

use numagpu_spec::pci;

use crate::bus::Bar;
use crate::config::PciIds;

/// Bytes of configuration space.
pub const CONFIG_SIZE: usize = 4096;
/// Offset of the MSI-X capability.
pub const CAP_MSIX: u16 = 0x40;
/// Offset of the PCI Express capability.
pub const CAP_PCIE: u16 = 0x50;
/// Offset of the power management capability.
pub const CAP_PM: u16 = 0x90;

const COMMAND: u16 = 0x04;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Memory space, bus master, parity error response, SERR# enable, INTx disable.
const COMMAND_WRITABLE: u32 = 0x0546;
const STATUS_CAP_LIST: u32 = 1 << 4;
const BAR0: u16 = 0x10;
const BAR_64BIT: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
const DEVICE_CONTROL: u16 = CAP_PCIE + 0x08;
/// Bit 15 of device control, in its upper byte.
const INITIATE_FLR: u8 = 1 << 7;
const PM_CONTROL: u16 = CAP_PM + 0x04;
const PM_STATE: u8 = 0b11;
const PM_D0: u8 = 0b00;
const PM_D3HOT: u8 = 0b11;

/// A field: offset, bytes, value after reset, bits that a write replaces.
#[derive(Clone, Copy, Debug)]
struct Field {
    offset: u16,
    bytes: u8,
    reset: u32,
    writable: u32,
}

const fn ro(offset: u16, bytes: u8, reset: u32) -> Field {
    rw(offset, bytes, reset, 0)
}

const fn rw(offset: u16, bytes: u8, reset: u32, writable: u32) -> Field {
    Field {
        offset,
        bytes,
        reset,
        writable,
    }
}

/// Fields that are the same in every GPU, ascending.
const FIELDS: &[Field] = &[
    rw(COMMAND, 2, 0, COMMAND_WRITABLE),
    ro(0x06, 2, STATUS_CAP_LIST),
    rw(0x0c, 1, 0, 0xff),         // cache line size: no effect, but writable
    ro(0x34, 1, CAP_MSIX as u32), // first capability
    rw(0x3c, 1, 0, 0xff),         // interrupt line: for software
    ro(0x3d, 1, 0),               // interrupt pin: no INTx
    // MSI-X: message control has function mask and enable.
    ro(CAP_MSIX, 2, 0x11 | (CAP_PCIE as u32) << 8),
    rw(CAP_MSIX + 0x02, 2, pci::VECTOR_COUNT as u32 - 1, 0xc000),
    ro(
        CAP_MSIX + 0x04,
        4,
        pci::MSIX_TABLE_OFFSET | pci::BAR_MSIX as u32,
    ),
    ro(
        CAP_MSIX + 0x08,
        4,
        pci::MSIX_PBA_OFFSET | pci::BAR_MSIX as u32,
    ),
    // PCI Express: endpoint, version 2.
    ro(CAP_PCIE, 2, 0x10 | (CAP_PM as u32) << 8),
    ro(CAP_PCIE + 0x02, 2, 0x0002),
    ro(CAP_PCIE + 0x04, 4, 1 << 28 | 1 << 15), // FLR, role-based error reporting
    rw(DEVICE_CONTROL, 2, 0x2810, 0x78ff),
    ro(CAP_PCIE + 0x0a, 2, 0),
    ro(CAP_PCIE + 0x0c, 4, 1 << 22 | 16 << 4 | 4), // x16 at 16 GT/s
    rw(CAP_PCIE + 0x10, 2, 0, 0x00c0),
    ro(CAP_PCIE + 0x12, 2, 16 << 4 | 4),
    ro(CAP_PCIE + 0x24, 4, 0),
    ro(CAP_PCIE + 0x2c, 4, 0x1e), // 2.5 to 16 GT/s
    rw(CAP_PCIE + 0x30, 2, 4, 0x000f),
    // Power management 1.2, no D1, D2 or PME#.
    ro(CAP_PM, 2, 0x01),
    ro(CAP_PM + 0x02, 2, 0x0003),
    rw(PM_CONTROL, 2, 1 << 3, PM_STATE as u32), // NoSoftRst
];

/// Stops compilation where the table is not well formed.
#[allow(clippy::indexing_slicing, reason = "runs at compile time")]
const _: () = {
    let mut end = 0;
    let mut i = 0;
    while i < FIELDS.len() {
        let field = FIELDS[i];
        assert!(field.offset >= end, "fields are ascending and disjoint");
        assert!(field.bytes == 1 || field.bytes == 2 || field.bytes == 4);
        assert!(field.offset.is_multiple_of(field.bytes as u16), "aligned");
        if field.bytes < 4 {
            let outside = !((1 << (8 * field.bytes as u32)) - 1);
            assert!((field.reset | field.writable) & outside == 0);
        }
        end = field.offset + field.bytes as u16;
        i += 1;
    }
};

/// What a write to configuration space asks the function to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigEffects {
    /// The driver started a function-level reset.
    pub function_reset: bool,
}

/// Configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    // Static configuration.
    reset: Box<[u8; CONFIG_SIZE]>,
    writable: Box<[u8; CONFIG_SIZE]>,
    // Volatile state.
    values: Box<[u8; CONFIG_SIZE]>,
}

impl ConfigSpace {
    /// Configuration space after power-on.
    pub fn new(ids: &PciIds, bars: &[Bar]) -> ConfigSpace {
        let mut space = ConfigSpace {
            reset: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            values: Box::new([0; CONFIG_SIZE]),
        };
        let identity = [
            ro(0x00, 2, ids.vendor.into()),
            ro(0x02, 2, ids.device.into()),
            ro(0x08, 4, ids.class << 8 | u32::from(ids.revision)),
            ro(0x2c, 2, ids.subsystem_vendor.into()),
            ro(0x2e, 2, ids.subsystem.into()),
        ];
        for field in FIELDS.iter().chain(&identity) {
            space.define(field);
        }
        for bar in bars {
            let offset = BAR0 + 4 * u16::from(bar.index);
            let kind = if bar.is_64bit { BAR_64BIT } else { 0 }
                | if bar.prefetchable {
                    BAR_PREFETCHABLE
                } else {
                    0
                };
            // Only address bits from the size up can be written: what remains zero tells the size.
            let mask = !bar.size.saturating_sub(1);
            space.define(&rw(offset, 4, kind, low(mask) & !0xf));
            if bar.is_64bit {
                space.define(&rw(offset + 4, 4, 0, low(mask >> 32)));
            }
        }
        space.values.copy_from_slice(space.reset.as_slice());
        space
    }

    /// Reads from `offset`; what is beyond the space is zero.
    pub fn read(&self, offset: u32, data: &mut [u8]) {
        data.fill(0);
        let source = self.values.iter().skip(offset as usize);
        for (to, from) in data.iter_mut().zip(source) {
            *to = *from;
        }
    }

    /// Writes at `offset`, as far as bits are writable.
    pub fn write(&mut self, offset: u32, data: &[u8]) -> ConfigEffects {
        let pm_before = self.byte(PM_CONTROL) & PM_STATE;
        let mut effects = ConfigEffects::default();
        let places = self.values.iter_mut().zip(self.writable.iter()).enumerate();
        for ((index, (value, mask)), new) in places.skip(offset as usize).zip(data) {
            *value = (*value & !mask) | (new & mask);
            if index == usize::from(DEVICE_CONTROL) + 1 && new & INITIATE_FLR != 0 {
                effects.function_reset = true;
            }
        }
        // A write of a state that the function does not have is dropped (PM 1.2 section 3.2.4).
        if !matches!(self.byte(PM_CONTROL) & PM_STATE, PM_D0 | PM_D3HOT)
            && let Some(control) = self.values.get_mut(usize::from(PM_CONTROL))
        {
            *control = (*control & !PM_STATE) | pm_before;
        }
        effects
    }

    /// Whether the function may do DMA: bus master on, and not in D3hot.
    pub fn dma_allowed(&self) -> bool {
        self.bus_master() && self.byte(PM_CONTROL) & PM_STATE == PM_D0
    }

    /// Whether the bus master bit is set.
    pub fn bus_master(&self) -> bool {
        self.byte(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        let ConfigSpace {
            reset,
            writable: _,
            values,
        } = self;
        values.copy_from_slice(reset.as_slice());
    }

    fn byte(&self, offset: u16) -> u8 {
        self.values.get(usize::from(offset)).copied().unwrap_or(0)
    }

    fn define(&mut self, field: &Field) {
        let bytes = field.reset.to_le_bytes().into_iter();
        let masks = field.writable.to_le_bytes();
        let places = self.reset.iter_mut().zip(self.writable.iter_mut());
        for ((reset, writable), (byte, mask)) in places
            .skip(usize::from(field.offset))
            .take(usize::from(field.bytes))
            .zip(bytes.zip(masks))
        {
            *reset = byte;
            *writable = mask;
        }
    }
}

/// Low half of a 64-bit mask.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the low half is what is asked for"
)]
const fn low(mask: u64) -> u32 {
    mask as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Number, size and kind of each BAR: 4 is 64-bit, 8 prefetchable.
    const BARS: [(u8, u64, u64); 4] = [
        (0, 0x1_0000, 0),
        (1, 0x2000, 0),
        (2, 0x1000, 4),
        (4, 512 << 30, 12),
    ];

    fn bar((index, size, kind): (u8, u64, u64)) -> Bar {
        Bar {
            index,
            size,
            is_64bit: kind & 4 != 0,
            prefetchable: kind & 8 != 0,
            mappable: Vec::new(),
        }
    }

    fn space() -> ConfigSpace {
        ConfigSpace::new(&PciIds::default(), &BARS.map(bar))
    }

    fn read<const N: usize>(space: &ConfigSpace, offset: u32) -> [u8; N] {
        let mut data = [0xee; N];
        space.read(offset, &mut data);
        data
    }

    fn read32(space: &ConfigSpace, offset: u32) -> u32 {
        u32::from_le_bytes(read(space, offset))
    }

    #[test]
    fn identity_is_where_the_specification_says() {
        let space = space();
        assert_eq!(read32(&space, 0), 0x6770_1234);
        assert_eq!(read32(&space, 8), 0x1200_0001);
        assert_eq!(read32(&space, 0x2c), 0x6770_1234);
        assert_eq!(read::<1>(&space, 0x0e), [0], "type 0 header");
        assert_eq!(read::<1>(&space, 0x3d), [0], "no INTx");
        assert_eq!(read32(&space, 0x100), 0, "no extended capabilities");
    }

    #[test]
    fn bars_tell_their_size() {
        let mut space = space();
        for (bar, size, kind) in BARS {
            let offset = 0x10 + 4 * u32::from(bar);
            let (len, all) = match kind {
                0 => (4, u64::from(u32::MAX)),
                _ => (8, u64::MAX),
            };
            let mut get = |value: u64| {
                space.write(offset, &value.to_le_bytes()[..len]);
                let mut data = [0; 8];
                space.read(offset, &mut data[..len]);
                u64::from_le_bytes(data)
            };
            let value = get(u64::MAX);
            assert_eq!(value & 0xf, kind);
            assert_eq!((!(value & !0xf) & all) + 1, size, "BAR {bar}");
            let address = 0x1234_5680_0000_0000 & all;
            assert_eq!(get(address), address | kind, "BAR {bar}");
        }
    }

    #[test]
    fn a_bar_of_any_size_tells_it_and_no_more() {
        for bits in 12..=63 {
            let bars = [bar((4, 1 << bits, 12))];
            let mut space = ConfigSpace::new(&PciIds::default(), &bars);
            space.write(0x10, &[0xff; 24]);
            let value = u64::from_le_bytes(read(&space, 0x20));
            assert_eq!(value, !((1 << bits) - 1) | 12);
            // BARs that are not there stay zero, so that nobody gives them an address.
            assert_eq!(read::<16>(&space, 0x10), [0; 16]);
        }
    }

    #[test]
    fn the_capability_list_starts_with_msix_and_ends() {
        let space = space();
        assert_ne!(read::<1>(&space, 6)[0] & 0x10, 0);
        let mut ids = Vec::new();
        let mut next = read::<1>(&space, 0x34)[0];
        while next != 0 {
            assert_eq!(next % 4, 0);
            let [id, after] = read::<2>(&space, next.into());
            ids.push(id);
            next = after;
            assert!(ids.len() < 10);
        }
        assert_eq!(ids, [0x11, 0x10, 0x01]);
        assert_eq!(read32(&space, 0x44), 1);
        assert_eq!(read32(&space, 0x48), 0x1001);
        assert_eq!(read32(&space, 0x40) >> 16 & 0x7ff, 8, "9 vectors");
        assert_ne!(read32(&space, 0x54) & 1 << 28, 0, "FLR");
    }

    #[test]
    fn a_write_replaces_only_what_is_writable() {
        let mut space = space();
        space.write(0, &[0xff; CONFIG_SIZE]);
        let after = space.clone();
        assert_eq!(read32(&after, 0), 0x6770_1234);
        assert_eq!(read::<2>(&after, 4), [0x46, 0x05]);
        assert_eq!(read::<2>(&after, 0x58), [0xff, 0x78], "FLR reads zero");
        assert_eq!(read::<2>(&after, 0x94), [0x0b, 0]);
        space.reset();
        assert_eq!(read::<2>(&space, 4), [0, 0]);
    }

    #[test]
    fn flr_starts_however_the_bit_is_written() {
        let mut space = space();
        assert!(space.write(0x58, &[0, 0x80]).function_reset);
        assert!(space.write(0x59, &[0x80]).function_reset);
        assert!(space.write(0x57, &[0, 0, 0x80, 0]).function_reset);
        assert!(!space.write(0x58, &[0xff, 0x7f]).function_reset);
        assert!(!space.write(0x5a, &[0x80, 0x80]).function_reset);
    }

    #[test]
    fn dma_needs_bus_master_and_d0() {
        let mut space = space();
        assert!(!space.dma_allowed());
        space.write(4, &[6, 0]);
        assert!(space.dma_allowed());
        space.write(0x94, &[3]);
        assert!(!space.dma_allowed());
        space.write(0x94, &[1]);
        assert_eq!(read::<1>(&space, 0x94), [0x0b], "D1 is dropped");
        space.write(0x94, &[0]);
        assert!(space.dma_allowed());
    }

    proptest! {
        #[test]
        fn pieces_write_the_same(offset in 0u32..0x110, data in prop::collection::vec(any::<u8>(), 1..40)) {
            let (mut whole, mut bytes) = (space(), space());
            whole.write(offset, &data);
            for (at, byte) in (offset..).zip(&data) {
                bytes.write(at, &[*byte]);
            }
            prop_assert_eq!(whole.values, bytes.values);
        }

        #[test]
        fn any_offset_is_harmless(offset in any::<u32>(), data in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut space = space();
            space.write(offset, &data);
            let mut data = data;
            space.read(offset, &mut data);
        }
    }
}
