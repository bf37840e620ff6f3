//! Requests carried out on the function.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use numagpu_devices::bus::{Attachment, PciFunction, ResetKind};

use super::client::Client;
use super::dma::dirty::{self, DirtyError};
use super::dma::{DmaTable, MapError};
use super::features::{self, Ask};
use super::irq::IrqTable;
use super::migration::{self, Migration};
use super::refusal::Refusal;
use super::regions::{self, Regions};
use super::twin::Twin;
use super::version::{self, negotiate};
use super::wire::{
    Access, DmaMap, Files, Header, Reply, Request, UNMAP_ALL, UNMAP_ALL_OLD, UNMAP_DIRTY,
    UnmapBitmap, command,
};
use super::{Limits, MAX_FDS, MAX_TRANSFER, io_fds};
use crate::kicks::Kicks;

/// `VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI`.
const DEVICE_FLAGS: u32 = 0b11;

/// Bytes of a reply to `DMA_UNMAP` before the bits of a bitmap: the range, `struct vfio_bitmap`.
const UNMAPPED: u32 = 24;
const BITMAP: u32 = 16;

/// Bytes of a `MIG_DATA_READ`'s reply before the data.
const DATA_HEAD: u32 = 8;

/// The function as one client knows it.
pub struct Device {
    function: Arc<dyn PciFunction>,
    regions: Regions,
    dma: Arc<DmaTable>,
    irq: Arc<IrqTable>,
    client: Arc<Client>,
    /// If the client asked for it.
    twin: Option<Twin>,
    migration: Migration,
    /// Made when the client first asks for events.
    kicks: Option<Kicks>,
    limits: Limits,
    /// Most file descriptors that the client takes with one message.
    max_fds: usize,
    /// Most data bytes that the client takes at a time.
    max_taken: u64,
    /// Whether `VERSION` was negotiated, from which on the function is attached.
    attached: bool,
}

impl Device {
    /// The function for a client that has said nothing yet.
    #[must_use]
    pub fn new(function: Arc<dyn PciFunction>, client: Arc<Client>, limits: Limits) -> Self {
        let vectors = function.layout().msix_vectors;
        let irq = IrqTable::new(vectors, function.other_interrupts());
        let limits = limits.bounded();
        let dma = DmaTable::with_client(Arc::clone(&client), limits.max_dma_maps);
        Self {
            regions: Regions::new(&*function),
            function,
            dma: Arc::new(dma),
            irq: Arc::new(irq),
            client,
            twin: None,
            migration: Migration::default(),
            kicks: None,
            limits,
            max_fds: 1,
            max_taken: 0,
            attached: false,
        }
    }

