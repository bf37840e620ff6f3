//! Interrupts: the client's event descriptors, one per vector of each index (specification, `VFIO_USER_DEVICE_SET_IRQS`).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{PoisonError, RwLock};

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

const DATA_NONE: u32 = 1 << 0;
const DATA_BOOL: u32 = 1 << 1;
/// `VFIO_IRQ_SET_DATA_EVENTFD`: descriptors may come along.
pub(super) const DATA_EVENTFD: u32 = 1 << 2;
const ACTION_TRIGGER: u32 = 1 << 5;

const TRIGGER_NONE: u32 = ACTION_TRIGGER | DATA_NONE;
const TRIGGER_BOOL: u32 = ACTION_TRIGGER | DATA_BOOL;
const TRIGGER_EVENTFD: u32 = ACTION_TRIGGER | DATA_EVENTFD;

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
    vectors: RwLock<Vec<Option<OwnedFd>>>,
    count: u16,
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
            count => Ok((INFO_EVENTFD, count.into())),
        }
    }

    /// Carries out `SET_IRQS`. Event descriptors are taken out of `fds`; de-assigned ones are closed.
    ///
    /// # Errors
    /// [`Refusal::Irq`] if vectors do not exist, [`Refusal::IrqFlags`] if flags, count and descriptors do not
    /// fit together or ask for masking, which clients do themselves. Nothing has changed then.
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
        let flags_refused = Refusal::IrqFlags {
            flags,
            count,
            fds: fds.len(),
        };
        if flags != TRIGGER_EVENTFD && !fds.is_empty() {
            return Err(flags_refused);
        }
        if (flags, start, count) == (TRIGGER_NONE, 0, 0) {
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
        // Vectors were just checked against a 16-bit count.
        let vector = |n: u32| u16::try_from(start + n).unwrap_or(u16::MAX);
        match flags {
            TRIGGER_EVENTFD if fds.is_empty() => vectors.assign(start, count, std::iter::empty()),
            TRIGGER_EVENTFD if fds.len() == count as usize => {
                vectors.assign(start, count, fds.drain(..));
            }
            TRIGGER_NONE => (0..count).for_each(|n| {
                vectors.trigger(vector(n));
            }),
            TRIGGER_BOOL if data.len() == count as usize => {
                for (n, wanted) in (0..count).zip(data) {
                    if *wanted != 0 {
                        vectors.trigger(vector(n));
                    }
                }
            }
            _ => return Err(flags_refused),
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
            vectors: RwLock::new((0..count).map(|_| None).collect()),
            count,
        }
    }

    fn disable(&self) {
        let mut vectors = self.vectors.write().unwrap_or_else(PoisonError::into_inner);
        vectors.iter_mut().for_each(|vector| *vector = None);
    }

    /// Gives `count` vectors from `start` their descriptors, or none where `fds` ends.
    fn assign(&self, start: u32, count: u32, mut fds: impl Iterator<Item = OwnedFd>) {
        let mut vectors = self.vectors.write().unwrap_or_else(PoisonError::into_inner);
        let chosen = vectors.iter_mut().skip(start as usize).take(count as usize);
        chosen.for_each(|vector| *vector = fds.next());
    }

    fn trigger(&self, vector: u16) -> bool {
        let vectors = self.vectors.read().unwrap_or_else(PoisonError::into_inner);
        let Some(Some(fd)) = vectors.get(usize::from(vector)) else {
            return false;
        };
        // A full counter means that an interrupt is pending already.
        if !has_room(fd) {
            return true;
        }
        let sent = rustix::io::write(fd.as_fd(), &1_u64.to_ne_bytes());
        matches!(sent, Ok(_) | Err(Errno::AGAIN))
    }
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
