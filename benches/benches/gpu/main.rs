//! The GPU in process, through the seam that a transport uses, against floors of bare memory and threads.
//!
//! Guest memory and HBM are what `numagpu` serves: memory files, reached through the vfio-user server's table of maps.
//! Before Criterion's own runs, each figure and its floor are measured in alternating blocks, so that whatever else
//! the machine does meets both, and medians and ratios are printed; those are the figures to quote. The floor of a copy
//! is one memmove of the same bytes between other mappings of the same pages.
//!
//! A word after `--` selects: `registers`, `latency`, `copies`, `packets`, `scaling`.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

mod machine;

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use numagpu_benches::figures::{alternating, is_asked_for, nanos, quantile, ratio, thousandths};
use numagpu_devices::bus::PciFunction;
use numagpu_devices::registers::address;
use numagpu_devices::spec::regs::{identity, partition, queue};
use numagpu_devices::spec::{pci, sdma};

use machine::{Driver, HBM, HBM_FROM, HBM_STRIDE, HBM_TO, MIB, WINDOW, Way, machine};

fn registers(criterion: &mut Criterion) {
    if !is_asked_for("registers") {
        return;
    }
    const ACCESSES: u64 = 100_000;
    let drivers = machine(1);
    let driver = drivers.first().unwrap();
    let gpu: &dyn PciFunction = &*driver.gpu;
    let at = |block, reg| u64::from(address(block, 0, reg).unwrap());
    let magic = at(&identity::BLOCK, &identity::MAGIC);
    let status = at(&queue::BLOCK, &queue::STATUS);
    let token = at(&partition::BLOCK, &partition::NEW_TOKEN);
    let read = |offset| {
        let mut data = [0; 4];
        gpu.bar_read(black_box(pci::BAR_REGISTERS), black_box(offset), &mut data);
        black_box(data);
    };
    let write = || gpu.bar_write(black_box(pci::BAR_REGISTERS), black_box(token), &[0; 8]);
    let cell = AtomicU64::new(0);
    let floor = || {
        nanos(|| {
            for n in 0..ACCESSES {
                black_box(&cell).store(black_box(n), Ordering::SeqCst);
            }
        })
    };
    let ours: [(&str, &dyn Fn()); 3] = [
        ("read of a constant", &|| read(magic)),
        ("read of a queue's state", &|| read(status)),
        ("write of 8 bytes", &write),
    ];
    for (what, access) in ours {
        let [ours, floor] =
            alternating(21, || nanos(|| (0..ACCESSES).for_each(|_| access())), floor);
        println!(
            "register {what}: {} ns; a sequentially consistent store is {} ns",
            thousandths(ours * 1000 / ACCESSES),
            thousandths(floor * 1000 / ACCESSES)
        );
    }
    let mut group = criterion.benchmark_group("registers");
    for (what, access) in ours {
        group.bench_function(what, |it| it.iter(access));
    }
    group.finish();
}

/// From the doorbell of a 64-byte copy and a fence until the fence's value is seen.
fn doorbell_to_fence(driver: &mut Driver) -> u64 {
    let (from, to) = driver.windows(Way::RamToHbm);
    driver.put(&sdma::copy_linear(from, to, 64));
    let value = driver.put_fence();
    let time = nanos(|| {
        driver.ring();
        while driver.fence_value() != value {
            spin_loop();
        }
    });
    while driver.read32(&queue::BLOCK, &queue::STATUS) != 1 {
        spin_loop();
    }
    time
}

