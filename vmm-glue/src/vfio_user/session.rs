//! One connection: requests in the order they came, each answered before the next is looked at.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use numagpu_devices::bus::{Attachment, PciFunction, ResetKind};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg};

use super::dma::{DmaTable, MapError};
use super::framing::Framing;
use super::irq::{self, IrqTable};
use super::refusal::Refusal;
use super::regions::{self, Regions};
use super::version::{self, negotiate};
use super::wire::{self, Access, Header, Kind, Reply, Request};
use super::{MAX_FDS, MAX_TRANSFER};

/// `VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI`.
const DEVICE_FLAGS: u32 = 0b11;

/// Serves one client until it goes away. Buffers are made at the start; requests allocate nothing but what they
/// ask to keep.
pub struct Session {
    framing: Framing,
    fds: Vec<OwnedFd>,
    reply: Reply,
    device: Device,
}

/// The function as this client knows it.
struct Device {
    function: Arc<dyn PciFunction>,
    regions: Regions,
    dma: Arc<DmaTable>,
    irq: Arc<IrqTable>,
    /// Whether `VERSION` was negotiated, from which on the function is attached.
    attached: bool,
}

impl Session {
    /// A session for a client that has just connected.
    #[must_use]
    pub fn new(function: Arc<dyn PciFunction>) -> Self {
        let layout = function.layout();
        let (regions, irq) = (Regions::new(&*function), IrqTable::new(layout.msix_vectors));
        Self {
            framing: Framing::new(),
            fds: Vec::with_capacity(4 * MAX_FDS),
            reply: Reply::new(),
            device: Device {
                function,
                regions,
                dma: Arc::new(DmaTable::new()),
                irq: Arc::new(irq),
                attached: false,
            },
        }
    }

    /// Serves until the client disconnects. The function is detached then, and nothing of the client's is kept.
    ///
    /// # Errors
    /// What ended the session other than a plain disconnect.
    pub fn run(mut self, socket: impl AsFd) -> Result<(), SessionError> {
        let result = self.serve(socket.as_fd());
        self.device.disconnect();
        result
    }

    fn serve(&mut self, socket: impl AsFd) -> Result<(), SessionError> {
        while self.framing.receive(&socket)? > 0 {
            loop {
                let message = match self.framing.next(&mut self.fds) {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err((header, refusal)) => {
                        if header.kind() == Kind::Command && !header.no_reply() {
                            send_all(&socket, self.reply.refuse(&header, refusal.errno()))?;
                        }
                        return Err(refusal.into());
                    }
                };
                let header = message.header;
                if header.kind() == Kind::Reply {
                    // Nothing was asked; there is nobody to tell.
                    continue;
                }
                self.reply.clear();
                let done = if message.fds_lost || self.fds.len() > MAX_FDS {
                    Err(Refusal::Fds {
                        got: self.fds.len(),
                        max: MAX_FDS,
                    })
                } else {
                    wire::decode(&header, message.body).and_then(|it| {
                        self.device
                            .handle(it, &header, &mut self.fds, &mut self.reply)
                    })
                };
                if let Err(refusal) = &done {
                    tracing::debug!(command = header.command, id = header.id, "{refusal}");
                }
                if header.no_reply() {
                    continue;
                }
                let reply = match done {
                    Ok(()) => {
                        let bar = self.reply.file_of();
                        let file = bar.and_then(|bar| self.device.function.bar_file(bar));
                        let reply = self.reply.finish(&header);
                        match file {
                            Some(file) => send_with(&socket, reply, file)?,
                            None => reply,
                        }
                    }
                    Err(refusal) => self.reply.refuse(&header, refusal.errno()),
                };
                send_all(&socket, reply)?;
            }
            // Descriptors that no request kept.
            self.fds.clear();
        }
        Ok(())
    }
}

/// Why a session ended other than by the client's leave.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream cannot be followed any further.
    #[error("the stream is out of step: {0}")]
    Stream(#[from] Refusal),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
}

/// Sends all of a message: one call, unless it is larger than the socket's buffer.
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

