//! The device of `examples/checksum.rs`, driven by a vfio-user client.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[allow(dead_code, reason = "the example's own main")]
#[path = "../examples/checksum.rs"]
mod checksum;

use std::os::fd::{AsRawFd as _, OwnedFd};

use checksum::{
    DESTINATION, DONE, DOORBELL, FAILED, LENGTH, MAX_LENGTH, SOURCE, STATUS, SUM, VECTOR, function,
};
use numagpu_devices::spec::table::Reg;
use numagpu_vmm_glue::vfio_user::Server;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user::Client;

/// VFIO's region of configuration space, and its index of MSI-X.
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const EVENTS: u32 = 0x24;
/// Where the guest's memory is, and how much there is.
const RAM: u64 = 0x8000_0000;
const SIZE: u64 = 4 << 20;

/// A driver on the client's side of the socket.
struct Driver {
    client: Client,
    ram: OwnedFd,
    event: OwnedFd,
    _server: Server,
    _dir: tempfile::TempDir,
}

impl Driver {
    fn new() -> Driver {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::bind(dir.path().join("s"), function().unwrap()).unwrap();
        let mut client = Client::new(server.path()).unwrap();
        let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&ram, SIZE).unwrap();
        client.dma_map(0, RAM, SIZE, ram.as_raw_fd()).unwrap();
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let vector = u32::from(VECTOR);
        client
            .set_irqs(MSIX, EVENTS, vector, 1, &[event.as_raw_fd()])
            .unwrap();
        Driver {
            client,
            ram,
            event,
            _server: server,
            _dir: dir,
        }
    }

    fn write(&mut self, reg: Reg, value: u64) {
        let bytes = value.to_le_bytes();
        let len = reg.width.bytes() as usize;
        let written = self
            .client
            .region_write(0, reg.offset.into(), bytes.get(..len).unwrap());
        written.unwrap();
    }

    fn read(&mut self, reg: Reg) -> u64 {
        let mut bytes = [0; 8];
        let len = reg.width.bytes() as usize;
        let place = bytes.get_mut(..len).unwrap();
        self.client
            .region_read(0, reg.offset.into(), place)
            .unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Turns on memory and bus master.
    fn enable(&mut self) {
        self.client.region_write(CONFIG, 4, &[6, 0]).unwrap();
    }

    /// Does a job, and gives its status and how many interrupts it sent.
    fn job(&mut self, source: u64, destination: u64, length: u64) -> (u64, u64) {
        self.write(SOURCE, source);
        self.write(DESTINATION, destination);
        self.write(LENGTH, length);
        self.write(DOORBELL, 1);
        let status = self.read(STATUS);
        self.write(STATUS, status);
        assert_eq!(self.read(STATUS), 0, "cleared by writing ones");
        let mut count = [0; 8];
        let heard = rustix::io::read(&self.event, &mut count);
        (status, heard.map_or(0, |_| u64::from_ne_bytes(count)))
    }
}

#[test]
fn a_job_copies_adds_up_and_interrupts() {
    let mut driver = Driver::new();
    driver.enable();
    // Several of the device's pieces, and not a whole number of them.
    let data: Vec<u8> = (0..=250).cycle().take(10_001).collect();
    rustix::io::pwrite(&driver.ram, &data, 0x123).unwrap();
    let length = data.len() as u64;
    assert_eq!(driver.job(RAM + 0x123, RAM + 0x10_0000, length), (DONE, 1));
    let sum: u64 = data.iter().map(|byte| u64::from(*byte)).sum();
    assert_eq!(driver.read(SUM), sum);
    let mut copied = vec![0; data.len() + 1];
    rustix::io::pread(&driver.ram, &mut copied, 0x10_0000).unwrap();
    assert!(copied.starts_with(&data) && copied.ends_with(&[0]));
}

#[test]
fn a_job_without_bus_master_or_memory_fails() {
    let mut driver = Driver::new();
    // No message either: it would be a write to memory.
    assert_eq!(driver.job(RAM, RAM + 0x1000, 16), (FAILED, 0));
    driver.enable();
    assert_eq!(driver.job(RAM, RAM + 0x1000, 16), (DONE, 1));
    assert_eq!(driver.job(RAM, RAM + SIZE - 8, 16), (FAILED, 1));
    assert_eq!(driver.job(u64::MAX - 4, RAM, 16), (FAILED, 1));
    driver.client.dma_unmap(RAM, SIZE).unwrap();
    assert_eq!(driver.job(RAM, RAM + 0x1000, 16), (FAILED, 1));
}

#[test]
fn a_job_has_a_megabyte_at_most() {
    let mut driver = Driver::new();
    driver.enable();
    rustix::io::pwrite(&driver.ram, &[1], MAX_LENGTH - 1).unwrap();
    rustix::io::pwrite(&driver.ram, &[1], MAX_LENGTH).unwrap();
    let to = RAM + 2 * MAX_LENGTH;
    assert_eq!(driver.job(RAM, to, u32::MAX.into()), (DONE, 1));
    assert_eq!(driver.read(SUM), 1);
}

#[test]
fn a_function_level_reset_forgets_the_job() {
    let mut driver = Driver::new();
    driver.enable();
    driver.write(SOURCE, RAM);
    driver.client.region_write(CONFIG, 0x59, &[0x80]).unwrap();
    assert_eq!(driver.read(SOURCE), 0);
    assert_eq!(driver.job(RAM, RAM + 0x1000, 16), (FAILED, 0), "bus master");
}

/// Blocks of Rust in a page.
fn blocks(page: &str) -> Vec<&str> {
    let parts = page.split("```rust\n").skip(1);
    parts
        .map(|part| part.split("```").next().unwrap_or_default())
        .collect()
}

#[test]
fn the_guide_shows_the_example_as_it_is() {
    let (page, source) = (
        include_str!("../../docs/guide.md"),
        include_str!("../examples/checksum.rs"),
    );
    let blocks = blocks(page);
    for block in &blocks {
        assert!(source.contains(block), "not in the example:\n{block}");
    }
    assert_eq!(blocks.len(), 6, "the page's blocks are found");
    let links = page.split("](../").skip(1);
    for link in links.filter_map(|rest| rest.split(')').next()) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .join(link);
        assert!(path.is_file(), "{link} is linked");
    }
    assert!(page.lines().count() < 400 && source.lines().count() < 150);
}
