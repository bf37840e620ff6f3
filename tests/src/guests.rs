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

/// What lspci says of a space that is not as it should be.
const COMPLAINTS: [&str; 12] = [
    "<access denied>",
    "!!!",
    "Unknown",
    "unknown",
    "<unassigned>",
    "<ignored>",
    "[virtual]",
    "[disabled]",
    "<?>",
    "<chain",
    "broken",
    "invalid",
];

/// A line of lspci without what differs from boot to boot and from place to place.
fn masked(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut masked = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let before = |back: usize| index.checked_sub(back).and_then(|at| words.get(at));
        let of_an_address = before(1) == Some(&"at") && before(2) == Some(&"Memory");
        let of_a_place = matches!(
            (before(2), before(1)),
            (Some(&"NUMA"), Some(&"node:")) | (Some(&"IOMMU"), Some(&"group:"))
        );
        masked.push(match of_an_address || of_a_place {
            true => "*",
            false => word,
        });
    }
    masked.join(" ")
}

/// What lspci has to print in the guest: nothing but what is right, and every line of a golden text in its order. Versions
/// of lspci print some facts beside those.
///
/// # Panics
/// If it does not.
#[track_caller]
pub fn check_lspci(gpu: &GpuSeen, golden: &str) {
    let text = &gpu.lspci;
    for complaint in COMPLAINTS {
        assert!(!text.contains(complaint), "{complaint}:\n{text}");
    }
    let mut lines = text.lines();
    // Its own address differs from place to place.
    let first = lines.next().and_then(|line| line.split_once(' '));
    let (bdf, rest) = first.unwrap_or_default();
    assert_eq!(bdf, gpu.bdf, "{text}");
    let seen: Vec<String> = std::iter::once(rest).chain(lines).map(masked).collect();
    let mut left = seen.iter();
    for fact in golden.lines().map(masked) {
        let found = left.any(|line| line.contains(&fact));
        assert!(
            found,
            "no {fact:?} where it should be in\n{}",
            seen.join("\n")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_place_decides_is_masked_and_nothing_else() {
        for (line, wanted) in [
            ("\tNUMA node: 3", "NUMA node: *"),
            ("\tIOMMU group: 12", "IOMMU group: *"),
            (
                "Region 0: Memory at fe800000 (32-bit) [size=64K]",
                "Region 0: Memory at * (32-bit) [size=64K]",
            ),
            ("LnkCap:\tPort #0,  Width x16", "LnkCap: Port #0, Width x16"),
        ] {
            assert_eq!(masked(line), wanted);
        }
    }

    #[test]
    #[should_panic(expected = "no \"Region 1: Memory at *\" where it should be")]
    fn a_line_that_lspci_does_not_print_is_missed() {
        let gpu = GpuSeen {
            bdf: "01:00.0".to_owned(),
            lspci: "01:00.0 1200: 1234:6770\n\tRegion 0: Memory at 0".to_owned(),
            ..GpuSeen::default()
        };
        check_lspci(&gpu, "1200: 1234:6770\nRegion 0: Memory at 0");
        check_lspci(&gpu, "1200: 1234:6770\nRegion 1: Memory at 0");
    }

    #[test]
    #[should_panic(expected = "[disabled]")]
    fn a_complaint_of_lspci_is_seen() {
        let gpu = GpuSeen {
            lspci: "Region 0: Memory at 0 [disabled]".to_owned(),
            ..GpuSeen::default()
        };
        check_lspci(&gpu, "");
    }
}
