//! Memory that comes without a descriptor: the server asks the client for it (specification, `VFIO_USER_DMA_MAP`,
//! `VFIO_USER_DMA_READ`, `VFIO_USER_DMA_WRITE`, "Read and Write Operations").

use std::os::fd::AsFd as _;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Scope};
use std::time::{Duration, Instant};

use numagpu_devices::bus::{DmaAccess, DmaError, DmaPort, Mapped};
use vm_memory::{Bytes as _, VolatileMemory as _};

use crate::device::{Served, serve};
use crate::raw::*;

/// Where the guest's memory is, and how much there is.
pub const RAM: u64 = 0x10_0000;
pub const SIZE: usize = 0x8_0000;

const ENOSYS: u32 = 38;
const EFAULT: u32 = 14;

/// A client with memory that it moves when it is asked to.
struct Guest {
    raw: Raw,
    memory: Arc<Mutex<Vec<u8>>>,
    /// Commands of the server: number, address, count.
    asked: Arc<Mutex<Vec<(u16, u64, u64)>>>,
    /// Replies to this client's commands.
    replies: Receiver<Answer>,
    reader: Option<JoinHandle<()>>,
}

impl Guest {
    fn new(served: &Served, proposal: &str) -> Self {
        let mut raw = Raw::proposing(&served.path(), proposal);
        let body = map_body(3, 0, RAM, SIZE as u64);
        assert_eq!(raw.errno(DMA_MAP, &body, &[]), 0);
        let memory = Arc::new(Mutex::new(vec![0; SIZE]));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (send, replies) = channel();
        let mut reading = Raw {
            stream: raw.stream.try_clone().unwrap(),
        };
        reading.stream.set_read_timeout(None).unwrap();
        let (owned, log) = (Arc::clone(&memory), Arc::clone(&asked));
        let reader = std::thread::spawn(move || {
            while let Ok(message) = reading.try_answer() {
                if message.flags & 0xf == REPLY {
                    let _ = send.send(message);
                    continue;
                }
                let (address, count) = place(&message);
                log.lock().unwrap().push((message.command, address, count));
                let at = usize::try_from(address - RAM).unwrap();
                let range = at..at + usize::try_from(count).unwrap();
                let mut body = longs(&[address, count]);
                match message.command {
                    DMA_READ => body.extend(&owned.lock().unwrap()[range]),
                    DMA_WRITE => {
                        owned.lock().unwrap()[range].copy_from_slice(&message.body[16..]);
                    }
                    other => panic!("command {other}"),
                }
                reading.send(&reply_to(&message, 0, &body), &[]);
            }
        });
        Self {
            raw,
            memory,
            asked,
            replies,
            reader: Some(reader),
        }
    }

    fn ask(&self, command: u16, body: &[u8]) -> Answer {
        self.raw.send(&message(command, body), &[]);
        self.replies.recv_timeout(Duration::from_secs(5)).unwrap()
    }

    fn take_asked(&self) -> Vec<(u16, u64, u64)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    fn memory(&self, address: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(address - RAM).unwrap();
        self.memory.lock().unwrap()[at..at + len].to_vec()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.raw.stream.shutdown(std::net::Shutdown::Both);
        self.reader.take().unwrap().join().unwrap();
    }
}

/// Address and count of a command.
pub fn place(message: &Answer) -> (u64, u64) {
    let long = |at: usize| u64::from_ne_bytes(message.body[at..at + 8].try_into().unwrap());
    (long(0), long(8))
}

pub fn reply_to(asked: &Answer, errno: u32, body: &[u8]) -> Vec<u8> {
    let size = 16 + u32::try_from(body.len()).unwrap();
    let flags = if errno == 0 { REPLY } else { REPLY | ERROR };
    let mut bytes = framed(asked.id, asked.command, size, flags, body);
    bytes[12..16].copy_from_slice(&errno.to_ne_bytes());
    bytes
}

