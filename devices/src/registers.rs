//! The register engine: any access to a BAR becomes operations on whole registers.
//!
//! A [`RegisterMap`] is built once from a table of [`Block`]s and finds the register at an offset in constant
//! time. A [`RegisterFile`] holds the values of one BAR. Partial, straddling and misaligned accesses are taken
//! apart here and nowhere else: a read assembles its bytes from whole registers, a write merges its bytes with
//! what the register holds, applies the masks of the table, and tells the device once for each register.
//!
//! No access allocates or takes a lock. Two halves of an 8-byte register that are read by two accesses may
//! come from different moments, as on hardware.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};

use numagpu_spec::table::{Block, Reg, Width};
use thiserror::Error;

/// Slot number of an offset that has no register.
const NO_SLOT: u16 = u16::MAX;

/// Why a register table cannot be used.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TableError {
    /// A register lies outside the BAR.
    #[error("{block}.{register} at {offset:#x} is outside a BAR of {size:#x} bytes")]
    Outside {
        /// Block.
        block: &'static str,
        /// Register.
        register: &'static str,
        /// Offset in the BAR.
        offset: u64,
        /// Bytes of the BAR.
        size: u64,
    },
    /// A register is not aligned to its width, or lies over another one.
    #[error("{block}.{register} at {offset:#x} is misaligned or overlaps another register")]
    Overlap {
        /// Block.
        block: &'static str,
        /// Register.
        register: &'static str,
        /// Offset in the BAR.
        offset: u64,
    },
    /// More registers than slot numbers.
    #[error("{count} registers do not fit a table of {max}")]
    TooMany {
        /// Registers so far.
        count: usize,
        /// Most that fit.
        max: u16,
    },
}

/// Which register an access meets.
#[derive(Clone, Copy, Debug)]
pub struct RegisterAt {
    /// Base of its block, as in the spec.
    pub block: u32,
    /// Instance of the block, from 0.
    pub instance: u32,
    /// The register.
    pub reg: &'static Reg,
}

impl RegisterAt {
    /// Whether it is this register, of any instance of the block.
    pub const fn is(&self, block: &Block, reg: &Reg) -> bool {
        self.block == block.base && self.reg.offset == reg.offset
    }
}

/// A slot of the map: a register and where it starts.
#[derive(Clone, Copy, Debug)]
struct Slot {
    at: RegisterAt,
    start: u64,
}

/// Where the registers of a BAR are.
#[derive(Clone, Debug)]
pub struct RegisterMap {
    /// Slot of each 4-byte word of the BAR.
    words: Box<[u16]>,
    slots: Box<[Slot]>,
}

impl RegisterMap {
    /// Map of a BAR of `size` bytes.
    ///
    /// # Errors
    /// [`TableError`] for a table that [`numagpu_spec::table::check`] would refuse.
    pub fn new(blocks: &[Block], size: u64) -> Result<RegisterMap, TableError> {
        let word_count = usize::try_from(size / 4).unwrap_or(0);
        let mut words = vec![NO_SLOT; word_count].into_boxed_slice();
        let mut slots = Vec::new();
        for block in blocks {
            for instance in 0..block.count {
                for reg in block.regs {
                    let start = u64::from(block.base)
                        + u64::from(block.stride) * u64::from(instance)
                        + u64::from(reg.offset);
                    let width = u64::from(reg.width.bytes());
                    let number = u16::try_from(slots.len())
                        .ok()
                        .filter(|n| *n != NO_SLOT)
                        .ok_or(TableError::TooMany {
                            count: slots.len(),
                            max: NO_SLOT,
                        })?;
                    for word in start / 4..(start + width).div_ceil(4) {
                        let outside = TableError::Outside {
                            block: block.name,
                            register: reg.name,
                            offset: start,
                            size,
                        };
                        let place = usize::try_from(word)
                            .ok()
                            .and_then(|w| words.get_mut(w))
                            .ok_or(outside)?;
                        if *place != NO_SLOT || !start.is_multiple_of(width) {
                            return Err(TableError::Overlap {
                                block: block.name,
                                register: reg.name,
                                offset: start,
                            });
                        }
                        *place = number;
                    }
                    slots.push(Slot {
                        at: RegisterAt {
                            block: block.base,
                            instance,
                            reg,
                        },
                        start,
                    });
                }
            }
        }
        Ok(RegisterMap {
            words,
            slots: slots.into_boxed_slice(),
        })
    }