fn latency(criterion: &mut Criterion) {
    if !is_asked_for("latency") {
        return;
    }
    let mut drivers = machine(1);
    let driver = drivers.first_mut().unwrap();
    let line = Arc::new([const { AtomicU64::new(0) }; 2]);
    // A thread that does nothing but answer.
    let (go, come) = crossbeam::channel::bounded::<()>(1);
    let other = Arc::clone(&line);
    std::thread::spawn(move || {
        let [asked, answered] = &*other;
        loop {
            let last = answered.load(Ordering::Relaxed);
            match asked.load(Ordering::Acquire) {
                0 => {
                    if come.recv().is_err() {
                        return;
                    }
                }
                now if now != last => answered.store(now, Ordering::Release),
                _ => spin_loop(),
            }
        }
    });
    let [asked, answered] = &*line;
    let mut value = 0;
    let mut ask = |wake: bool| {
        value += 1;
        nanos(|| {
            asked.store(value, Ordering::Release);
            if wake {
                go.try_send(()).unwrap();
            }
            while answered.load(Ordering::Acquire) != value {
                spin_loop();
            }
        })
    };
    for (what, gap, count) in [
        ("at once", None, 4001),
        ("after 20 us", Some(Duration::from_micros(20)), 1001),
        ("after 5 ms asleep", Some(Duration::from_millis(5)), 101),
    ] {
        let pause = || {
            if let Some(gap) = gap {
                if gap > Duration::from_millis(1) {
                    std::thread::sleep(gap);
                } else {
                    let since = Instant::now();
                    while since.elapsed() < gap {
                        spin_loop();
                    }
                }
            }
        };
        let sleeps = gap.is_some_and(|gap| gap > Duration::from_millis(1));
        let mut samples = [Vec::new(), Vec::new()];
        for _ in 0..3 {
            for _ in 0..count / 3 {
                pause();
                samples[0].push(doorbell_to_fence(driver));
            }
            if !sleeps {
                ask(true);
            }
            for _ in 0..count / 3 {
                if sleeps {
                    // It goes to its channel, and sleeps there.
                    asked.store(0, Ordering::Release);
                }
                pause();
                samples[1].push(ask(sleeps));
            }
            asked.store(0, Ordering::Release);
        }
        let [mut ours, mut floor] = samples;
        for per_mille in [100, 500, 990] {
            let (ours, floor) = (
                quantile(&mut ours, per_mille),
                quantile(&mut floor, per_mille),
            );
            println!(
                "doorbell to fence {what}, p{}: {ours} ns; a bare thread answers in {floor} ns",
                per_mille / 10
            );
        }
    }
    criterion.bench_function("latency/doorbell_to_fence", |it| {
        it.iter_custom(|count| {
            let times = (0..count).map(|_| doorbell_to_fence(driver));
            Duration::from_nanos(times.sum())
        });
    });
}

/// Pieces of `size` bytes of a window, `bytes` in all, as offsets.
fn pieces(size: u64, bytes: u64, window: u64) -> impl Iterator<Item = u64> {
    (0..bytes / size).map(move |n| n * size % window)
}

/// Appends the copies of `size` bytes at `offset` in both windows.
fn put_copy(driver: &mut Driver, way: Way, offset: u64, size: u64) {
    let (from, to) = driver.windows(way);
    let mut done = 0;
    while done < size {
        let part = sdma::MAX_COPY.min(size - done);
        let at = offset + done;
        driver.put(&sdma::copy_linear(from + at, to + at, part));
        done += part;
    }
}

fn copies(criterion: &mut Criterion) {
    if !is_asked_for("copies") {
        return;
    }
    let mut drivers = machine(1);
    let driver = drivers.first_mut().unwrap();
    let memory = Arc::clone(&driver.memory);
    let mut group = criterion.benchmark_group("copies");
    group.sample_size(10);
    for way in [Way::RamToHbm, Way::HbmToHbm, Way::RamToRam] {
        for size in [
            4 << 10,
            16 << 10,
            64 << 10,
            256 << 10,
            MIB,
            4 * MIB,
            16 * MIB,
            64 * MIB,
        ] {
            // As many as fit the ring, and a window that a small copy walks through.
            let bytes = (size * 1024).clamp(size, 64 * MIB);
            let (from, to) = driver.windows(way);
            let mut ours = || {
                for at in pieces(size, bytes, WINDOW) {
                    put_copy(driver, way, at, size);
                }
                nanos(|| driver.run())
            };
            let floor = || {
                nanos(|| {
                    for at in pieces(size, bytes, WINDOW) {
                        memory.copy(from + at, to + at, size);
                    }
                })
            };
            let [mine, bare] = alternating(15, &mut ours, floor);
            println!(
                "copy {way:?} {:>6} KiB: {} GB/s, memmove {} GB/s, {}",
                size >> 10,
                thousandths(bytes * 1000 / mine),
                thousandths(bytes * 1000 / bare),
                ratio(bare, mine)
            );
            group.throughput(Throughput::Bytes(bytes));
            group.bench_function(format!("{way:?}/{size}"), |it| {
                it.iter_custom(|count| Duration::from_nanos((0..count).map(|_| ours()).sum()));
            });
        }
    }
    group.finish();
}

