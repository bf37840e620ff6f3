//! The listening socket of a function, and who is let in.
//!
//! Two threads per function: one accepts, one serves. A client that comes while another is served is accepted and
//! closed at once; one that comes while the last one's leftovers are cleared away waits for that.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use numagpu_devices::bus::PciFunction;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, Mode, fchmod, lstat, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect,
    listen, shutdown, socket_with,
};
use thiserror::Error;

use super::Limits;
use super::session::Session;

/// Connections that the kernel keeps until they are accepted or refused.
const BACKLOG: i32 = 16;

/// Why a server could not be started.
#[derive(Debug, Error)]
pub enum ServerError {
    /// The path is longer than a socket's may be.
    #[error("socket path {path} has {len} bytes; at most 107 are possible")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        len: usize,
    },
    /// Another process serves there, or something that is no socket is there.
    #[error("socket path {path} is in use: {what}")]
    InUse {
        /// The path.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The host refused.
    #[error("cannot {doing} for socket {path}: {errno}")]
    Host {
        /// The path.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The host's error.
        errno: Errno,
    },
    /// No thread could be started.
    #[error("cannot start a thread for socket {path}: {source}")]
    Thread {
        /// The path.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// Serves a function on a socket until it is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    /// `st_dev` and `st_ino` of the socket's name, so that only our own is removed.
    name: (u64, u64),
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// Stops a [`Server`] from another thread.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

/// What the two threads and the owner share.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Wakes the serving thread for a client or to stop, and the accepting thread when a client is done with.
    changed: Condvar,
    /// Readable once the server is to stop.
    stop: OwnedFd,
}

#[derive(Debug)]
enum State {
    /// Nobody is connected.
    Idle,
    /// Accepted; the serving thread has not looked yet.
    Arrived(Arc<OwnedFd>),
    /// Being served, or being cleared away.
    Serving(Arc<OwnedFd>),
    /// The server stops or has stopped.
    Stopped,
}

impl Server {
    /// Listens on a new UNIX socket at `path` with mode 0600 and serves `function` there, to one client at a time.
    /// Clients can connect when this returns. A socket that a killed process left at `path` is replaced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(
        path: impl Into<PathBuf>,
        function: Arc<dyn PciFunction>,
    ) -> Result<Self, ServerError> {
        Self::bind_with(path, function, Limits::default())
    }

    /// As [`Server::bind`], taking less of a client than it could.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind_with(
        path: impl Into<PathBuf>,
        function: Arc<dyn PciFunction>,
        limits: Limits,
    ) -> Result<Self, ServerError> {
        let path = path.into();
        let failed = |doing| {
            let path = path.clone();
            move |errno| ServerError::Host { path, doing, errno }
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(failed("make an eventfd"))?;
        let listener = listen_at(&path)?;
        let name = identity(&path).map_err(failed("look up the name"))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::Idle),
            changed: Condvar::new(),
            stop,
        });
        let mut server = Self {
            path,
            name,
            shared: Arc::clone(&shared),
            threads: Vec::with_capacity(2),
        };
        server.start("vfio-accept", {
            let shared = Arc::clone(&shared);
            move || shared.accept(&listener)
        })?;
        server.start("vfio-serve", move || shared.serve(&function, limits))?;
        Ok(server)
    }

    /// Where the socket is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a client is connected now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(*self.shared.lock(), State::Arrived(_) | State::Serving(_))
    }

    /// A handle that stops this server from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Disconnects the client if there is one, waits until the function is detached, and removes the socket.
    pub fn shutdown(self) {
        drop(self);
    }

    fn start(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), ServerError> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(body).map_err(|source| ServerError::Thread {
            path: self.path.clone(),
            source,
        })?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(socket = %self.path.display(), "a server thread panicked");
            }
        }
        if identity(&self.path) == Ok(self.name) {
            let _ = unlink(&self.path);
        }
    }
}

impl Stopper {
    /// Disconnects the client if there is one and lets nobody in any more. Returns at once; the [`Server`] is
    /// still to be dropped.
    pub fn stop(&self) {
        self.0.stop();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        let mut state = self.lock();
        if let State::Arrived(client) | State::Serving(client) =
            std::mem::replace(&mut *state, State::Stopped)
        {
            let _ = shutdown(&*client, Shutdown::Both);
        }
        drop(state);
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        self.changed.notify_all();
    }

