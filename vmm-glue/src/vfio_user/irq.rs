//! Interrupts: the client's event descriptors, one per vector of each index (specification, `VFIO_USER_DEVICE_SET_IRQS`).

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use numagpu_devices::bus::{InterruptSink, OtherInterrupt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::refusal::Refusal;
use super::wire::SetIrqs;

/// Interrupt indices that VFIO knows: INTx, MSI, MSI-X, ERR, REQ (`VFIO_PCI_NUM_IRQS`).
const INDICES: usize = 5;

/// How many of them a function without ERR and REQ has. A client that is told of an ERR without a vector warns of missing
/// error recovery at each start (QEMU `hw/vfio/pci.c`, `vfio_pci_populate_device`), and takes one that does not exist as an
/// older host.
const WITHOUT_ERROR: u32 = 3;

/// `VFIO_IRQ_INFO_EVENTFD`.
const INFO_EVENTFD: u32 = 1 << 0;
/// `VFIO_IRQ_INFO_MASKABLE`.
const INFO_MASKABLE: u32 = 1 << 1;

const DATA_NONE: u32 = 1 << 0;
const DATA_BOOL: u32 = 1 << 1;
/// `VFIO_IRQ_SET_DATA_EVENTFD`: descriptors may come along.
pub(super) const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_MASK: u32 = 1 << 3;
const ACTION_UNMASK: u32 = 1 << 4;
const ACTION_TRIGGER: u32 = 1 << 5;

const DATA: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;

/// The vectors of one connection and who listens to each.
#[derive(Debug)]
pub struct IrqTable {
    indices: [Index; INDICES],
    /// How many of them the client is told of.
    told: u32,
}

/// The vectors of one index.
#[derive(Debug)]
struct Index {
    vectors: RwLock<Vec<Vector>>,
    count: u16,
}

/// What a client has set up for one vector.
#[derive(Debug, Default)]
struct Vector {
    /// Signalled for each interrupt.
    triggered: Option<OwnedFd>,
    is_masked: bool,
    /// Whether an interrupt waits for the mask to be taken away.
    is_pending: AtomicBool,
    /// Signalled when the vector is masked, and when it no longer is.
    masked: Option<OwnedFd>,
    unmasked: Option<OwnedFd>,
}

/// What is done with a vector.
#[derive(Clone, Copy, Debug)]
enum Action {
    Mask,
    Unmask,
    Trigger,
}

impl Action {
    /// The one that the flags name.
    fn of(flags: u32) -> Option<Action> {
        match flags & !DATA {
            ACTION_MASK => Some(Action::Mask),
            ACTION_UNMASK => Some(Action::Unmask),
            ACTION_TRIGGER => Some(Action::Trigger),
            _ => None,
        }
    }
}

impl IrqTable {
    /// A table for so many MSI-X vectors and other interrupts, which nobody listens to yet.
    #[must_use]
    pub fn new(msix: u16, others: &[(OtherInterrupt, u16)]) -> Self {
        let mut counts = [0, 0, msix, 0, 0];
        for (kind, count) in others {
            if let Some(place) = counts.get_mut(*kind as usize) {
                *place = *count;
            }
        }
        let told = match counts {
            [.., 0, 0] => WITHOUT_ERROR,
            all => u32::try_from(all.len()).unwrap_or(WITHOUT_ERROR),
        };
        Self {
            indices: counts.map(Index::new),
            told,
        }
    }

    /// How many indices there are.
    #[must_use]
    pub fn indices(&self) -> u32 {
        self.told
    }

    fn index(&self, index: u32) -> Result<&Index, Refusal> {
        let told = self.indices.iter().take(self.told as usize);
        let mut from = told.skip(usize::try_from(index).unwrap_or(INDICES));
        from.next().ok_or(Refusal::Irq {
            index,
            start: 0,
            count: 0,
            have: 0,
        })
    }

    /// `VFIO_IRQ_INFO_*` flags and number of vectors of an interrupt index.
    ///
    /// # Errors
    /// [`Refusal::Irq`] if the index is not below [`IrqTable::indices`].
    pub fn info(&self, index: u32) -> Result<(u32, u32), Refusal> {
        match self.index(index)?.count {
            0 => Ok((0, 0)),
            count => Ok((INFO_EVENTFD | INFO_MASKABLE, count.into())),
        }
    }

    /// Carries out `SET_IRQS`. Event descriptors are taken out of `fds`; de-assigned ones are closed.
    ///
    /// # Errors
    /// [`Refusal::Irq`] if vectors do not exist, [`Refusal::IrqFlags`] if flags, count, data and descriptors do not
    /// fit together. Nothing has changed then.
    pub fn set(&self, request: &SetIrqs<'_>, fds: &mut Vec<OwnedFd>) -> Result<(), Refusal> {
        let SetIrqs {
            flags,
            index,
            start,
            count,
            data,
        } = *request;
        let vectors = self.index(index)?;
        let have = vectors.count.into();
        let refused = Refusal::IrqFlags {
            flags,
            count,
            fds: fds.len(),
        };
        let Some(action) = Action::of(flags) else {
            return Err(refused);
        };
        let kind = flags & DATA;
        if kind != DATA_EVENTFD && !fds.is_empty() {
            return Err(refused);
        }
        if let (DATA_NONE, Action::Trigger, 0, 0) = (kind, action, start, count) {
            vectors.disable();
            return Ok(());
        }
        if count == 0 || start.checked_add(count).is_none_or(|end| end > have) {
            return Err(Refusal::Irq {
                index,
                start,
                count,
                have,
            });
        }
        match kind {
            // Without any they are taken away.
            DATA_EVENTFD if fds.is_empty() || fds.len() == count as usize => {
                vectors.assign(action, start, count, fds.drain(..));
            }
            DATA_NONE => vectors.act(action, start, (0..count).map(|_| true)),
            DATA_BOOL if data.len() == count as usize => {
                vectors.act(action, start, data.iter().map(|wanted| *wanted != 0));
            }
            _ => return Err(refused),
        }
        Ok(())
    }

    /// Closes all event descriptors.
    pub fn disable(&self) {
        self.indices.iter().for_each(Index::disable);
    }
}

impl Index {
    fn new(count: u16) -> Self {
        Self {
            vectors: RwLock::new((0..count).map(|_| Vector::default()).collect()),
            count,
        }
    }

    /// Closes all event descriptors, and takes away masks and what they kept back.
    fn disable(&self) {
        self.write().fill_with(Vector::default);
    }

    /// Gives `count` vectors from `start` their descriptors for an action, or none where `fds` ends.
    fn assign(
        &self,
        action: Action,
        start: u32,
        count: u32,
        mut fds: impl Iterator<Item = OwnedFd>,
    ) {
        let mut vectors = self.write();
        for vector in vectors.iter_mut().skip(start as usize).take(count as usize) {
            let place = match action {
                Action::Mask => &mut vector.masked,
                Action::Unmask => &mut vector.unmasked,
                Action::Trigger => &mut vector.triggered,
            };
            *place = fds.next();
        }
    }

    /// Does that with those vectors from `start` on that are `wanted`.
    fn act(&self, action: Action, start: u32, wanted: impl Iterator<Item = bool>) {
        let mut vectors = self.write();
        for (vector, wanted) in vectors.iter_mut().skip(start as usize).zip(wanted) {
            match action {
                _ if !wanted => {}
                Action::Mask => vector.mask(),
                Action::Unmask => vector.unmask(),
                Action::Trigger => {
                    vector.trigger();
                }
            }
        }
    }

    fn trigger(&self, vector: u16) -> bool {
        let vectors = self.vectors.read().unwrap_or_else(PoisonError::into_inner);
        let vector = vectors.get(usize::from(vector));
        vector.is_some_and(Vector::trigger)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Vector>> {
        self.vectors.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vector {
    /// An interrupt; whether somebody hears of it, at once or when the mask is taken away.
    fn trigger(&self) -> bool {
        if self.is_masked && self.triggered.is_some() {
            self.is_pending.store(true, Ordering::Relaxed);
            return true;
        }
        signal(self.triggered.as_ref())
    }

    fn mask(&mut self) {
        if !self.is_masked {
            self.is_masked = true;
            signal(self.masked.as_ref());
        }
    }

    fn unmask(&mut self) {
        if self.is_masked {
            self.is_masked = false;
            signal(self.unmasked.as_ref());
            if std::mem::take(self.is_pending.get_mut()) {
                signal(self.triggered.as_ref());
            }
        }
    }
}

/// Signals an event; whether there is one. A full counter means that it was signalled and not looked at yet.
fn signal(event: Option<&OwnedFd>) -> bool {
    let Some(event) = event else {
        return false;
    };
    if !has_room(event) {
        return true;
    }
    let sent = rustix::io::write(event, &1_u64.to_ne_bytes());
    matches!(sent, Ok(_) | Err(Errno::AGAIN))
}

/// Whether a write would not block. Which it may: a client that waits for its interrupts in a read has a descriptor that
/// blocks, and its flags are not ours to change.
fn has_room(fd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // Where nothing can be told the write does.
    poll(&mut fds, Some(&now)) != Ok(0)
}

impl InterruptSink for IrqTable {
    fn trigger(&self, vector: u16) -> bool {
        let [_, _, msix, ..] = &self.indices;
        msix.trigger(vector)
    }

    fn trigger_other(&self, kind: OtherInterrupt, vector: u16) -> bool {
        let index = self.indices.get(kind as usize);
        index.is_some_and(|index| index.trigger(vector))
    }
}
