//! What a process that serves GPUs gives up once everything it needs is open.
//!
//! | layer | what is left |
//! |---|---|
//! | no new privileges | a program that it started could gain none |
//! | capabilities | none, also for root |
//! | landlock (`files`) | removing the names that it made; no other file, no TCP, no signal to others |
//! | seccomp (`calls`) | the system calls of a running server; the others fail with `EPERM` |
//!
//! All but the last are a thread's own and inherited by the threads that it starts, so [`enter`] comes before the first
//! thread. Why it is so: `docs/adr/0006-*.md`.

mod calls;
mod files;

use std::fmt;
use std::io::{self, Write as _};
use std::path::PathBuf;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, set_capabilities,
    set_no_new_privs,
};
use thiserror::Error;

pub use calls::CallsError;
pub use files::FilesError;

/// Whether what is not needed is given up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// It is.
    #[default]
    On,
    /// Nothing is, but the kernel logs each system call that would be refused.
    Log,
    /// Nothing is.
    Off,
}

/// Names that are still to be removed inside.
#[derive(Clone, Debug, Default)]
pub struct Leavings {
    /// Directories in which files, links and sockets are removed.
    pub files_in: Vec<PathBuf>,
    /// Directories in which empty directories are removed.
    pub directories_in: Vec<PathBuf>,
}

/// Why the sandbox cannot be entered. What was given up until then stays so.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// There are threads already, which would stay outside.
    #[error(
        "{count} threads run already; a sandbox is entered by the first one, before the others"
    )]
    Threads {
        /// How many.
        count: usize,
    },
    /// The host refused.
    #[error("cannot {doing}: {source}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// No landlock, though the kernel has it.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// No seccomp.
    #[error(transparent)]
    Calls(#[from] CallsError),
}

/// What is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sandbox {
    mode: Mode,
    /// ABI of landlock; 0 if the kernel has none.
    landlock: u32,
}

impl Sandbox {
    /// None.
    pub const NONE: Sandbox = Sandbox {
        mode: Mode::Off,
        landlock: 0,
    };

    /// What could not be applied, by name.
    #[must_use]
    pub fn missing(&self) -> Option<&'static str> {
        match (self.mode, self.landlock) {
            (Mode::On, 0) => Some("landlock: the kernel has none, or it is not enabled"),
            (Mode::On, 1..=3) => {
                Some("landlock for TCP, abstract sockets and signals: the kernel's is too old")
            }
            (Mode::On, 4 | 5) => {
                Some("landlock for abstract sockets and signals: the kernel's is too old")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Off => f.write_str("off"),
            Mode::Log => write!(f, "log ({} system calls are not logged)", calls::count()),
            Mode::On => {
                let calls = calls::count();
                write!(f, "on ({calls} system calls, no capabilities, ")?;
                match self.landlock {
                    0 => f.write_str("no landlock)"),
                    abi => write!(f, "landlock ABI {abi})"),
                }
            }
        }
    }
}

/// Gives up what a server does not need, as `mode` says, but for what `leavings` takes. There is no way back. The caller is the
/// only thread; those that it starts later are inside too.
///
/// # Errors
/// [`SandboxError`].
pub fn enter(mode: Mode, leavings: &Leavings) -> Result<Sandbox, SandboxError> {
    if mode == Mode::Off {
        return Ok(Sandbox::NONE);
    }
    let count = threads().map_err(|source| SandboxError::Host {
        doing: "count the threads in /proc/self/task",
        source,
    })?;
    if count != 1 {
        return Err(SandboxError::Threads { count });
    }
    let host = |doing| {
        move |errno: Errno| SandboxError::Host {
            doing,
            source: errno.into(),
        }
    };
    set_no_new_privs(true).map_err(host("rule out new privileges"))?;
    let mut landlock = 0;
    if mode == Mode::On {
        landlock = files::restrict(leavings)?;
        drop_capabilities().map_err(host("drop capabilities"))?;
    }
    calls::restrict(mode)?;
    let sandbox = Sandbox { mode, landlock };
    tracing::info!("sandbox {sandbox}");
    if let Some(missing) = sandbox.missing() {
        tracing::info!("sandbox without {missing}");
    }
    Ok(sandbox)
}

/// Says after a panic's own message that it came inside the sandbox, where a refused call may be its cause.
pub fn explain_panics(sandbox: Sandbox) {
    if sandbox.mode != Mode::On {
        return;
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        let _ = writeln!(
            io::stderr(),
            "numagpu: the panic was inside the sandbox, where a backtrace finds no names and calls that a server does \
             not need fail with EPERM; --sandbox log and --sandbox off tell whether that is its cause"
        );
    }));
}

fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// Drops all capabilities of this thread, so that not even root's are left.
fn drop_capabilities() -> Result<(), Errno> {
    match clear_ambient_capability_set() {
        // Linux before 4.3 has no such set.
        Err(Errno::INVAL) => {}
        other => other?,
    }
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    if capabilities(None)? != none {
        set_capabilities(None, none)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let with = |landlock| Sandbox {
            mode: Mode::On,
            landlock,
        };
        assert!(with(0).missing().unwrap().contains("the kernel has none"));
        assert!(with(3).missing().unwrap().contains("TCP"));
        assert!(with(5).missing().unwrap().contains("signals"));
        assert_eq!(with(6).missing(), None);
        assert_eq!(Sandbox::NONE.missing(), None);
        assert!(with(0).to_string().ends_with("no landlock)"));
        assert!(with(7).to_string().ends_with("landlock ABI 7)"));
    }

    #[test]
    fn a_process_with_threads_stays_outside() {
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || receiver.recv());
        let error = enter(Mode::On, &Leavings::default()).unwrap_err();
        assert!(matches!(error, SandboxError::Threads { count: 2.. }));
        drop(sender);
        assert!(other.join().unwrap().is_err());
    }
}
