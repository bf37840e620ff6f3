//! Clients that come, go and die; servers that stop.

use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use numagpu_vmm_glue::sys::child::spawn_tied;
use numagpu_vmm_glue::vfio_user::{Server, ServerError};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{FdFlags, fcntl_getfd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::device::{is_alone, serve};
use crate::raw::*;

const INFO: [u32; 4] = [16, 0, 0, 0];

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn two_hundred_clients_leave_no_descriptor_behind() {
    if !is_alone("lifecycle::two_hundred_clients_leave_no_descriptor_behind") {
        return;
    }
    let served = serve();
    let ram = memfd(0x4000);
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let cycle = || {
        let mut raw = Raw::ready(&served.path());
        for page in 0..4 {
            let body = map_body(3, page << 12, page << 20, 0x1000);
            assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
        }
        let irqs = irqs_body(0x24, 2, 0, 4);
        assert_eq!(raw.errno(SET_IRQS, &irqs, &[event.as_fd(); 4]), 0);
        assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(0, 0, 0x1000), &[]), 0);
        // One that is in pieces when the client goes.
        raw.send(
            &message(DMA_MAP, &map_body(3, 0, 0, 0x1000))[..20],
            &[ram.as_fd()],
        );
    };
    cycle();
    served.probe.wait_detached();
    std::thread::sleep(Duration::from_millis(20));
    let before = descriptors();
    for _ in 0..200 {
        // The next one connects while the last one is being cleared away.
        cycle();
    }
    served.probe.wait_detached();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(descriptors(), before);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert_eq!(maps.matches("/memfd:ram").count(), 0);
    let state = served.probe.state();
    assert_eq!(state.events.iter().filter(|e| **e == "attach").count(), 201);
    assert_eq!(state.events.iter().filter(|e| **e == "detach").count(), 201);
}

#[test]
fn the_next_client_is_served_within_ten_milliseconds() {
    let served = serve();
    let mut worst = Duration::ZERO;
    for _ in 0..20 {
        let raw = Raw::ready(&served.path());
        drop(raw);
        let since = Instant::now();
        drop(Raw::ready(&served.path()));
        worst = worst.max(since.elapsed());
    }
    // Ten on a quiet machine; tests run beside others.
    assert!(worst < Duration::from_millis(100), "{worst:?}");
}

#[test]
fn a_second_client_is_refused_and_the_first_not_disturbed() {
    let served = serve();
    let mut first = Raw::ready(&served.path());
    for _ in 0..3 {
        let mut second = Raw::connect(&served.path());
        assert!(second.is_closed());
    }
    assert_eq!(first.errno(GET_INFO, &words(&INFO), &[]), 0);
    drop(first);
    let mut third = Raw::ready(&served.path());
    assert_eq!(third.errno(GET_INFO, &words(&INFO), &[]), 0);
}

