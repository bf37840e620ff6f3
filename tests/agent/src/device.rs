//! One GPU as a user-space driver sees it: its BARs through sysfs, its registers, its queues.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use numagpu_spec::regs::{
    self, BootState, Caps, Coherence, OwnerCommand, OwnerResult, OwnerState, QueueFault, QueueState,
};
use numagpu_spec::table::{Reg, Width};
use numagpu_spec::{pci, sdma};
use numagpu_topology::ranges::Range;

use crate::probe::text;
use crate::sys::Mapping;

/// What went wrong, for people.
pub type Outcome<T = ()> = Result<T, String>;

/// The longest that anything may take; emulation is slow, a hang is forever.
const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until `done` gives something.
pub fn wait<T>(what: &str, done: impl FnMut() -> Option<T>) -> Outcome<T> {
    wait_at_most(PATIENCE, what, done)
}

/// Waits until `done` gives something, or so long.
pub fn wait_at_most<T>(
    patience: Duration,
    what: &str,
    mut done: impl FnMut() -> Option<T>,
) -> Outcome<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return Ok(value);
        }
        if start.elapsed() > patience {
            return Err(format!("{what}: nothing after {} s", patience.as_secs()));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The BAR through which the CPU reaches a GPU's HBM.
pub struct Aperture {
    file: File,
    /// Address of the first partition, which is at offset 0.
    first: u64,
}

impl Aperture {
    /// Maps `len` bytes of HBM from `address` on.
    pub fn map(&self, address: u64, len: usize) -> Outcome<Mapping> {
        let offset = address.checked_sub(self.first);
        let offset = offset.ok_or_else(|| format!("{address:#x} is below {:#x}", self.first))?;
        Mapping::file(&self.file, offset, len)
            .map_err(|error| format!("aperture at {offset:#x}: {error}"))
    }
}

/// A PCI function of ours.
pub struct Device {
    /// PCI address without the segment.
    pub bdf: String,
    /// The BAR with its HBM, if it has one.
    pub aperture: Option<Rc<Aperture>>,
    path: PathBuf,
    config: File,
    registers: Mapping,
    doorbells: Mapping,
    msix: Mapping,
}

impl Device {
    /// All functions that have our ids, in order of address: the usual ones, or those that the kernel's command line has
    /// as `numagpu.ids=VENDOR:DEVICE`, in hexadecimal.
    pub fn find(problems: &mut Vec<String>) -> Vec<Device> {
        let (vendor, function) = match ids(&text("/proc/cmdline")) {
            Ok(ids) => ids.unwrap_or((pci::VENDOR_ID, pci::DEVICE_ID)),
            Err(error) => {
                problems.push(error);
                return Vec::new();
            }
        };
        let devices = Path::new("/sys/bus/pci/devices");
        let id = |path: &Path, name: &str| crate::probe::number(&text(path.join(name)));
        let mut found = Vec::new();
        for name in crate::probe::names(devices) {
            let path = devices.join(&name);
            if id(&path, "vendor") != Some(u64::from(vendor))
                || id(&path, "device") != Some(u64::from(function))
            {
                continue;
            }
            match Device::open(&path, &name) {
                Ok(device) => found.push(device),
                Err(error) => problems.push(format!("{name}: {error}")),
            }
        }
        found
    }

    fn open(path: &Path, name: &str) -> io::Result<Device> {
        fs::write(path.join("enable"), "1")?;
        let open = |file: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path.join(file))
        };
        let bar = |index: u8, size: u64| {
            let file = open(&format!("resource{index}"))?;
            Mapping::file(&file, 0, usize::try_from(size).map_err(io::Error::other)?)
        };
        let mut device = Device {
            bdf: name.split_once(':').map_or(name, |(_, bdf)| bdf).to_owned(),
            aperture: None,
            path: path.to_owned(),
            config: open("config")?,
            registers: bar(pci::BAR_REGISTERS, pci::BAR_REGISTERS_SIZE)?,
            doorbells: bar(pci::BAR_DOORBELLS, pci::BAR_DOORBELLS_SIZE)?,
            msix: bar(pci::BAR_MSIX, pci::BAR_MSIX_SIZE)?,
        };
        device.enable()?;
        let caps = device.read(regs::identity::BASE, regs::identity::CAPS);
        if Caps::from_bits_retain(caps).contains(Caps::HBM_APERTURE) {
            device.aperture = Some(Rc::new(Aperture {
                file: open(&format!("resource{}", pci::BAR_APERTURE))?,
                first: device.hbm(0).base,
            }));
        }
        Ok(device)
    }

    /// Turns on memory decoding and bus mastering (PCI Local Bus 3.0, section 6.2.2).
    pub fn enable(&self) -> io::Result<()> {
        let mut command = [0; 2];
        self.config.read_exact_at(&mut command, 4)?;
        let command = u16::from_le_bytes(command) | 0b110;
        self.config.write_all_at(&command.to_le_bytes(), 4)
    }

    /// A sysfs attribute.
    pub fn attribute(&self, name: &str) -> String {
        text(self.path.join(name))
    }

    /// Resets the function (FLR, the first method that the kernel finds).
    pub fn reset(&self) -> io::Result<()> {
        fs::write(self.path.join("reset"), "1")?;
        self.enable()
    }

    /// Reads a register.
    pub fn read(&self, base: u32, reg: Reg) -> u64 {
        let at = (base + reg.offset) as usize;
        match reg.width {
            Width::W4 => u64::from(self.registers.read32(at)),
            Width::W8 => self.registers.read64(at),
        }
    }

    /// Reads a 4-byte register.
    pub fn read32(&self, base: u32, reg: Reg) -> u32 {
        self.registers.read32((base + reg.offset) as usize)
    }

    /// Writes a register.
    pub fn write(&self, base: u32, reg: Reg, value: u64) {
        let at = (base + reg.offset) as usize;
        match reg.width {
            Width::W4 => self
                .registers
                .write32(at, u32::try_from(value & 0xffff_ffff).unwrap_or(0)),
            Width::W8 => self.registers.write64(at, value),
        }
    }

    /// Rings a queue's doorbell.
    pub fn ring(&self, queue: u32, write_pointer: u64) {
        let at = u64::from(queue) * pci::DOORBELL_STRIDE;
        self.doorbells
            .write64(usize::try_from(at).unwrap_or(0), write_pointer);
    }

    /// Boots the device.
    pub fn boot(&self) -> Outcome {
        use regs::{boot, identity};
        let magic = self.read32(identity::BASE, identity::MAGIC);
        if magic != regs::MAGIC {
            return Err(format!("magic {magic:#x} instead of {:#x}", regs::MAGIC));
        }
        let state = || BootState::from_code(self.read32(boot::BASE, boot::STATUS));
        if state() != Some(BootState::Reset) {
            return Err(format!("boot state {:?} before START", state()));
        }
        self.write(boot::BASE, boot::CONTROL, u64::from(regs::BOOT_START));
        wait("boot", || match state() {
            Some(BootState::Ready) => Some(Ok(())),
            Some(BootState::Fault) => Some(Err(format!(
                "boot fault {}",
                self.read32(boot::BASE, boot::FAULT)
            ))),
            _ => None,
        })?
    }

    /// Base of a partition's registers.
    pub fn partition(index: u32) -> u32 {
        regs::partition::BASE + index * regs::partition::STRIDE
    }

    /// HBM of a partition.
    pub fn hbm(&self, index: u32) -> Range {
        let base = Device::partition(index);
        Range {
            base: self.read(base, regs::partition::HBM_BASE),
            size: self.read(base, regs::partition::HBM_SIZE),
        }
    }

    /// Proximity domain and coherence of a partition.
    pub fn placement(&self, index: u32) -> (u32, String) {
        let base = Device::partition(index);
        let code = self.read32(base, regs::partition::COHERENCE);
        let name = Coherence::from_code(code)
            .map_or_else(|| format!("code {code}"), |c| c.name().to_owned());
        (self.read32(base, regs::partition::PXM), name)
    }

    /// Sends an ownership command and gives its result.
    pub fn command(&self, index: u32, command: OwnerCommand, token: u64) -> Outcome<OwnerResult> {
        let base = Device::partition(index);
        self.write(base, regs::partition::TOKEN, token);
        self.write(base, regs::partition::COMMAND, u64::from(command.code()));
        let code = self.read32(base, regs::partition::RESULT);
        OwnerResult::from_code(code).ok_or_else(|| format!("ownership result {code}"))
    }

    /// Sends an ownership command that has to give `expected`.
    pub fn expect(
        &self,
        index: u32,
        command: OwnerCommand,
        token: u64,
        expected: OwnerResult,
    ) -> Outcome {
        let result = self.command(index, command, token)?;
        if result == expected {
            return Ok(());
        }
        Err(format!(
            "{} of partition {index}: {} instead of {}",
            command.name(),
            result.name(),
            expected.name()
        ))
    }

    /// Waits until a partition is free.
    pub fn wait_free(&self, index: u32) -> Outcome {
        let base = Device::partition(index);
        wait("partition to become free", || {
            (self.read32(base, regs::partition::STATE) == OwnerState::Free.code()).then_some(())
        })
    }

    /// Routes an MSI-X vector to a physical address.
    pub fn route_vector(&self, vector: u16, address: u64, data: u32) -> Outcome {
        route_vector(&self.config, &self.msix, vector, address, data)
    }

    /// Masks a vector, or unmasks it.
    pub fn mask_vector(&self, vector: u16, masked: bool) {
        self.msix
            .write32(usize::from(vector) * 16 + 12, u32::from(masked));
    }

    /// A vector's pending bit.
    pub fn is_vector_pending(&self, vector: u16) -> bool {
        let word = pci::MSIX_PBA_OFFSET as usize + usize::from(vector / 32) * 4;
        self.msix.read32(word) >> (vector % 32) & 1 == 1
    }

    /// 4 bytes of configuration space.
    pub fn config_word(&self, at: u64) -> Option<u32> {
        read_config(&self.config, at).map(u32::from_le_bytes)
    }

    /// Vectors of the MSI-X capability.
    pub fn vectors(&self) -> Option<u16> {
        let (_, control) = msix_capability(&self.config)?;
        Some((control & 0x7ff) + 1)
    }

    /// Ids of the capabilities, and of the extended ones (PCI Express 4.0, sections 7.5 and 7.6.3).
    pub fn capabilities(&self) -> (Vec<u16>, Vec<u16>) {
        let plain = plain_capabilities(&self.config);
        let mut extended = Vec::new();
        let mut at = 0x100;
        while let Some(header) = read_config::<4>(&self.config, at).map(u32::from_le_bytes) {
            let id = u16::try_from(header & 0xffff).unwrap_or(0);
            if matches!(header, 0 | u32::MAX) || extended.len() >= MOST_EXTENDED {
                break;
            }
            extended.push(id);
            at = u64::from(header >> 20);
            if at < 0x100 {
                break;
            }
        }
        (plain.iter().map(|(id, _)| (*id).into()).collect(), extended)
    }
}

