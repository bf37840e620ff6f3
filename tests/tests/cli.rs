//! The command line: outputs that scripts rely on, exit codes, and what each failure says.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use numagpu_tests::corner::{COMMAND, Corner};
use numagpu_tests::process::{Ended, Process};
use numagpu_tests::programs::{assets, numagpu};
use serde_json::Value;

const GIB: u64 = 1 << 30;

/// Runs a command that has to work and gives its output.
#[track_caller]
fn output(arguments: &[&str]) -> String {
    let corner = Corner::new();
    let ended = corner.command(arguments);
    ended.assert_code(0);
    assert_eq!(ended.stderr, "", "{ended}");
    ended.stdout
}

/// Asserts that a command failed with a message that has all of `words` in its one line, and started nothing.
#[track_caller]
fn check_failure(corner: &Corner, ended: &Ended, code: i32, words: &[&str]) {
    ended.assert_code(code);
    let message = ended.message();
    for word in words {
        assert!(message.contains(word), "no `{word}` in {ended}");
    }
    let messages = ended
        .stderr
        .lines()
        .filter(|line| line.contains("numagpu: "));
    assert_eq!(messages.count(), 1, "{ended}");
    for noise in ["panicked", "warning", "Error {"] {
        assert!(!ended.stderr.contains(noise), "{ended}");
    }
    // A cause is said once.
    for cause in message.match_indices("(os error") {
        let said = &message[..cause.0];
        assert!(!said.contains("(os error"), "{ended}");
    }
    assert_eq!(ended.stdout, "", "{ended}");
    corner.assert_empty();
}

#[test]
fn presets_are_listed_with_what_they_match() {
    let text = output(&["presets"]);
    for name in ["two-gpu", "frontier-node"] {
        let mut lines = text.lines().skip_while(|line| !line.starts_with(name));
        assert!(lines.next().is_some(), "{text}");
        let matches = lines.next().unwrap();
        assert!(matches.trim_start().starts_with("matches "), "{text}");
    }
}

#[test]
fn cloud_hypervisor_gets_what_it_can_carry() {
    let corner = Corner::new();
    let plan = |machine: &str| corner.command(&["plan", machine, "--format", "cloud-hypervisor"]);
    let carried = plan("mi300x-x8");
    carried.assert_code(0);
    assert!(carried.stdout.contains("socket=sockets/gpu7.sock,id=gpu7"));
    assert!(
        carried
            .stderr
            .contains("warning: GPUs have other PCI addresses (gpu0 at")
    );
    // What is lost with OVMF is not lost here.
    assert!(!carried.stderr.contains("OVMF"), "{carried}");
    check_failure(
        &corner,
        &plan("two-gpu"),
        1,
        &[
            "Cloud Hypervisor cannot carry this machine",
            "soft reserved",
        ],
    );
}

