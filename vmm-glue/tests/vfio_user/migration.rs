//! A device on its way to another process (specification, `VFIO_DEVICE_FEATURE_MIGRATION`,
//! `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, `VFIO_USER_MIG_DATA_READ`, `VFIO_USER_MIG_DATA_WRITE`).

use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use numagpu_devices::spec::regs::{OwnerState, QueueState, partition, queue};

use crate::aperture::{self, APERTURE, BASE, DATA, Driver, MIB, PART, RAM};
use crate::device::{BAR0, Served, serve, serve_with};
use crate::raw::*;

const EINVAL: u32 = 22;
const E2BIG: u32 = 7;
const EBUSY: u32 = 16;
const EEXIST: u32 = 17;

const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const MIGRATION: u32 = 1;
const DEVICE_STATE: u32 = 2;

const ERROR_STATE: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const PRE_COPY: u32 = 6;

fn migrating() -> Served {
    serve_with(|probe| probe.migrates = true)
}

fn go(raw: &mut Raw, state: u32) -> u32 {
    let body = feature_body(16, SET | DEVICE_STATE, &words(&[state, 0]));
    let answer = raw.ask(FEATURE, &body, &[]);
    if answer.errno == 0 {
        assert_eq!(answer.body, body, "the reply to a SET is its request");
    }
    answer.errno
}

fn state(raw: &mut Raw) -> u32 {
    let body = feature_body(16, GET | DEVICE_STATE, &[]);
    let answer = raw.ask(FEATURE, &body, &[]);
    assert_eq!((answer.errno, answer.body.len()), (0, 16));
    assert_eq!(answer.body[..8], words(&[16, GET | DEVICE_STATE]));
    u32::from_ne_bytes(answer.body[8..12].try_into().unwrap())
}

/// Reads the state to its end, so many bytes at a time.
fn read_all(raw: &mut Raw, size: u32) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let answer = raw.ask(MIG_READ, &words(&[8 + size, size]), &[]);
        assert_eq!(answer.errno, 0);
        let (head, data) = answer.body.split_at(8);
        let len = u32::try_from(data.len()).unwrap();
        assert_eq!(head, words(&[8 + len, len]));
        all.extend(data);
        // "If this is less than the requested size, there is no more migration data to read."
        if len < size {
            return all;
        }
    }
}

fn write_state(raw: &mut Raw, data: &[u8]) -> u32 {
    let size = u32::try_from(data.len()).unwrap();
    let body = [words(&[8 + size, size]), data.to_vec()].concat();
    let answer = raw.ask(MIG_WRITE, &body, &[]);
    assert!(answer.body.is_empty());
    answer.errno
}

#[test]
fn stop_and_copy_and_pre_copy_are_offered() {
    let served = migrating();
    let mut raw = Raw::ready(&served.path());
    let body = feature_body(16, GET | MIGRATION, &[]);
    let answer = raw.ask(FEATURE, &body, &[]);
    let want = [words(&[16, GET | MIGRATION]), longs(&[5])].concat();
    assert_eq!((answer.errno, answer.body), (0, want));
    for (room, flags) in [
        (15, GET | MIGRATION),
        (16, SET | MIGRATION),
        (15, GET | DEVICE_STATE),
    ] {
        assert_eq!(
            raw.errno(FEATURE, &feature_body(room, flags, &[]), &[]),
            EINVAL
        );
    }
    let short = feature_body(16, SET | DEVICE_STATE, &words(&[STOP]));
    assert_eq!(raw.errno(FEATURE, &short, &[]), EINVAL);
    let cramped = feature_body(8, SET | DEVICE_STATE, &words(&[STOP, 0]));
    assert_eq!(raw.errno(FEATURE, &cramped, &[]), EINVAL);
    // The reply is the request, also what of it is not used.
    for (room, want) in [(19, EINVAL), (20, 0)] {
        let body = feature_body(room, SET | DEVICE_STATE, &words(&[RUNNING, 0, 7]));
        let answer = raw.ask(FEATURE, &body, &[]);
        assert_eq!(answer.errno, want);
        assert!(want != 0 || answer.body == body);
    }
    assert_eq!(state(&mut raw), RUNNING);
}

