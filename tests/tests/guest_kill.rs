//! Runs that end before their time, and what they leave behind.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::os::unix::process::CommandExt as _;
use std::time::{Duration, Instant};

use numagpu_tests::corner::{COMMAND, Corner, GUEST};
use numagpu_tests::host::{self, Running};
use numagpu_tests::process::{Ended, Process};
use numagpu_tests::programs::Turn;
use rustix::process::{Pid, Signal, kill_process};

/// How soon QEMU is gone after `numagpu` was killed.
const GONE: Duration = Duration::from_secs(2);

/// A run of `two-gpu` that has come as far as a line with `point`.
#[track_caller]
fn started(corner: &Corner, point: &str) -> Process {
    let hbm = corner.hbm();
    let hbm = hbm.to_string_lossy();
    let mut command = corner.numagpu(&["run", "two-gpu", "--verify", "--hbm-dir", &hbm]);
    // As a shell starts it, so that a signal can be sent to all of it.
    command.process_group(0);
    let mut run = Process::spawn(command);
    run.wait_for(point, GUEST);
    run
}

/// The QEMU that a run has started.
#[track_caller]
fn qemu(run: &Process) -> Running {
    let mut below = host::descendants(run.pid());
    below.retain(|process| process.command.contains("-device"));
    assert_eq!(below.len(), 1, "{below:?}");
    below.remove(0)
}

#[test]
fn guest_killed_at_any_point_leaves_nothing_that_the_next_run_trips_over() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let mut swept = Vec::new();
    for point in ["two-gpu:", "QEMU runs", "driver:"] {
        let mut run = started(&corner, point);
        let below = host::descendants(run.pid());
        if point != "two-gpu:" {
            // The run has its own directory by now and nobody else's.
            let dirs = corner.run_dirs();
            assert_eq!(dirs.len(), 1, "{dirs:?}");
            assert!(!swept.contains(&dirs[0]), "{dirs:?} was not swept");
            qemu(&run);
            swept.extend(dirs);
        }
        run.signal(Signal::KILL);
        let killed = Instant::now();
        let gone = host::wait_until(GONE, || {
            !below.iter().any(|process| host::runs(process.pid))
        });
        assert!(
            gone,
            "{:?} after a kill at `{point}`: {below:?}",
            killed.elapsed()
        );
        corner.assert_idle(GONE);
        assert!(run.wait(COMMAND).status.code().is_none());
    }
    // What is left are the files of a process that could do nothing more.
    assert_eq!(corner.run_dirs(), swept[swept.len() - 1..]);
    let hbm = corner.hbm();
    let left: Vec<_> = std::fs::read_dir(&hbm).unwrap().flatten().collect();
    assert_eq!(left.len(), 2, "{left:?}");
    corner.verified("two-gpu", &["--hbm-dir", &hbm.to_string_lossy()]);
}

#[track_caller]
fn check_interrupted(corner: &Corner, ended: &Ended, name: &str) {
    ended.assert_code(1);
    assert_eq!(
        ended.message(),
        format!("numagpu: interrupted by {name}"),
        "{ended}"
    );
    assert_eq!(ended.stdout, "");
    corner.assert_empty();
}

#[test]
fn guest_signals_end_a_run_and_nothing_is_left() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    for (signal, name, point) in [
        (Signal::TERM, "SIGTERM", "two-gpu:"),
        (Signal::TERM, "SIGTERM", "QEMU runs"),
        (Signal::INT, "SIGINT", "GPU(s) served"),
        (Signal::HUP, "SIGHUP", "QEMU runs"),
    ] {
        let mut run = started(&corner, point);
        run.signal(signal);
        check_interrupted(&corner, &run.wait(COMMAND), name);
    }
    // A terminal's Ctrl-C goes to QEMU too, which may be gone first.
    for _ in 0..3 {
        let mut run = started(&corner, "QEMU runs");
        run.signal_group(Signal::INT);
        check_interrupted(&corner, &run.wait(COMMAND), "SIGINT");
    }
}

#[test]
fn guest_whose_qemu_is_killed_ends_with_one_line() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let run = started(&corner, "QEMU runs");
    let qemu = Pid::from_raw(i32::try_from(qemu(&run).pid).unwrap()).unwrap();
    kill_process(qemu, Signal::KILL).unwrap();
    let ended = run.wait(COMMAND);
    ended.assert_code(1);
    assert_eq!(
        ended.message(),
        "numagpu: QEMU ended (signal: 9 (SIGKILL)) before the guest reported",
        "{ended}"
    );
    assert!(!ended.stderr.contains("warning"), "{ended}");
    corner.assert_empty();
}

#[test]
fn guest_that_qemu_refuses_ends_with_qemus_own_words() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let ended = corner.command(&["run", "two-gpu", "--", "-device", "nonsense"]);
    ended.assert_code(1);
    assert!(
        ended
            .message()
            .starts_with("numagpu: QEMU ended (exit status: 1)"),
        "{ended}"
    );
    assert!(
        ended
            .stderr
            .contains("'nonsense' is not a valid device model name"),
        "{ended}"
    );
    corner.assert_empty();
}

#[test]
fn guest_that_never_reports_ends_in_time() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let began = Instant::now();
    let ended = corner.command(&["run", "two-gpu", "--verify", "--timeout", "3"]);
    ended.assert_code(1);
    assert_eq!(
        ended.message(),
        "numagpu: no report from the guest after 3 s",
        "{ended}"
    );
    assert!(began.elapsed() >= Duration::from_secs(3));
    // What firmware paints on its console is no words, and QEMU has nothing to warn of.
    assert!(!ended.stderr.contains(['\u{1b}', '\0']), "{ended}");
    assert!(
        !ended.stderr.contains("[2J") && !ended.stderr.contains("warning"),
        "{ended}"
    );
    corner.assert_empty();
}
