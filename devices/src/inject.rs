//! Faults on demand: what real hardware does now and then, when a test wants it.
//!
//! The table is also what `docs/faults.md` is made of.
//!
//! | injection | what a driver sees | how it recovers |
//! |---|---|---|
//! | [`Injection::CorrectableError`] | `RAS.CORRECTABLE` counts, `LAST_ADDRESS`, `LAST_KIND`, IRQ bit RAS; AER status Corrected Internal | clear AER's bit |
//! | [`Injection::UncorrectableError`] | as above with `UNCORRECTABLE` and AER status Uncorrectable Internal; engines that read the line stop with `Poisoned` | clear AER's bit; write the line anew, or retire its page |
//! | [`Injection::EngineHang`] | the queue stays `Running`, `RPTR` and `PACKETS` stand still | queue reset |
//! | [`Injection::LostDoorbell`] | `WPTR` does not follow the doorbell | ring again |
//! | [`Injection::LostInterrupt`] | the bit in `IRQ.STATUS` is set, no message comes, `IRQ.RAISED` stands still | poll `IRQ.STATUS` |
//! | [`Injection::SpuriousInterrupt`] | a message, and no new bit in `IRQ.STATUS` | ignore it |
//! | [`Injection::LinkLoss`], [`Injection::LinkFlap`] | `LINK.STATE` Down, `ERRORS` counts, IRQ bit LINK at both ends; copies that need it stop with `LinkDown` | queue reset when `LINK.STATE` is Up |
//! | [`Injection::LinkWidth`] | `LINK.STATE` Degraded, `WIDTH_NOW` and `BANDWIDTH_NOW_MBS` less, `ERRORS` counts, IRQ bit LINK | slower, not wrong |
//! | [`Injection::BootFailure`] | the next boot ends in `Fault`, `BOOT.FAULT` has the code | function-level reset, boot again |
//! | [`Injection::BootTimeout`] | the next boot stays `Booting` | function-level reset, boot again |
//! | [`Injection::StuckReset`] | after the next reset all reads give ones for that long | wait, as Linux' `pci_dev_wait` does |
//! | [`Injection::ScrubFailure`] | the partition's next scrub ends in `Faulted`; claims are refused | function-level reset |
//! | [`Injection::Removal`] | all reads give ones, writes are dropped, queues stop, partitions are lost | [`Injection::Return`] |

use std::sync::atomic::{AtomicU64, Ordering};

use numagpu_spec::regs::IrqBits;
use numagpu_spec::{pci, regs::RasCommand, regs::RasResult, regs::ras};
use thiserror::Error;

use crate::bus::ResetKind;
use crate::config_space::InternalError;
use crate::fabric::{FabricError, Place};
use crate::gpu::{Gpu, lock};
use crate::health::MAX_POISONED;
use crate::queue::Queue;

/// A fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// A memory error that was corrected, at an address of this GPU's HBM.
    CorrectableError {
        /// Address as packets name it.
        address: u64,
    },
    /// A memory error that was not; it spoils the line of 64 bytes around the address.
    UncorrectableError {
        /// Address as packets name it.
        address: u64,
    },
    /// A queue stops in the middle of its work, without a word.
    EngineHang {
        /// Queue.
        queue: u32,
    },
    /// The next doorbells of a queue get lost.
    LostDoorbell {
        /// Queue.
        queue: u32,
        /// How many.
        count: u32,
    },
    /// The next messages get lost; the bits in `IRQ.STATUS` do not.
    LostInterrupt {
        /// How many.
        count: u32,
    },
    /// A message for no cause.
    SpuriousInterrupt {
        /// MSI-X vector.
        vector: u16,
    },
    /// Every link to a peer goes down, on both ends.
    LinkLoss {
        /// Hive position of the peer.
        peer: u32,
    },
    /// Every link to a peer comes up with all its lanes.
    LinkReturn {
        /// Hive position of the peer.
        peer: u32,
    },
    /// Every link to a peer goes down, and comes up again by itself.
    LinkFlap {
        /// Hive position of the peer.
        peer: u32,
        /// Time in between, in milliseconds.
        down_ms: u32,
    },
    /// Only some lanes of the links to a peer stay up, on both ends.
    LinkWidth {
        /// Hive position of the peer.
        peer: u32,
        /// Lanes that are up, at most the links' width; 0 is a loss.
        lanes: u32,
    },
    /// The next boot fails.
    BootFailure {
        /// What `BOOT.FAULT` shows, not 0.
        code: u32,
    },
    /// The next boot never ends.
    BootTimeout,
    /// After the next function-level or hot reset the function does not answer for some time.
    StuckReset {
        /// How long, in milliseconds; 0 = until [`Injection::Return`].
        ms: u32,
    },
    /// The next scrub of a partition fails.
    ScrubFailure {
        /// Partition.
        partition: u32,
    },
    /// The GPU is pulled out.
    Removal,
    /// A GPU that does not answer is plugged in again, as after power-on.
    Return,
}

