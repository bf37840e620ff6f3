//! A socket to the client as it is written to: writers take turns, and a close wakes who writes.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, send, sendmsg, shutdown,
};

use super::MAX_FDS;
use super::client::Failure;

/// One socket of a connection.
#[derive(Debug)]
pub(super) struct Channel {
    /// Locked for as long as it takes to send a message; none once it was closed.
    socket: Mutex<Option<Arc<OwnedFd>>>,
    /// The same, to be shut down while somebody sends.
    handle: Weak<OwnedFd>,
}

impl Channel {
    pub(super) fn new(socket: Arc<OwnedFd>) -> Self {
        Self {
            handle: Arc::downgrade(&socket),
            socket: Mutex::new(Some(socket)),
        }
    }

    /// Sends a message however long it takes, with descriptors on its first byte: one call, unless it is larger than
    /// the socket's buffer.
    ///
    /// # Errors
    /// The socket's; more than [`MAX_FDS`] descriptors are refused.
    pub(super) fn send(&self, message: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let socket = self.lock();
        let socket = socket.as_ref().ok_or(Errno::PIPE)?;
        match files {
            [] => send_all(socket, message),
            _ => send_all(socket, send_with(socket, message, files)?),
        }
    }

    /// Sends a message until `deadline`, or until `is_over` says that nobody wants it any more. If that comes in the
    /// middle of it, the socket is shut down: nobody could follow its stream.
    ///
    /// # Errors
    /// [`Failure::TooLate`] if nothing was sent, else [`Failure::Closed`].
    pub(super) fn post(
        &self,
        head: &[u8],
        data: &[u8],
        deadline: Instant,
        is_over: impl Fn() -> bool,
    ) -> Result<(), Failure> {
        let socket = self.lock();
        let socket = socket.as_deref().ok_or(Failure::Closed)?;
        let mut sent = 0;
        while sent < head.len() + data.len() {
            let (first, second) = match head.get(sent..) {
                Some(rest) => (rest, data),
                None => (&[][..], data.get(sent - head.len()..).unwrap_or_default()),
            };
            let parts = [IoSlice::new(first), IoSlice::new(second)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match sendmsg(socket, &parts, &mut SendAncillaryBuffer::default(), flags) {
                Ok(more) => sent += more,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if Instant::now() < deadline && !is_over() => await_room(socket),
                Err(Errno::AGAIN) if sent == 0 => return Err(Failure::TooLate),
                Err(_) => {
                    let _ = shutdown(socket, Shutdown::Both);
                    return Err(Failure::Closed);
                }
            }
        }
        Ok(())
    }

    /// Whether the connection has ended both ways: the client closed its end, or this one was shut down. A client that
    /// only sends no more may still answer elsewhere.
    pub(super) fn hung_up(&self) -> bool {
        let Some(socket) = self.handle.upgrade() else {
            return true;
        };
        // Hang-ups are told without being asked for.
        let mut fds = [PollFd::new(&*socket, PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Wakes who sends and who receives; nothing is sent any more.
    pub(super) fn close(&self) {
        // First, so that whoever sends gives the lock back.
        if let Some(socket) = self.handle.upgrade() {
            let _ = shutdown(&*socket, Shutdown::Both);
        }
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits a while for room in the socket's buffer, or for its end.
fn await_room(socket: &OwnedFd) {
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    let pause = Timespec {
        tv_sec: 0,
        tv_nsec: 50_000_000,
    };
    let _ = poll(&mut fds, Some(&pause));
}

/// Sends all of a message.
fn send_all(socket: impl AsFd, mut message: &[u8]) -> io::Result<()> {
    while !message.is_empty() {
        match send(&socket, message, SendFlags::NOSIGNAL) {
            Ok(sent) => message = message.get(sent..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sends descriptors with the first bytes of a message, which are all of them unless the socket's buffer is full;
/// what is left to send.
fn send_with<'m>(
    socket: impl AsFd,
    message: &'m [u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<&'m [u8]> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(Errno::NOBUFS.into());
        }
        let bytes = [IoSlice::new(message)];
        match sendmsg(&socket, &bytes, &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) => return Ok(message.get(sent..).unwrap_or_default()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