/// Sends a descriptor with the first bytes of a message, which are all of them unless the socket's buffer is
/// full; what is left to send.
fn send_with<'m>(
    socket: impl AsFd,
    message: &'m [u8],
    file: BorrowedFd<'_>,
) -> io::Result<&'m [u8]> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file];
        if !control.push(SendAncillaryMessage::ScmRights(&files)) {
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

impl Device {
    /// Carries out a request and puts the body of its reply.
    fn handle(
        &mut self,
        request: Request<'_>,
        header: &Header,
        fds: &mut Vec<OwnedFd>,
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        match (self.attached, &request) {
            (false, Request::Version { .. }) => {}
            (true, Request::Version { .. }) => return Err(Refusal::VersionAgain),
            (false, _) => return Err(Refusal::BeforeVersion(header.command)),
            (true, _) => {}
        }
        match request {
            Request::Version { major, minor, data } => self.version(major, minor, data, reply),
            Request::RegionRead(access) => {
                let place = self.regions.place(&access)?;
                put_access(reply, &access);
                // The count was checked against `MAX_TRANSFER`.
                let data = reply.space(access.count as usize);
                if let Some(place) = place {
                    place.read(&*self.function, data);
                }
                Ok(())
            }
            Request::RegionWrite(access, data) => {
                if let Some(place) = self.regions.place(&access)? {
                    place.write(&*self.function, data);
                }
                put_access(reply, &access);
                Ok(())
            }
            Request::RegionWriteMulti(writes) => {
                for write in writes.iter() {
                    self.regions.place(&write?.0)?;
                }
                for (access, data) in writes.iter().flatten() {
                    if let Some(place) = self.regions.place(&access)? {
                        place.write(&*self.function, data);
                    }
                }
                reply.u64(writes.count());
                Ok(())
            }
            Request::DmaMap(map) => {
                if fds.len() > 1 {
                    let got = fds.len();
                    return Err(Refusal::Fds { got, max: 1 });
                }
                self.dma.map(&map, fds.pop())?;
                self.function.dma_changed();
                Ok(())
            }
            Request::DmaUnmap {
                argsz,
                flags,
                address,
                size,
            } => {
                self.unmap(flags, address, size)?;
                reply.u32(argsz).u32(flags).u64(address).u64(size);
                Ok(())
            }
            Request::SetIrqs(set) => self.irq.set(&set, fds),
            Request::Reset => {
                self.function.reset(ResetKind::Hot);
                Ok(())
            }
            info => self.info(info, reply),
        }
    }

    /// Answers a question about the device that changes nothing.
    fn info(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Refusal> {
        match request {
            Request::GetInfo => {
                reply.u32(16).u32(DEVICE_FLAGS);
                reply.u32(regions::COUNT).u32(irq::COUNT);
            }
            Request::GetRegionInfo { argsz, index } => {
                self.regions.describe(index, argsz, reply)?;
            }
            Request::GetRegionIoFds { index } => {
                self.regions.size(index)?;
                reply.u32(16).u32(0).u32(index).u32(0);
            }
            Request::GetIrqInfo { index } => {
                let (flags, count) = self.irq.info(index)?;
                reply.u32(16).u32(flags).u32(index).u32(count);
            }
            _ => {}
        }
        Ok(())
    }

    fn version(
        &mut self,
        major: u16,
        minor: u16,
        data: &[u8],
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        let (minor, data) = negotiate(major, minor, data)?;
        self.function.attach(Attachment {
            dma: Arc::clone(&self.dma) as _,
            irq: Arc::clone(&self.irq) as _,
        });
        self.attached = true;
        reply.u16(version::MAJOR).u16(minor).bytes(data.as_bytes());
        Ok(())
    }

    fn unmap(&self, flags: u32, address: u64, size: u64) -> Result<(), MapError> {
        match (flags, address, size) {
            (0, _, _) => self.dma.unmap(address, size)?,
            (wire::UNMAP_ALL | wire::UNMAP_ALL_OLD, 0, 0) => self.dma.unmap_all(),
            (wire::UNMAP_ALL | wire::UNMAP_ALL_OLD, _, _) => {
                return Err(MapError::Flags(flags));
            }
            _ => return Err(MapError::UnmapFlags(flags)),
        }
        self.function.dma_changed();
        Ok(())
    }

    /// Takes the client's memory and interrupts from the function, then the function from the client.
    fn disconnect(&mut self) {
        self.dma.disconnect();
        self.irq.disable();
        if std::mem::take(&mut self.attached) {
            self.function.detach();
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.disconnect();
    }
}

fn put_access(reply: &mut Reply, access: &Access) {
    debug_assert!(access.count as usize <= MAX_TRANSFER);
    let (offset, region, count) = (access.offset, access.region, access.count);
    reply.u64(offset).u32(region).u32(count);
}
