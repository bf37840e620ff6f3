//! The client's memory map, and HBM as both sides see it.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use numagpu_devices::bus::{DmaAccess, DmaError, HbmStore as _, Mapped};
use numagpu_vmm_glue::hbm::HbmBacking;
use vm_memory::{Bytes as _, FileOffset, MmapRegion, VolatileMemory as _};

use crate::device::serve;
use crate::raw::*;

const EINVAL: u32 = 22;
const EEXIST: u32 = 17;
const ENOENT: u32 = 2;
const EACCES: u32 = 13;

#[test]
fn maps_are_checked_against_each_other_and_their_file() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(0x4000);
    let mut map = |flags, offset, address, size| {
        raw.errno(
            DMA_MAP,
            &map_body(flags, offset, address, size),
            &[ram.as_fd()],
        )
    };
    assert_eq!(map(3, 0, 0x10_000, 0x2000), 0);
    assert_eq!(map(3, 0, 0x10_000, 0x2000), 0, "the same again");
    for (flags, offset, address, size) in [
        (1, 0, 0x10_000, 0x2000),
        (3, 0x1000, 0x10_000, 0x2000),
        (3, 0, 0x10_000, 0x1000),
        (3, 0, 0x11_000, 0x1000),
        (3, 0, 0xf_000, 0x2000),
        (3, 0, 0xf_000, 0x4000),
    ] {
        assert_eq!(map(flags, offset, address, size), EEXIST);
    }
    assert_eq!(map(3, 0x1000, 0x20_000, 0x4000), EINVAL, "short file");
    assert_eq!(map(3, 0x5000, 0x20_000, 0x1000), EINVAL, "past the file");
    assert_eq!(map(3, 0x10, 0x20_000, 0x1000), EINVAL, "odd offset");
    assert_eq!(map(3, 0, 0xf_000, 0x1000), 0, "just below");
    assert_eq!(map(3, 0x2000, 0x12_000, 0x1000), 0, "just above");
    assert_eq!(map(3, 0, !0xfff, 0x1000), 0, "the very last page");

    let other = memfd(0x4000);
    let same = map_body(3, 0, 0x10_000, 0x2000);
    assert_eq!(raw.errno(DMA_MAP, &same, &[other.as_fd()]), EEXIST);
    assert_eq!(raw.errno(DMA_MAP, &same, &[]), EEXIST);
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let fresh = map_body(3, 0, 0x30_000, 0x1000);
    assert_eq!(raw.errno(DMA_MAP, &fresh, &[pipe.as_fd()]), EINVAL);

    let mut unmap = |address, size| raw.errno(DMA_UNMAP, &unmap_body(0, address, size), &[]);
    assert_eq!(unmap(0x10_000, 0x1000), ENOENT);
    assert_eq!(unmap(0x11_000, 0x1000), ENOENT);
    assert_eq!(unmap(0x10_000, 0x2000), 0);
    assert_eq!(unmap(0x10_000, 0x2000), ENOENT);
    assert_eq!(unmap(0, 0), ENOENT);
    // A range takes all maps that lie in it, and none if one lies in it only in part.
    assert_eq!(unmap(0xe_000, 0x3800), 0);
    assert_eq!(unmap(0xf_000, 0x1000), ENOENT);
    assert_eq!(unmap(0x11_000, 0x1800), ENOENT);
    assert_eq!(unmap(0, u64::MAX), ENOENT);
    assert_eq!(unmap(0x11_000, 0x11_000_u64.wrapping_neg()), 0);
    assert_eq!(unmap(0x12_000, 0x1000), ENOENT);
    assert_eq!(unmap(!0xfff, 0x1000), ENOENT);
}

