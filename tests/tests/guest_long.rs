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
#[track_caller]
fn on_6_1(firmware: &str) {
    let report = boot("two-gpu", firmware, "6.1");
    check_hbm(&report, &[(4 * GIB, 1), (4 * GIB, 2)], GIB);
    check_driver(&report.gpus);
}

#[test]
fn guest_two_gpu_on_6_1_under_ovmf() {
    on_6_1("ovmf");
}

#[test]
fn guest_two_gpu_on_6_1_under_seabios() {
    on_6_1("seabios");
}

#[test]
fn guest_two_gpu_on_6_1_under_qboot() {
    on_6_1("qboot");
}

/// A preset comes up as planned.
#[track_caller]
fn preset_boots(name: &str, firmware: &str, kernel: &str) {
    let preset = preset::find(name).unwrap();
    let machine = parse(preset.name, preset.source).unwrap();
    let planned = plan(&machine.small()).unwrap();
    let report = boot(&format!("{name} --small"), firmware, kernel);
    assert_eq!(report.gpus.len(), planned.gpus.len());
    let is_ram = |gpu: &numagpu_topology::plan::Gpu| gpu.exposure == Exposure::Ram;
    if !planned.gpus.iter().any(is_ram) {
        check_driver(&report.gpus);
    }
}

/// A test for each preset, so that each has its time; kernels and firmwares take turns. Kernel 6.1 has page structures for
/// every 4 KiB of its dax devices, 1 GiB for 64 GiB, so it gets machines without much soft-reserved HBM.
macro_rules! presets {
    ($($test:ident $name:literal $firmware:literal $kernel:literal;)*) => {
        $(
            #[test]
            fn $test() {
                preset_boots($name, $firmware, $kernel);
            }
        )*

        #[test]
        fn every_preset_is_booted() {
            let booted = [$($name),*];
            for preset in preset::ALL {
                assert!(booted.contains(&preset.name), "{}", preset.name);
            }
        }
    };
}

presets! {
    guest_preset_two_gpu "two-gpu" "ovmf" "6.1";
    guest_preset_frontier_node "frontier-node" "seabios" "newest";
    guest_preset_frontier "frontier" "ovmf" "6.12";
    guest_preset_mi300a_x4 "mi300a-x4" "seabios" "6.1";
    guest_preset_mi300x_x8 "mi300x-x8" "ovmf" "6.1";
    guest_preset_mi325x_x8 "mi325x-x8" "seabios" "6.12";
    guest_preset_mi355x_x8 "mi355x-x8" "ovmf" "newest";
    guest_preset_gh200_480 "gh200-480" "qboot" "6.1";
    guest_preset_gh200_480_slit11 "gh200-480-slit11" "ovmf" "newest";
    guest_preset_gh200_x4 "gh200-x4" "ovmf" "6.1";
    guest_preset_gb200_nvl4 "gb200-nvl4" "qboot" "newest";
    guest_preset_gb300_nvl4 "gb300-nvl4" "ovmf" "6.12";
    guest_preset_xeon_max_flat "xeon-max-flat" "ovmf" "6.1";
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