#[test]
fn a_plan_comes_in_every_format() {
    for machine in ["two-gpu", "frontier-node"] {
        for (format, word) in [
            ("text", "HBM"),
            ("json", "\"e820\""),
            ("e820", "soft reserved"),
            ("qemu", "vfio-user-pci"),
            ("linux-cmdline", "dax_hmem.region_idle=1"),
        ] {
            let text = output(&["plan", machine, "--format", format]);
            assert!(text.contains(word), "{format}: {text}");
            assert!(text.ends_with('\n'), "{format}");
            let corner = Corner::new();
            let path = corner.file("plan");
            let to = path.to_string_lossy();
            let ended = corner.command(&["plan", machine, "--format", format, "-o", &to]);
            ended.assert_code(0);
            assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(
            output(&["plan", machine]),
            output(&["plan", machine, "--format", "text"])
        );
    }
    let seabios = output(&[
        "plan",
        "two-gpu",
        "--format",
        "linux-cmdline",
        "--boot",
        "seabios",
    ]);
    assert_eq!(
        seabios,
        "memmap=0x100000000%0x100000000+0xefffffff memmap=0x100000000%0x280000000+0xefffffff dax_hmem.region_idle=1\n"
    );
}

fn number(value: &Value) -> u64 {
    value
        .as_u64()
        .unwrap_or_else(|| panic!("{value} is no integer"))
}

#[test]
fn json_has_what_scripts_rely_on() {
    let plan: Value =
        serde_json::from_str(&output(&["plan", "frontier-node", "--format", "json"])).unwrap();
    assert_eq!(plan["name"], "frontier-node");

    let e820 = plan["e820"].as_array().unwrap();
    let soft: Vec<&Value> = e820
        .iter()
        .filter(|entry| number(&entry["type"]) == 0xefff_ffff)
        .collect();
    assert_eq!(soft.len(), 8);
    let mut end = 0;
    for entry in e820 {
        assert!(number(&entry["base"]) >= end, "{entry}");
        end = number(&entry["base"]) + number(&entry["size"]);
    }

    let nodes = plan["nodes"].as_array().unwrap();
    assert_eq!(nodes.len(), 12);
    for (pxm, node) in nodes.iter().enumerate() {
        assert_eq!(node["pxm"], pxm);
        let linux = number(&node["linux_node"]);
        let (kind, gpu) = if pxm < 4 {
            assert_eq!(linux, pxm as u64);
            ("cpu", Value::Null)
        } else {
            // Linux's numbers follow the GPUs; proximity domains are what makes them do so.
            ("hbm", Value::from(format!("gcd{}", linux - 4)))
        };
        assert_eq!((&node["kind"], &node["gpu"]), (&Value::from(kind), &gpu));
        assert_eq!(node["cpus"].as_array().unwrap().len(), usize::from(pxm < 4));
        for range in node["ranges"].as_array().unwrap() {
            assert!(number(&range["size"]) > 0 && range["base"].is_u64());
        }
    }

    let slit = plan["slit"].as_array().unwrap();
    assert_eq!(slit.len(), 12);
    for (from, row) in slit.iter().enumerate() {
        let row = row.as_array().unwrap();
        assert_eq!(row.len(), 12);
        assert_eq!(row[from], 10);
    }

    let gpus = plan["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 8);
    for (index, gpu) in gpus.iter().enumerate() {
        assert_eq!(gpu["id"], format!("gcd{index}"));
        assert_eq!(gpu["exposure"], "spm");
        let hbm = gpu["hbm"].as_array().unwrap();
        assert_eq!(hbm.len(), 1);
        assert_eq!(hbm[0]["size"], 64 * GIB);
        let pxm = usize::try_from(number(&hbm[0]["pxm"])).unwrap();
        assert_eq!(nodes[pxm]["gpu"], gpu["id"]);
        assert_eq!(nodes[pxm]["ranges"][0]["base"], hbm[0]["base"]);
        assert_eq!(hbm[0]["base"], soft[index]["base"]);
    }
    assert_eq!(gpus[0]["bdf"], "c1:00.0");
}

const CPU: &str = "name = \"own\"\n[[cpu]]\ncpus = 1\nmemory = \"512MiB\"\n";

#[test]
fn what_is_wrong_with_a_machine_is_named_with_its_place() {
    let gpu = |keys: &str| format!("{CPU}[[gpu]]\n{keys}\n");
    let two = |first: &str, second: &str| {
        format!(
            "{CPU}[[gpu]]\nhbm = \"4GiB\"\ncpu = 0\n{first}\n[[gpu]]\nhbm = \"4GiB\"\ncpu = 0\n{second}\n"
        )
    };
    // The place, and the words and numbers that a reader needs; the sentence is the planner's own.
    let cases: Vec<(String, &str, Vec<&str>)> = vec![
        (gpu("hbm = "), ":6: gpu[0].hbm: ", vec![]),
        (gpu("hbm = 4GiB\ncpu = 0"), ":6: gpu[0].hbm: ", vec!["4GiB"]),
        (
            gpu("hbm = \"4GB\"\ncpu = 0"),
            ":6: gpu[0].hbm: ",
            vec!["`4GB`"],
        ),
        (
            gpu("hbm = \"4GiB\"\ncpu = 0\ncolour = \"red\""),
            ":8: gpu[0].colour: ",
            vec![],
        ),
        (
            gpu("hbm = \"4GiB\"\ncpu = 1"),
            ":7: gpu[0].cpu: ",
            vec!["no CPU node 1"],
        ),
        (
            two("base = \"4GiB\"", "base = \"6GiB\""),
            ":12: gpu[1].base: ",
            vec![
                "0x180000000..0x280000000",
                "gpu[0]",
                "0x100000000..0x200000000",
            ],
        ),
        (
            two("id = \"a\"", "id = \"a\""),
            ":12: gpu[1].id: ",
            vec!["`a`"],
        ),
        (
            gpu("hbm = \"4097KiB\"\ncpu = 0"),
            ":6: gpu[0].hbm: ",
            vec!["multiple of 2 MiB"],
        ),
        (
            gpu("hbm = \"4GiB\"\ncpu = 0\nbase = 0x1_0010_0000"),
            ":8: gpu[0].base: ",
            vec!["0x100100000", "2 MiB"],
        ),
        (
            gpu("hbm = \"2TiB\"\ncpu = 0"),
            ":6: gpu[0].hbm: ",
            vec!["2 TiB", "40 address bits end at 0x10000000000"],
        ),
        (
            gpu("hbm = \"4GiB\"\ncpu = 0\nbase = \"1GiB\""),
            ":8: gpu[0].base: ",
            vec!["0x40000000..0x140000000"],
        ),
        (
            "name = \"own\"\n".to_owned(),
            ":1: cpu: ",
            vec!["no CPU node"],
        ),
        (
            format!("{CPU}[[link]]\nfrom = \"gpu0\"\nto = \"cpu0\"\n"),
            ":6: link[0].from: ",
            vec!["`gpu0`"],
        ),
    ];
    for (text, place, words) in cases {
        let corner = Corner::new();
        let path = corner.write("own.toml", &text);
        let path = path.to_string_lossy();
        let start = format!("numagpu: {path}{place}");
        let sockets = corner.file("");
        let sockets = sockets.to_string_lossy();
        for arguments in [
            vec!["plan", &*path],
            vec!["run", &*path, "--verify"],
            vec!["serve", &*path, "--socket-dir", &*sockets],
        ] {
            let ended = corner.command(&arguments);
            check_failure(&corner, &ended, 2, &words);
            assert!(ended.message().starts_with(&start), "{start} in {ended}");
            assert!(!corner.path().join("run/numagpu").exists(), "{ended}");
        }
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    let corner = Corner::new();
    let ended = corner.command(&["run", "no-such-machine"]);
    check_failure(
        &corner,
        &ended,
        2,
        &["`no-such-machine`", "two-gpu, frontier-node"],
    );
    let path = corner.path().to_string_lossy();
    let ended = corner.command(&["plan", &path]);
    check_failure(&corner, &ended, 2, &[&path]);
    for arguments in [
        &["run"][..],
        &["run", "two-gpu", "--accel", "magic"],
        &["plan", "two-gpu", "--format", "poem"],
        &["serve", "two-gpu", "--fd", "gpu0=two"],
        &["dance"],
        &[],
    ] {
        let ended = corner.command(arguments);
        ended.assert_code(2);
        let told = ["Usage: numagpu", "try '--help'"];
        assert!(
            told.iter().any(|words| ended.stderr.contains(words)),
            "{ended}"
        );
        assert_eq!(ended.stdout, "");
    }
    let ended = corner.command(&["serve", "two-gpu"]);
    let told = "2 of 2 GPU(s) without a socket: gpu0, gpu1; give --socket-dir DIR";
    check_failure(&corner, &ended, 2, &[told]);
    let own = numagpu();
    let own = own.to_string_lossy();
    let ended = corner.command(&["run", "two-gpu", "--verify", "--kernel", &own]);
    check_failure(&corner, &ended, 2, &["--verify needs the guest agent"]);
    for arguments in [&["--help"][..], &["--version"], &["run", "--help"]] {
        corner.command(arguments).assert_code(0);
    }
    assert!(!corner.path().join("run/numagpu").exists());
}

/// A program that says something.
fn script(corner: &Corner, body: &str) -> PathBuf {
    let path = corner.write("qemu", &format!("#!/bin/sh\n{body}\n"));
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_qemu_that_will_not_do_is_named() {
    let version = |version: &str| format!("echo 'QEMU emulator version {version} (Debian)'");
    let cases = [
        (
            version("7.2.19"),
            vec!["is QEMU 7.2, but 11.1 is the first"],
        ),
        (
            version("11.0.50"),
            vec!["is QEMU 11.0, but 11.1 is the first"],
        ),
        (
            format!(
                "case $1 in -version) {};; *) echo 'name \"vfio-user-pci\", bus PCI';; esac",
                version("11.1.3")
            ),
            vec!["has no device `sp-mem`", "cargo xtask guest"],
        ),
        (
            format!(
                "case $1 in -version) {};; *) echo 'name \"sp-mem\", bus System';; esac",
                version("12.0.0")
            ),
            vec!["has no device `vfio-user-pci`"],
        ),
        ("echo hello".to_owned(), vec!["is no QEMU", "hello"]),
        ("exit 1".to_owned(), vec!["is no QEMU"]),
    ];
    for (body, words) in cases {
        let corner = Corner::new();
        let qemu = script(&corner, &body);
        let ended = corner.command(&["run", "two-gpu", "--qemu", &qemu.to_string_lossy()]);
        check_failure(
            &corner,
            &ended,
            1,
            &[&words[..], &["give --qemu PATH"]].concat(),
        );
        assert!(!corner.path().join("run/numagpu").exists());
    }
    let corner = Corner::new();
    let plain = corner.write("plain", "no program");
    for qemu in [
        plain.to_string_lossy().into_owned(),
        "/nonexistent/qemu".to_owned(),
    ] {
        let ended = corner.command(&["run", "two-gpu", "--qemu", &qemu]);
        check_failure(
            &corner,
            &ended,
            1,
            &["no QEMU: ", &qemu, "cargo xtask guest"],
        );
    }
}

#[test]
fn a_file_that_is_missing_is_named_with_its_option() {
    let corner = Corner::new();
    let nowhere = corner.file("nowhere");
    let nowhere = nowhere.to_string_lossy();
    let directory = corner.hbm();
    let directory = directory.to_string_lossy();
    for (option, path, words) in [
        ("--kernel", &nowhere, ["no kernel `", "cargo xtask guest"]),
        ("--initrd", &nowhere, ["no initrd: ", "give --initrd PATH"]),
        (
            "--firmware",
            &nowhere,
            ["no firmware: ", "give --firmware PATH"],
        ),
        ("--firmware", &directory, ["no firmware: ", "is not a file"]),
    ] {
        let ended = corner.command(&["run", "two-gpu", option, path]);
        check_failure(&corner, &ended, 1, &[&words[..], &[path]].concat());
    }
    // No assets at all.
    let mut command = corner.numagpu(&["run", "two-gpu"]);
    command.env("NUMAGPU_GUEST_DIR", corner.path());
    let ended = Process::run(command, COMMAND);
    check_failure(
        &corner,
        &ended,
        1,
        &["no guest assets", "cargo xtask guest"],
    );
    // A list that is none, and a file of it that is gone.
    corner.write("assets.json", "{\"schema\": 99}");
    let mut command = corner.numagpu(&["run", "two-gpu"]);
    command.env("NUMAGPU_GUEST_DIR", corner.file(""));
    let ended = Process::run(command, COMMAND);
    check_failure(&corner, &ended, 1, &["schema 99", "cargo xtask guest"]);
    assert!(!corner.path().join("run/numagpu").exists());
}

/// A directory that this user cannot make files in.
fn forbidden(corner: &Corner) -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/sys");
    }
    let path = corner.file("forbidden");
    fs::create_dir(&path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o500)).unwrap();
    path
}

#[test]
fn a_place_for_hbm_that_will_not_do_is_named() {
    assets();
    let corner = Corner::new();
    let file = corner.write("file", "");
    for (path, word) in [
        (corner.file("nowhere"), "No such file or directory"),
        (file, "Not a directory"),
        (forbidden(&corner), "Permission denied"),
    ] {
        let path = path.to_string_lossy();
        let ended = corner.command(&["run", "two-gpu", "--hbm-dir", &path]);
        let words = [
            &*path,
            "gpu0-p0.hbm",
            word,
            "4294967296",
            "another --hbm-dir",
        ];
        check_failure(&corner, &ended, 1, &words);
        let sockets = corner.file("");
        let sockets = sockets.to_string_lossy();
        let serve = [
            "serve",
            "two-gpu",
            "--socket-dir",
            &sockets,
            "--hbm-dir",
            &path,
        ];
        check_failure(&corner, &corner.command(&serve), 1, &words);
    }

    // Somebody else's file stays what it is.
    let precious = corner.file("precious");
    fs::write(&precious, "precious").unwrap();
    std::os::unix::fs::symlink(&precious, corner.hbm().join("gpu0-p0.hbm")).unwrap();
    let hbm = corner.hbm();
    let ended = corner.command(&["run", "two-gpu", "--hbm-dir", &hbm.to_string_lossy()]);
    ended.assert_code(1);
    assert!(ended.message().contains("it is left alone"), "{ended}");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    fs::remove_file(corner.hbm().join("gpu0-p0.hbm")).unwrap();
    corner.assert_empty();
}

/// The command under a limit on the size of files, in blocks of 512 bytes.
fn limited(corner: &Corner, blocks: u32, arguments: &[&str]) -> Command {
    let plain = corner.numagpu(arguments);
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("ulimit -f {blocks}; exec \"$0\" \"$@\"")])
        .arg(plain.get_program())
        .args(plain.get_args());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

