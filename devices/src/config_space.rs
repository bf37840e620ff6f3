//! PCI configuration space: a checked table of fields with writable masks.
//!
//! | offset | what |
//! |---|---|
//! | 0x00 | type 0 header |
//! | 0x40 | MSI-X capability, first in the list: clients walk the list at each access until they find it |
//! | 0x50 | PCI Express capability version 2, with function-level reset |
//! | 0x90 | power management capability, D0 and D3hot, state kept over D3hot |
//! | 0x100 | advanced error reporting, version 2 |
//! | 0x148 | resizable BAR, if the function has one |
//! | 0x158 | address translation services, if the function has them |
//!
//! What is there beside header, PCI Express, power management and error reporting, [`Capabilities`] says.
//!
//! Sources: PCI Local Bus 3.0 chapter 6, PCI Express Base 6.0 sections 7.5, 7.8.4, 7.8.6 and 10.5.1, PCI Power
//! Management 1.2.

mod state;

use numagpu_spec::pci;

use crate::bus::{Bar, ResetKind};
use crate::config::PciIds;

/// Bytes of configuration space.
pub const CONFIG_SIZE: usize = 4096;
/// Offset of the MSI-X capability.
pub const CAP_MSIX: u16 = 0x40;
/// Offset of the PCI Express capability.
pub const CAP_PCIE: u16 = 0x50;
/// Offset of the power management capability.
pub const CAP_PM: u16 = 0x90;
/// Offset of the advanced error reporting capability.
pub const CAP_AER: u16 = 0x100;
/// Offset of the resizable BAR capability.
pub const CAP_REBAR: u16 = 0x148;
/// Offset of the address translation services capability.
pub const CAP_ATS: u16 = 0x158;

const COMMAND: u16 = 0x04;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Memory space, bus master, parity error response, SERR# enable, INTx disable.
const COMMAND_WRITABLE: u32 = 0x0546;
const STATUS: u16 = 0x06;
const STATUS_CAP_LIST: u32 = 1 << 4;
/// An error message was sent while SERR# enable was on.
const STATUS_SIGNALED: u16 = 1 << 14;
const BAR0: u16 = 0x10;
const BAR_64BIT: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
const DEVICE_CONTROL: u16 = CAP_PCIE + 0x08;
const DEVICE_STATUS: u16 = CAP_PCIE + 0x0a;
/// Bit 15 of device control, in its upper byte.
const INITIATE_FLR: u8 = 1 << 7;
const PM_CONTROL: u16 = CAP_PM + 0x04;
const PM_STATE: u8 = 0b11;
const PM_D0: u8 = 0b00;
const PM_D3HOT: u8 = 0b11;

const AER_UNCORRECTABLE: u16 = CAP_AER + 0x04;
const AER_UNCORRECTABLE_MASK: u16 = CAP_AER + 0x08;
const AER_SEVERITY: u16 = CAP_AER + 0x0c;
const AER_CORRECTABLE: u16 = CAP_AER + 0x10;
const AER_CORRECTABLE_MASK: u16 = CAP_AER + 0x14;
const AER_CONTROL: u16 = CAP_AER + 0x18;
/// Behind the header log.
const AER_END: u16 = CAP_AER + 0x2c;
/// Uncorrectable errors that an endpoint can have: data link protocol to uncorrectable internal, as section 7.8.4.2
/// numbers them.
const UNCORRECTABLE: u32 = 0x007f_f030;
/// Those that are fatal after reset.
const FATAL: u32 = 0x0046_2030;
/// Bit of the uncorrectable internal error, which is masked after reset.
const UNCORRECTABLE_INTERNAL: u32 = 22;
/// Correctable errors, receiver to header log overflow.
const CORRECTABLE: u32 = 0x0000_f1c1;
/// Those that are masked after reset.
const CORRECTABLE_MASKED: u32 = 0x0000_e000;
/// Bit of the corrected internal error.
const CORRECTED_INTERNAL: u32 = 14;

