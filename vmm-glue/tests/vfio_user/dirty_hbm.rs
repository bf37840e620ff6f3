//! Which pages of HBM the engines wrote, past the client's maps, as its log has them.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use numagpu_devices::bus::HbmStore as _;
use numagpu_devices::spec::regs::{OwnerCommand, OwnerResult};
use numagpu_devices::spec::sdma::{
    AtomicOp, atomic, const_fill, copy_linear, fence, timestamp_get,
};
use numagpu_devices::{Fabric, GpuConfig, LinkConfig, PartitionConfig};
use numagpu_vmm_glue::hbm::HbmBacking;

use crate::aperture::{self, BASE, DATA, Driver, MIB, PART, RAM, Served};
use crate::dirty::{PAGE, report, start};
use crate::raw::*;

/// HBM of the second GPU.
const PEER: u64 = BASE + 0x1_0000_0000;
/// Where the client shows the second half of the first partition and the first half of the second once more.
const ALIAS: u64 = 0x200_0000_0000;
/// Where it shows the first page, for reading only.
const READ_ONLY: u64 = 0x300_0000_0000;
/// Pages of a partition.
const PART_PAGES: u64 = PART / PAGE;
const HALF: u64 = PART / 2;

/// A GPU, and its HBM's file as a VMM gives it to its guest.
type Gpu = (Served, OwnedFd);

/// Two GPUs with a link between them, whose HBM is memory of the machine.
fn serve() -> [Gpu; 2] {
    let fabric = Fabric::new();
    [(0, BASE), (1, PEER)].map(|(index, base)| {
        let hbm = Arc::new(HbmBacking::memfd("hbm", 2 * PART).unwrap());
        let parts = hbm.split(&[PART, PART]).unwrap();
        let file = parts.first().and_then(|part| part.file());
        let file = file.unwrap().try_clone_to_owned().unwrap();
        let bases = (0..).map(|part| base + part * PART);
        let partitions = bases.zip(parts).map(|(base, part)| PartitionConfig {
            base,
            size: PART,
            pxm: Some(4),
            store: Arc::new(part),
        });
        let config = GpuConfig {
            hive_id: 7,
            node_id: index,
            hive_size: 2,
            links: vec![LinkConfig {
                peer: Some(1 - index),
                width: 1,
                bandwidth_mbs: 1000,
                latency_ns: 100,
            }],
            boot_delay: Duration::ZERO,
            ..GpuConfig::new(index, partitions.collect())
        };
        (Served::new(hbm, config, Arc::clone(&fabric)), file)
    })
}

/// A VMM as QEMU is: it shows all memory to every device.
fn connect(gpus: &[Gpu; 2], index: usize) -> Driver {
    let mut driver = Driver {
        raw: Raw::ready(&gpus[index].0.path()),
        ram: memfd(0x1_0000),
        write_pointer: 0,
    };
    let file = |gpu: usize| gpus[gpu].1.as_fd();
    let ram = driver.ram.try_clone().unwrap();
    for (flags, offset, address, size, file) in [
        (3, 0, RAM, 0x1_0000, ram.as_fd()),
        (3, 0, BASE, PART, file(0)),
        (3, PART, BASE + PART, PART, file(0)),
        (3, 0, PEER, 2 * PART, file(1)),
        (3, HALF, ALIAS, PART, file(0)),
        (1, 0, READ_ONLY, PAGE, file(0)),
    ] {
        let body = map_body(flags, offset, address, size);
        assert_eq!(driver.raw.errno(DMA_MAP, &body, &[file]), 0);
    }
    driver.start();
    driver
}

/// First addresses of the pages that are reported in a range.
fn pages(driver: &mut Driver, address: u64, len: u64) -> Vec<u64> {
    let words = report(&mut driver.raw, address, len, PAGE);
    let words = (0..).zip(words);
    let pages = words.flat_map(|(at, word): (u64, u64)| {
        let set = (0..64).filter(move |bit| word & (1 << bit) != 0);
        set.map(move |bit| address + (64 * at + bit) * PAGE)
    });
    pages.collect()
}

/// All that is reported, of everything that is mapped but the ring and its neighbourhood.
fn all(driver: &mut Driver) -> Vec<u64> {
    let ranges = [
        (BASE, 2 * PART),
        (PEER, 2 * PART),
        (ALIAS, PART),
        (READ_ONLY, PAGE),
    ];
    let ranges = ranges.into_iter();
    ranges
        .flat_map(|(at, len)| pages(driver, at, len))
        .collect()
}

/// What is to be reported of a write to the HBM of GPU 0.
fn shown(offset: u64, len: u64) -> Vec<u64> {
    let inside = |first: u64, end: u64, address: u64| {
        let pages = (offset / PAGE..=(offset + len - 1) / PAGE).map(|page| page * PAGE);
        let pages = pages.filter(move |at| (first..end).contains(at));
        pages.map(move |at| address + (at - first))
    };
    inside(0, 2 * PART, BASE)
        .chain(inside(HALF, HALF + PART, ALIAS))
        .chain(inside(0, PAGE, READ_ONLY))
        .collect()
}

fn run(driver: &mut Driver, packet: &[u32]) {
    driver.begin(packet);
    driver.end_copy();
}

