//! Who is let in to a function, and when.
//!
//! One thread per function accepts a client and serves it, so that nobody has to be woken in between. While it serves,
//! clients wait in the socket's backlog; where they are to be refused instead ([`SecondClient`]), a second thread
//! accepts and closes them, and sleeps at other times. One that comes while the last one's leftovers are cleared away
//! waits for that. Where a connected socket was handed over instead of one that listens, nobody accepts, and the server
//! is over when that client has gone. While a client has a second socket (`twin_socket`), one more thread reads there.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use numagpu_devices::bus::PciFunction;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use thiserror::Error;

use super::Limits;
use super::listener::{Listener, Name, Source};
use super::polling::Polling;
use super::session::{Buffers, Session};

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

/// What becomes of a client that comes while another is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecondClient {
    /// Its connection is closed at once.
    #[default]
    Refuse,
    /// It waits in the socket's backlog until the other has gone.
    Queue,
}

/// How a [`Server`] treats its clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What becomes of a client that comes while another is served.
    pub second_client: SecondClient,
    /// Whether sessions look for messages before they sleep.
    pub polling: Polling,
    /// What is taken of a client.
    pub limits: Limits,
}

impl From<SecondClient> for Policy {
    fn from(second_client: SecondClient) -> Policy {
        Policy {
            second_client,
            ..Policy::default()
        }
    }
}

impl From<Limits> for Policy {
    fn from(limits: Limits) -> Policy {
        Policy {
            limits,
            ..Policy::default()
        }
    }
}

impl From<Polling> for Policy {
    fn from(polling: Polling) -> Policy {
        Policy {
            polling,
            ..Policy::default()
        }
    }
}

/// Serves a function on a socket until it is dropped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Removed last, when nobody accepts any more.
    name: Name,
}

/// Stops a [`Server`] from another thread, or waits for its end there.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

/// What the threads and the owner share.
#[derive(Debug)]
struct Shared {
    policy: Policy,
    state: Mutex<State>,
    /// Wakes the refusing thread when somebody is served, and those who wait for the end.
    changed: Condvar,
    /// Readable once the server is to stop.
    stop: OwnedFd,
}

/// Where the clients come from.
#[derive(Debug)]
enum Clients {
    /// A socket that listens and never blocks.
    Listen(Arc<OwnedFd>),
    /// The only one there will be.
    One(Arc<OwnedFd>),
}

#[derive(Debug)]
enum State {
    /// Nobody is connected.
    Idle,
    /// Being served.
    Serving(Arc<OwnedFd>),
    /// Gone, and being cleared away.
    Leaving,
    /// The server stops or has stopped.
    Stopped,
}

impl Server {
    /// Listens on a new UNIX socket at `path` with mode 0600 and serves `function` there, to one client at a time; a
    /// second one is refused. Clients can connect when this returns. A socket that a killed process left at `path` is
    /// replaced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(
        path: impl Into<PathBuf>,
        function: Arc<dyn PciFunction>,
    ) -> Result<Self, ServerError> {
        Self::start(Listener::bind(path)?, function, SecondClient::Refuse)
    }

    /// Serves `function` to the clients of `listener`, one at a time.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(
        listener: Listener,
        function: Arc<dyn PciFunction>,
        policy: impl Into<Policy>,
    ) -> Result<Self, ServerError> {
        let Listener { source, name } = listener;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| ServerError::Host {
            path: name.path.clone(),
            doing: "make an eventfd",
            errno,
        })?;
        let (state, source) = match source {
            Source::Listening(listener) => (State::Idle, Clients::Listen(Arc::new(listener))),
            Source::Connected(client) => {
                let client = Arc::new(client);
                (State::Serving(Arc::clone(&client)), Clients::One(client))
            }
        };
        let policy: Policy = policy.into();
        let shared = Arc::new(Shared {
            policy,
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop,
        });
        let mut server = Self {
            shared: Arc::clone(&shared),
            threads: Vec::with_capacity(2),
            name,
        };
        if let (Clients::Listen(listener), SecondClient::Refuse) = (&source, policy.second_client) {
            let (shared, listener) = (Arc::clone(&shared), Arc::clone(listener));
            server.spawn("vfio-refuse", move || shared.refuse(&listener))?;
        }
        server.spawn("vfio-serve", move || match source {
            Clients::Listen(listener) => shared.serve_all(&listener, &function),
            Clients::One(client) => shared.serve_one(client, &function),
        })?;
        Ok(server)
    }

    /// Where the socket is, as [`Listener::path`].
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// Whether a client is connected now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(*self.shared.lock(), State::Serving(_) | State::Leaving)
    }

    /// A handle that stops this server from another thread.
    #[must_use]
    pub fn stopper(&self) -> Stopper {
        Stopper(Arc::clone(&self.shared))
    }

    /// Disconnects the client if there is one, waits until the function is detached, and removes the socket's name if
    /// it is ours.
    pub fn shutdown(self) {
        drop(self);
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), ServerError> {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn(body).map_err(|source| ServerError::Thread {
            path: self.name.path.clone(),
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
                tracing::error!(socket = %self.name.path.display(), "a server thread panicked");
            }
        }
    }
}

