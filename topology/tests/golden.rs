//! Every output of every preset, byte for byte.
//!
//! The layout is an interface: a guest remembers its addresses, a script its node numbers. A change here is a change
//! for users. `NUMAGPU_BLESS=1` writes the files anew; the difference belongs into the commit that causes it.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::fs;
use std::path::PathBuf;

use numagpu_topology::cloud_hypervisor;
use numagpu_topology::linux::{self, BootPath};
use numagpu_topology::qemu::{self, Host};
use numagpu_topology::{Plan, parse, plan, preset, render};

fn command_line(plan: &Plan, boot: BootPath) -> String {
    let host = Host::placeholders(plan, boot, "/run/numagpu", "/dev/shm/numagpu");
    let arguments = qemu::arguments(plan, &host).unwrap();
    qemu::shell("qemu-system-x86_64", &arguments)
}

/// The command line with its warnings, or the error.
fn cloud_hypervisor(plan: &Plan) -> String {
    let host = cloud_hypervisor::Host::placeholders(plan, "/run/numagpu");
    match cloud_hypervisor::command_line(plan, &host) {
        Ok(line) => {
            let warnings = line
                .warnings
                .iter()
                .map(|text| format!("# warning: {text}\n"));
            let warnings: String = warnings.collect();
            qemu::shell("cloud-hypervisor", &line.arguments) + &warnings
        }
        Err(error) => format!("# error: {error}\n"),
    }
}

fn kernel_arguments(plan: &Plan) -> String {
    [BootPath::Ovmf, BootPath::SeaBios]
        .map(|boot| {
            let arguments = linux::command_line(boot, plan.guest.driver, &plan.hbm_ranges());
            format!("{boot:?}: {}\n", arguments.join(" "))
        })
        .concat()
}

/// Presets whose pictures are kept too: one of each shape. Those of the others are as long as they are alike.
const PICTURED: [&str; 6] = [
    "two-gpu",
    "frontier-node",
    "mi300a-x4",
    "mi300x-x8",
    "gh200-480",
    "xeon-max-flat",
];

/// Output by the ending of its file.
fn outputs(plan: &Plan) -> Vec<(&'static str, String)> {
    let mut all = vec![
        ("text", render::text(plan, BootPath::Ovmf)),
        ("json", render::json(plan).unwrap()),
        ("e820", render::e820(plan)),
        ("qemu", command_line(plan, BootPath::Ovmf)),
        ("seabios.qemu", command_line(plan, BootPath::SeaBios)),
        ("qboot.qemu", command_line(plan, BootPath::Qboot)),
        ("cloud-hypervisor", cloud_hypervisor(plan)),
        ("cmdline", kernel_arguments(plan)),
    ];
    if PICTURED.contains(&plan.name.as_str()) {
        all.extend([
            ("svg", render::svg(plan)),
            ("dot", render::dot(plan)),
            ("hwloc", render::hwloc(plan)),
        ]);
    }
    all
}

/// The first line in which the two differ, or `None` if they are the same.
fn first_difference(name: &str, golden: &str, now: &str) -> Option<String> {
    if golden == now {
        return None;
    }
    let (mut old, mut new) = (golden.lines(), now.lines());
    let mut line = 0;
    let (golden, now) = loop {
        line += 1;
        match (old.next(), new.next()) {
            (Some(a), Some(b)) if a == b => {}
            (None, None) => break ("the same lines", "but another line end"),
            (a, b) => break (a.unwrap_or("(ends here)"), b.unwrap_or("(ends here)")),
        }
    };
    Some(format!(
        "{name}, line {line}:\n  golden: {golden}\n  now:    {now}\n"
    ))
}

#[test]
fn presets_give_the_same_bytes_as_ever() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let bless = std::env::var_os("NUMAGPU_BLESS").is_some_and(|value| value == "1");
    let mut differences = String::new();
    let mut expected = Vec::new();
    for preset in preset::ALL {
        let plan = plan(&parse(preset.name, preset.source).unwrap()).unwrap();
        for (ending, now) in outputs(&plan) {
            let name = format!("{}.{ending}", preset.name);
            let path = folder.join(&name);
            if bless {
                fs::write(&path, &now).unwrap();
            }
            let golden = fs::read_to_string(&path).unwrap_or_default();
            differences.extend(first_difference(&name, &golden, &now));
            expected.push(name);
        }
    }
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if !expected.contains(&name) {
            differences += &format!("{name}: no preset has this output\n");
        }
    }
    assert!(
        differences.is_empty(),
        "outputs differ from topology/tests/golden:\n{differences}If that is meant, run this test with \
         NUMAGPU_BLESS=1 and commit the files, with the reason."
    );
}

#[test]
fn a_difference_is_told_by_its_first_line() {
    assert_eq!(first_difference("f", "a\nb\n", "a\nb\n"), None);
    assert_eq!(
        first_difference("f", "a\nb\n", "a\nc\n").unwrap(),
        "f, line 2:\n  golden: b\n  now:    c\n"
    );
    assert_eq!(
        first_difference("f", "a\n", "a\nc\n").unwrap(),
        "f, line 2:\n  golden: (ends here)\n  now:    c\n"
    );
    assert!(first_difference("f", "a\n", "a").is_some());
}