pub fn read(dma: &dyn DmaPort, address: u64, len: usize) -> Result<Vec<u8>, DmaError> {
    let mut data = Vec::new();
    dma.access(address, len as u64, DmaAccess::Read, &mut |piece| {
        let at = data.len();
        data.resize(at + piece.len(), 0);
        piece.read_slice(&mut data[at..], 0).unwrap();
    })?;
    Ok(data)
}

pub fn write(dma: &dyn DmaPort, address: u64, data: &[u8]) -> Result<(), DmaError> {
    let mut rest = data;
    dma.access(address, data.len() as u64, DmaAccess::Write, &mut |piece| {
        let (now, later) = rest.split_at(piece.len());
        piece.write_slice(now, 0).unwrap();
        rest = later;
    })
}

pub fn pattern(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

/// A proposal with a `max_data_xfer_size`.
fn limited(most: u64) -> String {
    format!("{{\"capabilities\":{{\"max_data_xfer_size\":{most}}}}}\0")
}

/// `VFIO_USER_DMA_READ`, `VFIO_USER_DMA_WRITE`: address and count of 64 bits, data behind them.
#[test]
fn the_client_is_asked_for_memory_without_a_descriptor() {
    let served = serve();
    let guest = Guest::new(&served, PROPOSAL);
    let dma = served.probe.attachment().dma;
    assert_eq!(dma.mapped(RAM, SIZE as u64), Mapped::NoFd);
    let data = pattern(1000);
    write(&*dma, RAM + 3, &data).unwrap();
    assert_eq!(guest.take_asked(), [(DMA_WRITE, RAM + 3, 1000)]);
    assert!(guest.memory(RAM + 3, 1000) == data);
    assert!(read(&*dma, RAM + 3, 1000).unwrap() == data);
    assert_eq!(guest.take_asked(), [(DMA_READ, RAM + 3, 1000)]);
    // Both directions of the socket are in step.
    let info = guest.ask(GET_INFO, &words(&[16, 0, 0, 0]));
    assert_eq!(info.body, words(&[16, 3, 9, 3]));
    assert!(read(&*dma, RAM, 0).unwrap().is_empty());
    let last = RAM + SIZE as u64 - 1;
    assert!(read(&*dma, last, 1).is_ok());
    let beyond = DmaError::Unmapped {
        address: last,
        len: 2,
    };
    assert_eq!(read(&*dma, last, 2), Err(beyond));
}

/// "The count field must not exceed the value of max_data_xfer_size of the peer" ("Read and Write Operations").
#[test]
fn commands_are_no_larger_than_the_client_takes() {
    for most in [1_u64, 4, 7, 8, 100, 4096] {
        let served = serve();
        let guest = Guest::new(&served, &limited(most));
        let dma = served.probe.attachment().dma;
        let data = pattern(if most < 8 { 64 } else { 20_000 });
        write(&*dma, RAM + 5, &data).unwrap();
        assert!(guest.memory(RAM + 5, data.len()) == data, "{most}");
        assert!(read(&*dma, RAM + 5, data.len()).unwrap() == data, "{most}");
        dma.copy(RAM + 5, RAM + 0x4_0001, data.len() as u64)
            .unwrap();
        assert!(guest.memory(RAM + 0x4_0001, data.len()) == data, "{most}");
        let asked = guest.take_asked();
        assert!(asked.iter().all(|it| it.2 <= most && it.2 > 0), "{most}");
        // No word is in two commands.
        let whole = |it: &&(u16, u64, u64)| it.1 / 8 == (it.1 + it.2 - 1) / 8;
        if most >= 8 {
            write(&*dma, RAM + 0x100, &[1; 8]).unwrap();
            assert!(guest.take_asked().iter().all(|it| whole(&it)));
        }
    }
    let served = serve();
    let _guest = Guest::new(&served, &limited(0));
    let dma = served.probe.attachment().dma;
    let failed = DmaError::Failed { address: RAM };
    assert_eq!(read(&*dma, RAM, 4), Err(failed));
}

#[test]
fn a_change_reads_first_and_a_write_does_not() {
    let served = serve();
    let guest = Guest::new(&served, PROPOSAL);
    let dma = served.probe.attachment().dma;
    write(&*dma, RAM + 8, &5_u64.to_ne_bytes()).unwrap();
    guest.take_asked();
    let mut pieces = 0;
    dma.access(RAM + 8, 8, DmaAccess::Change, &mut |piece| {
        pieces += 1;
        // Aligned as in the guest, so that atomic operations work.
        let word = piece
            .get_atomic_ref::<std::sync::atomic::AtomicU64>(0)
            .unwrap();
        word.fetch_add(7, std::sync::atomic::Ordering::SeqCst);
    })
    .unwrap();
    assert_eq!(pieces, 1);
    assert_eq!(guest.memory(RAM + 8, 8), 12_u64.to_ne_bytes());
    let both = [(DMA_READ, RAM + 8, 8), (DMA_WRITE, RAM + 8, 8)];
    assert_eq!(guest.take_asked(), both);
}

/// "readable", "writeable" (`VFIO_USER_DMA_MAP`).
#[test]
fn flags_of_maps_hold_for_asked_memory_too() {
    let served = serve();
    let guest = Guest::new(&served, PROPOSAL);
    let dma = served.probe.attachment().dma;
    for (flags, address) in [(1, 0x1000), (2, 0x2000)] {
        let body = map_body(flags, 0, address, 0x1000);
        assert_eq!(guest.ask(DMA_MAP, &body).errno, 0);
    }
    let read_only = DmaError::ReadOnly { address: 0x1000 };
    assert_eq!(write(&*dma, 0x1000, &[1]), Err(read_only));
    let change = |address| dma.access(address, 1, DmaAccess::Change, &mut |_| panic!("called"));
    assert_eq!(change(0x1000), Err(read_only));
    let unreadable = DmaError::Unmapped {
        address: 0x2000,
        len: 1,
    };
    assert_eq!(read(&*dma, 0x2000, 1), Err(unreadable));
    assert_eq!(change(0x2000), Err(unreadable));
    assert_eq!(guest.take_asked(), []);
}

#[test]
fn accesses_and_copies_cross_from_files_to_asked_memory_and_back() {
    let served = serve();
    let guest = Guest::new(&served, &limited(1000));
    let dma = served.probe.attachment().dma;
    // A file below the asked memory and one above it, as neighbours.
    let file = memfd(0x4000);
    for (offset, address) in [(0, RAM - 0x2000), (0x2000, RAM + SIZE as u64)] {
        let body = map_body(3, offset, address, 0x2000);
        guest.raw.send(&message(DMA_MAP, &body), &[file.as_fd()]);
        let answer = guest.replies.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(answer.errno, 0);
    }
    let (start, whole) = (RAM - 0x2000, SIZE + 0x4000);
    let mut model = pattern(whole);
    write(&*dma, start, &model).unwrap();
    assert!(read(&*dma, start, whole).unwrap() == model);
    let cases = [
        (0, 0x1800, 0x1000),
        (0x1800, 0, 0x1001),
        (0x1fff, 0x2003, 0x3000),
        (0x2003, 0x1fff, 0x3000),
        (0x5000, 0x5008, 0x2801),
        (0x5008, 0x5000, 0x2801),
        (SIZE + 0x1000, SIZE + 0x1800, 0x2001),
        (SIZE + 0x1800, SIZE + 0x1000, 0x2001),
        (7, 9, 0x9000),
    ];
    for (source, destination, len) in cases {
        let (from, to) = (start + source as u64, start + destination as u64);
        dma.copy(from, to, len as u64).unwrap();
        model.copy_within(source..source + len, destination);
        let seen = read(&*dma, start, whole).unwrap();
        let wrong = seen.iter().zip(&model).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "{source:#x} to {destination:#x}, {len:#x}");
    }
}