    /// The register that covers byte `offset`, with its slot number.
    fn find(&self, offset: u64) -> Option<(usize, &Slot)> {
        let word = usize::try_from(offset / 4).ok()?;
        let number = usize::from(*self.words.get(word)?);
        self.slots.get(number).map(|slot| (number, slot))
    }
}

/// What a device does with its registers.
pub trait RegisterDevice {
    /// Value that a read of `at` shows; `stored` is what the file holds. Has no side effects.
    fn read(&self, at: RegisterAt, stored: u64) -> u64;

    /// A write to a register with the `effect` flag. `value` is what the register holds now, `lanes` has ones
    /// in the bytes that the access touched.
    fn written(&self, at: RegisterAt, value: u64, lanes: u64);
}

/// Values of the registers of one BAR.
#[derive(Debug)]
pub struct RegisterFile<'m> {
    map: Cow<'m, RegisterMap>,
    values: Box<[AtomicU64]>,
}

impl RegisterFile<'static> {
    /// A file with a map of its own, every register at its reset value.
    pub fn owning(map: RegisterMap) -> RegisterFile<'static> {
        RegisterFile::of(Cow::Owned(map))
    }
}

impl<'m> RegisterFile<'m> {
    /// A file with every register at its reset value.
    pub fn new(map: &'m RegisterMap) -> RegisterFile<'m> {
        RegisterFile::of(Cow::Borrowed(map))
    }

    fn of(map: Cow<'m, RegisterMap>) -> RegisterFile<'m> {
        let values = map
            .slots
            .iter()
            .map(|slot| AtomicU64::new(slot.at.reg.reset))
            .collect();
        RegisterFile { map, values }
    }

    /// Sets every register to its reset value.
    pub fn reset(&self) {
        for (value, slot) in self.values.iter().zip(&self.map.slots) {
            value.store(slot.at.reg.reset, Ordering::Release);
        }
    }

    /// What every register holds, in the order of the table.
    pub fn values(&self) -> Vec<u64> {
        let values = self.values.iter();
        values.map(|cell| cell.load(Ordering::Acquire)).collect()
    }

    /// The first of `values`, with its number, that [`RegisterFile::values`] cannot have given; `None` if all of
    /// them can be set. Bits that no driver changes are as after reset, except in registers of which `counts` says
    /// that the device changes them.
    pub fn misfit(&self, values: &[u64], counts: impl Fn(RegisterAt) -> bool) -> Option<usize> {
        let slots = &self.map.slots;
        if values.len() != slots.len() {
            return Some(values.len().min(slots.len()));
        }
        let is_bad = |(slot, value): (&Slot, &u64)| {
            let reg = slot.at.reg;
            let free = match counts(slot.at) {
                true => reg.width.mask(),
                false => reg.writable | reg.w1c,
            };
            (value ^ reg.reset) & !free != 0
        };
        slots.iter().zip(values).position(is_bad)
    }

    /// Sets every register to what [`RegisterFile::values`] gave; more or fewer are ignored.
    pub fn set_values(&self, values: &[u64]) {
        for (cell, value) in self.values.iter().zip(values) {
            cell.store(*value, Ordering::Release);
        }
    }

    /// The cell of the register that starts at or covers byte `offset` of the BAR.
    pub fn cell(&self, offset: u32) -> Option<&AtomicU64> {
        let (number, _) = self.map.find(u64::from(offset))?;
        self.values.get(number)
    }

    /// What the register of `block` instance `instance` holds; 0 if the table does not have it.
    pub fn get(&self, block: &Block, instance: u32, reg: &Reg) -> u64 {
        address(block, instance, reg)
            .and_then(|offset| self.cell(offset))
            .map_or(0, |cell| cell.load(Ordering::Acquire))
    }

    /// Sets what the register of `block` instance `instance` holds, past all masks.
    pub fn set(&self, block: &Block, instance: u32, reg: &Reg, value: u64) {
        if let Some(cell) = address(block, instance, reg).and_then(|offset| self.cell(offset)) {
            cell.store(value & reg.width.mask(), Ordering::Release);
        }
    }

    /// Reads `data.len()` bytes from `offset`; bytes that no register has are zero.
    pub fn read(&self, device: &impl RegisterDevice, offset: u64, data: &mut [u8]) {
        // Nearly all accesses are of one whole register.
        if let Some((number, slot)) = self.map.find(offset)
            && slot.start == offset
        {
            if slot.at.reg.width == Width::W4
                && let Ok(word) = <&mut [u8; 4]>::try_from(&mut *data)
            {
                let [a, b, c, d, ..] = self.shown(device, number, slot).to_le_bytes();
                *word = [a, b, c, d];
                return;
            }
            if slot.at.reg.width == Width::W8
                && let Ok(words) = <&mut [u8; 8]>::try_from(&mut *data)
            {
                *words = self.shown(device, number, slot).to_le_bytes();
                return;
            }
        }
        data.fill(0);
        let mut done = 0;
        while let Some(position) = self.inside(offset, done) {
            let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) else {
                return;
            };
            let Some((number, slot)) = self.map.find(position) else {
                done += to_next_word(position);
                continue;
            };
            let first = first_byte(slot, position);
            let bytes = self.shown(device, number, slot).to_le_bytes();
            let source = bytes.get(first..width(slot.at.reg)).unwrap_or(&[]);
            for (to, from) in rest.iter_mut().zip(source) {
                *to = *from;
            }
            done += source.len();
        }
    }

    /// Value that a read of a register shows.
    fn shown(&self, device: &impl RegisterDevice, number: usize, slot: &Slot) -> u64 {
        if slot.at.reg.hidden {
            return 0;
        }
        let stored = self.values.get(number);
        device.read(
            slot.at,
            stored.map_or(0, |cell| cell.load(Ordering::Acquire)),
        )
    }

    /// Writes `data` at `offset`; bytes that no register has are dropped.
    pub fn write(&self, device: &impl RegisterDevice, offset: u64, data: &[u8]) {
        // As for reads.
        if let Some((number, slot)) = self.map.find(offset)
            && slot.start == offset
        {
            let mask = slot.at.reg.width.mask();
            let value = match (slot.at.reg.width, data) {
                (Width::W4, &[a, b, c, d]) => Some(u32::from_le_bytes([a, b, c, d]).into()),
                (Width::W8, data) => data.try_into().ok().map(u64::from_le_bytes),
                _ => None,
            };
            if let Some(value) = value {
                return self.write_register(device, number, slot.at, value, mask);
            }
        }
        let mut done = 0;
        while let Some(position) = self.inside(offset, done) {
            let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) else {
                return;
            };
            let Some((number, slot)) = self.map.find(position) else {
                done += to_next_word(position);
                continue;
            };
            let first = first_byte(slot, position);
            let count = width(slot.at.reg).saturating_sub(first);
            let (mut value, mut lanes) = ([0u8; 8], [0u8; 8]);
            let places = value.iter_mut().zip(&mut lanes).skip(first);
            for ((to, lane), from) in places.zip(rest.iter().take(count)) {
                *to = *from;
                *lane = 0xff;
            }
            let (value, lanes) = (u64::from_le_bytes(value), u64::from_le_bytes(lanes));
            self.write_register(device, number, slot.at, value, lanes);
            done += count;
        }
    }

