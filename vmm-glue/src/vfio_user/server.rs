//! Who is let in to a function, and when.
//!
//! Two threads per function: one accepts, one serves. While a client has a second socket, a third one reads there. A
//! client that comes while another is served is accepted and closed at once, or waits for its turn ([`SecondClient`]);
//! one that comes while the last one's leftovers are cleared away waits for that. Where a connected socket was handed over
//! instead of one that listens, nobody accepts, and the server is over when that client has gone.

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
use super::session::Session;

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
    /// It waits until the other has gone. One waits here, the next ones in the socket's backlog.
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

/// What the two threads and the owner share.
#[derive(Debug)]
struct Shared {
    policy: Policy,
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
        let (state, listener) = match source {
            Source::Listening(listener) => (State::Idle, Some(listener)),
            Source::Connected(client) => (State::Arrived(Arc::new(client)), None),
        };
        let shared = Arc::new(Shared {
            policy: policy.into(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop,
        });
        let mut server = Self {
            shared: Arc::clone(&shared),
            threads: Vec::with_capacity(2),
            name,
        };
        let only_one = listener.is_none();
        if let Some(listener) = listener {
            let shared = Arc::clone(&shared);
            server.spawn("vfio-accept", move || shared.accept(&listener))?;
        }
        server.spawn("vfio-serve", move || {
            shared.serve(&function, only_one);
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
        matches!(*self.shared.lock(), State::Arrived(_) | State::Serving(_))
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

    /// Hands a client to the serving thread, or closes it if another one is being served and no second one waits.
    fn admit(&self, client: OwnedFd) {
        let mut state = self.lock();
        loop {
            match &*state {
                State::Idle => break,
                State::Stopped => return,
                State::Arrived(other) | State::Serving(other) => {
                    if self.policy.second_client == SecondClient::Refuse && !hung_up(other) {
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

    /// Body of the serving thread. After the first client there may be no other.
    fn serve(&self, function: &Arc<dyn PciFunction>, only_one: bool) {
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
                let session = Session::new(function, socket, self.policy.limits);
                session.polling(self.policy.polling).run()
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
                *state = match only_one {
                    true => State::Stopped,
                    false => State::Idle,
                };
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
