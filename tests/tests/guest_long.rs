//! Boots that are too long for every day: `cargo xtask test --all`.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use numagpu_tests::guests::{boot, check_driver, check_hbm, described};
use numagpu_topology::machine::Exposure;
use numagpu_topology::{parse, plan, preset};

const GIB: u64 = 1 << 30;

/// Kernel 6.1 lists dax devices that programs map by itself.
#[test]
fn guest_two_gpu_on_6_1_under_every_firmware() {
    for firmware in ["ovmf", "seabios", "qboot"] {
        let report = boot("two-gpu", firmware, "6.1");
        check_hbm(&report, &[(4 * GIB, 1), (4 * GIB, 2)], GIB);
        check_driver(&report.gpus);
    }
}

/// Every preset comes up as planned, on the kernel that turn brings.
#[test]
fn guest_every_preset_boots_small() {
    let kernels = ["6.12", "newest", "6.1"];
    for (preset, kernel) in preset::ALL.iter().zip(kernels.iter().cycle()) {
        let machine = parse(preset.name, preset.source).unwrap();
        let planned = plan(&machine.small()).unwrap();
        let hbm: u64 = planned.hbm().map(|hbm| hbm.size).sum();
        // Kernel 6.1 has page structures for every 4 KiB of its dax devices: 1 GiB for 64 GiB.
        let kernel = if hbm > 16 * GIB { "6.12" } else { kernel };
        let report = boot(&format!("{} --small", preset.name), "ovmf", kernel);
        assert_eq!(report.gpus.len(), planned.gpus.len(), "{}", preset.name);
        let ram = |gpu: &&numagpu_topology::plan::Gpu| gpu.exposure == Exposure::Ram;
        if !planned.gpus.iter().any(|gpu| ram(&gpu)) {
            check_driver(&report.gpus);
        }
    }
}

const EIGHT: &str = r#"
    name = "eight"
    [[cpu]]
    cpus = 2
    memory = "1GiB"
    [limits]
    phys_bits = 48
"#;

/// Eight GPUs of 192 GiB: 1.5 TiB, which AMD's reserved range moves behind 1 TiB.
#[test]
fn guest_eight_gpus_of_192_gib_are_behind_one_tib() {
    let gpus = "[[gpu]]\nhbm = \"192GiB\"\ncpu = 0\n".repeat(8);
    for firmware in ["ovmf", "seabios"] {
        let report = described(&format!("{EIGHT}{gpus}"), &["--firmware", firmware]);
        let hbm: Vec<(u64, u32)> = (1..=8).map(|node| (192 * GIB, node)).collect();
        check_hbm(&report, &hbm, GIB);
        check_driver(&report.gpus);
        assert!(
            report
                .soft_reserved
                .iter()
                .all(|range| range.base >= 1 << 40)
        );
    }
}

/// Two GPUs in NPS4: four ranges and nodes each.
#[test]
fn guest_nps4_has_a_node_for_each_partition() {
    let gpus = "[[gpu]]\nhbm = \"192GiB\"\npartitions = 4\ncpu = 0\n".repeat(2);
    let report = described(&format!("{EIGHT}{gpus}"), &["--kernel", "newest"]);
    let hbm: Vec<(u64, u32)> = (1..=8).map(|node| (48 * GIB, node)).collect();
    check_hbm(&report, &hbm, GIB);
    check_driver(&report.gpus);
    for gpu in &report.gpus {
        assert_eq!(gpu.partitions.len(), 4);
    }
}

/// Frontier's node as small as it is with a kernel and a firmware that CI does not have.
#[test]
fn guest_frontier_under_qboot() {
    let report = boot("frontier-node", "qboot", "newest");
    let hbm: Vec<(u64, u32)> = (4..=11).map(|node| (64 * GIB, node)).collect();
    check_hbm(&report, &hbm, 2 * GIB);
    check_driver(&report.gpus);
}
