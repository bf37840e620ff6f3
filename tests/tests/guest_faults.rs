//! Faults through a whole stack: a scenario makes them happen, and a guest's driver meets each as docs/faults.md says.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeSet;

use numagpu_tests::corner::{Corner, GUEST};
use numagpu_tests::process::Process;
use numagpu_tests::programs::Turn;
use numagpu_topology::seen::{Report, steps};
use numagpu_vmm_glue::control::Fault;
use numagpu_vmm_glue::scenario::Scenario;

const SCENARIO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults.toml");

#[test]
fn guest_meets_every_fault_as_it_is_documented() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let report = corner.file("report.json");
    let path = report.to_string_lossy();
    let ended = Process::run(
        corner.numagpu(&[
            "run",
            "two-gpu",
            "--scenario",
            SCENARIO,
            "--append",
            "numagpu.faults",
            "--report",
            &path,
        ]),
        GUEST,
    );
    ended.assert_code(0);
    let report: Report = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!(report.problems, Vec::<String>::new());
    let [first, second] = &report.gpus[..] else {
        unreachable!("{:?}", report.gpus)
    };
    let bad: Vec<_> = first.steps.iter().filter(|step| !step.ok).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    let names: Vec<&str> = first.steps.iter().map(|step| step.name.as_str()).collect();
    assert_eq!(names, steps::faults::ALL);
    assert_eq!(second.steps, []);
    corner.assert_empty();
}

/// What the guest is shown is all that there is.
#[test]
fn the_scenario_of_the_guest_has_every_fault() {
    let text = std::fs::read_to_string(SCENARIO).unwrap();
    let scenario = Scenario::read("faults.toml", &text).unwrap();
    let played: BTreeSet<String> = scenario
        .faults()
        .iter()
        .map(|planned| planned.fault.kind())
        .collect();
    let all: BTreeSet<String> = Fault::EXAMPLES.iter().map(Fault::kind).collect();
    assert_eq!(played, all);
    for kind in &all {
        assert!(steps::faults::ALL.contains(&kind.as_str()), "{kind}");
    }
}
