//! What the real QEMU writes into `etc/e820` and its ACPI tables is what the plan predicts and what our own tables say.
//! No guest runs: a machine is put together and looked into.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;

use numagpu_tests::corner::Corner;
use numagpu_tests::numbers::Numbers;
use numagpu_tests::programs::assets;
use numagpu_tests::qtest::Qtest;
use numagpu_tests::tables::{self, Affinity, Hmat};
use numagpu_topology::machine::Exposure;
use numagpu_topology::ranges::Range;
use numagpu_topology::size::{GIB, MIB};
use numagpu_topology::{Plan, acpi, linux, memory_map, parse, plan, platform, preset, qemu};
use numagpu_vmm_glue::instance::Instance;

/// What a QEMU with the plan's machine hands to firmware.
struct Handed {
    e820: Vec<u8>,
    tables: Vec<u8>,
}

fn handed(plan: &Plan) -> Handed {
    let corner = Corner::new();
    let instance = Instance::start(plan, &corner.file(""), None, None).unwrap();
    let mut qemu = Qtest::start(&assets().qemu.path, plan, &instance, &corner.file(""));
    let handed = Handed {
        e820: qemu.file("etc/e820"),
        tables: qemu.file("etc/acpi/tables"),
    };
    drop(qemu);
    drop(instance);
    corner.assert_empty();
    handed
}

/// Our own table of that signature.
fn ours(plan: &Plan, signature: &str) -> Option<Vec<u8>> {
    let mut tables = acpi::tables(plan).into_iter();
    let table = tables.find(|table| table.signature == signature);
    table.map(|table| table.bytes)
}

fn check_e820(plan: &Plan, handed: &Handed) {
    let entries = |bytes: &[u8]| -> Vec<(Range, u32)> {
        assert_eq!(bytes.len() % memory_map::ENTRY_BYTES, 0);
        let field =
            |entry: &[u8], at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        let entry = |entry: &[u8]| {
            let range = Range {
                base: field(entry, 0),
                size: field(entry, 8),
            };
            (range, u32::from_le_bytes(entry[16..20].try_into().unwrap()))
        };
        bytes.chunks(memory_map::ENTRY_BYTES).map(entry).collect()
    };
    assert_eq!(
        entries(&handed.e820),
        entries(&memory_map::fw_cfg_e820(plan))
    );
}

/// RAM as QEMU's SRAT has it: without the legacy video and BIOS area.
fn ram(plan: &Plan) -> Vec<Affinity> {
    let hole = platform::LEGACY_HOLE;
    let mut entries = Vec::new();
    for node in &plan.ram {
        let end = node.base + node.size;
        let pieces = [
            (node.base, end.min(hole.base)),
            (node.base.max(hole.end()), end),
        ];
        entries.extend(
            pieces
                .into_iter()
                .filter(|(from, to)| from < to)
                .map(|(base, to)| {
                    let range = Range {
                        base,
                        size: to - base,
                    };
                    Affinity::Memory {
                        pxm: node.pxm,
                        range,
                        hotplug: false,
                    }
                }),
        );
    }
    entries
}

fn check_srat(plan: &Plan, handed: &Handed) {
    let is_memory = |entry: &Affinity| matches!(entry, Affinity::Memory { .. });
    let theirs = tables::srat(tables::find(&handed.tables, "SRAT").unwrap());
    let (memory, first): (Vec<Affinity>, Vec<Affinity>) = theirs.into_iter().partition(is_memory);

    let domain = |hbm: &numagpu_topology::plan::Hbm| (hbm.pxm.unwrap(), hbm.range());
    let hbm: Vec<(u32, Range)> = plan.hbm().map(domain).collect();
    let last = u32::try_from(plan.nodes.len()).unwrap() - 1;
    let window = linux::window_entries(plan.window, &hbm, last);
    let mut predicted = ram(plan);
    predicted.extend(window.iter().map(|entry| Affinity::Memory {
        pxm: entry.pxm,
        range: entry.range,
        hotplug: entry.free,
    }));
    assert_eq!(memory, predicted);

    let own = tables::srat(&ours(plan, "SRAT").unwrap());
    let mut predicted: Vec<Affinity> = own
        .iter()
        .filter(|entry| matches!(entry, Affinity::Processor { .. }))
        .cloned()
        .collect();
    predicted.extend(plan.initiator_order().iter().map(|name| {
        let mut named = plan.domains();
        let named = named.find(|domain| domain.initiator.as_ref() == Some(name));
        // Buses behind bridges have no numbers until firmware gives them some.
        Affinity::Initiator {
            pxm: named.unwrap().pxm,
            bus: 0,
        }
    }));
    assert_eq!(first, predicted);

    // What a guest makes of QEMU's order is what the plan promises, and our own table leads to the same.
    let numbers = |entries: &[Affinity]| {
        let pass = |second: bool| -> Vec<u32> {
            let of_pass = entries.iter().filter(|entry| is_memory(entry) == second);
            let domain = |entry: &Affinity| match entry {
                Affinity::Processor { pxm, .. }
                | Affinity::Memory { pxm, .. }
                | Affinity::Initiator { pxm, .. } => *pxm,
            };
            of_pass.map(domain).collect()
        };
        linux::node_numbers(pass(false), pass(true))
    };
    let planned = plan
        .nodes
        .iter()
        .map(|node| (node.pxm, node.linux_node))
        .collect();
    assert_eq!(numbers(&[first, memory].concat()), planned);
    assert_eq!(numbers(&own), planned);
}

