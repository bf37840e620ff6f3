//! Boots machines and compares what Linux found with numbers written down here, not with the plan.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use numagpu_tests::corner::{Corner, GUEST, facts};
use numagpu_tests::guests::{boot, check_driver, check_hbm, check_lspci, own};
use numagpu_tests::process::Process;
use numagpu_tests::programs::{Turn, assets};
use numagpu_topology::seen::Report;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What Linux shows of an access class: the only initiator, nanoseconds and MB/s.
#[track_caller]
fn check_access(report: &Report, node: u32, class: u32, wanted: (u32, u32, u32)) {
    let (initiator, ns, mbs) = wanted;
    let node = report.nodes.iter().find(|seen| seen.node == node).unwrap();
    let mut classes = node.access.iter();
    let seen = classes.find(|access| access.class == class).unwrap();
    assert_eq!(seen.initiators, [initiator], "{node:?}");
    assert_eq!(seen.latency_ns, (ns, ns), "{node:?}");
    assert_eq!(seen.bandwidth_mbs, (mbs, mbs), "{node:?}");
}

#[track_caller]
fn two_gpu(firmware: &str, kernel: &str) {
    let report = boot("two-gpu", firmware, kernel);
    check_hbm(&report, &[(4 * GIB, 1), (4 * GIB, 2)], GIB);
    check_driver(&report.gpus);
    for gpu in &report.gpus {
        check_lspci(gpu, include_str!("golden/lspci-spm.txt"));
        assert!(!gpu.lspci.contains("Region 4"), "{}", gpu.lspci);
    }
    for dax in &report.dax {
        assert_eq!(dax.numa_node, dax.target_node, "{dax:?}");
    }
    assert_eq!(report.nodes_online, [0, 1, 2]);
    assert_eq!(report.nodes_initiator, [1, 2]);
    assert_eq!(report.nodes[0].cpus, [0, 1]);
    for node in &report.nodes[1..] {
        assert_eq!((node.mem_total_kib, node.cpus.len()), (0, 0), "{node:?}");
    }
    check_access(&report, 0, 0, (0, 100, 48_000));
    check_access(&report, 0, 1, (0, 100, 48_000));
    for node in [1, 2] {
        // The GPU reaches its own HBM best, and of those with CPUs there is one.
        check_access(&report, node, 0, (node, 350, 1_600_000));
        check_access(&report, node, 1, (0, 600, 36_000));
    }
    assert_eq!(report.gpus.len(), 2);
    for (gpu, (place, node)) in report.gpus.iter().zip([(0, 1), (1, 2)]) {
        assert_eq!((gpu.numa_node, gpu.class), (node, 0x12_0000), "{gpu:?}");
        assert_eq!((gpu.hive.1, gpu.hive.2), (place, 2), "{gpu:?}");
    }
    assert!(report.gpus[0].hive.0 != 0 && report.gpus[0].hive.0 == report.gpus[1].hive.0);
}

/// Links of Frontier's node by GCD: (GCD, GCD, physical links), as `rocm-smi --shownodesbw` prints them at 50 GB/s each
/// (ROCm `rocm_smi_lib`, `python_smi_tools/README.md`).
const LINKS: [(u32, u32, u32); 12] = [
    (0, 1, 4),
    (0, 2, 1),
    (0, 6, 2),
    (1, 3, 1),
    (1, 5, 1),
    (2, 3, 4),
    (2, 4, 2),
    (3, 7, 1),
    (4, 5, 4),
    (4, 6, 1),
    (5, 7, 1),
    (6, 7, 4),
];

