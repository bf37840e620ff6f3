//! ACPI's own compiler reads the tables of every preset and of a thousand other machines, and writes the same again.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::Path;
use std::process::Command;

use numagpu_tests::numbers::Numbers;
use numagpu_topology::acpi::tables;
use numagpu_topology::{Plan, parse, plan, preset};

/// A machine of 1 to 4 CPU nodes and 0 to 6 GPUs with all that a description can say.
fn machine(n: &mut Numbers) -> String {
    let mut text = "name = \"random\"\n[limits]\nphys_bits = 46\n".to_owned();
    let cpus = 1 + n.below(4);
    for _ in 0..cpus {
        text += &format!(
            "[[cpu]]\ncpus = {}\nmemory = \"{}MiB\"\n",
            1 + n.below(80),
            2 * (1 + n.below(4096))
        );
        if n.below(2) == 0 {
            text += &format!(
                "latency_ns = {}\nbandwidth_mbs = {}\n",
                n.below(500),
                n.below(1_000_000)
            );
        }
    }
    let gpus = n.below(7);
    for _ in 0..gpus {
        let partitions = 1 + n.below(8);
        let size = partitions * 2 * (1 + n.below(40_000));
        text += &format!(
            "[[gpu]]\nhbm = \"{size}MiB\"\npartitions = {partitions}\ncpu = {}\n",
            n.below(cpus)
        );
        if n.below(4) == 0 {
            text += "exposure = \"bar\"\n";
        } else if n.below(2) == 0 {
            text += "generic_initiator = true\n";
        }
        if n.below(2) == 0 {
            text += &format!(
                "hbm_latency_ns = {}\nhbm_bandwidth_mbs = {}\n",
                n.below(1000),
                n.below(6_000_000)
            );
        }
    }
    for to in 1..gpus {
        let (from, mbs) = (n.below(to), n.below(500_000));
        text +=
            &format!("[[link]]\nfrom = \"gpu{from}\"\nto = \"gpu{to}\"\nbandwidth_mbs = {mbs}\n");
    }
    text
}

fn planned(name: &str, text: &str) -> Plan {
    plan(&parse(name, text).unwrap()).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn iasl(directory: &Path, arguments: &[String]) -> String {
    let output = Command::new("iasl")
        .current_dir(directory)
        .args(arguments)
        .output()
        .expect("no iasl: install acpica-tools; `cargo xtask test` does");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "iasl {arguments:?}: {text}");
    text
}

/// Disassembles and compiles the tables of these machines, and compares.
fn round_trip(plans: &[Plan]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let mut names = Vec::new();
    for (number, plan) in plans.iter().enumerate() {
        for table in tables(plan) {
            let name = format!("{}-{number}", table.signature.to_lowercase());
            fs::write(path.join(format!("{name}.aml")), &table.bytes).unwrap();
            names.push((name, table));
        }
    }
    // The compiler loads all definition blocks that it is given into one namespace, so those come one at a time.
    let (blocks, data): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|(_, table)| table.signature == "SSDT");
    for names in data.chunks(200).chain(blocks.chunks(1)) {
        let files = |extension: &str| {
            names
                .iter()
                .map(|(name, _)| format!("{name}.{extension}"))
                .collect::<Vec<_>>()
        };
        let text = iasl(path, &[vec!["-d".to_owned()], files("aml")].concat());
        assert!(!text.contains("rror") && !text.contains("arning"), "{text}");
        for (name, _) in names {
            let disassembled = fs::read_to_string(path.join(format!("{name}.dsl"))).unwrap();
            let wrong = disassembled.lines().find(|line| {
                ["rror", "arning", "nvalid", "Incorrect", "Unknown"]
                    .iter()
                    .any(|word| line.contains(word))
            });
            assert_eq!(wrong, None, "{name}: {disassembled}");
        }
        for name in files("aml") {
            fs::remove_file(path.join(name)).unwrap();
        }
        let text = iasl(path, &files("dsl"));
        let clean = "Compilation successful. 0 Errors, 0 Warnings, 0 Remarks";
        assert!(text.contains(clean), "{text}");
        for (name, table) in names {
            let mut compiled = fs::read(path.join(format!("{name}.aml"))).unwrap();
            let mut ours = table.bytes.clone();
            // The compiler puts its own name and version there, which changes the checksum.
            for bytes in [&mut compiled, &mut ours] {
                bytes[9] = 0;
                bytes[28..36].fill(0);
            }
            assert_eq!(compiled, ours, "{name}");
        }
    }
}

#[test]
fn presets_survive_the_acpi_compiler() {
    let plans: Vec<Plan> = preset::ALL
        .iter()
        .map(|preset| planned(preset.name, preset.source))
        .collect();
    round_trip(&plans);
}

#[test]
fn a_thousand_machines_survive_the_acpi_compiler() {
    let mut numbers = Numbers(1);
    let plans: Vec<Plan> = (0..1000)
        .map(|_| planned("random", &machine(&mut numbers)))
        .collect();
    assert!(
        plans.iter().any(|plan| plan.nodes.len() > 40)
            && plans.iter().any(|plan| plan.gpus.is_empty())
            && plans
                .iter()
                .any(|plan| plan.gpus.iter().any(|gpu| gpu.aperture.is_some()))
    );
    round_trip(&plans);
}
