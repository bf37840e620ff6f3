//! Boots machines, and what every guest has to say.

use numagpu_topology::ranges::Range;
use numagpu_topology::seen::{GpuSeen, Report, steps};

use crate::corner::Corner;
use crate::programs::{Turn, assets};

/// Boots a machine, a preset's name or a file with further arguments behind it, under one firmware and kernel, verified by
/// `numagpu` itself.
///
/// # Panics
/// If it does not come up as planned.
#[track_caller]
pub fn boot(machine: &str, firmware: &str, kernel: &str) -> Report {
    let turn = Turn::wait();
    let corner = Corner::new();
    let mut words = machine.split(' ');
    let machine = words.next().unwrap_or_default();
    let mut arguments = vec!["--firmware", firmware, "--kernel", kernel];
    arguments.extend(words);
    let (report, ended) = corner.verified(machine, &arguments);
    drop(turn);
    let release = assets().kernel(kernel).unwrap().release.clone();
    assert_eq!(report.kernel, release);
    let named = match firmware {
        "ovmf" => "OVMF",
        "qboot" => "qboot",
        _ => "SeaBIOS with memmap= arguments",
    };
    let title = ended.stdout.lines().next().unwrap();
    assert!(
        title.ends_with(&format!("on Linux {release}, {named}")),
        "{title}"
    );
    // The kernel needs to be told of soft-reserved HBM by SeaBIOS's command line only.
    assert_eq!(
        report.command_line.contains("memmap="),
        firmware == "seabios" && !report.soft_reserved.is_empty()
    );
    assert_eq!(report.problems, Vec::<String>::new());
    report
}

/// What every machine's guest has to say: HBM is soft reserved, a dax device that programs map, and never RAM.
/// `hbm` has the size and node of each range, by node; `ram` the bytes of the machine's RAM.
///
/// # Panics
/// If it is otherwise.
#[track_caller]
pub fn check_hbm(report: &Report, hbm: &[(u64, u32)], ram: u64) {
    assert_eq!(report.soft_reserved.len(), hbm.len());
    assert_eq!(report.dax.len(), hbm.len());
    let mut dax = report.dax.clone();
    dax.sort_by_key(|dax| dax.target_node);
    for (dax, (size, node)) in dax.iter().zip(hbm) {
        assert_eq!((dax.region.size, dax.size), (*size, *size), "{dax:?}");
        assert_eq!(dax.target_node, i32::try_from(*node).unwrap(), "{dax:?}");
        assert_eq!(dax.driver, "device_dax", "{dax:?}");
        assert!(report.soft_reserved.contains(&dax.region), "{dax:?}");
    }
    let mut regions: Vec<_> = report.soft_reserved.clone();
    regions.sort_by_key(|range| range.base);
    for pair in regions.windows(2) {
        // Firmware merges ranges that touch.
        assert!(pair[0].base + pair[0].size < pair[1].base, "{pair:x?}");
    }
    for usable in &report.usable {
        let overlaps = |hbm: &&Range| {
            usable.base < hbm.base + hbm.size && hbm.base < usable.base + usable.size
        };
        assert_eq!(regions.iter().find(overlaps), None, "{usable:x?}");
    }
    assert_eq!(report.mem_total_kib.len(), 3);
    for total in &report.mem_total_kib {
        let bytes = total * 1024;
        assert!(
            bytes < ram && bytes > ram / 2,
            "MemTotal {total} KiB of {ram}"
        );
    }
}

/// What the driver of every GPU with HBM has to have done.
///
/// # Panics
/// If it has not.
#[track_caller]
pub fn check_driver(gpus: &[GpuSeen]) {
    for gpu in gpus {
        let names: Vec<&str> = gpu.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(names, steps::ALL);
        assert_eq!(gpu.steps.iter().find(|step| !step.ok), None, "{}", gpu.bdf);
    }
}

/// Boots a machine of the test's own, whose GPUs all have HBM.
///
/// # Panics
/// If it does not come up as planned.
#[track_caller]
pub fn own(text: &str) -> Report {
    let report = described(text, &[]);
    assert_eq!(report.problems, Vec::<String>::new());
    check_driver(&report.gpus);
    report
}

/// Boots a machine of the test's own with these arguments.
///
/// # Panics
/// If it does not come up as planned.
#[track_caller]
pub fn described(text: &str, arguments: &[&str]) -> Report {
    let turn = Turn::wait();
    let corner = Corner::new();
    let path = corner.write("machine.toml", text);
    let (report, _) = corner.verified(&path.to_string_lossy(), arguments);
    drop(turn);
    report
}
