//! A GPU whose HBM a client maps from BAR 4.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use numagpu_devices::bus::{HbmStore, PciFunction};
use numagpu_devices::spec::regs::{
    self, Caps, OwnerCommand, OwnerResult, OwnerState, QUEUE_ENABLE, QUEUE_RESET, QueueFault,
    QueueState, boot, identity, partition, queue,
};
use numagpu_devices::spec::table::Reg;
use numagpu_devices::spec::{pci, sdma};
use numagpu_devices::{ApertureConfig, Fabric, Gpu, GpuConfig, PartitionConfig};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::vfio_user::Server;
use rustix::fs::fstat;
use tempfile::TempDir;
use vfio_user::Client;
use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory as _};

use crate::raw::*;

pub const MIB: u64 = 1 << 20;
/// Bytes of each of two partitions.
pub const PART: u64 = 2 * MIB;
/// Where packets find the first.
pub const BASE: u64 = 0x100_0000_0000;
pub const APERTURE: u32 = pci::BAR_APERTURE as u32;
const REGISTERS: u32 = pci::BAR_REGISTERS as u32;
const DOORBELLS: u32 = pci::BAR_DOORBELLS as u32;
const TOKEN: u64 = 0x6170;
/// Guest RAM: the ring, then what is copied.
pub const RAM: u64 = 0x10_0000;
pub const DATA: u64 = RAM + 0x8000;

pub struct Served {
    pub hbm: Arc<HbmBacking>,
    server: Server,
    _dir: TempDir,
}

impl Served {
    pub fn new(hbm: Arc<HbmBacking>, config: GpuConfig, fabric: Arc<Fabric>) -> Self {
        let gpu: Arc<dyn PciFunction> = Gpu::new(config, fabric).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(dir.path().join("gpu"), gpu).unwrap();
        Self {
            hbm,
            server,
            _dir: dir,
        }
    }

    pub fn path(&self) -> PathBuf {
        self.server.path().to_owned()
    }
}

/// A GPU of two partitions behind a BAR of so many bytes.
pub fn serve(size: u64) -> Served {
    serve_hbm(size, HbmBacking::memfd("gpu0", 2 * PART).unwrap())
}

/// The same, of HBM of one's own.
pub fn serve_hbm(size: u64, hbm: HbmBacking) -> Served {
    let hbm = Arc::new(hbm);
    let parts = hbm.split(&[PART, PART]).unwrap();
    let bases = (0..).map(|index| BASE + index * PART);
    let partitions = bases.zip(parts).map(|(base, part)| PartitionConfig {
        base,
        size: PART,
        pxm: None,
        store: Arc::new(part),
    });
    let page = HbmBacking::memfd("doorbells", pci::BAR_DOORBELLS_SIZE).unwrap();
    let mut page = Arc::new(page).split(&[pci::BAR_DOORBELLS_SIZE]).unwrap();
    let config = GpuConfig {
        aperture: Some(ApertureConfig {
            size,
            coherent: true,
        }),
        doorbells: page.pop().map(|page| Arc::new(page) as _),
        boot_delay: Duration::ZERO,
        ..GpuConfig::new(0, partitions.collect())
    };
    Served::new(hbm, config, Fabric::new())
}

/// A driver behind a client.
pub struct Driver {
    pub raw: Raw,
    pub ram: OwnedFd,
    pub write_pointer: u64,
}

impl Driver {
    /// Connects, boots, claims both partitions and enables queue 0.
    pub fn new(served: &Served) -> Self {
        let mut driver = Self {
            raw: Raw::ready(&served.path()),
            ram: memfd(0x1_0000),
            write_pointer: 0,
        };
        let map = map_body(3, 0, RAM, 0x1_0000);
        assert_eq!(driver.raw.errno(DMA_MAP, &map, &[driver.ram.as_fd()]), 0);
        driver.start();
        driver
    }

    /// Boots, claims both partitions and enables queue 0.
    pub fn start(&mut self) {
        self.write(7, 4, &[6, 0]);
        self.set(boot::BASE, &boot::CONTROL, 1);
        for part in 0..2 {
            // On a busy host what the last client left is still scrubbed.
            self.wait_free(part);
            let claimed = self.command(part, OwnerCommand::Claim);
            assert_eq!(claimed, Some(OwnerResult::Ok));
        }
        self.start_queue();
    }

