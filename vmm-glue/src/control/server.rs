//! The control socket: one thread, a few clients, bounded lines.
//!
//! Nothing here blocks on a client. A client whose reply is not read is asked for nothing more; one that does not
//! read it, or that leaves a request unfinished, is gone after [`Bounds::stall`]. Requests are answered one at a time in
//! the thread of this module, so an instance that is slow to answer one keeps the others waiting, and nobody else.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send};

use super::protocol::{self, RefusalKind, Reply, Request};
use crate::vfio_user::ServerError;
use crate::vfio_user::listener::{Listener, Name};

/// What a client can have.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Bytes of a request, without the end of its line.
    pub line: usize,
    /// Clients at a time.
    pub clients: usize,
    /// How long a request may take to arrive, and how long a client may read nothing of a reply.
    pub stall: Duration,
    /// How long a client may ask for nothing.
    pub idle: Duration,
}

impl Default for Bounds {
    /// The longest request there is has under 200 bytes.
    fn default() -> Bounds {
        Bounds {
            line: 4096,
            clients: 8,
            stall: Duration::from_secs(5),
            idle: Duration::from_secs(60),
        }
    }
}

/// How long the thread waits where the host has no descriptor for a client.
const PAUSE: Duration = Duration::from_millis(10);

/// Answers requests.
pub type Answer = Arc<dyn Fn(Request) -> Reply + Send + Sync>;

/// A control socket; removed, and its clients disconnected, when this is dropped.
#[derive(Debug)]
pub struct Control {
    /// Readable once the thread is to end.
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// Removed last.
    name: Name,
}

impl Control {
    /// Listens on a new UNIX socket at `path` with mode 0600. A socket that a killed process left there is replaced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(path: &Path, answer: Answer, bounds: Bounds) -> Result<Control, ServerError> {
        Control::start(Listener::bind(path)?, answer, bounds)
    }

    /// Answers the clients of a socket that listens.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(
        listener: Listener,
        answer: Answer,
        bounds: Bounds,
    ) -> Result<Control, ServerError> {
        let (listener, name) = listener.listening()?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| ServerError::Host {
            path: name.path.clone(),
            doing: "make an eventfd",
            errno,
        })?;
        let stop = Arc::new(stop);
        let mut control = Control {
            stop: Arc::clone(&stop),
            thread: None,
            name,
        };
        let mut room = Room {
            clients: Vec::new(),
            answer,
            bounds,
        };
        let thread = std::thread::Builder::new().name("control".to_owned());
        let thread = thread.spawn(move || room.run(&listener, &stop));
        control.thread = Some(thread.map_err(|source| ServerError::Thread {
            path: control.name.path.clone(),
            source,
        })?);
        Ok(control)
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.name.path
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(socket = %self.name.path.display(), "the control thread panicked");
        }
    }
}

/// The thread's own.
struct Room {
    clients: Vec<Client>,
    answer: Answer,
    bounds: Bounds,
}

impl Room {
    fn run(&mut self, listener: &OwnedFd, stop: &OwnedFd) {
        let mut paused = false;
        loop {
            let now = Instant::now();
            let wait = match self.clients.iter().any(Client::has_request) {
                true => Some(Duration::ZERO),
                false => {
                    let next = self.clients.iter().map(|it| it.deadline(&self.bounds));
                    let next = next.min().map(|at| at.saturating_duration_since(now));
                    // One more millisecond, so that the deadline is over when the wait is.
                    let next = next.map(|wait| wait.saturating_add(Duration::from_millis(1)));
                    next.into_iter().chain(paused.then_some(PAUSE)).min()
                }
            };
            let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
            fds.extend(self.clients.iter().map(Client::interest));
            if !paused {
                fds.push(PollFd::new(listener, PollFlags::IN));
            }
            let wait = wait.and_then(|wait| Timespec::try_from(wait).ok());
            let _ = poll(&mut fds, wait.as_ref());
            let mut events: VecDeque<PollFlags> = fds.iter().map(PollFd::revents).collect();
            if events.pop_front().is_some_and(|it| !it.is_empty()) {
                return;
            }
            let arrived = !paused && events.pop_back().is_some_and(|it| !it.is_empty());
            let now = Instant::now();
            let (answer, bounds) = (&self.answer, &self.bounds);
            self.clients.retain_mut(|client| {
                let event = events.pop_front().unwrap_or(PollFlags::empty());
                let turn = if event.is_empty() {
                    Ok(())
                } else {
                    client.transfer(bounds, now)
                };
                let turn = turn.and_then(|()| client.answer_one(answer, bounds, now));
                turn.is_ok() && now < client.deadline(bounds)
            });
            paused = arrived && self.admit(listener, now).is_err();
        }
    }

