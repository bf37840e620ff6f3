//! What `numagpu plan` and `numagpu serve` make of exposures, ways of booting and backings.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::fs;
use std::path::Path;

use numagpu_tests::corner::{COMMAND, Corner};
use numagpu_tests::process::Process;
use numagpu_topology::preset;
use rustix::process::Signal;
use serde_json::Value;

fn output(arguments: &[&str]) -> String {
    let ended = Corner::new().command(arguments);
    ended.assert_code(0);
    ended.stdout
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&output(arguments)).unwrap()
}

/// Text and file of a binary memory map say the same.
#[test]
fn memory_maps_come_as_bytes_and_as_hexadecimal() {
    for (format, entry) in [("fw-cfg-e820", 20), ("pvh-memmap", 24), ("efi-memmap", 40)] {
        let corner = Corner::new();
        let path = corner.file("map");
        let to = path.to_string_lossy();
        corner
            .command(&["plan", "frontier-node", "--format", format, "-o", &to])
            .assert_code(0);
        let bytes = fs::read(&path).unwrap();
        assert!(
            bytes.len() > 9 * entry && bytes.len().is_multiple_of(entry),
            "{format}"
        );
        let text = output(&["plan", "frontier-node", "--format", format]);
        let hex = text.lines().flat_map(|line| line.split(' ').skip(1));
        let read: Vec<u8> = hex
            .map(|byte| u8::from_str_radix(byte, 16).unwrap())
            .collect();
        assert_eq!(read, bytes, "{format}");
    }
}

#[test]
fn a_prediction_says_what_each_way_of_booting_makes_of_it() {
    let predicted =
        |boot: &str| json(&["plan", "two-gpu", "--format", "prediction", "--boot", boot]);
    for boot in ["ovmf", "seabios", "direct"] {
        let seen = predicted(boot);
        assert_eq!(seen["boot"], boot);
        assert_eq!(seen["online"], serde_json::json!([0, 1, 2]));
        assert_eq!(seen["functions"][1]["bdf"], "21:00.0");
        assert_eq!(seen["functions"][1]["node"], 2);
        assert_eq!(seen["warnings"], serde_json::json!([]));
        assert_eq!(seen["dax"][1]["target_node"], 2);
        assert_eq!(seen["dax"][1]["range"]["base"], 0x2_8000_0000_u64);
    }
    let qboot = predicted("qboot");
    assert_eq!(qboot["functions"][0]["bdf"], "00:02.0");
    assert!(qboot["functions"][0]["node"].is_null());
    assert_eq!(
        qboot["warnings"][0]["what"],
        "2 PCI function(s) on the root bus, without a node"
    );
}

/// QEMU writes its own tables: a command line for direct boot would be another machine.
#[test]
fn direct_boot_is_not_qemus() {
    let corner = Corner::new();
    let ended = corner.command(&["plan", "two-gpu", "--format", "qemu", "--boot", "direct"]);
    ended.assert_code(1);
    assert!(
        ended
            .message()
            .contains("use --boot ovmf, seabios or qboot"),
        "{ended}"
    );
}

#[test]
fn small_machines_keep_their_shape() {
    for preset in preset::ALL {
        let (large, small) = (
            json(&["plan", preset.name, "--format", "json"]),
            json(&["plan", preset.name, "--small", "--format", "json"]),
        );
        assert_eq!(large["slit"], small["slit"], "{}", preset.name);
        let cpus = |plan: &Value| -> usize {
            let nodes = plan["nodes"].as_array().unwrap();
            nodes
                .iter()
                .map(|node| node["cpus"].as_array().unwrap().len())
                .sum()
        };
        assert!(
            cpus(&small) <= 4 && cpus(&small) <= cpus(&large),
            "{}",
            preset.name
        );
        for (large, small) in large["gpus"]
            .as_array()
            .unwrap()
            .iter()
            .zip(small["gpus"].as_array().unwrap())
        {
            assert_eq!(large["bdf"], small["bdf"]);
            if large["exposure"] != "ram" {
                assert_eq!(large["hbm"][0]["size"], small["hbm"][0]["size"]);
            }
        }
    }
}

const ONE: &str =
    "name = \"one\"\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n[[gpu]]\nhbm = \"64MiB\"\ncpu = 0\n";

/// Serves a machine until it is ready, looks, and ends it.
fn served(corner: &Corner, text: &str, look: impl FnOnce(&Path)) {
    let machine = corner.write("machine.toml", text);
    let sockets = corner.file("sockets");
    fs::create_dir(&sockets).unwrap();
    let (machine, dir) = (machine.to_string_lossy(), sockets.to_string_lossy());
    let mut serve = Process::spawn(corner.numagpu(&["serve", &machine, "--socket-dir", &dir]));
    serve.wait_for("ready: 1 GPU(s)", COMMAND);
    look(&sockets);
    serve.signal(Signal::TERM);
    serve.wait(COMMAND).assert_code(0);
    fs::remove_dir(&sockets).unwrap();
}

#[test]
fn hbm_is_made_of_what_the_description_says() {
    let corner = Corner::new();
    let hbm = corner.hbm();
    let file = hbm.join("gpu0-p0.hbm");
    let text = format!(
        "{ONE}[backing]\nkind = \"file\"\ndirectory = \"{}\"\n",
        hbm.display()
    );
    served(&corner, &text, |_| {
        assert_eq!(fs::metadata(&file).unwrap().len(), 64 << 20);
    });
    assert!(!file.exists());
    // A GPU with an aperture has one file for all of it, whose name is in the socket directory.
    let text = ONE.replace(
        "cpu = 0\n",
        "cpu = 0\npartitions = 2\nexposure = \"private\"\n",
    );
    served(&corner, &text, |sockets| {
        let link = sockets.join("gpu0-aperture.hbm");
        assert_eq!(fs::metadata(link).unwrap().len(), 64 << 20);
    });
    corner.assert_empty();
}

#[test]
fn backings_that_cannot_be_are_named() {
    let corner = Corner::new();
    let serve = |text: &str| {
        let machine = corner.write("machine.toml", text);
        let dir = corner.file("");
        let (machine, dir) = (machine.to_string_lossy(), dir.to_string_lossy());
        let ended = corner.command(&["serve", &machine, "--socket-dir", &dir]);
        ended.assert_code(1);
        ended.message().to_owned()
    };
    let text = serve(&format!("{ONE}[backing]\nkind = \"file\"\n"));
    assert!(
        text.contains("give backing.directory in the description, or --hbm-dir"),
        "{text}"
    );
    let huge =
        ONE.replace("64MiB", "64TiB") + "[limits]\nphys_bits = 48\n[backing]\nkind = \"hugetlb\"\n";
    let text = serve(&huge);
    assert!(text.contains("33554432 huge page(s) of 2048 KiB"), "{text}");
    corner.assert_empty();
}