/// The ids that a kernel command line gives, if it does.
fn ids(command_line: &str) -> Outcome<Option<(u16, u16)>> {
    let mut words = command_line.split_whitespace();
    let Some(given) = words.find_map(|word| word.strip_prefix("numagpu.ids=")) else {
        return Ok(None);
    };
    let hex = |text: &str| u16::from_str_radix(text, 16).ok();
    let ids = given
        .split_once(':')
        .and_then(|(vendor, device)| Some((hex(vendor)?, hex(device)?)));
    ids.map(Some)
        .ok_or_else(|| format!("numagpu.ids={given} is not VENDOR:DEVICE"))
}

/// Extended capabilities that there is room for.
const MOST_EXTENDED: usize = 960;

fn read_config<const N: usize>(config: &File, at: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    config.read_exact_at(&mut bytes, at).ok()?;
    Some(bytes)
}

/// Ids and offsets of the capabilities in the list that the header begins.
fn plain_capabilities(config: &File) -> Vec<(u8, u64)> {
    let mut found = Vec::new();
    let mut next = read_config(config, 0x34);
    while let Some([at @ 0x40..=0xff]) = next
        && found.len() < 48
        && let Some([id, after]) = read_config(config, at.into())
    {
        found.push((id, at.into()));
        next = Some([after]);
    }
    found
}

