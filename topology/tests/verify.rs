//! A report that says exactly what was planned passes; each thing that is otherwise fails its own facts, no others.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by a panic"
)]

use numagpu_topology::linux::BootPath;
use numagpu_topology::machine::{Driver, Exposure};
use numagpu_topology::plan::Plan;
use numagpu_topology::ranges::Range;
use numagpu_topology::seen::{
    AccessSeen, DaxSeen, GpuSeen, NodeSeen, PartitionSeen, Report, SratMemory, Step, steps,
};
use numagpu_topology::size::GIB;
use numagpu_topology::verify::{Fact, table, verify};
use numagpu_topology::{E820_RAM, E820_SOFT_RESERVED, parse, plan, preset, qemu};

fn planned(name: &str) -> Plan {
    plan(&parse(name, preset::find(name).unwrap().source).unwrap()).unwrap()
}

fn ranges_of(plan: &Plan, kind: u32) -> Vec<Range> {
    let entries = plan.e820.iter().filter(|entry| entry.kind == kind);
    entries
        .map(|entry| Range {
            base: entry.base,
            size: entry.size,
        })
        .collect()
}

/// The report of a guest that is all that was planned.
fn perfect(plan: &Plan) -> Report {
    let mut online: Vec<_> = plan.nodes.iter().filter(|node| node.online).collect();
    online.sort_by_key(|node| node.linux_node);
    let nodes = online.iter().map(|node| NodeSeen {
        node: node.linux_node,
        cpus: node.cpus.clone(),
        distances: online
            .iter()
            .map(|to| u32::from(plan.slit[node.pxm as usize][to.pxm as usize]))
            .collect(),
        mem_total_kib: match node.gpu.is_some() && node.cpus.is_empty() {
            true => 0,
            false => node.ranges.iter().map(|range| range.size).sum::<u64>() / 1024 - 20_000,
        },
        access: accesses(plan, node.pxm),
    });
    let initiators: Vec<_> = plan.domains().filter(|d| d.initiator.is_some()).collect();
    let mut nodes_initiator: Vec<u32> = initiators
        .iter()
        .map(|domain| plan.linux_node(domain.pxm).unwrap())
        .collect();
    nodes_initiator.sort_unstable();
    let srat = |pxm: u32, range: Range| SratMemory {
        pxm,
        range,
        hotplug: false,
    };
    let node = |pxm: Option<u32>| plan.linux_node(pxm.unwrap()).unwrap();
    // In all presets the CPU node that a GPU is attached to is the nearest.
    let near = |pxm: Option<u32>| {
        let own = &plan.nodes[pxm.unwrap() as usize];
        if own.online {
            own.linux_node
        } else {
            node(own.cpu_pxm)
        }
    };
    let dax = plan.hbm().enumerate().map(|(index, hbm)| DaxSeen {
        name: format!("dax{index}.0"),
        region: hbm.range(),
        size: hbm.size,
        align: 2 << 20,
        target_node: i32::try_from(node(hbm.pxm)).unwrap(),
        numa_node: i32::try_from(near(hbm.pxm)).unwrap(),
        driver: "device_dax".to_owned(),
    });
    let ram_kib = plan.ram_bytes() / 1024;
    Report {
        kernel: "6.12".to_owned(),
        command_line: String::new(),
        soft_reserved: ranges_of(plan, E820_SOFT_RESERVED),
        usable: ranges_of(plan, E820_RAM),
        mem_total_kib: vec![ram_kib - 50_000; 3],
        nodes_possible: (0..u32::try_from(plan.nodes.len()).unwrap()).collect(),
        nodes_online: online.iter().map(|node| node.linux_node).collect(),
        nodes_initiator,
        nodes: nodes.collect(),
        srat_memory: plan
            .hbm()
            .map(|hbm| srat(hbm.pxm.unwrap(), hbm.range()))
            .collect(),
        srat_initiators: initiators.iter().map(|domain| domain.pxm).collect(),
        slit: plan.slit.clone(),
        acpi_tables: vec!["SRAT".to_owned(), "SLIT".to_owned()],
        dax: dax.collect(),
        gpus: plan.gpus.iter().map(|gpu| seen(plan, gpu)).collect(),
        passthrough: Vec::new(),
        problems: Vec::new(),
    }
}