#[track_caller]
fn frontier(firmware: &str, kernel: &str) {
    let report = boot("frontier-node", firmware, kernel);
    let hbm: Vec<(u64, u32)> = (4..=11).map(|node| (64 * GIB, node)).collect();
    check_hbm(&report, &hbm, 2 * GIB);
    check_driver(&report.gpus);

    // LLNL mpibind topo-xml/eas-tioga.xml: four nodes, all with CPUs, 10 within and 12 between.
    assert_eq!(report.nodes_online, [0, 1, 2, 3]);
    assert_eq!(report.nodes_possible, (0..=11).collect::<Vec<_>>());
    assert_eq!(report.nodes_initiator, Vec::<u32>::new());
    for (node, seen) in (0u32..).zip(&report.nodes) {
        let mut distances = [12; 4];
        distances[node as usize] = 10;
        assert_eq!(seen.distances, distances, "node {node}");
        assert_eq!(seen.cpus, [node]);
        assert!(seen.mem_total_kib * 1024 <= 512 * MIB, "{seen:?}");
    }

    // The same file has the buses; the node of each GCD is in OLCF's Frontier user guide too.
    let published = [
        ("c1", 3),
        ("c6", 3),
        ("c9", 1),
        ("ce", 1),
        ("d1", 0),
        ("d6", 0),
        ("d9", 2),
        ("de", 2),
    ];
    assert_eq!(report.gpus.len(), published.len());
    for ((index, target), (gpu, (bus, node))) in
        (0u32..).zip(4..).zip(report.gpus.iter().zip(published))
    {
        assert_eq!(gpu.index, index);
        assert_eq!(gpu.bdf, format!("{bus}:00.0"));
        assert_eq!(gpu.numa_node, node, "{}", gpu.bdf);
        assert_eq!((gpu.hive.1, gpu.hive.2), (gpu.index, 8), "{}", gpu.bdf);
        assert_eq!(gpu.partitions.len(), 1);
        let dax = report
            .dax
            .iter()
            .find(|dax| dax.region == gpu.partitions[0].range);
        assert_eq!(dax.map(|dax| dax.target_node), Some(target));

        let mut links: Vec<(u32, u32, u32)> = gpu.links.clone();
        links.sort_unstable();
        let from = |(a, b, count): &(u32, u32, u32)| match gpu.index {
            index if index == *a => Some((*b, *count, count * 50_000)),
            index if index == *b => Some((*a, *count, count * 50_000)),
            _ => None,
        };
        let mut wanted: Vec<(u32, u32, u32)> = LINKS.iter().filter_map(from).collect();
        wanted.push((u32::MAX, 1, 36_000));
        wanted.sort_unstable();
        assert_eq!(links, wanted, "{}", gpu.bdf);
    }
}

#[test]
fn guest_two_gpu_ovmf_6_12() {
    two_gpu("ovmf", "6.12");
}

#[test]
fn guest_two_gpu_ovmf_newest() {
    two_gpu("ovmf", "newest");
}

#[test]
fn guest_two_gpu_seabios_6_12() {
    two_gpu("seabios", "6.12");
}

#[test]
fn guest_two_gpu_seabios_newest() {
    two_gpu("seabios", "newest");
}

/// Without bridges the functions are on the root bus and have no node; all else is as under the others.
#[track_caller]
fn two_gpu_qboot(kernel: &str) {
    let report = boot("two-gpu", "qboot", kernel);
    check_hbm(&report, &[(4 * GIB, 1), (4 * GIB, 2)], GIB);
    check_driver(&report.gpus);
    for gpu in &report.gpus {
        check_lspci(gpu, "Express (v2) Root Complex Integrated Endpoint");
    }
    assert_eq!(report.nodes_online, [0, 1, 2]);
    let places: Vec<(&str, i32)> = report
        .gpus
        .iter()
        .map(|gpu| (gpu.bdf.as_str(), gpu.numa_node))
        .collect();
    assert_eq!(places, [("00:02.0", -1), ("00:03.0", -1)]);
}

#[test]
fn guest_two_gpu_qboot_6_12() {
    two_gpu_qboot("6.12");
}

#[test]
fn guest_two_gpu_qboot_newest() {
    two_gpu_qboot("newest");
}

#[test]
fn guest_frontier_node_ovmf_6_12() {
    frontier("ovmf", "6.12");
}

#[test]
fn guest_frontier_node_ovmf_newest() {
    frontier("ovmf", "newest");
}

#[test]
fn guest_frontier_node_seabios_6_12() {
    frontier("seabios", "6.12");
}

#[test]
fn guest_frontier_node_seabios_newest() {
    frontier("seabios", "newest");
}

