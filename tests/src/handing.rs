//! Starting a command with descriptors, as a service manager does.
#![allow(unsafe_code, reason = "fork and exec have no safe form")]

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::io::fcntl_dupfd_cloexec;

/// The first number that is handed over (`SD_LISTEN_FDS_START`).
pub const FIRST: RawFd = 3;

/// Above any number that a command is given, so that giving one does not overwrite another.
const APART: RawFd = 100;

/// `command` with descriptors as its numbers 3, 4 and so on.
///
/// # Panics
/// If the host has no more descriptors.
#[must_use]
pub fn with_descriptors(mut command: Command, descriptors: &[OwnedFd]) -> Command {
    let apart = |fd: &OwnedFd| fcntl_dupfd_cloexec(fd, APART).expect("one more descriptor");
    let apart: Vec<OwnedFd> = descriptors.iter().map(apart).collect();
    let give = move || -> io::Result<()> {
        for (number, fd) in (FIRST..).zip(&apart) {
            // SAFETY: it takes two numbers, and nothing in the child uses the second but what it executes.
            if unsafe { libc::dup2(fd.as_raw_fd(), number) } != number {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls (dup2) on values made before: no lock, no allocation.
    unsafe { command.pre_exec(give) };
    command
}

/// The command that runs `command` as a service manager does: descriptors from 3 on, `LISTEN_PID` its own process,
/// `LISTEN_FDNAMES` unless there are no names.
///
/// # Panics
/// If the host has no more descriptors.
#[must_use]
pub fn as_service(command: &Command, descriptors: &[OwnedFd], names: Option<&str>) -> Command {
    // The shell knows the number of the process that it becomes.
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""]);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        shell.current_dir(directory);
    }
    shell.env("LISTEN_FDS", descriptors.len().to_string());
    if let Some(names) = names {
        shell.env("LISTEN_FDNAMES", names);
    }
    with_descriptors(shell, descriptors)
}