    fn start_queue(&mut self) {
        self.set(queue::BASE, &queue::RING_BASE, RAM);
        self.set(queue::BASE, &queue::RING_SIZE, 4096);
        self.set(queue::BASE, &queue::TOKEN, TOKEN);
        self.set(queue::BASE, &queue::CONTROL, QUEUE_ENABLE.into());
        self.write_pointer = 0;
    }

    pub fn read(&mut self, region: u32, offset: u64, len: u32) -> Vec<u8> {
        let body = region_body(offset, region, len, &[]);
        self.raw.ask(READ, &body, &[]).body[16..].to_vec()
    }

    pub fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let len = u32::try_from(data.len()).unwrap();
        let body = region_body(offset, region, len, data);
        assert_eq!(self.raw.errno(WRITE, &body, &[]), 0);
    }

    fn set(&mut self, base: u32, reg: &Reg, value: u64) {
        let data = &value.to_le_bytes()[..reg.width.bytes() as usize];
        self.write(REGISTERS, (base + reg.offset).into(), data);
    }

    fn get(&mut self, base: u32, reg: &Reg) -> u64 {
        let mut value = [0; 8];
        let len = reg.width.bytes();
        let data = self.read(REGISTERS, (base + reg.offset).into(), len);
        value[..len as usize].copy_from_slice(&data);
        u64::from_le_bytes(value)
    }

    pub fn get32(&mut self, base: u32, reg: &Reg) -> u32 {
        u32::try_from(self.get(base, reg)).unwrap()
    }

    pub fn command(&mut self, part: u32, command: OwnerCommand) -> Option<OwnerResult> {
        let base = partition::BASE + part * partition::STRIDE;
        self.set(base, &partition::TOKEN, TOKEN);
        self.set(base, &partition::COMMAND, command.code().into());
        OwnerResult::from_code(self.get32(base, &partition::RESULT))
    }

    fn wait(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let since = Instant::now();
        while !done(self) {
            assert!(since.elapsed() < Duration::from_secs(10), "too long");
        }
    }

    pub fn wait_free(&mut self, part: u32) {
        let base = partition::BASE + part * partition::STRIDE;
        let free = OwnerState::Free.code();
        self.wait(|driver| driver.get32(base, &partition::STATE) == free);
    }

    /// One copy by the engine.
    pub fn copy(&mut self, source: u64, destination: u64, len: u64) {
        self.begin_copy(source, destination, len);
        self.end_copy();
    }

    /// Answers the engine's commands for memory at `base`, which are these.
    fn serve_memory(&mut self, base: u64, memory: &mut [u8], commands: &[u16]) {
        for command in commands {
            let asked = self.raw.answer();
            assert_eq!((asked.command, asked.flags), (*command, 0));
            let long = |at: usize| u64::from_ne_bytes(asked.body[at..at + 8].try_into().unwrap());
            let (address, count) = (long(0), usize::try_from(long(8)).unwrap());
            let at = usize::try_from(address - base).unwrap();
            let mut body = longs(&[address, count as u64]);
            if *command == DMA_READ {
                body.extend(&memory[at..at + count]);
            } else {
                memory[at..at + count].copy_from_slice(&asked.body[16..]);
            }
            let size = 16 + u32::try_from(body.len()).unwrap();
            self.raw
                .send(&framed(asked.id, *command, size, REPLY, &body), &[]);
        }
        self.end_copy();
    }

    /// Rings the doorbell for one copy.
    pub fn begin_copy(&mut self, source: u64, destination: u64, len: u64) {
        self.begin(&sdma::copy_linear(source, destination, len));
    }

    /// Rings the doorbell for a packet.
    pub fn begin(&mut self, packet: &[u32]) {
        let words = words(packet);
        let written = rustix::io::pwrite(&self.ram, &words, self.write_pointer);
        assert_eq!(written, Ok(words.len()));
        self.write_pointer += words.len() as u64;
        let body = region_body(0, DOORBELLS, 8, &self.write_pointer.to_le_bytes());
        // Posted: a command of the engine's may come before a reply would.
        self.raw.send(&framed(1, WRITE, 40, NO_REPLY, &body), &[]);
    }

    /// The fault of the queue in a copy, or before it. The queue starts anew.
    pub fn faulty_copy(&mut self, source: u64, destination: u64, len: u64) -> Option<QueueFault> {
        self.begin_copy(source, destination, len);
        let fault = self.fault();
        self.set(queue::BASE, &queue::CONTROL, QUEUE_RESET.into());
        self.start_queue();
        fault
    }

    /// Waits until the queue is at rest; why it faulted, if it did.
    pub fn fault(&mut self) -> Option<QueueFault> {
        let running = QueueState::Running.code();
        self.wait(|driver| driver.get32(queue::BASE, &queue::STATUS) != running);
        let state = self.get32(queue::BASE, &queue::STATUS);
        let code = self.get32(queue::BASE, &queue::FAULT_CODE);
        (state == QueueState::Fault.code()).then(|| QueueFault::from_code(code).unwrap())
    }

    pub fn end_copy(&mut self) {
        let running = QueueState::Running.code();
        self.wait(|driver| driver.get32(queue::BASE, &queue::STATUS) != running);
        let state = self.get32(queue::BASE, &queue::STATUS);
        assert_eq!(QueueState::from_code(state), Some(QueueState::Idle));
    }
}