#[test]
fn copies_go_from_map_to_map_as_memmove_does() {
    const SIZE: usize = 0x3000;
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(0x4000);
    let fds = [ram.as_fd()];
    // Neighbours in another order than in the file, and one that is read-only.
    for (flags, offset, address) in [
        (3, 0x2000, 0x1000),
        (3, 0, 0x2000),
        (3, 0x1000, 0x3000),
        (1, 0x3000, 0x4000),
    ] {
        let body = map_body(flags, offset, address, 0x1000);
        assert_eq!(raw.errno(DMA_MAP, &body, &fds), 0);
    }
    let dma = served.probe.attachment().dma;
    let mut model: Vec<u8> = (0..SIZE)
        .map(|i| ((i * 7 + i / 251) % 256).try_into().unwrap())
        .collect();
    let mut at = 0;
    dma.access(0x1000, SIZE as u64, DmaAccess::Write, &mut |slice| {
        slice.write_slice(&model[at..at + slice.len()], 0).unwrap();
        at += slice.len();
    })
    .unwrap();
    let cases = [
        (0, 0x1000, 0x1000),
        (0xff1, 0x1003, 0x1fed),
        (0x1003, 0xff1, 0x1fed),
        (1, 0, SIZE - 1),
        (0, 1, SIZE - 1),
        (0x800, 0, 0x1900),
        (0, 0x700, 0x2801),
        (5, 5, 100),
        (0x2fff, 0, 1),
    ];
    for (source, destination, len) in cases {
        let (from, to) = (0x1000 + source as u64, 0x1000 + destination as u64);
        dma.copy(from, to, len as u64).unwrap();
        model.copy_within(source..source + len, destination);
        let mut seen = Vec::new();
        dma.access(0x1000, SIZE as u64, DmaAccess::Read, &mut |slice| {
            let start = seen.len();
            seen.resize(start + slice.len(), 0);
            slice.read_slice(&mut seen[start..], 0).unwrap();
        })
        .unwrap();
        let wrong = seen.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{source:#x} to {destination:#x}, {len:#x}");
    }
    let refused = |source, destination, len| dma.copy(source, destination, len).unwrap_err();
    let unmapped = |address, len| DmaError::Unmapped { address, len };
    assert_eq!(refused(0xff0, 0x2000, 0x20), unmapped(0xff0, 0x20));
    assert_eq!(refused(0x1000, 0x5000, 8), unmapped(0x5000, 8));
    assert_eq!(refused(0x1000, u64::MAX, 2), unmapped(u64::MAX, 2));
    let read_only = DmaError::ReadOnly { address: 0x3ff8 };
    assert_eq!(refused(0x1000, 0x3ff8, 16), read_only);
    dma.copy(0x4000, 0x1000, 0x1000).unwrap();
    dma.copy(0x9000, 0x9000, 0).unwrap();
}

#[test]
fn accesses_go_through_adjacent_maps_and_nowhere_else() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(0x4000);
    let fds = [ram.as_fd()];
    // Two neighbours in reverse order of the file, one read-only, one without a file.
    for (flags, offset, address) in [(3, 0x1000, 0x1000), (3, 0, 0x2000), (1, 0x2000, 0x3000)] {
        let body = map_body(flags, offset, address, 0x1000);
        assert_eq!(raw.errno(DMA_MAP, &body, &fds), 0);
    }
    assert_eq!(
        raw.errno(DMA_MAP, &map_body(1, 0x77, 0x4000, 0x1000), &[]),
        0
    );

    let dma = served.probe.attachment().dma;
    let mut pieces = Vec::new();
    dma.access(0x1ff0, 0x20, DmaAccess::Write, &mut |slice| {
        slice.write_obj(pieces.len() as u64 + 1, 0).unwrap();
        pieces.push(slice.len());
    })
    .unwrap();
    assert_eq!(pieces, [0x10, 0x10]);
    let word = |at| {
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::pread(&ram, &mut bytes, at), Ok(8));
        u64::from_ne_bytes(bytes)
    };
    assert_eq!((word(0x1ff0), word(0)), (1, 2));

    let refused = |address, len, access| {
        dma.access(address, len, access, &mut |_| panic!("called"))
            .unwrap_err()
    };
    let unmapped = |address, len| DmaError::Unmapped { address, len };
    assert_eq!(refused(0xfff, 2, DmaAccess::Read), unmapped(0xfff, 2));
    assert_eq!(refused(u64::MAX, 2, DmaAccess::Read), unmapped(u64::MAX, 2));
    assert_eq!(refused(0x4ff8, 16, DmaAccess::Read), unmapped(0x4ff8, 16));
    let read_only = DmaError::ReadOnly { address: 0x2ff8 };
    assert_eq!(refused(0x2ff8, 16, DmaAccess::Write), read_only);
    dma.access(0x1000, 0x3000, DmaAccess::Read, &mut |_| {})
        .unwrap();
    dma.access(0x9000, 0, DmaAccess::Read, &mut |_| panic!())
        .unwrap();

    assert_eq!(dma.mapped(0x5000, 1), Mapped::Nothing);
    assert_eq!(dma.mapped(0x4000, 0x1000), Mapped::NoFd);
    assert_eq!(dma.mapped(0x4800, 0x1000), Mapped::Partial);
    assert_eq!(dma.mapped(0x1800, 0x1000), Mapped::Partial);
    assert_eq!(dma.mapped(0, 0x1001), Mapped::Partial);
    assert!(matches!(
        dma.mapped(0x3800, 8),
        Mapped::File {
            offset: 0x2800,
            writable: false,
            ..
        }
    ));

    assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(2, 0, 0), &[]), 0);
    assert_eq!(dma.mapped(0x1000, 1), Mapped::Nothing);
    drop(raw);
    served.probe.wait_detached();
    let gone = dma.access(0x1000, 1, DmaAccess::Read, &mut |_| panic!());
    assert_eq!(gone, Err(DmaError::Disconnected));
}