fn packets(criterion: &mut Criterion) {
    if !is_asked_for("packets") {
        return;
    }
    const PACKETS: u64 = 8192;
    let mut drivers = machine(1);
    let driver = drivers.first_mut().unwrap();
    let memory = Arc::clone(&driver.memory);
    let mut group = criterion.benchmark_group("packets");
    group.throughput(Throughput::Elements(PACKETS));
    let mut nops = || {
        for _ in 0..PACKETS {
            driver.put(&[sdma::OP_NOP.into()]);
        }
        nanos(|| driver.run())
    };
    let mut times: Vec<_> = (0..21).map(|_| nops()).collect();
    let time = quantile(&mut times, 500);
    println!(
        "packets NOP: {} million/s",
        thousandths(PACKETS * 1_000_000 / time)
    );
    group.bench_function("NOP", |it| {
        it.iter_custom(|count| Duration::from_nanos((0..count).map(|_| nops()).sum()));
    });
    for way in [Way::RamToHbm, Way::HbmToHbm, Way::RamToRam] {
        // Buffers that the caches hold, so that packets are what is measured.
        const SIZE: u64 = 4096;
        let (from, to) = driver.windows(way);
        let mut ours = || {
            for _ in 0..PACKETS {
                driver.put(&sdma::copy_linear(from, to, SIZE));
            }
            nanos(|| driver.run())
        };
        let floor = || nanos(|| (0..PACKETS).for_each(|_| memory.copy(from, to, SIZE)));
        let [mine, bare] = alternating(21, &mut ours, floor);
        println!(
            "packets {way:?} of 4 KiB in cache: {} million/s, memmove {} million/s, {} ns a packet above it",
            thousandths(PACKETS * 1_000_000 / mine),
            thousandths(PACKETS * 1_000_000 / bare),
            mine.saturating_sub(bare) / PACKETS
        );
        group.bench_function(format!("{way:?}"), |it| {
            it.iter_custom(|count| Duration::from_nanos((0..count).map(|_| ours()).sum()));
        });
    }
    group.finish();
}

fn scaling(_: &mut Criterion) {
    if !is_asked_for("scaling") {
        return;
    }
    const SIZE: u64 = 4 * MIB;
    for count in [1, 2, 4, 8] {
        let mut drivers = machine(count);
        let memory = Arc::clone(&drivers.first().unwrap().memory);
        let mut ours = || {
            for driver in &mut drivers {
                for at in pieces(SIZE, WINDOW, WINDOW) {
                    put_copy(driver, Way::HbmToHbm, at, SIZE);
                }
                driver.put(&sdma::trap(0));
                driver.rung += 1;
            }
            nanos(|| {
                drivers.iter().for_each(Driver::ring);
                for driver in &drivers {
                    driver.bell.wait(driver.rung);
                }
            })
        };
        let floor = || {
            let start = Barrier::new(count as usize + 1);
            std::thread::scope(|scope| {
                let threads: Vec<_> = (0..u64::from(count))
                    .map(|gpu| {
                        let (start, memory) = (&start, &memory);
                        scope.spawn(move || {
                            let hbm = HBM + HBM_STRIDE * gpu;
                            start.wait();
                            for at in pieces(SIZE, WINDOW, WINDOW) {
                                memory.copy(hbm + HBM_FROM + at, hbm + HBM_TO + at, SIZE);
                            }
                        })
                    })
                    .collect();
                start.wait();
                nanos(|| {
                    threads
                        .into_iter()
                        .for_each(|thread| thread.join().unwrap())
                })
            })
        };
        let [mine, bare] = alternating(11, &mut ours, floor);
        let bytes = WINDOW * u64::from(count);
        println!(
            "scaling {count} GPU(s), HBM to HBM in 4 MiB: {} GB/s, as many threads of memmove {} GB/s, {}",
            thousandths(bytes * 1000 / mine),
            thousandths(bytes * 1000 / bare),
            ratio(bare, mine)
        );
    }
}

criterion_group!(benches, registers, latency, copies, packets, scaling);
criterion_main!(benches);