    /// Carries out a request and puts the body of its reply.
    ///
    /// # Errors
    /// [`Refusal`]; what was put is of no use then.
    pub fn handle(
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
            Request::Version { major, minor, data } => {
                if !fds.is_empty() {
                    let got = fds.len();
                    return Err(Refusal::Fds { got, max: 0 });
                }
                self.version((major, minor), data, header.no_reply(), reply)
            }
            Request::RegionRead(access) => {
                self.check_transfer(access.count.into())?;
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
                self.check_transfer(access.count.into())?;
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
                bitmap,
            } => {
                let range = (address, size);
                match (flags, bitmap) {
                    (UNMAP_DIRTY, Some(bitmap)) => self.unmap_dirty(argsz, range, bitmap, reply),
                    _ => self.unmap(argsz, flags, range, reply),
                }
            }
            Request::SetIrqs(set) => self.irq.set(&set, fds),
            Request::Reset => {
                self.function.reset(ResetKind::Hot);
                self.end_migration();
                Ok(())
            }
            Request::Feature { argsz, flags, data } => self.feature(argsz, flags, data, reply),
            Request::MigrationRead { argsz, size } => {
                self.function.migrate().ok_or(unsupported(header))?;
                self.read_state(argsz, size, reply)
            }
            Request::MigrationWrite(data) => {
                let migrate = self.function.migrate().ok_or(unsupported(header))?;
                self.check_piece(data.len() as u64)?;
                Ok(self.migration.write(migrate, data)?)
            }
            Request::GetRegionIoFds { .. } => {
                self.start_kicks();
                self.info(request, reply)
            }
            info => self.info(info, reply),
        }
    }

    /// Answers a question about the device that changes nothing.
    fn info(&self, request: Request<'_>, reply: &mut Reply) -> Result<(), Refusal> {
        match request {
            Request::GetInfo => {
                reply.u32(16).u32(DEVICE_FLAGS);
                reply.u32(regions::COUNT).u32(self.irq.indices());
            }
            Request::GetRegionInfo { argsz, index } => {
                let takes_fds = self.max_fds > 0;
                self.regions.describe(index, argsz, takes_fds, reply)?;
            }
            Request::GetRegionIoFds { argsz, index } => {
                if self.regions.size(index)? == 0 {
                    return Err(Refusal::Region { index });
                }
                io_fds::describe(self.io_fds(), index, argsz, reply);
            }
            Request::GetIrqInfo { index } => {
                let (flags, count) = self.irq.info(index)?;
                reply.u32(16).u32(flags).u32(index).u32(count);
            }
            _ => {}
        }
        Ok(())
    }

    /// The descriptors that go with a reply.
    #[must_use]
    pub fn files(&self, files: Files) -> Vec<BorrowedFd<'_>> {
        match files {
            Files::None => Vec::new(),
            Files::Bar(bar) => self.function.bar_file(bar).into_iter().collect(),
            Files::Io(bar) => io_fds::files(self.io_fds(), bar),
            Files::Twin => self
                .twin
                .as_ref()
                .and_then(Twin::theirs)
                .into_iter()
                .collect(),
        }
    }

    /// The client has its end of the second socket.
    pub fn twin_sent(&mut self) {
        if let Some(twin) = &mut self.twin {
            twin.sent();
        }
    }

    fn io_fds(&self) -> io_fds::Source<'_> {
        io_fds::Source {
            function: &*self.function,
            kicks: self.kicks.as_ref(),
            max_fds: self.max_fds,
        }
    }

    /// A client asks for events: from now on there are some. Without, it sends its writes.
    fn start_kicks(&mut self) {
        if self.kicks.is_none() {
            match Kicks::start(&self.function, "vfio-kicks") {
                Ok(kicks) => self.kicks = kicks,
                Err(error) => tracing::warn!("kicks have no events: {error}"),
            }
        }
    }

    fn version(
        &mut self,
        (major, minor): (u16, u16),
        data: &[u8],
        no_reply: bool,
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        let agreed = negotiate(major, minor, data, &self.limits, || {
            // Who wants no reply could not be given it.
            self.twin = if no_reply {
                None
            } else {
                open_twin(&self.client)
            };
            self.twin.is_some()
        })?;
        if self.twin.is_some() {
            reply.with(Files::Twin);
        }
        self.client.limit(agreed.max_transfer);
        self.max_taken = agreed.max_transfer;
        self.max_fds = agreed.max_fds.min(MAX_FDS);
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

    fn unmap(
        &self,
        argsz: u32,
        flags: u32,
        (address, size): (u64, u64),
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        match (flags, address, size) {
            (0, _, _) => self.dma.unmap(address, size)?,
            (UNMAP_ALL | UNMAP_ALL_OLD, 0, 0) => self.dma.unmap_all(),
            _ => {
                return Err(Refusal::Map(MapError::UnmapFlags {
                    flags,
                    address,
                    size,
                }));
            }
        }
        self.function.dma_changed();
        reply.u32(argsz).u32(flags).u64(address).u64(size);
        Ok(())
    }

    /// Unmaps, and says which of the pages were written since they were reported. Of older revisions of the
    /// specification, as libvfio-user has it.
    fn unmap_dirty(
        &self,
        argsz: u32,
        (address, size): (u64, u64),
        bitmap: UnmapBitmap,
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        if !self.dma.dirty().is_on() {
            return Err(DirtyError::Stopped.into());
        }
        let UnmapBitmap {
            page_size,
            size: have,
        } = bitmap;
        let len = dirty::bitmap_bytes(address, size, page_size)?;
        let want = len as u64;
        if have != want {
            return Err(DirtyError::BitmapSize { have, want }.into());
        }
        let want = UNMAPPED + BITMAP + u32::try_from(len).unwrap_or(u32::MAX / 2);
        if argsz < want {
            return Err(Refusal::Argsz {
                command: command::DMA_UNMAP,
                argsz,
                want,
            });
        }
        // Accesses have ended when this returns, and have left their marks.
        self.dma.unmap(address, size)?;
        self.function.dma_changed();
        reply.u32(argsz).u32(UNMAP_DIRTY).u64(address).u64(size);
        reply.u64(page_size).u64(have);
        let bits = reply.space(len);
        Ok(self.dma.dirty().report(address, size, page_size, bits)?)
    }

    fn feature(
        &mut self,
        argsz: u32,
        flags: u32,
        data: &[u8],
        reply: &mut Reply,
    ) -> Result<(), Refusal> {
        let function = Arc::clone(&self.function);
        let migrate = function.migrate();
        let get = features::HEAD + 8;
        match features::decode(argsz, flags, data, migrate.is_some())? {
            Ask::Probe => {
                reply.u32(argsz).u32(flags).bytes(data);
            }
            Ask::Migration => {
                reply.u32(get).u32(flags).u64(migration::OFFERED);
            }
            Ask::GetState => {
                // There is no file of the state's: -1.
                let state = self.migration.state() as u32;
                reply.u32(get).u32(flags).u32(state).u32(u32::MAX);
            }
            Ask::SetState(state) => {
                let migrate = migrate.ok_or(Refusal::Feature { index: flags })?;
                self.migration.set(migrate, state)?;
                reply.u32(argsz).u32(flags).bytes(data);
            }
            Ask::Start { page_size, ranges } => {
                let spans: Vec<_> = features::ranges(ranges).collect();
                let page = self.dma.start_log(page_size, &spans)?;
                reply.u32(argsz).u32(flags).u64(page);
                reply.bytes(data.get(8..).unwrap_or_default());
            }
            Ask::Stop => {
                self.dma.dirty().stop();
                reply.u32(argsz).u32(flags).bytes(data);
            }
            Ask::Report {
                address,
                length,
                page_size,
            } => {
                let log = self.dma.dirty();
                if !log.is_on() {
                    return Err(DirtyError::Stopped.into());
                }
                let len = dirty::bitmap_bytes(address, length, page_size)?;
                let want = features::HEAD + 24 + u32::try_from(len).unwrap_or(u32::MAX / 2);
                if argsz < want {
                    return Err(Refusal::Argsz {
                        command: command::DEVICE_FEATURE,
                        argsz,
                        want,
                    });
                }
                reply.u32(want).u32(flags);
                reply.u64(address).u64(length).u64(page_size);
                log.report(address, length, page_size, reply.space(len))?;
            }
        }
        Ok(())
    }

    fn read_state(&mut self, argsz: u32, size: u32, reply: &mut Reply) -> Result<(), Refusal> {
        self.check_piece(size.into())?;
        let want = DATA_HEAD + size;
        if argsz < want {
            return Err(Refusal::Argsz {
                command: command::MIG_DATA_READ,
                argsz,
                want,
            });
        }
        let data = self.migration.read(size as usize)?;
        let size = u32::try_from(data.len()).unwrap_or(0);
        reply.u32(DATA_HEAD + size).u32(size).bytes(data);
        Ok(())
    }

    fn check_transfer(&self, count: u64) -> Result<(), Refusal> {
        at_most(count, self.limits.max_transfer)
    }

    /// A piece of a migration's state, which both sides have to take.
    fn check_piece(&self, count: u64) -> Result<(), Refusal> {
        let theirs = usize::try_from(self.max_taken).unwrap_or(usize::MAX);
        at_most(count, self.limits.max_transfer.min(theirs))
    }

    /// The function was reset or detached, and so runs.
    fn end_migration(&mut self) {
        if let Some(migrate) = self.function.migrate() {
            self.migration.reset(migrate);
        }
    }

    /// Takes the client's memory and interrupts from the function, then the function from the client.
    pub fn disconnect(&mut self) {
        self.kicks = None;
        self.dma.disconnect();
        self.twin = None;
        self.irq.disable();
        if std::mem::take(&mut self.attached) {
            self.function.detach();
        }
        // After the detach: what stood still must not go on elsewhere and here.
        self.end_migration();
    }
}

/// A second socket, if the host has one to give; the client is told if not.
fn open_twin(client: &Arc<Client>) -> Option<Twin> {
    Twin::open(client)
        .inspect_err(|error| tracing::warn!("no second socket for a vfio-user client: {error}"))
        .ok()
}

fn at_most(count: u64, max: usize) -> Result<(), Refusal> {
    match count > max as u64 {
        true => Err(Refusal::Transfer { count, max }),
        false => Ok(()),
    }
}

fn unsupported(header: &Header) -> Refusal {
    Refusal::Unsupported(header.command)
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
