//! A function on a PCI bus of this process: what a VMM with a bus of its own calls.

use std::sync::Arc;

use numagpu_devices::bus::{Attachment, DmaPort, FunctionLayout, PciFunction, ResetKind};

use super::msi::{MessageLine, MsiError};
use super::msix::{Msix, MsixCapability};

const COMMAND: u32 = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const BAR0: u32 = 0x10;
const CAPABILITIES: u32 = 0x34;
const EXTENDED: u32 = 0x100;
/// Capability ids.
const PCI_EXPRESS: u8 = 0x10;
const RESIZABLE_BAR: u16 = 0x15;
/// Upper byte of device control in the PCI Express capability, and its bit that resets the function.
const DEVICE_CONTROL: u32 = 0x09;
const INITIATE_FLR: u8 = 1 << 7;
/// Capabilities that fit into configuration space; a list with more goes in circles.
const MOST: usize = 48;

/// A BAR that is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Its number.
    pub bar: u8,
    /// First bus address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

impl Decoded {
    /// Last bus address.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.base.saturating_add(self.size.saturating_sub(1))
    }
}

/// A function that is plugged into a VMM's own PCI bus: configuration space and BARs go to the function, but for the
/// MSI-X table, its pending bits and its masks, which are kept here.
///
/// It is detached from the function, and the function as after power-on, when this is dropped.
pub struct Endpoint {
    function: Arc<dyn PciFunction>,
    msix: Option<(MsixCapability, Arc<Msix>)>,
    /// Offset of the PCI Express capability.
    express: Option<u32>,
    /// BAR and control register of the resizable BAR.
    resizable: Option<(u8, u32)>,
}