const REBAR_CONTROL: u16 = CAP_REBAR + 0x08;
/// log2 of the smallest size that the capability can name.
const REBAR_LEAST: u32 = 20;
const ATS_CONTROL: u16 = CAP_ATS + 0x06;
const ATS_ENABLE: u16 = 1 << 15;
const ATS_STU: u16 = 0x1f;

/// A field: offset, bytes, value after reset, bits that a write replaces, bits that writing ones clears.
#[derive(Clone, Copy, Debug)]
struct Field {
    offset: u16,
    bytes: u8,
    reset: u32,
    writable: u32,
    w1c: u32,
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
        w1c: 0,
    }
}

const fn w1c(offset: u16, bytes: u8, w1c: u32) -> Field {
    Field {
        w1c,
        ..ro(offset, bytes, 0)
    }
}

/// First word of an extended capability, without the next one's offset.
const fn extended(id: u16, version: u8) -> u32 {
    (version as u32) << 16 | id as u32
}

/// Fields that are the same in every function, ascending.
const FIELDS: &[Field] = &[
    rw(COMMAND, 2, 0, COMMAND_WRITABLE),
    Field {
        reset: STATUS_CAP_LIST,
        ..w1c(STATUS, 2, STATUS_SIGNALED as u32)
    },
    rw(0x0c, 1, 0, 0xff),         // cache line size: no effect, but writable
    ro(0x34, 1, CAP_PCIE as u32), // first capability
    rw(0x3c, 1, 0, 0xff),         // interrupt line: for software
    ro(0x3d, 1, 0),               // interrupt pin: no INTx
    // PCI Express: endpoint, version 2.
    ro(CAP_PCIE, 2, 0x10 | (CAP_PM as u32) << 8),
    ro(CAP_PCIE + 0x02, 2, 0x0002),
    ro(CAP_PCIE + 0x04, 4, 1 << 28 | 1 << 15), // FLR, role-based error reporting
    rw(DEVICE_CONTROL, 2, 0x2810, 0x78ff),
    w1c(DEVICE_STATUS, 2, 0x000f),
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
    // Advanced error reporting. No ECRC; the header log stays zero, since the errors reported are of no packet.
    ro(CAP_AER, 4, extended(0x0001, 2)),
    w1c(AER_UNCORRECTABLE, 4, UNCORRECTABLE),
    rw(
        AER_UNCORRECTABLE_MASK,
        4,
        1 << UNCORRECTABLE_INTERNAL,
        UNCORRECTABLE,
    ),
    rw(AER_SEVERITY, 4, FATAL, UNCORRECTABLE),
    w1c(AER_CORRECTABLE, 4, CORRECTABLE),
    rw(AER_CORRECTABLE_MASK, 4, CORRECTABLE_MASKED, CORRECTABLE),
    ro(AER_CONTROL, 4, 0),
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
        assert!(field.writable & field.w1c == 0, "written or cleared");
        if field.bytes < 4 {
            let outside = !((1 << (8 * field.bytes as u32)) - 1);
            assert!((field.reset | field.writable | field.w1c) & outside == 0);
        }
        end = field.offset + field.bytes as u16;
        i += 1;
    }
};

/// Where the MSI-X table and its pending bits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// BAR that has both.
    pub bar: u8,
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// Offset of the table in the BAR, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bits, a multiple of 8.
    pub pending: u32,
}

impl MsixPlace {
    /// That of a GPU.
    pub const GPU: MsixPlace = MsixPlace {
        bar: pci::BAR_MSIX,
        vectors: pci::VECTOR_COUNT,
        table: pci::MSIX_TABLE_OFFSET,
        pending: pci::MSIX_PBA_OFFSET,
    };
}

/// A BAR whose size software may choose (PCIe Base 6.0 section 7.8.6): any power of two from `least` to the BAR's full
/// size, with which it starts. A transport still sees the full size: what is not decoded is not accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizableBar {
    /// Number of a 64-bit BAR that the function has.
    pub bar: u8,
    /// Smallest size in bytes, a power of two of at least 1 MiB.
    pub least: u64,
}

