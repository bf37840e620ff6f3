//! Clients that cut short, or leave without room, the files behind memory that they share with the server.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use numagpu_devices::bus::{DmaAccess, DmaError, DmaPort, HbmStore as _};
use numagpu_devices::spec::regs::{OwnerState, QueueFault, partition};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::sys::guarded;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vm_memory::Bytes as _;

use crate::aperture::{self, APERTURE, BASE, DATA, Driver, MIB, PART, RAM};
use crate::device::{Served, is_alone};
use crate::raw::*;

/// Memory that will be cut short, behind the RAM.
const CUT: u64 = RAM + 0x100_0000;
/// Its bytes.
const SIZE: u64 = 0x1_0000;
/// Much longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(5);

fn map(raw: &mut Raw, address: u64, ram: &OwnedFd) {
    let body = map_body(3, 0, address, SIZE);
    assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
}

fn unmap(raw: &mut Raw, address: u64) {
    assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(0, address, SIZE), &[]), 0);
}

/// Copies that another client's GPU makes in the same process.
#[track_caller]
fn check_serves(driver: &mut Driver) {
    let pattern: Vec<u8> = (1..=250).cycle().take(0x1000).collect();
    let ram = File::from(driver.ram.try_clone().unwrap());
    ram.write_all_at(&pattern, DATA - RAM).unwrap();
    driver.copy(DATA, BASE + 0x77, 0x1000);
    driver.copy(BASE + 0x77, DATA + 0x1000, 0x1000);
    let mut seen = vec![0; 0x1000];
    ram.read_exact_at(&mut seen, DATA + 0x1000 - RAM).unwrap();
    assert!(seen == pattern);
}

#[test]
fn a_gpu_whose_client_cuts_its_memory_short_faults_and_all_others_go_on() {
    let (served, other) = (aperture::serve(8 * MIB), aperture::serve(8 * MIB));
    let (mut driver, mut other) = (Driver::new(&served), Driver::new(&other));
    let far = CUT + SIZE - 0x1000;
    for (source, destination) in [(far, BASE), (BASE, far), (far, DATA), (DATA, far)] {
        let ram = memfd(SIZE);
        map(&mut driver.raw, CUT, &ram);
        driver.copy(source, destination, 0x1000);
        ftruncate(&ram, SIZE / 2).unwrap();
        let unmapped = Some(QueueFault::Unmapped);
        assert_eq!(driver.faulty_copy(source, destination, 0x1000), unmapped);
        check_serves(&mut other);
        // The map is dead as a whole, until it is made anew.
        assert_eq!(driver.faulty_copy(CUT, BASE, 0x1000), unmapped);
        check_serves(&mut driver);
        unmap(&mut driver.raw, CUT);
        ftruncate(&ram, SIZE).unwrap();
        map(&mut driver.raw, CUT, &ram);
        driver.copy(source, destination, 0x1000);
        unmap(&mut driver.raw, CUT);
    }
    check_serves(&mut other);
}

#[test]
fn a_ring_that_is_cut_off_faults_its_queue_and_the_next_client_is_served() {
    let (served, other) = (aperture::serve(8 * MIB), aperture::serve(8 * MIB));
    let (mut driver, mut other) = (Driver::new(&served), Driver::new(&other));
    driver.copy(DATA, BASE, 0x1000);
    ftruncate(&driver.ram, 0).unwrap();
    // The driver writes its packet into a page that is not the server's any more.
    driver.begin_copy(DATA, BASE, 0x1000);
    ftruncate(&driver.ram, 0).unwrap();
    assert_eq!(driver.fault(), Some(QueueFault::Unmapped));
    check_serves(&mut other);
    drop(driver);
    check_serves(&mut Driver::new(&served));
    check_serves(&mut other);
}

/// With `--hbm-dir`, a client that maps the HBM from the BAR has its file, which is not sealed.
#[test]
fn hbm_that_its_client_cuts_short_faults_its_gpu_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let hbm = |name: &str| HbmBacking::in_dir(dir.path(), name, 2 * PART).unwrap();
    let served = aperture::serve_hbm(8 * MIB, hbm("gpu0"));
    let other = aperture::serve_hbm(8 * MIB, hbm("gpu1"));
    let (mut driver, mut other) = (Driver::new(&served), Driver::new(&other));
    driver.copy(DATA, BASE, 0x1000);
    let body = words(&[64, 0, APERTURE, 0, 0, 0, 0, 0]);
    let (_, mut fds) = driver.raw.ask_for_fds(REGION_INFO, &body);
    ftruncate(fds.pop().unwrap(), 0x1000).unwrap();
    // The first access, by message or engine, finds zeros or an error; those after it an error.
    driver.read(APERTURE, PART + 0x1000, 8);
    let unmapped = Some(QueueFault::Unmapped);
    assert_eq!(driver.faulty_copy(DATA, BASE + PART, 0x1000), unmapped);
    assert_eq!(driver.faulty_copy(BASE, DATA, 0x1000), unmapped);
    assert!(served.hbm.slice(0, 8).is_err());
    check_serves(&mut other);
    drop(driver);
    // It cannot be scrubbed, so nobody gets it any more.
    let mut next = Driver {
        raw: Raw::ready(&served.path()),
        ram: memfd(SIZE),
        write_pointer: 0,
    };
    let faulted = OwnerState::Faulted.code();
    let since = Instant::now();
    while next.get32(partition::BASE, &partition::STATE) != faulted {
        assert!(since.elapsed() < LIMIT);
    }
    check_serves(&mut other);
}

