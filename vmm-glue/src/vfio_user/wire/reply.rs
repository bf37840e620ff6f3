//! Replies.

use rustix::io::Errno;

use super::super::MAX_TRANSFER;
use super::{HEADER_SIZE, Header, flag};

/// Most bytes of a reply's body before its data.
const MAX_FIXED: usize = 64;

/// File descriptors that go with a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Files {
    /// None.
    None,
    /// The file that a BAR is mapped from.
    Bar(u8),
    /// Those that signal writes to parts of a BAR.
    Io(u8),
    /// The client's end of the second socket.
    Twin,
}

/// A reply under construction, in a buffer that is made once per connection and fits the largest one.
#[derive(Debug)]
pub struct Reply {
    buffer: Box<[u8]>,
    len: usize,
    files: Files,
}

impl Default for Reply {
    fn default() -> Self {
        Self::new()
    }
}

impl Reply {
    /// An empty reply. Its pages are touched only as far as replies are long.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buffer: vec![0; HEADER_SIZE + MAX_FIXED + MAX_TRANSFER].into_boxed_slice(),
            len: HEADER_SIZE,
            files: Files::None,
        }
    }

    /// Drops what was put; the next [`finish`](Self::finish) gives an empty body.
    pub fn clear(&mut self) {
        self.len = HEADER_SIZE;
        self.files = Files::None;
    }

    /// Says which descriptors go with the reply.
    pub fn with(&mut self, files: Files) -> &mut Self {
        self.files = files;
        self
    }

    /// The descriptors that go with the reply.
    #[must_use]
    pub fn files(&self) -> Files {
        self.files
    }

    /// Appends a 16-bit number.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a 32-bit number.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends a 64-bit number.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_ne_bytes())
    }

    /// Appends bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.space(bytes.len()).copy_from_slice(bytes);
        self
    }

    /// Appends `len` zero bytes and returns them to be filled.
    ///
    /// More than fits a reply (a fixed part and [`MAX_TRANSFER`]) is a bug in the caller, which decoded the
    /// request's count.
    pub fn space(&mut self, len: usize) -> &mut [u8] {
        let at = self.len;
        let (_, free) = self.buffer.split_at_mut(at);
        let (space, _) = free.split_at_mut(len);
        self.len += len;
        space.fill(0);
        space
    }

    /// Completes the header of a successful reply to `request`; the message to send.
    pub fn finish(&mut self, request: &Header) -> &[u8] {
        self.header(request, flag::REPLY, 0)
    }

    /// Replaces all that was put by an error; the message to send, of 16 bytes.
    pub fn refuse(&mut self, request: &Header, errno: Errno) -> &[u8] {
        self.clear();
        self.header(
            request,
            flag::REPLY | flag::ERROR,
            errno.raw_os_error().unsigned_abs(),
        )
    }

    fn header(&mut self, request: &Header, flags: u32, error: u32) -> &[u8] {
        let header = Header {
            id: request.id,
            command: request.command,
            // The buffer is far shorter than 4 GiB.
            size: u32::try_from(self.len).unwrap_or(u32::MAX),
            flags,
            error,
        };
        let (message, _) = self.buffer.split_at_mut(self.len);
        let (head, _) = message.split_at_mut(HEADER_SIZE);
        head.copy_from_slice(&header.encode());
        message
    }
}