/// What a function has beside what every one has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// MSI-X.
    pub msix: Option<MsixPlace>,
    /// A BAR of variable size.
    pub resizable: Option<ResizableBar>,
    /// Address translation services: software can turn them on, which the device model then asks for by
    /// [`ConfigSpace::translation`].
    pub ats: bool,
}

/// An error that a function reports of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InternalError {
    /// Data or state is lost.
    Uncorrectable,
    /// It was put right.
    Corrected,
}

/// The message that a function sends to the root complex for an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorMessage {
    /// `ERR_COR`.
    Correctable,
    /// `ERR_NONFATAL`.
    NonFatal,
    /// `ERR_FATAL`.
    Fatal,
}

impl ErrorMessage {
    /// Bit in device control and device status.
    const fn bit(self) -> u16 {
        match self {
            ErrorMessage::Correctable => 1,
            ErrorMessage::NonFatal => 2,
            ErrorMessage::Fatal => 4,
        }
    }
}

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
    w1c: Box<[u8; CONFIG_SIZE]>,
    resizable: Option<Resizable>,
    // Volatile state.
    writable: Box<[u8; CONFIG_SIZE]>,
    values: Box<[u8; CONFIG_SIZE]>,
}

/// A resizable BAR: offset of its register, its kind bits, and the log2 of its smallest and its full size.
#[derive(Clone, Copy, Debug)]
struct Resizable {
    offset: u16,
    kind: u32,
    least: u32,
    full: u32,
}

impl ConfigSpace {
    /// Configuration space after power-on.
    pub fn new(ids: &PciIds, bars: &[Bar], capabilities: &Capabilities) -> ConfigSpace {
        let mut space = ConfigSpace {
            reset: Box::new([0; CONFIG_SIZE]),
            writable: Box::new([0; CONFIG_SIZE]),
            w1c: Box::new([0; CONFIG_SIZE]),
            resizable: None,
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
            space.define_bar(offset, kind(bar), bar.is_64bit, bar.size);
        }
        if let Some(msix) = &capabilities.msix {
            space.define_msix(msix);
        }
        let mut last = CAP_AER;
        let resizable = capabilities.resizable.and_then(|it| {
            let bar = bars
                .iter()
                .find(|bar| bar.index == it.bar && bar.is_64bit)?;
            Some((bar, it.least))
        });
        if let Some((bar, least)) = resizable {
            space.define_resizable(bar, least);
            space.link(last, CAP_REBAR);
            last = CAP_REBAR;
        }
        if capabilities.ats {
            space.define(&ro(CAP_ATS, 4, extended(0x000f, 1)));
            // 32 invalidations at a time, untranslated addresses aligned to pages.
            space.define(&ro(CAP_ATS + 0x04, 2, 1 << 5));
            let writable = ATS_ENABLE | ATS_STU;
            space.define(&rw(ATS_CONTROL, 2, 0, writable.into()));
            space.link(last, CAP_ATS);
        }
        space.values.copy_from_slice(space.reset.as_slice());
        space
    }

    fn define_msix(&mut self, place: &MsixPlace) {
        let at = |offset: u32| (offset & !7) | u32::from(place.bar & 7);
        self.define(&ro(0x34, 1, CAP_MSIX.into()));
        self.define(&ro(CAP_MSIX, 2, 0x11 | u32::from(CAP_PCIE) << 8));
        // Message control has function mask and enable.
        let last = u32::from(place.vectors.saturating_sub(1)) & 0x7ff;
        self.define(&rw(CAP_MSIX + 0x02, 2, last, 0xc000));
        self.define(&ro(CAP_MSIX + 0x04, 4, at(place.table)));
        self.define(&ro(CAP_MSIX + 0x08, 4, at(place.pending)));
    }