/// Routes an MSI-X vector to a physical address: the message is then a 4-byte store of `data` there. User space
/// without an IOMMU cannot give the processor an interrupt, but it can see the very message arrive.
pub fn route_vector(
    config: &File,
    msix: &Mapping,
    vector: u16,
    address: u64,
    data: u32,
) -> Outcome {
    let (capability, mut control) = msix_capability(config).ok_or("no MSI-X capability")?;
    let mut set = |bits: u16, clear: u16| {
        control = control & !clear | bits;
        config
            .write_all_at(&control.to_le_bytes(), capability + 2)
            .map_err(|error| error.to_string())
    };
    // Enabled with all vectors masked, as PCI Local Bus 3.0, section 6.8.3.5 wants it while the table changes.
    set(1 << 15 | 1 << 14, 0)?;
    let entry = usize::from(vector) * 16;
    msix.write32(entry, u32::try_from(address & 0xffff_ffff).unwrap_or(0));
    msix.write32(entry + 4, u32::try_from(address >> 32).unwrap_or(0));
    msix.write32(entry + 8, data);
    msix.write32(entry + 12, 0);
    set(0, 1 << 14)
}

/// Offset and message control of the MSI-X capability.
fn msix_capability(config: &File) -> Option<(u64, u16)> {
    let capabilities = plain_capabilities(config);
    let (_, at) = capabilities.iter().find(|(id, _)| *id == 0x11)?;
    Some((*at, u16::from_le_bytes(read_config(config, at + 2)?)))
}

