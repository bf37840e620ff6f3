//! From the socket's stream to messages: bulk receives into one buffer, cut by the header's size field.
//!
//! A stream receive glues messages without file descriptors together and ends after the first piece that carries
//! some, so descriptors belong to the message that holds the last byte received with them (unix(7), `SCM_RIGHTS`).
//! Each descriptor therefore keeps the position of that byte until its message is complete. A client may also send more
//! messages at once, of which one is meant: then it is the last that takes descriptors.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

use super::irq::DATA_EVENTFD;
use super::polling::Poller;
use super::refusal::Refusal;
use super::wire::{HEADER_SIZE, Header, Kind, command, u32_at};
use super::{MAX_FDS, MAX_MESSAGE};

/// Bytes asked for in one receive. A socket's default buffer holds a few hundred small messages, which fit.
const CHUNK: usize = 64 << 10;

/// Descriptors that one receive has room for: more than are taken, so that one too many is seen and not lost.
const CONTROL_FDS: usize = 2 * MAX_FDS;

/// Descriptors kept for messages that are not complete yet.
const MAX_WAITING: usize = 2 * CONTROL_FDS;

/// A descriptor, or the trace of one that was lost.
#[derive(Debug)]
struct Waiting {
    /// Buffer position of the first byte of the receive that it came with.
    first: usize,
    /// Of the last one.
    last: usize,
    fd: Option<OwnedFd>,
}

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
        let first = self.end;
        self.end += received.bytes;
        let last = self.end.saturating_sub(1);
        let waiting = |fd| Waiting { first, last, fd };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    keep(&mut self.fds, waiting(Some(fd)));
                }
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            keep(&mut self.fds, waiting(None));
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
        let mut fds_lost = false;
        if let Some(waits) = self.fds.first() {
            let (begin, end) = (self.start, self.start + size);
            let of_this = waits.first <= begin
                && waits.last >= end
                && takes_fds(waiting)
                && !self.one_takes_fds(end, waits.last);
            let last = if of_this { waits.last } else { end - 1 };
            let mine = self.fds.iter().take_while(|waits| waits.last <= last);
            let mine = mine.count();
            for Waiting { fd, .. } in self.fds.drain(..mine) {
                match fd {
                    Some(fd) => fds.push(fd),
                    None => fds_lost = true,
                }
            }
        }
        self.start += size;
        Ok(Some(Message {
            header,
            body,
            fds_lost,
        }))
    }

    /// Whether a message that begins between these positions takes descriptors, or may.
    fn one_takes_fds(&self, mut at: usize, last: usize) -> bool {
        while at <= last {
            let rest = self.buffer.get(at..self.end).unwrap_or_default();
            match Header::decode(rest) {
                Some(header) if header.size as usize >= HEADER_SIZE && !takes_fds(rest) => {
                    at = at.saturating_add(header.size as usize);
                }
                _ => return true,
            }
        }
        false
    }

    /// Whether the next message is a reply; none if its header is not here yet.
    pub(super) fn is_reply_next(&self) -> Option<bool> {
        let header = Header::decode(self.buffer.get(self.start..self.end)?)?;
        Some(header.kind() == Kind::Reply)
    }

    /// Moves what is left, less than one message, to the front.
    fn compact(&mut self) {
        if self.start == 0 {
            return;
        }
        self.buffer.copy_within(self.start..self.end, 0);
        for Waiting { first, last, .. } in &mut self.fds {
            *first = first.saturating_sub(self.start);
            *last = last.saturating_sub(self.start);
        }
        self.end -= self.start;
        self.start = 0;
    }
}

/// Whether the message at the start of `bytes` may come with descriptors, as far as it can be seen.
fn takes_fds(bytes: &[u8]) -> bool {
    let Some(header) = Header::decode(bytes) else {
        return true;
    };
    let flags = || u32_at(bytes, HEADER_SIZE + 4);
    header.kind() == Kind::Command
        && match header.command {
            command::DMA_MAP => true,
            command::SET_IRQS => flags().is_none_or(|flags| flags & DATA_EVENTFD != 0),
            _ => false,
        }
}

/// Keeps a descriptor, or in its place the trace of a lost one where there are too many already.
fn keep(fds: &mut Vec<Waiting>, waiting: Waiting) {
    if fds.len() < MAX_WAITING - 1 {
        fds.push(waiting);
    } else if let Some(most) = fds.last_mut() {
        *most = Waiting {
            fd: None,
            ..waiting
        };
    }
}