    fn define_resizable(&mut self, bar: &Bar, least: u64) {
        let (full, least) = (log2(bar.size), log2(least).max(REBAR_LEAST));
        let sizes =
            (least..=full).filter_map(|log| 1_u64.checked_shl(log.saturating_sub(REBAR_LEAST)));
        let sizes = sizes.fold(0, |all, bit| all | bit);
        self.define(&ro(CAP_REBAR, 4, extended(0x0015, 1)));
        self.define(&ro(CAP_REBAR + 0x04, 4, low(sizes) << 4));
        let size = full.saturating_sub(REBAR_LEAST);
        let control = u32::from(bar.index) | 1 << 5 | size << 8;
        // Bits 31:16 have the sizes above 128 TiB.
        let control = control | (low(sizes >> 28) & 0xffff) << 16;
        self.define(&rw(REBAR_CONTROL, 4, control, 0x3f00));
        self.resizable = Some(Resizable {
            offset: BAR0 + 4 * u16::from(bar.index),
            kind: kind(bar),
            least,
            full,
        });
    }

    /// Only address bits from the size up can be written: what remains zero tells the size.
    fn define_bar(&mut self, offset: u16, kind: u32, is_64bit: bool, size: u64) {
        let mask = !size.saturating_sub(1);
        self.define(&rw(offset, 4, kind, low(mask) & !0xf));
        if is_64bit {
            self.define(&rw(offset + 4, 4, 0, low(mask >> 32)));
        }
    }

