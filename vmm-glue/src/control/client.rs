//! Asks a running instance, and finds the one to ask.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use thiserror::Error;

use super::SOCKET;
use super::protocol::{self, Reply, Request};
use crate::run_dir::{RunDirError, running};

/// How long an instance may take for a reply: a removal waits for a queue's work to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of a reply. One GPU with 8 partitions that have all their history has 30,000.
const MAX_REPLY: u64 = 256 << 20;

/// Why an instance has not answered.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nothing runs.
    #[error(
        "no instance of this user is running; give the control socket, or the directory that has it"
    )]
    None,
    /// It is not clear which is meant.
    #[error("{} instances of this user are running; give the control socket of one:{}", .0.len(), list(.0))]
    Several(Vec<PathBuf>),
    /// Where running instances are listed is not to be trusted.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Nobody listens there.
    #[error("no instance answers at {path}: {errno}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's error.
        errno: Errno,
    },
    /// The connection failed.
    #[error("cannot {doing} the instance at {path}: {source}")]
    Host {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// It ended in the middle.
    #[error("the instance at {path} closed the connection after {got} byte(s) of its reply")]
    Closed {
        /// The socket.
        path: PathBuf,
        /// Bytes received.
        got: usize,
    },
    /// Another program, or another version.
    #[error("the reply of the instance at {path} cannot be used: {what}")]
    Reply {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
}

fn list(paths: &[PathBuf]) -> String {
    let lines = paths.iter().map(|path| format!("\n  {}", path.display()));
    lines.collect()
}

/// The control socket that `path` names, itself or as the directory that has it; without it, that of the one running
/// instance of this user.
///
/// # Errors
/// [`ClientError`] if there is none, or more than one.
pub fn find(path: Option<&Path>) -> Result<PathBuf, ClientError> {
    if let Some(path) = path {
        return Ok(match path.is_dir() {
            true => path.join(SOCKET),
            false => path.to_owned(),
        });
    }
    let sockets = running()?.into_iter().map(|dir| dir.join(SOCKET));
    let mut sockets: Vec<PathBuf> = sockets
        .filter(|socket| socket.exists())
        // `numagpu serve` has its socket elsewhere and a link here.
        .map(|socket| socket.canonicalize().unwrap_or(socket))
        .collect();
    sockets.sort();
    sockets.dedup();
    match sockets.len() {
        0 => Err(ClientError::None),
        1 => Ok(sockets.remove(0)),
        _ => Err(ClientError::Several(sockets)),
    }
}

/// Sends a request to the instance at a control socket and waits for its reply.
///
/// # Errors
/// [`ClientError`]. A reply that says that nothing happened is no error here.
pub fn ask(socket: &Path, request: &Request) -> Result<Reply, ClientError> {
    let path = || socket.to_owned();
    let host = |doing| {
        move |source| ClientError::Host {
            path: socket.to_owned(),
            doing,
            source,
        }
    };
    let mut stream = open(socket).map_err(|errno| ClientError::Connect {
        path: path(),
        errno,
    })?;
    let ready = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
    ready.map_err(host("wait for"))?;
    let line = protocol::line(request).map_err(|error| host("ask")(error.into()))?;
    stream.write_all(&line).map_err(host("ask"))?;
    let mut reply = Vec::new();
    let mut piece = [0; 65536];
    while !reply.contains(&b'\n') {
        if reply.len() as u64 > MAX_REPLY {
            let what = format!("it has more than {MAX_REPLY} bytes");
            return Err(ClientError::Reply { path: path(), what });
        }
        match stream.read(&mut piece) {
            Ok(0) => {
                let got = reply.len();
                return Err(ClientError::Closed { path: path(), got });
            }
            Ok(got) => reply.extend(piece.iter().take(got)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let what = format!("it did not come within {} s", PATIENCE.as_secs());
                return Err(ClientError::Reply { path: path(), what });
            }
            Err(error) => return Err(host("hear")(error)),
        }
    }
    let line = reply.split(|byte| *byte == b'\n').next();
    protocol::reply(line.unwrap_or_default())
        .map_err(|what| ClientError::Reply { path: path(), what })
}

/// Connects without waiting for an instance that takes nobody.
fn open(path: &Path) -> Result<UnixStream, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    connect(&socket, &address)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What comes of asking a server that sends this and closes.
    fn answered(bytes: &'static [u8]) -> Result<Reply, String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(SOCKET);
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 33];
            stream.read_exact(&mut request).unwrap();
            stream.write_all(bytes).unwrap();
        });
        let reply = ask(&path, &Request::Status {});
        server.join().unwrap();
        let place = directory.path().display().to_string();
        reply.map_err(|error| error.to_string().replace(&place, "DIR"))
    }

    #[test]
    fn a_reply_that_is_none_is_told() {
        for (bytes, message) in [
            (
                &b""[..],
                "the instance at DIR/control.sock closed the connection after 0 byte(s) of its reply",
            ),
            (
                b"{\"version\":1",
                "the instance at DIR/control.sock closed the connection after 12 byte(s) of its reply",
            ),
            (
                b"hello\n",
                "the reply of the instance at DIR/control.sock cannot be used: it is not understood: expected value at line 1 column 1",
            ),
        ] {
            assert_eq!(answered(bytes), Err(message.to_owned()));
        }
    }

    #[test]
    fn a_place_without_an_instance_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = find(Some(directory.path())).unwrap();
        assert_eq!(path, directory.path().join(SOCKET));
        let error = ask(&path, &Request::Status {}).unwrap_err().to_string();
        assert!(
            error.starts_with("no instance answers at ") && error.contains("os error 2"),
            "{error}"
        );
        std::fs::write(&path, "").unwrap();
        let error = ask(&path, &Request::Status {}).unwrap_err().to_string();
        assert!(error.contains("os error 111"), "{error}");
    }
}
