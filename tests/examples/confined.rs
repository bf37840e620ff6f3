//! A server in the same sandbox as `numagpu serve`, which tries what a server has no business with.
//!
//! `confined DIRECTORY on|off serve|panic|abort|fault`: makes a precious file beside `DIRECTORY`, serves `two-gpu` in
//! `DIRECTORY`, says what became of each call, and then serves on, panics, aborts or touches a page that is not there.
#![allow(unsafe_code, reason = "some calls have no safe form")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test's program fails by panicking"
)]

use std::fs::{self, File};
use std::io;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use numagpu_topology::{parse, plan, preset};
use numagpu_vmm_glue::instance::{Prepared, Serving};
use numagpu_vmm_glue::sandbox::{self, Leavings, Mode};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::process::{Pid, getpid, test_kill_process};

/// What to try, and its name.
type Try<'a> = (&'static str, Box<dyn Fn() -> io::Result<()> + 'a>);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, mode, end] = arguments.as_slice() else {
        panic!("confined DIRECTORY on|off serve|panic|abort|fault");
    };
    let directory = Path::new(directory);
    let precious = directory.with_extension("precious");
    fs::write(&precious, "precious").unwrap();
    let mode = match mode.as_str() {
        "on" => Mode::On,
        "off" => Mode::Off,
        other => panic!("no mode {other}"),
    };
    let preset = preset::find("two-gpu").unwrap();
    let machine = parse(preset.name, preset.source).unwrap();
    let machine = plan(&machine).unwrap();
    let prepared = Prepared::new(&machine, directory, Serving::default()).unwrap();
    let leavings = Leavings {
        files_in: vec![directory.to_owned()],
        directories_in: Vec::new(),
    };
    let empty = memfd_create("empty", MemfdFlags::CLOEXEC).unwrap();
    let sandbox = sandbox::enter(mode, &leavings).unwrap();
    sandbox::explain_panics(sandbox);
    let _instance = prepared.start(&sandbox).unwrap();
    println!("sandbox {sandbox}");
    try_all(directory, &precious);
    // Nor can a thread that was started inside.
    std::thread::scope(|scope| {
        scope.spawn(|| try_all(directory, &precious));
    });
    println!("tried");
    match end.as_str() {
        "panic" => {
            let thread = std::thread::spawn(|| panic!("on purpose"));
            assert!(thread.join().is_err());
            println!("panicked");
        }
        "abort" => std::process::abort(),
        "fault" => touch(&empty),
        _ => {}
    }
    loop {
        std::thread::park();
    }
}

/// Touches the first page of an empty file.
fn touch(empty: &OwnedFd) {
    let (protection, flags) = (ProtFlags::READ, MapFlags::SHARED);
    // SAFETY: a new map at an address that the kernel chooses.
    let map = unsafe { mmap(std::ptr::null_mut(), 4096, protection, flags, empty, 0) };
    // SAFETY: it is mapped; the access is volatile, and what it meets is on purpose.
    let seen = unsafe { map.unwrap().cast::<u8>().read_volatile() };
    println!("read {seen}");
}

/// Tries each call, and says how it ended.
fn try_all(directory: &Path, precious: &Path) {
    for (name, call) in tries(directory, precious) {
        let ended = match call() {
            Ok(()) => "done".to_owned(),
            Err(error) => error
                .raw_os_error()
                .map_or_else(|| error.to_string(), |number| format!("errno {number}")),
        };
        println!("try {name}: {ended}");
    }
}

fn tries<'a>(directory: &'a Path, precious: &'a Path) -> Vec<Try<'a>> {
    let fails = |result: i64| match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    };
    vec![
        ("open", Box::new(move || File::open(precious).map(drop))),
        (
            "create",
            Box::new(move || File::create(directory.join("new")).map(drop)),
        ),
        (
            "rename",
            Box::new(move || {
                let other = precious.with_extension("moved");
                fs::rename(precious, &other)?;
                fs::rename(&other, precious)
            }),
        ),
        (
            "remove a file elsewhere",
            Box::new(move || {
                fs::remove_file(precious).and_then(|()| fs::write(precious, "precious"))
            }),
        ),
        (
            "TCP socket",
            Box::new(move || TcpListener::bind("127.0.0.1:0").map(drop)),
        ),
        (
            "UDP socket",
            Box::new(move || UdpSocket::bind("127.0.0.1:0").map(drop)),
        ),
        (
            "UNIX socket",
            Box::new(move || UnixStream::connect(directory.join("control.sock")).map(drop)),
        ),
        (
            // Could be sent from to any datagram socket.
            "pair of datagram sockets",
            Box::new(move || UnixDatagram::pair().map(drop)),
        ),
        (
            // A program that is not there: a call that is allowed would say so.
            "execve",
            Box::new(move || Err(Command::new("/nonexistent").exec())),
        ),
        (
            "process",
            Box::new(move || Command::new("/bin/true").status().map(drop)),
        ),
        ("kill", Box::new(move || Ok(test_kill_process(getpid())?))),
        (
            "kill the parent",
            Box::new(move || {
                Ok(test_kill_process(
                    rustix::process::getppid().unwrap_or(Pid::INIT),
                )?)
            }),
        ),
        (
            "ptrace",
            Box::new(move || {
                // SAFETY: PTRACE_PEEKUSER of a process that is not traced touches no memory of ours; it fails.
                let result = unsafe { libc::ptrace(libc::PTRACE_PEEKUSER, libc::getpid(), 0, 0) };
                fails(result)
            }),
        ),
        (
            "executable memory",
            Box::new(move || {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let protection = libc::PROT_READ | libc::PROT_EXEC;
                // SAFETY: a new map at an address that the kernel chooses; nothing uses it.
                let map =
                    unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
                fails(if map == libc::MAP_FAILED { -1 } else { 0 })
            }),
        ),
        (
            "signals of an output to another process",
            Box::new(move || {
                // SAFETY: it takes two numbers; the output is not asked for signals.
                fails(unsafe { libc::fcntl(1, libc::F_SETOWN, libc::getpid()) }.into())
            }),
        ),
        (
            "new name space",
            Box::new(move || {
                // SAFETY: it takes no memory; a file name space of its own changes nothing for this thread.
                fails(unsafe { libc::unshare(libc::CLONE_FS) }.into())
            }),
        ),
    ]
}
