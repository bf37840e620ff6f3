//! What a server in its sandbox cannot do, and that it serves all the same.
#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::collections::BTreeMap;
use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;

use numagpu_tests::corner::COMMAND;
use numagpu_tests::process::Process;
use numagpu_tests::programs;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;
use vfio_user::Client;

/// Calls that a server has no business with.
const CALLS: usize = 16;

fn confined(directory: &Path, mode: &str, end: &str) -> Process {
    let mut command = Command::new(programs::example("confined"));
    command.arg(directory).args([mode, end]);
    command.env("RUST_BACKTRACE", "1");
    Process::spawn(command)
}

/// What became of each call, in the first thread and in one that was started inside.
fn tries(process: &Process) -> [BTreeMap<String, String>; 2] {
    let said = process.said();
    let tries = said.lines().filter_map(|line| line.strip_prefix("try "));
    let tries: Vec<_> = tries.map(|line| line.split_once(": ").unwrap()).collect();
    assert_eq!(tries.len(), 2 * CALLS, "{said}");
    let of = |half: &[(&str, &str)]| {
        half.iter()
            .map(|(name, ended)| ((*name).to_owned(), (*ended).to_owned()))
            .collect()
    };
    [of(&tries[..CALLS]), of(&tries[CALLS..])]
}

#[track_caller]
fn check_served(directory: &Path) {
    let mut client = Client::new(&directory.join("gpu1.sock")).unwrap();
    let mut magic = [0; 4];
    client.region_read(0, 0, &mut magic).unwrap();
    assert_eq!(&magic, b"NGPU");
}

/// A message of the protocol, without flags.
fn message(command: u16, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(16 + body.len()).unwrap();
    let head = [u32::from(command) << 16, size, 0, 0];
    let head = head.iter().flat_map(|word| word.to_le_bytes());
    head.chain(body.iter().copied()).collect()
}

/// A second socket takes a pair of sockets and a thread, both made inside.
#[track_caller]
fn check_second_socket(directory: &Path) {
    let mut main = UnixStream::connect(directory.join("gpu1.sock")).unwrap();
    let json = r#"{"capabilities":{"twin_socket":{"supported":true}}}"#;
    let body = [&[0; 4], json.as_bytes(), &[0]].concat();
    main.write_all(&message(1, &body)).unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut reply = [0; 4096];
    let mut parts = [IoSliceMut::new(&mut reply)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(&main, &mut parts, &mut control, flags).unwrap();
    let fds = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    let fds: Vec<_> = fds.collect();
    let said = String::from_utf8_lossy(&reply[20..got.bytes]).into_owned();
    assert!(said.contains(r#""fd_index":0"#), "{said}");
    let mut twin = UnixStream::from(fds.into_iter().next().unwrap());
    // GET_INFO, which belongs on the other one.
    twin.write_all(&message(4, &[0; 16])).unwrap();
    let mut refused = [0; 16];
    twin.read_exact(&mut refused).unwrap();
    let errno = i32::from_le_bytes(refused[12..].try_into().unwrap());
    assert_eq!(errno, Errno::NOTSUP.raw_os_error());
}

#[test]
fn what_a_server_does_not_need_is_refused_and_it_serves_on() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = dir.path().join("sockets");
    std::fs::create_dir(&sockets).unwrap();
    let mut process = confined(&sockets, "on", "serve");
    process.wait_for("tried", COMMAND);
    let refused = format!("errno {}", Errno::PERM.raw_os_error());
    let denied = format!("errno {}", Errno::ACCESS.raw_os_error());
    // Names go away at the end, so the call is allowed: landlock says in which directories.
    let landlock = !process.said().contains("no landlock");
    for tries in tries(&process) {
        for (name, ended) in &tries {
            match name.as_str() {
                "remove a file elsewhere" if landlock => assert_eq!(ended, &denied, "{name}"),
                "remove a file elsewhere" => {}
                _ => assert_eq!(ended, &refused, "{name}"),
            }
        }
    }
    if landlock {
        let precious = std::fs::read_to_string(sockets.with_extension("precious"));
        assert_eq!(precious.unwrap(), "precious");
    }
    check_served(&sockets);
    check_second_socket(&sockets);
    check_served(&sockets);
}

#[test]
fn without_a_sandbox_the_same_calls_are_carried_out() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = dir.path().join("sockets");
    std::fs::create_dir(&sockets).unwrap();
    let mut process = confined(&sockets, "off", "serve");
    process.wait_for("tried", COMMAND);
    for tries in tries(&process) {
        for (name, ended) in &tries {
            let expected = match name.as_str() {
                // There is no such program; the process is not traced.
                "execve" => format!("errno {}", Errno::NOENT.raw_os_error()),
                "ptrace" => format!("errno {}", Errno::SRCH.raw_os_error()),
                _ => "done".to_owned(),
            };
            assert_eq!(ended, &expected, "{name}");
        }
    }
    check_served(&sockets);
}

#[test]
fn a_panic_inside_says_where_it_was_and_a_server_serves_on() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = dir.path().join("sockets");
    std::fs::create_dir(&sockets).unwrap();
    let mut process = confined(&sockets, "on", "panic");
    process.wait_for("panicked", COMMAND);
    // On the other output, which is read by another thread.
    process.wait_for("numagpu: the panic was inside the sandbox", COMMAND);
    let said = process.said();
    assert!(said.contains("on purpose"), "{said}");
    assert!(said.contains("stack backtrace:"), "{said}");
    check_served(&sockets);
}

#[test]
fn an_abort_inside_ends_the_process_as_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = dir.path().join("sockets");
    std::fs::create_dir(&sockets).unwrap();
    let ended = confined(&sockets, "on", "abort").wait(COMMAND);
    assert_eq!(
        ended.status.signal(),
        Some(Signal::ABORT.as_raw()),
        "{ended}"
    );
}

/// The server takes SIGBUS for memory of clients, and for nothing else.
#[test]
fn a_fault_inside_in_memory_of_no_client_ends_the_process_as_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let sockets = dir.path().join("sockets");
    std::fs::create_dir(&sockets).unwrap();
    let ended = confined(&sockets, "on", "fault").wait(COMMAND);
    assert_eq!(ended.status.signal(), Some(Signal::BUS.as_raw()), "{ended}");
}
