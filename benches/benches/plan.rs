//! From a description to every output, by the size of the machine: growth faster than the bytes written is a bug.
//!
//! Throughput is in bytes written; for `parse` and `plan` in those of the description and of the plan's JSON.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use numagpu_topology::linux::{self, BootPath};
use numagpu_topology::qemu::{self, Host};
use numagpu_topology::{Plan, parse, plan, render};

/// CPU nodes, GPUs, and partitions of each: 8, 64, 128 and 1,024 nodes. QEMU takes all but the last.
const MACHINES: [(usize, usize, usize); 4] = [(4, 4, 1), (36, 28, 1), (72, 28, 2), (512, 512, 1)];

/// GPUs in a hive; each is linked with the four behind it.
const HIVE: usize = 16;

/// A description with Generic Initiators on all HBM, and links from every GPU to its CPU node and four others.
fn description(cpus: usize, gpus: usize, partitions: usize) -> String {
    let mut text = "name = \"bench\"\nlimits = { phys_bits = 46 }\n".to_owned();
    for _ in 0..cpus {
        text += "\n[[cpu]]\ncpus = 1\nmemory = \"64MiB\"\n";
    }
    for gpu in 0..gpus {
        let cpu = gpu % cpus;
        text += &format!(
            "\n[[gpu]]\nhbm = \"4GiB\"\npartitions = {partitions}\ncpu = {cpu}\ngeneric_initiator = true\n\
             \n[[link]]\nfrom = \"gpu{gpu}\"\nto = \"cpu{cpu}\"\nbandwidth_mbs = 36000\n"
        );
        let end = gpus.min((gpu / HIVE + 1) * HIVE);
        for peer in (gpu + 1..end).take(4) {
            text += &format!(
                "\n[[link]]\nfrom = \"gpu{gpu}\"\nto = \"gpu{peer}\"\ncount = 4\nbandwidth_mbs = 200000\n"
            );
        }
    }
    text
}

fn command_line(plan: &Plan) -> String {
    let host = Host::placeholders(plan, BootPath::SeaBios, "sockets", "sockets");
    qemu::shell("qemu", &qemu::arguments(plan, &host).unwrap())
}

fn linux_cmdline(plan: &Plan) -> String {
    linux::command_line(BootPath::SeaBios, plan.guest.driver, &plan.hbm_ranges()).join(" ")
}

/// An output by its name.
type Output = (&'static str, fn(&Plan) -> String);

const OUTPUTS: [Output; 5] = [
    ("text", |plan| render::text(plan, BootPath::Ovmf)),
    ("json", |plan| render::json(plan).unwrap()),
    ("e820", render::e820),
    ("linux-cmdline", linux_cmdline),
    ("qemu", command_line),
];

fn machines(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    for (cpus, gpus, partitions) in MACHINES {
        let text = description(cpus, gpus, partitions);
        let machine = parse("bench", &text).unwrap();
        let planned = plan(&machine).unwrap();
        let nodes = planned.nodes.len();
        let bytes = |text: &str| Throughput::Bytes(text.len().try_into().unwrap());
        let json = render::json(&planned).unwrap();

        group.throughput(bytes(&text));
        group.bench_function(BenchmarkId::new("parse", nodes), |b| {
            b.iter(|| parse("bench", black_box(&text)).unwrap());
        });
        group.throughput(bytes(&json));
        group.bench_function(BenchmarkId::new("plan", nodes), |b| {
            b.iter(|| plan(black_box(&machine)).unwrap());
        });
        let qemu_takes = |(name, _): &&Output| *name != "qemu" || nodes <= 128;
        let outputs: Vec<&Output> = OUTPUTS.iter().filter(qemu_takes).collect();
        let mut all = String::new();
        for (name, output) in &outputs {
            let written = output(&planned);
            group.throughput(bytes(&written));
            group.bench_function(BenchmarkId::new(*name, nodes), |b| {
                b.iter(|| output(black_box(&planned)));
            });
            all += &written;
        }
        group.throughput(bytes(&all));
        group.bench_function(BenchmarkId::new("all", nodes), |b| {
            b.iter(|| {
                let planned = plan(&parse("bench", black_box(&text)).unwrap()).unwrap();
                outputs
                    .iter()
                    .map(|(_, output)| output(&planned).len())
                    .sum::<usize>()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, machines);
criterion_main!(benches);
