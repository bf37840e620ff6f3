//! Replies that come while the serving thread has a request to carry out that may wait for them.
//!
//! A device that is to stop for a migration finishes the packets that it is at, and those may move memory that the
//! client is asked for. A client answers while it waits for a reply of ours, so such a request is carried out by a
//! thread of its own, while the serving thread goes on to hand out replies. Another request that comes meanwhile has
//! to wait for its turn, and what comes behind it too: from then on the rule of [`super::client::BUSY`] holds again.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::resume_unwind;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::client::Client;
use super::framing::Framing;
use super::polling::Poller;

/// Makes an event readable when it is dropped.
struct AtEnd<'e>(&'e OwnedFd);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        // The first write of an eventfd cannot fail.
        let _ = rustix::io::write(self.0, &1_u64.to_ne_bytes());
    }
}

/// Does `work` in another thread, and hands out replies of the client until it is done. A client that goes away ends
/// all waits.
///
/// # Errors
/// The host's, if it gives no thread or no event; the work is not begun then.
pub fn answering<T: Send>(
    socket: &OwnedFd,
    client: &Client,
    framing: &mut Framing,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    let done = eventfd(0, EventfdFlags::CLOEXEC)?;
    std::thread::scope(|scope| {
        let at_end = AtEnd(&done);
        let thread = std::thread::Builder::new().name("vfio-step".into());
        let worker = thread.spawn_scoped(scope, move || {
            let _at_end = at_end;
            work()
        })?;
        if !hand_out(socket, client, framing, &done) {
            client.begin();
            wait(&mut [PollFd::new(&done, PollFlags::IN)]);
            client.end();
        }
        Ok(worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

/// Hands out replies until `done` is readable; false if no more can be.
fn hand_out(socket: &OwnedFd, client: &Client, framing: &mut Framing, done: &OwnedFd) -> bool {
    let mut poller = Poller::default();
    while hand_out_received(client, framing) {
        let mut fds = [
            PollFd::new(done, PollFlags::IN),
            PollFd::new(socket, PollFlags::IN),
        ];
        wait(&mut fds);
        let [done, _] = &fds;
        if !done.revents().is_empty() {
            return true;
        }
        match framing.receive(socket, &mut poller) {
            Ok(1..) => {}
            // It may still want the answer to what it sent.
            Ok(0) => {
                client.end_replies();
                return false;
            }
            Err(_) => {
                client.close();
                return false;
            }
        }
    }
    false
}

/// Hands out the replies that are here; false if something else is before them.
fn hand_out_received(client: &Client, framing: &mut Framing) -> bool {
    let mut fds = Vec::new();
    loop {
        match framing.is_reply_next() {
            None => return true,
            Some(false) => return false,
            Some(true) => {}
        }
        match framing.next(&mut fds) {
            Ok(Some(reply)) => client.answer(&reply.header, reply.body),
            Ok(None) => return true,
            // Left for who comes back to it.
            Err(_) => return false,
        }
    }
}

/// Waits until one of the descriptors is readable or broken.
fn wait(fds: &mut [PollFd<'_>]) {
    while poll(fds, None) == Err(Errno::INTR) {}
}
