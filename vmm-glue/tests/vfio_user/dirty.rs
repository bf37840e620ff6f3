//! Which pages the device wrote (specification, `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`, `_STOP`, `_REPORT`; the bitmap
//! of `VFIO_USER_DMA_UNMAP` is that of older revisions and libvfio-user).

use std::os::fd::AsFd as _;

use numagpu_devices::bus::{DmaAccess, DmaPort};
use vm_memory::Bytes as _;

use crate::device::{Served, serve};
use crate::raw::*;

const EINVAL: u32 = 22;
const E2BIG: u32 = 7;
const ENOTTY: u32 = 25;
const ENOENT: u32 = 2;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;
const START: u32 = 6;
const STOP: u32 = 7;
const REPORT: u32 = 8;

pub const PAGE: u64 = 4096;
const ROOM: usize = 1 << 20;

fn start_data(page: u64, ranges: &[(u64, u64)]) -> Vec<u8> {
    let count = u32::try_from(ranges.len()).unwrap();
    let ranges = ranges.iter().flat_map(|range| longs(&[range.0, range.1]));
    [longs(&[page]), words(&[count, 0]), ranges.collect()].concat()
}

pub fn start(raw: &mut Raw, page: u64, ranges: &[(u64, u64)]) -> u32 {
    let body = feature_body(ROOM, SET | START, &start_data(page, ranges));
    raw.errno(FEATURE, &body, &[])
}

fn report_body(address: u64, length: u64, page: u64) -> Vec<u8> {
    feature_body(ROOM, GET | REPORT, &longs(&[address, length, page]))
}

/// The words of a bitmap.
pub fn report(raw: &mut Raw, address: u64, length: u64, page: u64) -> Vec<u64> {
    let answer = raw.ask(FEATURE, &report_body(address, length, page), &[]);
    assert_eq!(answer.errno, 0);
    let bits = length.div_ceil(page).div_ceil(64) * 8;
    let size = u32::try_from(8 + 24 + bits).unwrap();
    let (fixed, bitmap) = answer.body.split_at(32);
    let head = [
        words(&[size, GET | REPORT]),
        longs(&[address, length, page]),
    ];
    assert_eq!(fixed, head.concat());
    assert_eq!(bitmap.len() as u64, bits);
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
    bitmap.chunks(8).map(word).collect()
}

fn write(dma: &dyn DmaPort, address: u64, len: u64) {
    dma.access(address, len, DmaAccess::Write, &mut |piece| {
        piece.write_slice(&vec![1; piece.len()], 0).unwrap();
    })
    .unwrap();
}

/// 16 pages of a file at 1 MiB, 16 read-only ones behind them.
fn mapped() -> (Served, Raw) {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(32 * PAGE);
    for (flags, offset) in [(3, 0), (1, 16 * PAGE)] {
        let body = map_body(flags, offset, (1 << 20) + offset, 16 * PAGE);
        assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
    }
    (served, raw)
}

#[test]
fn each_written_page_is_reported_once() {
    let (served, mut raw) = mapped();
    let dma = served.probe.attachment().dma;
    let at = 1 << 20;
    write(&*dma, at + 9 * PAGE, 1);
    assert_eq!(start(&mut raw, PAGE, &[(at, 16 * PAGE)]), 0);
    assert_eq!(
        report(&mut raw, at, 16 * PAGE, PAGE),
        [0],
        "before the start"
    );
    write(&*dma, at + 2 * PAGE - 1, 2);
    dma.access(at, PAGE, DmaAccess::Read, &mut |_| {}).unwrap();
    dma.access(at + 5 * PAGE, 8, DmaAccess::Change, &mut |_| {})
        .unwrap();
    dma.copy(at, at + 7 * PAGE + 1, PAGE).unwrap();
    assert_eq!(report(&mut raw, at, 16 * PAGE, PAGE), [0b1_1010_0110]);
    assert_eq!(report(&mut raw, at, 16 * PAGE, PAGE), [0]);
    write(&*dma, at + 3 * PAGE, 1);
    // Other units: two pages to a bit, eight bits to a page; a part of a page leaves it written.
    assert_eq!(report(&mut raw, at + 3 * PAGE, 512, 512), [1]);
    assert_eq!(report(&mut raw, at, 16 * PAGE, 2 * PAGE), [0b10]);
    assert_eq!(report(&mut raw, at, 16 * PAGE, PAGE), [0]);
    write(&*dma, at + 3 * PAGE, 1);
    assert_eq!(report(&mut raw, at + 2 * PAGE, 2 * PAGE, 512), [0xff00]);
    // What is not logged is clean.
    assert_eq!(report(&mut raw, 1 << 40, 65 * PAGE, PAGE), [0, 0]);
}

/// "A value of zero indicates that all writes should be logged."
#[test]
fn no_ranges_are_all_maps_those_to_come_too() {
    let (served, mut raw) = mapped();
    let dma = served.probe.attachment().dma;
    assert_eq!(start(&mut raw, 1, &[]), 0);
    let ram = memfd(PAGE);
    let body = map_body(3, 0, 1 << 32, PAGE);
    assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
    write(&*dma, 1 << 20, 1);
    write(&*dma, (1 << 32) + 5, 1);
    assert_eq!(report(&mut raw, 1 << 20, 32 * PAGE, PAGE), [1]);
    assert_eq!(report(&mut raw, 1 << 32, PAGE, PAGE), [1]);
    assert_eq!(report(&mut raw, 1 << 32, PAGE, PAGE), [0]);
}