/// Both access classes of a domain's node, or none.
fn accesses(plan: &Plan, pxm: u32) -> Vec<AccessSeen> {
    let Some(hmat) = qemu::hmat(plan) else {
        return Vec::new();
    };
    // What has no memory is no target.
    if plan.nodes[pxm as usize].ranges.is_empty() {
        return Vec::new();
    }
    let seen = |number: u32| {
        let class = hmat.class(pxm, number);
        let nodes = class.initiators.iter();
        AccessSeen {
            class: number,
            initiators: nodes.map(|pxm| plan.linux_node(*pxm).unwrap()).collect(),
            latency_ns: (class.latency_ns, class.latency_ns),
            bandwidth_mbs: (class.bandwidth_mbs, class.bandwidth_mbs),
        }
    };
    vec![seen(0), seen(1)]
}

/// A step of a GPU that has it.
fn step<'a>(gpu: &'a mut GpuSeen, name: &str) -> &'a mut Step {
    let mut steps = gpu.steps.iter_mut();
    steps.find(|step| step.name == name).unwrap()
}

fn seen(plan: &Plan, gpu: &numagpu_topology::plan::Gpu) -> GpuSeen {
    let links = gpu.links.iter();
    let partitions = gpu.hbm.iter().filter(|_| gpu.exposure != Exposure::Ram);
    let own = u32::try_from(partitions.clone().count()).unwrap();
    let driven = match gpu.exposure {
        Exposure::Ram => steps::UNIFIED,
        _ => steps::ALL,
    };
    let coherence = match gpu.exposure {
        Exposure::Bar | Exposure::Private => "Aperture",
        _ => "Coherent",
    };
    GpuSeen {
        index: gpu.index,
        bdf: gpu.bdf.clone(),
        ids: (0x1002, 0x7408),
        class: 0x12_0000,
        numa_node: i32::try_from(plan.linux_node(gpu.pci_pxm).unwrap()).unwrap(),
        hive: (gpu.hive_id, gpu.hive_node, gpu.hive_size),
        links: links
            .map(|l| {
                (
                    l.peer_hive_node.unwrap_or(u32::MAX),
                    l.count,
                    l.bandwidth_mbs,
                )
            })
            .collect(),
        partitions: partitions
            .map(|hbm| PartitionSeen {
                range: hbm.range(),
                pxm: hbm.pxm.unwrap_or(u32::MAX),
                coherence: coherence.to_owned(),
            })
            .collect(),
        clock: format!("{:?}", plan.device.timing),
        blocks: vec![
            ("Identity".to_owned(), 1),
            ("Link".to_owned(), u32::try_from(gpu.links.len()).unwrap()),
            ("Partition".to_owned(), own),
            ("Queue".to_owned(), 2),
        ],
        lspci: String::new(),
        steps: driven
            .iter()
            .map(|name| Step {
                name: (*name).to_owned(),
                ok: true,
                detail: String::new(),
            })
            .collect(),
        access_times: None,
    }
}

fn wrong(facts: &[Fact]) -> Vec<&str> {
    let bad = facts.iter().filter(|fact| !fact.ok);
    bad.map(|fact| fact.what.as_str()).collect()
}

#[test]
fn a_guest_that_is_as_planned_passes() {
    for preset in preset::ALL {
        let plan = planned(preset.name);
        let facts = verify(&plan, BootPath::Ovmf, &perfect(&plan));
        assert_eq!(wrong(&facts), [""; 0], "{}", preset.name);
        assert!(facts.len() > 10 + 9 * plan.gpus.len());
        let last = format!("verified: {0} of {0}\n", facts.len());
        assert_eq!(table(&facts, false), last);
    }
}