/// An IOMMU in front of the device maps page by page: what lies in the file as it lies in memory is one map all the same.
#[test]
fn maps_that_follow_each_other_in_their_file_count_as_one() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let (hbm, other) = (memfd(0x8000), memfd(0x8000));
    let dma = served.probe.attachment().dma;
    let mut map = |fd: &std::os::fd::OwnedFd, flags, offset, address| {
        let body = map_body(flags, offset, address, 0x1000);
        assert_eq!(raw.errno(DMA_MAP, &body, &[fd.as_fd()]), 0);
    };
    // From the last page to the first, so that every part of it is seen alone before.
    for page in (0..4).rev() {
        assert_eq!(
            dma.mapped(0x1_0000, 0x4000),
            match page {
                3 => Mapped::Nothing,
                _ => Mapped::Partial,
            }
        );
        map(&hbm, 3, 0x2000 + page * 0x1000, 0x1_0000 + page * 0x1000);
    }
    let shown = |address, len| match dma.mapped(address, len) {
        Mapped::File {
            offset, writable, ..
        } => Some((offset, writable)),
        _ => None,
    };
    assert_eq!(shown(0x1_0000, 0x4000), Some((0x2000, true)));
    assert_eq!(shown(0x1_0800, 0x3000), Some((0x2800, true)));
    assert_eq!(dma.mapped(0x1_0000, 0x4001), Mapped::Partial);
    assert_eq!(dma.mapped(0xffff, 0x4001), Mapped::Partial);
    // Neighbours that do not go on as the file does: read only, another file, another place, after a gap.
    map(&hbm, 1, 0x6000, 0x1_4000);
    map(&other, 3, 0x1000, 0xf000);
    map(&hbm, 3, 0, 0x2_0000);
    map(&hbm, 3, 0x2000, 0x2_1000);
    map(&hbm, 3, 0x1000, 0x2_3000);
    for (address, len) in [
        (0x1_0000, 0x5000),
        (0xf000, 0x5000),
        (0x2_0000, 0x2000),
        (0x2_1000, 0x3000),
    ] {
        assert_eq!(dma.mapped(address, len), Mapped::Partial, "{address:#x}");
    }
}

