//! Messages that no honest client sends: the right error or a clean end, and the server lives on.

use std::os::fd::AsFd as _;

use numagpu_vmm_glue::vfio_user::Limits;

use crate::device::{BAR0, is_alone, serve, serve_limited};
use crate::raw::*;

const EINVAL: u32 = 22;
const ENOENT: u32 = 2;
const EEXIST: u32 = 17;

/// What has to come back.
#[derive(Clone, Copy, Debug)]
pub enum Expect {
    /// This error, and the connection stays in step.
    Errno(u32),
    /// This error, then the end.
    ErrnoThenEnd(u32),
    /// No reply, and the connection stays in step.
    Silence,
    /// No reply, and the end.
    End,
    /// A success of so many bytes after the header.
    Success(usize),
}

pub fn table() -> Vec<(&'static str, Vec<u8>, Expect)> {
    use Expect::*;
    let ones = u32::MAX;
    let region = |index, offset, count| message(READ, &region_body(offset, index, count, &[]));
    let write = |index, offset, count, data: &[u8]| {
        message(WRITE, &region_body(offset, index, count, data))
    };
    let map =
        |flags, offset, address, size| message(DMA_MAP, &map_body(flags, offset, address, size));
    let irqs =
        |flags, index, start, count| message(SET_IRQS, &irqs_body(flags, index, start, count));
    let bools = |count: u32, data: &[u8]| {
        let head = words(&[count.saturating_add(20), 0x22, 2, 0, count]);
        message(SET_IRQS, &[&head, data].concat())
    };
    let multi =
        |count: u64, entries: &[u8]| message(WRITE_MULTI, &[&longs(&[count]), entries].concat());
    let quiet = |command, body: &[u8]| {
        framed(
            1,
            command,
            16 + u32::try_from(body.len()).unwrap(),
            NO_REPLY,
            body,
        )
    };
    let bar_end = BAR0;
    vec![
        ("size 0", framed(1, READ, 0, 0, &[]), ErrnoThenEnd(EINVAL)),
        ("size 15", framed(1, READ, 15, 0, &[]), ErrnoThenEnd(EINVAL)),
        (
            "size huge",
            framed(1, WRITE, ones, 0, &[]),
            ErrnoThenEnd(EINVAL),
        ),
        (
            "size 2 MiB",
            framed(1, WRITE, 2 << 20, 0, &[]),
            ErrnoThenEnd(EINVAL),
        ),
        ("quiet bad size", framed(1, WRITE, 3, NO_REPLY, &[]), End),
        ("bad size of a reply", framed(1, WRITE, 3, 1, &[]), End),
        ("command 0", message(0, &[]), Errno(EINVAL)),
        ("command 19", message(19, &[1; 100]), Errno(EINVAL)),
        ("command 0xffff", message(0xffff, &[]), Errno(EINVAL)),
        ("DMA_READ to a server", message(11, &[0; 16]), Errno(EINVAL)),
        (
            "DMA_WRITE to a server",
            message(12, &[0; 16]),
            Errno(EINVAL),
        ),
        ("DIRTY_PAGES", message(14, &[0; 8]), Errno(EINVAL)),
        ("DEVICE_FEATURE", message(FEATURE, &[0; 8]), Errno(EINVAL)),
        ("MIG_DATA_READ", message(MIG_READ, &[0; 8]), Errno(EINVAL)),
        (
            "MIG_DATA_WRITE",
            message(MIG_WRITE, &[0; 70_000]),
            Errno(EINVAL),
        ),
        ("type 2", framed(1, RESET, 16, 2, &[]), Errno(EINVAL)),
        ("a reply", framed(1, READ, 16, 1, &[]), Silence),
        (
            "a reply with an error",
            framed(1, READ, 16, 0x21, &[]),
            Silence,
        ),
        ("second VERSION", version(), Errno(EINVAL)),
        ("short map", message(DMA_MAP, &[0; 31]), Errno(EINVAL)),
        ("short unmap", message(DMA_UNMAP, &[0; 23]), Errno(EINVAL)),
        ("short info", message(GET_INFO, &[16; 15]), Errno(EINVAL)),
        (
            "info argsz",
            message(GET_INFO, &words(&[15, 0, 0, 0])),
            Errno(EINVAL),
        ),
        (
            "info",
            message(GET_INFO, &words(&[ones, 0, 0, 0])),
            Success(16),
        ),
        (
            "region argsz",
            message(REGION_INFO, &words(&[31, 0, 0, 0, 0, 0, 0, 0])),
            Errno(EINVAL),
        ),
        (
            "region 9",
            message(REGION_INFO, &words(&[32, 0, 9, 0, 0, 0, 0, 0])),
            Errno(EINVAL),
        ),
        (
            "region ones",
            message(REGION_INFO, &words(&[32, 0, ones, 0, 0, 0, 0, 0])),
            Errno(EINVAL),
        ),
        (
            "io fds",
            message(IO_FDS, &words(&[16, 0, 0, 0])),
            Success(16),
        ),
        (
            "io fds of 9",
            message(IO_FDS, &words(&[16, 0, 9, 0])),
            Errno(EINVAL),
        ),
        (
            "irq 3",
            message(IRQ_INFO, &words(&[16, 0, 3, 0])),
            Errno(EINVAL),
        ),
        (
            "irq ones",
            message(IRQ_INFO, &words(&[16, 0, ones, 0])),
            Errno(EINVAL),
        ),
        ("read short", message(READ, &[0; 15]), Errno(EINVAL)),
        ("read long", message(READ, &[0; 17]), Errno(EINVAL)),
        ("read region 9", region(9, 0, 4), Errno(EINVAL)),
        ("read region ones", region(ones, 0, 4), Errno(EINVAL)),
        ("read unused BAR", region(3, 0, 4), Errno(EINVAL)),
        ("read nothing", region(0, bar_end, 0), Success(16)),
        (
            "read past the end",
            region(0, bar_end - 3, 4),
            Errno(EINVAL),
        ),
        ("read that wraps", region(0, u64::MAX, 4), Errno(EINVAL)),
        (
            "read of config past the end",
            region(7, 4093, 4),
            Errno(EINVAL),
        ),
        (
            "read of the most",
            region(0, 0, 1 << 20),
            Success(16 + (1 << 20)),
        ),
        (
            "read of one more",
            region(0, 0, (1 << 20) + 1),
            Errno(EINVAL),
        ),
        ("read of ones", region(0, 0, ones), Errno(EINVAL)),
        (
            "write with less data",
            write(0, 0, 4, &[1; 3]),
            Errno(EINVAL),
        ),
        (
            "write with more data",
            write(0, 0, 4, &[1; 5]),
            Errno(EINVAL),
        ),
        ("write of ones", write(0, 0, ones, &[1; 4]), Errno(EINVAL)),
        (
            "write past the end",
            write(0, bar_end - 1, 2, &[1; 2]),
            Errno(EINVAL),
        ),
        ("write of nothing", write(0, 0, 0, &[]), Success(16)),
        ("multi of none", multi(0, &[]), Success(8)),
        ("multi with slack", multi(1, &[0; 480]), Success(8)),
        ("multi of ones", multi(u64::MAX, &[0; 24]), Errno(EINVAL)),
        ("multi with too few", multi(2, &[0; 47]), Errno(EINVAL)),
        (
            "multi of 9 bytes",
            multi(1, &region_body(0, 0, 9, &[0; 8])),
            Errno(EINVAL),
        ),
        (
            "multi past the end",
            multi(1, &region_body(bar_end, 0, 1, &[0; 8])),
            Errno(EINVAL),
        ),
        (
            "map argsz",
            message(DMA_MAP, &[words(&[31, 3]), longs(&[0, 0, 0x1000])].concat()),
            Errno(EINVAL),
        ),
        ("map of 0", map(3, 0, 0x1000, 0), Errno(EINVAL)),
        ("map that wraps", map(3, 0, !0xfff, 0x2000), Errno(EINVAL)),
        (
            "map with an offset that wraps",
            map(3, !0xfff, 0, 0x2000),
            Errno(EINVAL),
        ),
        ("map without access", map(0, 0, 0, 0x1000), Errno(EINVAL)),
        ("map of all", map(3, 0, 0, u64::MAX), Success(0)),
        ("map with odd flags", map(0x13, 0, 0, 0x1000), Errno(EINVAL)),
        (
            "unmap of nothing",
            message(DMA_UNMAP, &unmap_body(0, 0, 0x1000)),
            Errno(ENOENT),
        ),
        (
            "unmap argsz",
            message(DMA_UNMAP, &[words(&[23, 2]), longs(&[0, 0])].concat()),
            Errno(EINVAL),
        ),
        (
            "unmap with bitmap",
            message(DMA_UNMAP, &unmap_body(1, 0, 0x1000)),
            Errno(EINVAL),
        ),
        (
            "unmap all of a range",
            message(DMA_UNMAP, &unmap_body(2, 0, 0x1000)),
            Errno(EINVAL),
        ),
        (
            "unmap all",
            message(DMA_UNMAP, &unmap_body(2, 0, 0)),
            Success(24),
        ),
        (
            "unmap all, old flag",
            message(DMA_UNMAP, &unmap_body(4, 0, 0)),
            Success(24),
        ),
        ("irqs short", message(SET_IRQS, &[0; 19]), Errno(EINVAL)),
        (
            "irqs argsz",
            message(SET_IRQS, &words(&[19, 0x21, 2, 0, 0])),
            Errno(EINVAL),
        ),
        ("irqs bool of less", bools(4, &[0; 3]), Errno(EINVAL)),
        ("irqs bool of more", bools(4, &[0; 5]), Errno(EINVAL)),
        ("irqs bool", bools(4, &[0; 4]), Success(0)),
        ("irqs bool of ones", bools(ones, &[0; 4]), Errno(EINVAL)),
        ("irqs past the end", irqs(0x24, 2, 31, 2), Errno(EINVAL)),
        ("irqs that wrap", irqs(0x24, 2, ones, 2), Errno(EINVAL)),
        ("irqs of ones", irqs(0x21, 2, 0, ones), Errno(EINVAL)),
        ("irqs bool without data", irqs(0x22, 2, 0, 4), Errno(EINVAL)),
        ("irqs without action", irqs(0x04, 2, 0, 1), Errno(EINVAL)),
        ("irqs mask", irqs(0x09, 2, 0, 1), Success(0)),
        ("irqs unmask", irqs(0x11, 2, 0, 32), Success(0)),
        (
            "irqs mask past the end",
            irqs(0x09, 2, 31, 2),
            Errno(EINVAL),
        ),
        ("irqs unmask of none", irqs(0x11, 2, 0, 0), Errno(EINVAL)),
        (
            "irqs unmask bool without data",
            irqs(0x12, 2, 0, 1),
            Errno(EINVAL),
        ),
        ("irqs two actions", irqs(0x19, 2, 0, 1), Errno(EINVAL)),
        ("irqs of unknown flags", irqs(0x61, 2, 0, 1), Errno(EINVAL)),
        ("irqs two data kinds", irqs(0x23, 2, 0, 1), Errno(EINVAL)),
        ("irqs of INTx", irqs(0x24, 0, 0, 1), Errno(EINVAL)),
        ("irqs of index 3", irqs(0x21, 3, 0, 0), Errno(EINVAL)),
        (
            "disable INTx, which is off",
            irqs(0x21, 0, 0, 0),
            Success(0),
        ),
        ("quiet unknown command", quiet(99, &[]), Silence),
        (
            "quiet read",
            quiet(READ, &region_body(0, 0, 4, &[])),
            Silence,
        ),
        (
            "quiet bad read",
            quiet(READ, &region_body(0, 9, 4, &[])),
            Silence,
        ),
        ("quiet short map", quiet(DMA_MAP, &[0; 3]), Silence),
        ("quiet reset", quiet(RESET, &[]), Silence),
        ("reset with a body", message(RESET, &[1; 7]), Success(0)),
    ]
}