/// Why a fault cannot be injected.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum InjectError {
    /// No such part of this GPU.
    #[error("the GPU has {have} {what}, so there is no number {index}")]
    No {
        /// Of what.
        what: &'static str,
        /// What was asked for.
        index: u64,
        /// How many there are.
        have: usize,
    },
    /// Not HBM of this GPU.
    #[error("{address:#x} is not in this GPU's HBM")]
    NotHbm {
        /// Address.
        address: u64,
    },
    /// Enough is enough.
    #[error("{MAX_POISONED} lines are poisoned already")]
    TooManyErrors,
    /// A fault without a fault.
    #[error("a boot fault has a code other than 0")]
    NoCode,
    /// No link to that peer.
    #[error(transparent)]
    Link(#[from] FabricError),
}

impl InjectError {
    fn no(what: &'static str, index: u64, have: usize) -> InjectError {
        InjectError::No { what, index, have }
    }
}

/// The part with this number.
fn numbered<'p, P>(parts: &'p [P], index: u32, what: &'static str) -> Result<&'p P, InjectError> {
    let no = InjectError::no(what, index.into(), parts.len());
    parts.get(index as usize).ok_or(no)
}

/// A link that is down for a while.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flap {
    /// When it comes up, in nanoseconds of the device's clock.
    pub(crate) up_at: u64,
    pub(crate) peer: u32,
}

/// Value of [`Presence`] for a function that is there.
const PRESENT: u64 = 0;
/// Value of [`Presence`] for one that does not come back by itself.
const GONE: u64 = u64::MAX;

/// Whether the function answers on the bus.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    /// When it answers again, in nanoseconds of the device's clock.
    absent_until: AtomicU64,
    /// For how long it will be stuck in the next reset, in ns; 0 = it will not.
    stuck_ns: AtomicU64,
}

impl Presence {
    /// Whether it answers whatever time it is.
    pub(crate) fn is_always(&self) -> bool {
        self.absent_until.load(Ordering::Acquire) == PRESENT
    }

    pub(crate) fn is_at(&self, now_ns: u64) -> bool {
        let until = self.absent_until.load(Ordering::Acquire);
        until != GONE && until <= now_ns
    }

    /// Until when it is absent, and for how long it will be stuck in the next reset.
    pub(crate) fn save(&self) -> (u64, u64) {
        let absent_until = self.absent_until.load(Ordering::Acquire);
        (absent_until, self.stuck_ns.load(Ordering::Acquire))
    }

    /// As [`Presence::save`] found it.
    pub(crate) fn restore(&self, absent_until: u64, stuck_ns: u64) {
        self.stuck_ns.store(stuck_ns, Ordering::Release);
        self.absent_until.store(absent_until, Ordering::Release);
    }

    fn stick(&self, ms: u32) {
        let ns = match ms {
            0 => GONE,
            ms => u64::from(ms) * 1_000_000,
        };
        self.stuck_ns.store(ns, Ordering::Release);
    }

    fn remove(&self) {
        self.absent_until.store(GONE, Ordering::Release);
    }

    /// A function-level or hot reset.
    pub(crate) fn reset(&self, now_ns: u64) {
        let stuck = self.stuck_ns.swap(0, Ordering::AcqRel);
        if stuck != 0 && self.absent_until.load(Ordering::Acquire) != GONE {
            let until = now_ns.saturating_add(stuck);
            self.absent_until.store(until, Ordering::Release);
        }
    }

    /// All is well again.
    pub(crate) fn power_cycle(&self) {
        self.stuck_ns.store(0, Ordering::Release);
        self.absent_until.store(PRESENT, Ordering::Release);
    }
}

