//! A session with a GPU behind it: every command gets its one answer in its turn, and nothing stays behind.
//!
//! The client sends the stream as it is, with descriptors, cuts and pauses as each message says ([`Manner`]), and reads
//! whatever comes meanwhile; only a reply in it gets the number of what the server asked for last. A model of two lines knows what has to be answered: each whole command that asks for it, up to the
//! first size that cannot be.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use numagpu_devices::bus::HbmStore;
use numagpu_devices::memory::AnonymousStore;
use numagpu_devices::{Fabric, Gpu, GpuConfig, PartitionConfig};
use numagpu_vmm_glue::vfio_user::session::{Buffers, Session};
use numagpu_vmm_glue::vfio_user::wire::{HEADER_SIZE, Header, Kind, flag};
use numagpu_vmm_glue::vfio_user::{Limits, MAX_MESSAGE};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::pipe;

use crate::Tally;
use crate::messages::{Manner, Piece, pieces};

/// First address and bytes of the HBM.
pub const HBM: u64 = 0x1_0000_0000;
/// Bytes of the HBM, and of the file of guest RAM.
pub const SIZE: u64 = 1 << 20;

/// How long a session may take to end once its client has gone.
const LIMIT: Duration = Duration::from_secs(20);

/// How long the client of one input waits in all, so that no input takes long.
const PATIENCE: Duration = Duration::from_millis(50);

/// What all inputs use.
struct Bench {
    gpu: Arc<Gpu>,
    /// Of what a client can send: RAM, an event descriptor, both ends of a pipe, a device.
    files: Vec<OwnedFd>,
    /// Descriptors of the process between two inputs, from the second on.
    open: Mutex<Option<usize>>,
}

fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| {
        let store = AnonymousStore::new(SIZE as usize).expect("memory");
        let hbm = PartitionConfig {
            base: HBM,
            size: SIZE,
            pxm: Some(1),
            store: Arc::new(store) as Arc<dyn HbmStore>,
        };
        let config = GpuConfig {
            boot_delay: Duration::ZERO,
            ..GpuConfig::new(0, vec![hbm])
        };
        let ram = memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memory file");
        ftruncate(&ram, SIZE).expect("its size");
        let event = eventfd(0, EventfdFlags::CLOEXEC).expect("an event descriptor");
        let (from, to) = pipe().expect("a pipe");
        let null = File::open("/dev/null").expect("a device");
        Bench {
            gpu: Gpu::new(config, Fabric::new()).expect("a GPU"),
            files: vec![ram, event, from, to, null.into()],
            open: Mutex::new(None),
        }
    })
}

/// Sends a stream to a session of its own.
pub fn run(stream: &[u8]) -> Tally {
    let bench = bench();
    let mut open = bench.open.lock().unwrap_or_else(PoisonError::into_inner);
    let (client, server) = UnixStream::pair().expect("a socket pair");
    client.set_nonblocking(true).expect("a flag");
    let function = Arc::clone(&bench.gpu) as _;
    let session = std::thread::spawn(move || {
        let server = Arc::new(OwnedFd::from(server));
        // Why it ended is the client's doing.
        let _ended =
            Session::new(function, server, Limits::default()).run(&mut Buffers::default(), || ());
    });
    let mut client = Client {
        socket: client,
        received: Vec::new(),
        gone: false,
        patience: PATIENCE,
    };
    let mut expected = Vec::new();
    let mut tally = Tally::default();
    for piece in pieces(stream) {
        match piece {
            Piece::Message(header, _) => {
                tally.messages += 1;
                expected.extend(answer(&header));
            }
            Piece::BadSize(header, _) => expected.extend(answer(&header)),
            Piece::Rest(_) => {}
        }
        let manner = Manner::of(piece.bytes());
        match (piece, client.asked()) {
            (Piece::Message(header, reply), Some(asked)) if header.kind() == Kind::Reply => {
                let mut reply = reply.to_vec();
                let number = [asked.id.to_ne_bytes(), asked.command.to_ne_bytes()].concat();
                reply.splice(..number.len(), number);
                client.send(&reply, manner, &bench.files);
            }
            _ => client.send(piece.bytes(), manner, &bench.files),
        }
    }
    client.finish();
    assert!(session.join().is_ok(), "the session panicked");
    client.check(&expected, &mut tally);
    drop(client);
    let now = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    // The GPU's threads open nothing, but the first input has them started.
    let before = *open.get_or_insert(now);
    assert!(now <= before, "{now} descriptors are open, {before} were");
    tally
}