/// "Direct State Transitions" and "Complex State Transitions": from each state to each but one, by the shortest way
/// that saves nothing in between.
#[test]
fn every_state_is_reached_from_every_other() {
    let served = migrating();
    let mut raw = Raw::ready(&served.path());
    let states = [STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY];
    for from in states {
        for to in states {
            assert_eq!((go(&mut raw, RUNNING), go(&mut raw, from)), (0, 0));
            served.probe.state().events.clear();
            let works = [from, to].map(|state| [RUNNING, PRE_COPY].contains(&state));
            let (errno, then, want): (_, _, &[_]) = match works {
                [false, true] if (from, to) == (STOP_COPY, PRE_COPY) => (EINVAL, from, &[]),
                [true, false] => (0, to, &["stop"]),
                [false, true] => (0, to, &["run"]),
                _ => (0, to, &[]),
            };
            assert_eq!((go(&mut raw, to), state(&mut raw)), (errno, then));
            let events = served.probe.state().events.clone();
            assert_eq!(events, want, "{from} to {to}");
        }
        for nowhere in [ERROR_STATE, 5, 7, 8, 0xabcd, u32::MAX] {
            assert_eq!((go(&mut raw, RUNNING), go(&mut raw, from)), (0, 0));
            assert_eq!((go(&mut raw, nowhere), state(&mut raw)), (EINVAL, from));
        }
    }
}

/// What is read in `PRE_COPY` of a device that says so of itself.
fn outline(bytes: &[u8]) -> Vec<u8> {
    let len = bytes.len() as u64;
    [b"NUMAGPU\0", &len.to_le_bytes()[..], bytes].concat()
}

/// "Continue to transfer migration data, but stop device operation": it is one stream, wherever it was left.
#[test]
fn what_a_device_is_comes_before_its_state_if_it_is_asked_while_it_works() {
    let served = migrating();
    let mut raw = Raw::ready(&served.path());
    assert_eq!(go(&mut raw, STOP_COPY), 0);
    let saved = read_all(&mut raw, 1 << 20);
    let said = outline(b"a probe");
    for read in [0, 5, 16, u32::try_from(said.len()).unwrap(), 100] {
        assert_eq!((go(&mut raw, RUNNING), go(&mut raw, PRE_COPY)), (0, 0));
        let part = raw.ask(MIG_READ, &words(&[8 + read, read]), &[]);
        let mut all = part.body[8..].to_vec();
        assert_eq!(all.len(), said.len().min(read as usize));
        // Accesses work meanwhile.
        let body = region_body(0, 0, 4, &[1, 2, 3, 4]);
        assert_eq!(raw.errno(WRITE, &body, &[]), 0);
        assert_eq!(go(&mut raw, STOP_COPY), 0);
        all.extend(read_all(&mut raw, 99_991));
        let (first, state) = all.split_at(said.len());
        assert!(first == said && state.len() == saved.len());
        assert_eq!(state[8..12], [1, 2, 3, 4]);
    }
    // A state that cannot be had leaves the device at work, and the stream where it was.
    assert_eq!((go(&mut raw, RUNNING), go(&mut raw, PRE_COPY)), (0, 0));
    served.probe.state().unsaved = true;
    served.probe.state().events.clear();
    assert_eq!(
        (go(&mut raw, STOP_COPY), state(&mut raw)),
        (EINVAL, PRE_COPY)
    );
    assert_eq!(served.probe.state().events, ["stop", "run"]);
    assert_eq!(read_all(&mut raw, 100), said);
    // A device that has nothing to say says nothing.
    served.probe.state().outline = b"";
    assert_eq!((go(&mut raw, RUNNING), go(&mut raw, PRE_COPY)), (0, 0));
    assert!(read_all(&mut raw, 100).is_empty());
}

