//! Doorbells that ring without an exit to this process: KVM turns the guest's store into an event (ioeventfd).
//!
//! An event carries no value, so only the places qualify where a function takes any value for the same: its
//! [kicks](PciFunction::kicks). A thread waits for the events and writes in the guest's stead.

use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use numagpu_devices::bus::{Kick, PciFunction};
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::endpoint::Decoded;

/// Why doorbells ring by exits only.
#[derive(Debug, Error)]
pub enum DoorbellError {
    /// No eventfd.
    #[error("no eventfd for a doorbell: {0}")]
    Eventfd(std::io::Error),
    /// No thread.
    #[error("no thread for doorbells: {0}")]
    Thread(std::io::Error),
}

/// A place and its event.
struct Bell {
    kick: Kick,
    event: Arc<EventFd>,
    /// Where KVM listens now.
    address: Option<u64>,
}

/// The kicks of one function as events of a virtual machine.
pub struct Doorbells {
    vm: Arc<VmFd>,
    bells: Vec<Bell>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Doorbells {
    /// Starts a thread that serves the kicks of `function`; they are nowhere in the guest's address space yet. None for a
    /// function that has none.
    ///
    /// # Errors
    /// [`DoorbellError`].
    pub fn new(
        vm: Arc<VmFd>,
        function: &Arc<dyn PciFunction>,
    ) -> Result<Option<Doorbells>, DoorbellError> {
        let kicks = function.kicks();
        if kicks.is_empty() {
            return Ok(None);
        }
        let event = || {
            let made = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK);
            made.map_err(DoorbellError::Eventfd)
        };
        let bells = kicks.iter().map(|kick| {
            event().map(|event| Bell {
                kick: *kick,
                event: Arc::new(event),
                address: None,
            })
        });
        let bells = bells.collect::<Result<Vec<_>, _>>()?;
        let stop = event()?;
        let served: Vec<_> = bells
            .iter()
            .map(|it| (it.kick, Arc::clone(&it.event)))
            .collect();
        let function = Arc::clone(function);
        let epoll = listen(&served, &stop).map_err(DoorbellError::Eventfd)?;
        let thread = std::thread::Builder::new()
            .name("gpu-doorbells".to_owned())
            .spawn(move || serve(&*function, &served, &epoll))
            .map_err(DoorbellError::Thread)?;
        Ok(Some(Doorbells {
            vm,
            bells,
            stop,
            thread: Some(thread),
        }))
    }

    /// The function's BARs are there now: listens at their kicks, and nowhere else. Where KVM does not listen, the store
    /// exits to this process as any other and has the same effect.
    pub fn place(&mut self, decoded: impl IntoIterator<Item = Decoded>) {
        let decoded: Vec<Decoded> = decoded.into_iter().collect();
        for bell in &mut self.bells {
            let bar = decoded.iter().find(|it| it.bar == bell.kick.bar);
            let address = bar
                .filter(|it| bell.kick.offset < it.size)
                .and_then(|it| it.base.checked_add(bell.kick.offset));
            if bell.address == address {
                continue;
            }
            bell.forget(&self.vm);
            let Some(address) = address else {
                continue;
            };
            let place = IoEventAddress::Mmio(address);
            match self.vm.register_ioevent(&bell.event, &place, NoDatamatch) {
                Ok(()) => bell.address = Some(address),
                Err(error) => tracing::warn!(%error, "doorbell at {address:#x} rings by exits"),
            }
        }
    }

    /// Where KVM listens, in order of the kicks.
    #[must_use]
    pub fn addresses(&self) -> Vec<Option<u64>> {
        self.bells.iter().map(|it| it.address).collect()
    }
}

impl Bell {
    fn forget(&mut self, vm: &VmFd) {
        let Some(address) = self.address.take() else {
            return;
        };
        let place = IoEventAddress::Mmio(address);
        if let Err(error) = vm.unregister_ioevent(&self.event, &place, NoDatamatch) {
            tracing::warn!(%error, "KVM still listens at {address:#x}");
        }
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        for bell in &mut self.bells {
            bell.forget(&self.vm);
        }
        let stopped = self.stop.write(1);
        if let (Ok(()), Some(thread)) = (stopped, self.thread.take()) {
            // A thread that panicked has said so.
            let _panicked = thread.join();
        }
    }
}

/// What to wait for: each bell by its number, and the end by one that no bell has.
fn listen(bells: &[(Kick, Arc<EventFd>)], stop: &EventFd) -> std::io::Result<Epoll> {
    let epoll = Epoll::new()?;
    let events = bells.iter().map(|(_, event)| &**event);
    for (number, event) in (0..).zip(std::iter::once(stop).chain(events)) {
        let wanted = EpollEvent::new(EventSet::IN, number);
        epoll.ctl(ControlOperation::Add, event.as_raw_fd(), wanted)?;
    }
    Ok(epoll)
}

/// Writes to the function for every event, until the end.
fn serve(function: &dyn PciFunction, bells: &[(Kick, Arc<EventFd>)], epoll: &Epoll) {
    let mut happened = vec![EpollEvent::default(); bells.len() + 1];
    loop {
        let count = match epoll.wait(-1, &mut happened) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(%error, "doorbells are not heard any more");
                return;
            }
        };
        for number in happened.iter().take(count).map(EpollEvent::data) {
            let Some(number) = number.checked_sub(1) else {
                return;
            };
            let bell = usize::try_from(number).ok().and_then(|at| bells.get(at));
            // Cleared first: what rings from here on comes again.
            if let Some((kick, event)) = bell
                && event.read().is_ok()
            {
                function.bar_write(kick.bar, kick.offset, &[0; 4]);
            }
        }
    }
}
