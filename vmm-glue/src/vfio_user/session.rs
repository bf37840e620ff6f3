//! One connection: requests in the order they came, each answered before the next is looked at.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use numagpu_devices::bus::{Attachment, PciFunction, ResetKind};

use super::client::Client;
use super::dma::{DmaTable, MapError};
use super::framing::Framing;
use super::irq::{self, IrqTable};
use super::polling::{Poller, Polling};
use super::refusal::Refusal;
use super::regions::{self, Regions};
use super::version::{self, negotiate};
use super::wire::{self, Access, DmaMap, Files, Header, Kind, Reply, Request};
use super::{MAX_FDS, MAX_TRANSFER};

/// `VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI`.
const DEVICE_FLAGS: u32 = 0b11;

/// Serves one client until it goes away. Buffers are made at the start; requests allocate nothing but what they
/// ask to keep.
pub struct Session {
    socket: Arc<OwnedFd>,
    client: Arc<Client>,
    framing: Framing,
    poller: Poller,
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
    client: Arc<Client>,
    /// Whether `VERSION` was negotiated, from which on the function is attached.
    attached: bool,
}

impl Session {
    /// A session for a client that has just connected, at the other end of `socket`.
    #[must_use]
    pub fn new(function: Arc<dyn PciFunction>, socket: Arc<OwnedFd>) -> Self {
        let client = Arc::new(Client::new(Arc::clone(&socket)));
        let layout = function.layout();
        let (regions, irq) = (Regions::new(&*function), IrqTable::new(layout.msix_vectors));
        Self {
            socket,
            client: Arc::clone(&client),
            framing: Framing::new(),
            poller: Poller::default(),
            fds: Vec::with_capacity(4 * MAX_FDS),
            reply: Reply::new(),
            device: Device {
                function,
                regions,
                dma: Arc::new(DmaTable::with_client(Arc::clone(&client))),
                irq: Arc::new(irq),
                client,
                attached: false,
            },
        }
    }

    /// The same, that looks for messages as `polling` says.
    #[must_use]
    pub fn polling(mut self, polling: Polling) -> Self {
        self.poller = Poller::new(polling);
        self
    }

    /// Serves until the client disconnects. The function is detached then, and nothing of the client's is kept.
    ///
    /// # Errors
    /// What ended the session other than a plain disconnect.
    pub fn run(mut self) -> Result<(), SessionError> {
        self.client.serve_here();
        let result = self.serve();
        self.device.disconnect();
        result
    }

    fn serve(&mut self) -> Result<(), SessionError> {
        while self.framing.receive(&*self.socket, &mut self.poller)? > 0 {
            loop {
                let message = match self.framing.next(&mut self.fds) {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err((header, refusal)) => {
                        if header.kind() == Kind::Command && !header.no_reply() {
                            let reply = self.reply.refuse(&header, refusal.errno());
                            self.client.reply(reply, &[])?;
                        }
                        return Err(refusal.into());
                    }
                };
                let header = message.header;
                if header.kind() == Kind::Reply {
                    self.client.answer(&header, message.body);
                    continue;
                }
                self.reply.clear();
                self.client.begin();
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
                self.client.end();
                if let Err(refusal) = &done {
                    tracing::debug!(command = header.command, id = header.id, "{refusal}");
                }
                if header.no_reply() {
                    continue;
                }
                match done {
                    Ok(()) => {
                        let files = match self.reply.files() {
                            Files::None => None,
                            Files::Bar(bar) => self.device.function.bar_file(bar),
                        };
                        let reply = self.reply.finish(&header);
                        self.client.reply(reply, files.as_slice())?;
                    }
                    Err(refusal) => {
                        let reply = self.reply.refuse(&header, refusal.errno());
                        self.client.reply(reply, &[])?;
                    }
                }
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
                self.map(&map, fds.pop())
            }
            Request::DmaUnmap {
                argsz,
                flags,
                address,
                size,
                bitmap: _,
            } => {
                self.unmap(flags, address, size)?;
                reply.u32(argsz).u32(flags).u64(address).u64(size);
                Ok(())
            }
            Request::SetIrqs(set) => self.irq.set(&set, fds),
            Request::Feature { .. }
            | Request::MigrationRead { .. }
            | Request::MigrationWrite(_) => Err(Refusal::Unsupported(header.command)),
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
            Request::GetRegionIoFds { index, .. } => {
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
        let agreed = negotiate(major, minor, data)?;
        self.client.limit(agreed.max_transfer);
        self.function.attach(Attachment {
            dma: Arc::clone(&self.dma) as _,
            irq: Arc::clone(&self.irq) as _,
        });
        self.attached = true;
        reply.u16(version::MAJOR).u16(agreed.minor);
        reply.bytes(agreed.data.as_bytes());
        Ok(())
    }

    fn map(&self, request: &DmaMap, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        // QEMU maps a BAR's memory into its guest, and shows that back without a descriptor.
        let function = &*self.function;
        let own = || {
            let (address, size) = (request.address, request.size);
            let (bar, offset) = self.regions.at_bus_address(function, address, size)?;
            let file = function.bar_file(bar)?.try_clone_to_owned().ok()?;
            Some((file, offset))
        };
        match fd.is_none().then(own).flatten() {
            Some((file, offset)) => self.dma.map_own(request, file, offset)?,
            None => self.dma.map(request, fd)?,
        }
        function.dma_changed();
        Ok(())
    }

    fn unmap(&self, flags: u32, address: u64, size: u64) -> Result<(), MapError> {
        match (flags, address, size) {
            (0, _, _) => self.dma.unmap(address, size)?,
            (wire::UNMAP_ALL | wire::UNMAP_ALL_OLD, 0, 0) => self.dma.unmap_all(),
            _ => {
                return Err(MapError::UnmapFlags {
                    flags,
                    address,
                    size,
                });
            }
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