fn info(raw: &mut Raw, argsz: u32, index: u32) -> (Answer, Vec<OwnedFd>) {
    raw.ask_for_fds(REGION_INFO, &words(&[argsz, 0, index, 0, 0, 0, 0, 0]))
}

/// The aperture as a client maps it.
fn map(raw: &mut Raw) -> MmapRegion {
    let (_, mut fds) = info(raw, 64, APERTURE);
    let file = FileOffset::new(fds.pop().unwrap().into(), 0);
    let len = usize::try_from(2 * PART).unwrap();
    MmapRegion::from_file(file, len).unwrap()
}

#[test]
fn a_partly_mappable_region_is_described_byte_for_byte() {
    let served = serve(8 * MIB);
    let mut raw = Raw::ready(&served.path());
    let (id, _) = served.hbm.backing();
    // Too little room for the capability, then enough, then more than enough.
    for argsz in [32, 63, 64, 4000] {
        let (answer, fds) = info(&mut raw, argsz, APERTURE);
        assert_eq!((answer.errno, answer.flags), (0, 1));
        #[rustfmt::skip]
        let fixed = [
            64, 0, 0, 0, // argsz: what the whole answer takes
            0xf, 0, 0, 0, // read, write, map, capabilities
            4, 0, 0, 0, // index
            32, 0, 0, 0, // offset of the capability
            0, 0, 0x80, 0, 0, 0, 0, 0, // 8 MiB
            0, 0, 0, 0, 0, 0, 0, 0, // offset in the file
        ];
        #[rustfmt::skip]
        let capability = [
            1, 0, 1, 0, // sparse map, version 1
            0, 0, 0, 0, // the last one
            1, 0, 0, 0, // one area
            0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, // from 0
            0, 0, 0x40, 0, 0, 0, 0, 0, // 4 MiB
        ];
        if argsz < 64 {
            // "Indicates additional capabilities found in the reply".
            let mut without = fixed;
            (without[4], without[12]) = (0x7, 0);
            assert_eq!(answer.body, without, "{argsz}");
        } else {
            assert_eq!(answer.body, [&fixed[..], &capability].concat());
        }
        assert_eq!(fds.len(), 1);
        let stat = fstat(&fds[0]).unwrap();
        assert_eq!((stat.st_dev, stat.st_ino), (id.device, id.inode));
    }
    for argsz in [0, 31] {
        let body = words(&[argsz, 0, APERTURE, 0, 0, 0, 0, 0]);
        assert_eq!(raw.errno(REGION_INFO, &body, &[]), 22);
    }
}

#[test]
fn regions_without_areas_or_with_one_of_all_need_no_capability() {
    let served = serve(4 * MIB);
    let mut raw = Raw::ready(&served.path());
    let sizes = [0x1_0000, 0x2000, 0x1000, 0, 4 * MIB, 0, 0, 4096, 0];
    for (index, size) in (0..).zip(sizes) {
        for argsz in [32, 64] {
            let (answer, fds) = info(&mut raw, argsz, index);
            let flags = match (index, size) {
                (_, 0) => 0,
                (APERTURE | DOORBELLS, _) => 7,
                _ => 3,
            };
            let expected = [words(&[32, flags, index, 0]), longs(&[size, 0])].concat();
            assert_eq!(answer.body, expected, "region {index}");
            let mapped = [APERTURE, DOORBELLS].contains(&index);
            assert_eq!(fds.len(), usize::from(mapped));
        }
    }
}