/// Sparse files need no room when they are made, so what fails is their size: a file system's largest, or a limit of
/// the user's. Beyond the latter the kernel sends SIGXFSZ, which kills by default.
#[test]
fn hbm_larger_than_a_file_may_be_is_an_error_and_no_death() {
    assets();
    let corner = Corner::new();
    let hbm = corner.hbm();
    let hbm = hbm.to_string_lossy();
    let ended = Process::run(
        limited(&corner, 1000, &["run", "two-gpu", "--hbm-dir", &hbm]),
        COMMAND,
    );
    check_failure(&corner, &ended, 1, &[&hbm, "File too large", "4294967296"]);
    let ended = Process::run(limited(&corner, 1000, &["run", "two-gpu"]), COMMAND);
    check_failure(&corner, &ended, 1, &["gpu0-p0.hbm", "File too large"]);
}

#[test]
fn a_runtime_directory_that_lets_others_in_is_refused() {
    assets();
    let corner = Corner::new();
    let parent = corner.path().join("run/numagpu");
    fs::create_dir(&parent).unwrap();
    fs::set_permissions(&parent, Permissions::from_mode(0o755)).unwrap();
    let ended = corner.command(&["run", "two-gpu"]);
    check_failure(
        &corner,
        &ended,
        1,
        &["mode 0700", "0755", &parent.to_string_lossy()],
    );
}