/// The process has no descriptor for the second one, which so can be neither refused nor served yet.
#[test]
fn a_client_that_cannot_be_accepted_keeps_the_first_from_nothing() {
    if !is_alone("lifecycle::a_client_that_cannot_be_accepted_keeps_the_first_from_nothing") {
        return;
    }
    let served = serve();
    let mut first = Raw::ready(&served.path());
    let next = first.stream.as_fd().try_clone_to_owned().unwrap();
    let first_free = u64::try_from(next.as_raw_fd()).unwrap();
    drop(next);
    let before = getrlimit(Resource::Nofile);
    let one_more = Rlimit {
        current: Some(first_free + 1),
        ..before
    };
    setrlimit(Resource::Nofile, one_more).unwrap();
    let mut second = Raw::connect(&served.path());
    let since = Instant::now();
    for _ in 0..10 {
        assert_eq!(first.errno(GET_INFO, &words(&INFO), &[]), 0);
        assert!(served.server.is_connected());
        std::thread::sleep(Duration::from_millis(5));
    }
    // It leaves, and keeps its descriptor.
    first.stream.shutdown(Shutdown::Both).unwrap();
    second.send(&version(), &[]);
    assert_eq!(second.answer().errno, 0);
    setrlimit(Resource::Nofile, before).unwrap();
    assert!(since.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_client_that_only_connects_is_no_client_of_the_function() {
    let served = serve();
    drop(Raw::connect(&served.path()));
    drop(Raw::ready(&served.path()));
    served.probe.wait_detached();
    assert!(
        served
            .probe
            .state()
            .events
            .iter()
            .all(|event| *event != "dma")
    );
}

#[test]
fn stopping_is_prompt_with_and_without_a_client() {
    for connected in [false, true] {
        let served = serve();
        let path = served.path();
        let mode = path.symlink_metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let client = connected.then(|| Raw::ready(&path));
        assert_eq!(served.server.is_connected(), connected);
        let since = Instant::now();
        served.server.shutdown();
        assert!(since.elapsed() < Duration::from_millis(100));
        assert!(!path.exists());
        assert!(served.probe.state().attachment.is_none());
        if let Some(mut client) = client {
            assert!(client.is_closed());
        }
    }
}

#[test]
fn a_stopper_works_from_another_thread() {
    let served = serve();
    let mut client = Raw::ready(&served.path());
    let stopper = served.server.stopper();
    std::thread::spawn(move || stopper.stop()).join().unwrap();
    assert!(client.is_closed());
    served.probe.wait_detached();
}

#[test]
fn a_panic_of_the_device_ends_the_connection_and_the_server_but_not_the_process() {
    let served = serve();
    let mut client = Raw::ready(&served.path());
    served.probe.state().broken = true;
    client.send(&message(RESET, &[]), &[]);
    assert!(client.is_closed());
    served.probe.wait_detached();
    // The panic takes the connection with it, and then comes to whom has to say so.
    let since = Instant::now();
    while served.server.is_connected() {
        assert!(since.elapsed() < Duration::from_secs(5));
        std::thread::yield_now();
    }
    served.server.shutdown();
}

#[test]
fn only_a_stale_socket_is_replaced() {
    let served = serve();
    let probe = || Arc::clone(&served.probe) as _;
    let error = Server::bind(served.path(), probe()).unwrap_err();
    assert!(matches!(error, ServerError::InUse { .. }), "{error}");

    let stale = served.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    drop(Server::bind(&stale, probe()).unwrap());
    assert!(!stale.exists());

    let file = served.dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = Server::bind(&file, probe()).unwrap_err();
    assert!(error.to_string().contains("no socket"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");

    let long = served.dir.path().join("x".repeat(120));
    let error = Server::bind(long, probe()).unwrap_err();
    assert!(matches!(error, ServerError::PathTooLong { .. }), "{error}");
    let nowhere = served.dir.path().join("no/such");
    let error = Server::bind(nowhere, probe()).unwrap_err();
    assert!(error.to_string().contains("bind"), "{error}");
}

/// What the process does that the next test starts and kills: it connects, maps memory, and waits.
fn be_a_client(path: &Path) -> ! {
    let mut raw = Raw::ready(path);
    let ram = memfd(0x1000);
    let body = map_body(3, 0, 0, 0x1000);
    assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0);
    std::thread::sleep(Duration::from_secs(60));
    std::process::exit(1)
}

#[test]
fn a_killed_client_is_followed_by_a_new_one() {
    if let Some(path) = std::env::var_os("PROBE_SOCKET") {
        be_a_client(path.as_ref());
    }
    let served = serve();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "lifecycle::a_killed_client_is_followed_by_a_new_one",
        ])
        .env("PROBE_SOCKET", served.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let since = Instant::now();
    while !served.probe.state().events.contains(&"dma") {
        assert!(since.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let mut raw = Raw::ready(&served.path());
    assert_eq!(raw.errno(GET_INFO, &words(&INFO), &[]), 0);
    let events = served.probe.state().events.clone();
    assert_eq!(events, ["attach", "dma", "detach", "attach"]);
}

#[test]
fn a_tied_child_inherits_what_it_should_and_dies_with_its_thread() {
    let fd = memfd(4096);
    let number = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let mut command = Command::new("sh");
    command
        .args([
            "-c",
            &format!("test -e /proc/self/fd/{number} && echo yes; exec sleep 60"),
        ])
        .stdout(Stdio::piped());
    let started = std::thread::spawn(move || {
        let mut child = spawn_tied(command, &[fd.as_fd()]).unwrap();
        let mut line = [0; 4];
        let out = child.stdout.as_mut().unwrap();
        std::io::Read::read_exact(out, &mut line).unwrap();
        assert_eq!(&line, b"yes\n");
        assert!(child.try_wait().unwrap().is_none());
        assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
        child
    });
    let mut child = started.join().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(9)
    );
}