/// "Maximum number of file descriptors that can be received by the sender in one message" ("Version"): without any
/// there is nothing to map, and accesses go by messages.
#[test]
fn a_client_that_takes_no_descriptors_is_offered_no_map() {
    let served = serve(8 * MIB);
    let proposal = "{\"capabilities\":{\"max_msg_fds\":0}}\0";
    let mut raw = Raw::proposing(&served.path(), proposal);
    let (answer, fds) = info(&mut raw, 64, APERTURE);
    let want = [words(&[32, 3, APERTURE, 0]), longs(&[8 * MIB, 0])].concat();
    assert_eq!((answer.errno, answer.body, fds.len()), (0, want, 0));
}

#[test]
fn the_client_of_cloud_hypervisor_finds_what_to_map() {
    for (size, areas) in [(8 * MIB, vec![(0, 4 * MIB)]), (4 * MIB, vec![])] {
        let served = serve(size);
        let client = Client::new(&served.path()).unwrap();
        let region = client.region(APERTURE).unwrap();
        assert_eq!((region.size, region.flags & 7), (size, 7));
        assert!(region.file_offset.is_some());
        let found: Vec<_> = region
            .sparse_areas
            .iter()
            .map(|area| (area.offset, area.size))
            .collect();
        assert_eq!(found, areas);
        assert!(client.region(REGISTERS).unwrap().file_offset.is_none());
    }
}

#[test]
fn a_map_shows_what_engines_and_messages_write_and_they_what_it_does() {
    let served = serve(8 * MIB);
    let mut driver = Driver::new(&served);
    let caps = Caps::from_bits(driver.get(identity::BASE, &identity::CAPS));
    // No kicks: the doorbells are mapped.
    let wanted = Caps::HBM_APERTURE | Caps::COHERENT_HBM;
    assert_eq!(caps, Some(wanted));
    let cpu = map(&mut driver.raw);
    let cpu = cpu.as_volatile_slice();
    let pattern: Vec<u8> = (0..=250).cycle().take(0x4000).collect();
    let len = pattern.len() as u64;

    // From RAM into the second partition: the CPU sees it at its offset in the BAR.
    assert_eq!(
        rustix::io::pwrite(&driver.ram, &pattern, DATA - RAM),
        Ok(pattern.len())
    );
    driver.copy(DATA, BASE + PART + 0x1230, len);
    let at = usize::try_from(PART + 0x1230).unwrap();
    let mut seen = vec![0; pattern.len()];
    cpu.read_slice(&mut seen, at).unwrap();
    assert!(seen == pattern);
    assert!(driver.read(APERTURE, PART + 0x1230, 0x4000) == pattern);

    // What the CPU writes, across the border of the partitions, the engine copies out.
    let border = usize::try_from(PART - 8).unwrap();
    cpu.write_slice(b"one map of two partitions", border)
        .unwrap();
    driver.copy(BASE + PART - 8, DATA, 25);
    let mut seen = [0; 25];
    assert_eq!(
        rustix::io::pread(&driver.ram, &mut seen, DATA - RAM),
        Ok(25)
    );
    assert_eq!(&seen, b"one map of two partitions");
    assert_eq!(driver.read(APERTURE, PART - 8, 25), seen);

    // What a message writes; what is behind the HBM only messages reach.
    driver.write(APERTURE, 2 * PART - 2, &[1, 2, 3, 4]);
    let end = usize::try_from(2 * PART - 2).unwrap();
    assert_eq!(cpu.read_obj::<[u8; 2]>(end).unwrap(), [1, 2]);
    assert_eq!(driver.read(APERTURE, 2 * PART - 2, 4), [1, 2, 0xff, 0xff]);
    assert_eq!(driver.read(APERTURE, 8 * MIB - 4, 4), [0xff; 4]);
    let beyond = region_body(8 * MIB - 3, APERTURE, 4, &[]);
    assert_eq!(driver.raw.errno(READ, &beyond, &[]), 22);
}