    /// Makes the extended capability at `next` follow that at `capability`.
    fn link(&mut self, capability: u16, next: u16) {
        if let Some(place) = self.reset.get_mut(usize::from(capability) + 2..) {
            // The offset is in bits 31:20 of the first word.
            let word = next << 4;
            for (place, byte) in place.iter_mut().zip(word.to_le_bytes()) {
                *place |= byte;
            }
        }
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
        let size_before = self.byte(REBAR_CONTROL + 1);
        let mut effects = ConfigEffects::default();
        let masks = self.writable.iter().zip(self.w1c.iter());
        let places = self.values.iter_mut().zip(masks).enumerate();
        for ((index, (value, (mask, w1c))), new) in places.skip(offset as usize).zip(data) {
            *value = (*value & !mask & !(new & w1c)) | (new & mask);
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
        if self.byte(REBAR_CONTROL + 1) != size_before {
            self.resize(size_before);
        }
        effects
    }

    /// Gives the resizable BAR the size that its control register has now; one that it cannot have is taken back.
    fn resize(&mut self, before: u8) {
        let Some(bar) = self.resizable else {
            return;
        };
        let log = u32::from(self.byte(REBAR_CONTROL + 1)).saturating_add(REBAR_LEAST);
        if !(bar.least..=bar.full).contains(&log) {
            self.put(REBAR_CONTROL + 1, &[before]);
            return;
        }
        // Address bits that are below the size now read as zero.
        let value = u64::from(self.word(bar.offset)) | u64::from(self.word(bar.offset + 4)) << 32;
        let size = 1_u64.checked_shl(log).unwrap_or(0);
        self.define_bar(bar.offset, bar.kind, true, size);
        let value = (value & !size.saturating_sub(1)) | u64::from(bar.kind);
        self.put(bar.offset, &value.to_le_bytes());
    }

    /// Whether the function may do DMA: bus master on, and not in D3hot.
    pub fn dma_allowed(&self) -> bool {
        self.bus_master() && self.byte(PM_CONTROL) & PM_STATE == PM_D0
    }

    /// Whether the bus master bit is set.
    pub fn bus_master(&self) -> bool {
        self.byte(COMMAND) & COMMAND_BUS_MASTER != 0
    }

    /// Bytes that the resizable BAR decodes now; none if there is none.
    pub fn resizable_size(&self) -> Option<u64> {
        self.resizable?;
        let log = u32::from(self.byte(REBAR_CONTROL + 1) & 0x3f).saturating_add(REBAR_LEAST);
        1_u64.checked_shl(log)
    }

    /// Smallest translation unit in bytes, where software has turned address translation services on.
    pub fn translation(&self) -> Option<u64> {
        let control = half(self.word(ATS_CONTROL - 2) >> 16);
        let unit = 4096_u64.checked_shl(u32::from(control & ATS_STU));
        unit.filter(|_| control & ATS_ENABLE != 0)
    }

    /// Notes an error in the advanced error reporting capability and in device status. Gives the message that the
    /// function sends for it, none if software has masked the error or turned messages off.
    pub fn report(&mut self, error: InternalError) -> Option<ErrorMessage> {
        let (status, mask, bit) = match error {
            InternalError::Uncorrectable => (
                AER_UNCORRECTABLE,
                AER_UNCORRECTABLE_MASK,
                UNCORRECTABLE_INTERNAL,
            ),
            InternalError::Corrected => (AER_CORRECTABLE, AER_CORRECTABLE_MASK, CORRECTED_INTERNAL),
        };
        let is_fatal = self.word(AER_SEVERITY) & 1 << bit != 0;
        let message = match error {
            InternalError::Corrected => ErrorMessage::Correctable,
            InternalError::Uncorrectable if is_fatal => ErrorMessage::Fatal,
            InternalError::Uncorrectable => ErrorMessage::NonFatal,
        };
        let (before, masked) = (self.word(status), self.word(mask));
        self.put(status, &(before | 1 << bit).to_le_bytes());
        let device = self.word(DEVICE_CONTROL);
        let noted = half(device >> 16) | message.bit();
        self.put(DEVICE_STATUS, &noted.to_le_bytes());
        if masked & 1 << bit != 0 {
            return None;
        }
        if error == InternalError::Uncorrectable && before & !masked == 0 {
            self.put(AER_CONTROL, &bit.to_le_bytes());
        }
        // SERR# enable lets messages of uncorrectable errors out as well as device control does (section 6.2.5).
        let serr = self.word(COMMAND) & 1 << 8 != 0 && message != ErrorMessage::Correctable;
        if serr {
            let status = half(self.word(COMMAND) >> 16) | STATUS_SIGNALED;
            self.put(STATUS, &status.to_le_bytes());
        }
        (serr || half(device) & message.bit() != 0).then_some(message)
    }

    /// Back to power-on. Error reporting survives what is not one (PCIe Base 6.0 section 7.4, "sticky").
    pub fn reset(&mut self, kind: ResetKind) {
        let sticky: Vec<u8> = match kind {
            ResetKind::Function | ResetKind::Hot => {
                let kept = self.values.iter().skip(CAP_AER.into());
                kept.take((AER_END - CAP_AER).into()).copied().collect()
            }
            ResetKind::Disconnect => Vec::new(),
        };
        self.values.copy_from_slice(self.reset.as_slice());
        self.put(CAP_AER, &sticky);
        if let Some(bar) = self.resizable {
            let size = 1_u64.checked_shl(bar.full).unwrap_or(0);
            self.define_bar(bar.offset, bar.kind, true, size);
        }
    }

    fn byte(&self, offset: u16) -> u8 {
        self.values.get(usize::from(offset)).copied().unwrap_or(0)
    }

    fn word(&self, offset: u16) -> u32 {
        let mut word = [0; 4];
        self.read(offset.into(), &mut word);
        u32::from_le_bytes(word)
    }

    /// Sets bytes past all masks.
    fn put(&mut self, offset: u16, bytes: &[u8]) {
        let places = self.values.iter_mut().skip(offset.into());
        for (place, byte) in places.zip(bytes) {
            *place = *byte;
        }
    }

    fn define(&mut self, field: &Field) {
        let bytes = field.reset.to_le_bytes().into_iter();
        let masks = field.writable.to_le_bytes().into_iter();
        let values = bytes.zip(masks).zip(field.w1c.to_le_bytes());
        let masks = self.writable.iter_mut().zip(self.w1c.iter_mut());
        let places = self.reset.iter_mut().zip(masks);
        let places = places.skip(field.offset.into()).take(field.bytes.into());
        for ((reset, (writable, w1c)), ((byte, mask), clear)) in places.zip(values) {
            *reset = byte;
            *writable = mask;
            *w1c = clear;
        }
    }
}

/// Bits 3:0 of a BAR.
fn kind(bar: &Bar) -> u32 {
    let wide = if bar.is_64bit { BAR_64BIT } else { 0 };
    wide | if bar.prefetchable {
        BAR_PREFETCHABLE
    } else {
        0
    }
}

/// Position of the highest bit, 0 for 0.
fn log2(size: u64) -> u32 {
    size.checked_ilog2().unwrap_or(0)
}

/// Low half of a 64-bit mask.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the low half is what is asked for"
)]
const fn low(mask: u64) -> u32 {
    mask as u32
}

