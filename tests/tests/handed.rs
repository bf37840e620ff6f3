//! `numagpu serve` with sockets that it was started with, as a service manager or a VMM does it.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use numagpu_tests::corner::{COMMAND, Corner};
use numagpu_tests::handing::{FIRST, as_service, with_descriptors};
use numagpu_tests::process::{Ended, Process};
use rustix::process::Signal;
use vfio_user::Client;

/// Sockets as a service manager makes them before it starts anything.
fn listen(corner: &Corner, names: &[&str]) -> (Vec<PathBuf>, Vec<OwnedFd>) {
    let paths: Vec<PathBuf> = names.iter().map(|name| corner.path().join(name)).collect();
    let sockets = paths
        .iter()
        .map(|path| UnixListener::bind(path).unwrap().into());
    let sockets = sockets.collect();
    (paths, sockets)
}

/// The GPU's place in its machine, as its registers say it, which is how one is told from the other.
fn index(path: &Path) -> u64 {
    let mut client = Client::new(path).unwrap();
    let mut magic = [0; 4];
    client.region_read(0, 0, &mut magic).unwrap();
    assert_eq!(&magic, b"NGPU");
    let reg = numagpu_spec::regs::topology::NODE_ID;
    let base = numagpu_spec::regs::topology::BASE;
    let mut value = [0; 8];
    let len = reg.width.bytes() as usize;
    client
        .region_read(0, u64::from(base + reg.offset), &mut value[..len])
        .unwrap();
    u64::from_le_bytes(value)
}

#[track_caller]
fn stop(mut serve: Process, corner: &Corner) {
    serve.signal(Signal::TERM);
    let ended = serve.wait(COMMAND);
    ended.assert_code(0);
    assert_eq!(ended.stderr, "");
    corner.assert_empty();
}

#[track_caller]
fn refused(ended: &Ended, message: &str) {
    ended.assert_code(2);
    assert!(ended.message().contains(message), "{ended}");
}

#[test]
fn sockets_of_a_service_manager_are_taken_by_name_or_in_their_order() {
    for (names, expected) in [
        (Some("gpu1:gpu0"), [1, 0]),
        (Some("two.socket:two.socket"), [0, 1]),
        (None, [0, 1]),
    ] {
        let corner = Corner::new();
        let (paths, sockets) = listen(&corner, &["a", "b"]);
        // Whoever connects before it starts is served too.
        let early = UnixStream::connect(&paths[0]).unwrap();
        drop(early);
        let command = as_service(&corner.numagpu(&["serve", "two-gpu"]), &sockets, names);
        let mut serve = Process::spawn(command);
        serve.wait_for("ready: 2 GPU(s)", COMMAND);
        let said = serve.said();
        let mut lines: Vec<&str> = said.lines().take(2).collect();
        assert_eq!(index(&paths[0]), expected[0]);
        assert_eq!(index(&paths[1]), expected[1]);
        if expected[0] == 1 {
            lines.reverse();
        }
        assert_eq!(
            lines,
            paths
                .iter()
                .map(|it| it.to_str().unwrap())
                .collect::<Vec<_>>()
        );
        // Without a socket directory it is found all the same.
        let status = corner.command(&["status"]);
        status.assert_code(0);
        assert!(status.stdout.contains("sandbox on ("), "{status}");
        stop(serve, &corner);
        // The names are the manager's, and so are the sockets, which wait for the next start.
        assert!(paths.iter().all(|path| path.exists()));
        UnixStream::connect(&paths[1]).unwrap();
    }
}

#[test]
fn a_service_manager_hears_when_it_is_ready_and_when_it_stops() {
    let name = format!("numagpu-test-{}", std::process::id());
    for abstract_name in [false, true] {
        let corner = Corner::new();
        let path = corner.path().join("notify");
        let (manager, address) = match abstract_name {
            false => (
                UnixDatagram::bind(&path).unwrap(),
                path.to_str().unwrap().to_owned(),
            ),
            true => {
                let address = SocketAddr::from_abstract_name(&name).unwrap();
                (
                    UnixDatagram::bind_addr(&address).unwrap(),
                    format!("@{name}"),
                )
            }
        };
        manager.set_read_timeout(Some(COMMAND)).unwrap();
        let (_, sockets) = listen(&corner, &["a", "b"]);
        let mut command = corner.numagpu(&["serve", "two-gpu"]);
        command.env("NOTIFY_SOCKET", address);
        let mut serve = Process::spawn(as_service(&command, &sockets, None));
        let hear = || {
            let mut text = [0; 100];
            let len = manager.recv(&mut text).unwrap();
            String::from_utf8(text[..len].to_vec()).unwrap()
        };
        assert_eq!(hear(), "READY=1\n");
        serve.wait_for("ready: 2 GPU(s)", COMMAND);
        serve.signal(Signal::TERM);
        assert_eq!(hear(), "STOPPING=1\n");
        serve.wait(COMMAND).assert_code(0);
    }
}

