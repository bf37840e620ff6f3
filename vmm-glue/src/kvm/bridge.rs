//! A host bridge for a VMM that has none: functions by ECAM and by I/O ports, their BARs in windows of the address space.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kvm_ioctls::VcpuExit;
use numagpu_topology::ranges::Range;
use thiserror::Error;

use super::doorbells::Doorbells;
use super::endpoint::{Decoded, Endpoint};
use super::ports::{ConfigAddress, Port};

/// Bytes of configuration space of a bus in ECAM (PCIe Base 6.0 section 7.2.2).
pub const ECAM_BUS: u64 = 1 << 20;
/// Bytes of configuration space of a function in ECAM.
const ECAM_FUNCTION: u64 = 1 << 12;

/// Bus, device and function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bdf {
    /// 0 to 255.
    pub bus: u8,
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

impl Bdf {
    /// The function whose configuration space is at an offset of ECAM.
    fn at(offset: u64) -> Option<Bdf> {
        let bits = |shift: u32, mask: u64| u8::try_from((offset >> shift) & mask).ok();
        Some(Bdf {
            bus: u8::try_from(offset >> 20).ok()?,
            device: bits(15, 0x1f)?,
            function: bits(12, 7)?,
        })
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bdf {
            bus,
            device,
            function,
        } = self;
        write!(f, "{bus:02x}:{device:02x}.{function}")
    }
}

/// Where a host bridge is in the guest's physical address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    /// First address of ECAM, a multiple of 1 MiB; bus 0 is there.
    pub ecam: u64,
    /// Buses, 1 to 256.
    pub buses: u16,
    /// Where BARs may be; the guest learns of them from the VMM's ACPI tables, as of ECAM.
    pub memory: Vec<Range>,
}

/// Why a bridge cannot be so, or a function cannot be there.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BridgeError {
    /// ECAM cannot be there.
    #[error(
        "ECAM of {buses} bus(es) at {ecam:#x}: it is 1 to 256 buses at a multiple of {ECAM_BUS:#x}"
    )]
    Ecam {
        /// First address.
        ecam: u64,
        /// Buses.
        buses: u16,
    },
    /// Windows that lie over each other, or over ECAM.
    #[error("windows {:#x}..+{:#x} and {:#x}..+{:#x} overlap", .0.base, .0.size, .1.base, .1.size)]
    Overlap(Range, Range),
    /// A window that is empty or goes past the last address.
    #[error("window {:#x}..+{:#x} is empty or goes past the last address", .0.base, .0.size)]
    Window(Range),
    /// No such place on the buses.
    #[error("{bdf}: there are {buses} bus(es), 32 devices on each and 8 functions in each")]
    Place {
        /// Where.
        bdf: Bdf,
        /// Buses.
        buses: u16,
    },
    /// Somebody is there.
    #[error("{0} has a function already")]
    Taken(Bdf),
}

/// A function on the bus.
struct Plugged {
    // Dropped first: it calls the function.
    doorbells: Option<Doorbells>,
    endpoint: Arc<Endpoint>,
    decoded: Vec<Decoded>,
}

#[derive(Default)]
struct Bus {
    functions: BTreeMap<Bdf, Plugged>,
    /// BARs that accesses reach, in order of functions: where they lie over each other, the first one answers.
    reached: Vec<(Decoded, Arc<Endpoint>)>,
}

/// A host bridge: dispatches a processor's accesses to memory and to the ports of configuration space to functions.
///
/// Accesses of many processors go on beside each other; only where one changes what is decoded the others wait. An
/// access to a window that nobody answers reads as ones, and a write there is dropped.
pub struct HostBridge {
    windows: Windows,
    address: ConfigAddress,
    bus: RwLock<Bus>,
}

/// Whom an access is for.
enum Target {
    Config(Bdf, u32),
    Bar(Arc<Endpoint>, u8, u64),
    /// Nobody in the bridge's windows.
    Nobody,
}

