//! What a service is given: descriptors, and a service manager, such as systemd: sockets that it hands over (`sd_listen_fds(3)`), and telling it how far the
//! service is (`sd_notify(3)`).

use std::io;
use std::os::fd::RawFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;

/// Numbers and names of the sockets that a service manager hands to this process, in their order. Empty if it hands
/// none, or hands them to another process.
///
/// # Errors
/// If `LISTEN_PID`, `LISTEN_FDS` or `LISTEN_FDNAMES` make no sense, or a descriptor is not open.
pub fn sockets() -> io::Result<Vec<(RawFd, String)>> {
    Ok(sd_notify::listen_fds_with_names()?.collect())
}

/// Takes as many descriptors as the process may have: clients' files and events are many, and the usual 1024 are meant
/// for programs that use `select(2)`.
pub fn take_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, all) {
        tracing::warn!(
            "{:?} descriptors are all there will be: {error}",
            limit.current
        );
    }
}

/// A way to the service manager, opened early: inside the sandbox no socket can be made.
#[derive(Debug)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    /// The manager that `NOTIFY_SOCKET` names, if there is one.
    ///
    /// # Errors
    /// If its socket cannot be connected to.
    pub fn connect() -> io::Result<Manager> {
        let Some(address) = std::env::var_os("NOTIFY_SOCKET").filter(|it| !it.is_empty()) else {
            return Ok(Manager(None));
        };
        let socket = UnixDatagram::unbound()?;
        match address.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(Path::new(&address))?,
        }
        // It waits for us, not we for it.
        socket.set_nonblocking(true)?;
        Ok(Manager(Some(socket)))
    }

    /// Everything is there: clients are served.
    pub fn ready(&self) {
        self.tell(&NotifyState::Ready);
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.tell(&NotifyState::Stopping);
    }

    fn tell(&self, state: &NotifyState<'_>) {
        let Some(socket) = &self.0 else { return };
        if let Err(error) = socket.send(format!("{state}\n").as_bytes()) {
            tracing::warn!("cannot tell the service manager {state}: {error}");
        }
    }
}