    /// The position `done` bytes after `offset`, if it is inside the BAR.
    fn inside(&self, offset: u64, done: usize) -> Option<u64> {
        let position = offset.checked_add(u64::try_from(done).ok()?)?;
        let word = usize::try_from(position / 4).ok()?;
        (word < self.map.words.len()).then_some(position)
    }

    /// Writes the bytes of one register that `lanes` selects.
    fn write_register(
        &self,
        device: &impl RegisterDevice,
        number: usize,
        at: RegisterAt,
        value: u64,
        lanes: u64,
    ) {
        let Some(cell) = self.values.get(number) else {
            return;
        };
        let replaced = at.reg.writable & lanes;
        let cleared = at.reg.w1c & lanes & value;
        if replaced | cleared | u64::from(at.reg.effect) == 0 {
            return;
        }
        let merge = |old: u64| (old & !replaced & !cleared) | (value & replaced);
        let mut old = cell.load(Ordering::Acquire);
        // An interrupt may set a status bit at the same moment: neither change may be lost.
        while let Err(seen) =
            cell.compare_exchange_weak(old, merge(old), Ordering::AcqRel, Ordering::Acquire)
        {
            old = seen;
        }
        if at.reg.effect {
            device.written(at, merge(old), lanes);
        }
    }
}