impl HostBridge {
    /// A bridge without functions.
    ///
    /// # Errors
    /// [`BridgeError`] if the windows cannot be so.
    pub fn new(windows: Windows) -> Result<HostBridge, BridgeError> {
        let Windows { ecam, buses, .. } = windows;
        let size = u64::from(buses) * ECAM_BUS;
        let fits = (1..=256).contains(&buses) && ecam.checked_add(size).is_some();
        if !fits || !ecam.is_multiple_of(ECAM_BUS) {
            return Err(BridgeError::Ecam { ecam, buses });
        }
        let mut all = vec![Range { base: ecam, size }];
        for window in &windows.memory {
            let end = window.base.checked_add(window.size);
            let end = end.filter(|_| window.size != 0);
            let end = end.ok_or(BridgeError::Window(*window))?;
            let over = |it: &&Range| window.base < it.base.saturating_add(it.size) && it.base < end;
            if let Some(other) = all.iter().find(over) {
                return Err(BridgeError::Overlap(*other, *window));
            }
            all.push(*window);
        }
        Ok(HostBridge {
            windows,
            address: ConfigAddress::default(),
            bus: RwLock::default(),
        })
    }

    /// Where the bridge is.
    #[must_use]
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// Plugs a function in, and with it doorbells that ring without an exit to this process, if it has any.
    ///
    /// # Errors
    /// [`BridgeError::Place`], [`BridgeError::Taken`].
    pub fn plug(
        &self,
        bdf: Bdf,
        endpoint: Arc<Endpoint>,
        doorbells: Option<Doorbells>,
    ) -> Result<(), BridgeError> {
        let buses = self.windows.buses;
        if u16::from(bdf.bus) >= buses || bdf.device >= 32 || bdf.function >= 8 {
            return Err(BridgeError::Place { bdf, buses });
        }
        let mut bus = self.write_bus();
        if bus.functions.contains_key(&bdf) {
            return Err(BridgeError::Taken(bdf));
        }
        let plugged = Plugged {
            doorbells,
            endpoint,
            decoded: Vec::new(),
        };
        bus.functions.insert(bdf, plugged);
        self.decode(&mut bus, bdf);
        Ok(())
    }

    /// Takes a function off the bus; its endpoint, if there is one.
    pub fn unplug(&self, bdf: Bdf) -> Option<Arc<Endpoint>> {
        let mut bus = self.write_bus();
        let plugged = bus.functions.remove(&bdf)?;
        self.renew(&mut bus);
        // Its doorbells end without the lock: whoever serves them may be in the function.
        drop(bus);
        Some(Arc::clone(&plugged.endpoint))
    }

    /// Answers a processor's exit. False if it is none for this bridge; then nothing was done.
    pub fn answer(&self, exit: &mut VcpuExit<'_>) -> bool {
        match exit {
            VcpuExit::MmioRead(address, data) => self.read(*address, data),
            VcpuExit::MmioWrite(address, data) => self.write(*address, data),
            VcpuExit::IoIn(port, data) => self.port_read(*port, data),
            VcpuExit::IoOut(port, data) => self.port_write(*port, data),
            _ => false,
        }
    }