#[test]
fn every_malformed_message_is_answered_as_it_should_be() {
    let served = serve();
    let mut ends = 0;
    for (what, bytes, expect) in table() {
        served.probe.wait_detached();
        let mut raw = Raw::ready(&served.path());
        raw.send(&bytes, &[]);
        let (errno, end) = match expect {
            Expect::Errno(errno) => (Some(errno), false),
            Expect::ErrnoThenEnd(errno) => (Some(errno), true),
            Expect::Success(len) => {
                let answer = raw.answer();
                assert_eq!((answer.errno, answer.body.len()), (0, len), "{what}");
                (None, false)
            }
            Expect::Silence => (None, false),
            Expect::End => (None, true),
        };
        if let Some(errno) = errno {
            let answer = raw.answer();
            assert_eq!(answer.errno, errno, "{what}");
            assert_eq!(answer.flags, 1 | ERROR, "{what}");
            assert!(answer.body.is_empty(), "{what}");
            assert_eq!(
                answer.id,
                u16::from_ne_bytes([bytes[0], bytes[1]]),
                "{what}"
            );
            assert_eq!(answer.command, u16::from_ne_bytes([bytes[2], bytes[3]]));
        }
        if end {
            assert!(raw.is_closed(), "{what}");
            ends += 1;
        } else {
            let info = raw.ask(GET_INFO, &words(&[16, 0, 0, 0]), &[]);
            assert_eq!(info.body, words(&[16, 3, 9, 3]), "{what}");
        }
    }
    assert_eq!(ends, 6);
}

