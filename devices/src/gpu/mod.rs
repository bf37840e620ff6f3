//! The GPU: a PCI function made of the parts of this crate.
//!
//! # Locks
//!
//! In the order in which they may nest: `lifecycle` > a queue's `control` > `attachment`; `pauses` > the flaps; all
//! others (`config_space`, `judging`, an ownership machine, the fabric, the interrupt sink, the scrubber's) are
//! leaves as far as this crate goes. `lifecycle` is for attach, detach, reset and restore, which wait for workers or
//! scrubs, and for the moment in which a state is taken; a pause waits for workers without it. No BAR access takes
//! it. Register reads take no lock at all.

mod lifecycle;
mod migrate;
mod pages;
mod read;
mod state;

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use numagpu_spec::pci;
use numagpu_spec::regs::{self, BootState, LinkState, QUEUE_ENABLE, QUEUE_RESET, partition, queue};

use self::pages::{DoorbellPage, MsixPage};
pub use self::state::Pause;
use crate::aperture::Aperture;
use crate::boot::Boot;
use crate::bus::{Attachment, FunctionLayout, Kick, Migrate, PciFunction, ResetKind};
use crate::clock::{Clock as _, MovedClock};
use crate::config::{GpuConfig, GpuError};
use crate::config_space::{CONFIG_SIZE, Capabilities, ConfigSpace, MsixPlace};
use crate::doorbells::MappedDoorbells;
use crate::engine::Reach;
use crate::fabric::{Fabric, LinkEnd, Member, Place};
use crate::health::{Health, HealthStatus};
use crate::inject::{Flap, Presence};
use crate::irq::Irq;
use crate::modes::Modes;
use crate::on_demand::OnDemand;
use crate::ownership::{Circumstances, Event};
use crate::partition::{Partition, PartitionStatus};
use crate::priority::Priorities;
use crate::queue::{Queue, QueueStatus, Setup};
use crate::registers::{RegisterFile, RegisterMap, TableError};
use crate::scrub::Scrubber;
use crate::ticker;
use crate::timing::Timing;

type Map = LazyLock<Result<RegisterMap, TableError>>;
static REGISTERS: Map = LazyLock::new(|| RegisterMap::new(regs::BLOCKS, pci::BAR_REGISTERS_SIZE));
static DOORBELLS: Map =
    LazyLock::new(|| RegisterMap::new(pci::DOORBELL_BLOCKS, pci::BAR_DOORBELLS_SIZE));
static MSIX: Map = LazyLock::new(|| RegisterMap::new(&[pci::msix::BLOCK], pci::BAR_MSIX_SIZE));

/// Snapshot of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkStatus {
    /// Hive position of the peer; `None` is the CPU.
    pub peer: Option<u32>,
    /// Whether all its lanes carry traffic, some or none.
    pub state: LinkState,
    /// Lanes that carry traffic.
    pub lanes: u32,
    /// Errors since reset.
    pub errors: u32,
    /// Bytes that left through it since reset.
    pub bytes_out: u64,
    /// Bytes that came through it since reset.
    pub bytes_in: u64,
}

/// Snapshot of a GPU.
#[derive(Clone, Debug)]
pub struct GpuStatus {
    /// Index of the GPU in its machine.
    pub index: u32,
    /// Whether a VMM is connected.
    pub attached: bool,
    /// Boot handshake.
    pub boot: BootState,
    /// HBM partitions.
    pub partitions: Vec<PartitionStatus>,
    /// Copy queues.
    pub queues: Vec<QueueStatus>,
    /// Links.
    pub links: Vec<LinkStatus>,
    /// Memory errors.
    pub health: HealthStatus,
    /// Whether the function answers on the bus.
    pub present: bool,
    /// MSI-X messages sent since reset.
    pub interrupts: u64,
    /// Causes of interrupts since power-on, whether a message was sent or not.
    pub causes: u64,
}

/// A GPU.
pub struct Gpu {
    // Runtime glue.
    pub(crate) fabric: Arc<Fabric>,
    pub(crate) member: Arc<Member>,
    aperture: Option<Aperture>,
    attachment: Mutex<Option<Attachment>>,
    pub(crate) irq: Arc<Irq>,
    scrubber: Scrubber,
    pub(crate) ticker: OnDemand,
    clock: Arc<MovedClock>,
    /// Pauses that have not ended. Held by whoever does what is due.
    pauses: Mutex<u32>,
    // Static configuration.
    config: GpuConfig,
    layout: FunctionLayout,
    kicks: Vec<Kick>,
    // Volatile state.
    pub(crate) lifecycle: Mutex<()>,
    judging: Mutex<()>,
    pub(crate) config_space: Mutex<ConfigSpace>,
    dma_allowed: Arc<AtomicBool>,
    pub(crate) registers: Arc<RegisterFile<'static>>,
    doorbells: RegisterFile<'static>,
    /// The doorbells that clients map, if they may.
    mapped_doorbells: Option<MappedDoorbells>,
    msix: RegisterFile<'static>,
    pub(crate) boot: Boot,
    pub(crate) health: Arc<Health>,
    pub(crate) presence: Presence,
    pub(crate) flaps: Mutex<Vec<Flap>>,
    pub(crate) queues: Vec<Queue>,
}

