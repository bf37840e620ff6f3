//! However a legal stream is cut or glued, the replies are the same bytes.

use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use numagpu_devices::bus::Mapped;
use rustix::event::{EventfdFlags, eventfd};

use crate::device::{Served, serve, serve_with};
use crate::raw::*;

/// A message of the stream and the descriptors that go with it.
type Step = (Vec<u8>, Vec<OwnedFd>);

/// One of everything, with posted writes between.
fn stream() -> Vec<Step> {
    let event = || eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let write = region_body(0x100, 0, 4, &[1, 2, 3, 4]);
    let posted = framed(1, WRITE, 36, NO_REPLY, &write);
    let multi: Vec<_> = (0..3)
        .flat_map(|n| region_body(0x200 + 8 * n, 0, 8, &[9; 8]))
        .collect();
    let multi = [longs(&[3]), multi].concat();
    let mut steps = vec![
        (version(), vec![]),
        (
            message(DMA_MAP, &map_body(3, 0, 0x1000, 0x1000)),
            vec![memfd(0x1000)],
        ),
        (message(GET_INFO, &words(&[16, 0, 0, 0])), vec![]),
        (
            message(REGION_INFO, &words(&[32, 0, 7, 0, 0, 0, 0, 0])),
            vec![],
        ),
        (posted.clone(), vec![]),
        (posted, vec![]),
        (message(READ, &region_body(0x100, 0, 4, &[])), vec![]),
        (
            message(SET_IRQS, &irqs_body(0x24, 2, 0, 2)),
            vec![event(), event()],
        ),
        (message(WRITE, &write), vec![]),
        (message(WRITE_MULTI, &multi), vec![]),
        (message(SET_IRQS, &irqs_body(0x24, 2, 4, 1)), vec![event()]),
        (message(SET_IRQS, &irqs_body(0x24, 2, 4, 1)), vec![]),
        (message(99, b"odd"), vec![]),
        (message(DMA_UNMAP, &unmap_body(0, 0x1000, 0x1000)), vec![]),
        (message(READ, &region_body(0x208, 0, 8, &[])), vec![]),
        (message(IO_FDS, &words(&[16, 0, 0, 0])), vec![]),
    ];
    steps.extend(newer().into_iter().map(|bytes| (bytes, vec![])));
    steps.push((message(RESET, &[]), vec![]));
    steps
}

/// Memory without a descriptor, its log, and a migration that comes to nothing.
fn newer() -> Vec<Vec<u8>> {
    const GET: u32 = 1 << 16;
    const SET: u32 = 1 << 17;
    let feature = |room, flags, data: &[u8]| message(FEATURE, &feature_body(room, flags, data));
    let state = |state| feature(16, SET | 2, &words(&[state, 0]));
    let logged = [longs(&[4096]), words(&[1, 0]), longs(&[0x8000, 0x1000])].concat();
    let unmap = [words(&[48, 1]), longs(&[0x8000, 0x1000, 4096, 8])].concat();
    vec![
        message(DMA_MAP, &map_body(3, 0, 0x8000, 0x1000)),
        feature(40, SET | 6, &logged),
        feature(40, GET | 8, &longs(&[0x8000, 0x1000, 4096])),
        // A reply that nobody waits for.
        framed(9, DMA_READ, 36, REPLY, &[5; 20]),
        message(DMA_UNMAP, &unmap),
        feature(8, SET | 7, &[]),
        feature(16, GET | 1, &[]),
        state(3),
        message(MIG_READ, &words(&[32, 24])),
        state(4),
        message(MIG_WRITE, &words(&[12, 4, 0xbad])),
        state(2),
        feature(16, GET | 2, &[]),
    ]
}

