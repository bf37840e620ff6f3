//! A second socket for the server's commands (specification, `VFIO_USER_VERSION`, `twin_socket`; "Socket").

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use numagpu_devices::bus::{DmaAccess, DmaError};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use crate::asked::{
    RAM, SIZE, assert_asked, four_threads_move, pattern, place, read, reply_to, write,
};
use crate::device::{Served, is_alone, serve};
use crate::raw::*;

const EINVAL: u32 = 22;
const ENOTSUP: u32 = 95;

const ASKS: &str = r#"{"capabilities":{"max_msg_fds":1,"twin_socket":{"supported":true}}}"#;

pub const INFO: [u32; 4] = [16, 0, 0, 0];

pub const FAILED: DmaError = DmaError::Failed { address: RAM };

fn proposal(json: &str) -> Vec<u8> {
    [&[0; 4], json.as_bytes(), &[0]].concat()
}

/// The capabilities in a reply to `VERSION`.
fn capabilities(answer: &Answer) -> Value {
    assert_eq!((answer.errno, answer.flags), (0, REPLY));
    let json = answer.body[4..].strip_suffix(&[0]).unwrap();
    let json: Value = serde_json::from_slice(json).unwrap();
    json["capabilities"].clone()
}

/// Both sockets of a client that answers nothing by itself, with one asked map.
pub fn twins(served: &Served) -> (Raw, Raw) {
    let mut main = Raw::connect(&served.path());
    let (answer, mut fds) = main.ask_for_fds(VERSION, &proposal(ASKS));
    let twin = &capabilities(&answer)["twin_socket"];
    assert_eq!(*twin, json!({"supported": true, "fd_index": 0}));
    assert_eq!(fds.len(), 1);
    let stream = UnixStream::from(fds.remove(0));
    let limit = Some(Duration::from_secs(10));
    stream.set_read_timeout(limit).unwrap();
    let body = map_body(3, 0, RAM, SIZE as u64);
    assert_eq!(main.errno(DMA_MAP, &body, &[]), 0);
    (main, Raw { stream })
}

/// Moves memory as it is asked for over a second socket, each time after `pause`, until it is closed.
pub struct Mover {
    memory: Arc<Mutex<Vec<u8>>>,
    asked: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
    stream: UnixStream,
}

impl Mover {
    pub fn new(mut twin: Raw, pause: Duration) -> Self {
        let memory = Arc::new(Mutex::new(vec![0; SIZE]));
        let asked = Arc::new(AtomicUsize::new(0));
        let stream = twin.stream.try_clone().unwrap();
        let (owned, count_asked) = (Arc::clone(&memory), Arc::clone(&asked));
        stream.set_read_timeout(None).unwrap();
        let thread = std::thread::spawn(move || {
            while let Ok(command) = twin.try_answer() {
                assert_eq!(command.flags, 0);
                count_asked.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(pause);
                let (address, count) = place(&command);
                let at = usize::try_from(address - RAM).unwrap();
                let range = at..at + usize::try_from(count).unwrap();
                let mut body = longs(&[address, count]);
                match command.command {
                    DMA_READ => body.extend(&owned.lock().unwrap()[range]),
                    DMA_WRITE => owned.lock().unwrap()[range].copy_from_slice(&command.body[16..]),
                    other => panic!("command {other}"),
                }
                twin.send(&reply_to(&command, 0, &body), &[]);
            }
        });
        Self {
            memory,
            asked,
            thread: Some(thread),
            stream,
        }
    }

