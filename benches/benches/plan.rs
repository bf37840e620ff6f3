//! From a description to every output, by the size of the machine: growth faster than the bytes written is a bug.
//!
//! `tables` is what a VMM waits for: description in, ACPI tables and memory maps in all forms out. All else is measured by
//! itself. Throughput is in bytes written; for `parse` and `plan` in those of the description and of the plan's JSON.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use numagpu_topology::linux::{self, BootPath};
use numagpu_topology::qemu::{self, Host};
use numagpu_topology::{Plan, acpi, memory_map, parse, plan, render};

/// CPU nodes, GPUs, and partitions of each: 8, 64, 512 and 1,024 nodes. QEMU takes the first two.
const MACHINES: [(usize, usize, usize); 4] = [(4, 4, 1), (36, 28, 1), (256, 256, 1), (512, 512, 1)];

/// Most nodes and GPUs that QEMU takes.
const QEMU_MAX: (usize, usize) = (128, 28);
/// Larger machines have pictures of more than 50 MB, which take seconds.
const PICTURE_MAX_NODES: usize = 128;

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

fn acpi_bytes(plan: &Plan) -> usize {
    let tables = acpi::tables(plan);
    tables
        .iter()
        .map(|table| black_box(&table.bytes).len())
        .sum()
}

/// The memory map as text and in all forms for guests.
fn map_bytes(plan: &Plan) -> usize {
    let params = memory_map::boot_params(plan);
    let maps = [
        params.table,
        params.overflow,
        memory_map::pvh_memory_map(plan),
        memory_map::efi_memory_map(plan),
        memory_map::fw_cfg_e820(plan),
        render::e820(plan).into_bytes(),
    ];
    maps.iter().map(|map| black_box(map).len()).sum()
}

/// From a description to all tables: bytes written.
fn tables(text: &str) -> usize {
    let plan = plan(&parse("bench", text).unwrap()).unwrap();
    acpi_bytes(&plan) + map_bytes(&plan)
}

fn length(text: String) -> usize {
    black_box(text).len()
}

/// An output by its name: what it writes, in bytes.
type Output = (&'static str, fn(&Plan) -> usize);

const OUTPUTS: [Output; 9] = [
    ("acpi", acpi_bytes),
    ("maps", map_bytes),
    ("json", |plan| length(render::json(plan).unwrap())),
    ("text", |plan| length(render::text(plan, BootPath::Ovmf))),
    ("dot", |plan| length(render::dot(plan))),
    ("hwloc", |plan| length(render::hwloc(plan))),
    ("linux-cmdline", |plan| length(linux_cmdline(plan))),
    ("svg", |plan| length(render::svg(plan))),
    ("qemu", |plan| length(command_line(plan))),
];

/// Whether a machine has an output, and one that can be waited for.
fn has_output(plan: &Plan, name: &str) -> bool {
    let (nodes, gpus) = (plan.nodes.len(), plan.gpus.len());
    match name {
        "qemu" => nodes <= QEMU_MAX.0 && gpus <= QEMU_MAX.1,
        "svg" => nodes <= PICTURE_MAX_NODES,
        _ => true,
    }
}

fn machines(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    for (cpus, gpus, partitions) in MACHINES {
        let text = description(cpus, gpus, partitions);
        let machine = parse("bench", &text).unwrap();
        let planned = plan(&machine).unwrap();
        let nodes = planned.nodes.len();
        let bytes = |count: usize| Throughput::Bytes(count.try_into().unwrap());

        group.throughput(bytes(tables(&text)));
        group.bench_function(BenchmarkId::new("tables", nodes), |b| {
            b.iter(|| tables(black_box(&text)));
        });
        group.throughput(bytes(text.len()));
        group.bench_function(BenchmarkId::new("parse", nodes), |b| {
            b.iter(|| parse("bench", black_box(&text)).unwrap());
        });
        group.throughput(bytes(render::json(&planned).unwrap().len()));
        group.bench_function(BenchmarkId::new("plan", nodes), |b| {
            b.iter(|| plan(black_box(&machine)).unwrap());
        });
        for (name, output) in OUTPUTS {
            if !has_output(&planned, name) {
                continue;
            }
            group.throughput(bytes(output(&planned)));
            group.bench_function(BenchmarkId::new(name, nodes), |b| {
                b.iter(|| output(black_box(&planned)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, machines);
criterion_main!(benches);