/// "On output the device will return the page size it selected"; the reply to a start is the request otherwise.
#[test]
fn starts_and_stops_are_answered_with_their_request() {
    let (served, mut raw) = mapped();
    let data = start_data(512, &[(0x10_0000, 0x1000), (0x20_0000, 0x1000)]);
    let body = feature_body(100, SET | START, &data);
    let answer = raw.ask(FEATURE, &body, &[]);
    let mut want = body.clone();
    want[8..16].copy_from_slice(&PAGE.to_ne_bytes());
    assert_eq!((answer.errno, answer.body), (0, want));
    assert_eq!(raw.errno(FEATURE, &body, &[]), 0, "the same again");
    assert_eq!(start(&mut raw, PAGE, &[(0, PAGE)]), EINVAL, "others");
    let dma = served.probe.attachment().dma;
    write(&*dma, 0x10_0000, 1);
    // All of it, also what is not used.
    let longer = feature_body(body.len() + 5, SET | START, &[&data[..], &[1; 5]].concat());
    let answer = raw.ask(FEATURE, &longer, &[]);
    assert_eq!((answer.errno, answer.body.len()), (0, longer.len()));
    assert_eq!(answer.body[body.len()..], [1; 5]);
    let cramped = feature_body(body.len() + 4, SET | START, &longer[8..]);
    assert_eq!(raw.errno(FEATURE, &cramped, &[]), EINVAL);
    let stop = feature_body(8, SET | STOP, &[]);
    for _ in 0..2 {
        let answer = raw.ask(FEATURE, &stop, &[]);
        assert_eq!((answer.errno, answer.body), (0, stop.clone()));
        let refused = raw.errno(FEATURE, &report_body(0x10_0000, PAGE, PAGE), &[]);
        assert_eq!(refused, EINVAL);
    }
    assert_eq!(start(&mut raw, PAGE, &[(0x10_0000, PAGE)]), 0);
    assert_eq!(report(&mut raw, 0x10_0000, PAGE, PAGE), [0], "forgotten");
}

#[test]
fn memory_that_the_client_is_asked_for_is_logged_too() {
    let (served, mut raw) = mapped();
    let dma = served.probe.attachment().dma;
    assert_eq!(raw.errno(DMA_MAP, &map_body(3, 0, 0, 4 * PAGE), &[]), 0);
    assert_eq!(start(&mut raw, PAGE, &[]), 0);
    std::thread::scope(|scope| {
        let written = scope.spawn(|| write(&*dma, PAGE, 8));
        let asked = raw.answer();
        assert_eq!(asked.command, DMA_WRITE);
        let reply = framed(asked.id, DMA_WRITE, 32, REPLY, &asked.body[..16]);
        raw.send(&reply, &[]);
        written.join().unwrap();
    });
    assert_eq!(report(&mut raw, 0, 4 * PAGE, PAGE), [0b10]);
}

#[test]
fn nonsense_is_refused_and_bitmaps_are_bounded() {
    let (_served, mut raw) = mapped();
    assert_eq!(start(&mut raw, 3000, &[]), EINVAL);
    assert_eq!(start(&mut raw, PAGE, &[(0, 0)]), EINVAL);
    assert_eq!(start(&mut raw, PAGE, &[(0, PAGE), (0, 1)]), EINVAL);
    assert_eq!(start(&mut raw, PAGE, &[(u64::MAX, 2)]), EINVAL);
    assert_eq!(start(&mut raw, PAGE, &[(0, 1 << 50)]), E2BIG);
    let many: Vec<_> = (0..257).map(|n| (n * PAGE, PAGE)).collect();
    assert_eq!(start(&mut raw, PAGE, &many), E2BIG);
    let mut short = start_data(PAGE, &[(0, PAGE)]);
    short.pop();
    let short = feature_body(ROOM, SET | START, &short);
    assert_eq!(raw.errno(FEATURE, &short, &[]), EINVAL);
    let mut counted = start_data(PAGE, &[]);
    counted[8..12].copy_from_slice(&u32::MAX.to_ne_bytes());
    let counted = feature_body(ROOM, SET | START, &counted);
    assert_eq!(raw.errno(FEATURE, &counted, &[]), EINVAL);
    let cramped = feature_body(24, SET | START, &start_data(PAGE, &[(0, PAGE)]));
    assert_eq!(raw.errno(FEATURE, &cramped, &[]), EINVAL);
    assert_eq!(start(&mut raw, PAGE, &[]), 0);
    for (address, length, page, errno) in [
        (0, 0, PAGE, EINVAL),
        (0, PAGE, 0, EINVAL),
        (0, PAGE, 3, EINVAL),
        (!0, 2, PAGE, EINVAL),
        (0, u64::MAX, PAGE, E2BIG),
        (0, u64::MAX, 1, E2BIG),
    ] {
        let body = report_body(address, length, page);
        assert_eq!(
            raw.errno(FEATURE, &body, &[]),
            errno,
            "{length:#x} {page:#x}"
        );
    }
    let cramped = feature_body(39, GET | REPORT, &longs(&[0, PAGE, PAGE]));
    assert_eq!(raw.errno(FEATURE, &cramped, &[]), EINVAL);
    // The largest bitmap that a reply takes.
    let most = (8 * PAGE) << 20;
    let body = feature_body(ROOM + 32, GET | REPORT, &longs(&[0, most, PAGE]));
    assert_eq!(raw.ask(FEATURE, &body, &[]).body.len(), 32 + ROOM);
}