/// Id and command of the answer that a message gets, if it gets one.
fn answer(header: &Header) -> Option<(u16, u16)> {
    (header.kind() != Kind::Reply && !header.no_reply()).then_some((header.id, header.command))
}

struct Client {
    socket: UnixStream,
    received: Vec<u8>,
    /// The server has closed.
    gone: bool,
    /// How long it still waits.
    patience: Duration,
}

impl Client {
    /// Sends bytes in one or two pieces, descriptors with the first.
    fn send(&mut self, bytes: &[u8], manner: Manner, files: &[OwnedFd]) {
        let of = |n: usize| files.get((manner.kind + n) % files.len()).map(AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = (0..manner.fds).filter_map(of).collect();
        let (first, second) = bytes.split_at_checked(manner.cut).unwrap_or((bytes, &[]));
        let mut fds = fds.as_slice();
        for mut rest in [first, second] {
            while !rest.is_empty() && !self.gone {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(17))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(fds));
                }
                let parts = [IoSlice::new(rest)];
                match sendmsg(&self.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                    Ok(sent) => {
                        rest = rest.get(sent..).unwrap_or_default();
                        fds = &[];
                    }
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => self.gone = true,
                }
                self.receive();
            }
        }
        if !manner.pause.is_zero() {
            self.wait(manner.pause);
        }
    }

    /// What the server asked for last.
    fn asked(&self) -> Option<Header> {
        let mut rest = self.received.as_slice();
        let mut last = None;
        while let Some(header) = Header::decode(rest) {
            last = (header.kind() == Kind::Command).then_some(header).or(last);
            rest = rest.get(header.size.max(1) as usize..).unwrap_or_default();
        }
        last
    }

    /// Waits until the server asks for something, or `limit` is over.
    fn wait(&mut self, limit: Duration) {
        let limit = limit.min(self.patience);
        let (had, begun) = (self.asked(), Instant::now());
        while !self.gone && self.asked() == had && begun.elapsed() < limit {
            std::thread::yield_now();
            self.receive();
        }
        self.patience = self.patience.saturating_sub(begun.elapsed());
    }

    /// Takes what has come.
    fn receive(&mut self) {
        let mut buffer = [0; 1 << 16];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => self.gone = true,
                Ok(len) => {
                    self.received.extend(buffer.get(..len).unwrap_or_default());
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => self.gone = true,
            }
            return;
        }
    }

    /// Sends no more, and takes all that comes until the server has closed.
    fn finish(&mut self) {
        let _closed = self.socket.shutdown(std::net::Shutdown::Write);
        let end = Instant::now() + LIMIT;
        self.receive();
        while !self.gone {
            assert!(Instant::now() < end, "the session does not end");
            std::thread::yield_now();
            self.receive();
        }
    }

    /// Holds what came against what had to.
    fn check(&self, expected: &[(u16, u16)], tally: &mut Tally) {
        let mut expected = expected.iter();
        let mut rest = self.received.as_slice();
        while let Some(header) = Header::decode(rest) {
            let size = header.size as usize;
            assert!((HEADER_SIZE..=MAX_MESSAGE).contains(&size), "{header:?}");
            // The server may have closed in the middle of one.
            let Some((message, next)) = rest.split_at_checked(size) else {
                break;
            };
            rest = next;
            if header.kind() == Kind::Command {
                assert!(matches!(header.command, 11 | 12), "{header:?}");
                tally.asked += 1;
                continue;
            }
            let error = message.get(12..16).and_then(|it| it.try_into().ok());
            let error = u32::from_ne_bytes(error.expect("four bytes of a header"));
            if header.is_error() {
                assert!(
                    size == HEADER_SIZE && (1..4096).contains(&error),
                    "{header:?} {error}"
                );
                tally.refused += 1;
            } else {
                assert!(
                    error == 0 && header.flags == flag::REPLY,
                    "{header:?} {error}"
                );
                tally.good += 1;
            }
            let answered = Some(&(header.id, header.command));
            assert_eq!(answered, expected.next(), "answers come in order, and once");
        }
        assert_eq!(expected.next(), None, "a command without an answer");
    }
}
