//! Child processes that do not outlive this one.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command};

use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// Starts `command` so that the kernel kills it with SIGKILL when the calling **thread** ends, by whatever means,
/// SIGKILL included, and hands it `inherit` under their own numbers.
///
/// The kernel ties the signal to the thread, not to the process (prctl(2), `PR_SET_PDEATHSIG`): call this from a
/// thread that lives as long as the child should, such as the main thread. A set-user-ID program drops the tie.
///
/// Descriptors in `inherit` lose their close-on-exec flag in the child only.
///
/// # Errors
/// The host's error if the child cannot be started; also if this process dies while it is.
pub fn spawn_tied(mut command: Command, inherit: &[BorrowedFd<'_>]) -> io::Result<Child> {
    let parent = getpid();
    let numbers: Vec<RawFd> = inherit.iter().map(AsRawFd::as_raw_fd).collect();
    let prepare = move || tie_to(parent).and_then(|()| inherit_all(&numbers));
    // SAFETY: between fork and exec `prepare` only makes system calls (prctl, getppid, fcntl) on values made
    // before the fork: it takes no lock and allocates nothing, as errors are plain error numbers.
    unsafe { command.pre_exec(move || prepare().map_err(io::Error::from)) };
    command.spawn()
}

/// Asks for SIGKILL when the parent's thread ends, and fails if it ended before that was asked for.
fn tie_to(parent: Pid) -> Result<(), Errno> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() == Some(parent) {
        Ok(())
    } else {
        Err(Errno::SRCH)
    }
}

fn inherit_all(numbers: &[RawFd]) -> Result<(), Errno> {
    for number in numbers {
        // SAFETY: the descriptors were open when `spawn_tied` borrowed them; the borrow lasts until the child has
        // started, and this process has its own copy of the table.
        let fd = unsafe { BorrowedFd::borrow_raw(*number) };
        let flags = fcntl_getfd(fd)?;
        fcntl_setfd(fd, flags.difference(FdFlags::CLOEXEC))?;
    }
    Ok(())
}
