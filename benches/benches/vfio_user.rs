//! Register accesses over vfio-user against the floor: bare UNIX sockets that carry messages of the same sizes.
//!
//! Before Criterion's own runs, both are measured in alternating blocks, so that whatever else the machine does
//! meets both, and their ratios are printed; those are the figures to quote.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use numagpu_devices::bus::{Attachment, Bar, FunctionLayout, PciFunction, ResetKind};
use numagpu_vmm_glue::vfio_user::Server;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Bytes of a read request and of its reply with 4 bytes of data; a 4-byte write is as long as the latter.
const REQUEST: usize = 32;
const REPLY: usize = 36;

/// Posted writes in a burst; a read ends it.
const BURST: u32 = 10_000;

/// One register.
struct Register(FunctionLayout, AtomicU32);

impl PciFunction for Register {
    fn layout(&self) -> &FunctionLayout {
        &self.0
    }
    fn attach(&self, _: Attachment) {}
    fn detach(&self) {}
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

fn message(command: u16, flags: u32, body: &[&[u8]]) -> Vec<u8> {
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

/// A client and what answers it.
struct Line {
    stream: UnixStream,
    read: Vec<u8>,
    posted: Vec<u8>,
    _server: Option<(Server, tempfile::TempDir)>,
}

impl Line {
    /// To a server of the project's.
    fn vfio_user() -> Self {
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
        let function = Arc::new(Register(layout, AtomicU32::new(0)));
        let server = Server::bind(dir.path().join("gpu"), function).unwrap();
        let mut line = Self::over(UnixStream::connect(server.path()).unwrap());
        line.stream
            .write_all(&message(1, 0, &[&[0, 0, 0, 0]]))
            .unwrap();
        line.stream.read_exact(&mut [0; 20]).unwrap();
        line._server = Some((server, dir));
        line
    }

    /// To a thread that receives and sends, and looks at nothing but lengths.
    fn bare() -> Self {
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
        Self::over(client)
    }

    fn over(stream: UnixStream) -> Self {
        let place = [0; 12];
        let count = 4_u32.to_ne_bytes();
        Self {
            stream,
            read: message(9, 0, &[&place, &count]),
            posted: message(10, 0x10, &[&place, &count, &[1; 4]]),
            _server: None,
        }
    }

    /// One register read, waited for.
    fn round_trip(&mut self) {
        self.stream.write_all(&self.read).unwrap();
        self.stream.read_exact(&mut [0; REPLY]).unwrap();
    }

    /// A burst of posted writes, and a read that comes back when all are done.
    fn burst(&mut self) {
        for _ in 0..BURST {
            self.stream.write_all(&self.posted).unwrap();
        }
        self.round_trip();
    }
}

/// The quantile of sorted samples.
fn quantile(samples: &[u64], per_mille: usize) -> u64 {
    let at = samples.len().saturating_sub(1) * per_mille / 1000;
    samples.get(at).copied().unwrap_or(0)
}

fn nanos(mut work: impl FnMut()) -> u64 {
    let since = Instant::now();
    work();
    u64::try_from(since.elapsed().as_nanos()).unwrap()
}

/// Per mille of two figures.
fn ratio(ours: u64, floor: u64) -> String {
    let mille = ours * 1000 / floor.max(1);
    format!("{}.{:03} x", mille / 1000, mille % 1000)
}

/// Both lines in alternating blocks.
fn interleaved(ours: &mut Line, floor: &mut Line) {
    let (mut reads, mut bursts) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for block in 0..41 {
        for (n, line) in [&mut *ours, &mut *floor].into_iter().enumerate() {
            let samples: Vec<_> = (0..500).map(|_| nanos(|| line.round_trip())).collect();
            let burst = nanos(|| line.burst()) / u64::from(BURST);
            // The first block warms up.
            if let (1.., Some(reads), Some(bursts)) = (block, reads.get_mut(n), bursts.get_mut(n)) {
                reads.extend(samples);
                bursts.push(burst);
            }
        }
    }
    let all = reads.iter_mut().chain(&mut bursts);
    all.for_each(|samples| samples.sort_unstable());
    for (what, [ours, floor], per_mille) in [
        ("read round trip p50", &reads, 500),
        ("read round trip p99", &reads, 990),
        ("posted write p50", &bursts, 500),
    ] {
        let (ours, floor) = (quantile(ours, per_mille), quantile(floor, per_mille));
        println!(
            "{what}: {ours} ns, floor {floor} ns, {}",
            ratio(ours, floor)
        );
    }
}

/// Maps and unmaps a page, each waited for.
fn map_and_unmap(line: &mut Line, ram: BorrowedFd<'_>, address: u64) {
    let [zero, address, size] = [0, address, 4096_u64].map(u64::to_ne_bytes);
    let head = [32_u32, 3].map(u32::to_ne_bytes).concat();
    let map = message(2, 0, &[&head, &zero, &address, &size]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [ram];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let parts = [IoSlice::new(&map)];
    sendmsg(&line.stream, &parts, &mut control, SendFlags::empty()).unwrap();
    line.stream.read_exact(&mut [0; 16]).unwrap();
    let head = [24_u32, 0].map(u32::to_ne_bytes).concat();
    let unmap = message(3, 0, &[&head, &address, &size]);
    line.stream.write_all(&unmap).unwrap();
    line.stream.read_exact(&mut [0; 40]).unwrap();
}

fn memory_maps(criterion: &mut Criterion) {
    let mut line = Line::vfio_user();
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ram, 4096).unwrap();
    let mut address = 0;
    criterion.bench_function("dma_map_and_unmap/one_at_a_time", |it| {
        it.iter(|| {
            address += 4096;
            map_and_unmap(&mut line, ram.as_fd(), address);
        });
    });
}

fn register_access(criterion: &mut Criterion) {
    let (mut ours, mut floor) = (Line::vfio_user(), Line::bare());
    interleaved(&mut ours, &mut floor);

    let mut reads = criterion.benchmark_group("register_read");
    reads.bench_function("vfio_user", |it| it.iter(|| ours.round_trip()));
    reads.bench_function("floor", |it| it.iter(|| floor.round_trip()));
    reads.finish();

    let mut writes = criterion.benchmark_group("posted_writes");
    writes.throughput(Throughput::Elements(BURST.into()));
    writes.sample_size(20);
    writes.bench_function("vfio_user", |it| it.iter(|| ours.burst()));
    writes.bench_function("floor", |it| it.iter(|| floor.burst()));
    writes.finish();
}

criterion_group!(benches, register_access, memory_maps);
criterion_main!(benches);