/// `max_data_xfer_size` and `max_dma_maps` ("Version").
#[test]
fn limits_of_a_server_are_told_and_kept() {
    let limits = Limits {
        max_transfer: 64,
        max_dma_maps: 2,
    };
    let served = serve_limited(|probe| probe.migrates = true, limits);
    let mut raw = Raw::connect(&served.path());
    let body = [&[0; 4], PROPOSAL.as_bytes()].concat();
    let told = raw.ask(VERSION, &body, &[]).body;
    let told = std::str::from_utf8(&told[4..]).unwrap();
    assert!(told.contains("\"max_data_xfer_size\":64,"), "{told}");
    assert!(told.contains("\"max_dma_maps\":2}"), "{told}");
    for (count, want) in [(64, 0), (65, EINVAL)] {
        let data = vec![1; count as usize];
        assert_eq!(raw.errno(READ, &region_body(0, 0, count, &[]), &[]), want);
        assert_eq!(
            raw.errno(WRITE, &region_body(0, 0, count, &data), &[]),
            want
        );
    }
    let stop_copy = feature_body(16, (1 << 17) | 2, &words(&[3, 0]));
    assert_eq!(raw.errno(FEATURE, &stop_copy, &[]), 0);
    assert_eq!(raw.errno(MIG_READ, &words(&[200, 65]), &[]), EINVAL);
    assert_eq!(raw.errno(MIG_READ, &words(&[200, 64]), &[]), 0);
    let mut map = |page: u64| raw.errno(DMA_MAP, &map_body(3, 0, page << 12, 4096), &[]);
    assert_eq!((map(1), map(2), map(3)), (0, 0, 28), "ENOSPC");
}

