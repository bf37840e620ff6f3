//! From the socket's stream to messages: bulk receives into one buffer, cut by the header's size field.
//!
//! A stream receive glues messages without file descriptors together and ends after the first piece that carries
//! some, so descriptors belong to the message that holds the last byte received with them (unix(7), `SCM_RIGHTS`).
//! Each descriptor therefore keeps the position of that byte until its message is complete.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::polling::Poller;
use super::refusal::Refusal;
use super::wire::{HEADER_SIZE, Header};
use super::{MAX_FDS, MAX_MESSAGE};

/// Bytes asked for in one receive. A socket's default buffer holds a few hundred small messages, which fit.
const CHUNK: usize = 64 << 10;

/// Descriptors that one receive has room for: more than are taken, so that one too many is seen and not lost.
const CONTROL_FDS: usize = 2 * MAX_FDS;

/// Descriptors kept for messages that are not complete yet.
const MAX_WAITING: usize = 2 * CONTROL_FDS;

/// A descriptor, or the trace of one that was lost, and the buffer position of the last byte that came with it.
type Waiting = (usize, Option<OwnedFd>);

/// The part of the stream that was received and not handed out. Never grows.
#[derive(Debug)]
pub struct Framing {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    fds: Vec<Waiting>,
}

/// One complete message.
#[derive(Debug)]
pub struct Message<'a> {
    /// Its header; `size` is the length of header and body.
    pub header: Header,
    /// What follows the header.
    pub body: &'a [u8],
    /// Whether descriptors that came with it were lost, by the kernel or for being too many.
    pub fds_lost: bool,
}

impl Default for Framing {
    fn default() -> Self {
        Self::new()
    }
}

impl Framing {
    /// An empty buffer for messages up to [`MAX_MESSAGE`]. Its pages are touched only as far as they are used.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buffer: vec![0; MAX_MESSAGE + CHUNK].into_boxed_slice(),
            start: 0,
            end: 0,
            fds: Vec::with_capacity(MAX_WAITING),
        }
    }

    /// Forgets what was received, for the stream of another connection.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
        self.fds.clear();
    }

    /// Receives once, blocking after `poller` has looked; the number of bytes, 0 at the end of the stream.
    ///
    /// # Errors
    /// The socket's error, except that an interrupted call is made again.
    pub(super) fn receive(&mut self, socket: impl AsFd, poller: &mut Poller) -> io::Result<usize> {
        self.compact();
        let to = (self.end + CHUNK).min(self.buffer.len());
        let Some(space) = self.buffer.get_mut(self.end..to) else {
            return Ok(0);
        };
        let mut control = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(CONTROL_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut control);
        let mut parts = [IoSliceMut::new(space)];
        let mut looks = poller.begin();
        let received = loop {
            let mut flags = RecvFlags::CMSG_CLOEXEC;
            flags.set(RecvFlags::DONTWAIT, looks);
            match recvmsg(&socket, &mut parts, &mut control, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if looks => looks = poller.again(),
                other => break other?,
            }
        };
        poller.end();
        self.end += received.bytes;
        let last = self.end.saturating_sub(1);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    keep(&mut self.fds, last, Some(fd));
                }
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            keep(&mut self.fds, last, None);
        }
        Ok(received.bytes)
    }

    /// The next message if all of it is here. Its descriptors replace what is in `fds`.
    ///
    /// # Errors
    /// The header and [`Refusal::FrameSize`] if its size field is impossible. The stream cannot be followed any
    /// further then.
    pub fn next(
        &mut self,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<Message<'_>>, (Header, Refusal)> {
        fds.clear();
        let Some(waiting) = self.buffer.get(self.start..self.end) else {
            return Ok(None);
        };
        let Some(header) = Header::decode(waiting) else {
            return Ok(None);
        };
        let size = header.size as usize;
        if !(HEADER_SIZE..=MAX_MESSAGE).contains(&size) {
            return Err((header, Refusal::FrameSize { size: header.size }));
        }
        let Some(body) = waiting.get(HEADER_SIZE..size) else {
            return Ok(None);
        };
        self.start += size;
        let mut fds_lost = false;
        if !self.fds.is_empty() {
            let mine = self.fds.iter().take_while(|(at, _)| *at < self.start);
            let mine = mine.count();
            for (_, fd) in self.fds.drain(..mine) {
                match fd {
                    Some(fd) => fds.push(fd),
                    None => fds_lost = true,
                }
            }
        }
        Ok(Some(Message {
            header,
            body,
            fds_lost,
        }))
    }

    /// Moves what is left, less than one message, to the front.
    fn compact(&mut self) {
        if self.start == 0 {
            return;
        }
        self.buffer.copy_within(self.start..self.end, 0);
        for (at, _) in &mut self.fds {
            *at = at.saturating_sub(self.start);
        }
        self.end -= self.start;
        self.start = 0;
    }
}

/// Keeps a descriptor, or in its place the trace of a lost one where there are too many already.
fn keep(fds: &mut Vec<Waiting>, at: usize, fd: Option<OwnedFd>) {
    if fds.len() < MAX_WAITING - 1 {
        fds.push((at, fd));
    } else if let Some(last) = fds.last_mut() {
        *last = (at, None);
    }
}