    /// Body of the accepting thread.
    fn accept(&self, listener: &OwnedFd) {
        loop {
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            let _ = poll(&mut fds, None);
            let [_, stop] = &fds;
            if !stop.revents().is_empty() {
                return;
            }
            match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(client) => self.admit(client),
                Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => {}
                Err(error) => {
                    // No descriptors or no memory: the client stays in the backlog until there are.
                    tracing::warn!("cannot accept a vfio-user client: {error}");
                    let pause = Timespec {
                        tv_sec: 0,
                        tv_nsec: 10_000_000,
                    };
                    let mut stop = [PollFd::new(&self.stop, PollFlags::IN)];
                    let _ = poll(&mut stop, Some(&pause));
                }
            }
        }
    }

    /// Hands a client to the serving thread, or closes it if another one is being served.
    fn admit(&self, client: OwnedFd) {
        let mut state = self.lock();
        loop {
            match &*state {
                State::Idle => break,
                State::Stopped => return,
                State::Arrived(other) | State::Serving(other) => {
                    if !hung_up(other) {
                        tracing::warn!("a second vfio-user client was refused");
                        return;
                    }
                }
            }
            state = self.wait(state);
        }
        *state = State::Arrived(Arc::new(client));
        drop(state);
        self.changed.notify_all();
    }

    /// Body of the serving thread.
    fn serve(&self, function: &Arc<dyn PciFunction>, limits: Limits) {
        let mut state = self.lock();
        loop {
            let client = match &*state {
                State::Stopped => return,
                State::Arrived(client) => Arc::clone(client),
                State::Idle | State::Serving(_) => {
                    state = self.wait(state);
                    continue;
                }
            };
            *state = State::Serving(Arc::clone(&client));
            drop(state);
            let session = || {
                let (function, socket) = (Arc::clone(function), Arc::clone(&client));
                Session::new(function, socket, limits).run()
            };
            match catch_unwind(AssertUnwindSafe(session)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!("a vfio-user session ended: {error}"),
                Err(panic) => {
                    // The function is not to be trusted any more; its client must not wait for it.
                    self.stop();
                    resume_unwind(panic);
                }
            }
            state = self.lock();
            if matches!(*state, State::Serving(_)) {
                *state = State::Idle;
            }
            drop(client);
            self.changed.notify_all();
        }
    }
}

/// Whether the other end of a connection is gone.
fn hung_up(client: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(client, PollFlags::RDHUP)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

/// A listening socket at `path`, in place of a stale one.
pub(crate) fn listen_at(path: &Path) -> Result<OwnedFd, ServerError> {
    let failed = |doing| {
        move |errno| ServerError::Host {
            path: path.to_owned(),
            doing,
            errno,
        }
    };
    let address = SocketAddrUnix::new(path).map_err(|errno| match errno {
        Errno::NAMETOOLONG => ServerError::PathTooLong {
            path: path.to_owned(),
            len: path.as_os_str().len(),
        },
        errno => failed("use the path")(errno),
    })?;
    let socket = new_socket().map_err(failed("make a socket"))?;
    // The name gets the socket's own mode, so nobody else can connect even for a moment (unix(7)).
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("set the mode"))?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            remove_stale(path, &address)?;
            bind(&socket, &address).map_err(failed("bind"))?;
        }
        other => other.map_err(failed("bind"))?,
    }
    listen(&socket, BACKLOG).map_err(failed("listen"))?;
    Ok(socket)
}

/// Removes a socket that nobody listens to.
fn remove_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ServerError> {
    let failed = |doing| {
        move |errno| ServerError::Host {
            path: path.to_owned(),
            doing,
            errno,
        }
    };
    let in_use = |what| ServerError::InUse {
        path: path.to_owned(),
        what,
    };
    let stat = lstat(path).map_err(failed("look up the name"))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(in_use("it is no socket"));
    }
    let probe = new_socket().map_err(failed("make a socket"))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => unlink(path).map_err(failed("remove the stale socket")),
        // A full backlog is a server's too.
        Ok(()) | Err(Errno::AGAIN) => Err(in_use("another process serves there")),
        Err(errno) => Err(failed("look for another server")(errno)),
    }
}

/// A socket that never blocks; those that are accepted from it do.
fn new_socket() -> Result<OwnedFd, Errno> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
}

/// `st_dev` and `st_ino` of a name.
pub(crate) fn identity(path: &Path) -> Result<(u64, u64), Errno> {
    lstat(path).map(|stat| (stat.st_dev, stat.st_ino))
}