/// Asserts that a read is asked for over `raw` and gets what is answered there.
pub fn assert_asked(dma: &dyn DmaPort, raw: &mut Raw) {
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(dma, RAM, 4));
        let asked = raw.answer();
        let body = [longs(&[RAM, 4]), vec![5; 4]].concat();
        raw.send(&reply_to(&asked, 0, &body), &[]);
        assert_eq!(waits.join().unwrap(), Ok(vec![5; 4]));
    });
}

/// Starts threads that write and read back, each at its own place.
pub fn four_threads_move<'s>(scope: &'s Scope<'s, '_>, dma: &'s dyn DmaPort) {
    for thread in 0..4_u64 {
        scope.spawn(move || {
            let at = RAM + thread * 0x1_0000;
            for round in 0..100_u64 {
                let data = ((round << 8) | thread).to_ne_bytes().repeat(100);
                write(dma, at + round, &data).unwrap();
                assert!(read(dma, at + round, data.len()).unwrap() == data);
            }
        });
    }
}

#[test]
fn many_threads_and_the_clients_own_requests_share_the_socket() {
    let served = serve();
    let guest = Guest::new(&served, PROPOSAL);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        four_threads_move(scope, &*dma);
        for n in 0..300_u32 {
            let body = region_body(0x40, 0, 4, &n.to_ne_bytes());
            assert_eq!(guest.ask(WRITE, &body).errno, 0);
            let seen = guest.ask(READ, &region_body(0x40, 0, 4, &[]));
            assert_eq!(seen.body[16..], n.to_ne_bytes());
        }
    });
}

