//! `numagpu serve`: clients that come and go, and processes that are killed.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use numagpu_tests::corner::{COMMAND, Corner};
use numagpu_tests::process::Process;
use rustix::process::Signal;
use vfio_user::Client;

/// One test at a time: a process that another thread starts has this one's sockets until it executes, so a client
/// that has closed its own would seem to live for a moment more.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Directory of the sockets.
fn sockets(corner: &Corner) -> PathBuf {
    corner.path().join("files")
}

/// Starts serving `two-gpu` in the corner's directories.
fn spawn(corner: &Corner, in_files: bool) -> Process {
    let (sockets, hbm) = (sockets(corner), corner.hbm());
    let (sockets, hbm) = (sockets.to_string_lossy(), hbm.to_string_lossy());
    let mut arguments = vec!["serve", "two-gpu", "--socket-dir", &sockets];
    if in_files {
        arguments.extend(["--hbm-dir", &hbm]);
    }
    Process::spawn(corner.numagpu(&arguments))
}

#[track_caller]
fn serve(corner: &Corner, in_files: bool) -> Process {
    let mut serve = spawn(corner, in_files);
    serve.wait_for("ready: 2 GPU(s)", COMMAND);
    serve
}

fn socket(corner: &Corner, gpu: usize) -> PathBuf {
    sockets(corner).join(format!("gpu{gpu}.sock"))
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A whole client's life: the device says what it is.
#[track_caller]
fn check_device(corner: &Corner, gpu: usize) {
    let mut client = Client::new(&socket(corner, gpu)).unwrap();
    let mut magic = [0; 4];
    client.region_read(0, 0, &mut magic).unwrap();
    assert_eq!(&magic, b"NGPU");
}

/// Ends a server as an administrator does.
#[track_caller]
fn stop(mut serve: Process, corner: &Corner) {
    serve.signal(Signal::TERM);
    let ended = serve.wait(COMMAND);
    ended.assert_code(0);
    assert_eq!(ended.stderr, "");
    assert_eq!(names(&sockets(corner)), Vec::<String>::new());
    corner.assert_empty();
}

#[test]
fn it_says_its_sockets_and_ends_with_sigterm() {
    let _alone = alone();
    let corner = Corner::new();
    let serve = serve(&corner, true);
    let said = serve.said();
    let lines: Vec<&str> = said.lines().take(3).collect();
    let wanted = [0, 1].map(|gpu| socket(&corner, gpu).to_string_lossy().into_owned());
    assert_eq!(lines[..2], wanted);
    assert_eq!(lines[2], "ready: 2 GPU(s)");
    assert_eq!(names(&corner.hbm()), ["gpu0-p0.hbm", "gpu1-p0.hbm"]);
    check_device(&corner, 0);
    check_device(&corner, 1);
    stop(serve, &corner);
}

#[test]
fn memory_without_a_file_has_a_name_as_long_as_it_is_served() {
    let _alone = alone();
    let corner = Corner::new();
    let serve = serve(&corner, false);
    let link = sockets(&corner).join("gpu1-p0.hbm");
    assert_eq!(std::fs::metadata(&link).unwrap().len(), 4 << 30);
    assert_eq!(names(&corner.hbm()), Vec::<String>::new());
    stop(serve, &corner);
}

#[test]
fn a_client_that_is_gone_in_the_middle_is_followed_by_the_next() {
    let _alone = alone();
    let corner = Corner::new();
    let serve = serve(&corner, true);
    // In the middle of the first message, of nothing, and of garbage.
    for start in [
        &b"\x01\x00\x01\x00\x40\x00\x00\x00\x00"[..],
        b"",
        &[0xff; 64],
    ] {
        let mut client = UnixStream::connect(socket(&corner, 0)).unwrap();
        client.write_all(start).unwrap();
        drop(client);
        check_device(&corner, 0);
    }
    // In the middle of a session, and with a client of the other GPU that does not notice.
    let mut other = Client::new(&socket(&corner, 1)).unwrap();
    for _ in 0..20 {
        let mut client = Client::new(&socket(&corner, 0)).unwrap();
        client.region_write(0, 0x100, &[1; 4]).unwrap();
        drop(client);
    }
    check_device(&corner, 0);
    let mut magic = [0; 4];
    other.region_read(0, 0, &mut magic).unwrap();
    assert_eq!(&magic, b"NGPU");
    drop(other);
    let mut serve = serve;
    serve.signal(Signal::TERM);
    serve.wait(COMMAND).assert_code(0);
    corner.assert_empty();
}

#[test]
fn a_killed_server_is_followed_by_the_next() {
    let _alone = alone();
    for in_files in [true, false] {
        let corner = Corner::new();
        let mut first = serve(&corner, in_files);
        first.signal(Signal::KILL);
        first.wait(COMMAND);
        // Its files are still there, and its sockets lead nowhere.
        assert!(socket(&corner, 0).exists());
        let second = serve(&corner, in_files);
        check_device(&corner, 0);
        stop(second, &corner);
    }
}

#[test]
fn two_servers_in_one_place_are_one_too_many() {
    let _alone = alone();
    for (in_files, message) in [
        (
            true,
            "is in use by a running instance; choose another directory",
        ),
        (false, "gpu0.sock is in use: another process serves there"),
    ] {
        let corner = Corner::new();
        let first = serve(&corner, in_files);
        let before = (names(&sockets(&corner)), names(&corner.hbm()));
        let ended = spawn(&corner, in_files).wait(COMMAND);
        ended.assert_code(1);
        assert!(ended.message().contains(message), "{ended}");
        assert_eq!(ended.stderr.lines().count(), 1, "{ended}");
        // The first one has not noticed.
        assert_eq!((names(&sockets(&corner)), names(&corner.hbm())), before);
        check_device(&corner, 1);
        stop(first, &corner);
    }
}

#[test]
fn a_place_that_is_none_is_named() {
    let _alone = alone();
    let corner = Corner::new();
    let nowhere = corner.file("nowhere");
    let nowhere = nowhere.to_string_lossy();
    let ended = corner.command(&["serve", "two-gpu", "--socket-dir", &nowhere]);
    ended.assert_code(1);
    assert!(
        ended.message().contains("is not a directory; make it"),
        "{ended}"
    );

    // A file that is somebody else's business stays what it is.
    let sockets = sockets(&corner);
    let precious = corner.write("gpu0.sock", "precious");
    let ended = corner.command(&[
        "serve",
        "two-gpu",
        "--socket-dir",
        &sockets.to_string_lossy(),
    ]);
    ended.assert_code(1);
    assert!(ended.message().contains("it is no socket"), "{ended}");
    assert_eq!(std::fs::read_to_string(precious).unwrap(), "precious");
    corner.assert_empty();
}