/// Offset of a register in its BAR, `None` if it overflows.
pub fn address(block: &Block, instance: u32, reg: &Reg) -> Option<u32> {
    let instance = block.stride.checked_mul(instance)?;
    block.base.checked_add(instance)?.checked_add(reg.offset)
}

/// Bytes from `position` to the next 4-byte boundary, 1 to 4.
fn to_next_word(position: u64) -> usize {
    match position % 4 {
        0 => 4,
        1 => 3,
        2 => 2,
        _ => 1,
    }
}

/// Bytes of a register.
fn width(reg: &Reg) -> usize {
    match reg.width {
        Width::W4 => 4,
        Width::W8 => 8,
    }
}

/// Which byte of the register of `slot` the BAR's byte `position`, which it covers, is.
fn first_byte(slot: &Slot, position: u64) -> usize {
    usize::try_from(position.saturating_sub(slot.start)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use numagpu_spec::table::Width::{W4, W8};
    use proptest::prelude::*;

    use super::*;

    const CONST: Reg = Reg::ro("CONST", 0x00, W4, "").reset(0x4433_2211);
    const WIDE: Reg = Reg::rw("WIDE", 0x08, W8, "").reset(0x8877_6655_4433_2211);
    const EFFECT: Reg = Reg::rw("EFFECT", 0x10, W4, "")
        .writable(0xff00_00ff)
        .effect();
    const FLAGS: Reg = Reg::ro("FLAGS", 0x14, W4, "")
        .reset(0xffff_ffff)
        .w1c(0x0000_ffff);
    const SECRET: Reg = Reg::rw("SECRET", 0x18, W8, "").hidden().effect();
    const BLOCKS: &[Block] = &[Block {
        name: "TEST",
        base: 0x20,
        stride: 0x20,
        count: 2,
        regs: &[CONST, WIDE, EFFECT, FLAGS, SECRET],
        doc: "",
    }];
    const SIZE: u64 = 0x80;

    #[derive(Default)]
    struct Device {
        written: Mutex<Vec<(u32, &'static str, u64, u64)>>,
    }

    impl RegisterDevice for Device {
        fn read(&self, _at: RegisterAt, stored: u64) -> u64 {
            stored
        }

        fn written(&self, at: RegisterAt, value: u64, lanes: u64) {
            let mut written = self.written.lock().unwrap();
            written.push((at.instance, at.reg.name, value, lanes));
        }
    }

    /// What 0x80 bytes of the BAR show after reset.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 0x80];
        for base in [0x20, 0x40] {
            image[base..base + 4].copy_from_slice(&[0x11, 0x22, 0x33, 0x44]);
            image[base + 8..base + 16]
                .copy_from_slice(&[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
            image[base + 0x14..base + 0x18].fill(0xff);
        }
        image
    }

    #[test]
    fn every_width_at_every_offset_reads_the_same_bytes() {
        let map = RegisterMap::new(BLOCKS, SIZE).unwrap();
        let file = RegisterFile::new(&map);
        let mut expected = image();
        expected.extend([0; 0x40]);
        for width in [1, 2, 3, 4, 5, 7, 8, 12, 16, 64] {
            for offset in 0..0x80 {
                let mut data = vec![0xee; width];
                file.read(&Device::default(), offset as u64, &mut data);
                assert_eq!(
                    data,
                    expected[offset..offset + width],
                    "{width} at {offset:#x}"
                );
            }
        }
    }

    #[test]
    fn the_end_of_the_address_space_is_harmless() {
        let map = RegisterMap::new(BLOCKS, SIZE).unwrap();
        let file = RegisterFile::new(&map);
        for offset in [SIZE - 1, SIZE, u64::MAX - 3, u64::MAX] {
            let mut data = [0xee; 16];
            file.read(&Device::default(), offset, &mut data);
            assert_eq!(data, [0; 16]);
            file.write(&Device::default(), offset, &data);
        }
    }

    #[test]
    fn a_half_merges_with_what_is_stored() {
        let map = RegisterMap::new(BLOCKS, SIZE).unwrap();
        let file = RegisterFile::new(&map);
        file.write(&Device::default(), 0x2c, &[1, 2, 3, 4]);
        assert_eq!(file.get(&BLOCKS[0], 0, &WIDE), 0x0403_0201_4433_2211);
        file.write(&Device::default(), 0x29, &[0xaa]);
        assert_eq!(file.get(&BLOCKS[0], 0, &WIDE), 0x0403_0201_4433_aa11);
        assert_eq!(file.get(&BLOCKS[0], 1, &WIDE), WIDE.reset);
    }

    #[test]
    fn a_straddling_write_meets_each_register_once() {
        let map = RegisterMap::new(BLOCKS, SIZE).unwrap();
        let file = RegisterFile::new(&map);
        let device = Device::default();
        // The last two bytes of WIDE, all of EFFECT and FLAGS, the first byte of SECRET.
        file.write(
            &device,
            0x4e,
            &[1, 2, 0x10, 0x20, 0x30, 0x40, 0xf0, 0xff, 0xff, 0xff, 9],
        );
        assert_eq!(file.get(&BLOCKS[0], 1, &WIDE), 0x0201_6655_4433_2211);
        assert_eq!(file.get(&BLOCKS[0], 1, &FLAGS), 0xffff_000f);
        assert_eq!(
            *device.written.lock().unwrap(),
            [
                (1, "EFFECT", 0x4000_0010, 0xffff_ffff),
                (1, "SECRET", 9, 0xff)
            ]
        );
    }

    #[test]
    fn hidden_registers_hold_and_read_zero() {
        let map = RegisterMap::new(BLOCKS, SIZE).unwrap();
        let file = RegisterFile::new(&map);
        file.write(&Device::default(), 0x38, &[0xff; 8]);
        assert_eq!(file.get(&BLOCKS[0], 0, &SECRET), u64::MAX);
        let mut data = [0xee; 8];
        file.read(&Device::default(), 0x38, &mut data);
        assert_eq!(data, [0; 8]);
        file.reset();
        assert_eq!(file.get(&BLOCKS[0], 0, &SECRET), 0);
    }

    #[test]
    fn malformed_tables_are_refused() {
        const FAR: &[Reg] = &[Reg::ro("FAR", 0x1000, W4, "")];
        const CLASH: &[Reg] = &[Reg::ro("A", 0, W8, ""), Reg::ro("B", 4, W4, "")];
        const ODD: &[Reg] = &[Reg::ro("ODD", 4, W8, "")];
        let build = |regs| RegisterMap::new(&[Block { regs, ..BLOCKS[0] }], SIZE).unwrap_err();
        assert!(matches!(
            build(FAR),
            TableError::Outside { offset: 0x1020, .. }
        ));
        assert!(matches!(build(CLASH), TableError::Overlap { .. }));
        assert!(matches!(build(ODD), TableError::Overlap { .. }));
    }

    proptest! {
        /// A write in pieces leaves the same as a write in one, where no register acts.
        #[test]
        fn pieces_write_the_same(offset in 0u64..0x90, data in prop::collection::vec(any::<u8>(), 1..40), cut in 0usize..40) {
            let map = RegisterMap::new(BLOCKS, SIZE).unwrap();
            let (whole, parts) = (RegisterFile::new(&map), RegisterFile::new(&map));
            whole.write(&Device::default(), offset, &data);
            let cut = cut.min(data.len());
            parts.write(&Device::default(), offset, &data[..cut]);
            parts.write(&Device::default(), offset + cut as u64, &data[cut..]);
            let show = |file: &RegisterFile<'_>| file.values.iter().map(|v| v.load(Ordering::Relaxed)).collect::<Vec<_>>();
            prop_assert_eq!(show(&whole), show(&parts));
        }
    }
}