#[test]
fn a_store_to_the_mapped_doorbells_rings() {
    let served = serve(8 * MIB);
    let mut driver = Driver::new(&served);
    let (_, mut fds) = info(&mut driver.raw, 32, DOORBELLS);
    let file = FileOffset::new(fds.pop().unwrap().into(), 0);
    let page = MmapRegion::<()>::from_file(file, 4096).unwrap();
    let slot = page.as_volatile_slice();
    for round in 1..=3_u64 {
        let packet = words(&sdma::fence(DATA, u32::try_from(round).unwrap()));
        let at = driver.write_pointer;
        assert_eq!(
            rustix::io::pwrite(&driver.ram, &packet, at),
            Ok(packet.len())
        );
        driver.write_pointer += packet.len() as u64;
        slot.store(driver.write_pointer, 0, Ordering::Release)
            .unwrap();
        driver.wait(|driver| driver.get(queue::BASE, &queue::PACKETS) == round);
    }
    // A write that comes by message rings too, and both read as zero.
    driver.copy(BASE, BASE + PART, 64);
    assert_eq!(slot.read_obj::<u64>(0).unwrap(), 0);
    assert_eq!(driver.read(DOORBELLS, 0, 8), [0; 8]);
    // The next client gets the same page, and nothing that this one left there.
    slot.store(64_u64, 8, Ordering::Release).unwrap();
    drop(driver);
    let mut next = Driver::new(&served);
    assert_eq!(slot.read_obj::<u64>(8).unwrap(), 0);
    assert_eq!(next.get(queue::BASE, &queue::WPTR), 0);
}

#[test]
fn the_clients_map_of_the_bar_may_come_and_go() {
    let served = serve(8 * MIB);
    let mut driver = Driver::new(&served);
    // As QEMU does it: without a descriptor, and again each time that decoding is turned on.
    for address in [0x38_0000_0000, 0x38_0000_0000, 0x3a_0000_0000] {
        let body = map_body(3, 0, address, 2 * PART);
        assert_eq!(driver.raw.errno(DMA_MAP, &body, &[]), 0);
        assert_eq!(driver.raw.errno(DMA_MAP, &body, &[]), 0, "the same again");
        let aperture = regs::Coherence::Aperture.code();
        assert_eq!(
            driver.get32(partition::BASE, &partition::COHERENCE),
            aperture
        );
        driver.copy(BASE, BASE + PART, 64);
        let body = unmap_body(0, address, 2 * PART);
        assert_eq!(driver.raw.errno(DMA_UNMAP, &body, &[]), 0);
    }
    driver.copy(BASE, BASE + PART, 64);
}

/// The specification knows maps without a descriptor only as memory to ask the client for (`VFIO_USER_DMA_MAP`). Here
/// the client would read the HBM that it has mapped from this server; the server has it itself.
#[test]
fn a_map_of_our_own_bar_leads_to_our_own_memory() {
    let served = serve(8 * MIB);
    let mut driver = Driver::new(&served);
    let pattern: Vec<u8> = (0..=250).cycle().take(0x4000).collect();
    let written = rustix::io::pwrite(&driver.ram, &pattern, DATA - RAM);
    assert_eq!(written, Ok(pattern.len()));
    let mut offset = 0;
    for bar in [0x38_0000_0000_u64, 0x3a_0000_0000] {
        driver.write(7, 0x20, &bar.to_le_bytes());
        let map = map_body(3, 0, bar, 2 * PART);
        assert_eq!(driver.raw.errno(DMA_MAP, &map, &[]), 0);
        assert_eq!(driver.raw.errno(DMA_MAP, &map, &[]), 0, "the same again");
        let aperture = regs::Coherence::Aperture.code();
        let coherence = driver.get32(partition::BASE, &partition::COHERENCE);
        assert_eq!(
            coherence, aperture,
            "a map without a descriptor proves nothing"
        );
        // Into the second partition, from there into the first, and back to RAM: nobody is asked.
        offset += 0x1230;
        driver.copy(DATA, bar + PART + offset, 0x4000);
        assert!(driver.read(APERTURE, PART + offset, 0x4000) == pattern);
        driver.copy(bar + PART + offset, bar + offset, 0x4000);
        assert!(driver.read(APERTURE, offset, 0x4000) == pattern);
        driver.copy(bar + offset, DATA + 0x4000, 0x1000);
        let mut seen = vec![0; 0x1000];
        let read = rustix::io::pread(&driver.ram, &mut seen, DATA + 0x4000 - RAM);
        assert_eq!(read, Ok(0x1000));
        assert!(seen == pattern[..0x1000]);
        let unmap = unmap_body(0, bar, 2 * PART);
        assert_eq!(driver.raw.errno(DMA_UNMAP, &unmap, &[]), 0);
    }
}

