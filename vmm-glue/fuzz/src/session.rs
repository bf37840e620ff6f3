//! A session with a GPU behind it: every command gets its one answer in its turn, and nothing stays behind.
//!
//! The client sends the stream as it is, with descriptors, cuts and pauses as each message says ([`Manner`]), and reads
//! whatever comes meanwhile; only a reply in it gets the number of what the server asked for last. If the server gave it a
//! second socket it sends replies there, and commands that say so ([`Manner::twin`]), which are refused. A model of a few lines
//! knows what has to be answered: each whole command that asks for it, up to the first size that cannot be, or perhaps to
//! another major version.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use numagpu_devices::bus::HbmStore;
use numagpu_devices::memory::AnonymousStore;
use numagpu_devices::{Fabric, Gpu, GpuConfig, PartitionConfig};
use numagpu_vmm_glue::vfio_user::session::{Buffers, Session};
use numagpu_vmm_glue::vfio_user::wire::{HEADER_SIZE, Header, Kind, command, flag};
use numagpu_vmm_glue::vfio_user::{Limits, MAX_MESSAGE};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
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
    let mut client = Client::new(client);
    let mut tally = Tally::default();
    for piece in pieces(stream) {
        if let Piece::Message(..) = piece {
            tally.messages += 1;
        }
        client.play(piece, &bench.files);
    }
    client.finish();
    assert!(session.join().is_ok(), "the session panicked");
    client.check(&mut tally);
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

/// One socket of the client's.
struct Line {
    socket: UnixStream,
    received: Vec<u8>,
    /// All that the server sent has come, and it has closed.
    gone: bool,
    /// The server takes no more; what it sent before may still be to come.
    full: bool,
    /// What has to be answered over it.
    expected: Vec<(u16, u16)>,
    /// How many answers there are before an end that another major version may bring: it does before one was agreed on.
    may_end: Vec<usize>,
}

impl Line {
    fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).expect("a flag");
        Self {
            socket,
            received: Vec::new(),
            gone: false,
            full: false,
            expected: Vec::new(),
            may_end: Vec::new(),
        }
    }

    /// Takes what has come; the first descriptor that did.
    fn receive(&mut self) -> Option<OwnedFd> {
        let mut buffer = [0; 1 << 16];
        let mut first = None;
        while !self.gone {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match recvmsg(&self.socket, &mut parts, &mut control, flags) {
                Ok(got) if got.bytes == 0 => self.gone = true,
                Ok(got) => {
                    for message in control.drain() {
                        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
                            first = first.or(fds.next());
                        }
                    }
                    let bytes = buffer.get(..got.bytes).unwrap_or_default();
                    self.received.extend(bytes);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => self.gone = true,
            }
        }
        first
    }

    /// The last command that came.
    fn asked(&self) -> Option<Header> {
        let mut rest = self.received.as_slice();
        let mut last = None;
        while let Some(header) = Header::decode(rest) {
            last = (header.kind() == Kind::Command).then_some(header).or(last);
            rest = rest.get(header.size.max(1) as usize..).unwrap_or_default();
        }
        last
    }

    /// Answers that came.
    fn answers(&self) -> usize {
        let mut rest = self.received.as_slice();
        let mut answers = 0;
        while let Some(header) = Header::decode(rest)
            && let Some(next) = rest.get(header.size.max(1) as usize..)
        {
            answers += usize::from(header.kind() == Kind::Reply);
            rest = next;
        }
        answers
    }

    /// Holds what came against what had to: over the socket that the server asks over, and until its end.
    fn check(&self, asks: bool, to_the_end: bool, tally: &mut Tally) {
        let mut expected = self.expected.iter();
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
                assert!(
                    asks && matches!(header.command, 11 | 12),
                    "{header:?}, {asks}"
                );
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
        let left = expected.len();
        let answered = self.expected.len() - left;
        assert!(
            left == 0 || !to_the_end || self.may_end.contains(&answered),
            "{left} commands without an answer after {answered}"
        );
    }
}

struct Client {
    main: Line,
    /// The second socket, once the server has given one.
    twin: Option<Line>,
    /// Whether the first one's stream had a size that cannot be, which ends both.
    broken: bool,
    /// How long it still waits.
    patience: Duration,
}

impl Client {
    fn new(socket: UnixStream) -> Self {
        Self {
            main: Line::new(socket),
            twin: None,
            broken: false,
            patience: PATIENCE,
        }
    }

