//! Doorbells that ring without an exit to this process: KVM turns the guest's store into an event (ioeventfd).
//!
//! An event carries no value, so only the places qualify where a function takes any value for the same: its
//! [kicks](PciFunction::kicks).

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use numagpu_devices::bus::PciFunction;

use super::endpoint::Decoded;
use crate::kicks::{KickError, Kicks};
use crate::sys::event::Event;

/// The kicks of one function as events of a virtual machine.
pub struct Doorbells {
    vm: Arc<VmFd>,
    kicks: Kicks,
    /// Where KVM listens now, in order of the kicks.
    addresses: Vec<Option<u64>>,
}

impl Doorbells {
    /// Starts a thread that serves the kicks of `function`; they are nowhere in the guest's address space yet. None for a
    /// function that has none.
    ///
    /// # Errors
    /// [`KickError`].
    pub fn new(
        vm: Arc<VmFd>,
        function: &Arc<dyn PciFunction>,
    ) -> Result<Option<Doorbells>, KickError> {
        let kicks = Kicks::start(function, "kvm-kicks")?;
        Ok(kicks.map(|kicks| Doorbells {
            vm,
            addresses: vec![None; kicks.all().len()],
            kicks,
        }))
    }

    /// The function's BARs are there now: listens at their kicks, and nowhere else. Where KVM does not listen, the store
    /// exits to this process as any other and has the same effect.
    pub fn place(&mut self, decoded: impl IntoIterator<Item = Decoded>) {
        let decoded: Vec<Decoded> = decoded.into_iter().collect();
        for ((kick, event), now) in self.kicks.all().iter().zip(&mut self.addresses) {
            let bar = decoded.iter().find(|it| it.bar == kick.bar);
            let address = bar
                .filter(|it| kick.offset < it.size)
                .and_then(|it| it.base.checked_add(kick.offset));
            if *now == address {
                continue;
            }
            forget(&self.vm, event, now);
            let Some(address) = address else {
                continue;
            };
            let place = IoEventAddress::Mmio(address);
            let registered = self
                .vm
                .register_ioevent(event.eventfd(), &place, NoDatamatch);
            match registered {
                Ok(()) => *now = Some(address),
                Err(error) => tracing::warn!(%error, "doorbell at {address:#x} rings by exits"),
            }
        }
    }

    /// Where KVM listens, in order of the kicks.
    #[must_use]
    pub fn addresses(&self) -> Vec<Option<u64>> {
        self.addresses.clone()
    }
}

/// KVM listens nowhere for an event any more.
fn forget(vm: &VmFd, event: &Event, now: &mut Option<u64>) {
    let Some(address) = now.take() else {
        return;
    };
    let place = IoEventAddress::Mmio(address);
    if let Err(error) = vm.unregister_ioevent(event.eventfd(), &place, NoDatamatch) {
        tracing::warn!(%error, "KVM still listens at {address:#x}");
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        for ((_, event), now) in self.kicks.all().iter().zip(&mut self.addresses) {
            forget(&self.vm, event, now);
        }
    }
}