    /// A read of guest-physical memory. False if the address is not in the bridge's windows; `data` is untouched then.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some(target) = self.target(address, data.len()) else {
            return false;
        };
        data.fill(0xff);
        match target {
            Target::Config(bdf, offset) => self.config_read(bdf, offset, data),
            Target::Bar(endpoint, bar, offset) => endpoint.bar_read(bar, offset, data),
            Target::Nobody => {}
        }
        true
    }

    /// A write to guest-physical memory. False if the address is not in the bridge's windows.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some(target) = self.target(address, data.len()) else {
            return false;
        };
        match target {
            Target::Config(bdf, offset) => self.config_write(bdf, offset, data),
            Target::Bar(endpoint, bar, offset) => endpoint.bar_write(bar, offset, data),
            Target::Nobody => {}
        }
        true
    }

    /// A read of an I/O port. False if it is none of [`CONFIG_ADDRESS`](super::CONFIG_ADDRESS) and
    /// [`CONFIG_DATA`](super::CONFIG_DATA), or the guest did not enable the latter; `data` is untouched then.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        let Some(port) = self.address.port(port, data.len()) else {
            return false;
        };
        data.fill(0xff);
        match port {
            Port::Address => data.copy_from_slice(&self.address.get().to_le_bytes()),
            Port::Config(bdf, offset) => self.config_read(bdf, offset, data),
            Port::Nobody => {}
        }
        true
    }

    /// A write to an I/O port. False as for [`HostBridge::port_read`].
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        let Some(port) = self.address.port(port, data.len()) else {
            return false;
        };
        match port {
            Port::Address => {
                if let Ok(value) = data.try_into() {
                    self.address.set(u32::from_le_bytes(value));
                }
            }
            Port::Config(bdf, offset) => self.config_write(bdf, offset, data),
            Port::Nobody => {}
        }
        true
    }

    /// Reads configuration space; leaves `data` as it is if there is no function.
    fn config_read(&self, bdf: Bdf, offset: u32, data: &mut [u8]) {
        if let Some(endpoint) = self.endpoint(bdf) {
            endpoint.config_read(offset, data);
        }
    }

    fn config_write(&self, bdf: Bdf, offset: u32, data: &[u8]) {
        if let Some(endpoint) = self.endpoint(bdf) {
            endpoint.config_write(offset, data);
            self.changed(bdf, &endpoint);
        }
    }

    /// The function at a place.
    #[must_use]
    pub fn endpoint(&self, bdf: Bdf) -> Option<Arc<Endpoint>> {
        let bus = self.read_bus();
        bus.functions.get(&bdf).map(|it| Arc::clone(&it.endpoint))
    }

    fn target(&self, address: u64, len: usize) -> Option<Target> {
        let last = address.checked_add(u64::try_from(len.checked_sub(1)?).ok()?)?;
        let ecam = u64::from(self.windows.buses) * ECAM_BUS;
        if let Some(offset) = address
            .checked_sub(self.windows.ecam)
            .filter(|at| *at < ecam)
        {
            let register = offset % ECAM_FUNCTION;
            let whole = register + (last - address) < ECAM_FUNCTION;
            let place = Bdf::at(offset).zip(u32::try_from(register).ok());
            let target = place.filter(|_| whole);
            return Some(target.map_or(Target::Nobody, |(bdf, at)| Target::Config(bdf, at)));
        }
        let inside = |it: &Range| address >= it.base && address - it.base < it.size;
        self.windows.memory.iter().find(|it| inside(it))?;
        let bus = self.read_bus();
        let mut reached = bus.reached.iter();
        let hit = reached.find(|(it, _)| it.base <= address && last <= it.last());
        Some(hit.map_or(Target::Nobody, |(it, endpoint)| {
            Target::Bar(Arc::clone(endpoint), it.bar, address - it.base)
        }))
    }

    /// A function's configuration space was written.
    fn changed(&self, bdf: Bdf, endpoint: &Endpoint) {
        let now = endpoint.decoded();
        let before = self
            .read_bus()
            .functions
            .get(&bdf)
            .map(|it| it.decoded == now);
        if before == Some(false) {
            self.decode(&mut self.write_bus(), bdf);
        }
    }

    /// Takes over what a function decodes now.
    fn decode(&self, bus: &mut Bus, bdf: Bdf) {
        let Some(plugged) = bus.functions.get_mut(&bdf) else {
            return;
        };
        plugged.decoded = plugged.endpoint.decoded();
        if let Some(doorbells) = &mut plugged.doorbells {
            let bars = plugged.decoded.iter().copied();
            doorbells.place(bars.filter(|it| self.forwards(it)));
        }
        self.renew(bus);
    }

    /// Finds anew which BARs are reached.
    fn renew(&self, bus: &mut Bus) {
        let Bus { functions, reached } = bus;
        reached.clear();
        for plugged in functions.values() {
            let bars = plugged.decoded.iter().copied();
            let bars = bars.filter(|it| self.forwards(it));
            reached.extend(bars.map(|it| (it, Arc::clone(&plugged.endpoint))));
        }
    }

    /// Whether a BAR lies in a window, without which no access comes to it.
    fn forwards(&self, bar: &Decoded) -> bool {
        let holds = |it: &Range| it.base <= bar.base && bar.last() - it.base < it.size;
        self.windows.memory.iter().any(holds)
    }

    fn read_bus(&self) -> RwLockReadGuard<'_, Bus> {
        self.bus.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_bus(&self) -> RwLockWriteGuard<'_, Bus> {
        self.bus.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use numagpu_devices::bus::{PciFunction, ResetKind};
    use numagpu_devices::inject::Injection;
    use numagpu_devices::spec::{pci, regs};
    use numagpu_devices::{Fabric, Gpu, GpuConfig};
    use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

    use super::*;
    use crate::kvm::{CONFIG_ADDRESS, CONFIG_DATA, GuestDma, Message, MessageLine, MsiError};

    const ECAM: u64 = 0xe000_0000;
    const LOW: Range = Range {
        base: 0xc000_0000,
        size: 0x1000_0000,
    };
    const HIGH: Range = Range {
        base: 0x100_0000_0000,
        size: 0x4000_0000,
    };
    const PLACE: Bdf = Bdf {
        bus: 1,
        device: 2,
        function: 0,
    };
    /// Where BAR 0 is put.
    const BAR_LOW: u32 = 0xc123_0000;
    const BAR: u64 = BAR_LOW as u64;

    /// Takes messages, and tells nobody.
    struct Deaf;

    impl MessageLine for Deaf {
        fn route(&mut self, _: Message) -> Result<(), MsiError> {
            Ok(())
        }

        fn send(&self) -> bool {
            true
        }
    }

    fn windows() -> Windows {
        Windows {
            ecam: ECAM,
            buses: 2,
            memory: vec![LOW, HIGH],
        }
    }

    fn gpu() -> Arc<Gpu> {
        Gpu::new(GpuConfig::new(0, Vec::new()), Fabric::new()).unwrap()
    }

    fn endpoint(gpu: &Arc<Gpu>) -> Arc<Endpoint> {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let dma = GuestDma::new(GuestMemoryAtomic::new(memory));
        let function: Arc<dyn PciFunction> = Arc::<Gpu>::clone(gpu);
        Arc::new(Endpoint::new(function, dma, || Ok(Deaf)).unwrap())
    }

    /// A bridge with a GPU, decoding off.
    fn bridge() -> (HostBridge, Arc<Gpu>) {
        let bridge = HostBridge::new(windows()).unwrap();
        let gpu = gpu();
        bridge.plug(PLACE, endpoint(&gpu), None).unwrap();
        (bridge, gpu)
    }

    impl HostBridge {
        fn get(&self, address: u64) -> u32 {
            let mut data = [0; 4];
            assert!(self.read(address, &mut data), "{address:#x}");
            u32::from_le_bytes(data)
        }

        fn config(&self, offset: u64) -> u32 {
            self.get(ECAM + (1 << 20) + (2 << 15) + offset)
        }

        fn set_config(&self, offset: u64, value: u32) {
            let address = ECAM + (1 << 20) + (2 << 15) + offset;
            assert!(self.write(address, &value.to_le_bytes()));
        }
    }

    #[test]
    fn windows_that_cannot_be_are_refused_with_numbers() {
        let with = |change: &dyn Fn(&mut Windows)| {
            let mut windows = windows();
            change(&mut windows);
            HostBridge::new(windows)
                .err()
                .map(|error| error.to_string())
        };
        let ecam =
            "ECAM of 2 bus(es) at 0xe0001000: it is 1 to 256 buses at a multiple of 0x100000";
        assert_eq!(with(&|it| it.ecam += 0x1000).as_deref(), Some(ecam));
        assert!(with(&|it| it.buses = 0).is_some());
        assert!(with(&|it| it.buses = 257).is_some());
        let overlap = "windows 0xe0000000..+0x200000 and 0xe0100000..+0x1 overlap";
        let over = Range {
            base: ECAM + (1 << 20),
            size: 1,
        };
        assert_eq!(with(&|it| it.memory.push(over)).as_deref(), Some(overlap));
        let empty = Range { base: 5, size: 0 };
        assert!(with(&|it| it.memory.push(empty)).is_some());
        let wraps = Range {
            base: u64::MAX,
            size: 2,
        };
        assert!(with(&|it| it.memory.push(wraps)).is_some());
    }

    #[test]
    fn a_function_is_found_where_it_is_plugged_in_and_nowhere_else() {
        let (bridge, _gpu) = bridge();
        let ids = u32::from(pci::VENDOR_ID) | u32::from(pci::DEVICE_ID) << 16;
        let found: Vec<u64> = (0..512)
            .map(|function| function << 12)
            .filter(|offset| bridge.get(ECAM + offset) != u32::MAX)
            .collect();
        assert_eq!(found, [(1 << 20) + (2 << 15)]);
        assert_eq!(bridge.config(0), ids);
        // What begins in one function's space and ends in the next is nobody's.
        let mut straddling = [0; 8];
        assert!(bridge.read(ECAM + (1 << 20) + (2 << 15) + 0xffc, &mut straddling));
        assert_eq!(straddling, [0xff; 8]);
        let mut outside = [7; 4];
        for address in [ECAM - 1, ECAM + (2 << 20), 0, u64::MAX, HIGH.end()] {
            assert!(!bridge.read(address, &mut outside), "{address:#x}");
            assert!(!bridge.write(address, &outside), "{address:#x}");
        }
        assert_eq!(outside, [7; 4]);
        assert!(!bridge.read(ECAM, &mut []));
        let taken = bridge.plug(PLACE, endpoint(&gpu()), None);
        assert_eq!(taken, Err(BridgeError::Taken(PLACE)));
        let far = Bdf { bus: 2, ..PLACE };
        let beyond = bridge.plug(far, endpoint(&gpu()), None).unwrap_err();
        assert!(
            beyond
                .to_string()
                .starts_with("02:02.0: there are 2 bus(es)")
        );
    }

    #[test]
    fn ports_and_ecam_show_the_same_configuration_space() {
        let (bridge, _gpu) = bridge();
        let place = |register: u32| 1 << 31 | 1 << 16 | 2 << 11 | register;
        let select = |address: u32| {
            assert!(bridge.port_write(CONFIG_ADDRESS, &address.to_le_bytes()));
            let mut seen = [0; 4];
            assert!(bridge.port_read(CONFIG_ADDRESS, &mut seen));
            assert_eq!(u32::from_le_bytes(seen), address);
        };
        let data = || {
            let mut data = [0; 4];
            assert!(bridge.port_read(CONFIG_DATA, &mut data));
            u32::from_le_bytes(data)
        };
        for register in (0..256).step_by(4) {
            select(place(register));
            let whole = bridge.config(register.into());
            assert_eq!(data(), whole, "{register:#x}");
            for (byte, wanted) in (0..).zip(whole.to_le_bytes()) {
                let mut seen = [0];
                assert!(bridge.port_read(CONFIG_DATA + byte, &mut seen));
                assert_eq!(seen, [wanted], "{register:#x}+{byte}");
            }
            for (byte, wanted) in [(0, whole & 0xffff), (2, whole >> 16)] {
                let mut seen = [0; 2];
                assert!(bridge.port_read(CONFIG_DATA + byte, &mut seen));
                assert_eq!(u32::from(u16::from_le_bytes(seen)), wanted);
            }
        }
        // What is written there has the effects that it has by ECAM.
        select(place(0x10));
        assert!(bridge.port_write(CONFIG_DATA, &BAR_LOW.to_le_bytes()));
        select(place(4));
        assert!(bridge.port_write(CONFIG_DATA, &[2]));
        assert_eq!(bridge.get(BAR), regs::MAGIC);
        assert_eq!(bridge.config(4) & 0xffff, 2);
        // Absent functions, on this bus, on another one, and on one that there is not.
        for absent in [
            1 << 31,
            place(0) | 1 << 8,
            1 << 31 | 2 << 11,
            1 << 31 | 9 << 16,
        ] {
            select(absent);
            assert!(bridge.port_write(CONFIG_DATA, &[0; 4]));
            assert_eq!(data(), u32::MAX, "{absent:#x}");
        }
    }

    #[test]
    fn ports_of_the_vmm_are_left_to_it() {
        let (bridge, _gpu) = bridge();
        let mut untouched = [7; 4];
        // The data without an address; bytes of the address, as the one that resets PCs; what is near.
        for (port, len) in [(4, 4), (4, 1), (0, 1), (0, 2), (1, 1), (3, 1), (8, 4)] {
            let data = &mut untouched[..len];
            assert!(!bridge.port_read(CONFIG_ADDRESS + port, data));
            assert!(!bridge.port_write(CONFIG_ADDRESS + port, data));
        }
        assert_eq!(untouched, [7; 4]);
        let mut exit = VcpuExit::IoOut(CONFIG_ADDRESS, &[0, 0, 1, 0x80]);
        assert!(bridge.answer(&mut exit));
        let mut ids = [0; 2];
        assert!(bridge.answer(&mut VcpuExit::IoIn(CONFIG_DATA, &mut ids)));
        assert_eq!(ids, [0xff; 2]);
        assert!(!bridge.answer(&mut VcpuExit::IoIn(0xcf9, &mut ids)));
    }

    #[test]
    fn bars_are_decoded_as_the_guest_programs_them() {
        let (bridge, _gpu) = bridge();
        bridge.set_config(0x10, u32::MAX);
        assert_eq!(bridge.config(0x10), 0xffff_0000);
        bridge.set_config(0x10, BAR_LOW);
        assert_eq!(bridge.get(BAR), u32::MAX, "decoding is off");
        bridge.set_config(4, 2);
        assert_eq!(bridge.get(BAR), regs::MAGIC);
        bridge.set_config(0x18, 0x1_0000);
        bridge.set_config(0x1c, 0x100);
        let high = HIGH.base + 0x1_0000;
        assert_eq!(bridge.get(high), 0, "doorbells read as zero");
        assert_eq!(bridge.get(high + pci::BAR_DOORBELLS_SIZE), u32::MAX);
        // Moved while it is decoded, as some drivers do.
        bridge.set_config(0x10, BAR_LOW + 0x10_0000);
        assert_eq!(bridge.get(BAR), u32::MAX);
        assert_eq!(bridge.get(BAR + 0x10_0000), regs::MAGIC);
        let mut end = [0; 8];
        assert!(bridge.read(BAR + 0x10_fffc, &mut end));
        assert_eq!(end, [0xff; 8], "half of it is behind the BAR");
        // Where the bridge forwards nothing, nothing comes.
        bridge.set_config(0x10, 0x1000_0000);
        let mut data = [0; 4];
        assert!(!bridge.read(0x1000_0000, &mut data));
        bridge.set_config(0x10, BAR_LOW);
        bridge.set_config(4, 0);
        assert_eq!(bridge.get(BAR), u32::MAX);
    }

    #[test]
    fn a_reset_of_the_function_takes_bars_and_messages_away() {
        let (bridge, gpu) = bridge();
        bridge.set_config(0x10, BAR_LOW);
        bridge.set_config(0x14, BAR_LOW + 0x10_0000);
        bridge.set_config(4, 6);
        let entry = BAR + 0x10_0000 + 16;
        bridge.write(entry + 12, &[0; 4]);
        bridge.write(entry, &0xfee0_0000_u32.to_le_bytes());
        bridge.set_config(0x40, 1 << 31);
        assert_eq!(
            (bridge.get(entry), bridge.get(entry + 12)),
            (0xfee0_0000, 0)
        );
        // Device control of the PCI Express capability.
        bridge.set_config(0x58, 1 << 15);
        assert_eq!(bridge.get(BAR), u32::MAX);
        bridge.set_config(0x10, BAR_LOW);
        bridge.set_config(0x14, BAR_LOW + 0x10_0000);
        bridge.set_config(4, 6);
        assert_eq!((bridge.get(entry), bridge.get(entry + 12)), (0, 1));
        assert_eq!(bridge.config(0x40) >> 30, 0);
        let endpoint = bridge.endpoint(PLACE).unwrap();
        endpoint.reset(ResetKind::Hot);
        gpu.inject(Injection::Removal).unwrap();
        bridge.set_config(4, 6);
        assert_eq!(bridge.config(0), u32::MAX);
        assert_eq!(bridge.get(BAR), u32::MAX);
        assert_eq!(endpoint.decoded(), []);
    }

    #[test]
    fn messages_wait_in_the_pending_bits_where_the_guest_sees_them() {
        let (bridge, gpu) = bridge();
        bridge.set_config(0x14, BAR_LOW);
        bridge.set_config(4, 6);
        let pending = BAR + u64::from(pci::MSIX_PBA_OFFSET);
        // Enabled, every vector masked.
        bridge.set_config(0x40, 1 << 31);
        gpu.inject(Injection::SpuriousInterrupt { vector: 3 })
            .unwrap();
        assert_eq!(bridge.get(pending), 1 << 3);
        bridge.write(pending, &[0xff; 4]);
        assert_eq!(bridge.get(pending), 1 << 3, "the guest cannot write it");
        bridge.write(BAR + 3 * 16 + 12, &[0; 4]);
        assert_eq!(bridge.get(pending), 0);
    }

    #[test]
    fn a_function_that_is_unplugged_is_gone_and_detached() {
        let (bridge, gpu) = bridge();
        bridge.set_config(0x10, BAR_LOW);
        bridge.set_config(4, 2);
        assert!(gpu.is_attached());
        assert!(bridge.unplug(PLACE).is_some());
        assert!(bridge.unplug(PLACE).is_none());
        assert!(!gpu.is_attached());
        assert_eq!((bridge.config(0), bridge.get(BAR)), (u32::MAX, u32::MAX));
        bridge.plug(PLACE, endpoint(&gpu), None).unwrap();
        assert_eq!(bridge.get(BAR), u32::MAX, "as after power-on");
        assert_ne!(bridge.config(0), u32::MAX);
    }
}
