//! Boots machines whose HBM is not soft reserved, and compares what Linux found with numbers written down here.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use numagpu_tests::guests::{boot, check_driver, check_lspci, described};
use numagpu_topology::seen::{Report, steps};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// No range is soft reserved, so no dax device is there.
#[track_caller]
fn check_no_soft_reserved(report: &Report) {
    assert_eq!(report.soft_reserved, []);
    assert_eq!(report.dax, []);
    assert_eq!(report.problems, Vec::<String>::new());
}

/// Distances that Linux shows, by online node.
fn distances(report: &Report) -> Vec<Vec<u32>> {
    let nodes = report.nodes.iter();
    nodes.map(|node| node.distances.clone()).collect()
}

/// `numactl -H` of a GH200, as NVIDIA's kernel patch quotes it (lkml 20250106120659.359610-2-bfaccini@nvidia.com): nine
/// nodes, the first with the CPUs, 80 between CPU and GPU nodes and 255 among the latter.
#[track_caller]
fn gh200(firmware: &str, kernel: &str) {
    let report = boot("gh200-480 --small", firmware, kernel);
    check_no_soft_reserved(&report);
    check_driver(&report.gpus);
    assert_eq!(report.nodes_online, (0..9).collect::<Vec<_>>());
    assert_eq!(report.nodes_initiator, (1..9).collect::<Vec<_>>());
    assert_eq!(report.srat_initiators, (1..9).collect::<Vec<_>>());
    let published: Vec<Vec<u32>> = (0..9)
        .map(|from| {
            let to = |to: u32| match (from, to) {
                (a, b) if a == b => 10,
                (0, _) | (_, 0) => 80,
                _ => 255,
            };
            (0..9).map(to).collect()
        })
        .collect();
    assert_eq!(distances(&report), published);
    for node in &report.nodes[1..] {
        assert_eq!((node.mem_total_kib, node.cpus.len()), (0, 0), "{node:?}");
    }
    let [gpu] = &report.gpus[..] else {
        unreachable!("{:?}", report.gpus)
    };
    assert_eq!(gpu.numa_node, 0);
    check_lspci(gpu, include_str!("golden/lspci-bar.txt"));
    let [hbm] = &gpu.partitions[..] else {
        unreachable!("{gpu:?}")
    };
    // What Linux onlines on the real machine's node 1.
    assert_eq!(hbm.range.size, 97_280 * MIB);
    assert_eq!((hbm.pxm, hbm.coherence.as_str()), (1, "Aperture"));
}

#[test]
fn guest_gh200_ovmf_6_12() {
    gh200("ovmf", "6.12");
}

#[test]
fn guest_gh200_seabios_newest() {
    gh200("seabios", "newest");
}

/// `numactl -H` of a quad MI300A (mzank gpu-benchmarks-hip, README): four nodes, each with CPUs and memory, 10 and 32. Its
/// 128 GiB a node are scaled down to 512 MiB.
#[track_caller]
fn mi300a(firmware: &str, kernel: &str) {
    let report = boot("mi300a-x4 --small", firmware, kernel);
    check_no_soft_reserved(&report);
    assert_eq!(report.nodes_online, [0, 1, 2, 3]);
    assert_eq!(report.nodes_initiator, Vec::<u32>::new());
    for (node, seen) in (0u32..).zip(&report.nodes) {
        let mut wanted = [32; 4];
        wanted[node as usize] = 10;
        assert_eq!(
            (&seen.cpus[..], &seen.distances[..]),
            (&[node][..], &wanted[..])
        );
        let bytes = seen.mem_total_kib * 1024;
        assert!(bytes <= 512 * MIB && bytes > 256 * MIB, "{seen:?}");
    }
    // HBM is the page allocator's: all of it counts as the machine's memory.
    assert!(report.mem_total_kib[0] * 1024 > 3 * 512 * MIB);
    assert_eq!(report.gpus.len(), 4);
    for (node, gpu) in (0..).zip(&report.gpus) {
        assert_eq!(gpu.partitions, []);
        if firmware != "qboot" {
            assert_eq!(gpu.numa_node, node, "{}", gpu.bdf);
        }
        // A full mesh of two links each, and no CPU link.
        assert_eq!(gpu.links.len(), 3);
        assert!(
            gpu.links
                .iter()
                .all(|(_, count, mbs)| (*count, *mbs) == (2, 128_000))
        );
        let names: Vec<&str> = gpu.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, steps::UNIFIED);
        assert!(gpu.steps.iter().all(|step| step.ok), "{:?}", gpu.steps);
    }
}

#[test]
fn guest_mi300a_ovmf_newest() {
    mi300a("ovmf", "newest");
}

#[test]
fn guest_mi300a_qboot_6_12() {
    mi300a("qboot", "6.12");
}