#[test]
fn guest_partitions_of_a_gpu_without_links() {
    let report = own(r#"
        name = "partitions"
        [[cpu]]
        cpus = 1
        memory = "768MiB"
        [[gpu]]
        hbm = "4GiB"
        partitions = 2
        cpu = 0
    "#);
    check_hbm(&report, &[(2 * GIB, 1), (2 * GIB, 2)], 768 * MIB);
    assert_eq!(report.nodes_online, [0]);
    assert_eq!(report.nodes_possible, [0, 1, 2]);
    assert_eq!(report.srat_initiators, Vec::<u32>::new());
    let [gpu] = &report.gpus[..] else {
        panic!("{:?}", report.gpus);
    };
    assert_eq!(gpu.numa_node, 0);
    assert_eq!(gpu.links, Vec::new());
    assert_eq!((gpu.hive.0, gpu.hive.2), (0, 1));
    assert_eq!(gpu.partitions.len(), 2);
    for (partition, dax) in gpu.partitions.iter().zip(&report.dax) {
        assert_eq!(partition.range, dax.region);
        assert_eq!(i32::try_from(partition.pxm).unwrap(), dax.target_node);
        // Its neighbour that is online is the CPUs' node.
        assert_eq!(dax.numa_node, 0);
    }
}

#[test]
fn guest_initiators_come_in_the_predicted_order() {
    const MACHINE: &str = r#"
        name = "initiators"
        [[cpu]]
        cpus = 1
        memory = "768MiB"
        [[gpu]]
        id = "a"
        hbm = "2GiB"
        cpu = 0
        generic_initiator = true
        [[gpu]]
        id = "b"
        hbm = "1GiB"
        cpu = 0
        generic_initiator = true
        [[gpu]]
        id = "c"
        hbm = "3GiB"
        cpu = 0
        generic_initiator = true
        [[link]]
        from = "a"
        to = "c"
    "#;
    let report = own(MACHINE);
    let machine = numagpu_topology::parse("initiators", MACHINE).unwrap();
    let plan = numagpu_topology::plan(&machine).unwrap();
    let domain = |name: &String| {
        let mut named = plan
            .domains()
            .filter(|domain| domain.initiator.as_ref() == Some(name));
        named.next().unwrap().pxm
    };
    let predicted: Vec<u32> = plan.initiator_order().iter().map(domain).collect();
    assert_eq!(predicted.len(), 3);
    assert_eq!(report.srat_initiators, predicted);
    // Linux numbers the nodes as the GPUs are numbered, whatever the order of the table.
    check_hbm(&report, &[(2 * GIB, 1), (GIB, 2), (3 * GIB, 3)], 768 * MIB);
    assert_eq!(report.nodes_online, [0, 1, 2, 3]);
    assert_eq!(report.nodes_initiator, [1, 2, 3]);
}

/// A driver binds by ids, so a guest finds those of the description; the other facts hold all the same.
#[test]
fn guest_finds_functions_of_other_ids() {
    let report = own(r#"
        name = "ids"
        [[cpu]]
        cpus = 1
        memory = "768MiB"
        [[gpu]]
        hbm = "2GiB"
        cpu = 0
        hbm_bandwidth_mbs = 1600000
        hbm_latency_ns = 350
        [device]
        vendor = 0x1002
        device = 0x74a0
        class = 0x038000
        queues = 1
        timing = "modelled"
    "#);
    let [gpu] = &report.gpus[..] else {
        panic!("{:?}", report.gpus);
    };
    assert_eq!((gpu.ids, gpu.class), ((0x1002, 0x74a0), 0x03_8000));
    assert_eq!(gpu.clock, "Modelled");
    assert!(gpu.blocks.contains(&("Queue".to_owned(), 1)));
}

#[test]
fn guest_hbm_is_where_the_description_says() {
    let report = own(r#"
        name = "bases"
        [[cpu]]
        cpus = 1
        memory = "768MiB"
        [[gpu]]
        hbm = "2GiB"
        cpu = 0
        base = 0x4_0000_0000
        bus = 0x40
        [[gpu]]
        hbm = "1GiB"
        cpu = 0
        base = 0x1_8000_0000
        [[gpu]]
        hbm = "1GiB"
        cpu = 0
    "#);
    assert_eq!(report.gpus.len(), 3);
    let bases: Vec<u64> = report
        .gpus
        .iter()
        .map(|gpu| gpu.partitions[0].range.base)
        .collect();
    assert_eq!(bases[..2], [0x4_0000_0000, 0x1_8000_0000]);
    assert_eq!(report.gpus[0].bdf, "40:00.0");
    assert_eq!(report.dax.len(), 3);
    for (gpu, size) in report.gpus.iter().zip([2 * GIB, GIB, GIB]) {
        let dax = report
            .dax
            .iter()
            .find(|dax| dax.region.base == gpu.partitions[0].range.base);
        let dax = dax.unwrap_or_else(|| panic!("no dax device of {gpu:?}: {:?}", report.dax));
        assert_eq!(dax.region.size, size);
    }
    let targets: Vec<i32> = report
        .gpus
        .iter()
        .filter_map(|gpu| {
            let base = gpu.partitions[0].range.base;
            let dax = report.dax.iter().find(|dax| dax.region.base == base);
            dax.map(|dax| dax.target_node)
        })
        .collect();
    assert_eq!(targets, [1, 2, 3]);
}

/// SeaBIOS where an OVMF should be stands for every firmware that drops soft-reserved ranges, as OVMF before
/// edk2-stable202605 does.
#[test]
fn guest_under_firmware_that_drops_hbm_is_told_apart() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let seabios = assets().qemu.seabios.unwrap();
    let firmware = seabios.to_string_lossy();
    let ended = Process::run(
        corner.numagpu(&["run", "two-gpu", "--verify", "--firmware", &firmware]),
        GUEST,
    );
    ended.assert_code(1);
    assert_eq!(
        ended.message(),
        "numagpu: the firmware announced none of the 2 soft-reserved ranges: it needs edk2-stable202605 or newer; \
         run `cargo xtask guest`, give --firmware PATH, or use --firmware seabios",
    );
    let (good, all) = facts(&ended.stdout).unwrap();
    assert!(good < all, "{ended}");
    assert!(
        ended.stdout.contains("DIFF E820 soft-reserved entries"),
        "{ended}"
    );
    corner.assert_empty();
}