/// "It is still illegal for implementations to stall command or reply processing indefinitely while waiting for
/// replies on the other channel" ("Socket").
#[test]
fn the_serving_thread_never_waits_for_the_client() {
    let served = serve();
    let guest = Guest::new(&served, PROPOSAL);
    let seen = Arc::new(Mutex::new(None));
    let result = Arc::clone(&seen);
    served.probe.state().on_write = Some(Arc::new(move |attachment| {
        let dma = &attachment.dma;
        let copied = dma.copy(RAM, RAM + 64, 8);
        *result.lock().unwrap() = Some((read(&**dma, RAM, 8), copied));
    }));
    let since = Instant::now();
    let written = guest.ask(WRITE, &region_body(0, 0, 1, &[1]));
    assert_eq!(written.errno, 0);
    assert!(since.elapsed() < Duration::from_secs(1));
    let failed = DmaError::Failed { address: RAM };
    let (read, copied) = seen.lock().unwrap().take().unwrap();
    assert_eq!((read, copied), (Err(failed), Err(failed)));
    assert_eq!(guest.take_asked(), []);
}

#[test]
fn a_request_that_waits_for_a_worker_that_waits_for_the_client_ends() {
    let served = serve();
    let guest = Guest::new(&served, PROPOSAL);
    let seen = Arc::new(Mutex::new(None));
    let result = Arc::clone(&seen);
    served.probe.state().on_write = Some(Arc::new(move |attachment| {
        let dma = Arc::clone(&attachment.dma);
        let worker = std::thread::spawn(move || read(&*dma, RAM, 8));
        *result.lock().unwrap() = Some(worker.join().unwrap());
    }));
    let since = Instant::now();
    let written = guest.ask(WRITE, &region_body(0, 0, 1, &[1]));
    assert_eq!(written.errno, 0);
    assert!(since.elapsed() < Duration::from_secs(2));
    let failed = DmaError::Failed { address: RAM };
    assert_eq!(seen.lock().unwrap().take(), Some(Err(failed)));
    // The map is none the worse for it.
    served.probe.state().on_write = None;
    let dma = served.probe.attachment().dma;
    assert_eq!(read(&*dma, RAM, 4), Ok(vec![0; 4]));
}

/// A client that answers nothing by itself, with one asked map.
fn silent(served: &Served) -> Raw {
    let mut raw = Raw::ready(&served.path());
    let body = map_body(3, 0, RAM, SIZE as u64);
    assert_eq!(raw.errno(DMA_MAP, &body, &[]), 0);
    raw
}

