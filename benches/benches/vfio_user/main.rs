//! vfio-user: our server beside the floor, bare UNIX sockets that carry messages of the same sizes, and beside the server
//! of the `vfio_user` crate.
//!
//! Before Criterion's own runs, all are measured in alternating blocks, so that whatever else the machine does
//! meets all of them, with the threads on one core and on two, and their ratios are printed; those are the figures to
//! quote.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

mod asked;

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use numagpu_benches::figures::{nanos, quantile, ratio};
use numagpu_benches::line::{BURST, Line, Served};
use numagpu_benches::place::{self, Place};
use numagpu_vmm_glue::vfio_user::Polling;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

/// Blocks of each; the first warms up.
const BLOCKS: usize = 41;

/// Maps of one round, and how many are asked for before the first is waited for.
const MAPS: u64 = 1000;
const IN_FLIGHT: u64 = 32;

/// One of those that are compared.
struct Run {
    name: &'static str,
    line: fn() -> Line,
    reads: Vec<u64>,
    bursts: Vec<u64>,
}

impl Run {
    fn new(name: &'static str, line: fn() -> Line) -> Run {
        Run {
            name,
            line,
            reads: Vec::new(),
            bursts: Vec::new(),
        }
    }
}

/// All in alternating blocks; `floor` is what they are held against. Servers live for a block only: one that polls
/// would take the core from the others.
fn interleaved(place: Place, mut floor: Run, mut runs: Vec<Run>) {
    for block in 0..BLOCKS {
        for run in std::iter::once(&mut floor).chain(&mut runs) {
            let mut line = place.serve(run.line);
            let (reads, burst) = line.block();
            if block > 0 {
                run.reads.extend(reads);
                run.bursts.push(burst);
            }
        }
    }
    let place = place.name;
    for (what, per_mille) in [("read round trip p50", 500), ("read round trip p99", 990)] {
        let least = quantile(&mut floor.reads, per_mille);
        for run in &mut runs {
            let own = quantile(&mut run.reads, per_mille);
            let times = ratio(own, least);
            println!(
                "{place}, {what}, {}: {own} ns, floor {least} ns, {times}",
                run.name
            );
        }
    }
    let least = quantile(&mut floor.bursts, 500);
    for run in &mut runs {
        let own = quantile(&mut run.bursts, 500);
        let times = ratio(own, least);
        println!(
            "{place}, posted write p50, {}: {own} ns, floor {least} ns, {times}",
            run.name
        );
    }
}

fn ram() -> OwnedFd {
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ram, MAPS * 4096).unwrap();
    ram
}

/// Maps and unmaps of one page each of one file, as of a guest with an IOMMU: ours and the crate's in turns, and the
/// floor, a socket over which a descriptor goes with each request.
fn maps(place: Place) {
    let ram = ram();
    let mut lines = place.serve(|| {
        [
            ("floor", Line::bare_maps()),
            ("ours", Line::to(Served::ours(Polling::Off))),
            ("vfio_user crate", Line::to(Served::peer())),
        ]
    });
    let place = place.name;
    let mut times = [const { [const { Vec::new() }; 3] }; 3];
    let page = |index: u64| 0x1_0000_0000 + index * 4096;
    // Each page once, in no order.
    let offset = |index: u64| index * 7 % MAPS * 4096;
    for _ in 0..11 {
        for ((_, line), [single, many, unmaps]) in lines.iter_mut().zip(&mut times) {
            single.push(nanos(|| {
                (0..MAPS).for_each(|index| {
                    line.ask_map(ram.as_fd(), offset(index), page(index));
                    line.mapped();
                });
            }));
            unmaps.push(nanos(|| {
                (0..MAPS).for_each(|index| line.unmap(page(index)))
            }));
            many.push(nanos(|| {
                (0..MAPS).for_each(|index| {
                    line.ask_map(ram.as_fd(), offset(index), page(index));
                    if index >= IN_FLIGHT {
                        line.mapped();
                    }
                });
                (0..IN_FLIGHT).for_each(|_| line.mapped());
            }));
            (0..MAPS).for_each(|index| line.unmap(page(index)));
        }
    }
    let [floor, own @ ..] = &mut times;
    for ((name, _), own) in lines.iter().skip(1).zip(own) {
        let kinds = [
            "maps, one at a time",
            "maps, 32 in flight",
            "unmaps, one at a time",
        ];
        for ((what, own), floor) in kinds.iter().zip(own).zip(&mut *floor) {
            let (own, floor) = (quantile(own, 500), quantile(floor, 500));
            let times = ratio(own, floor);
            let [us, least] = [own, floor].map(|it| it / 1000);
            println!("{place}, {MAPS} {what}, {name}: {us} us, floor {least} us, {times}");
        }
    }
}

/// From `connect` to the reply to `VERSION`, ours and the crate's in turns.
fn connects(place: Place) {
    let servers = place.serve(|| {
        [
            ("ours", Served::ours(Polling::Off)),
            ("vfio_user crate", Served::peer()),
        ]
    });
    let place = place.name;
    let mut times = [const { Vec::new() }; 2];
    for _ in 0..200 {
        for ((_, served), times) in servers.iter().zip(&mut times) {
            let since = Instant::now();
            let stream = served.connect();
            times.push(u64::try_from(since.elapsed().as_nanos()).unwrap());
            drop(stream);
            // The server clears away what this client left.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
    for ((name, _), times) in servers.iter().zip(&mut times) {
        let us = quantile(times, 500) / 1000;
        println!("{place}, connect and VERSION p50, {name}: {us} us");
    }
}

/// KiB of this process that are in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap()
}

/// What a connected server without a device keeps in memory.
fn memory() {
    const SERVERS: u64 = 32;
    let before = resident();
    let lines: Vec<_> = (0..SERVERS)
        .map(|_| {
            let mut line = Line::to(Served::ours(Polling::Off));
            line.round_trip();
            line
        })
        .collect();
    let each = resident().saturating_sub(before) / SERVERS;
    println!("resident memory of a connected server: {each} KiB");
    drop(lines);
}

/// All comparisons in one place.
fn compare(place: Place) {
    let mut runs = vec![
        Run::new("ours", || Line::to(Served::ours(Polling::Off))),
        Run::new("vfio_user crate", || Line::to(Served::peer())),
    ];
    // On the client's own core a server that polls would only keep it from running.
    if place.is_parallel() {
        runs.push(Run::new("ours, polling auto", || {
            Line::to(Served::ours(Polling::Auto))
        }));
        runs.push(Run::new("ours, polling always", || {
            Line::to(Served::ours(Polling::Always))
        }));
    }
    interleaved(place, Run::new("floor", Line::bare), runs);
    maps(place);
    connects(place);
    asked::compare(place);
}

fn register_access(criterion: &mut Criterion) {
    memory();
    place::scoped(|| Place::all().into_iter().for_each(compare));

    let (mut ours, mut floor) = (Line::to(Served::ours(Polling::Off)), Line::bare());
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

fn memory_maps(criterion: &mut Criterion) {
    let mut line = Line::to(Served::ours(Polling::Off));
    let ram = ram();
    let mut address = 0;
    // As in a guest, one of many.
    line.ask_map(ram.as_fd(), 0, address);
    line.mapped();
    criterion.bench_function("dma_map_and_unmap/one_at_a_time", |it| {
        it.iter(|| {
            address += 4096;
            line.ask_map(ram.as_fd(), 4096, address);
            line.mapped();
            line.unmap(address);
        });
    });
}

criterion_group!(benches, register_access, memory_maps);
criterion_main!(benches);
