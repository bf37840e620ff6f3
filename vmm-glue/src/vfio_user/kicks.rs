//! A function's [kicks](PciFunction::kicks) as event descriptors of one client: its kernel signals them in place of a
//! message, and a thread writes to the function in the client's stead.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use numagpu_devices::bus::{IoFd, Kick, PciFunction};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

/// The events of one client. The thread ends when this is dropped.
pub struct Kicks {
    bells: Arc<[(Kick, OwnedFd)]>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Kicks {
    /// Events for all kicks of a function that has some.
    ///
    /// # Errors
    /// The host's error: no descriptors, no thread.
    pub fn start(function: &Arc<dyn PciFunction>) -> io::Result<Option<Kicks>> {
        let kicks = function.kicks();
        if kicks.is_empty() {
            return Ok(None);
        }
        // A read that finds nothing must not stop the thread.
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let bells = kicks.iter().map(|kick| Ok((*kick, event()?)));
        let bells: Arc<[_]> = bells.collect::<Result<Vec<_>, Errno>>()?.into();
        let stop = Arc::new(event()?);
        let thread = std::thread::Builder::new().name("vfio-kicks".to_owned());
        let thread = thread.spawn({
            let (function, bells, stop) =
                (Arc::clone(function), Arc::clone(&bells), Arc::clone(&stop));
            move || serve(&*function, &bells, &stop)
        })?;
        Ok(Some(Kicks {
            bells,
            stop,
            thread: Some(thread),
        }))
    }

    /// Those in a BAR: writes of any size and value.
    pub fn of(&self, bar: u8) -> impl Iterator<Item = IoFd<'_>> {
        let here = self.bells.iter().filter(move |(kick, _)| kick.bar == bar);
        here.map(|(kick, event)| IoFd {
            offset: kick.offset,
            size: 0,
            datamatch: None,
            event: event.as_fd(),
        })
    }
}

impl Drop for Kicks {
    fn drop(&mut self) {
        let told = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let (Ok(_), Some(thread)) = (told, self.thread.take()) {
            // A thread that panicked has said so.
            let _panicked = thread.join();
        }
    }
}

/// Writes to the function for every event, until the end.
fn serve(function: &dyn PciFunction, bells: &[(Kick, OwnedFd)], stop: &OwnedFd) {
    let events = bells.iter().map(|(_, event)| event);
    let mut fds: Vec<_> = std::iter::once(stop)
        .chain(events)
        .map(|fd| PollFd::new(fd, PollFlags::IN))
        .collect();
    loop {
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::error!("kicks are not heard any more: {error}");
                return;
            }
        }
        let mut rung = fds.iter().map(|fd| !fd.revents().is_empty());
        if rung.next() == Some(true) {
            return;
        }
        for ((kick, event), _) in bells.iter().zip(rung).filter(|(_, rung)| *rung) {
            // Cleared first: what rings from here on comes again.
            if rustix::io::read(event, &mut [0; 8]).is_ok() {
                function.bar_write(kick.bar, kick.offset, &[0; 4]);
            }
        }
    }
}