    /// Takes whoever waits at the listener.
    fn admit(&mut self, listener: &OwnedFd, now: Instant) -> Result<(), Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match accept_with(listener, flags) {
            Ok(socket) if self.clients.len() < self.bounds.clients => {
                self.clients.push(Client::new(socket, now));
            }
            Ok(socket) => {
                let message = format!("{} clients are served already", self.bounds.clients);
                let mut client = Client::new(socket, now);
                client.reply(&Reply::refused(RefusalKind::Busy, message));
                // All that fits at once: an empty socket has room for it.
                let _ = client.flush(now);
            }
            Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => {}
            Err(error) => {
                tracing::warn!("cannot accept a control client: {error}");
                return Err(error);
            }
        }
        Ok(())
    }
}

/// A client is done with.
struct Gone;

/// One connection.
struct Client {
    socket: OwnedFd,
    /// Received and not answered: at most one byte more than a line may have.
    input: Vec<u8>,
    /// The rest of a line that was too long is being thrown away.
    skipping: bool,
    /// It sends no more.
    ended: bool,
    /// A reply on its way.
    output: Vec<u8>,
    /// Bytes of it that are sent.
    sent: usize,
    /// When what it is doing now began.
    since: Instant,
}

impl Client {
    fn new(socket: OwnedFd, now: Instant) -> Client {
        Client {
            socket,
            input: Vec::new(),
            skipping: false,
            ended: false,
            output: Vec::new(),
            sent: 0,
            since: now,
        }
    }

    fn is_reading(&self) -> bool {
        self.output.is_empty()
    }

