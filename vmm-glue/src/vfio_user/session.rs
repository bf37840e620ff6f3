//! One connection: requests in the order they came, each answered before the next is looked at.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use numagpu_devices::bus::PciFunction;

use super::client::Client;
use super::device::Device;
use super::features;
use super::framing::Framing;
use super::polling::{Poller, Polling};
use super::pump;
use super::refusal::Refusal;
use super::wire::{self, Files, Kind, Reply, command};
use super::{Limits, MAX_FDS};

/// Serves one client until it goes away. Requests allocate nothing but what they ask to keep.
pub struct Session {
    socket: Arc<OwnedFd>,
    client: Arc<Client>,
    poller: Poller,
    device: Device,
}

/// What a session receives into and replies from, some 2 MiB whose pages are touched only as far as they are used. To
/// make them anew for each client would take longer than all else that a new client asks for: the allocator clears
/// memory that it gives out a second time.
#[derive(Default)]
pub struct Buffers {
    framing: Framing,
    fds: Vec<OwnedFd>,
    reply: Reply,
}

impl Buffers {
    /// Forgets what the last client sent, and closes its descriptors.
    fn clear(&mut self) {
        self.framing.clear();
        self.fds.clear();
        self.fds.reserve(4 * MAX_FDS);
        self.reply.clear();
    }
}

impl Session {
    /// A session for a client that has just connected, at the other end of `socket`.
    #[must_use]
    pub fn new(function: Arc<dyn PciFunction>, socket: Arc<OwnedFd>, limits: Limits) -> Self {
        let client = Arc::new(Client::new(Arc::clone(&socket)));
        Self {
            socket,
            poller: Poller::default(),
            device: Device::new(function, Arc::clone(&client), limits),
            client,
        }
    }

    /// The same, that looks for messages as `polling` says.
    #[must_use]
    pub fn polling(mut self, polling: Polling) -> Self {
        self.poller = Poller::new(polling);
        self
    }

    /// Serves until the client disconnects. `leaving` is called then; after that the function is detached, and nothing
    /// of the client's is kept. The buffers may be those of an earlier session.
    ///
    /// # Errors
    /// What ended the session other than a plain disconnect.
    pub fn run(
        mut self,
        buffers: &mut Buffers,
        leaving: impl FnOnce(),
    ) -> Result<(), SessionError> {
        buffers.clear();
        self.client.serve_here();
        let result = self.serve(buffers);
        leaving();
        buffers.clear();
        self.device.disconnect();
        result
    }

    fn serve(&mut self, buffers: &mut Buffers) -> Result<(), SessionError> {
        let Buffers {
            framing,
            fds,
            reply,
        } = buffers;
        while framing.receive(&*self.socket, &mut self.poller)? > 0 {
            loop {
                let message = match framing.next(fds) {
                    Ok(Some(message)) => message,
                    Ok(None) => break,
                    Err((header, refusal)) => {
                        if header.kind() != Kind::Reply && !header.no_reply() {
                            let reply = reply.refuse(&header, refusal.errno());
                            self.client.reply(reply, &[])?;
                        }
                        return Err(refusal.into());
                    }
                };
                let header = message.header;
                if header.kind() == Kind::Reply {
                    match self.client.has_twin() {
                        false => self.client.answer(&header, message.body),
                        true => tracing::debug!(id = header.id, "a reply on the wrong socket"),
                    }
                    continue;
                }
                reply.clear();
                // With a second socket replies come whatever this thread does.
                let waits = header.command == command::DEVICE_FEATURE
                    && !self.client.has_twin()
                    && features::sets_state(message.body);
                let got = fds.len();
                let too_many = message.fds_lost || got > MAX_FDS;
                let mut carry_out = |body: &[u8]| {
                    wire::decode(&header, body)
                        .and_then(|it| self.device.handle(it, &header, fds, reply))
                };
                let done = if too_many {
                    Err(Refusal::Fds { got, max: MAX_FDS })
                } else if waits {
                    let body = message.body.to_vec();
                    let work = || carry_out(&body);
                    pump::answering(&self.socket, &self.client, framing, work)?
                } else {
                    self.client.begin();
                    let done = carry_out(message.body);
                    self.client.end();
                    done
                };
                if let Err(refusal) = &done {
                    tracing::debug!(command = header.command, id = header.id, "{refusal}");
                }
                match done {
                    Ok(()) if header.no_reply() => {}
                    Ok(()) => {
                        let which = reply.files();
                        let files = self.device.files(which);
                        let reply = reply.finish(&header);
                        self.client.reply(reply, &files)?;
                        if which == Files::Twin {
                            self.device.twin_sent();
                        }
                    }
                    Err(refusal) => {
                        if !header.no_reply() {
                            let reply = reply.refuse(&header, refusal.errno());
                            self.client.reply(reply, &[])?;
                        }
                        if let Refusal::Version { .. } = refusal {
                            return Err(SessionError::Version(refusal));
                        }
                    }
                }
            }
            // Descriptors that no request kept.
            fds.clear();
        }
        Ok(())
    }
}

/// Why a session ended other than by the client's leave.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream cannot be followed any further.
    #[error("the stream is out of step: {0}")]
    Stream(#[from] Refusal),
    /// There is no version that both sides speak.
    #[error("the client speaks another {0}")]
    Version(Refusal),
    /// The socket failed.
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
}