/// Low half of a word.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the low half is what is asked for"
)]
const fn half(word: u32) -> u16 {
    word as u16
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

    const MSIX: Capabilities = Capabilities {
        msix: Some(MsixPlace::GPU),
        resizable: None,
        ats: false,
    };

    fn space() -> ConfigSpace {
        ConfigSpace::new(&PciIds::default(), &BARS.map(bar), &MSIX)
    }

    /// With everything that a function can have; BAR 4 has 512 GiB.
    fn full() -> ConfigSpace {
        let capabilities = Capabilities {
            resizable: Some(ResizableBar {
                bar: 4,
                least: 256 << 20,
            }),
            ats: true,
            ..MSIX
        };
        ConfigSpace::new(&PciIds::default(), &BARS.map(bar), &capabilities)
    }

    /// Ids and offsets of the extended capabilities.
    fn extended_list(space: &ConfigSpace) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        let mut at = 0x100;
        while at != 0 {
            assert!(at % 4 == 0 && found.len() < 10);
            let word = read32(space, at);
            found.push((word & 0xffff, at));
            at = word >> 20;
        }
        found
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
            let mut space = ConfigSpace::new(&PciIds::default(), &bars, &MSIX);
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
        space.reset(ResetKind::Function);
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

    #[test]
    fn a_function_without_vectors_has_no_msix() {
        let none = Capabilities::default();
        let space = ConfigSpace::new(&PciIds::default(), &BARS.map(bar), &none);
        assert_eq!(read::<1>(&space, 0x34), [0x50]);
        assert_eq!(read::<16>(&space, 0x40), [0; 16]);
        assert_eq!(extended_list(&space), [(1, 0x100)]);
    }

    #[test]
    fn any_number_of_vectors_is_told() {
        for vectors in [1, 9, 2048] {
            let msix = MsixPlace {
                bar: 5,
                vectors,
                table: 0x1000,
                pending: 0x9000,
            };
            let with = Capabilities {
                msix: Some(msix),
                ..MSIX
            };
            let space = ConfigSpace::new(&PciIds::default(), &[], &with);
            assert_eq!(read32(&space, 0x40) >> 16, u32::from(vectors) - 1);
            assert_eq!(read32(&space, 0x44), 0x1005);
            assert_eq!(read32(&space, 0x48), 0x9005);
        }
    }

    #[test]
    fn extended_capabilities_are_in_one_list() {
        assert_eq!(extended_list(&space()), [(1, 0x100)]);
        assert_eq!(
            extended_list(&full()),
            [(1, 0x100), (0x15, 0x148), (0xf, 0x158)]
        );
        let ats = Capabilities { ats: true, ..MSIX };
        let space = ConfigSpace::new(&PciIds::default(), &[], &ats);
        assert_eq!(extended_list(&space), [(1, 0x100), (0xf, 0x158)]);
    }

    #[test]
    fn an_uncorrectable_error_is_noted_and_told_as_software_wants_it() {
        let mut space = space();
        assert_eq!(space.report(InternalError::Uncorrectable), None, "masked");
        assert_eq!(read32(&space, 0x104), 1 << 22);
        assert_eq!(read32(&space, 0x118), 0, "no first error while masked");
        assert_eq!(read::<2>(&space, 0x5a), [4, 0], "fatal error detected");
        space.write(0x104, &u32::MAX.to_le_bytes());
        space.write(0x5a, &[0xff]);
        assert_eq!((read32(&space, 0x104), read::<1>(&space, 0x5a)), (0, [0]));
        space.write(0x108, &[0; 4]);
        assert_eq!(space.report(InternalError::Uncorrectable), None, "off");
        assert_eq!(read32(&space, 0x118) & 0x1f, 22);
        space.write(0x58, &[0x04]);
        let told = space.report(InternalError::Uncorrectable);
        assert_eq!(told, Some(ErrorMessage::Fatal));
        assert_eq!(read::<2>(&space, 6), [0x10, 0], "SERR# is off");
        space.write(0x10c, &[0; 4]);
        space.write(4, &[0, 1]);
        let told = space.report(InternalError::Uncorrectable);
        assert_eq!(told, Some(ErrorMessage::NonFatal));
        assert_eq!(read::<2>(&space, 6), [0x10, 0x40]);
        space.write(6, &[0, 0x40]);
        assert_eq!(read::<2>(&space, 6), [0x10, 0]);
    }

    #[test]
    fn a_corrected_error_is_noted_and_told_as_software_wants_it() {
        let mut space = space();
        assert_eq!(space.report(InternalError::Corrected), None, "masked");
        assert_eq!(read32(&space, 0x110), 1 << 14);
        space.write(0x114, &[0; 4]);
        space.write(4, &[0, 1]);
        assert_eq!(space.report(InternalError::Corrected), None, "off");
        space.write(0x58, &[0x01]);
        let told = space.report(InternalError::Corrected);
        assert_eq!(told, Some(ErrorMessage::Correctable));
        assert_eq!(read::<1>(&space, 0x5a), [1]);
        assert_eq!(read32(&space, 0x118), 0, "it is no first error");
    }

    #[test]
    fn what_is_known_of_errors_survives_all_but_power_off() {
        let mut space = space();
        space.write(0x108, &[0; 4]);
        space.report(InternalError::Uncorrectable);
        space.reset(ResetKind::Function);
        assert_eq!(read32(&space, 0x104), 1 << 22);
        assert_eq!(read32(&space, 0x108), 0);
        assert_eq!(read32(&space, 0x118), 22);
        space.reset(ResetKind::Disconnect);
        assert_eq!(read32(&space, 0x104), 0);
        assert_eq!(read32(&space, 0x108), 1 << 22);
    }

    #[test]
    fn a_resized_bar_decodes_its_new_size() {
        let mut space = full();
        // 256 MiB to 512 GiB.
        assert_eq!(read32(&space, 0x14c), 0x000f_ff00 << 4);
        assert_eq!(read32(&space, 0x150), 19 << 8 | 1 << 5 | 4);
        let probe = |space: &mut ConfigSpace| {
            space.write(0x20, &[0xff; 8]);
            !(u64::from_le_bytes(read(space, 0x20)) & !0xf) + 1
        };
        assert_eq!(probe(&mut space), 512 << 30);
        for (size, bytes) in [(8, 256 << 20), (12, 4 << 30), (19, 512 << 30)] {
            space.write(0x151, &[size]);
            assert_eq!(space.resizable_size(), Some(bytes));
            assert_eq!(probe(&mut space), bytes);
        }
        for unknown in [0, 7, 20, 63] {
            space.write(0x151, &[unknown]);
            assert_eq!(space.resizable_size(), Some(512 << 30), "{unknown}");
        }
        space.write(0x151, &[8]);
        space.write(0x20, &0x1_1000_0000_u64.to_le_bytes());
        space.write(0x151, &[13]);
        assert_eq!(u64::from_le_bytes(read(&space, 0x20)), 12, "8 GiB");
        space.reset(ResetKind::Function);
        assert_eq!(probe(&mut space), 512 << 30);
    }

    #[test]
    fn translation_is_on_when_software_turns_it_on() {
        let mut space = full();
        assert_eq!(space.translation(), None);
        space.write(0x15e, &[9, 0x80]);
        assert_eq!(space.translation(), Some(2 << 20));
        space.write(0x15e, &[0, 0]);
        assert_eq!(space.translation(), None);
        space.write(0x15e, &[0xff, 0xff]);
        assert_eq!(read::<2>(&space, 0x15e), [0x1f, 0x80]);
    }

    proptest! {
        #[test]
        fn pieces_write_the_same(offset in 0u32..0x160, data in prop::collection::vec(any::<u8>(), 1..40)) {
            let (mut whole, mut bytes) = (full(), full());
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