/// "The server must release all references to that DMA region before replying, which potentially includes in-flight
/// DMA transactions" (`VFIO_USER_DMA_UNMAP`).
#[test]
fn an_unmap_ends_the_waits_for_its_memory_and_no_others() {
    let served = serve();
    let mut raw = silent(&served);
    let other = map_body(3, 0, 0x1000, 0x1000);
    assert_eq!(raw.errno(DMA_MAP, &other, &[]), 0);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        let kept = scope.spawn(|| read(&*dma, 0x1000, 4));
        let asked_kept = raw.answer();
        assert_eq!(place(&asked_kept), (0x1000, 4));
        let ended = scope.spawn(|| write(&*dma, RAM, &[1; 16]));
        let asked_ended = raw.answer();
        assert_eq!(asked_ended.command, DMA_WRITE);
        let since = Instant::now();
        let unmapped = raw.ask(DMA_UNMAP, &unmap_body(0, RAM, SIZE as u64), &[]);
        assert_eq!((unmapped.errno, unmapped.body.len()), (0, 24));
        assert!(since.elapsed() < Duration::from_secs(1));
        let gone = DmaError::Unmapped {
            address: RAM,
            len: 16,
        };
        assert_eq!(ended.join().unwrap(), Err(gone));
        // The late reply is dropped, the other one is still waited for.
        raw.send(&reply_to(&asked_ended, 0, &longs(&[RAM, 16])), &[]);
        assert_eq!(raw.errno(GET_INFO, &words(&[16, 0, 0, 0]), &[]), 0);
        let body = [longs(&[0x1000, 4]), vec![9; 4]].concat();
        raw.send(&reply_to(&asked_kept, 0, &body), &[]);
        assert_eq!(kept.join().unwrap(), Ok(vec![9; 4]));
    });
}

/// "Socket Disconnection Behavior".
#[test]
fn a_client_that_goes_away_ends_all_waits() {
    for unmap_all in [false, true] {
        let served = serve();
        let mut raw = silent(&served);
        let dma = served.probe.attachment().dma;
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| read(&*dma, RAM, 4));
            raw.answer();
            let since = Instant::now();
            if unmap_all {
                assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(2, 0, 0), &[]), 0);
                let gone = DmaError::Unmapped {
                    address: RAM,
                    len: 4,
                };
                assert_eq!(waits.join().unwrap(), Err(gone));
            } else {
                drop(raw);
                assert_eq!(waits.join().unwrap(), Err(DmaError::Disconnected));
            }
            assert!(since.elapsed() < Duration::from_secs(1));
        });
        if !unmap_all {
            served.probe.wait_detached();
            assert_eq!(read(&*dma, RAM, 4), Err(DmaError::Disconnected));
        }
    }
}

#[test]
fn a_client_that_never_answers_is_not_asked_again() {
    let served = serve();
    let mut raw = silent(&served);
    let dma = served.probe.attachment().dma;
    let since = Instant::now();
    let failed = DmaError::Failed { address: RAM };
    assert_eq!(read(&*dma, RAM, 4), Err(failed));
    let waited = since.elapsed();
    assert!(waited >= Duration::from_secs(4) && waited < Duration::from_secs(8));
    let asked = raw.answer();
    let since = Instant::now();
    assert_eq!(write(&*dma, RAM, &[0; 4]), Err(failed));
    assert!(since.elapsed() < Duration::from_secs(1));
    // It only was slow. What was given up stays so until it is mapped anew.
    let body = [longs(&[RAM, 4]), vec![9; 4]].concat();
    raw.send(&reply_to(&asked, 0, &body), &[]);
    assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(2, 0, 0), &[]), 0);
    let body = map_body(3, 0, RAM, 0x1000);
    assert_eq!(raw.errno(DMA_MAP, &body, &[]), 0);
    assert_asked(&*dma, &mut raw);
}