fn check_slit(plan: &Plan, handed: &Handed) {
    let own = tables::slit(&ours(plan, "SLIT").unwrap());
    assert_eq!(own, plan.slit);
    assert_eq!(
        tables::slit(tables::find(&handed.tables, "SLIT").unwrap()),
        own
    );
}

fn check_hmat(plan: &Plan, handed: &Handed) {
    let predicted = qemu::hmat(plan);
    let theirs = tables::find(&handed.tables, "HMAT").map(tables::hmat);
    assert_eq!(theirs.as_ref().map(Hmat::reads), predicted);
    let Some(theirs) = theirs else { return };
    // Ours rounds to other units where values are too far apart for 16 bits; no planned value is far from either.
    let own = tables::hmat(&ours(plan, "HMAT").unwrap());
    assert_eq!(theirs.attached, own.attached);
    assert_eq!(theirs.initiators, own.initiators);
    for (theirs, own) in [
        (&theirs.latencies, &own.latencies),
        (&theirs.bandwidths, &own.bandwidths),
    ] {
        let largest = own.iter().map(|(_, _, value)| *value).max().unwrap_or(0);
        assert_eq!(theirs.len(), own.len());
        for (one, other) in theirs.iter().zip(own) {
            assert_eq!((one.0, one.1), (other.0, other.1));
            // QEMU's unit is at most ten times what 16 bits need, and no value becomes 0.
            let tolerance = 1 + largest * 11 / 65_534;
            assert!(one.2.abs_diff(other.2) <= tolerance, "{one:?} {other:?}");
        }
    }
}

#[track_caller]
fn check(plan: &Plan) {
    let handed = handed(plan);
    check_e820(plan, &handed);
    check_srat(plan, &handed);
    check_slit(plan, &handed);
    check_hmat(plan, &handed);
}

#[track_caller]
fn check_preset(name: &str) {
    let preset = preset::find(name).unwrap();
    check(&plan(&parse(name, preset.source).unwrap()).unwrap());
}

#[test]
fn presets_are_what_qemu_hands_over() {
    for preset in preset::ALL {
        println!("{}", preset.name);
        check_preset(preset.name);
    }
}

/// RAM of a machine in units of 2 MiB: little, some on either side of where q35 splits it, some that is split, and a lot.
fn memory(n: &mut Numbers) -> u64 {
    let split = 0xb000_0000 / (2 * MIB);
    match n.below(6) {
        0 => 64 + n.below(512),
        1 => split - 1 - n.below(64),
        2 => split + n.below(64),
        3 | 4 => 512 * (1 + n.below(16)),
        _ => 512 * (100 + n.below(500)),
    }
}