#[test]
fn a_runtime_directory_with_too_long_a_name_is_named() {
    assets();
    let corner = Corner::new();
    let long = corner.file(&"x".repeat(100));
    fs::create_dir(&long).unwrap();
    let mut command = corner.numagpu(&["run", "two-gpu"]);
    command.env("XDG_RUNTIME_DIR", &long);
    let ended = Process::run(command, COMMAND);
    check_failure(&corner, &ended, 1, &["socket path", "107"]);
    assert_eq!(fs::read_dir(long.join("numagpu")).unwrap().count(), 0);
}

#[test]
fn a_dry_run_prints_and_starts_nothing() {
    let corner = Corner::new();
    let hbm = corner.hbm();
    let hbm = hbm.to_string_lossy();
    let ended = corner.command(&[
        "run",
        "two-gpu",
        "--dry-run",
        "--hbm-dir",
        &hbm,
        "--append",
        "quiet",
        "--",
        "-device",
        "edu",
    ]);
    ended.assert_code(0);
    assert_eq!(ended.stderr, "");
    let qemu = assets().qemu.path;
    assert!(
        ended.stdout.starts_with(&*qemu.to_string_lossy()),
        "{ended}"
    );
    for word in [
        "sp-mem,id=sp0",
        "acpi-generic-initiator",
        "-device edu",
        " quiet",
    ] {
        assert!(ended.stdout.contains(word), "no {word}: {ended}");
    }
    assert!(!corner.path().join("run/numagpu").exists());
    corner.assert_empty();
}