#[test]
fn a_target_that_does_not_fit_says_so_before_it_has_the_state() {
    let (source, target) = (migrating(), migrating());
    let (mut from, mut to) = (Raw::ready(&source.path()), Raw::ready(&target.path()));
    source.probe.state().bar0[..4].copy_from_slice(&[1, 2, 3, 4]);
    assert_eq!(go(&mut from, PRE_COPY), 0);
    let said = read_all(&mut from, 1 << 20);
    assert_eq!(go(&mut from, STOP_COPY), 0);
    let state_of_source = read_all(&mut from, 1 << 20);
    let stream = [said.clone(), state_of_source.clone()].concat();

    let spoilt = |change: fn(&mut Vec<u8>)| {
        let mut spoilt = said.clone();
        change(&mut spoilt);
        spoilt
    };
    for (bad, errno) in [
        (spoilt(|it| it[20] ^= 1), EINVAL),
        // Longer than any is.
        (spoilt(|it| it[11] = 1), E2BIG),
        (spoilt(|it| it[15] = 0xff), E2BIG),
    ] {
        assert_eq!(go(&mut to, RESUMING), 0);
        let (first, last) = bad.split_at(bad.len() - 1);
        let done = [write_state(&mut to, first), write_state(&mut to, last)];
        assert!(done == [errno, 0] || done == [0, errno], "{done:?}");
        // Who goes on all the same does not get through.
        assert_eq!(write_state(&mut to, &state_of_source[..100]), 0);
        assert_eq!((go(&mut to, RUNNING), state(&mut to)), (EINVAL, RESUMING));
        assert_eq!(go(&mut to, RUNNING), 0, "without data");
        assert_eq!(target.probe.state().bar0[..4], [0; 4]);
    }
    // Nor who has no more than that, or less.
    for part in [&said[..], &said[..20], &said[..3]] {
        assert_eq!(go(&mut to, RESUMING), 0);
        assert_eq!(write_state(&mut to, part), 0);
        assert_eq!((go(&mut to, RUNNING), go(&mut to, RUNNING)), (EINVAL, 0));
    }
    // However it is cut.
    for size in [1, 7, 16, 17, said.len(), stream.len()] {
        target.probe.state().bar0.fill(0);
        assert_eq!(go(&mut to, RESUMING), 0);
        let (first, rest) = stream.split_at(40);
        for piece in first.chunks(size).chain(rest.chunks(1 << 20)) {
            assert_eq!(write_state(&mut to, piece), 0);
        }
        assert_eq!(go(&mut to, RUNNING), 0);
        assert_eq!(target.probe.state().bar0[..4], [1, 2, 3, 4]);
    }
}

#[test]
fn a_state_is_read_and_written_in_pieces_of_any_size() {
    let (source, target) = (migrating(), migrating());
    let (mut from, mut to) = (Raw::ready(&source.path()), Raw::ready(&target.path()));
    let data: Vec<u8> = (0..=250)
        .cycle()
        .take(usize::try_from(BAR0).unwrap())
        .collect();
    source.probe.state().bar0.copy_from_slice(&data);
    assert_eq!(go(&mut from, STOP_COPY), 0);
    let all = read_all(&mut from, 1 << 20);
    assert_eq!(all.len() as u64, 8 + BAR0);
    assert!(read_all(&mut from, 10).is_empty(), "it is a stream");
    // A new session begins anew.
    assert_eq!((go(&mut from, STOP), go(&mut from, STOP_COPY)), (0, 0));
    assert!(read_all(&mut from, 99_991) == all);
    assert_eq!(go(&mut to, RESUMING), 0);
    for piece in all.chunks(777_777) {
        assert_eq!(write_state(&mut to, piece), 0);
    }
    assert!(target.probe.state().bar0.iter().all(|byte| *byte == 0));
    assert_eq!(go(&mut to, RUNNING), 0);
    assert!(target.probe.state().bar0 == data);
}

#[test]
fn data_goes_only_where_its_state_allows_and_as_much_as_it_says() {
    let served = migrating();
    let mut raw = Raw::ready(&served.path());
    let read = words(&[16, 8]);
    for state in [STOP, RUNNING, PRE_COPY, STOP_COPY, RESUMING] {
        assert_eq!(go(&mut raw, state), 0);
        let saves = [PRE_COPY, STOP_COPY].contains(&state);
        let want = if saves { 0 } else { EINVAL };
        assert_eq!(raw.errno(MIG_READ, &read, &[]), want, "{state}");
        let want = if state == RESUMING { 0 } else { EINVAL };
        assert_eq!(write_state(&mut raw, &[1]), want, "{state}");
    }
    let mut errno = |command, body: &[u8]| raw.errno(command, body, &[]);
    assert_eq!(
        errno(MIG_WRITE, &words(&[12, 5, 0])),
        EINVAL,
        "less than it says"
    );
    assert_eq!(errno(MIG_WRITE, &words(&[12, 3, 0])), EINVAL, "more");
    assert_eq!(errno(MIG_WRITE, &words(&[12, u32::MAX, 0])), EINVAL);
    assert_eq!(errno(MIG_WRITE, &[0; 7]), EINVAL);
    let large = [words(&[0, (1 << 20) + 1]), vec![0; (1 << 20) + 1]].concat();
    assert_eq!(
        errno(MIG_WRITE, &large),
        EINVAL,
        "more than max_data_xfer_size"
    );
    assert_eq!(errno(MIG_READ, &[0; 7]), EINVAL);
    // Too much in all.
    let piece = vec![0; 1 << 20];
    let refused = (0..65).find(|_| write_state(&mut raw, &piece) == E2BIG);
    assert_eq!(refused, Some(63), "a byte is there already");
    assert_eq!(go(&mut raw, STOP), EINVAL);
    assert_eq!((go(&mut raw, STOP), go(&mut raw, STOP_COPY)), (0, 0));
    let mut errno = |command, body: &[u8]| raw.errno(command, body, &[]);
    assert_eq!(errno(MIG_READ, &words(&[15, 8])), EINVAL, "no room");
    let more = (1 << 20) + 1;
    assert_eq!(errno(MIG_READ, &words(&[8 + more, more])), EINVAL);
    assert_eq!(errno(MIG_READ, &words(&[u32::MAX, u32::MAX])), EINVAL);
}