#[test]
fn each_kind_of_packet_marks_its_pages_wherever_they_are_mapped() {
    let gpus = serve();
    let mut driver = connect(&gpus, 0);
    run(&mut driver, &const_fill(BASE + 0x5000, 1, 0x1000));
    assert_eq!(start(&mut driver.raw, PAGE, &[]), 0);
    assert!(all(&mut driver).is_empty(), "before the start");
    let at = |offset| BASE + offset;
    let long = 3 * HALF - 0x1000;
    for (packet, offset, len) in [
        (&const_fill(at(0x1ffc), 1, 8)[..], 0x1ffc, 8),
        (&const_fill(at(0x3000), 1, long), 0x3000, long),
        (&copy_linear(DATA, at(HALF - 1), 2), HALF - 1, 2),
        // Across the border of the partitions, which are maps of their own; then from its end to its start.
        (&copy_linear(DATA, at(PART - 9), 0x1000), PART - 9, 0x1000),
        (&copy_linear(at(0x800), at(0x900), long), 0x900, long),
        (&fence(at(PART + HALF - 4), 1), PART + HALF - 4, 4),
        (&fence(at(PART + HALF), 1), PART + HALF, 4),
        (&timestamp_get(at(0)), 0, 8),
        (&atomic(at(0xff8), AtomicOp::Add, true, 1, 0), 0xff8, 8),
        (&atomic(at(PART), AtomicOp::Swap, false, 1, 0), PART, 4),
    ] {
        run(&mut driver, packet);
        assert_eq!(all(&mut driver), shown(offset, len), "{packet:x?}");
        assert!(all(&mut driver).is_empty(), "{packet:x?}: once");
    }
    run(&mut driver, &copy_linear(at(HALF), DATA, 0x2000));
    assert!(all(&mut driver).is_empty(), "it was only read");
    let ram: Vec<_> = [DATA, DATA + PAGE].into();
    assert_eq!(pages(&mut driver, DATA, 0x4000), ram);
}

#[test]
fn a_peers_hbm_is_in_the_log_of_the_gpu_that_writes() {
    let gpus = serve();
    let (mut writer, mut owner) = (connect(&gpus, 0), connect(&gpus, 1));
    for driver in [&mut writer, &mut owner] {
        assert_eq!(start(&mut driver.raw, PAGE, &[]), 0);
    }
    run(&mut writer, &copy_linear(BASE, PEER + PART - 1, 2));
    let both = [PEER + PART - PAGE, PEER + PART];
    assert_eq!(all(&mut writer), both);
    assert!(all(&mut owner).is_empty());
    // The other way round, and its own.
    run(&mut owner, &fence(BASE + HALF, 3));
    run(&mut owner, &fence(PEER, 3));
    assert_eq!(all(&mut owner), [BASE + HALF, PEER, ALIAS]);
    assert!(all(&mut writer).is_empty());
}

#[test]
fn a_release_marks_all_that_it_clears() {
    let gpus = serve();
    let mut driver = connect(&gpus, 0);
    assert_eq!(start(&mut driver.raw, PAGE, &[]), 0);
    let released = driver.command(1, OwnerCommand::Release);
    assert_eq!(released, Some(OwnerResult::Ok));
    driver.wait_free(1);
    let cleared = all(&mut driver);
    assert_eq!(cleared.len() as u64, PART_PAGES + PART_PAGES / 2);
    assert_eq!(cleared, shown(PART, PART));
    // So does a reset, of both.
    assert_eq!(driver.raw.errno(RESET, &[], &[]), 0);
    driver.wait_free(0);
    driver.wait_free(1);
    assert_eq!(all(&mut driver), shown(0, PART));
}

#[test]
fn only_ranges_asked_for_and_maps_that_are_there_have_marks() {
    let gpus = serve();
    let mut driver = connect(&gpus, 0);
    let asked = [(ALIAS + PAGE, 2 * PAGE), (BASE, PAGE)];
    assert_eq!(start(&mut driver.raw, PAGE, &asked), 0);
    run(&mut driver, &const_fill(BASE, 1, PART));
    let want = [BASE, ALIAS + PAGE, ALIAS + 2 * PAGE];
    assert_eq!(all(&mut driver), want);
    run(&mut driver, &const_fill(BASE, 1, PART));
    // The unmap of a map brings its own; what is written later is not shown there any more.
    let room = words(&[4096, 1]);
    let body = [room, longs(&[ALIAS, PART, PAGE, PART_PAGES / 8])].concat();
    let answer = driver.raw.ask(DMA_UNMAP, &body, &[]);
    assert_eq!(answer.errno, 0);
    let (bitmap, rest) = answer.body[40..].split_first().unwrap();
    assert_eq!((*bitmap, rest.iter().max()), (0b110, Some(&0)));
    run(&mut driver, &const_fill(BASE, 1, PART));
    assert_eq!(all(&mut driver), [BASE]);
    // Mapped again, with another place of the file.
    let map = map_body(3, PART, ALIAS, PART);
    assert_eq!(driver.raw.errno(DMA_MAP, &map, &[gpus[0].1.as_fd()]), 0);
    run(&mut driver, &fence(BASE + PART + 2 * PAGE, 1));
    run(&mut driver, &fence(BASE + HALF + PAGE, 1));
    assert_eq!(all(&mut driver), [ALIAS + 2 * PAGE]);
}

/// As QEMU shows it: the BAR's memory at the BAR's address, without a descriptor.
#[test]
fn an_aperture_that_is_mapped_back_has_marks_too() {
    let served = aperture::serve(8 * MIB);
    let mut driver = Driver::new(&served);
    let bar = 0x38_0000_0000_u64;
    driver.write(7, 0x20, &bar.to_le_bytes());
    // A part of it, so that its offset in the file counts.
    let map = map_body(3, 0, bar + MIB, PART);
    assert_eq!(driver.raw.errno(DMA_MAP, &map, &[]), 0);
    assert_eq!(start(&mut driver.raw, PAGE, &[]), 0);
    run(&mut driver, &fence(BASE + MIB, 1));
    run(&mut driver, &fence(BASE + PART, 1));
    run(&mut driver, &fence(BASE + MIB + PART, 1));
    assert_eq!(pages(&mut driver, bar, 8 * MIB), [bar + MIB, bar + PART]);
}