/// What a client may answer instead ("Header": the error number is optional).
#[test]
fn refusals_and_nonsense_fail_the_access_and_leave_the_stream_in_step() {
    let at = |address, count, data: &[u8]| [&longs(&[address, count])[..], data].concat();
    // Reply to a read of 4 bytes: error number, body, and whether the client is asked again.
    let cases = [
        (EFAULT, vec![], true),
        (ENOSYS, vec![], false),
        (4095, vec![], true),
        (4096, vec![], true),
        (65_536 + ENOSYS, vec![], true),
        (i32::MAX.unsigned_abs(), vec![], true),
        (u32::MAX, vec![], true),
        (0, vec![], false),
        (0, at(RAM, 4, &[]), false),
        (0, at(RAM, 4, &[1; 3]), false),
        (0, at(RAM + 1, 4, &[1; 4]), false),
        (0, at(RAM, 5, &[1; 5]), false),
        (0, at(RAM, u64::MAX, &[1; 4]), false),
    ];
    for (errno, body, again) in cases {
        let served = serve();
        let mut raw = silent(&served);
        let dma = served.probe.attachment().dma;
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| read(&*dma, RAM, 4));
            let asked = raw.answer();
            raw.send(&reply_to(&asked, errno, &body), &[]);
            let failed = DmaError::Failed { address: RAM };
            assert_eq!(waits.join().unwrap(), Err(failed), "{errno} {body:?}");
            let info = raw.ask(GET_INFO, &words(&[16, 0, 0, 0]), &[]);
            assert_eq!(info.body, words(&[16, 3, 9, 3]));
            if again {
                let waits = scope.spawn(|| read(&*dma, RAM, 4));
                let asked = raw.answer();
                raw.send(&reply_to(&asked, 0, &at(RAM, 4, &[3; 4])), &[]);
                assert_eq!(waits.join().unwrap(), Ok(vec![3; 4]));
            } else {
                assert_eq!(read(&*dma, RAM, 4), Err(failed));
            }
        });
    }
}

/// The reply to a write has a count of 4 bytes in the specification's table, of 8 in the clients there are.
#[test]
fn replies_to_writes_have_a_count_of_either_width() {
    let served = serve();
    let mut raw = silent(&served);
    let dma = served.probe.attachment().dma;
    for len in [12, 16] {
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| write(&*dma, RAM, &[7; 6]));
            let asked = raw.answer();
            assert_eq!((asked.command, place(&asked)), (DMA_WRITE, (RAM, 6)));
            assert_eq!(asked.body[16..], [7; 6]);
            let body = longs(&[RAM, 6]);
            raw.send(&reply_to(&asked, 0, &body[..len]), &[]);
            assert_eq!(waits.join().unwrap(), Ok(()));
        });
    }
}

#[test]
fn replies_may_come_in_another_order_and_in_pieces() {
    let served = serve();
    let mut raw = silent(&served);
    let dma = served.probe.attachment().dma;
    let whole = 16 + 16 + 4;
    for cut in 1..whole {
        std::thread::scope(|scope| {
            let first = scope.spawn(|| read(&*dma, RAM, 4));
            let asked_first = raw.answer();
            let second = scope.spawn(|| read(&*dma, RAM + 4, 4));
            let asked_second = raw.answer();
            let reply = |asked: &Answer, byte: u8| {
                let (address, count) = place(asked);
                reply_to(
                    asked,
                    0,
                    &[longs(&[address, count]), vec![byte; 4]].concat(),
                )
            };
            let late = reply(&asked_second, 2);
            raw.send(&late[..cut], &[]);
            std::thread::sleep(Duration::from_micros(200));
            let rest = [&late[cut..], &reply(&asked_first, 1)].concat();
            raw.send(&rest, &[]);
            assert_eq!(first.join().unwrap(), Ok(vec![1; 4]), "{cut}");
            assert_eq!(second.join().unwrap(), Ok(vec![2; 4]), "{cut}");
        });
    }
    assert_eq!(raw.errno(GET_INFO, &words(&[16, 0, 0, 0]), &[]), 0);
}

/// A client that reads nothing: a device's write fills the socket, and neither side waits for ever.
#[test]
fn a_client_that_does_not_read_is_given_up() {
    let served = serve();
    let raw = silent(&served);
    let dma = served.probe.attachment().dma;
    let since = Instant::now();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let dma = &dma;
            scope.spawn(move || {
                let at = RAM + n * 0x1_0000;
                assert!(write(&**dma, at, &pattern(0x1_0000)).is_err());
            });
        }
    });
    assert!(since.elapsed() < Duration::from_secs(30));
    drop(raw);
    served.probe.wait_detached();
}