/// `max_data_xfer_size` ("Version"): a client takes and sends no more at a time than it says.
#[test]
fn data_comes_and_goes_in_pieces_that_the_client_takes() {
    let served = migrating();
    let proposal = "{\"capabilities\":{\"max_data_xfer_size\":4}}\0";
    let mut raw = Raw::proposing(&served.path(), proposal);
    assert_eq!(go(&mut raw, STOP_COPY), 0);
    assert_eq!(raw.errno(MIG_READ, &words(&[100, 5]), &[]), EINVAL);
    assert_eq!(raw.ask(MIG_READ, &words(&[100, 4]), &[]).body.len(), 12);
    assert_eq!(go(&mut raw, RESUMING), 0);
    assert_eq!(write_state(&mut raw, &[1; 5]), EINVAL);
    assert_eq!(write_state(&mut raw, &[1; 4]), 0);
    // Of accesses the server's own limit holds.
    assert_eq!(raw.errno(READ, &region_body(0, 0, 5, &[]), &[]), 0);
}

/// "If the delivered data is found to be incomplete, inconsistent, or otherwise invalid, fail the SET command".
#[test]
fn data_that_is_no_state_is_refused_and_the_device_stays_as_it_is() {
    let served = migrating();
    let mut raw = Raw::ready(&served.path());
    let body = region_body(0, 0, 4, &[1, 2, 3, 4]);
    assert_eq!(raw.errno(WRITE, &body, &[]), 0);
    assert_eq!(go(&mut raw, STOP_COPY), 0);
    let good = read_all(&mut raw, 1 << 20);
    let foreign = b"something else".to_vec();
    for bad in [good[..good.len() - 1].to_vec(), foreign, good[..1].to_vec()] {
        assert_eq!(go(&mut raw, RESUMING), 0);
        for piece in bad.chunks(1 << 20) {
            assert_eq!(write_state(&mut raw, piece), 0);
        }
        assert_eq!(go(&mut raw, RUNNING), EINVAL);
        assert_eq!(state(&mut raw), RESUMING);
        assert_eq!(go(&mut raw, RUNNING), 0, "without data");
        let seen = raw.ask(READ, &region_body(0, 0, 4, &[]), &[]);
        assert_eq!(seen.body[16..], [1, 2, 3, 4]);
    }
    served.probe.state().broken = true;
    assert_eq!((go(&mut raw, STOP), state(&mut raw)), (EBUSY, RUNNING));
}

/// "VFIO_USER_DEVICE_RESET must be used to return back to RUNNING".
#[test]
fn a_reset_and_a_disconnect_end_a_migration() {
    let served = migrating();
    for state_then in [STOP, STOP_COPY, RESUMING, PRE_COPY] {
        served.probe.wait_detached();
        served.probe.state().events.clear();
        let mut raw = Raw::ready(&served.path());
        assert_eq!(go(&mut raw, state_then), 0);
        assert_eq!(raw.errno(RESET, &[], &[]), 0);
        assert_eq!(state(&mut raw), RUNNING);
        assert_eq!(go(&mut raw, state_then), 0);
        drop(raw);
        served.probe.wait_detached();
        let mut next = Raw::ready(&served.path());
        assert_eq!(state(&mut next), RUNNING);
        let events = served.probe.state().events.clone();
        let want: &[_] = match state_then {
            PRE_COPY => &["attach", "reset", "detach", "attach"],
            _ => &[
                "attach", "stop", "reset", "run", "stop", "detach", "run", "attach",
            ],
        };
        assert_eq!(events, want);
    }
}

