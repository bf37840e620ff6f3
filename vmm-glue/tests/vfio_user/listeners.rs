//! Sockets that are handed over, and clients that wait for their turn.

use std::io::{ErrorKind, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use numagpu_vmm_glue::vfio_user::{HandedError, Listener, SecondClient};
use rustix::fs::{OFlags, fcntl_getfl};

use crate::device::serve_on;
use crate::raw::*;

const INFO: [u32; 4] = [16, 0, 0, 0];

/// Sends a request whose reply is not waited for.
fn ask(raw: &Raw) {
    raw.send(&version(), &[]);
}

/// Whether nothing comes for a while.
fn is_waiting(raw: &mut Raw) -> bool {
    let limit = Some(Duration::from_millis(100));
    raw.stream.set_read_timeout(limit).unwrap();
    let error = raw.stream.read(&mut [0; 1]).err().map(|error| error.kind());
    let limit = Some(Duration::from_secs(5));
    raw.stream.set_read_timeout(limit).unwrap();
    error == Some(ErrorKind::WouldBlock)
}

#[test]
fn clients_that_queue_are_served_one_after_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(dir.path().join("gpu0")).unwrap();
    let served = serve_on(listener, SecondClient::Queue, dir);
    let mut first = Raw::ready(&served.path());
    let mut others: Vec<Raw> = (0..3).map(|_| Raw::connect(&served.path())).collect();
    for other in &mut others {
        ask(other);
        assert!(is_waiting(other));
    }
    assert_eq!(first.errno(GET_INFO, &words(&INFO), &[]), 0);
    // One that gave up in the queue keeps nobody waiting.
    drop(others.remove(1));
    drop(first);
    for mut other in others {
        assert_eq!(other.answer().errno, 0);
        assert_eq!(other.errno(GET_INFO, &words(&INFO), &[]), 0);
    }
}

#[test]
fn a_server_stops_though_clients_queue() {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(dir.path().join("gpu0")).unwrap();
    let served = serve_on(listener, SecondClient::Queue, dir);
    let mut first = Raw::ready(&served.path());
    let mut second = Raw::connect(&served.path());
    assert!(is_waiting(&mut second));
    served.server.shutdown();
    assert!(first.is_closed());
    // It was still in the backlog, so the kernel resets it.
    let end = second
        .stream
        .read(&mut [0; 1])
        .map_err(|error| error.kind());
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_listening_socket_that_is_handed_over_keeps_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("theirs");
    let theirs = UnixListener::bind(&path).unwrap();
    let listener = Listener::handed(theirs.try_clone().unwrap().into()).unwrap();
    assert_eq!(
        (listener.path(), listener.owns_name()),
        (path.as_path(), false)
    );
    let served = serve_on(listener, SecondClient::Refuse, dir);
    for _ in 0..2 {
        let mut raw = Raw::ready(&path);
        assert_eq!(raw.errno(GET_INFO, &words(&INFO), &[]), 0);
        drop(raw);
        served.probe.wait_detached();
    }
    served.server.shutdown();
    assert!(path.exists());
    // Whoever handed it over still has it.
    UnixStream::connect(&path).unwrap();
}

#[test]
fn a_connected_socket_is_the_only_client() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let theirs = OwnedFd::from(theirs);
    let listener = Listener::handed(theirs).unwrap();
    assert!(
        listener.is_connected() && listener.path().to_string_lossy().starts_with("descriptor ")
    );
    let served = serve_on(listener, SecondClient::Refuse, tempfile::tempdir().unwrap());
    ours.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut raw = Raw { stream: ours };
    raw.send(&version(), &[]);
    assert_eq!(raw.answer().errno, 0);
    assert_eq!(raw.errno(GET_INFO, &words(&INFO), &[]), 0);
    assert!(served.server.is_connected());
    let stopper = served.server.stopper();
    let waiting = std::thread::spawn(move || stopper.wait());
    std::thread::sleep(Duration::from_millis(20));
    assert!(!waiting.is_finished());
    drop(raw);
    waiting.join().unwrap();
    assert!(!served.server.is_connected());
    assert_eq!(served.probe.state().events, ["attach", "detach"]);
}

#[test]
fn what_is_no_listening_or_connected_unix_stream_socket_is_refused() {
    let error = |fd: OwnedFd| Listener::handed(fd).unwrap_err();
    assert!(matches!(error(memfd(4096)), HandedError::NoSocket { .. }));
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    assert!(matches!(
        error(datagram.into()),
        HandedError::Kind {
            family: 1,
            kind: 2,
            ..
        }
    ));
    let internet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(matches!(
        error(internet.into()),
        HandedError::Kind {
            family: 2,
            kind: 1,
            ..
        }
    ));
    let idle = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    );
    let idle = error(idle.unwrap());
    assert!(
        idle.to_string()
            .contains("neither listens nor is connected"),
        "{idle}"
    );
}

#[test]
fn a_handed_socket_gets_the_mode_that_its_use_needs() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let watch = theirs.try_clone().unwrap();
    let _listener = Listener::handed(theirs.into()).unwrap();
    let blocks = |fd: &UnixStream| !fcntl_getfl(fd.as_fd()).unwrap().contains(OFlags::NONBLOCK);
    assert!(blocks(&watch) && blocks(&ours));
}
