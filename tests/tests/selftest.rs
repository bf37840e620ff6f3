//! `numagpu selftest`: the lines that it prints, and how it ends.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::path::Path;

use numagpu_tests::corner::Corner;

/// Checks of the first part.
const CLIENT: [&str; 10] = [
    "serve",
    "connect",
    "boot",
    "coherent HBM",
    "claim",
    "copy and fence",
    "interrupt",
    "bytes in the HBM",
    "release",
    "scrub",
];

/// Checks of the second.
const GUEST: [&str; 20] = [
    "open",
    "machine",
    "long mode and local APIC",
    "find by ECAM",
    "find by ports",
    "size and place BARs",
    "decode as the command register says",
    "MSI-X",
    "boot",
    "coherent HBM",
    "claim",
    "claimed HBM is zero",
    "enable a queue",
    "copy, fence, interrupt",
    "HBM through the processor",
    "kick by ioeventfd",
    "register reads by exits",
    "kicks without exits",
    "release and scrub",
    "what is not owned is refused",
];

/// Runs it; the exit code and the lines.
#[track_caller]
fn selftest(arguments: &[&str]) -> (Option<i32>, Vec<String>) {
    let corner = Corner::new();
    let mut all = vec!["selftest"];
    all.extend(arguments);
    let ended = corner.command(&all);
    assert_eq!(ended.stderr, "");
    corner.assert_empty();
    let lines = ended.stdout.lines().map(str::to_owned).collect();
    (ended.status.code(), lines)
}

/// Whether a line says that a check went well.
fn is_ok(line: &str, part: &str, name: &str) -> bool {
    let verdict = line.strip_prefix(&format!("{part}: {name}: "));
    verdict.is_some_and(|it| it == "ok" || it.starts_with("ok, "))
}

#[track_caller]
fn all_ok(lines: &[String], part: &str, names: &[&str]) {
    assert_eq!(lines.len(), names.len(), "{lines:#?}");
    for (line, name) in lines.iter().zip(names) {
        assert!(is_ok(line, part, name), "{name}: {lines:#?}");
    }
}

#[test]
fn without_kvm_the_guest_is_skipped_and_says_why() {
    let missing = "kvm: open: skipped: /nowhere/kvm: No such file or directory (os error 2)";
    let (code, lines) = selftest(&["--kvm", "/nowhere/kvm"]);
    let (client, rest) = lines.split_at(CLIENT.len());
    all_ok(client, "vfio-user", &CLIENT);
    assert_eq!(rest, [missing, "10 ok, 0 failed, 1 skipped"]);
    assert_eq!(code, Some(0));
}

#[test]
fn where_kvm_is_required_its_absence_is_a_failure() {
    let (code, lines) = selftest(&["--kvm", "/dev/null", "--require-kvm"]);
    let (_, rest) = lines.split_at(CLIENT.len());
    let [open, summary] = rest else {
        panic!("{lines:#?}");
    };
    assert!(open.starts_with("kvm: open: FAILED: /dev/null: "), "{open}");
    assert_eq!(summary, "10 ok, 1 failed, 0 skipped");
    assert_eq!(code, Some(1));
}

#[test]
fn where_there_is_kvm_a_guest_drives_the_gpu() {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("skipped: where_there_is_kvm_a_guest_drives_the_gpu: no /dev/kvm");
        return;
    }
    let (code, lines) = selftest(&["--require-kvm"]);
    let (client, rest) = lines.split_at(CLIENT.len());
    all_ok(client, "vfio-user", &CLIENT);
    let (summary, guest) = rest.split_last().unwrap();
    all_ok(guest, "kvm", &GUEST);
    assert_eq!(summary, "30 ok, 0 failed, 0 skipped");
    assert_eq!(code, Some(0));
    let kick = guest.iter().find(|it| it.contains("kick")).unwrap();
    assert!(kick.ends_with("without an exit to this process"), "{kick}");
}