#[test]
fn version_comes_first_and_once_and_can_be_tried_again() {
    let served = serve();
    let mut raw = Raw::connect(&served.path());
    for command in [DMA_MAP, GET_INFO, READ, RESET] {
        assert_eq!(raw.errno(command, &[0; 32], &[]), EINVAL);
    }
    assert_eq!(raw.errno(VERSION, &[0; 3], &[]), EINVAL);
    assert_eq!(raw.errno(VERSION, b"\0\0\0\0{}", &[]), EINVAL);
    assert_eq!(raw.errno(VERSION, b"\0\0\0\0nonsense\0", &[]), EINVAL);
    assert!(served.probe.state().events.is_empty());
    let answer = raw.ask(VERSION, b"\0\0\x05\0{}\0", &[]);
    assert_eq!(answer.body, b"\0\0\0\0{}\0");
    assert_eq!(raw.errno(VERSION, b"\0\0\0\0{}\0", &[]), EINVAL);
    assert_eq!(served.probe.state().events, ["attach"]);
}

/// "Or closes the connection if it cannot support the advertised version" ("Connection Initiation"); before that it
/// says so.
#[test]
fn a_client_of_another_major_version_is_told_and_left() {
    let served = serve();
    for major in [1_u16, 0xffff] {
        for flags in [0, NO_REPLY] {
            let mut raw = Raw::connect(&served.path());
            let body = [&major.to_ne_bytes()[..], b"\0\0{}\0"].concat();
            raw.send(&framed(7, VERSION, 23, flags, &body), &[]);
            if flags == 0 {
                let answer = raw.answer();
                assert_eq!((answer.errno, answer.body.len()), (EINVAL, 0));
            }
            assert!(raw.is_closed());
        }
    }
    let mut next = Raw::ready(&served.path());
    assert_eq!(next.errno(VERSION, b"\x01\0\0\0{}\0", &[]), EINVAL);
    assert_eq!(next.errno(RESET, &[], &[]), 0, "it is negotiated");
}