/// Every exposure in one machine, with memory nodes, and holes that are not q35's own.
#[test]
fn guest_exposures_live_side_by_side() {
    let report = described(
        r#"
        name = "mixed"
        [[cpu]]
        cpus = 1
        memory = "768MiB"
        [[cpu]]
        cpus = 1
        [[memory]]
        memory = "512MiB"
        cpu = 0
        [[gpu]]
        id = "spm"
        hbm = "4GiB"
        cpu = 0
        generic_initiator = true
        [[gpu]]
        id = "apu"
        exposure = "ram"
        hbm = "768MiB"
        cpu = 1
        [[gpu]]
        id = "bar"
        exposure = "bar"
        hbm = "6GiB"
        partitions = 2
        domains = 3
        cpu = 1
        [[gpu]]
        id = "pcie"
        exposure = "private"
        hbm = "4GiB"
        cpu = 0
        [[link]]
        from = "spm"
        to = "bar"
        bandwidth_mbs = 100000
        [[link]]
        from = "bar"
        to = "pcie"
        [limits]
        phys_bits = 44
        pci_hole = "1GiB"
        amd_hole = false
        "#,
        &["--kernel", "newest"],
    );
    assert_eq!(report.problems, Vec::<String>::new());
    // Linux numbers Generic Initiators before memory: the GPUs' nodes come before the memory node.
    assert_eq!(report.nodes_online, (0..7).collect::<Vec<_>>());
    assert_eq!(report.nodes_initiator, [2, 3, 4, 5]);
    let sizes: Vec<u64> = report
        .nodes
        .iter()
        .map(|node| node.mem_total_kib / 1024)
        .collect();
    assert!(sizes[1] > 500 && sizes[6] > 400, "{sizes:?}");
    assert_eq!(sizes[2..6], [0; 4]);
    assert_eq!(report.soft_reserved.len(), 1);
    assert_eq!(report.soft_reserved[0].size, 4 * GIB);
    // RAM of 2 GiB, of which 1 GiB is below the hole.
    assert!(
        report
            .usable
            .iter()
            .all(|range| range.end() <= GIB || range.base >= 4 * GIB)
    );
    let partitions: Vec<usize> = report.gpus.iter().map(|gpu| gpu.partitions.len()).collect();
    assert_eq!(partitions, [1, 0, 2, 1]);
    assert_eq!(report.gpus[3].partitions[0].pxm, u32::MAX);
    for gpu in &report.gpus {
        assert!(gpu.steps.iter().all(|step| step.ok), "{gpu:?}");
        check_lspci(gpu, include_str!("golden/lspci-spm.txt"));
    }
    check_lspci(&report.gpus[3], include_str!("golden/lspci-private.txt"));
}

/// HBM side by side: qboot and SeaBIOS keep ranges apart that touch, and each has its dax device.
#[test]
fn guest_ranges_that_touch_stay_apart_without_ovmf() {
    const TOUCHING: &str = r#"
        name = "touching"
        [[cpu]]
        cpus = 1
        memory = "768MiB"
        [[gpu]]
        hbm = "2GiB"
        cpu = 0
        [[gpu]]
        hbm = "2GiB"
        cpu = 0
        [placement]
        gap = 0
    "#;
    let report = described(TOUCHING, &["--firmware", "qboot"]);
    assert_eq!(report.soft_reserved.len(), 2);
    assert_eq!(report.soft_reserved[0].end(), report.soft_reserved[1].base);
    check_driver(&report.gpus);
    // Under OVMF the two become one, as predicted; with an HMAT each still has its dax device.
    let known = TOUCHING.replace(
        "cpu = 0",
        "cpu = 0\nhbm_latency_ns = 300\ngeneric_initiator = true",
    );
    let report = described(&known, &["--firmware", "ovmf"]);
    assert_eq!(report.soft_reserved.len(), 1);
    assert_eq!(report.dax.len(), 2);
    let targets: Vec<i32> = report.dax.iter().map(|dax| dax.target_node).collect();
    assert_eq!(targets, [1, 2]);
    check_driver(&report.gpus);
}

/// Without an HMAT, OVMF's one entry of both becomes one dax device: the plan predicts and warns of it, the guest has it.
#[test]
fn guest_ranges_that_ovmf_merges_are_predicted() {
    let turn = numagpu_tests::programs::Turn::wait();
    let corner = numagpu_tests::corner::Corner::new();
    let text = "name = \"merged\"\n[[cpu]]\ncpus = 1\nmemory = \"768MiB\"\n\
        [[gpu]]\nhbm = \"2GiB\"\ncpu = 0\n[[gpu]]\nhbm = \"2GiB\"\ncpu = 0\n[placement]\ngap = 0\n";
    let path = corner.write("machine.toml", text);
    let run = corner.numagpu(&["run", &path.to_string_lossy(), "--verify"]);
    let ended = numagpu_tests::process::Process::run(run, numagpu_tests::corner::GUEST);
    drop(turn);
    // The driver of each GPU looks for a dax device of its own, and there is none.
    ended.assert_code(1);
    let fact = |start: &str| {
        let mut lines = ended.stdout.lines();
        lines
            .find(|line| line.get(5..).is_some_and(|fact| fact.starts_with(start)))
            .unwrap()
            .to_owned()
    };
    for fact in [
        fact("E820 soft-reserved entries"),
        fact("dax devices"),
        fact("dax of gpu0 partition 0"),
    ] {
        assert!(fact.starts_with("ok "), "{fact}");
    }
    assert!(fact("dax of gpu0 partition 0").contains("4 GiB target node 1"));
    assert!(fact("gpu0 CPU writes and reads HBM").starts_with("DIFF"));
    assert!(ended.stderr.contains(
        "touch at 0x180000000, and Linux makes one dax device of both, on the first one's node"
    ));
}