/// Sends the pieces one by one and returns all that comes back.
fn replies(served: &Served, pieces: &[(Vec<u8>, Vec<BorrowedFd<'_>>)], pause: Duration) -> Vec<u8> {
    served.probe.wait_detached();
    let raw = Raw::connect(&served.path());
    for (bytes, fds) in pieces {
        raw.send(bytes, fds);
        std::thread::sleep(pause);
    }
    raw.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    (&raw.stream).read_to_end(&mut all).unwrap();
    all
}

/// The stream as sends: every message that carries descriptors starts one, and a cut starts another. Descriptors
/// of a message that is cut come with its first part, or with its second if they are `late`.
fn cut_at(steps: &[Step], cut: usize, late: bool) -> Vec<(Vec<u8>, Vec<BorrowedFd<'_>>)> {
    let mut pieces: Vec<(Vec<u8>, Vec<BorrowedFd<'_>>)> = Vec::new();
    let (mut at, mut fresh) = (0, true);
    for (bytes, fds) in steps {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let split = cut.checked_sub(at).filter(|n| *n < bytes.len());
        let (first, second) = bytes.split_at(split.unwrap_or(bytes.len()));
        if fresh || !fds.is_empty() || split == Some(0) {
            pieces.push((Vec::new(), Vec::new()));
        }
        let inside = split.is_some_and(|n| n > 0);
        let last = pieces.last_mut().unwrap();
        last.0.extend(if split == Some(0) { bytes } else { first });
        if inside && late {
            pieces.push((second.to_vec(), fds.clone()));
        } else {
            last.1.extend(&fds);
            if inside {
                pieces.push((second.to_vec(), Vec::new()));
            }
        }
        fresh = !fds.is_empty();
        at += bytes.len();
    }
    pieces
}

#[test]
fn a_stream_cut_anywhere_gives_the_same_replies() {
    let served = serve_with(|probe| probe.migrates = true);
    let steps = stream();
    let whole: usize = steps.iter().map(|(bytes, _)| bytes.len()).sum();
    let pause = Duration::from_micros(200);
    let expected = replies(
        &served,
        &cut_at(&steps, whole, false),
        Duration::from_millis(5),
    );
    assert_eq!(expected.len(), reply_bytes());
    for cut in 1..whole {
        let late = cut % 2 == 1;
        let got = replies(&served, &cut_at(&steps, cut, late), pause);
        assert!(got == expected, "cut at {cut}, late {late}");
    }
}

/// Bytes of all replies to the stream, by the specification's sizes.
fn reply_bytes() -> usize {
    let mut raw = Vec::new();
    raw.extend([16, 32, 48, 36, 16, 32, 24, 16, 16, 16, 40, 40, 32, 16]);
    raw.extend([16, 56, 56, 64, 24, 32, 32, 48, 32, 16, 16, 32]);
    let answered = concat!(
        r#"{"capabilities":{"write_multiple":true,"max_msg_fds":16,"#,
        r#""max_data_xfer_size":1048576,"pgsizes":4096,"max_dma_maps":65535}}"#,
        "\0"
    );
    raw.iter().sum::<usize>() + 16 + 4 + answered.len()
}

#[test]
fn single_bytes_and_one_glued_send_give_the_same_replies() {
    let served = serve();
    // Descriptors on the last message only, so that one send can carry all.
    let mut steps = stream();
    steps.truncate(2);
    steps.insert(1, (message(GET_INFO, &words(&[16, 0, 0, 0])), vec![]));
    steps.insert(2, (message(READ, &region_body(0, 7, 64, &[])), vec![]));
    let fds: Vec<_> = steps[3].1.iter().map(|fd| fd.as_fd()).collect();
    let all: Vec<u8> = steps.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
    let before = all.len() - steps[3].0.len();

    let glued = replies(&served, &[(all.clone(), fds.clone())], Duration::ZERO);
    let single: Vec<_> = all
        .iter()
        .enumerate()
        .map(|(n, byte)| (vec![*byte], if n == before { fds.clone() } else { vec![] }))
        .collect();
    let single = replies(&served, &single, Duration::from_micros(20));
    assert!(glued == single);
    let served_maps = served.probe.state();
    assert_eq!(
        served_maps.events.iter().filter(|e| **e == "dma").count(),
        2
    );
}

/// "The file descriptor must be passed as SCM_RIGHTS type ancillary data" (`VFIO_USER_DMA_MAP`) says of no message
/// boundary: a client that sends more messages at once means the one that takes descriptors.
#[test]
fn descriptors_of_one_send_go_to_the_message_that_takes_them() {
    let info = message(GET_INFO, &words(&[16, 0, 0, 0]));
    let map = message(DMA_MAP, &map_body(3, 0, 0x1000, 0x1000));
    let bare = message(DMA_MAP, &map_body(3, 0, 0x8000, 0x1000));
    let off = message(SET_IRQS, &irqs_body(0x21, 2, 0, 0));
    for messages in [
        vec![&map, &info],
        vec![&info, &map],
        vec![&info, &map, &off, &info],
        vec![&bare, &info, &map, &info],
    ] {
        let served = serve();
        let mut raw = Raw::ready(&served.path());
        let ram = memfd(0x1000);
        let bytes: Vec<u8> = messages.iter().flat_map(|it| it.to_vec()).collect();
        raw.send(&bytes, &[ram.as_fd()]);
        for _ in &messages {
            assert_eq!(raw.answer().errno, 0);
        }
        let dma = served.probe.attachment().dma;
        let shown = dma.mapped(0x1000, 0x1000);
        assert!(matches!(shown, Mapped::File { .. }), "{shown:?}");
        assert!(!matches!(dma.mapped(0x8000, 0x1000), Mapped::File { .. }));
    }
}

#[test]
fn a_thousand_posted_writes_and_a_read_keep_their_order() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let mut burst = Vec::new();
    for n in 0..1000_u32 {
        let body = region_body(0x40, 0, 4, &n.to_ne_bytes());
        burst.extend(framed(0, WRITE, 36, NO_REPLY, &body));
    }
    burst.extend(message(READ, &region_body(0x40, 0, 4, &[])));
    raw.send(&burst, &[]);
    assert_eq!(raw.answer().body[16..], 999_u32.to_ne_bytes());
}