impl Gpu {
    /// Makes a fault happen.
    ///
    /// # Errors
    /// [`InjectError`] if there is no such part; then nothing happened.
    pub fn inject(&self, fault: Injection) -> Result<(), InjectError> {
        match fault {
            Injection::CorrectableError { address } => {
                self.own_hbm(address)?;
                self.health.correctable(address);
                self.report(InternalError::Corrected);
                self.tell(IrqBits::RAS);
            }
            Injection::UncorrectableError { address } => {
                self.own_hbm(address)?;
                if !self.health.poison(address) {
                    return Err(InjectError::TooManyErrors);
                }
                self.report(InternalError::Uncorrectable);
                self.tell(IrqBits::RAS);
            }
            Injection::EngineHang { queue } => self.queue(queue)?.hang(),
            Injection::LostDoorbell { queue, count } => self.queue(queue)?.lose_doorbells(count),
            Injection::LostInterrupt { count } => self.irq.lose_next(count),
            Injection::SpuriousInterrupt { vector } => {
                let have = pci::VECTOR_COUNT;
                if vector >= have {
                    return Err(InjectError::no("vectors", vector.into(), have.into()));
                }
                self.irq.spurious(vector);
            }
            Injection::LinkLoss { peer } => self.set_link(peer, false)?,
            Injection::LinkReturn { peer } => self.set_link(peer, true)?,
            Injection::LinkFlap { peer, down_ms } => {
                self.set_link(peer, false)?;
                let up_at = self.now().saturating_add(u64::from(down_ms) * 1_000_000);
                let mut flaps = lock(&self.flaps);
                flaps.retain(|flap| flap.peer != peer);
                flaps.push(Flap { up_at, peer });
                drop(flaps);
                self.ticker.wake();
            }
            Injection::LinkWidth { peer, lanes } => {
                let Place { hive, node } = self.member.place;
                self.fabric.set_link_lanes(hive, node, peer, lanes)?;
            }
            Injection::BootFailure { code: 0 } => return Err(InjectError::NoCode),
            Injection::BootFailure { code } => self.boot.fail_next(code),
            Injection::BootTimeout => self.boot.hang_next(),
            Injection::StuckReset { ms } => self.presence.stick(ms),
            Injection::ScrubFailure { partition } => {
                numbered(self.partitions(), partition, "partitions")?.fail_next_scrub();
            }
            Injection::Removal => {
                let _one = lock(&self.lifecycle);
                self.presence.remove();
                self.reset_function(ResetKind::Hot);
            }
            Injection::Return => {
                let _one = lock(&self.lifecycle);
                self.reset_function(ResetKind::Hot);
                self.presence.power_cycle();
            }
        }
        Ok(())
    }

    fn queue(&self, index: u32) -> Result<&Queue, InjectError> {
        numbered(&self.queues, index, "queues")
    }

    fn set_link(&self, peer: u32, up: bool) -> Result<(), FabricError> {
        let Place { hive, node } = self.member.place;
        self.fabric.set_link(hive, node, peer, up)
    }

    /// Brings up the links whose time has come; when the next one is due.
    pub(crate) fn end_flaps(&self, now_ns: u64) -> Option<u64> {
        let mut flaps = lock(&self.flaps);
        let over = flaps.extract_if(.., |flap| flap.up_at <= now_ns);
        for flap in over {
            // A peer that has left took its links with it.
            let _gone = self.set_link(flap.peer, true);
        }
        flaps.iter().map(|flap| flap.up_at).min()
    }

    fn own_hbm(&self, address: u64) -> Result<(), InjectError> {
        let mut own = self.partitions().iter();
        let found = own.any(|it| (it.base()..it.end()).contains(&address));
        found.then_some(()).ok_or(InjectError::NotHbm { address })
    }

    /// Notes a memory error where bus drivers look: an error of the function's own memory is an internal error (PCIe Base
    /// 6.0 section 6.2.10). The ERR message goes nowhere: no transport has a way for it that a VMM takes for anything but
    /// a dead device.
    fn report(&self, error: InternalError) {
        let _message = lock(&self.config_space).report(error);
    }

    /// Raises an event's interrupt.
    fn tell(&self, bit: IrqBits) {
        self.irq.raise(bit.bits(), pci::VECTOR_EVENTS);
    }

    /// `RAS.COMMAND` was written.
    pub(crate) fn ras_command(&self, command: u64) {
        self.registers.set(&ras::BLOCK, 0, &ras::COMMAND, 0);
        let address = self.registers.get(&ras::BLOCK, 0, &ras::ADDRESS);
        let command = u32::try_from(command).ok().and_then(RasCommand::from_code);
        let result = match command {
            None => RasResult::BadCommand,
            Some(RasCommand::Retire) if self.own_hbm(address).is_err() => RasResult::OutOfRange,
            Some(RasCommand::Retire) => self.health.retire(address),
        };
        self.health.set_result(result);
    }
}