impl Stopper {
    /// Disconnects the client if there is one and lets nobody in any more. Returns at once; the [`Server`] is
    /// still to be dropped.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Waits until the server lets nobody in any more: because it was stopped, its only client has gone, or the
    /// function failed.
    pub fn wait(&self) {
        let mut state = self.0.lock();
        while !matches!(*state, State::Stopped) {
            state = self.0.wait(state);
        }
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
        let before = std::mem::replace(&mut *state, State::Stopped);
        // Ahead of the client's end, after which the serving thread looks for the next one.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let State::Serving(client) = before {
            let _ = shutdown(&*client, Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Body of the serving thread: one client after the other.
    fn serve_all(&self, listener: &OwnedFd, function: &Arc<dyn PciFunction>) {
        let mut buffers = Buffers::default();
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
            let client = match accept(listener) {
                Ok(Some(client)) => Arc::new(client),
                Ok(None) => continue,
                Err(error) => {
                    self.rest(error);
                    continue;
                }
            };
            let mut state = self.lock();
            if matches!(*state, State::Stopped) {
                return;
            }
            *state = State::Serving(Arc::clone(&client));
            drop(state);
            if self.policy.second_client == SecondClient::Refuse {
                self.changed.notify_all();
            }
            self.session(&client, function, &mut buffers);
            let mut state = self.lock();
            if !matches!(*state, State::Stopped) {
                *state = State::Idle;
            }
        }
    }

    /// Body of the serving thread where there is but one client.
    fn serve_one(&self, client: Arc<OwnedFd>, function: &Arc<dyn PciFunction>) {
        if !matches!(*self.lock(), State::Stopped) {
            self.session(&client, function, &mut Buffers::default());
            *self.lock() = State::Stopped;
            drop(client);
            self.changed.notify_all();
        }
    }

    /// Serves a client until it has gone and its leftovers are cleared away.
    fn session(
        &self,
        client: &Arc<OwnedFd>,
        function: &Arc<dyn PciFunction>,
        buffers: &mut Buffers,
    ) {
        let session = || {
            let (function, socket) = (Arc::clone(function), Arc::clone(client));
            let session = Session::new(function, socket, self.policy.limits);
            session
                .polling(self.policy.polling)
                .run(buffers, || self.leaving())
        };
        let end = catch_unwind(AssertUnwindSafe(session));
        // The refusing thread may hold the connection a little longer; this ends it, and wakes that thread.
        let _ = shutdown(client, Shutdown::Both);
        match end {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!("a vfio-user session ended: {error}"),
            Err(panic) => {
                // The function is not to be trusted any more; its client must not wait for it.
                self.stop();
                resume_unwind(panic);
            }
        }
    }

    /// From now on whoever comes waits.
    fn leaving(&self) {
        let mut state = self.lock();
        if matches!(*state, State::Serving(_)) {
            *state = State::Leaving;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Body of the refusing thread: closes the connections of those who come while another client is served.
    fn refuse(&self, listener: &OwnedFd) {
        let mut state = self.lock();
        loop {
            let client = match &*state {
                State::Stopped => return,
                State::Serving(client) => Arc::clone(client),
                State::Idle | State::Leaving => {
                    state = self.wait(state);
                    continue;
                }
            };
            drop(state);
            let mut fds = [
                PollFd::new(listener, PollFlags::IN),
                PollFd::new(&client, PollFlags::RDHUP),
                PollFd::new(&self.stop, PollFlags::IN),
            ];
            let _ = poll(&mut fds, None);
            let [waiting, _, stop] = &fds;
            if !stop.revents().is_empty() {
                return;
            }
            state = self.lock();
            // Under the lock, so that nobody is refused who came after the client had gone.
            if !state.is_serving(&client) {
                continue;
            }
            if hung_up(&client) {
                // The serving thread is about to see it.
                while state.is_serving(&client) {
                    state = self.wait(state);
                }
            } else if !waiting.revents().is_empty() {
                match accept(listener) {
                    Ok(Some(_)) => tracing::warn!("a second vfio-user client was refused"),
                    Ok(None) => {}
                    Err(error) => {
                        // Not under the lock: the first client may leave meanwhile, or the server stop.
                        drop(state);
                        self.rest(error);
                        state = self.lock();
                    }
                }
            }
        }
    }

    /// Waits a moment, since the host has no descriptors or no memory for a client, or for the server's end.
    fn rest(&self, error: Errno) {
        tracing::warn!("cannot accept a vfio-user client: {error}");
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: 10_000_000,
        };
        let mut stop = [PollFd::new(&self.stop, PollFlags::IN)];
        let _ = poll(&mut stop, Some(&pause));
    }
}

impl State {
    /// Whether this very client is being served.
    fn is_serving(&self, client: &Arc<OwnedFd>) -> bool {
        matches!(self, State::Serving(now) if Arc::ptr_eq(now, client))
    }
}

/// The next client of the backlog, if there is one.
///
/// # Errors
/// The host's, if it has no descriptors or no memory; the client stays in the backlog.
fn accept(listener: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
    match accept_with(listener, SocketFlags::CLOEXEC) {
        Ok(client) => Ok(Some(client)),
        Err(Errno::INTR | Errno::AGAIN | Errno::CONNABORTED) => Ok(None),
        Err(error) => Err(error),
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