#[test]
fn every_deviation_fails_its_own_facts() {
    type Row = (&'static str, fn(&mut Report), &'static [&'static str]);
    let rows: &[Row] = &[
        (
            "firmware merged the two ranges",
            |r| {
                let end = r.soft_reserved[1].end();
                r.soft_reserved[0].size = end - r.soft_reserved[0].base;
                r.soft_reserved.truncate(1);
            },
            &[
                "E820 soft-reserved entries",
                "E820 gpu0 partition 0",
                "E820 gpu1 partition 0",
            ],
        ),
        (
            "a range is a page short",
            |r| r.soft_reserved[1].size -= 4096,
            &["E820 gpu1 partition 0"],
        ),
        (
            "no soft-reserved range",
            |r| r.soft_reserved.clear(),
            &[
                "E820 soft-reserved entries",
                "E820 gpu0 partition 0",
                "E820 gpu1 partition 0",
            ],
        ),
        (
            "a soft-reserved range too many",
            |r| {
                r.soft_reserved.push(Range {
                    base: 1 << 41,
                    size: GIB,
                })
            },
            &["E820 soft-reserved entries"],
        ),
        (
            "HBM is usable memory",
            |r| {
                r.usable.push(Range {
                    base: r.soft_reserved[0].base,
                    size: GIB,
                })
            },
            &["usable E820 entries with HBM"],
        ),
        (
            "no usable range seen",
            |r| r.usable.clear(),
            &["usable E820 entries with HBM"],
        ),
        (
            "SRAT has HBM in another domain",
            |r| r.srat_memory[1].pxm = 1,
            &["SRAT gpu1 partition 0"],
        ),
        (
            "SRAT has HBM as hot-pluggable",
            |r| r.srat_memory[0].hotplug = true,
            &["SRAT gpu0 partition 0"],
        ),
        (
            "an extra node is online",
            |r| r.nodes_online.push(3),
            &["online nodes"],
        ),
        (
            "an HBM node is not online",
            |r| {
                r.nodes_online.pop();
                r.nodes.pop();
            },
            &[
                "online nodes",
                "node 2 CPUs and distances",
                "node 2 page-allocator memory",
                "nodes with access classes",
                "node 2 access0",
                "node 2 access1",
            ],
        ),
        (
            "a node more is possible",
            |r| r.nodes_possible.push(3),
            &["possible nodes"],
        ),
        (
            "a node is not possible",
            |r| {
                r.nodes_possible.pop();
            },
            &["possible nodes"],
        ),
        (
            "a node is possible twice",
            |r| r.nodes_possible[2] = 1,
            &["possible nodes"],
        ),
        (
            "a Generic Initiator is missing",
            |r| {
                r.nodes_initiator.pop();
            },
            &["nodes with a Generic Initiator"],
        ),
        ("another SLIT", |r| r.slit[0][2] = 99, &["SLIT"]),
        ("no SLIT", |r| r.slit.clear(), &["SLIT"]),
        (
            "a node has other CPUs",
            |r| {
                r.nodes[0].cpus.pop();
            },
            &["node 0 CPUs and distances"],
        ),
        (
            "a node has other distances",
            |r| r.nodes[1].distances[0] = 20,
            &["node 1 CPUs and distances"],
        ),
        (
            "the page allocator has HBM",
            |r| r.nodes[2].mem_total_kib = 4 << 20,
            &["node 2 page-allocator memory"],
        ),
        (
            "an access class is missing",
            |r| {
                r.nodes[1].access.remove(0);
            },
            &["node 1 access0"],
        ),
        (
            "a node has no access class",
            |r| r.nodes[2].access.clear(),
            &[
                "nodes with access classes",
                "node 2 access0",
                "node 2 access1",
            ],
        ),
        (
            "the CPU is the best initiator of HBM",
            |r| r.nodes[1].access[0].initiators = vec![0],
            &["node 1 access0"],
        ),
        (
            "HBM has a second initiator",
            |r| r.nodes[1].access[0].initiators.push(2),
            &["node 1 access0"],
        ),
        (
            "a latency is another",
            |r| r.nodes[0].access[1].latency_ns = (101, 101),
            &["node 0 access1"],
        ),
        (
            "a write has another latency than a read",
            |r| r.nodes[2].access[0].latency_ns.1 += 1,
            &["node 2 access0"],
        ),
        (
            "a bandwidth is not known",
            |r| r.nodes[2].access[1].bandwidth_mbs = (0, 0),
            &["node 2 access1"],
        ),
        (
            "a dax device leads to another node",
            |r| r.dax[0].target_node = 2,
            &["dax of gpu0 partition 0"],
        ),
        (
            "kmem has a dax device",
            |r| r.dax[1].driver = "kmem".to_owned(),
            &["dax of gpu1 partition 0"],
        ),
        (
            "a dax device is too small",
            |r| r.dax[1].size -= 2 << 20,
            &["dax of gpu1 partition 0"],
        ),
        (
            "a dax device is missing",
            |r| {
                r.dax.pop();
            },
            &["dax devices", "dax of gpu1 partition 0"],
        ),
        (
            "a dax device too many",
            |r| r.dax.push(DaxSeen::default()),
            &["dax devices"],
        ),
        (
            "a GPU too many",
            |r| {
                r.gpus.push(GpuSeen {
                    index: 7,
                    ..GpuSeen::default()
                })
            },
            &["GPUs"],
        ),
        (
            "a GPU on another bus",
            |r| r.gpus[0].bdf = "01:00.0".to_owned(),
            &["gpu0 PCI function"],
        ),
        (
            "a GPU of another class",
            |r| r.gpus[0].class = 0x03_0000,
            &["gpu0 PCI function"],
        ),
        (
            "a GPU on no node",
            |r| r.gpus[1].numa_node = -1,
            &["gpu1 PCI function"],
        ),
        ("another hive", |r| r.gpus[0].hive.0 ^= 1, &["gpu0 hive"]),
        (
            "a link is slower",
            |r| r.gpus[0].links[0].2 /= 2,
            &["gpu0 links (peer x count @ MB/s)"],
        ),
        (
            "a link to the CPU only",
            |r| r.gpus[0].links[0].0 = u32::MAX,
            &["gpu0 links (peer x count @ MB/s)"],
        ),
        (
            "a link is missing",
            |r| {
                r.gpus[1].links.pop();
            },
            &["gpu1 links (peer x count @ MB/s)"],
        ),
        (
            "a partition is not coherent",
            |r| r.gpus[0].partitions[0].coherence = "NotMapped".to_owned(),
            &["gpu0 partition 0 registers"],
        ),
        (
            "a partition is elsewhere",
            |r| r.gpus[1].partitions[0].range.base += GIB,
            &["gpu1 partition 0 registers"],
        ),
        (
            "registers name another domain",
            |r| r.gpus[1].partitions[0].pxm = 1,
            &["gpu1 partition 0 registers"],
        ),
        (
            "no partition",
            |r| r.gpus[1].partitions.clear(),
            &["gpu1 partitions", "gpu1 partition 0 registers"],
        ),
        (
            "time stamps mean something else",
            |r| r.gpus[0].clock = "Paced".to_owned(),
            &["gpu0 clock"],
        ),
        (
            "a queue less",
            |r| r.gpus[1].blocks[3].1 = 1,
            &["gpu1 instances of blocks"],
        ),
        (
            "no list of blocks",
            |r| r.gpus[1].blocks.clear(),
            &["gpu1 instances of blocks"],
        ),
        (
            "a step failed",
            |r| step(&mut r.gpus[1], steps::COPY_IN).ok = false,
            &["gpu1 copy RAM to HBM"],
        ),
        (
            "a step was not done",
            |r| {
                r.gpus[0].steps.retain(|step| step.name != steps::BOOT);
            },
            &["gpu0 boot handshake"],
        ),
        (
            "HBM is in MemTotal",
            |r| r.mem_total_kib[1] += 4 << 20,
            &["MemTotal during the run"],
        ),
        (
            "half of the RAM is gone",
            |r| r.mem_total_kib[0] /= 2,
            &["MemTotal before the run"],
        ),
        (
            "the guest did not come to its end",
            |r| r.mem_total_kib.truncate(1),
            &["MemTotal during the run", "MemTotal after the run"],
        ),
        (
            "the guest had a problem",
            |r| r.problems.push("no /dev/dax0.0".to_owned()),
            &["problems in the guest"],
        ),
        (
            "firmware split a range",
            |r| {
                r.soft_reserved[0].size = GIB;
                let rest = Range {
                    base: r.soft_reserved[0].end(),
                    size: 3 * GIB,
                };
                r.soft_reserved.push(rest);
            },
            &["E820 soft-reserved entries", "E820 gpu0 partition 0"],
        ),
        (
            "SRAT has HBM in two domains",
            |r| {
                let twice = SratMemory {
                    pxm: 0,
                    ..r.srat_memory[0].clone()
                };
                r.srat_memory.push(twice);
            },
            &["SRAT gpu0 partition 0"],
        ),
        (
            "a partition too many",
            |r| {
                let more = r.gpus[0].partitions[0].clone();
                r.gpus[0].partitions.push(more);
            },
            &["gpu0 partitions"],
        ),
        (
            "a step failed the second time",
            |r| {
                let again = Step {
                    ok: false,
                    ..step(&mut r.gpus[0], steps::CPU_ACCESS).clone()
                };
                r.gpus[0].steps.push(again);
            },
            &["gpu0 CPU writes and reads HBM"],
        ),
    ];
    let plan = planned("two-gpu");
    let mut report = String::new();
    for (name, change, expected) in rows {
        let mut seen = perfect(&plan);
        change(&mut seen);
        let facts = verify(&plan, BootPath::Ovmf, &seen);
        if wrong(&facts) != *expected {
            report += &format!("{name}: {:?}\n", wrong(&facts));
        }
    }
    assert!(report.is_empty(), "{report}");
}

#[test]
fn a_missing_gpu_fails_all_of_its_facts() {
    let plan = planned("two-gpu");
    let mut report = perfect(&plan);
    report.gpus.pop();
    let facts = verify(&plan, BootPath::Ovmf, &report);
    let own = facts.iter().filter(|fact| fact.what.starts_with("gpu1 "));
    let own: Vec<&str> = own.map(|fact| fact.what.as_str()).collect();
    assert!(own.len() > steps::ALL.len());
    assert_eq!(wrong(&facts), [&["GPUs"], &own[..]].concat());
}

/// What was not looked at is not as planned.
#[test]
fn a_guest_that_saw_nothing_fails_all_but_its_lack_of_problems() {
    let plan = planned("two-gpu");
    let facts = verify(&plan, BootPath::Ovmf, &Report::default());
    let good: Vec<_> = facts.iter().filter(|fact| fact.ok).collect();
    let good: Vec<_> = good.iter().map(|fact| fact.what.as_str()).collect();
    assert_eq!(good, ["problems in the guest"]);
}

#[test]
fn a_kernel_driver_makes_no_dax_device() {
    let mut plan = planned("two-gpu");
    plan.guest.driver = Driver::Kernel;
    let mut report = perfect(&plan);
    assert_eq!(
        wrong(&verify(&plan, BootPath::Ovmf, &report)),
        ["dax devices"]
    );
    report.dax.clear();
    assert_eq!(wrong(&verify(&plan, BootPath::Ovmf, &report)), [""; 0]);
}

/// Without latencies and bandwidths there is no HMAT, and Linux shows no class.
#[test]
fn access_classes_that_nobody_planned_are_a_difference() {
    let mut plan = planned("two-gpu");
    plan.accesses.clear();
    let mut report = perfect(&plan);
    assert_eq!(wrong(&verify(&plan, BootPath::Ovmf, &report)), [""; 0]);
    assert!(report.nodes.iter().all(|node| node.access.is_empty()));
    report.nodes[1].access.push(AccessSeen::default());
    assert_eq!(wrong(&verify(&plan, BootPath::Ovmf, &report)), [""; 0]);
    report.nodes[1].access[0].initiators.push(0);
    assert_eq!(
        wrong(&verify(&plan, BootPath::Ovmf, &report)),
        ["nodes with access classes"]
    );
}

#[test]
fn the_table_shows_what_differs_or_all() {
    let fact = |what: &str, planned: &str, seen: &str| Fact {
        what: what.to_owned(),
        planned: planned.to_owned(),
        seen: seen.to_owned(),
        ok: planned == seen,
    };
    let facts = [
        fact("GPUs", "2", "2"),
        fact("SLIT", "[10 20] [20 10]", "[10 20] [20 10]"),
        fact("dax devices", "2", "1"),
    ];
    let head = "     fact         planned          seen\n";
    let same =
        "ok   GPUs         2                2\nok   SLIT         [10 20] [20 10]  the same\n";
    let rest = "DIFF dax devices  2                1\nverified: 2 of 3\n";
    assert_eq!(table(&facts, true), [head, same, rest].concat());
    assert_eq!(table(&facts, false), [head, rest].concat());
    assert_eq!(
        table(&[], true),
        "     fact  planned  seen\nverified: 0 of 0\n"
    );
}