fn read(dma: &dyn DmaPort, address: u64) -> (Result<(), DmaError>, Option<u64>) {
    let mut seen = None;
    let done = dma.access(address, 8, DmaAccess::Read, &mut |slice| {
        seen = slice.read_obj(0).ok();
    });
    (done, seen)
}

fn served() -> (Served, Raw, Arc<dyn DmaPort>) {
    let served = crate::device::serve();
    let raw = Raw::ready(&served.path());
    let dma = served.probe.attachment().dma;
    (served, raw, dma)
}

#[test]
fn the_access_that_finds_memory_cut_off_fails_and_later_ones_find_nothing_mapped() {
    let (_served, mut raw, dma) = served();
    let (cut, whole) = (memfd(SIZE), memfd(SIZE));
    map(&mut raw, CUT, &cut);
    map(&mut raw, RAM, &whole);
    rustix::io::pwrite(&cut, &7_u64.to_ne_bytes(), 0).unwrap();
    ftruncate(&cut, 0x1000).unwrap();
    // What the file has yet is there.
    assert_eq!(read(&*dma, CUT), (Ok(()), Some(7)));
    let at = CUT + 0x8000;
    let failed = Err(DmaError::Failed { address: at });
    assert_eq!(read(&*dma, at), (failed, Some(0)));
    let unmapped = |address, len| Err(DmaError::Unmapped { address, len });
    assert_eq!(read(&*dma, at), (unmapped(at, 8), None));
    assert_eq!(read(&*dma, CUT), (unmapped(CUT, 8), None));
    assert_eq!(dma.copy(CUT, RAM, 16), unmapped(CUT, 16));
    assert_eq!(dma.copy(RAM, CUT, 16), unmapped(CUT, 16));
    assert_eq!(read(&*dma, RAM), (Ok(()), Some(0)));
    unmap(&mut raw, CUT);

    // A copy that meets it fails too, from there and to there, and says so of the right end.
    for (source, destination) in [(at, RAM), (RAM, at)] {
        ftruncate(&cut, SIZE).unwrap();
        map(&mut raw, CUT, &cut);
        assert_eq!(dma.copy(source, destination, 16), Ok(()));
        ftruncate(&cut, 0).unwrap();
        assert_eq!(dma.copy(source, destination, 16), failed);
        unmap(&mut raw, CUT);
    }
}

/// A file of huge pages takes them when they are touched, and the host may have none then.
#[test]
fn memory_that_the_host_has_no_huge_page_for_fails_and_the_server_lives() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB;
    let pool = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    let pages = std::fs::read_to_string(pool).ok();
    let huge = memfd_create("huge", flags);
    let (Ok(huge), Some("0")) = (huge, pages.as_deref().map(str::trim)) else {
        println!("skipped: this host has no pages of 1 GiB, or has some to give");
        return;
    };
    ftruncate(&huge, 1 << 30).unwrap();
    let (_served, mut raw, dma) = served();
    map(&mut raw, CUT, &huge);
    let failed = Err(DmaError::Failed { address: CUT + 8 });
    assert_eq!(read(&*dma, CUT + 8), (failed, Some(0)));
    unmap(&mut raw, CUT);
    assert_eq!(raw.errno(GET_INFO, &words(&[16, 0, 0, 0]), &[]), 0);
}

#[test]
fn a_part_of_a_huge_page_leaves_no_mapping_behind() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let Ok(huge) = memfd_create("only-a-part", flags) else {
        println!("skipped: this host has no pages of 2 MiB");
        return;
    };
    ftruncate(&huge, 4 << 20).unwrap();
    let (_served, mut raw, dma) = served();
    let mappings = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.matches("/memfd:only-a-part").count()
    };
    map(&mut raw, CUT, &huge);
    assert_eq!(mappings(), 1);
    let beyond = CUT + SIZE;
    let unmapped = Err(DmaError::Unmapped {
        address: beyond,
        len: 8,
    });
    assert_eq!(read(&*dma, beyond), (unmapped, None));
    unmap(&mut raw, CUT);
    assert_eq!(mappings(), 0);
}

#[test]
fn ten_thousand_maps_leave_the_table_of_guarded_ones_empty() {
    if !is_alone("truncated::ten_thousand_maps_leave_the_table_of_guarded_ones_empty") {
        return;
    }
    let (served, mut raw, dma) = served();
    let ram = memfd(SIZE);
    for round in 0..10_000 {
        map(&mut raw, CUT, &ram);
        if round % 100 == 0 {
            assert_eq!(guarded::count(), 1);
            ftruncate(&ram, 0).unwrap();
            assert!(read(&*dma, CUT).0.is_err());
            ftruncate(&ram, SIZE).unwrap();
        }
        unmap(&mut raw, CUT);
    }
    assert_eq!(guarded::count(), 0);
    for index in 0..300 {
        map(&mut raw, CUT + index * SIZE, &ram);
    }
    assert_eq!(guarded::count(), 1, "a file is mapped once");
    for index in 300..600 {
        map(&mut raw, CUT + index * SIZE, &memfd(SIZE));
    }
    assert_eq!(guarded::count(), 301);
    drop(raw);
    served.probe.wait_detached();
    let since = Instant::now();
    while guarded::count() > 0 {
        assert!(since.elapsed() < LIMIT);
    }
}
