//! MSI messages as interrupts of a virtual machine: an eventfd for each message, bound by irqfd and GSI routing.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::{Cap, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// An MSI message: `data` is stored to `address`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Where to.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// A way for one message after the other. What [`super::Msix`] needs of a VMM for each vector: [`MsiLine`] is one, and a
/// VMM with interrupt routing of its own brings its own.
pub trait MessageLine: Send {
    /// From now on [`MessageLine::send`] sends this message.
    ///
    /// # Errors
    /// The host's error; the line then sends nothing.
    fn route(&mut self, message: Message) -> Result<(), MsiError>;

    /// Sends the message. False if there is none, or nobody takes it.
    fn send(&self) -> bool;
}

/// Why messages do not become interrupts.
#[derive(Debug, Error)]
pub enum MsiError {
    /// No numbers left.
    #[error("all GSIs {}..{} are in use: a line takes one", .range.start, .range.end)]
    NoGsi {
        /// The numbers given for messages.
        range: Range<u32>,
    },
    /// Numbers that the host does not have.
    #[error("GSIs {}..{}: the host routes {have}", .range.start, .range.end)]
    Range {
        /// The numbers given for messages.
        range: Range<u32>,
        /// `KVM_CAP_IRQ_ROUTING`.
        have: u32,
    },
    /// The host refused.
    #[error("cannot {doing} GSI {gsi}: {source}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// Number.
        gsi: u32,
        /// The host's error.
        source: kvm_ioctls::Error,
    },
    /// No eventfd.
    #[error("no eventfd for GSI {gsi}: {source}")]
    Eventfd {
        /// Number.
        gsi: u32,
        /// The host's error.
        source: std::io::Error,
    },
}

/// The message routes of a virtual machine with an in-kernel local APIC (split or full irqchip).
///
/// `KVM_SET_GSI_ROUTING` replaces the whole table, so one part of a VMM has to own it: this one takes the VMM's fixed
/// entries (those of I/O APIC and PIC, where the kernel has them) and keeps them. A VMM with an owner of its own implements
/// [`MessageLine`] instead.
pub struct MsiRoutes {
    vm: Arc<VmFd>,
    fixed: Vec<kvm_irq_routing_entry>,
    range: Range<u32>,
    /// GSIs in use; those without a message are not routed.
    used: Mutex<BTreeMap<u32, Option<Message>>>,
}

impl MsiRoutes {
    /// Routes messages by the GSIs in `range`, beside `fixed`.
    ///
    /// # Errors
    /// [`MsiError::Range`] if the host does not have all of `range`.
    pub fn new(
        vm: Arc<VmFd>,
        fixed: Vec<kvm_irq_routing_entry>,
        range: Range<u32>,
    ) -> Result<Arc<MsiRoutes>, MsiError> {
        let have = u32::try_from(vm.check_extension_int(Cap::IrqRouting)).unwrap_or(0);
        if range.end > have {
            return Err(MsiError::Range { range, have });
        }
        Ok(Arc::new(MsiRoutes {
            vm,
            fixed,
            range,
            used: Mutex::default(),
        }))
    }

    /// A line, which has a GSI until it is dropped.
    ///
    /// # Errors
    /// [`MsiError`].
    pub fn line(self: &Arc<Self>) -> Result<MsiLine, MsiError> {
        let mut used = self.lock();
        let free = self.range.clone().find(|gsi| !used.contains_key(gsi));
        let gsi = free.ok_or_else(|| MsiError::NoGsi {
            range: self.range.clone(),
        })?;
        // A device that interrupts faster than the kernel takes it must not be blocked by a full counter.
        let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK;
        let event = EventFd::new(flags).map_err(|source| MsiError::Eventfd { gsi, source })?;
        used.insert(gsi, None);
        Ok(MsiLine {
            routes: Arc::clone(self),
            gsi,
            event,
            bound: false,
        })
    }

    /// Gives the kernel the table with `message` for `gsi`.
    fn set(&self, gsi: u32, message: Option<Message>) -> Result<(), MsiError> {
        let mut used = self.lock();
        if used.get(&gsi).copied() == Some(message) {
            return Ok(());
        }
        let before = used.insert(gsi, message);
        let result = self.write(&used).map_err(|source| MsiError::Host {
            doing: "route",
            gsi,
            source,
        });
        if result.is_err() {
            used.insert(gsi, before.flatten());
        }
        result
    }

    fn write(&self, used: &BTreeMap<u32, Option<Message>>) -> Result<(), kvm_ioctls::Error> {
        let routed = used.iter().filter_map(|(gsi, it)| it.map(|it| (*gsi, it)));
        let messages = routed.map(|(gsi, message)| entry(gsi, message));
        let entries: Vec<_> = self.fixed.iter().copied().chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
        self.vm.set_gsi_routing(&table)
    }

    fn release(&self, gsi: u32) {
        let mut used = self.lock();
        if used.remove(&gsi).flatten().is_some()
            && let Err(error) = self.write(&used)
        {
            tracing::warn!(%error, gsi, "a message's route stays");
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Option<Message>>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let (low, high) = (message.address & 0xffff_ffff, message.address >> 32);
    let narrow = |half: u64| u32::try_from(half).unwrap_or(0);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: narrow(low),
                address_hi: narrow(high),
                data: message.data,
                ..kvm_irq_routing_msi::default()
            },
        },
        ..kvm_irq_routing_entry::default()
    }
}

/// One message's way into the guest: who writes the eventfd interrupts, without a system call into KVM.
pub struct MsiLine {
    routes: Arc<MsiRoutes>,
    gsi: u32,
    event: EventFd,
    bound: bool,
}

impl MsiLine {
    /// Its number.
    #[must_use]
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
}

impl MessageLine for MsiLine {
    fn route(&mut self, message: Message) -> Result<(), MsiError> {
        self.routes.set(self.gsi, Some(message))?;
        if !self.bound {
            let bound = self.routes.vm.register_irqfd(&self.event, self.gsi);
            bound.map_err(|source| MsiError::Host {
                doing: "bind an eventfd to",
                gsi: self.gsi,
                source,
            })?;
            self.bound = true;
        }
        Ok(())
    }

    fn send(&self) -> bool {
        if !self.bound {
            return false;
        }
        // A full counter means that an interrupt is on its way already.
        match self.event.write(1) {
            Ok(()) => true,
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        }
    }
}

impl Drop for MsiLine {
    fn drop(&mut self) {
        if self.bound {
            let unbound = self.routes.vm.unregister_irqfd(&self.event, self.gsi);
            if let Err(error) = unbound {
                tracing::warn!(%error, gsi = self.gsi, "an eventfd stays bound");
            }
        }
        self.routes.release(self.gsi);
    }
}