/// A machine of 1 to 4 CPU nodes and 1 to 8 GPUs. Not all of them can be planned.
fn machine(n: &mut Numbers) -> String {
    let mut text = String::new();
    let cpus = 1 + n.below(4);
    let ram = memory(n).max(cpus);
    // Latencies and bandwidths as real machines have them, or anything.
    let (ns, mbs) = n.one_of([
        (0, 0),
        (1000, 0),
        (1000, 2_000_000),
        (5_000_000, 4_000_000_000),
    ]);
    let accesses = |n: &mut Numbers, prefix: &str| {
        let latency = n.one_of([0, ns.min(20), ns, ns]);
        let bandwidth = n.one_of([0, mbs.min(20), mbs, mbs]);
        let (latency, bandwidth) = (n.below(latency + 1), n.below(bandwidth + 1));
        format!("{prefix}latency_ns = {latency}\n{prefix}bandwidth_mbs = {bandwidth}\n")
    };
    for node in 0..cpus {
        let share = ram / cpus + if node == 0 { ram % cpus } else { 0 };
        let count = 1 + n.below(6);
        writeln!(
            text,
            "[[cpu]]\ncpus = {count}\nmemory = \"{}MiB\"",
            2 * share
        )
        .unwrap();
        text += &accesses(n, "");
    }
    let gpus = 1 + n.below(8);
    let all_initiators = n.once_in(3);
    // In units of 2 MiB; the larger ones cross the range under 1 TiB that nothing may be in.
    let largest = n.one_of([1000, 16 * 512, 64 * 512, 200 * 512]);
    if n.once_in(4) {
        for _ in 0..=n.below(2) {
            let (units, cpu) = (64 + n.below(2000), n.below(cpus));
            writeln!(
                text,
                "[[memory]]\nmemory = \"{}MiB\"\ncpu = {cpu}",
                2 * units
            )
            .unwrap();
            text += &accesses(n, "");
        }
    }
    let others = n.once_in(3);
    for gpu in 0..gpus {
        let exposure = if others {
            n.one_of(["spm", "ram", "bar", "private"])
        } else {
            "spm"
        };
        let partitions = 1 + if exposure != "ram" && n.once_in(3) {
            n.below(5)
        } else {
            0
        };
        let hbm = 2 * partitions * (1 + n.below(largest));
        let cpu = n.below(cpus);
        writeln!(
            text,
            "[[gpu]]\nhbm = \"{hbm}MiB\"\npartitions = {partitions}\ncpu = {cpu}\nexposure = \"{exposure}\""
        )
        .unwrap();
        text += &accesses(n, "hbm_");
        if exposure != "spm" {
            continue;
        }
        if all_initiators || n.once_in(4) {
            writeln!(text, "generic_initiator = true").unwrap();
            if n.once_in(2) {
                writeln!(text, "pci_node = \"hbm\"").unwrap();
            }
        }
        if n.once_in(8) {
            writeln!(text, "base = \"{}GiB\"", 8 * (1 + n.below(300))).unwrap();
        }
        if n.once_in(8) {
            writeln!(text, "bus = {}", 40 + 8 * gpu + n.below(4)).unwrap();
        }
    }
    for to in 1..gpus {
        let from = n.below(to);
        writeln!(text, "[[link]]\nfrom = \"gpu{from}\"\nto = \"gpu{to}\"").unwrap();
        text += &accesses(n, "");
        if n.once_in(2) {
            let cpu = n.below(cpus);
            writeln!(text, "[[link]]\nfrom = \"gpu{to}\"\nto = \"cpu{cpu}\"").unwrap();
            text += &accesses(n, "");
        }
    }
    writeln!(text, "[distances]").unwrap();
    for name in [
        "cpu_cpu",
        "cpu_hbm_local",
        "cpu_hbm_remote",
        "hbm_hbm_linked",
        "hbm_hbm",
    ] {
        let value = if n.once_in(6) { 255 } else { 11 + n.below(244) };
        writeln!(text, "{name} = {value}").unwrap();
    }
    let gap = n.one_of([2, 128, 2048]);
    let align = n.one_of([2, 128, 2048]);
    writeln!(
        text,
        "[placement]\ngap = \"{gap}MiB\"\nalign = \"{align}MiB\""
    )
    .unwrap();
    let bits = n.one_of([38, 40, 44, 46]);
    let mut limits = format!("phys_bits = {bits}\n");
    if n.once_in(3) {
        limits += "amd_hole = false\n";
    }
    if n.once_in(4) {
        writeln!(
            limits,
            "pci_hole = \"{}MiB\"",
            n.one_of([512, 1024, 1536, 2816])
        )
        .unwrap();
    }
    if !others && n.once_in(4) {
        writeln!(limits, "pci_hole64 = \"{}GiB\"", 1 + n.below(600)).unwrap();
    }
    format!("name = \"random\"\n[limits]\n{limits}{text}")
}