/// Where the ring and the fences of a queue are in the DMA buffer.
#[derive(Clone, Copy)]
pub struct Slots {
    /// Ring.
    pub ring: usize,
    /// Bytes of the ring.
    pub ring_size: u32,
    /// Fences, 4 bytes each.
    pub fences: usize,
    /// Read pointer write-back.
    pub rptr: usize,
}

/// A copy queue in use.
pub struct Queue<'a> {
    device: &'a Device,
    buffer: &'a Mapping,
    physical: u64,
    index: u32,
    slots: Slots,
    write_pointer: u64,
    packets: u64,
}

impl<'a> Queue<'a> {
    /// Enables a queue that acts for `token`.
    pub fn enable(
        device: &'a Device,
        (buffer, physical): (&'a Mapping, u64),
        index: u32,
        slots: Slots,
        token: u64,
    ) -> Queue<'a> {
        use regs::queue as q;
        let queue = Queue {
            device,
            buffer,
            physical,
            index,
            slots,
            write_pointer: 0,
            packets: 0,
        };
        queue.write(q::CONTROL, u64::from(regs::QUEUE_RESET));
        queue.write(q::RING_BASE, physical + slots.ring as u64);
        queue.write(q::RING_SIZE, u64::from(slots.ring_size));
        queue.write(q::RPTR_WRITEBACK, physical + slots.rptr as u64);
        queue.write(q::TOKEN, token);
        queue.write(q::CONTROL, u64::from(regs::QUEUE_ENABLE));
        queue
    }

    fn base(&self) -> u32 {
        regs::queue::BASE + self.index * regs::queue::STRIDE
    }

    fn write(&self, reg: Reg, value: u64) {
        self.device.write(self.base(), reg, value);
    }

    /// Reads a register of the queue.
    pub fn read(&self, reg: Reg) -> u64 {
        self.device.read(self.base(), reg)
    }

