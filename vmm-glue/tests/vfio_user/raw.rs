//! A client that sends exactly the bytes it is told to.

use std::io::{IoSlice, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const GET_INFO: u16 = 4;
pub const REGION_INFO: u16 = 5;
pub const IO_FDS: u16 = 6;
pub const IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const READ: u16 = 9;
pub const WRITE: u16 = 10;
pub const DMA_READ: u16 = 11;
pub const DMA_WRITE: u16 = 12;
pub const RESET: u16 = 13;
pub const WRITE_MULTI: u16 = 15;
pub const FEATURE: u16 = 16;
pub const MIG_READ: u16 = 17;
pub const MIG_WRITE: u16 = 18;

pub const REPLY: u32 = 1;
pub const NO_REPLY: u32 = 0x10;
pub const ERROR: u32 = 0x20;

/// What QEMU proposes.
pub const PROPOSAL: &str = concat!(
    r#"{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"#,
    r#""max_data_xfer_size":1048576,"migration":{"pgsize":4096},"write_multiple":true}}"#,
    "\0"
);

pub struct Raw {
    pub stream: UnixStream,
}

/// A reply: id, command, flags, error number, body.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub errno: u32,
    pub body: Vec<u8>,
}

impl Answer {
    fn new(header: &[u8], body: Vec<u8>) -> Self {
        let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let word = |at: usize| u32::from_ne_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4) as usize, 16 + body.len());
        Self {
            id: half(0),
            command: half(2),
            flags: word(8),
            errno: word(12),
            body,
        }
    }
}

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        let limit = Some(Duration::from_secs(5));
        stream.set_read_timeout(limit).unwrap();
        Self { stream }
    }

    /// Connects and negotiates.
    pub fn ready(path: &Path) -> Self {
        Self::proposing(path, PROPOSAL)
    }

    /// Connects and negotiates with version data of one's own.
    pub fn proposing(path: &Path, proposal: &str) -> Self {
        let mut raw = Self::connect(path);
        let body = [&[0; 4], proposal.as_bytes()].concat();
        raw.send(&message(VERSION, &body), &[]);
        assert_eq!(raw.answer().errno, 0);
        raw
    }

    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        assert_eq!(sent, Ok(bytes.len()));
    }

    pub fn try_answer(&mut self) -> std::io::Result<Answer> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let size = u32::from_ne_bytes(header[4..8].try_into().unwrap());
        let mut body = vec![0; size as usize - 16];
        self.stream.read_exact(&mut body)?;
        Ok(Answer::new(&header, body))
    }

    pub fn answer(&mut self) -> Answer {
        self.try_answer().unwrap()
    }

    /// Sends one message and returns its reply.
    pub fn ask(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> Answer {
        self.send(&message(command, body), fds);
        let answer = self.answer();
        assert_eq!(answer.command, command);
        answer
    }

    /// Sends one message and returns its reply with the descriptors that came with it, all in one receive.
    pub fn ask_for_fds(&mut self, command: u16, body: &[u8]) -> (Answer, Vec<OwnedFd>) {
        self.send(&message(command, body), &[]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 4096];
        let mut places = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(&self.stream, &mut places, &mut control, flags).unwrap();
        let fds = control.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let fds = fds.collect();
        let (header, body) = bytes[..got.bytes].split_at(16);
        let answer = Answer::new(header, body.to_vec());
        assert_eq!(answer.command, command);
        (answer, fds)
    }

    /// Sends one message and returns the error number of its reply.
    pub fn errno(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd<'_>]) -> u32 {
        let answer = self.ask(command, body, fds);
        assert_eq!(answer.flags, if answer.errno == 0 { 1 } else { 1 | ERROR });
        answer.errno
    }

    /// Whether the server closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.stream.read(&mut [0; 1]), Ok(0))
            || matches!(self.stream.take_error(), Ok(Some(_)))
    }
}

pub fn message(command: u16, body: &[u8]) -> Vec<u8> {
    framed(7, command, 16 + u32::try_from(body.len()).unwrap(), 0, body)
}

pub fn framed(id: u16, command: u16, size: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(id.to_ne_bytes());
    bytes.extend(command.to_ne_bytes());
    bytes.extend(words(&[size, flags, 0]));
    bytes.extend(body);
    bytes
}

pub fn version() -> Vec<u8> {
    message(VERSION, &[&[0; 4], PROPOSAL.as_bytes()].concat())
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

pub fn map_body(flags: u32, offset: u64, address: u64, size: u64) -> Vec<u8> {
    [words(&[32, flags]), longs(&[offset, address, size])].concat()
}

pub fn unmap_body(flags: u32, address: u64, size: u64) -> Vec<u8> {
    [words(&[24, flags]), longs(&[address, size])].concat()
}

pub fn region_body(offset: u64, region: u32, count: u32, data: &[u8]) -> Vec<u8> {
    [&longs(&[offset])[..], &words(&[region, count]), data].concat()
}

/// The request of a device feature, with room for so many bytes in the reply.
pub fn feature_body(room: usize, flags: u32, data: &[u8]) -> Vec<u8> {
    let argsz = u32::try_from(room).unwrap();
    [words(&[argsz, flags]), data.to_vec()].concat()
}

pub fn irqs_body(flags: u32, index: u32, start: u32, count: u32) -> Vec<u8> {
    words(&[20, flags, index, start, count])
}

pub fn memfd(size: u64) -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size).unwrap();
    assert!(fd.as_fd().try_clone_to_owned().is_ok());
    fd
}