#[test]
fn a_vmm_hands_over_one_end_of_a_pair_and_its_going_ends_the_server() {
    let corner = Corner::new();
    let (ours, theirs): (Vec<UnixStream>, Vec<OwnedFd>) = (0..2)
        .map(|_| UnixStream::pair().unwrap())
        .map(|(ours, theirs)| (ours, theirs.into()))
        .unzip();
    let arguments = ["serve", "two-gpu", "--fd", "gpu0=4", "--fd", "gpu1=3"];
    let command = with_descriptors(corner.numagpu(&arguments), &theirs);
    drop(theirs);
    let mut serve = Process::spawn(command);
    serve.wait_for("ready: 2 GPU(s)", COMMAND);
    assert!(
        serve.said().starts_with("descriptor 4\ndescriptor 3\n"),
        "{}",
        serve.said()
    );
    let [first, second] = ours.try_into().unwrap();
    drop(first);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!serve.has_ended());
    drop(second);
    let ended = serve.wait(COMMAND);
    ended.assert_code(0);
    assert_eq!(ended.stderr.lines().count(), 0, "{ended}");
    corner.assert_empty();
}

#[test]
fn the_other_gpus_have_sockets_in_the_socket_directory() {
    let corner = Corner::new();
    let (paths, sockets) = listen(&corner, &["a"]);
    let directory = corner.file("");
    let directory = directory.to_str().unwrap();
    let arguments = [
        "serve",
        "two-gpu",
        "--socket-dir",
        directory,
        "--fd",
        "gpu1=3",
    ];
    let mut serve = Process::spawn(with_descriptors(corner.numagpu(&arguments), &sockets));
    serve.wait_for("ready: 2 GPU(s)", COMMAND);
    assert_eq!(index(&paths[0]), 1);
    assert_eq!(index(&corner.file("gpu0.sock")), 0);
    assert!(!corner.file("gpu1.sock").exists());
    stop(serve, &corner);
    assert!(paths[0].exists() && !corner.file("gpu0.sock").exists());
}

#[test]
fn sockets_that_do_not_fit_are_usage_errors_with_their_numbers() {
    let corner = Corner::new();
    let run = |arguments: &[&str], sockets: &[OwnedFd]| {
        let command = with_descriptors(corner.numagpu(arguments), sockets);
        Process::run(command, COMMAND)
    };
    let managed = |sockets: &[OwnedFd], names| {
        let command = corner.numagpu(&["serve", "two-gpu"]);
        Process::run(as_service(&command, sockets, names), COMMAND)
    };
    let serve = ["serve", "two-gpu"];
    refused(
        &run(&serve, &[]),
        "2 of 2 GPU(s) without a socket: gpu0, gpu1",
    );
    let (_, sockets) = listen(&corner, &["a", "b", "c"]);
    refused(
        &managed(&sockets, None),
        "3 socket(s) of a service manager for 2 GPU(s)",
    );
    refused(
        &managed(&sockets[..1], Some("gpu0")),
        "1 of 2 GPU(s) without a socket: gpu1",
    );
    refused(
        &managed(&sockets[..2], Some("gpu0:gpu9")),
        "\"gpu9\", but the machine's GPUs are gpu0, gpu1",
    );
    refused(
        &managed(&sockets[..2], Some("gpu0")),
        "invalid LISTEN_FDNAMES",
    );
    let with = |fd: &str, sockets: &[OwnedFd]| run(&[&serve[..], &["--fd", fd]].concat(), sockets);
    refused(
        &with("gpu0=3", &sockets[..1]),
        "1 of 2 GPU(s) without a socket: gpu1",
    );
    refused(
        &with("3", &sockets[..1]),
        "the machine has 2: give --fd GPU=3",
    );
    let other = std::fs::File::open("/dev/null").unwrap().into();
    let both = [&serve[..], &["--fd", "gpu0=3", "--fd", "gpu1=4"]].concat();
    let ended = run(&both, &[other]);
    refused(&ended, "gpu0: descriptor 3 is no socket");
    let closed = [&serve[..], &["--fd", "gpu0=77", "--fd", "gpu1=78"]].concat();
    refused(
        &run(&closed, &[]),
        "gpu0: descriptor 77: Bad file descriptor",
    );
    // Those of another process are not ours.
    let mut command = corner.numagpu(&serve);
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "2");
    refused(
        &Process::run(command, COMMAND),
        "2 of 2 GPU(s) without a socket",
    );
    assert_eq!(FIRST, 3);
    corner.assert_empty();
}
