//! The way to the client: what is sent to it, and commands of ours that wait for their replies.
//!
//! Without a second socket the serving thread reads everything that comes, so it is the one that hands a waiting thread
//! its reply. From this follow the rules by which nobody waits for ever:
//!
//! - The serving thread itself never asks the client: it would wait for itself.
//! - A wait ends when the serving thread has been in one request for [`BUSY`]: that request may be waiting for the one
//!   who waits here, as a reset does for the work of a queue. A step of a migration does not count: it is carried out by
//!   another thread, and the serving one reads on (`pump.rs`).
//!
//! With a second socket (`twin`) another thread reads the replies. Then any thread may ask, however long a
//! request takes, and a wait looks for itself whether the connection has ended, which the serving thread would not see
//! while it waits.
//!
//! In either case
//!
//! - A wait ends after [`PATIENCE`].
//! - An unmap ends the waits for its memory, and a disconnect ends all; so does the end of the second socket.
//!
//! A reply that comes after its wait has ended is dropped.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use thiserror::Error;

use super::MAX_TRANSFER;
use super::bounce::Bounce;
use super::channel::Channel;
use super::wire::{DmaHead, Header, Moved};

/// How long a client may take to answer. QEMU gives a server as long.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long the serving thread may be in one request before those who wait for a reply give up.
pub const BUSY: Duration = Duration::from_millis(100);

/// Most bytes of one command: they fit the socket's buffer, so that the serving thread hardly ever waits behind one.
const CHUNK: usize = 64 << 10;

/// Most commands that wait at a time.
const MAX_WAITING: usize = 1024;

/// How often a wait looks whether the serving thread is stuck, or the connection has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Why the client did not move memory.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Failure {
    /// It is gone.
    #[error("the client is gone")]
    Closed,
    /// It sends no replies any more: it closed the second socket, on which alone it takes commands, or its half of the only
    /// one.
    #[error("the client answers no commands any more")]
    Deaf,
    /// The map was removed.
    #[error("the map was removed")]
    Unmapped,
    /// The serving thread asked.
    #[error("the serving thread cannot wait for the client")]
    OwnThread,
    /// The serving thread is in a request that may wait for this.
    #[error("a request took more than {} ms", BUSY.as_millis())]
    Busy,
    /// Too many wait.
    #[error("{MAX_WAITING} commands wait already")]
    TooMany,
    /// No reply in time, or no room in the socket.
    #[error("no reply within {} s", PATIENCE.as_secs())]
    TooLate,
    /// An error reply.
    #[error("the client refused: {0}")]
    Refused(Errno),
    /// A reply that is not one to what was asked.
    #[error("the reply is about {count} bytes at {address:#x}")]
    Mismatch {
        /// What the reply names.
        address: u64,
        /// What the reply names.
        count: u64,
    },
    /// A reply that is too short.
    #[error("a reply of {0} bytes")]
    Short(usize),
}

impl Failure {
    /// Whether the client showed that it cannot do it at all.
    fn is_final(self) -> bool {
        match self {
            Self::TooLate | Self::Mismatch { .. } | Self::Short(_) => true,
            Self::Refused(errno) => [Errno::NOSYS, Errno::NOTSUP, Errno::NOTTY].contains(&errno),
            _ => false,
        }
    }
}

/// What is known of a map whose memory the client has to be asked for.
#[derive(Debug, Default)]
pub struct Remote {
    /// The map was removed.
    gone: AtomicBool,
    /// The client cannot do it.
    dead: AtomicBool,
}

impl Remote {
    /// Whether the client showed that it does not move this memory.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }
}

/// The client of one connection.
#[derive(Debug)]
pub struct Client {
    /// Where its commands come from, and without a twin everything goes.
    main: Channel,
    /// Where our commands go and their replies come from, if the client asked for it.
    twin: OnceLock<Channel>,
    server: OnceLock<ThreadId>,
    /// Odd while the serving thread is in a request.
    turns: AtomicU64,
    /// Most bytes of a command; 0 if the client takes none.
    chunk: AtomicUsize,
    pending: Mutex<Pending>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    closed: bool,
    /// The client sends no replies any more.
    deaf: bool,
    last_id: u16,
    waits: HashMap<u16, Wait>,
}

/// A command that was or will be sent.
#[derive(Debug)]
struct Wait {
    head: DmaHead,
    /// Where a read's data goes.
    bounce: Bounce,
    outcome: Option<Result<(), Failure>>,
}

