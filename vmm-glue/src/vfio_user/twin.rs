//! A second socket for the server's commands and their replies (specification, `twin_socket`).
//!
//! It is made when the client asks for it with `VERSION`, and its other end goes with the reply. A thread reads what
//! comes there, so that a reply is taken whatever the serving thread does: that one may wait for it too. The thread ends
//! with the connection, or earlier with the socket. Commands then fail at once; the first socket is not taken instead,
//! where the client does not look for them.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::MAX_FDS;
use super::client::Client;
use super::framing::Framing;
use super::polling::Poller;
use super::refusal::Refusal;
use super::session::SessionError;
use super::wire::{Header, Kind, Reply};

/// The second socket of one connection. Dropped, it is shut down.
#[derive(Debug)]
pub(super) struct Twin {
    client: Arc<Client>,
    /// The client's end, until it has been sent.
    theirs: Option<OwnedFd>,
    reader: Option<JoinHandle<()>>,
}

impl Twin {
    /// Makes a second socket, which commands to `client` take from now on.
    ///
    /// # Errors
    /// The host's; commands then go as before.
    pub(super) fn open(client: &Arc<Client>) -> io::Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let ours = Arc::new(ours);
        let (reading, socket) = (Arc::clone(client), Arc::clone(&ours));
        let thread = std::thread::Builder::new().name("vfio-twin".to_owned());
        let reader = thread.spawn(move || {
            if let Err(error) = serve(&reading, &socket) {
                tracing::warn!("the second socket of a vfio-user client ended: {error}");
            }
            reading.end_twin();
        })?;
        client.ask_over(ours);
        Ok(Self {
            client: Arc::clone(client),
            theirs: Some(theirs),
            reader: Some(reader),
        })
    }

    /// The client's end, if it has not been sent yet.
    pub(super) fn theirs(&self) -> Option<BorrowedFd<'_>> {
        self.theirs.as_ref().map(|fd| fd.as_fd())
    }

    /// The client has its end, which is closed here, so that the client closes it when it does.
    pub(super) fn sent(&mut self) {
        self.theirs = None;
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.client.end_twin();
        if let Some(reader) = self.reader.take()
            && reader.join().is_err()
        {
            tracing::error!("the thread of a second socket panicked");
        }
    }
}

/// Takes replies and refuses commands, which belong on the first socket, until the client closes. Descriptors are closed.
fn serve(client: &Client, socket: &OwnedFd) -> Result<(), SessionError> {
    let mut framing = Framing::new();
    let mut poller = Poller::default();
    let mut fds = Vec::with_capacity(4 * MAX_FDS);
    let mut reply = Reply::new();
    let mut refuse = |header: &Header, refusal: &Refusal| {
        tracing::debug!(command = header.command, id = header.id, "{refusal}");
        match header.kind() == Kind::Reply || header.no_reply() {
            true => Ok(()),
            false => client.refuse(reply.refuse(header, refusal.errno())),
        }
    };
    while framing.receive(socket, &mut poller)? > 0 {
        loop {
            let message = match framing.next(&mut fds) {
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err((header, refusal)) => {
                    refuse(&header, &refusal)?;
                    return Err(refusal.into());
                }
            };
            let header = message.header;
            match header.kind() {
                Kind::Reply => client.answer(&header, message.body),
                Kind::Command => refuse(&header, &Refusal::SecondSocket(header.command))?,
                Kind::Reserved(kind) => refuse(&header, &Refusal::Kind(kind))?,
            }
        }
        fds.clear();
    }
    Ok(())
}