#[test]
fn a_file_opened_for_reading_takes_only_read_only_maps() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let path = served.dir.path().join("rom");
    std::fs::write(&path, [5; 0x1000]).unwrap();
    let rom = std::fs::File::open(&path).unwrap();
    let fds = [rom.as_fd()];
    let body = |flags| map_body(flags, 0, 0xc_0000, 0x1000);
    assert_eq!(raw.errno(DMA_MAP, &body(3), &fds), EACCES);
    assert_eq!(raw.errno(DMA_MAP, &body(1), &fds), 0);
}

#[test]
fn an_unmap_is_answered_only_when_no_access_uses_the_memory() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(0x2000);
    for page in 0..2 {
        let body = map_body(3, page << 12, page << 12, 0x1000);
        assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
    }
    let dma = served.probe.attachment().dma;
    let answered = AtomicBool::new(false);
    let hold = Duration::from_millis(150);
    let (go, started) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (raw, answered) = (&mut raw, &answered);
        scope.spawn(move || {
            started.recv().unwrap();
            assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(0, 0, 0x1000), &[]), 0);
            answered.store(true, Ordering::SeqCst);
        });
        dma.access(0, 8, DmaAccess::Read, &mut |slice| {
            go.send(()).unwrap();
            std::thread::sleep(hold);
            assert!(!answered.load(Ordering::SeqCst), "answered too early");
            // An access within an access neither waits for the unmap nor sees the map that goes.
            let inner = dma.access(0, 8, DmaAccess::Read, &mut |_| panic!());
            assert!(inner.is_err());
            dma.access(0x1000, 8, DmaAccess::Write, &mut |to| {
                slice.copy_to_volatile_slice(to);
            })
            .unwrap();
        })
        .unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(answered.load(Ordering::SeqCst), "answered too late");
    });
}

#[test]
fn hbm_is_one_memory_for_cpu_and_device() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let hbm = HbmBacking::memfd("gpu0.hbm0", 8 << 20).unwrap();
    // The VMM's mapping, by the descriptor that it was given.
    let fd = hbm.as_fd().try_clone_to_owned().unwrap();
    let cpu = MmapRegion::<()>::from_file(FileOffset::new(fd.into(), 0), 8 << 20).unwrap();
    let cpu = cpu.as_volatile_slice();
    let body = map_body(3, 0, 1 << 32, 8 << 20);
    assert_eq!(raw.errno(DMA_MAP, &body, &[hbm.as_fd()]), 0);

    let (id, offset) = hbm.backing();
    let expected = Mapped::File {
        id,
        offset,
        writable: true,
    };
    let dma = served.probe.attachment().dma;
    assert_eq!(dma.mapped(1 << 32, 8 << 20), expected);

    let pattern: Vec<u8> = (0..4096_u32).flat_map(u32::to_ne_bytes).collect();
    cpu.write_slice(&pattern, 0x12_3456).unwrap();
    let len = pattern.len() as u64;
    let mut seen = vec![0; pattern.len()];
    hbm.slice(0x12_3456, len)
        .unwrap()
        .read_slice(&mut seen, 0)
        .unwrap();
    assert_eq!(seen, pattern);

    hbm.slice(8, 8).unwrap().write_obj(0x5eed_u64, 0).unwrap();
    assert_eq!(cpu.read_obj::<u64>(8).unwrap(), 0x5eed);
    dma.access((1 << 32) + 8, 8, DmaAccess::Read, &mut |slice| {
        assert_eq!(slice.read_obj::<u64>(0).unwrap(), 0x5eed);
    })
    .unwrap();

    hbm.scrub(0, hbm.size()).unwrap();
    assert_eq!(cpu.read_obj::<u64>(8).unwrap(), 0);
    cpu.read_slice(&mut seen, 0x12_3456).unwrap();
    assert!(seen.iter().all(|byte| *byte == 0));
}
