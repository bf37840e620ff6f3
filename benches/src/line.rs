//! Clients of the servers that are compared, and what answers them.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use numagpu_devices::bus::{Attachment, Bar, DmaPort, FunctionLayout, PciFunction, ResetKind};
use numagpu_vmm_glue::vfio_user::{Listener, Polling, Server};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tempfile::TempDir;
use vfio_bindings::bindings::vfio::vfio_region_info;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, ServerBackend, ServerRegion};

use crate::figures::nanos;

/// Bytes of a read request and of its reply with 4 bytes of data; a 4-byte write is as long as the latter.
const REQUEST: usize = 32;
const REPLY: usize = 36;

/// Posted writes in a burst; a read ends it.
pub const BURST: u32 = 10_000;

/// One register, and the way to the memory of the client that it has.
pub struct Register(FunctionLayout, AtomicU32, Mutex<Option<Attachment>>);

impl Register {
    /// The memory of the client that has connected.
    pub fn memory(&self) -> Arc<dyn DmaPort> {
        loop {
            if let Some(attachment) = &*self.2.lock().unwrap() {
                return Arc::clone(&attachment.dma);
            }
            std::thread::yield_now();
        }
    }
}

impl PciFunction for Register {
    fn layout(&self) -> &FunctionLayout {
        &self.0
    }
    fn attach(&self, attachment: Attachment) {
        *self.2.lock().unwrap() = Some(attachment);
    }
    fn detach(&self) {
        *self.2.lock().unwrap() = None;
    }
    fn dma_changed(&self) {}
    fn config_read(&self, _: u32, _: &mut [u8]) {}
    fn config_write(&self, _: u32, _: &[u8]) {}
    fn bar_read(&self, _: u8, _: u64, data: &mut [u8]) {
        let value = self.1.load(Ordering::Relaxed).to_ne_bytes();
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
    }
    fn bar_write(&self, _: u8, _: u64, data: &[u8]) {
        if let Ok(value) = data.try_into() {
            self.1.store(u32::from_ne_bytes(value), Ordering::Relaxed);
        }
    }
    fn reset(&self, _: ResetKind) {}
}

/// The same register behind the server of the `vfio_user` crate, which keeps what is mapped as ours does.
#[derive(Default)]
struct Peer {
    value: [u8; 4],
    maps: std::collections::BTreeMap<u64, vm_memory::MmapRegion>,
}

impl ServerBackend for Peer {
    fn region_read(&mut self, _: u32, _: u64, data: &mut [u8]) -> io::Result<()> {
        data.iter_mut()
            .zip(self.value)
            .for_each(|(to, from)| *to = from);
        Ok(())
    }
    fn region_write(&mut self, _: u32, _: u64, data: &[u8]) -> io::Result<()> {
        if let Ok(value) = data.try_into() {
            self.value = value;
        }
        Ok(())
    }
    fn dma_map(
        &mut self,
        _: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        if let Some(file) = fd {
            let file = vm_memory::FileOffset::new(file, offset);
            let size = usize::try_from(size).map_err(io::Error::other)?;
            let region = vm_memory::MmapRegion::from_file(file, size);
            self.maps.insert(address, region.map_err(io::Error::other)?);
        }
        Ok(())
    }
    fn dma_unmap(&mut self, _: DmaUnmapFlags, address: u64, _: u64) -> io::Result<()> {
        self.maps.remove(&address);
        Ok(())
    }
    fn reset(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn set_irqs(&mut self, _: u32, _: u32, _: u32, _: u32, _: Vec<File>) -> io::Result<()> {
        Ok(())
    }
}

/// A message with this command number, flags and body.
pub fn message(command: u16, flags: u32, body: &[&[u8]]) -> Vec<u8> {
    let body = body.concat();
    let size = u32::try_from(16 + body.len()).unwrap();
    let mut bytes = vec![1, 0];
    bytes.extend(command.to_ne_bytes());
    for word in [size, flags, 0] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(body);
    bytes
}

/// A server that clients can connect to, until it is dropped.
pub struct Served {
    path: PathBuf,
    _server: Option<Server>,
    _dir: TempDir,
}

impl Served {
    /// One of the project's.
    pub fn ours(polling: Polling) -> Served {
        Served::with_function(polling).0
    }

    /// The same, and what it serves.
    pub fn with_function(polling: Polling) -> (Served, Arc<Register>) {
        let dir = tempfile::tempdir().unwrap();
        let bar = Bar {
            index: 0,
            size: 4096,
            is_64bit: false,
            prefetchable: false,
            mappable: Vec::new(),
        };
        let layout = FunctionLayout {
            bars: vec![bar],
            config_size: 256,
            msix_vectors: 1,
        };
        let function = Arc::new(Register(layout, AtomicU32::new(0), Mutex::default()));
        let path = dir.path().join("gpu");
        let listener = Listener::bind(&path).unwrap();
        let server = Server::start(listener, Arc::clone(&function) as _, polling).unwrap();
        let served = Served {
            path,
            _server: Some(server),
            _dir: dir,
        };
        (served, function)
    }