    pub fn asked(&self) -> usize {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Whether nothing is there to be read.
pub fn is_quiet(raw: &Raw) -> bool {
    raw.stream.set_nonblocking(true).unwrap();
    let nothing = (&raw.stream).read(&mut [0; 1]).map_err(|it| it.kind());
    raw.stream.set_nonblocking(false).unwrap();
    nothing == Err(std::io::ErrorKind::WouldBlock)
}

/// "This message and its reply are passed over the separate server-to-client socket" (`VFIO_USER_DMA_READ`).
#[test]
fn commands_and_their_replies_go_over_the_second_socket_only() {
    let served = serve();
    let (mut main, mut twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        let reads = scope.spawn(|| read(&*dma, RAM + 8, 4));
        let asked = twin.answer();
        assert_eq!((asked.command, asked.flags), (DMA_READ, 0));
        assert_eq!(place(&asked), (RAM + 8, 4));
        // A reply on the other socket is none.
        let reply = reply_to(&asked, 0, &[longs(&[RAM + 8, 4]), vec![9; 4]].concat());
        main.send(&reply, &[]);
        assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
        assert!(!reads.is_finished());
        let reply = reply_to(&asked, 0, &[longs(&[RAM + 8, 4]), vec![5; 4]].concat());
        twin.send(&reply, &[]);
        assert_eq!(reads.join().unwrap(), Ok(vec![5; 4]));

        let writes = scope.spawn(|| write(&*dma, RAM, &[7; 6]));
        let asked = twin.answer();
        assert_eq!((asked.command, place(&asked)), (DMA_WRITE, (RAM, 6)));
        assert_eq!(asked.body[16..], [7; 6]);
        assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
        assert!(!writes.is_finished());
        twin.send(&reply_to(&asked, 0, &longs(&[RAM, 6])), &[]);
        assert_eq!(writes.join().unwrap(), Ok(()));
    });
    assert!(is_quiet(&main) && is_quiet(&twin));
}

/// "If and only if the client has indicated support for twin-socket mode" (`VFIO_USER_VERSION`, "Reply").
#[test]
fn who_does_not_ask_is_asked_over_the_first_socket() {
    let served = serve();
    for (json, no_reply) in [
        ("{}", false),
        (r#"{"capabilities":{"twin_socket":{}}}"#, false),
        (
            r#"{"capabilities":{"twin_socket":{"supported":false}}}"#,
            false,
        ),
        (
            r#"{"capabilities":{"max_msg_fds":0,"twin_socket":{"supported":true}}}"#,
            false,
        ),
        // Asks, but would not be told.
        (ASKS, true),
    ] {
        let mut raw = Raw::connect(&served.path());
        if no_reply {
            let body = proposal(json);
            let size = 16 + u32::try_from(body.len()).unwrap();
            raw.send(&framed(1, VERSION, size, NO_REPLY, &body), &[]);
        } else {
            let (answer, fds) = raw.ask_for_fds(VERSION, &proposal(json));
            assert_eq!((answer.errno, fds.len()), (0, 0), "{json}");
            assert!(!answer.body.windows(4).any(|it| it == b"twin"), "{json}");
        }
        let body = map_body(3, 0, RAM, SIZE as u64);
        assert_eq!(raw.errno(DMA_MAP, &body, &[]), 0);
        let dma = served.probe.attachment().dma;
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| read(&*dma, RAM, 4));
            let asked = raw.answer();
            assert_eq!(asked.command, DMA_READ);
            let body = [longs(&[RAM, 4]), vec![3; 4]].concat();
            raw.send(&reply_to(&asked, 0, &body), &[]);
            assert_eq!(waits.join().unwrap(), Ok(vec![3; 4]));
        });
        drop(raw);
        served.probe.wait_detached();
    }
}

