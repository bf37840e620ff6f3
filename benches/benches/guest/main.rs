//! What a guest sees of its GPUs' cost, under QEMU: time to boot, and time of an access to a register.
//!
//! Guests run one after the other, those that are compared in turns. Medians and ratios are printed; a word after `--`
//! selects: `boot`, `registers`.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

mod machine;

use machine::{Guest, With, planned};
use numagpu_benches::figures::{is_asked_for, is_bench, quantile, ratio, thousandths};
use numagpu_benches::line::Line;
use numagpu_benches::place::{self, Place};
use numagpu_topology::preset;

/// Boots of each machine.
const BOOTS: usize = 5;

/// Guests whose accesses are timed in each place.
const GUESTS: usize = 3;

/// A GPU to which QEMU posts writes, and one with a region that is mapped, to which it posts none.
const TWO_KINDS: &str = r#"
name = "two-kinds"

[[cpu]]
cpus = 1
memory = "1GiB"

[[gpu]]
id = "spm"
hbm = "4GiB"
cpu = 0

[[gpu]]
id = "bar"
hbm = "4GiB"
cpu = 0
exposure = "bar"
"#;

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    text.split(' ').take(1).collect()
}

/// A machine of 8 GPUs, and the same with its memory but without GPUs, from QEMU's start to the guest's first program.
fn boot() {
    let preset = preset::find("frontier-node").unwrap();
    let plan = planned(preset.name, preset.source);
    let mut machines = [With::Gpus, With::MemoryOnly].map(|with| (with, [Vec::new(), Vec::new()]));
    for round in 0..BOOTS {
        let [gpus, without] = &mut machines;
        let turn = match round % 2 {
            0 => [gpus, without],
            // What changes in the course of a run meets both.
            _ => [without, gpus],
        };
        for (with, times) in turn {
            let took = Guest::start(&plan, *with, Place::anywhere(), "").up();
            let [wall, cpu] = took.map(|ns| thousandths(ns / 1_000_000));
            println!(
                "boot, {with:?}: {wall} s, CPU time {cpu} s; load {}",
                load()
            );
            times.iter_mut().zip(took).for_each(|(to, it)| to.push(it));
        }
    }
    let [gpus, without] =
        machines.map(|(_, times)| times.map(|mut times| quantile(&mut times, 500)));
    for ((what, gpus), without) in ["time", "CPU time"].iter().zip(gpus).zip(without) {
        let times = ratio(gpus, without);
        let [gpus, without] = [gpus, without].map(|ns| thousandths(ns / 1_000_000));
        println!("boot, {what}: with 8 GPUs {gpus} s, without {without} s, {times}");
    }
}

/// Accesses to registers by a driver in the guest. The floor is a bare socket between threads of the host, before each guest.
fn registers(place: Place) {
    let plan = planned("two-kinds.toml", TWO_KINDS);
    let (mut reads, mut posted) = (Vec::new(), Vec::new());
    let mut seen = vec![[const { Vec::new() }; 3]; plan.gpus.len()];
    for _ in 0..GUESTS {
        let mut line = place.serve(Line::bare);
        for block in 0..11 {
            let (block_reads, burst) = line.block();
            if block > 0 {
                reads.extend(block_reads);
                posted.push(burst);
            }
        }
        drop(line);
        let report = Guest::start(&plan, With::Gpus, place, "numagpu.times").report();
        assert_eq!(report.problems, Vec::<String>::new());
        for (gpu, seen) in report.gpus.iter().zip(&mut seen) {
            let times = gpu.access_times.clone().unwrap();
            let times = [times.read_ns, times.write_ns, times.done_ns];
            seen.iter_mut()
                .zip(times)
                .for_each(|(to, it)| to.extend(it));
        }
    }
    let [read, write] = [reads, posted].map(|mut floor| quantile(&mut floor, 500));
    for (gpu, seen) in plan.gpus.iter().zip(&mut seen) {
        let kinds = [
            ("read", read),
            ("write", write),
            ("write and its end", write),
        ];
        for ((what, floor), samples) in kinds.into_iter().zip(seen) {
            let own = quantile(samples, 500);
            println!(
                "{}, {} GPU, guest's {what}: {own} ns, floor {floor} ns, {}",
                place.name,
                gpu.id,
                ratio(own, floor)
            );
        }
    }
}

fn main() {
    if !is_bench() {
        return;
    }
    if is_asked_for("boot") {
        boot();
    }
    if is_asked_for("registers") {
        let places = Place::all();
        place::scoped(|| places.into_iter().for_each(registers));
        registers(Place::anywhere());
    }
}