#[test]
fn a_function_without_a_state_to_carry_says_so() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    for flags in [GET | MIGRATION, GET | DEVICE_STATE, SET | DEVICE_STATE] {
        let body = feature_body(16, flags, &[0; 8]);
        assert_eq!(raw.errno(FEATURE, &body, &[]), 25, "ENOTTY");
    }
    assert_eq!(raw.errno(MIG_READ, &words(&[16, 8]), &[]), EINVAL);
    assert_eq!(write_state(&mut raw, &[1; 8]), EINVAL);
}

/// A GPU whose queue has a copy before it when it is stopped: it is done once, by the GPU that goes on.
#[test]
fn a_gpus_work_goes_on_in_another_one() {
    let (source, target) = (aperture::serve(8 * MIB), aperture::serve(8 * MIB));
    let mut driver = Driver::new(&source);
    // It works on while it says what it is.
    assert_eq!(go(&mut driver.raw, PRE_COPY), 0);
    let said = read_all(&mut driver.raw, 4096);
    driver.copy(BASE, BASE + PART, 64);
    assert_eq!(go(&mut driver.raw, STOP), 0);
    let data: Vec<u8> = (1..=250).cycle().take(0x2000).collect();
    let written = rustix::io::pwrite(&driver.ram, &data, DATA - RAM);
    assert_eq!(written, Ok(data.len()));
    driver.begin_copy(DATA, BASE + 0x100, 0x2000);
    assert_eq!(go(&mut driver.raw, STOP_COPY), 0);
    let state_of_source = read_all(&mut driver.raw, 4096);
    assert!(
        driver
            .read(APERTURE, 0x100, 0x2000)
            .iter()
            .all(|byte| *byte == 0)
    );

    let mut raw = Raw::ready(&target.path());
    let ram = driver.ram.try_clone().unwrap();
    let map = map_body(3, 0, RAM, 0x1_0000);
    assert_eq!(raw.errno(DMA_MAP, &map, &[ram.as_fd()]), 0);
    assert_eq!(go(&mut raw, RESUMING), 0);
    // Cut short, foreign, or of another GPU: refused, and another can be written.
    let mut other: serde_json::Value = serde_json::from_slice(&state_of_source).unwrap();
    other["shape"]["queues"] = 77.into();
    for bad in [
        state_of_source[..state_of_source.len() / 2].to_vec(),
        b"{}".to_vec(),
        other.to_string().into_bytes(),
    ] {
        assert_eq!(write_state(&mut raw, &bad), 0);
        assert_eq!(go(&mut raw, STOP), EINVAL);
    }
    let text = String::from_utf8(said[16..].to_vec()).unwrap();
    let other = outline(text.replace(r#""queues":"#, r#""queues":7"#).as_bytes());
    assert_ne!(other, said);
    for bad in [other, outline(b"{}"), outline(&text.as_bytes()[1..])] {
        assert_eq!(write_state(&mut raw, &bad), EINVAL);
        assert_eq!((go(&mut raw, STOP), go(&mut raw, RESUMING)), (EINVAL, 0));
        assert_eq!((go(&mut raw, STOP), go(&mut raw, RESUMING)), (0, 0));
    }
    assert_eq!(write_state(&mut raw, &said), 0);
    assert_eq!(write_state(&mut raw, &state_of_source), 0);
    assert_eq!(go(&mut raw, STOP), 0);
    let mut went_on = Driver {
        raw,
        ram,
        write_pointer: driver.write_pointer,
    };
    assert!(
        went_on
            .read(APERTURE, 0x100, 0x2000)
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(go(&mut went_on.raw, RUNNING), 0);
    went_on.end_copy();
    assert!(went_on.read(APERTURE, 0x100, 0x2000) == data);
    let packets = went_on.get32(queue::BASE, &queue::PACKETS);
    assert_eq!(packets, 2);
    let claimed = went_on.get32(partition::BASE, &partition::STATE);
    assert_eq!(claimed, OwnerState::Claimed.code());
    went_on.copy(DATA, BASE + PART, 0x1000);
    // A GPU in use takes no other's state.
    assert_eq!(go(&mut went_on.raw, RESUMING), 0);
    assert_eq!(write_state(&mut went_on.raw, &state_of_source), 0);
    assert_eq!(go(&mut went_on.raw, STOP), EEXIST);
    assert_eq!(go(&mut went_on.raw, RUNNING), 0);
    went_on.copy(DATA, BASE + PART, 0x1000);
    // The source does nothing more when its client leaves, and is free for the next.
    drop(driver);
    let mut next = Raw::ready(&source.path());
    assert_eq!(state(&mut next), RUNNING);
    let seen = next.ask(READ, &region_body(0x100, APERTURE, 0x2000, &[]), &[]);
    assert!(seen.body[16..].iter().all(|byte| *byte == 0));
}

/// Memory that the client is asked for.
const FAR: u64 = RAM + 0x100_0000;

/// A GPU that is in the midst of a copy of 160 KiB from asked memory, when it is told to stop.
fn stopping(served: &aperture::Served) -> (Driver, Answer) {
    let mut driver = Driver::new(served);
    let body = map_body(3, 0, FAR, 0x10_0000);
    assert_eq!(driver.raw.errno(DMA_MAP, &body, &[]), 0);
    driver.begin_copy(FAR, BASE, 0x2_8000);
    let asked = driver.raw.answer();
    assert_eq!((asked.command, asked.flags), (DMA_READ, 0));
    let stop = feature_body(16, SET | DEVICE_STATE, &words(&[STOP, 0]));
    driver.raw.send(&message(FEATURE, &stop), &[]);
    (driver, asked)
}

/// Answers a `DMA_READ` with bytes that tell their address.
fn give(raw: &mut Raw, asked: &Answer) {
    let long = |at: usize| u64::from_ne_bytes(asked.body[at..at + 8].try_into().unwrap());
    let (address, count) = (long(0), long(8));
    let data = (address..address + count).map(|at| u8::try_from(at % 251).unwrap());
    let body = [longs(&[address, count]), data.collect()].concat();
    let size = 16 + u32::try_from(body.len()).unwrap();
    raw.send(&framed(asked.id, DMA_READ, size, REPLY, &body), &[]);
}

#[test]
fn a_packet_that_needs_the_client_is_finished_before_the_stop_is_answered() {
    let served = aperture::serve(8 * MIB);
    let (mut driver, mut asked) = stopping(&served);
    for _ in 0..2 {
        // Longer than a reset would be waited for.
        std::thread::sleep(Duration::from_millis(150));
        give(&mut driver.raw, &asked);
        asked = driver.raw.answer();
        assert_eq!((asked.command, asked.flags), (DMA_READ, 0));
    }
    give(&mut driver.raw, &asked);
    let answer = driver.raw.answer();
    assert_eq!((answer.command, answer.errno), (FEATURE, 0));
    assert_eq!(state(&mut driver.raw), STOP);
    let want = (FAR..FAR + 0x2_8000).map(|at| u8::try_from(at % 251).unwrap());
    assert!(driver.read(APERTURE, 0, 0x2_8000).into_iter().eq(want));
    assert_eq!(go(&mut driver.raw, RUNNING), 0);
    driver.end_copy();
    assert_eq!(driver.get32(queue::BASE, &queue::PACKETS), 1);
}

#[test]
fn a_client_that_asks_more_before_the_stop_is_answered_waits_and_loses_the_packet() {
    let served = aperture::serve(8 * MIB);
    let (mut driver, asked) = stopping(&served);
    let get = feature_body(16, GET | DEVICE_STATE, &[]);
    driver.raw.send(&message(FEATURE, &get), &[]);
    // Behind the request, and so too late.
    give(&mut driver.raw, &asked);
    for flags in [SET, GET] {
        let answer = driver.raw.answer();
        assert_eq!((answer.command, answer.errno), (FEATURE, 0));
        assert_eq!(answer.body[4..8], words(&[flags | DEVICE_STATE]));
        assert_eq!(answer.body[8..12], words(&[STOP]));
    }
    let fault = QueueState::Fault.code();
    assert_eq!(driver.get32(queue::BASE, &queue::STATUS), fault);
}

#[test]
fn a_client_that_sends_no_more_is_still_told_how_the_stop_ended() {
    let served = aperture::serve(8 * MIB);
    let (mut driver, _asked) = stopping(&served);
    driver.raw.stream.shutdown(Shutdown::Write).unwrap();
    let answer = driver.raw.answer();
    assert_eq!((answer.command, answer.errno), (FEATURE, 0));
    assert!(driver.raw.is_closed());
}

#[test]
fn a_client_that_leaves_while_it_is_needed_makes_room_for_the_next() {
    let served = aperture::serve(8 * MIB);
    let since = Instant::now();
    drop(stopping(&served));
    let mut next = Driver::new(&served);
    assert_eq!(state(&mut next.raw), RUNNING);
    next.copy(DATA, BASE, 64);
    assert!(since.elapsed() < Duration::from_secs(4), "nobody waited");
}
