//! Much of the same, and clients that take their time: nothing is left behind, and no other device waits.

use std::io::{ErrorKind, Write as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};

use crate::device::{Served, is_alone, serve};
use crate::malformed::{Expect, table};
use crate::raw::*;

const EINVAL: u32 = 22;
const INFO: [u32; 4] = [16, 0, 0, 0];
/// Much longer than anything here takes, on a host with other things to do.
const LIMIT: Duration = Duration::from_secs(4);

/// What a process holds of the host.
#[derive(Debug)]
struct Holdings {
    descriptors: usize,
    /// Lines of `/proc/self/maps`.
    maps: usize,
    resident: usize,
}

impl Holdings {
    /// Of this process, once the last client is cleared away.
    fn now(served: &Served) -> Holdings {
        served.probe.wait_detached();
        // The probe remembers what happened to it.
        served.probe.state().events = Vec::new();
        std::thread::sleep(Duration::from_millis(20));
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert_eq!(maps.matches("/memfd:ram").count(), 0);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.unwrap().trim().trim_end_matches(" kB");
        Holdings {
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
            maps: maps.lines().count(),
            resident: kib.parse::<usize>().unwrap() * 1024,
        }
    }

    /// Asserts that no more is held than `before`: exactly so for descriptors. The allocator may keep a little, far
    /// less than one page or map for each client or message.
    #[track_caller]
    fn assert_as(&self, before: &Holdings) {
        assert_eq!(self.descriptors, before.descriptors);
        assert!(self.maps <= before.maps + 8, "{self:?}, before {before:?}");
        let most = before.resident + (2 << 20);
        assert!(self.resident <= most, "{self:?}, before {before:?}");
    }
}

#[test]
fn ten_thousand_connections_with_maps_leave_nothing_behind() {
    if !is_alone("endurance::ten_thousand_connections_with_maps_leave_nothing_behind") {
        return;
    }
    let served = serve();
    let ram = memfd(0x4000);
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let cycles = |count| {
        for _ in 0..count {
            let mut raw = Raw::ready(&served.path());
            for page in 0..2 {
                let body = map_body(3, page << 12, page << 20, 0x1000);
                assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
            }
            let irqs = irqs_body(0x24, 2, 0, 1);
            assert_eq!(raw.errno(SET_IRQS, &irqs, &[event.as_fd()]), 0);
            drop(raw);
            served.probe.state().events.clear();
        }
    };
    cycles(200);
    let before = Holdings::now(&served);
    cycles(10_000);
    Holdings::now(&served).assert_as(&before);
}

#[test]
fn a_hundred_thousand_malformed_messages_are_each_refused_and_leave_nothing_behind() {
    const BATCH: usize = 100;
    if !is_alone(
        "endurance::a_hundred_thousand_malformed_messages_are_each_refused_and_leave_nothing_behind",
    ) {
        return;
    }
    let served = serve();
    let ram = memfd(0x1000);
    let all = table().into_iter();
    let refused: Vec<(Vec<u8>, u32)> = all
        .filter_map(|(_, bytes, expect)| match expect {
            Expect::Errno(errno) if bytes.len() < 1000 => Some((bytes, errno)),
            _ => None,
        })
        .collect();
    let ends: Vec<Vec<u8>> = table()
        .into_iter()
        .filter(|(_, _, expect)| matches!(expect, Expect::ErrnoThenEnd(_) | Expect::End))
        .map(|(_, bytes, _)| bytes)
        .collect();
    assert!(refused.len() > 30 && ends.len() == 6);
    let mut kinds = refused.iter().cycle();
    let mut send = |batches| {
        let mut count = 0;
        let mut raw = Raw::ready(&served.path());
        for _ in 0..batches {
            let batch: Vec<_> = kinds.by_ref().take(BATCH - 1).collect();
            let bytes: Vec<u8> = batch.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
            raw.send(&bytes, &[]);
            for (_, errno) in batch {
                assert_eq!(raw.answer().errno, *errno);
                count += 1;
            }
            // One descriptor too many.
            let two = [ram.as_fd(), ram.as_fd()];
            let map = map_body(3, 0, 0, 0x1000);
            assert_eq!(raw.errno(DMA_MAP, &map, &two), EINVAL);
            count += 1;
        }
        drop(raw);
        // Those after which the stream cannot be followed.
        for bytes in ends.iter().cycle().take(batches) {
            let mut raw = Raw::ready(&served.path());
            raw.send(bytes, &[]);
            while raw.try_answer().is_ok() {}
            count += 1;
        }
        count
    };
    assert_eq!(send(10), 10 * (BATCH + 1));
    let before = Holdings::now(&served);
    assert_eq!(send(1000), 1000 * (BATCH + 1));
    Holdings::now(&served).assert_as(&before);
}

/// A device answers at once, again and again.
#[track_caller]
fn assert_quick(raw: &mut Raw) {
    let since = Instant::now();
    for _ in 0..100 {
        assert_eq!(raw.errno(GET_INFO, &words(&INFO), &[]), 0);
    }
    assert!(since.elapsed() < LIMIT, "{:?}", since.elapsed());
}

#[test]
fn a_client_that_sends_byte_by_byte_keeps_no_other_device_waiting() {
    let (slow, other) = (serve(), serve());
    let mut loris = Raw::ready(&slow.path());
    let mut raw = Raw::ready(&other.path());
    let read = message(READ, &region_body(0, 0, 4, &[]));
    for byte in &read {
        (&loris.stream).write_all(&[*byte]).unwrap();
        assert_quick(&mut raw);
    }
    // Late, and answered all the same.
    assert_eq!(loris.answer().body.len(), 20);
    // A second client of the slow one's device is refused meanwhile, not kept.
    (&loris.stream).write_all(&read[..7]).unwrap();
    assert!(Raw::connect(&slow.path()).is_closed());
    slow.server.shutdown();
}

#[test]
fn a_client_that_reads_no_replies_keeps_neither_another_device_nor_the_end_waiting() {
    let (stuck, other) = (serve(), serve());
    let flood = Raw::ready(&stuck.path());
    flood.stream.set_nonblocking(true).unwrap();
    let read = message(READ, &region_body(0, 0, 1 << 20, &[]));
    let mut sent = 0;
    // Until the server's replies and then our requests have no room any more.
    let full = loop {
        match (&flood.stream).write(&read) {
            Ok(len) => sent += len,
            Err(error) => break error.kind(),
        }
        assert!(sent < 64 << 20, "the server takes requests without end");
    };
    assert_eq!(full, ErrorKind::WouldBlock);
    let mut raw = Raw::ready(&other.path());
    assert_quick(&mut raw);
    let since = Instant::now();
    stuck.server.shutdown();
    assert!(since.elapsed() < LIMIT, "{:?}", since.elapsed());
    assert_quick(&mut raw);
}