impl Client {
    /// The client at the other end of a connected socket.
    #[must_use]
    pub fn new(socket: Arc<OwnedFd>) -> Self {
        Self {
            main: Channel::new(socket),
            twin: OnceLock::new(),
            server: OnceLock::new(),
            turns: AtomicU64::new(0),
            chunk: AtomicUsize::new(CHUNK),
            pending: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// The calling thread is the serving one.
    pub fn serve_here(&self) {
        let _ = self.server.set(std::thread::current().id());
    }

    /// Commands go over `twin` from now on, and their replies come from there. For the serving thread, before there are
    /// any.
    pub(super) fn ask_over(&self, twin: Arc<OwnedFd>) {
        let _ = self.twin.set(Channel::new(twin));
    }

    /// Whether there is a second socket for commands, or was one.
    #[must_use]
    pub fn has_twin(&self) -> bool {
        self.twin.get().is_some()
    }

    /// Takes note of the client's `max_data_xfer_size`.
    pub fn limit(&self, max_transfer: u64) {
        let most = usize::try_from(max_transfer).unwrap_or(usize::MAX);
        let most = most.min(CHUNK).min(MAX_TRANSFER);
        // Whole words, so that none is split.
        let chunk = if most < 8 { most } else { most & !7 };
        self.chunk.store(chunk, Ordering::Relaxed);
    }

    /// The serving thread begins with a request.
    pub fn begin(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// The serving thread is done with a request.
    pub fn end(&self) {
        self.turns.fetch_add(1, Ordering::Relaxed);
    }

    /// Sends a message of the serving thread, with descriptors on its first byte.
    ///
    /// # Errors
    /// The socket's; more than [`MAX_FDS`](super::MAX_FDS) descriptors are refused.
    pub fn reply(&self, message: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.main.send(message, files)
    }

    /// Answers a command that came over the second socket.
    ///
    /// # Errors
    /// A client that does not read there is given up after [`PATIENCE`].
    pub(super) fn refuse(&self, message: &[u8]) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        self.post(message, &[], deadline).map_err(io::Error::other)
    }

    /// Whether an access to such a map has any hope, and may wait.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn check(&self, remote: &Remote) -> Result<(), Failure> {
        if !self.has_twin() && self.server.get() == Some(&std::thread::current().id()) {
            return Err(Failure::OwnThread);
        }
        match remote.is_dead() || self.chunk.load(Ordering::Relaxed) == 0 {
            true => Err(Failure::Refused(Errno::NOTSUP)),
            false => Ok(()),
        }
    }

    /// How many of `len` bytes at `address` one command may move; no word is split.
    pub fn part(&self, address: u64, len: u64) -> u64 {
        let chunk = self.chunk.load(Ordering::Relaxed) as u64;
        let odd = if chunk > 8 { address % 8 } else { 0 };
        len.min(chunk - odd)
    }

    /// Fills `bounce` with the memory at its address.
    ///
    /// # Errors
    /// [`Failure`]; the contents are then undefined.
    pub fn fetch(&self, remote: &Remote, bounce: &mut Bounce) -> Result<(), Failure> {
        self.command(remote, bounce, false)
    }

    /// Writes `bounce` to the memory at its address.
    ///
    /// # Errors
    /// [`Failure`]; the memory's contents are then undefined.
    pub fn store(&self, remote: &Remote, bounce: &mut Bounce) -> Result<(), Failure> {
        self.command(remote, bounce, true)
    }

    fn command(&self, remote: &Remote, bounce: &mut Bounce, is_write: bool) -> Result<(), Failure> {
        self.check(remote)?;
        let deadline = Instant::now() + PATIENCE;
        let result = self.begin_wait(remote, bounce, is_write).and_then(|head| {
            let data = if is_write { bounce.bytes() } else { &[] };
            let sent = self.post(&head.encode(), data, deadline);
            self.wait(head.id, sent, bounce, deadline)
        });
        if let Err(failure) = result {
            tracing::debug!(address = bounce.address(), "{failure}");
            if failure.is_final() {
                remote.dead.store(true, Ordering::Relaxed);
            }
        }
        result
    }

    /// Makes room for a reply. That to a read has `bounce` for its data until the wait is over.
    fn begin_wait(
        &self,
        remote: &Remote,
        bounce: &mut Bounce,
        is_write: bool,
    ) -> Result<DmaHead, Failure> {
        let mut pending = self.pending();
        // Under the lock: an unmap that comes later finds what is entered here.
        if pending.closed {
            return Err(Failure::Closed);
        }
        if pending.deaf {
            return Err(Failure::Deaf);
        }
        if remote.gone.load(Ordering::SeqCst) {
            return Err(Failure::Unmapped);
        }
        if pending.waits.len() >= MAX_WAITING {
            return Err(Failure::TooMany);
        }
        let id = loop {
            pending.last_id = pending.last_id.wrapping_add(1);
            if !pending.waits.contains_key(&pending.last_id) {
                break pending.last_id;
            }
        };
        let head = DmaHead {
            id,
            is_write,
            address: bounce.address(),
            count: u32::try_from(bounce.bytes().len()).unwrap_or(0),
        };
        let bounce = match is_write {
            true => Bounce::default(),
            false => std::mem::take(bounce),
        };
        let wait = Wait {
            head,
            bounce,
            outcome: None,
        };
        pending.waits.insert(id, wait);
        Ok(head)
    }

    /// Waits for the reply if the command was sent.
    fn wait(
        &self,
        id: u16,
        sent: Result<(), Failure>,
        bounce: &mut Bounce,
        deadline: Instant,
    ) -> Result<(), Failure> {
        let mut turn = (self.turns.load(Ordering::Relaxed), Instant::now());
        let mut pending = self.pending();
        let outcome = loop {
            if sent.is_err() {
                break sent;
            }
            if let Some(outcome) = pending.waits.get(&id).and_then(|wait| wait.outcome) {
                break outcome;
            }
            let now = Instant::now();
            if now >= deadline {
                break Err(Failure::TooLate);
            }
            let at = self.turns.load(Ordering::Relaxed);
            if self.has_twin() || at != turn.0 || at.is_multiple_of(2) {
                turn = (at, now);
            } else if now.duration_since(turn.1) >= BUSY {
                break Err(Failure::Busy);
            }
            let part = LOOK.min(deadline.duration_since(now));
            let woken = self.changed.wait_timeout(pending, part);
            let (again, ended) = woken.unwrap_or_else(PoisonError::into_inner);
            pending = again;
            if ended.timed_out() && self.has_twin() && self.main.hung_up() {
                break Err(Failure::Closed);
            }
        };
        if let Some(wait) = pending.waits.remove(&id)
            && !wait.head.is_write
        {
            *bounce = wait.bounce;
        }
        outcome
    }

    /// Hands a reply to who waits for it. For the one thread that reads replies.
    pub fn answer(&self, header: &Header, body: &[u8]) {
        let mut pending = self.pending();
        let wait = pending.waits.get_mut(&header.id);
        let waiting =
            |wait: &&mut Wait| wait.outcome.is_none() && wait.head.command() == header.command;
        match wait.filter(waiting) {
            Some(wait) => wait.outcome = Some(wait.settle(header, body)),
            None => {
                tracing::debug!(command = header.command, id = header.id, "nobody waits");
                return;
            }
        }
        drop(pending);
        self.changed.notify_all();
    }

    /// The map of `address..=last` is removed: nobody waits for its memory any more, and nobody will.
    pub fn forget(&self, remote: &Remote, address: u64, last: u64) {
        remote.gone.store(true, Ordering::SeqCst);
        self.give_up(Failure::Unmapped, |head| {
            (address..=last).contains(&head.address)
        });
    }

    /// The connection ends: nobody waits any more, and nothing is sent.
    pub fn close(&self) {
        self.pending().closed = true;
        self.give_up(Failure::Closed, |_| true);
        self.main.close();
        if let Some(twin) = self.twin.get() {
            twin.close();
        }
    }

    /// No reply comes any more: nobody waits for one, and nothing is asked. What the client asked is still answered.
    pub(super) fn end_replies(&self) {
        // A client that goes closes both sockets, in any order.
        let failure = match self.main.hung_up() {
            true => Failure::Closed,
            false => Failure::Deaf,
        };
        self.pending().deaf = true;
        self.give_up(failure, |_| true);
    }

    /// The second socket ends, and with it the replies.
    pub(super) fn end_twin(&self) {
        self.end_replies();
        if let Some(twin) = self.twin.get() {
            twin.close();
        }
    }

    fn give_up(&self, failure: Failure, which: impl Fn(&DmaHead) -> bool) {
        let mut pending = self.pending();
        for wait in pending.waits.values_mut() {
            if wait.outcome.is_none() && which(&wait.head) {
                wait.outcome = Some(Err(failure));
            }
        }
        drop(pending);
        self.changed.notify_all();
    }

    /// Sends a command, or an answer to one that came over the second socket. A client that does not read is given up
    /// at the deadline; in the middle of a message that ends the connection, or the second socket if there is one.
    fn post(&self, head: &[u8], data: &[u8], deadline: Instant) -> Result<(), Failure> {
        let Some(twin) = self.twin.get() else {
            return self.main.post(head, data, deadline, || false);
        };
        // The end of the connection would wake nobody who waits for room in the other socket.
        let is_over = || self.main.hung_up();
        match twin.post(head, data, deadline, is_over) {
            Err(_) if self.main.hung_up() => Err(Failure::Closed),
            Err(Failure::Closed) => Err(Failure::Deaf),
            other => other,
        }
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wait {
    /// Takes what a reply brings.
    fn settle(&mut self, header: &Header, body: &[u8]) -> Result<(), Failure> {
        if header.is_error() {
            // The number is optional (specification, "Header"), and may be none that there is.
            let errno = match i32::try_from(header.error) {
                Ok(errno @ 1..4096) => Errno::from_raw_os_error(errno),
                _ => Errno::IO,
            };
            return Err(Failure::Refused(errno));
        }
        let short = Failure::Short(body.len());
        let moved = Moved::decode(header.command, body).ok_or(short)?;
        let Moved {
            address,
            count,
            data,
        } = moved;
        if (address, count) != (self.head.address, self.head.count.into()) {
            return Err(Failure::Mismatch { address, count });
        }
        if !self.head.is_write {
            let place = self.bounce.bytes_mut();
            place.copy_from_slice(data.get(..place.len()).ok_or(short)?);
        }
        Ok(())
    }
}