#[test]
fn a_malformed_question_is_refused_and_may_be_asked_anew() {
    let served = serve();
    let mut raw = Raw::connect(&served.path());
    for twin in ["true", "null", "[true]", r#"{"supported":1}"#] {
        let json = format!(r#"{{"capabilities":{{"twin_socket":{twin}}}}}"#);
        let (answer, fds) = raw.ask_for_fds(VERSION, &proposal(&json));
        assert_eq!((answer.errno, fds.len()), (EINVAL, 0), "{twin}");
        assert!(answer.body.is_empty());
    }
    let (answer, fds) = raw.ask_for_fds(VERSION, &proposal(ASKS));
    assert_eq!((answer.errno, fds.len()), (0, 1));
    // Once negotiated it stays so.
    let (answer, fds) = raw.ask_for_fds(VERSION, &proposal(ASKS));
    assert_eq!((answer.errno, fds.len()), (EINVAL, 0));
}

/// "The server may optionally set up a separate command channel": not when it has no descriptors left.
#[test]
fn a_server_without_descriptors_serves_over_one_socket() {
    if !is_alone("twin::a_server_without_descriptors_serves_over_one_socket") {
        return;
    }
    let served = serve();
    let mut raw = Raw::connect(&served.path());
    // Answered, so the server has taken the connection.
    assert_eq!(raw.errno(GET_INFO, &words(&INFO), &[]), EINVAL);
    let next = raw.stream.as_fd().try_clone_to_owned().unwrap();
    let first_free = std::os::fd::AsRawFd::as_raw_fd(&next);
    drop(next);
    let before = getrlimit(Resource::Nofile);
    let none = Rlimit {
        current: Some(u64::try_from(first_free).unwrap()),
        ..before
    };
    setrlimit(Resource::Nofile, none).unwrap();
    let (answer, fds) = raw.ask_for_fds(VERSION, &proposal(ASKS));
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(fds.is_empty());
    assert_eq!(capabilities(&answer), json!({"max_msg_fds": 16}));
    assert_eq!(raw.errno(GET_INFO, &words(&INFO), &[]), 0);
}

#[test]
fn many_threads_ask_while_the_client_asks_too() {
    let served = serve();
    let (mut main, twin) = twins(&served);
    let mover = Mover::new(twin, Duration::ZERO);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        four_threads_move(scope, &*dma);
        // Whatever comes here is the answer.
        for n in 0..300_u32 {
            let body = region_body(0x40, 0, 4, &n.to_ne_bytes());
            assert_eq!(main.errno(WRITE, &body, &[]), 0);
            let seen = main.ask(READ, &region_body(0x40, 0, 4, &[]), &[]);
            assert_eq!(seen.body[16..], n.to_ne_bytes());
        }
    });
    assert_eq!(mover.asked(), 4 * 100 * 2);
    // Larger than one command, and copied inside the client's memory.
    let data = pattern(200_000);
    write(&*dma, RAM + 5, &data).unwrap();
    dma.copy(RAM + 5, RAM + 0x4_0001, 200_000).unwrap();
    assert!(mover.memory.lock().unwrap()[0x4_0001..][..200_000] == data);
    drop(mover);
}

/// "Using separate sockets for each command channel avoids introducing an artificial point of synchronization between
/// the channels" ("Socket").
#[test]
fn the_serving_thread_asks_too_and_a_request_may_wait_for_who_asks() {
    let served = serve();
    let (mut main, twin) = twins(&served);
    // Slower than a request may be without a second socket.
    let mover = Mover::new(twin, Duration::from_millis(150));
    mover.memory.lock().unwrap()[..8].copy_from_slice(&[6; 8]);
    let seen = Arc::new(Mutex::new(None));
    let result = Arc::clone(&seen);
    served.probe.state().on_write = Some(Arc::new(move |attachment| {
        let dma = Arc::clone(&attachment.dma);
        let copied = dma.copy(RAM, RAM + 64, 8);
        let worker = std::thread::spawn(move || read(&*dma, RAM + 64, 8));
        *result.lock().unwrap() = Some((copied, worker.join().unwrap()));
    }));
    assert_eq!(main.errno(WRITE, &region_body(0, 0, 1, &[1]), &[]), 0);
    let (copied, seen) = seen.lock().unwrap().take().unwrap();
    assert_eq!((copied, seen), (Ok(()), Ok(vec![6; 8])));
    assert_eq!(mover.asked(), 3);
}

#[test]
fn an_unmap_ends_the_waits_of_the_second_socket() {
    let served = serve();
    let (mut main, mut twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(&*dma, RAM, 4));
        let asked = twin.answer();
        let since = Instant::now();
        assert_eq!(main.errno(DMA_UNMAP, &unmap_body(2, 0, 0), &[]), 0);
        let gone = DmaError::Unmapped {
            address: RAM,
            len: 4,
        };
        assert_eq!(waits.join().unwrap(), Err(gone));
        assert!(since.elapsed() < Duration::from_secs(1));
        // A late reply is dropped.
        let body = [longs(&[RAM, 4]), vec![9; 4]].concat();
        twin.send(&reply_to(&asked, 0, &body), &[]);
        let again = map_body(3, 0, RAM, 0x1000);
        assert_eq!(main.errno(DMA_MAP, &again, &[]), 0);
    });
    assert_asked(&*dma, &mut twin);
}