    /// What to wait for.
    fn interest(&self) -> PollFd<'_> {
        let flags = match self.is_reading() {
            true => PollFlags::IN,
            false => PollFlags::OUT,
        };
        PollFd::new(&self.socket, flags)
    }

    /// Whether a request is here and can be answered at once.
    fn has_request(&self) -> bool {
        self.is_reading() && (self.ended || self.input.contains(&b'\n'))
    }

    /// When it is given up.
    fn deadline(&self, bounds: &Bounds) -> Instant {
        let quiet = self.is_reading() && self.input.is_empty() && !self.skipping;
        self.since + if quiet { bounds.idle } else { bounds.stall }
    }

    /// Sends or receives once.
    fn transfer(&mut self, bounds: &Bounds, now: Instant) -> Result<(), Gone> {
        if !self.is_reading() {
            return self.flush(now);
        }
        if self.ended || self.input.contains(&b'\n') {
            return Ok(());
        }
        let mut piece = [0; 4096];
        let room = (bounds.line + 1).saturating_sub(self.input.len());
        let take = room.min(piece.len());
        let Some(space) = piece.get_mut(..take) else {
            return Err(Gone);
        };
        match recv(&self.socket, space, RecvFlags::empty()) {
            Ok((_, 0)) => self.ended = true,
            Ok((_, got)) => {
                if self.input.is_empty() && !self.skipping {
                    // A request's time runs from its first byte.
                    self.since = now;
                }
                self.input.extend(piece.iter().take(got));
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return Err(Gone),
        }
        Ok(())
    }

    /// Answers the first request that is here, if its predecessor's reply is gone.
    fn answer_one(&mut self, answer: &Answer, bounds: &Bounds, now: Instant) -> Result<(), Gone> {
        if !self.is_reading() {
            return Ok(());
        }
        let end = self.input.iter().position(|byte| *byte == b'\n');
        let Some(end) = end else {
            return self.unfinished(bounds, now);
        };
        let line: Vec<u8> = self.input.drain(..=end).take(end).collect();
        self.since = now;
        if std::mem::take(&mut self.skipping) {
            return Ok(());
        }
        let reply = match protocol::request(&line) {
            Ok(request) => answer(request),
            Err(reply) => reply,
        };
        self.reply(&reply);
        // Answering may have taken a while.
        self.flush(Instant::now())
    }

    /// What there is of a line that has no end.
    fn unfinished(&mut self, bounds: &Bounds, now: Instant) -> Result<(), Gone> {
        let len = self.input.len();
        let malformed = |message| Reply::refused(RefusalKind::Malformed, message);
        if len > bounds.line {
            self.input.clear();
            if !std::mem::replace(&mut self.skipping, true) {
                let most = bounds.line;
                self.reply(&malformed(format!(
                    "a request has at most {most} bytes; this one has more"
                )));
                return self.flush(now);
            }
        } else if self.ended {
            if len == 0 || self.skipping {
                return Err(Gone);
            }
            self.input.clear();
            self.reply(&malformed(format!(
                "a request ends with a newline; the last {len} byte(s) came without one"
            )));
            return self.flush(now);
        }
        Ok(())
    }

    fn reply(&mut self, reply: &Reply) {
        match protocol::line(reply) {
            Ok(line) => self.output = line,
            Err(error) => tracing::error!("a reply cannot be written: {error}"),
        }
    }

    /// Sends what the client takes.
    fn flush(&mut self, now: Instant) -> Result<(), Gone> {
        while let Some(rest) = self.output.get(self.sent..).filter(|it| !it.is_empty()) {
            match send(&self.socket, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.sent = self.sent.saturating_add(sent);
                    self.since = now;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Gone),
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::Shutdown;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixStream;
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;
    use crate::control::fault::Fault;

    /// Long enough for any machine.
    const LIMIT: Duration = Duration::from_secs(60);
    const STATUS: &[u8] = b"{\"version\":1,\"request\":\"status\"}\n";

    struct Served {
        directory: TempDir,
        control: Option<Control>,
    }

    impl Served {
        /// Answers `status` with `size` letters, anything else with what it was.
        fn new(size: usize, bounds: Bounds) -> Served {
            let directory = tempfile::tempdir().unwrap();
            let answer = move |request| match request {
                Request::Status {} => Reply::refused(RefusalKind::Failed, "x".repeat(size)),
                Request::Inject { gpu, fault } => Reply::Injected { gpu, fault },
            };
            let path = directory.path().join("control.sock");
            let control = Control::bind(&path, Arc::new(answer), bounds).unwrap();
            Served {
                directory,
                control: Some(control),
            }
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("control.sock")
        }

        fn connect(&self) -> UnixStream {
            let stream = UnixStream::connect(self.path()).unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            stream
        }

        fn ask(&self, line: &[u8]) -> Reply {
            let mut stream = self.connect();
            stream.write_all(line).unwrap();
            replies(&stream, 1).remove(0)
        }
    }

    fn replies(stream: &UnixStream, count: usize) -> Vec<Reply> {
        let mut lines = BufReader::new(stream).split(b'\n');
        let next = |_| protocol::reply(&lines.next().unwrap().unwrap()).unwrap();
        (0..count).map(next).collect()
    }

    fn message(reply: &Reply) -> (RefusalKind, &str) {
        match reply {
            Reply::Error(refusal) => (refusal.kind, &refusal.message),
            other => panic!("{other:?}"),
        }
    }

    /// Whether the server has closed a connection from which nothing more comes.
    fn is_closed(mut stream: &UnixStream) -> bool {
        !matches!(stream.read(&mut [0]), Ok(1))
    }

    #[test]
    fn only_its_user_can_connect_and_it_is_removed() {
        let mut served = Served::new(1, Bounds::default());
        let mode = served.path().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let client = served.connect();
        served.control = None;
        assert!(!served.path().exists());
        assert!(is_closed(&client));
    }

    #[test]
    fn requests_are_answered_in_their_order_however_they_are_cut() {
        let served = Served::new(3, Bounds::default());
        let mut lines = STATUS.to_vec();
        for gpu in 0..20 {
            let fault = Fault::Removal {};
            lines.extend(protocol::line(Request::Inject { gpu, fault }).unwrap());
        }
        for cut in [1, 7, 1000] {
            let mut stream = served.connect();
            for piece in lines.chunks(cut) {
                stream.write_all(piece).unwrap();
            }
            let all = replies(&stream, 21);
            assert_eq!(message(&all[0]).1, "xxx");
            let order = all[1..].iter().map(|reply| match reply {
                Reply::Injected { gpu, .. } => *gpu,
                other => panic!("{other:?}"),
            });
            assert!(order.eq(0..20), "pieces of {cut}");
        }
    }

    #[test]
    fn garbage_is_answered_and_the_next_request_too() {
        let served = Served::new(3, Bounds::default());
        let mut stream = served.connect();
        stream.write_all(b"\0\xff{\n\n[]\n").unwrap();
        stream.write_all(STATUS).unwrap();
        let all = replies(&stream, 4);
        let kinds: Vec<_> = all.iter().map(|reply| message(reply).0).collect();
        use RefusalKind::{Failed, Malformed};
        assert_eq!(kinds, [Malformed, Malformed, Malformed, Failed]);
    }

    #[test]
    fn a_line_that_is_too_long_is_thrown_away_up_to_its_end() {
        let served = Served::new(3, Bounds::default());
        let mut stream = served.connect();
        // As long as it may be, one byte more, and far more.
        for (len, wanted) in [
            (
                4096,
                "the request is not JSON: expected value at line 1 column 1",
            ),
            (4097, "a request has at most 4096 bytes; this one has more"),
            (
                1 << 20,
                "a request has at most 4096 bytes; this one has more",
            ),
        ] {
            let mut line = vec![b'x'; len];
            line.push(b'\n');
            line.extend(STATUS);
            stream.write_all(&line).unwrap();
            let all = replies(&stream, 2);
            assert_eq!(message(&all[0]).1, wanted, "{len} bytes");
            assert_eq!(message(&all[1]).1, "xxx");
        }
    }

    #[test]
    fn half_a_line_at_the_end_is_answered() {
        let served = Served::new(3, Bounds::default());
        let mut stream = served.connect();
        stream.write_all(STATUS).unwrap();
        stream.write_all(b"{\"ver").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let all = replies(&stream, 2);
        assert_eq!(
            message(&all[1]).1,
            "a request ends with a newline; the last 5 byte(s) came without one"
        );
        assert!(is_closed(&stream));
    }

    #[test]
    fn half_a_line_and_nothing_more_is_given_up() {
        let stall = Duration::from_millis(50);
        let bounds = Bounds {
            stall,
            ..Bounds::default()
        };
        let served = Served::new(3, bounds);
        let mut stream = served.connect();
        stream.write_all(b"{\"version\"").unwrap();
        let quiet = served.connect();
        assert!(is_closed(&stream));
        // One that has asked for nothing is still served.
        (&quiet).write_all(STATUS).unwrap();
        assert_eq!(replies(&quiet, 1).len(), 1);
    }

    #[test]
    fn a_client_that_does_not_read_keeps_nobody_waiting_and_is_given_up() {
        let stall = Duration::from_millis(300);
        let bounds = Bounds {
            stall,
            ..Bounds::default()
        };
        // More than a socket holds.
        let served = Served::new(8 << 20, bounds);
        let mut slow = served.connect();
        slow.write_all(STATUS).unwrap();
        // Behind it, far more than the server keeps.
        slow.set_nonblocking(true).unwrap();
        let flood = STATUS.repeat(100_000);
        assert!(slow.write_all(&flood).is_err());
        let inject =
            b"{\"version\":1,\"request\":\"inject\",\"gpu\":0,\"fault\":{\"kind\":\"removal\"}}\n";
        for _ in 0..20 {
            assert!(matches!(served.ask(inject), Reply::Injected { gpu: 0, .. }));
        }
        slow.set_nonblocking(false).unwrap();
        let closed = || {
            let mut fds = [PollFd::new(&slow, PollFlags::RDHUP)];
            poll(&mut fds, None).is_ok()
        };
        assert!(closed());
        let mut all = Vec::new();
        // It ends in the middle of a reply, or by a reset for what was not read.
        let _ = slow.read_to_end(&mut all);
        assert!(all.len() < 8 << 20);
    }

    #[test]
    fn one_client_too_many_is_told_so() {
        let bounds = Bounds {
            clients: 2,
            ..Bounds::default()
        };
        let served = Served::new(3, bounds);
        let clients = [served.connect(), served.connect()];
        for mut client in &clients {
            client.write_all(STATUS).unwrap();
            assert_eq!(replies(client, 1).len(), 1);
        }
        let third = served.connect();
        let all = replies(&third, 1);
        let wanted = (RefusalKind::Busy, "2 clients are served already");
        assert_eq!(message(&all[0]), wanted);
        assert!(is_closed(&third));
        drop(clients);
        let fits = || message(&served.ask(STATUS)).0 != RefusalKind::Busy;
        let started = Instant::now();
        while !fits() {
            assert!(started.elapsed() < LIMIT);
        }
    }

    #[test]
    fn a_client_that_asks_for_nothing_is_closed() {
        let bounds = Bounds {
            idle: Duration::from_millis(20),
            ..Bounds::default()
        };
        let served = Served::new(3, bounds);
        assert!(is_closed(&served.connect()));
    }

    #[test]
    fn a_socket_that_is_served_is_not_taken_over() {
        let served = Served::new(3, Bounds::default());
        let answer = |_| Reply::refused(RefusalKind::Failed, "");
        let second = Control::bind(&served.path(), Arc::new(answer), Bounds::default());
        let message = second.unwrap_err().to_string();
        assert!(
            message.contains("another process serves there"),
            "{message}"
        );
        assert_eq!(replies(&served.connect(), 0).len(), 0);
        assert!(served.path().exists());
    }
}