/// A pipe that nobody reads any more, which is what `| head -1` comes to.
fn closed() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

#[test]
fn an_output_that_nobody_reads_is_no_error() {
    let corner = Corner::new();
    for arguments in [
        &["presets"][..],
        &["plan", "frontier-node"],
        &["plan", "frontier-node", "--format", "json"],
        &["run", "two-gpu", "--dry-run"],
        &["completions", "bash"],
        &["man"],
    ] {
        let child = corner
            .numagpu(arguments)
            .stdout(closed())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let ended = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(
            (ended.status.code(), &*said),
            (Some(0), ""),
            "{arguments:?}"
        );
    }
    // An error that nobody hears has its exit code still.
    for (arguments, code) in [
        (&["plan", "no-such-machine"][..], 2),
        (&["run", "two-gpu", "--qemu", "/nonexistent/qemu"], 1),
    ] {
        let status = corner.numagpu(arguments).stderr(closed()).status().unwrap();
        assert_eq!(status.code(), Some(code), "{arguments:?}");
    }
}

#[test]
fn an_output_that_cannot_be_written_is_an_error() {
    let corner = Corner::new();
    let ended = corner.command(&["plan", "two-gpu", "-o", "/nonexistent/plan"]);
    check_failure(
        &corner,
        &ended,
        1,
        &["write /nonexistent/plan: No such file"],
    );
    if Path::new("/dev/full").exists() {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = corner.numagpu(&["presets"]);
        let ended = command.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        let ended = ended.wait_with_output().unwrap();
        assert_eq!(ended.status.code(), Some(1));
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(
            said.starts_with("numagpu: No space left on device"),
            "{said}"
        );
    }
}