    /// Its state.
    pub fn state(&self) -> Option<QueueState> {
        QueueState::from_code(self.device.read32(self.base(), regs::queue::STATUS))
    }

    /// Its fault, for people.
    pub fn fault(&self) -> String {
        let code = self.device.read32(self.base(), regs::queue::FAULT_CODE);
        let name = QueueFault::from_code(code).map_or("unknown", QueueFault::name);
        format!(
            "{name} at {:#x}, packet {}",
            self.read(regs::queue::FAULT_ADDR),
            self.read(regs::queue::FAULT_PACKET)
        )
    }

    /// Puts packets into the ring.
    pub fn push(&mut self, packet: &[u32]) {
        for word in packet {
            let at = self.write_pointer % u64::from(self.slots.ring_size);
            self.buffer
                .write32(self.slots.ring + usize::try_from(at).unwrap_or(0), *word);
            self.write_pointer += 4;
        }
        self.packets += 1;
    }

    /// Puts a copy of any length into the ring.
    pub fn push_copy(&mut self, source: u64, destination: u64, len: u64) {
        let mut done = 0;
        while done < len {
            let bytes = (len - done).min(sdma::MAX_COPY);
            self.push(&sdma::copy_linear(source + done, destination + done, bytes));
            done += bytes;
        }
    }

    /// Puts a fence into the ring: slot `fence` becomes `value`.
    pub fn push_fence(&mut self, fence: usize, value: u32) {
        self.buffer.write32(self.slots.fences + fence * 4, 0);
        self.push(&sdma::fence(
            self.physical + (self.slots.fences + fence * 4) as u64,
            value,
        ));
    }

    /// Rings the doorbell.
    pub fn go(&self) {
        self.device.ring(self.index, self.write_pointer);
    }

    /// Waits for a fence.
    pub fn wait_fence(&self, fence: usize, value: u32) -> Outcome {
        wait("fence", || {
            if self.buffer.read32(self.slots.fences + fence * 4) == value {
                return Some(Ok(()));
            }
            (self.state() == Some(QueueState::Fault)).then(|| Err(self.fault()))
        })?
    }

    /// What a fence has stored.
    pub fn fence(&self, fence: usize) -> u32 {
        self.buffer.read32(self.slots.fences + fence * 4)
    }

    /// Waits until the queue stops, and checks why.
    pub fn wait_stopped(&self, why: QueueFault) -> Outcome {
        wait("fault", || {
            (self.state() == Some(QueueState::Fault)).then_some(())
        })?;
        if self.read(regs::queue::FAULT_CODE) == u64::from(why.code()) {
            return Ok(());
        }
        Err(format!("fault {} instead of {}", self.fault(), why.name()))
    }

    /// Checks that the queue has consumed all it was given, and said so everywhere.
    pub fn check_drained(&self) -> Outcome {
        let written_back = || self.buffer.read64(self.slots.rptr);
        wait("read pointer write-back", || {
            (written_back() == self.write_pointer).then_some(())
        })?;
        let (read, packets) = (
            self.read(regs::queue::RPTR),
            self.read(regs::queue::PACKETS),
        );
        if read != self.write_pointer || packets != self.packets {
            return Err(format!(
                "RPTR {read:#x} and {packets} packets instead of {:#x} and {}",
                self.write_pointer, self.packets
            ));
        }
        Ok(())
    }

    /// Stops the queue and forgets what it was doing.
    pub fn reset(&self) {
        self.write(regs::queue::CONTROL, u64::from(regs::QUEUE_RESET));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_from_the_command_line() {
        assert_eq!(ids("console=ttyS0"), Ok(None));
        let given = ids("a numagpu.ids=1002:74a0 b");
        assert_eq!(given, Ok(Some((0x1002, 0x74a0))));
        for bad in ["1002", "1002:", "1002:174a0", "x:y"] {
            assert!(ids(&format!("numagpu.ids={bad}")).is_err(), "{bad}");
        }
    }
}
