//! HBM under VFIO: a guest with an IOMMU passes functions on, and they reach HBM by DMA where its container has it.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use numagpu_tests::corner::{Corner, GUEST};
use numagpu_tests::process::Process;
use numagpu_tests::programs::Turn;
use numagpu_topology::seen::{Report, steps};

/// QEMU's arguments: an IOMMU that tells the GPUs' servers of every map, and a device with a DMA engine.
const QEMU: [&str; 6] = [
    "-machine",
    "kernel-irqchip=off",
    "-device",
    "intel-iommu,intremap=off,caching-mode=on",
    "-device",
    "edu,bus=pcie.0",
];

#[track_caller]
fn passthrough(kernel: &str) {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let report = corner.file("report.json");
    let path = report.to_string_lossy();
    let append = "numagpu.vfio intel_iommu=on vfio_iommu_type1.allow_unsafe_interrupts=1";
    let mut arguments = vec!["run", "two-gpu", "--kernel", kernel, "--append", append];
    arguments.extend(["--report", &path, "--"]);
    arguments.extend(QEMU);
    let ended = Process::run(corner.numagpu(&arguments), GUEST);
    ended.assert_code(0);
    let report: Report = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let bad = report.passthrough.iter().find(|step| !step.ok);
    assert_eq!(bad, None);
    let names: Vec<&str> = report
        .passthrough
        .iter()
        .map(|step| step.name.as_str())
        .collect();
    assert_eq!(names, steps::passthrough::ALL);
    // The kernel itself has stopped the device at the address that was unmapped.
    let stopped = report
        .passthrough
        .iter()
        .find(|step| step.name == steps::passthrough::EDU_UNMAPPED);
    let detail = &stopped.unwrap().detail;
    assert!(
        detail.contains("DMA Write") && detail.contains("fault addr"),
        "{detail}"
    );
    corner.assert_empty();
}

#[test]
fn guest_passes_functions_on_6_12() {
    passthrough("6.12");
}

#[test]
fn guest_passes_functions_on_newest() {
    passthrough("newest");
}
