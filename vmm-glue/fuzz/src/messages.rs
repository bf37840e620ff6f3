//! A stream as its size fields cut it.

use std::time::Duration;

use numagpu_vmm_glue::vfio_user::MAX_MESSAGE;
use numagpu_vmm_glue::vfio_user::wire::{HEADER_SIZE, Header};

/// Messages of one input that are looked at; what follows is ignored, so that no input takes long.
const MAX_MESSAGES: usize = 64;

/// The next piece of a stream.
#[derive(Clone, Copy, Debug)]
pub enum Piece<'s> {
    /// A whole message.
    Message(Header, &'s [u8]),
    /// A header whose size cannot be, and all that follows.
    BadSize(Header, &'s [u8]),
    /// What is no whole message any more.
    Rest(&'s [u8]),
}

impl<'s> Piece<'s> {
    /// All of its bytes.
    #[must_use]
    pub fn bytes(&self) -> &'s [u8] {
        match self {
            Piece::Message(_, bytes) | Piece::BadSize(_, bytes) | Piece::Rest(bytes) => bytes,
        }
    }
}

/// Cuts a stream. The last piece is none that is a message.
pub fn pieces(mut stream: &[u8]) -> impl Iterator<Item = Piece<'_>> {
    let mut ended = false;
    let next = move || {
        if ended {
            return None;
        }
        let Some(header) = Header::decode(stream) else {
            ended = true;
            return Some(Piece::Rest(stream));
        };
        let size = header.size as usize;
        if !(HEADER_SIZE..=MAX_MESSAGE).contains(&size) {
            ended = true;
            return Some(Piece::BadSize(header, stream));
        }
        let Some((message, rest)) = stream.split_at_checked(size) else {
            ended = true;
            return Some(Piece::Rest(stream));
        };
        stream = rest;
        Some(Piece::Message(header, message))
    };
    std::iter::from_fn(next).take(MAX_MESSAGES)
}

/// What a client does with a message besides sending it; from the field of commands that servers do not look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Descriptors that go with it, 0 to 17.
    pub fds: usize,
    /// Of what they are: the first is `kind`, the next one more.
    pub kind: usize,
    /// Whether it goes over the second socket if there is one, where replies go in any case.
    pub twin: bool,
    /// Where it is cut in two, if inside it.
    pub cut: usize,
    /// How long the client waits after it for the server to ask for something, at most.
    pub pause: Duration,
}

/// What the byte for it counts.
const PAUSE: Duration = Duration::from_micros(100);

/// Most descriptors: one more than a server takes.
const MAX_FDS: usize = 17;

impl Manner {
    /// That of a message.
    #[must_use]
    pub fn of(message: &[u8]) -> Manner {
        let byte = |at| message.get(at).copied().map_or(0, usize::from);
        Manner {
            fds: byte(12) % (MAX_FDS + 1),
            kind: byte(13) & 0x7f,
            twin: byte(13) & 0x80 != 0,
            cut: byte(14),
            pause: PAUSE * message.get(15).copied().map_or(0, u32::from),
        }
    }
}
