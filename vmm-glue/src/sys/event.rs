//! Event descriptors for those who want them as KVM's bindings have them, and for those who want a plain descriptor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use vmm_sys_util::eventfd::EventFd;

/// An event that does not block (eventfd).
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// One that did not happen yet.
    ///
    /// # Errors
    /// The host's: no descriptors.
    pub fn new() -> io::Result<Event> {
        EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map(Event)
    }

    /// Makes it happen.
    ///
    /// # Errors
    /// The host's: it happened 2^64 - 2 times and nobody took it.
    pub fn signal(&self) -> io::Result<()> {
        self.0.write(1)
    }

    /// Whether it happened since this was asked last.
    pub fn take(&self) -> bool {
        self.0.read().is_ok()
    }

    /// As KVM's bindings have it.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is this value's and stays open as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}
