//! A function's [kicks](PciFunction::kicks) as events: whose kernel signals them in place of a message or an exit tells no
//! value, and a thread writes to the function in the guest's stead.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::JoinHandle;

use numagpu_devices::bus::{IoFd, Kick, PciFunction};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use thiserror::Error;

use crate::sys::event::Event;

/// Why kicks have no events.
#[derive(Debug, Error)]
pub enum KickError {
    /// No descriptors.
    #[error("no eventfd for a kick: {0}")]
    Event(io::Error),
    /// No thread.
    #[error("no thread for kicks: {0}")]
    Thread(io::Error),
}

/// The events of one listener. The thread ends when this is dropped.
#[derive(Debug)]
pub struct Kicks {
    bells: Arc<[(Kick, Event)]>,
    stop: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Kicks {
    /// Events for all kicks of a function that has some, and a thread of that name.
    ///
    /// # Errors
    /// [`KickError`].
    pub fn start(function: &Arc<dyn PciFunction>, name: &str) -> Result<Option<Kicks>, KickError> {
        let kicks = function.kicks();
        if kicks.is_empty() {
            return Ok(None);
        }
        let bells = kicks.iter().map(|kick| Ok((*kick, Event::new()?)));
        let bells = bells.collect::<io::Result<Vec<_>>>();
        let bells: Arc<[_]> = bells.map_err(KickError::Event)?.into();
        let stop = Arc::new(Event::new().map_err(KickError::Event)?);
        let thread = std::thread::Builder::new().name(name.to_owned());
        let thread = thread.spawn({
            let (function, bells, stop) =
                (Arc::clone(function), Arc::clone(&bells), Arc::clone(&stop));
            move || serve(&*function, &bells, &stop)
        });
        Ok(Some(Kicks {
            bells,
            stop,
            thread: Some(thread.map_err(KickError::Thread)?),
        }))
    }

    /// All of them, in the function's order.
    pub fn all(&self) -> &[(Kick, Event)] {
        &self.bells
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
        if let (Ok(()), Some(thread)) = (self.stop.signal(), self.thread.take()) {
            // A thread that panicked has said so.
            let _panicked = thread.join();
        }
    }
}

/// Writes to the function for every event, until the end.
fn serve(function: &dyn PciFunction, bells: &[(Kick, Event)], stop: &Event) {
    let events = bells.iter().map(|(_, event)| event);
    let mut fds: Vec<_> = std::iter::once(stop)
        .chain(events)
        .map(|event| PollFd::new(event, PollFlags::IN))
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
            // Taken first: what rings from here on comes again.
            if event.take() {
                function.bar_write(kick.bar, kick.offset, &[0; 4]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use numagpu_devices::bus::{Attachment, FunctionLayout, ResetKind};

    use super::*;

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(10);

    /// A function that tells of its writes.
    struct Teller {
        kicks: Vec<Kick>,
        written: Sender<(u8, u64)>,
        layout: FunctionLayout,
    }

    impl PciFunction for Teller {
        fn layout(&self) -> &FunctionLayout {
            &self.layout
        }

        fn attach(&self, _: Attachment) {}

        fn detach(&self) {}

        fn dma_changed(&self) {}

        fn config_read(&self, _: u32, _: &mut [u8]) {}

        fn config_write(&self, _: u32, _: &[u8]) {}

        fn bar_read(&self, _: u8, _: u64, _: &mut [u8]) {}

        fn bar_write(&self, bar: u8, offset: u64, _: &[u8]) {
            self.written.send((bar, offset)).unwrap();
        }

        fn kicks(&self) -> &[Kick] {
            &self.kicks
        }

        fn reset(&self, _: ResetKind) {}
    }

    fn function(places: &[(u8, u64)]) -> (Arc<dyn PciFunction>, Receiver<(u8, u64)>) {
        let (written, heard) = channel();
        let kick = |(bar, offset): &(u8, u64)| Kick {
            bar: *bar,
            offset: *offset,
        };
        let teller = Teller {
            kicks: places.iter().map(kick).collect(),
            written,
            layout: FunctionLayout {
                bars: Vec::new(),
                config_size: 256,
                msix_vectors: 0,
            },
        };
        (Arc::new(teller), heard)
    }

    #[test]
    fn an_event_is_a_write_at_its_place_and_many_at_once_are_at_least_one() {
        let places = [(2, 0x800), (2, 0x808), (4, 0)];
        let (function, heard) = function(&places);
        let kicks = Kicks::start(&function, "test").unwrap().unwrap();
        for ((kick, event), place) in kicks.all().iter().zip(places).rev() {
            assert_eq!((kick.bar, kick.offset), place);
            event.signal().unwrap();
            assert_eq!(heard.recv_timeout(LONG), Ok(place));
        }
        for (_, event) in kicks.all() {
            (0..100).for_each(|_| event.signal().unwrap());
        }
        let mut missing = places.to_vec();
        while !missing.is_empty() {
            let place = heard.recv_timeout(LONG).unwrap();
            missing.retain(|it| *it != place);
        }
        let of: Vec<u64> = kicks.of(2).map(|it| it.offset).collect();
        assert_eq!(of, [0x800, 0x808]);
        drop(kicks);
        // Nobody has the function any more: its thread is at its end.
        assert_eq!(Arc::strong_count(&function), 1);
    }

    #[test]
    fn a_function_without_kicks_has_no_thread() {
        let (function, _heard) = function(&[]);
        assert!(Kicks::start(&function, "test").unwrap().is_none());
        assert_eq!(Arc::strong_count(&function), 1);
    }
}