/// How many machines the generator gives.
const MACHINES: usize = 60;

/// Machines that can be planned.
fn machines() -> Vec<(String, Plan)> {
    let mut numbers = Numbers(2);
    let texts = std::iter::repeat_with(|| machine(&mut numbers)).take(10 * MACHINES);
    let planned = texts.filter_map(|text| {
        let plan = plan(&parse("random", &text).unwrap()).ok()?;
        Some((text, plan))
    });
    planned.take(MACHINES).collect()
}

/// A machine nobody looked at proves nothing: the generator has to give all kinds.
#[test]
fn the_generator_gives_machines_of_all_kinds() {
    let machines = machines();
    assert_eq!(machines.len(), MACHINES);
    let has = |what: &str, is: &dyn Fn(&Plan) -> bool| {
        let count = machines.iter().filter(|(_, plan)| is(plan)).count();
        assert!(count >= 2, "{count} machines with {what}");
    };
    let cpu_nodes = |plan: &Plan| plan.nodes.iter().filter(|n| !n.cpus.is_empty()).count();
    for exposure in [Exposure::Ram, Exposure::Bar, Exposure::Private] {
        has(&format!("exposure {exposure}"), &|plan| {
            plan.gpus.iter().any(|gpu| gpu.exposure == exposure)
        });
    }
    has("memory nodes", &|plan| {
        plan.ram_nodes().count() > cpu_nodes(plan)
    });
    has("CPUs that are not AMD's", &|plan| !plan.holes.amd);
    has("HBM that AMD's CPUs would have moved", &|plan| {
        !plan.holes.amd && plan.window.end() > platform::AMD_HT.base
    });
    has("a PCI hole of its own", &|plan| {
        plan.holes.below_4g.is_some()
    });
    has("a 64-bit PCI hole of its own", &|plan| {
        plan.holes.pci_hole64 != platform::PCI_HOLE64
    });
    has("one piece of RAM", &|plan| plan.ram_whole().len() == 1);
    has("RAM of 2 GiB to 2.75 GiB", &|plan| {
        plan.ram_whole().len() == 1 && plan.ram_bytes() > 2 * GIB
    });
    has("RAM on both sides of the PCI hole", &|plan| {
        plan.ram_whole().len() == 2
    });
    has("addresses that end below 1 TiB", &|plan| {
        plan.phys_bits < 40
    });
    has("HBM beyond 1 TiB", &|plan| plan.window.base >= 1 << 40);
    has("one CPU node", &|plan| cpu_nodes(plan) == 1);
    has("several CPU nodes", &|plan| cpu_nodes(plan) > 2);
    has("partitions", &|plan| {
        plan.gpus.iter().any(|gpu| gpu.hbm.len() > 1)
    });
    has("no initiator", &|plan| plan.initiator_order().is_empty());
    has("five initiators and more", &|plan| {
        plan.initiator_order().len() > 4
    });
    has("what cannot be reached", &|plan| {
        plan.slit.concat().contains(&255)
    });
    has("HBM at an address of its own", &|plan| {
        let hbm = plan.hbm_ranges();
        !hbm.is_sorted()
    });
    has("node numbers that are not those of the domains", &|plan| {
        plan.nodes.iter().any(|node| node.pxm != node.linux_node)
    });
    has("no HMAT", &|plan| qemu::hmat(plan).is_none());
    has("an HMAT of CPUs and GPUs", &|plan| {
        qemu::hmat(plan).is_some_and(|hmat| {
            let pairs = hmat.latency_ps.keys().chain(hmat.bandwidth_mbs.keys());
            let gpus = pairs.filter(|(from, _)| hmat.initiators.get(from) == Some(&false));
            gpus.count() > 1
        })
    });
    has("values that 16 bits do not hold", &|plan| {
        !qemu::warnings(plan).is_empty()
    });
    let buses: BTreeSet<u8> = machines
        .iter()
        .flat_map(|(_, plan)| plan.gpus.iter().map(|gpu| gpu.bus))
        .collect();
    assert!(buses.len() > 10, "{buses:?}");
}

#[test]
fn machines_from_a_generator_are_what_qemu_hands_over() {
    for (text, plan) in machines() {
        println!("{text}");
        check(&plan);
    }
}