/// Version data is as long as the client likes, and keys that are not known are its own affair ("Version").
#[test]
fn version_data_may_be_as_long_as_a_message() {
    let served = serve();
    let mut raw = Raw::connect(&served.path());
    let json = format!("{{\"x\":\"{}\"}}\0", "x".repeat(1 << 20));
    let body = [&[0; 4], json.as_bytes()].concat();
    let file = memfd(1);
    assert_eq!(
        raw.errno(VERSION, &body, &[file.as_fd()]),
        EINVAL,
        "no descriptors"
    );
    assert_eq!(raw.ask(VERSION, &body, &[]).body, b"\0\0\0\0{}\0");
}

#[test]
fn replies_have_the_sizes_that_cloud_hypervisor_reads() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(0x1000);
    let map = map_body(3, 0, 0, 0x1000);
    assert_eq!(raw.ask(DMA_MAP, &map, &[ram.as_fd()]).body.len(), 0);
    assert_eq!(
        raw.ask(DMA_UNMAP, &unmap_body(0, 0, 0x1000), &[])
            .body
            .len(),
        24
    );
    let info = raw.ask(IRQ_INFO, &words(&[16, 0, 2, 0]), &[]);
    assert_eq!(info.body, words(&[16, 3, 2, 32]));
    assert_eq!(raw.ask(RESET, &[], &[]).body.len(), 0);
    let read = raw.ask(READ, &region_body(4, 0, 12, &[]), &[]);
    assert_eq!(read.body, region_body(4, 0, 12, &[0; 12]));
    let write = raw.ask(WRITE, &region_body(4, 0, 2, &[1, 2]), &[]);
    assert_eq!(write.body, region_body(4, 0, 2, &[]));
}

#[test]
fn descriptors_where_none_or_fewer_belong_are_refused_and_closed() {
    if !is_alone("malformed::descriptors_where_none_or_fewer_belong_are_refused_and_closed") {
        return;
    }
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let ram = memfd(0x1000);
    let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let two = [ram.as_fd(), ram.as_fd()];
    assert_eq!(raw.errno(DMA_MAP, &map_body(3, 0, 0, 0x1000), &two), EINVAL);
    let many = [ram.as_fd(); 17];
    let irqs = irqs_body(0x24, 2, 0, 17);
    assert_eq!(raw.errno(SET_IRQS, &irqs, &many), EINVAL);
    let lost = [ram.as_fd(); 60];
    assert_eq!(
        raw.errno(SET_IRQS, &irqs_body(0x24, 2, 0, 32), &lost),
        EINVAL
    );
    assert_eq!(raw.errno(SET_IRQS, &irqs_body(0x21, 2, 0, 1), &two), EINVAL);
    assert_eq!(raw.errno(SET_IRQS, &irqs_body(0x24, 2, 0, 3), &two), EINVAL);
    assert_eq!(raw.errno(RESET, &[], &[ram.as_fd()]), 0);
    assert_eq!(raw.errno(GET_INFO, &words(&[16, 0, 0, 0]), &[]), 0);
    assert_eq!(std::fs::read_dir("/proc/self/fd").unwrap().count(), before);
    assert_eq!(
        raw.errno(DMA_MAP, &map_body(3, 0, 0, 0x1000), &[ram.as_fd()]),
        0
    );
    assert_eq!(
        raw.errno(DMA_MAP, &map_body(1, 0, 0, 0x1000), &[ram.as_fd()]),
        EEXIST
    );
}
