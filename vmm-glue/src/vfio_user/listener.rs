//! Where a server's clients come from: a socket that is made here, or one that whoever started this process handed
//! over.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fchmod, fcntl_getfl, fcntl_setfl, fstat, lstat, unlink};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getpeername,
    getsockname, listen, socket_with,
};
use thiserror::Error;

use super::ServerError;

/// Connections that the kernel keeps until they are accepted or refused.
const BACKLOG: i32 = 16;

/// Why a descriptor that was handed over is not the socket that it should be.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum HandedError {
    /// Something else.
    #[error("descriptor {fd} is no socket")]
    NoSocket {
        /// Its number.
        fd: i32,
    },
    /// A socket of another family or type.
    #[error(
        "descriptor {fd} is a socket of family {family} and type {kind}, not a UNIX stream socket (family 1, type 1)"
    )]
    Kind {
        /// Its number.
        fd: i32,
        /// `AF_` number.
        family: u16,
        /// `SOCK_` number.
        kind: u32,
    },
    /// A socket that leads nowhere.
    #[error("descriptor {fd} is a UNIX stream socket that neither listens nor is connected")]
    Idle {
        /// Its number.
        fd: i32,
    },
    /// The host refused.
    #[error("cannot {doing} descriptor {fd}: {errno}")]
    Host {
        /// Its number.
        fd: i32,
        /// What was tried.
        doing: &'static str,
        /// The host's error.
        errno: Errno,
    },
}

/// A source of clients that nobody serves yet. A socket that was made here loses its name when this, or the server
/// that it goes to, is dropped.
#[derive(Debug)]
pub struct Listener {
    pub(super) source: Source,
    pub(super) name: Name,
}

/// What clients come through.
#[derive(Debug)]
pub(super) enum Source {
    /// A socket that listens and never blocks.
    Listening(OwnedFd),
    /// The only client there will be; its socket blocks.
    Connected(OwnedFd),
}

/// What a socket is called.
#[derive(Debug)]
pub(crate) struct Name {
    /// Its path, or how it is spoken of.
    pub(crate) path: PathBuf,
    /// `st_dev` and `st_ino` of the path if it was made here, so that only our own is removed.
    own: Option<(u64, u64)>,
}

impl Drop for Name {
    fn drop(&mut self) {
        if self.own.is_some() && identity(&self.path).ok() == self.own {
            let _ = unlink(&self.path);
        }
    }
}

impl Listener {
    /// Listens on a new UNIX socket at `path` with mode 0600. Clients can connect when this returns; they wait until
    /// they are served. A socket that a killed process left at `path` is replaced.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, ServerError> {
        let path = path.into();
        let socket = listen_at(&path)?;
        let own = identity(&path).map_err(|errno| ServerError::Host {
            path: path.clone(),
            doing: "look up the name",
            errno,
        })?;
        Ok(Self {
            source: Source::Listening(socket),
            name: Name {
                path,
                own: Some(own),
            },
        })
    }

    /// Takes over a UNIX stream socket that listens, or that is connected to the only client. Its name, if it has one,
    /// is not ours and stays.
    ///
    /// # Errors
    /// [`HandedError`].
    pub fn handed(socket: OwnedFd) -> Result<Self, HandedError> {
        let fd = socket.as_raw_fd();
        let host = |doing| move |errno| HandedError::Host { fd, doing, errno };
        let stat = fstat(&socket).map_err(host("look at"))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
            return Err(HandedError::NoSocket { fd });
        }
        let family = socket_domain(&socket).map_err(host("look at"))?;
        let kind = socket_type(&socket).map_err(host("look at"))?;
        if (family, kind) != (AddressFamily::UNIX, SocketType::STREAM) {
            return Err(HandedError::Kind {
                fd,
                family: family.as_raw(),
                kind: kind.as_raw(),
            });
        }
        let listens = socket_acceptconn(&socket).map_err(host("look at"))?;
        if !listens && getpeername(&socket).is_err() {
            return Err(HandedError::Idle { fd });
        }
        let flags = fcntl_getfl(&socket).map_err(host("look at"))?;
        let flags = match listens {
            true => flags | OFlags::NONBLOCK,
            false => flags.difference(OFlags::NONBLOCK),
        };
        fcntl_setfl(&socket, flags).map_err(host("set the mode of"))?;
        let flags = fcntl_getfd(&socket).map_err(host("look at"))?;
        fcntl_setfd(&socket, flags | FdFlags::CLOEXEC).map_err(host("set the mode of"))?;
        let address = getsockname(&socket).ok();
        let address = address.and_then(|address| SocketAddrUnix::try_from(address).ok());
        let path = address.as_ref().and_then(|address| address.path());
        let path = path.map(|path| path.to_string_lossy().into_owned());
        let path = path.unwrap_or_else(|| format!("descriptor {fd}"));
        Ok(Self {
            source: match listens {
                true => Source::Listening(socket),
                false => Source::Connected(socket),
            },
            name: Name {
                path: path.into(),
                own: None,
            },
        })
    }

    /// Where the socket is; for one that was handed over and has no path, words that say which it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.name.path
    }

    /// The socket and its name, if clients can be accepted from it.
    pub(crate) fn listening(self) -> Result<(OwnedFd, Name), ServerError> {
        match self.source {
            Source::Listening(socket) => Ok((socket, self.name)),
            Source::Connected(_) => Err(ServerError::InUse {
                path: self.name.path.clone(),
                what: "it is connected to one client",
            }),
        }
    }

    /// Whether it is connected to the only client that there will be.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(self.source, Source::Connected(_))
    }

    /// Whether the socket's name is removed at the end.
    #[must_use]
    pub fn owns_name(&self) -> bool {
        self.name.own.is_some()
    }
}

/// A listening socket at `path`, in place of a stale one.
fn listen_at(path: &Path) -> Result<OwnedFd, ServerError> {
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
fn identity(path: &Path) -> Result<(u64, u64), Errno> {
    lstat(path).map(|stat| (stat.st_dev, stat.st_ino))
}