/// "The probe will only return success if all of the indicated methods are supported" (`VFIO_USER_DEVICE_FEATURE`).
#[test]
fn features_are_probed_by_what_they_can_do() {
    let (_served, mut raw) = mapped();
    let can = [(START, SET), (STOP, SET), (REPORT, GET)];
    for index in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0xffff] {
        let methods = can.iter().find(|it| it.0 == index).map(|it| it.1);
        for asked in [0, GET, SET, GET | SET] {
            let body = feature_body(8, PROBE | asked | index, &[]);
            let answer = raw.ask(FEATURE, &body, &[]);
            let want = match methods {
                None => ENOTTY,
                Some(methods) if asked & !methods != 0 => EINVAL,
                Some(_) => 0,
            };
            assert_eq!(answer.errno, want, "{index} {asked:#x}");
            if want == 0 {
                assert_eq!(answer.body, body);
            }
        }
    }
    for flags in [START, GET | START, REPORT, SET | REPORT, GET | SET | STOP] {
        let body = feature_body(ROOM, flags, &[0; 64]);
        assert_eq!(raw.errno(FEATURE, &body, &[]), EINVAL, "{flags:#x}");
    }
    // "The reply payload must be the same as the request payload", and `argsz` is the most that it has.
    let body = feature_body(13, PROBE | START, &[1; 5]);
    assert_eq!(raw.ask(FEATURE, &body, &[]).body, body);
    let body = feature_body(12, PROBE | START, &[1; 5]);
    assert_eq!(raw.errno(FEATURE, &body, &[]), EINVAL);
    let unknown = feature_body(ROOM, 1 << 19 | SET | STOP, &[]);
    assert_eq!(raw.errno(FEATURE, &unknown, &[]), EINVAL);
    assert_eq!(
        raw.errno(FEATURE, &feature_body(7, SET | STOP, &[]), &[]),
        EINVAL
    );
    assert_eq!(raw.errno(FEATURE, &[0; 7], &[]), EINVAL);
    let long = feature_body(ROOM, SET | STOP, &[0; 16_000]);
    assert_eq!(raw.errno(FEATURE, &long, &[]), EINVAL);
}

#[test]
fn an_unmap_can_bring_the_bitmap_of_what_it_unmaps() {
    let (served, mut raw) = mapped();
    let dma = served.probe.attachment().dma;
    let at = 1 << 20;
    let body = |room: u32, flags, address, size, bitmap: &[u64]| {
        let head = [words(&[room, flags]), longs(&[address, size])].concat();
        [head, longs(bitmap)].concat()
    };
    let mut errno = |room, address, size, bitmap: &[u64]| {
        raw.errno(DMA_UNMAP, &body(room, 1, address, size, bitmap), &[])
    };
    assert_eq!(errno(48, at, 16 * PAGE, &[PAGE, 8]), EINVAL, "not logged");
    assert_eq!(start(&mut raw, PAGE, &[]), 0);
    let mut errno = |room, address, size, bitmap: &[u64]| {
        raw.errno(DMA_UNMAP, &body(room, 1, address, size, bitmap), &[])
    };
    assert_eq!(errno(48, at, 16 * PAGE, &[]), EINVAL, "no bitmap");
    assert_eq!(errno(47, at, 16 * PAGE, &[PAGE, 8]), EINVAL, "no room");
    assert_eq!(errno(48, at, 16 * PAGE, &[PAGE, 16]), EINVAL);
    assert_eq!(errno(48, at, 16 * PAGE, &[PAGE, u64::MAX - 7]), EINVAL);
    assert_eq!(errno(48, at, 16 * PAGE, &[100, 8]), EINVAL);
    assert_eq!(errno(48, at, 8 * PAGE, &[PAGE, 8]), ENOENT);
    let both = raw.errno(DMA_UNMAP, &body(48, 3, 0, 0, &[PAGE, 8]), &[]);
    assert_eq!(both, EINVAL);
    write(&*dma, at + 4 * PAGE, 2 * PAGE);
    let request = body(48, 1, at, 16 * PAGE, &[PAGE, 8]);
    let answer = raw.ask(DMA_UNMAP, &request, &[]);
    assert_eq!(answer.errno, 0);
    assert_eq!(answer.body, [request, longs(&[0b11_0000])].concat());
    let gone = dma.access(at, 1, DmaAccess::Read, &mut |_| panic!("called"));
    assert!(gone.is_err());
}