    /// Does what a piece of the stream says.
    fn play(&mut self, piece: Piece<'_>, files: &[OwnedFd]) {
        let manner = Manner::of(piece.bytes());
        let mut bytes = piece.bytes().to_vec();
        let header = match piece {
            Piece::Message(header, _) | Piece::BadSize(header, _) => Some(header),
            Piece::Rest(_) => None,
        };
        let is_message = matches!(piece, Piece::Message(..));
        self.broken |= matches!(piece, Piece::BadSize(..));
        let is_reply = is_message && header.is_some_and(|it| it.kind() == Kind::Reply);
        if is_reply && let Some(asked) = self.asked() {
            let number = [asked.id.to_ne_bytes(), asked.command.to_ne_bytes()].concat();
            bytes.splice(..number.len(), number);
        }
        // What ends the first socket's stream stays there.
        let over_twin = is_message && self.twin.is_some() && (is_reply || manner.twin);
        if let Some(header) = &header {
            let line = match &mut self.twin {
                Some(twin) if over_twin => twin,
                _ => &mut self.main,
            };
            line.expected.extend(answer(header));
            let major = piece.bytes().get(HEADER_SIZE..HEADER_SIZE + 2);
            if is_message && header.command == command::VERSION && major != Some(&[0; 2]) {
                line.may_end.push(line.expected.len());
            }
        }
        self.send(&bytes, over_twin, manner, files);
    }

    /// Sends bytes in one or two pieces, descriptors with the first.
    fn send(&mut self, bytes: &[u8], over_twin: bool, manner: Manner, files: &[OwnedFd]) {
        let of = |n: usize| files.get((manner.kind + n) % files.len()).map(AsFd::as_fd);
        let fds: Vec<BorrowedFd<'_>> = (0..manner.fds).filter_map(of).collect();
        let (first, second) = bytes.split_at_checked(manner.cut).unwrap_or((bytes, &[]));
        let mut fds = fds.as_slice();
        for mut rest in [first, second] {
            loop {
                let line = match &mut self.twin {
                    Some(twin) if over_twin => twin,
                    _ => &mut self.main,
                };
                if rest.is_empty() || line.gone || line.full {
                    break;
                }
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(17))];
                let mut control = SendAncillaryBuffer::new(&mut space);
                if !fds.is_empty() {
                    control.push(SendAncillaryMessage::ScmRights(fds));
                }
                let parts = [IoSlice::new(rest)];
                match sendmsg(&line.socket, &parts, &mut control, SendFlags::NOSIGNAL) {
                    Ok(sent) => {
                        rest = rest.get(sent..).unwrap_or_default();
                        fds = &[];
                    }
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Err(_) => line.full = true,
                }
                self.receive();
            }
        }
        if !manner.pause.is_zero() {
            self.wait(manner.pause);
        }
    }

    /// What the server asked for last, over the socket that it asks over.
    fn asked(&self) -> Option<Header> {
        self.twin.as_ref().unwrap_or(&self.main).asked()
    }

    /// Waits until the server asks for something or gives a second socket, or `limit` is over.
    fn wait(&mut self, limit: Duration) {
        let limit = limit.min(self.patience);
        let state = |client: &Self| (client.asked(), client.twin.is_some());
        let (had, begun) = (state(self), Instant::now());
        while !self.main.gone && state(self) == had && begun.elapsed() < limit {
            std::thread::yield_now();
            self.receive();
        }
        self.patience = self.patience.saturating_sub(begun.elapsed());
    }

    /// Takes what has come over both sockets.
    fn receive(&mut self) {
        let descriptor = self.main.receive();
        let named = b"\"twin_socket\":{\"supported\":true,\"fd_index\":0}";
        let mut received = self.main.received.windows(named.len());
        if self.twin.is_none()
            && let Some(descriptor) = descriptor
            && received.any(|it| it == named)
        {
            self.twin = Some(Line::new(descriptor.into()));
        }
        if let Some(twin) = &mut self.twin {
            twin.receive();
        }
    }

    /// Sends no more, and takes all that comes until the server has closed. What went over the second socket is answered
    /// before: the end of the first one is its end too.
    fn finish(&mut self) {
        let end = Instant::now() + LIMIT;
        self.receive();
        while let Some(twin) = &self.twin
            && !(self.main.gone && twin.gone)
            && twin.answers() < twin.expected.len()
        {
            assert!(Instant::now() < end, "the second socket does not answer");
            std::thread::yield_now();
            self.receive();
        }
        let _closed = self.main.socket.shutdown(std::net::Shutdown::Write);
        while !self.main.gone {
            assert!(Instant::now() < end, "the session does not end");
            std::thread::yield_now();
            self.receive();
        }
    }

    fn check(&self, tally: &mut Tally) {
        self.main.check(self.twin.is_none(), true, tally);
        if let Some(twin) = &self.twin {
            twin.check(true, !self.broken, tally);
        }
    }
}