fn map(map: &'static Map) -> Result<&'static RegisterMap, GpuError> {
    map.as_ref().map_err(|error| GpuError::Table(*error))
}

/// Locks, whatever became of who had it before.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// A GPU after power-on that has joined `fabric`; it leaves when it is dropped.
    ///
    /// # Errors
    /// [`GpuError`] if the configuration is out of range or clashes with another GPU of the fabric.
    pub fn new(config: GpuConfig, fabric: Arc<Fabric>) -> Result<Arc<Gpu>, GpuError> {
        config.check()?;
        let bars = config.bars();
        let capabilities = Capabilities {
            msix: Some(MsixPlace::GPU),
            resizable: config.resizable(),
            ats: false,
        };
        let registers = Arc::new(RegisterFile::new(map(&REGISTERS)?));
        let doorbells = RegisterFile::new(map(&DOORBELLS)?);
        let msix = RegisterFile::new(map(&MSIX)?);
        let node = if config.hive_id == 0 {
            config.index
        } else {
            config.node_id
        };
        let health = Arc::new(Health::default());
        let bus_master = Arc::new(AtomicBool::new(false));
        let irq = Arc::new(Irq::new(Arc::clone(&registers), Arc::clone(&bus_master)));
        let member = Arc::new(Member {
            place: Place {
                hive: config.hive_id,
                node,
            },
            modes: Modes::new(&config.partitions, config.aperture.is_some(), &health),
            links: config.links.iter().map(LinkEnd::new).collect(),
            irq: Arc::clone(&irq),
        });
        fabric.join(Arc::clone(&member))?;
        let aperture = config
            .aperture
            .map(|_| Aperture::new(member.modes.planned()));
        let priorities = Arc::new(Priorities::default());
        let clock = Arc::new(MovedClock::new(Arc::clone(&config.clock)));
        Ok(Arc::new_cyclic(|myself| Gpu {
            fabric,
            member,
            aperture,
            attachment: Mutex::new(None),
            scrubber: Scrubber::new(Arc::clone(&irq), Arc::clone(&clock) as _),
            ticker: OnDemand::new("gpu-ticker", myself.clone(), ticker::work),
            clock,
            pauses: Mutex::default(),
            lifecycle: Mutex::new(()),
            judging: Mutex::new(()),
            config_space: Mutex::new(ConfigSpace::new(&config.ids, &bars, &capabilities)),
            layout: FunctionLayout {
                bars,
                config_size: u32::try_from(CONFIG_SIZE).unwrap_or(4096),
                msix_vectors: pci::VECTOR_COUNT,
            },
            kicks: (0..kicks(&config))
                .map(|queue| Kick {
                    bar: pci::BAR_DOORBELLS,
                    offset: u64::from(pci::KICK_OFFSET) + queue * pci::DOORBELL_STRIDE,
                })
                .collect(),
            dma_allowed: bus_master,
            registers,
            doorbells,
            mapped_doorbells: config
                .doorbells
                .as_ref()
                .map(|page| MappedDoorbells::new(Arc::clone(page), config.queues, myself.clone())),
            msix,
            boot: Boot::new(config.boot_delay, config.boot_fault),
            health,
            presence: Presence::default(),
            flaps: Mutex::default(),
            queues: (0..config.queues)
                .map(|index| Queue::new(index, Arc::clone(&irq), Arc::clone(&priorities)))
                .collect(),
            irq,
            config,
        }))
    }

    /// What the GPU was made of.
    pub fn config(&self) -> &GpuConfig {
        &self.config
    }

    /// The fabric it joined.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// Whether a VMM is connected.
    pub fn is_attached(&self) -> bool {
        lock(&self.attachment).is_some()
    }

    /// Snapshot for people and tests; the values may come from neighbouring moments.
    pub fn status(&self) -> GpuStatus {
        GpuStatus {
            index: self.config.index,
            attached: self.is_attached(),
            boot: self.boot.state(self.now()),
            partitions: self.partitions().iter().map(|p| p.status()).collect(),
            queues: self.queues.iter().map(Queue::status).collect(),
            links: self.member.links.iter().map(link_status).collect(),
            health: self.health.status(),
            present: self.is_present(),
            interrupts: self.irq.raised(),
            causes: self.irq.causes(),
        }
    }

    /// Causes of interrupts since power-on, as [`GpuStatus::causes`]: whoever knows how many are to come can wait for
    /// them.
    pub fn causes(&self) -> u64 {
        self.irq.causes()
    }

    /// The HBM partitions of the mode in force.
    pub(crate) fn partitions(&self) -> &[Arc<Partition>] {
        self.member.modes.active()
    }

    pub(crate) fn now(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Whether the function answers on the bus: it was not removed, and is not stuck in a reset.
    fn is_present(&self) -> bool {
        // The clock is read only where something is wrong.
        self.presence.is_always() || self.presence.is_at(self.now())
    }

    fn is_ready(&self) -> bool {
        self.boot.state(self.now()) == BootState::Ready
    }

    fn aperture_at(&self, bar: u8) -> Option<&Aperture> {
        self.aperture.as_ref().filter(|_| bar == pci::BAR_APERTURE)
    }

    fn command(&self, index: u32) {
        let Some(target) = self.partitions().get(index as usize) else {
            return;
        };
        // Each command consumes what it was given: the next driver has to bring its own tokens.
        let take = |reg| {
            let value = self.registers.get(&partition::BLOCK, index, reg);
            self.registers.set(&partition::BLOCK, index, reg, 0);
            value
        };
        let command = take(&partition::COMMAND);
        let (token, new_token) = (take(&partition::TOKEN), take(&partition::NEW_TOKEN));
        let command = u32::try_from(command).unwrap_or(0);
        let lease_ms = self
            .registers
            .get(&partition::BLOCK, index, &partition::LEASE_MS);
        let lease_ms = u32::try_from(lease_ms).unwrap_or(0);
        let with = || Circumstances {
            token,
            new_token,
            lease_ms,
            ready: self.is_ready(),
            coherent: target.is_attached(),
        };
        // A lease that is over at this moment is over for this command.
        self.scrubber.settle(target, target.expire(self.now()));
        let duty = target.command(command, with, self.now());
        self.scrubber.settle(target, duty);
        if target.lease_end().is_some() {
            self.ticker.wake();
        }
    }

    fn control_queue(&self, index: u32, value: u64) {
        let Some(target) = self.queues.get(index as usize) else {
            return;
        };
        let (enable, reset) = (
            value & u64::from(QUEUE_ENABLE) != 0,
            value & u64::from(QUEUE_RESET) != 0,
        );
        if reset {
            target.reset();
        }
        if reset || !enable {
            // A doorbell written in halves must not meet a half of an earlier life.
            self.doorbells
                .set(&pci::doorbell::BLOCK, index, &pci::doorbell::WPTR, 0);
            if let Some(page) = &self.mapped_doorbells {
                page.clear(index);
            }
        }
        let mut enabled = false;
        if enable {
            enabled = target.enable(|| self.is_ready().then(|| self.setup(index)));
            if let Some(page) = &self.mapped_doorbells {
                page.poller().wake();
            }
        } else if !reset {
            target.disable();
        }
        // Shows what was taken of the write.
        let shown = u64::from(enabled) * u64::from(QUEUE_ENABLE);
        self.registers
            .set(&queue::BLOCK, index, &queue::CONTROL, shown);
    }

    /// Rings the doorbells that were written to mapped memory. Whether there were any; none if there is no queue to
    /// ring, or the GPU pauses.
    pub(crate) fn look_at_doorbells(&self) -> Option<bool> {
        let page = self.mapped_doorbells.as_ref()?;
        let enabled = self.queues.iter().any(Queue::is_enabled);
        if !enabled || *lock(&self.pauses) > 0 {
            return None;
        }
        // A function that is off the bus sees no store.
        Some(self.is_present() && page.look(&self.queues))
    }

    fn setup(&self, index: u32) -> Setup {
        let get = |reg| self.registers.get(&queue::BLOCK, index, reg);
        Setup {
            ring_base: get(&queue::RING_BASE),
            ring_size: u32::try_from(get(&queue::RING_SIZE)).unwrap_or(0),
            writeback: get(&queue::RPTR_WRITEBACK),
            wptr_poll: get(&queue::WPTR_POLL),
            priority: u32::try_from(get(&queue::PRIORITY)).unwrap_or(0),
            reach: self.reach(get(&queue::TOKEN)),
        }
    }

    /// What a queue that acts for `token` can reach.
    fn reach(&self, token: u64) -> Reach {
        let attachment = lock(&self.attachment);
        Reach {
            place: self.member.place,
            token,
            fabric: Arc::clone(&self.fabric),
            dma: attachment.as_ref().map(|a| Arc::clone(&a.dma)),
            dma_allowed: Arc::clone(&self.dma_allowed),
            clock: Arc::clone(&self.clock) as _,
            timing: Timing {
                mode: self.config.timing,
                hbm_bandwidth_mbs: self.config.hbm_bandwidth_mbs,
                hbm_latency_ns: self.config.hbm_latency_ns,
            },
        }
    }
}

/// Queues that hear kicks: none where VMMs map the page, since what is stored there may be zero and goes unseen.
fn kicks(config: &GpuConfig) -> u64 {
    match config.doorbells {
        Some(_) => 0,
        None => config.queues.into(),
    }
}

fn link_status(end: &LinkEnd) -> LinkStatus {
    LinkStatus {
        peer: end.peer,
        state: end.state(),
        lanes: end.lanes(),
        errors: end.errors(),
        bytes_out: end.bytes_out(),
        bytes_in: end.bytes_in(),
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.queues.clear();
        self.fabric.leave(self.member.place);
    }
}

impl PciFunction for Gpu {
    fn layout(&self) -> &FunctionLayout {
        &self.layout
    }

    fn attach(&self, attachment: Attachment) {
        let _one = lock(&self.lifecycle);
        if lock(&self.attachment).take().is_some() {
            // A transport that did not say goodbye; the new VMM must find nothing of the old one.
            self.reset_function(ResetKind::Disconnect);
        }
        self.irq.connect(Some(Arc::clone(&attachment.irq)));
        let dma = Arc::clone(&attachment.dma);
        *lock(&self.attachment) = Some(attachment);
        self.judge_coherence();
        // A state that was restored before is kept, and goes on now.
        self.queues.iter().for_each(|it| it.vmm_is_there(&dma));
    }

    fn detach(&self) {
        let _one = lock(&self.lifecycle);
        self.irq.connect(None);
        *lock(&self.attachment) = None;
        self.judge_coherence();
        self.reset_function(ResetKind::Disconnect);
    }

    fn dma_changed(&self) {
        self.judge_coherence();
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        if !self.is_present() {
            return data.fill(0xff);
        }
        lock(&self.config_space).read(offset, data);
    }

    fn config_write(&self, offset: u32, data: &[u8]) {
        if !self.is_present() {
            return;
        }
        let (effects, master_off) = {
            let mut space = lock(&self.config_space);
            let was_master = space.bus_master();
            let effects = space.write(offset, data);
            self.dma_allowed
                .store(space.dma_allowed(), Ordering::SeqCst);
            (effects, was_master && !space.bus_master())
        };
        if master_off {
            self.lose(Event::BusMasterOff);
        }
        if effects.function_reset {
            self.reset(ResetKind::Function);
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        if !self.is_present() {
            return data.fill(0xff);
        }
        match bar {
            pci::BAR_REGISTERS => self.registers.read(self, offset, data),
            pci::BAR_DOORBELLS => self.doorbells.read(&DoorbellPage(self), offset, data),
            pci::BAR_MSIX => self.msix.read(&MsixPage, offset, data),
            _ => match self.aperture_at(bar) {
                Some(aperture) => aperture.read(offset, data),
                None => data.fill(0),
            },
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if !self.is_present() {
            return;
        }
        match bar {
            pci::BAR_REGISTERS => self.registers.write(self, offset, data),
            pci::BAR_DOORBELLS => self.doorbells.write(&DoorbellPage(self), offset, data),
            pci::BAR_MSIX => self.msix.write(&MsixPage, offset, data),
            _ => {
                if let Some(aperture) = self.aperture_at(bar) {
                    aperture.write(offset, data);
                }
            }
        }
    }

    fn bar_file(&self, bar: u8) -> Option<BorrowedFd<'_>> {
        match (bar, &self.mapped_doorbells) {
            (pci::BAR_DOORBELLS, Some(page)) => page.file(),
            _ => self.aperture_at(bar)?.file(),
        }
    }

    fn kicks(&self) -> &[Kick] {
        &self.kicks
    }

    fn migrate(&self) -> Option<&dyn Migrate> {
        Some(self)
    }

    fn reset(&self, kind: ResetKind) {
        let _one = lock(&self.lifecycle);
        self.reset_function(kind);
    }
}