#[test]
fn commands_over_the_second_socket_are_refused_in_step() {
    let served = serve();
    let (mut main, mut twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(&*dma, RAM, 4));
        let asked = twin.answer();
        // Also what the first socket takes, and what is neither command nor reply.
        let commands = [
            (GET_INFO, 0, ENOTSUP),
            (VERSION, 0, ENOTSUP),
            (DMA_READ, 0, ENOTSUP),
            (99, 0, ENOTSUP),
            (GET_INFO, 3, EINVAL),
        ];
        for (number, flags, errno) in commands {
            twin.send(&framed(3, number, 32, flags, &[0; 16]), &[]);
            let answer = twin.answer();
            assert_eq!((answer.id, answer.command), (3, number));
            assert_eq!((answer.errno, answer.flags), (errno, REPLY | ERROR));
            assert!(answer.body.is_empty());
        }
        // Wants no answer, and what comes after it has the next one.
        twin.send(&framed(4, GET_INFO, 32, NO_REPLY, &[0; 16]), &[]);
        twin.send(&framed(5, GET_INFO, 32, 0, &[0; 16]), &[]);
        assert_eq!(twin.answer().id, 5);
        let body = [longs(&[RAM, 4]), vec![5; 4]].concat();
        twin.send(&reply_to(&asked, 0, &body), &[]);
        assert_eq!(waits.join().unwrap(), Ok(vec![5; 4]));
    });
    assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
    assert!(is_quiet(&main) && is_quiet(&twin));
}

#[test]
fn descriptors_over_the_second_socket_are_closed() {
    let served = serve();
    let (_main, mut twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(&*dma, RAM, 4));
        let asked = twin.answer();
        let body = [longs(&[RAM, 4]), vec![5; 4]].concat();
        let reply = reply_to(&asked, 0, &body);
        let messages = [
            message(GET_INFO, &words(&INFO)),
            framed(1, GET_INFO, 32, NO_REPLY, &[0; 16]),
            reply,
        ];
        let mut ends = Vec::new();
        for message in messages {
            let (end, theirs) = std::io::pipe().unwrap();
            twin.send(&message, &[theirs.as_fd(); 3]);
            ends.push(end);
        }
        assert_eq!(twin.answer().errno, ENOTSUP);
        assert_eq!(waits.join().unwrap(), Ok(vec![5; 4]));
        for mut end in ends {
            // Its end, once nobody can write to it.
            assert_eq!(end.read(&mut [0; 1]).unwrap(), 0);
        }
    });
}

#[test]
fn a_size_that_cannot_be_ends_the_second_socket_and_not_the_first() {
    for (flags, answered) in [(0, true), (NO_REPLY, false), (REPLY, false)] {
        let served = serve();
        let (mut main, mut twin) = twins(&served);
        let dma = served.probe.attachment().dma;
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| read(&*dma, RAM, 4));
            twin.answer();
            twin.send(&framed(1, GET_INFO, 3, flags, &[]), &[]);
            if answered {
                assert_eq!(twin.answer().errno, EINVAL);
            }
            assert!(twin.is_closed());
            assert_eq!(waits.join().unwrap(), Err(FAILED));
        });
        assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
    }
}

#[test]
fn a_change_reads_and_writes_over_the_second_socket() {
    let served = serve();
    let (_main, twin) = twins(&served);
    let mover = Mover::new(twin, Duration::ZERO);
    let dma = served.probe.attachment().dma;
    mover.memory.lock().unwrap()[8] = 5;
    dma.access(RAM + 8, 8, DmaAccess::Change, &mut |piece| {
        let word = vm_memory::VolatileMemory::get_ref::<u64>(&piece, 0).unwrap();
        word.store(word.load() + 7);
    })
    .unwrap();
    assert_eq!(mover.memory.lock().unwrap()[8], 12);
    assert_eq!(mover.asked(), 2);
}