/// What lies outside the mappable part, or comes while the function decodes no memory, is not ours.
#[test]
fn other_maps_without_a_descriptor_are_asked_for() {
    let bar = 0x38_0000_0000_u64;
    let part = 2 * PART;
    let cases = [
        (6, bar - 0x1000, part),
        (6, bar + 0x1000, part),
        (6, bar, part + 0x1000),
        (6, bar + part, 0x1000),
        (4, bar, part),
    ];
    for (command, address, size) in cases {
        let served = serve(8 * MIB);
        let mut driver = Driver::new(&served);
        driver.write(7, 0x20, &bar.to_le_bytes());
        driver.write(7, 4, &[command, 0]);
        let map = map_body(3, 0, address, size);
        assert_eq!(driver.raw.errno(DMA_MAP, &map, &[]), 0);
        driver.write(7, 4, &[6, 0]);
        driver.begin_copy(address, DATA, 8);
        let asked = driver.raw.answer();
        assert_eq!((asked.command, asked.flags), (DMA_READ, 0));
        assert_eq!(asked.body, longs(&[address, 8]), "{command} {address:#x}");
    }
}

/// A ring, its data and its fences in memory that the client is asked for.
#[test]
fn an_engine_works_in_asked_memory() {
    let served = serve(8 * MIB);
    let mut driver = Driver::new(&served);
    let far = RAM + 0x100_0000;
    let body = map_body(3, 0, far, 0x1_0000);
    assert_eq!(driver.raw.errno(DMA_MAP, &body, &[]), 0);
    let mut memory: Vec<u8> = (0..=250).cycle().take(0x1_0000).collect();
    let before = memory.clone();
    driver.begin_copy(far + 0x10, BASE + 0x77, 0x3000);
    driver.serve_memory(far, &mut memory, &[DMA_READ]);
    assert!(driver.read(APERTURE, 0x77, 0x3000) == memory[0x10..0x3010]);
    driver.begin_copy(BASE + 0x77, far + 0x8001, 0x2000);
    driver.serve_memory(far, &mut memory, &[DMA_WRITE]);
    assert!(memory[0x8001..0xa001] == before[0x10..0x2010]);
    assert!(memory[..0x8001] == before[..0x8001] && memory[0xa001..] == before[0xa001..]);
}

#[test]
fn scrubs_show_through_the_map_and_stay_in_their_part() {
    let served = serve(8 * MIB);
    let mut driver = Driver::new(&served);
    let region = map(&mut driver.raw);
    let cpu = region.as_volatile_slice();
    let fill = || cpu.write_slice(&vec![0x5a; cpu.len()], 0).unwrap();
    let part = usize::try_from(PART).unwrap();
    let holds = |index: usize, byte: u8| {
        let mut seen = vec![1; part];
        cpu.read_slice(&mut seen, index * part).unwrap();
        seen.iter().all(|found| *found == byte)
    };
    fill();
    assert_eq!(
        driver.command(1, OwnerCommand::Release),
        Some(OwnerResult::Ok)
    );
    driver.wait_free(1);
    assert!(holds(0, 0x5a) && holds(1, 0));
    assert_eq!(
        driver.command(1, OwnerCommand::Claim),
        Some(OwnerResult::Ok)
    );

    fill();
    assert_eq!(driver.raw.errno(RESET, &[], &[]), 0);
    driver.wait_free(0);
    driver.wait_free(1);
    assert!(holds(0, 0) && holds(1, 0));
    driver.start();
    fill();
    driver.copy(BASE + PART, BASE, 0x1000);
    drop(driver);
    // The next client finds zeros, and what the last one kept mapped is the same memory.
    let mut next = Driver::new(&served);
    assert!(next.read(APERTURE, 0, 0x8000).iter().all(|byte| *byte == 0));
    assert!(holds(0, 0) && holds(1, 0));
}