    /// One of the `vfio_user` crate. Its thread stays at the end, as it has no way to be stopped.
    pub fn peer() -> Served {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer");
        let region = ServerRegion {
            region_info: vfio_region_info {
                argsz: 32,
                flags: 3,
                index: 0,
                cap_offset: 0,
                size: 4096,
                offset: 0,
            },
            sparse_areas: Vec::new(),
            mmap_fd: None,
        };
        let server = vfio_user::Server::new(&path, true, Vec::new(), vec![region]).unwrap();
        std::thread::spawn(move || while server.run(&mut Peer::default()).is_ok() {});
        Served {
            path,
            _server: None,
            _dir: dir,
        }
    }

    /// A client that has negotiated the version.
    pub fn connect(&self) -> UnixStream {
        connect(&self.path, b"{\"capabilities\":{}}\0").0
    }

    /// The same, with a second socket for what the server asks for.
    pub fn connect_twice(&self) -> (UnixStream, UnixStream) {
        let json = b"{\"capabilities\":{\"max_msg_fds\":1,\"twin_socket\":{\"supported\":true}}}\0";
        let (stream, twin) = connect(&self.path, json);
        (stream, twin.unwrap())
    }
}

fn connect(path: &Path, json: &[u8]) -> (UnixStream, Option<UnixStream>) {
    let mut stream = UnixStream::connect(path).unwrap();
    let version = message(1, 0, &[&[0; 4], json]);
    stream.write_all(&version).unwrap();
    let mut head = [0; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut head)];
    // Replies come whole.
    recvmsg(&stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let twin = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let size = head.iter().skip(4).take(4).rev();
    let size = size.fold(0, |size, byte| size << 8 | usize::from(*byte));
    stream.read_exact(&mut vec![0; size - 16]).unwrap();
    (stream, twin.map(UnixStream::from))
}

/// A client and what answers it.
pub struct Line {
    stream: UnixStream,
    read: Vec<u8>,
    posted: Vec<u8>,
    _served: Option<Served>,
}

impl Line {
    /// To a server.
    pub fn to(served: Served) -> Line {
        let stream = served.connect();
        Line {
            _served: Some(served),
            ..Line::over(stream)
        }
    }

    /// To a thread that receives and sends, and looks at nothing but lengths.
    pub fn bare() -> Line {
        let (client, mut server) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let (mut buffer, mut reply) = (vec![0; REPLY * 1800], [0; REPLY]);
            let mut posted = 0;
            while let Ok(len @ 1..) = server.read(&mut buffer) {
                // A burst's writes and a read are told apart by their sum.
                posted += len;
                if posted % REPLY == REQUEST {
                    posted = 0;
                    reply[4..8].copy_from_slice(&36_u32.to_ne_bytes());
                    server.write_all(&reply).unwrap();
                }
            }
        });
        Line::over(client)
    }

    /// To a thread that takes the descriptor out of each message, closes it, and answers as a map or unmap is.
    pub fn bare_maps() -> Line {
        let (client, server) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [IoSliceMut::new(&mut buffer)];
                let received =
                    recvmsg(&server, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
                let files = control.drain().count();
                let reply: &[u8] = match files {
                    1 => &[0; 16],
                    _ => &[0; 40],
                };
                if received.bytes == 0 || (&server).write_all(reply).is_err() {
                    break;
                }
            }
        });
        Line::over(client)
    }

    fn over(stream: UnixStream) -> Line {
        let place = [0; 12];
        let count = 4_u32.to_ne_bytes();
        Line {
            stream,
            read: message(9, 0, &[&place, &count]),
            posted: message(10, 0x10, &[&place, &count, &[1; 4]]),
            _served: None,
        }
    }

    /// One register read, waited for.
    pub fn round_trip(&mut self) {
        self.stream.write_all(&self.read).unwrap();
        self.stream.read_exact(&mut [0; REPLY]).unwrap();
    }

    /// A burst of posted writes, and a read that comes back when all are done.
    pub fn burst(&mut self) {
        for _ in 0..BURST {
            self.stream.write_all(&self.posted).unwrap();
        }
        self.round_trip();
    }

    /// What is measured in turns: 500 round trips in ns each, and a burst in ns a message.
    pub fn block(&mut self) -> (Vec<u64>, u64) {
        let reads = (0..500).map(|_| nanos(|| self.round_trip())).collect();
        let burst = nanos(|| self.burst()) / u64::from(BURST);
        (reads, burst)
    }

    /// Asks for the page at `offset` of `ram` to be mapped.
    pub fn ask_map(&self, ram: BorrowedFd<'_>, offset: u64, address: u64) {
        let [offset, address, size] = [offset, address, 4096_u64].map(u64::to_ne_bytes);
        let head = [32_u32, 3].map(u32::to_ne_bytes).concat();
        let map = message(2, 0, &[&head, &offset, &address, &size]);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [ram];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let parts = [IoSlice::new(&map)];
        sendmsg(&self.stream, &parts, &mut control, SendFlags::empty()).unwrap();
    }

    /// Waits until that is done, for each that was asked for.
    pub fn mapped(&mut self) {
        self.stream.read_exact(&mut [0; 16]).unwrap();
    }

    /// Unmaps a page, waited for.
    pub fn unmap(&mut self, address: u64) {
        let [address, size] = [address, 4096_u64].map(u64::to_ne_bytes);
        let head = [24_u32, 0].map(u32::to_ne_bytes).concat();
        let unmap = message(3, 0, &[&head, &address, &size]);
        self.stream.write_all(&unmap).unwrap();
        self.stream.read_exact(&mut [0; 40]).unwrap();
    }
}