impl Endpoint {
    /// Plugs `function` in: it reaches guest memory by `dma`, and its vectors are sent by lines that `line` makes.
    ///
    /// # Errors
    /// What `line` says; the function is not attached then.
    pub fn new<L: MessageLine + 'static>(
        function: Arc<dyn PciFunction>,
        dma: Arc<dyn DmaPort>,
        mut line: impl FnMut() -> Result<L, MsiError>,
    ) -> Result<Endpoint, MsiError> {
        let read = |offset, data: &mut [u8]| function.config_read(offset, data);
        let capability = capability(&read, super::msix::CAPABILITY)
            .and_then(|offset| MsixCapability::read(offset, read));
        let count = capability.map_or(0, |it| it.vectors.min(function.layout().msix_vectors));
        let lines = (0..count).map(|_| line().map(|it| Box::new(it) as Box<dyn MessageLine>));
        let msix = Arc::new(Msix::new(lines.collect::<Result<_, _>>()?));
        let endpoint = Endpoint {
            express: self::capability(&read, PCI_EXPRESS),
            resizable: extended(&read, RESIZABLE_BAR).map(|offset| {
                let control = offset.saturating_add(8);
                (byte(&read, control) & 7, control)
            }),
            msix: capability.map(|capability| (capability, Arc::clone(&msix))),
            function,
        };
        endpoint.function.attach(Attachment { dma, irq: msix });
        Ok(endpoint)
    }

    /// The function.
    #[must_use]
    pub fn function(&self) -> &Arc<dyn PciFunction> {
        &self.function
    }

    /// BARs, configuration space size, interrupts.
    #[must_use]
    pub fn layout(&self) -> &FunctionLayout {
        self.function.layout()
    }

    /// Reads configuration space.
    pub fn config_read(&self, offset: u32, data: &mut [u8]) {
        self.function.config_read(offset, data);
    }

    /// Writes configuration space. [`Endpoint::decoded`] may give something else afterwards.
    pub fn config_write(&self, offset: u32, data: &[u8]) {
        self.function.config_write(offset, data);
        let written = |at: u32| data.get(at.checked_sub(offset)? as usize);
        let control = self
            .express
            .and_then(|at| written(at.saturating_add(DEVICE_CONTROL)));
        if control.is_some_and(|byte| byte & INITIATE_FLR != 0) {
            self.reset_msix();
        }
        if let Some((capability, msix)) = &self.msix {
            // As the function has it now, whatever was written.
            msix.set_control(self.byte(capability.control()));
        }
    }

    /// Reads a BAR.
    pub fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match self.msix_part(bar, offset) {
            Some((msix, Part::Table(at))) => msix.read_table(at, data),
            Some((msix, Part::Pending(at))) => msix.read_pending(at, data),
            None => self.function.bar_read(bar, offset, data),
        }
    }

    /// Writes a BAR.
    pub fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match self.msix_part(bar, offset) {
            Some((msix, Part::Table(at))) => msix.write_table(at, data),
            Some((_, Part::Pending(_))) => {}
            None => self.function.bar_write(bar, offset, data),
        }
    }

    /// Resets the function, as the bus or the machine is reset.
    pub fn reset(&self, kind: ResetKind) {
        self.function.reset(kind);
        self.reset_msix();
    }

    /// The BARs that memory accesses reach now: none while memory decoding is off, or after surprise removal.
    #[must_use]
    pub fn decoded(&self) -> Vec<Decoded> {
        let mut ids = [0; 4];
        self.config_read(0, &mut ids);
        if ids == [0xff; 4] || self.byte(COMMAND) & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let bars = self.layout().bars.iter();
        let decoded = bars.filter_map(|bar| {
            let size = self.size(bar.index).unwrap_or(bar.size);
            let mut address = [0; 8];
            let bytes = if bar.is_64bit { 8 } else { 4 };
            let register = BAR0.saturating_add(u32::from(bar.index) * 4);
            self.config_read(register, address.get_mut(..bytes)?);
            let base = u64::from_le_bytes(address) & !0xf;
            // A BAR at 0 was not placed, and one past the end cannot be.
            let fits = base != 0 && base.checked_add(size).is_some();
            fits.then_some(Decoded {
                bar: bar.index,
                base,
                size,
            })
        });
        decoded.collect()
    }

    /// Bytes that the resizable BAR has now, if `bar` is it.
    fn size(&self, bar: u8) -> Option<u64> {
        let (_, control) = self.resizable.filter(|(it, _)| *it == bar)?;
        let log = self.byte(control.saturating_add(1)) & 0x3f;
        1_u64.checked_shl(u32::from(log).saturating_add(20))
    }

    fn byte(&self, offset: u32) -> u8 {
        byte(&|offset, data| self.config_read(offset, data), offset)
    }

    fn reset_msix(&self) {
        if let Some((_, msix)) = &self.msix {
            msix.reset();
        }
    }

    /// The part of MSI-X that is at an offset of a BAR.
    fn msix_part(&self, bar: u8, offset: u64) -> Option<(&Msix, Part)> {
        let (capability, msix) = self.msix.as_ref()?;
        let vectors = u64::from(capability.vectors);
        let within = |(place, start): (u8, u64), len: u64| {
            let at = offset.checked_sub(start)?;
            (place == bar && at < len).then_some(at)
        };
        let table = within(capability.table, vectors * 16).map(Part::Table);
        let pending = || within(capability.pending, vectors.div_ceil(64) * 8).map(Part::Pending);
        table.or_else(pending).map(|part| (&**msix, part))
    }
}

/// A part of MSI-X, and an offset in it.
enum Part {
    Table(u64),
    Pending(u64),
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.function.detach();
    }
}

fn byte(read: &impl Fn(u32, &mut [u8]), offset: u32) -> u8 {
    let mut byte = [0];
    read(offset, &mut byte);
    let [byte] = byte;
    byte
}

/// Offset of a capability.
fn capability(read: &impl Fn(u32, &mut [u8]), id: u8) -> Option<u32> {
    let mut at = byte(read, CAPABILITIES) & !3;
    for _ in 0..MOST {
        if at < 0x40 {
            return None;
        }
        if byte(read, at.into()) == id {
            return Some(at.into());
        }
        at = byte(read, u32::from(at) + 1) & !3;
    }
    None
}

/// Offset of an extended capability.
fn extended(read: &impl Fn(u32, &mut [u8]), id: u16) -> Option<u32> {
    let mut at = EXTENDED;
    for _ in 0..MOST {
        let mut header = [0; 4];
        read(at, &mut header);
        let header = u32::from_le_bytes(header);
        if header == 0 || header == u32::MAX {
            return None;
        }
        if header & 0xffff == u32::from(id) {
            return Some(at);
        }
        at = (header >> 20) & !3;
        if at < EXTENDED {
            return None;
        }
    }
    None
}
