//! Saving, pausing and restoring a GPU.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use numagpu_spec::regs::{LINK_PEER_CPU, NO_PXM, OwnerState, irq};

use super::{Gpu, lock};
use crate::bus::PciFunction as _;
use crate::clock::Clock as _;
use crate::config_space::ConfigSpace;
use crate::inject::Flap;
use crate::ownership::{Duty, Machine};
use crate::queue::Queue;
use crate::state::{
    GpuState, LATEST, RestoreError, SaveError, SavedFlap, SavedPartition, Shape, VERSION, same,
};

/// How long queues may take to finish the packets that they are at: a copy of 64 GiB at 8 GB/s.
const PAUSE_WAIT: Duration = Duration::from_secs(8);
/// How long a restore waits for scrubs of an earlier life.
const SCRUB_WAIT: Duration = Duration::from_secs(8);

/// Queues that stand still between two packets, leases that do not end, and links that do not return, until this is
/// dropped. Registers answer meanwhile; stops, resets and detaches happen at once.
#[must_use]
pub struct Pause {
    gpu: Arc<Gpu>,
}

impl Pause {
    /// The state, the same at every call while nobody accesses registers.
    pub fn state(&self) -> GpuState {
        self.gpu.snapshot()
    }

    /// The last state of a GPU that another one replaces: its queues are reset, so that no packet is done twice. Its
    /// partitions stay as they are, and their memory too, until it is detached or reset.
    pub fn finish(self) -> GpuState {
        let state = self.state();
        self.gpu.queues.iter().for_each(Queue::reset);
        state
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        self.gpu.end_pause();
    }
}

/// Ends a pause that a reference to the GPU began.
struct EndPause<'g>(&'g Gpu);

impl Drop for EndPause<'_> {
    fn drop(&mut self) {
        self.0.end_pause();
    }
}

/// What a state becomes when all of it is checked.
struct Checked {
    config_space: ConfigSpace,
    /// By mode.
    machines: Vec<Vec<Machine>>,
}

impl Gpu {
    /// The state of this moment. The device goes on as if nothing had been asked.
    ///
    /// # Errors
    /// [`SaveError`] if a packet does not end within 8 seconds.
    pub fn save(&self) -> Result<GpuState, SaveError> {
        self.begin_pause(PAUSE_WAIT)?;
        let _end = EndPause(self);
        Ok(self.snapshot())
    }

    /// Pauses the device, for its state and its memory to be of one moment.
    ///
    /// # Errors
    /// As [`Gpu::save`].
    pub fn pause(self: &Arc<Gpu>) -> Result<Pause, SaveError> {
        self.begin_pause(PAUSE_WAIT)?;
        let gpu = Arc::clone(self);
        Ok(Pause { gpu })
    }

    /// Takes no lock that register accesses take for longer than they do.
    pub(crate) fn begin_pause(&self, limit: Duration) -> Result<(), SaveError> {
        {
            let mut pauses = lock(&self.pauses);
            *pauses = pauses.saturating_add(1);
        }
        // What was rung by now belongs to the state that is taken in the pause.
        if let Some(page) = &self.mapped_doorbells {
            page.look(&self.queues);
        }
        self.queues.iter().for_each(|queue| queue.hold());
        let end = Instant::now() + limit;
        match self.queues.iter().position(|queue| !queue.is_held(end)) {
            None => Ok(()),
            Some(queue) => {
                self.end_pause();
                let waited_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                Err(SaveError::Busy { queue, waited_ms })
            }
        }
    }

    pub(super) fn end_pause(&self) {
        self.queues.iter().for_each(|queue| queue.go_on());
        let mut pauses = lock(&self.pauses);
        *pauses = pauses.saturating_sub(1);
        drop(pauses);
        self.ticker.wake_if_used();
        if let Some(page) = &self.mapped_doorbells {
            page.poller().wake_if_used();
        }
    }

    /// What is there, while queues pause.
    pub(super) fn snapshot(&self) -> GpuState {
        let _one = lock(&self.lifecycle);
        let Gpu {
            fabric: _,
            member,
            aperture: _,
            attachment,
            irq,
            scrubber: _,
            ticker: _,
            clock,
            pauses: _,
            config: _,
            layout: _,
            kicks: _,
            lifecycle: _,
            judging: _,
            config_space,
            dma_allowed: _,
            registers,
            doorbells,
            mapped_doorbells: _,
            msix,
            boot,
            health,
            presence,
            flaps,
            queues,
        } = self;
        let (modes, mode) = member.modes.modes();
        // That in force first: where a partition of it is free already, the scrubs before it are done.
        let active: Vec<_> = self.partitions().iter().map(|it| it.save()).collect();
        let others = modes.iter().enumerate().map(|(index, partitions)| {
            if index == mode {
                active.clone()
            } else {
                partitions.iter().map(|it| it.save()).collect()
            }
        });
        let modes = others.collect();
        let (lose_interrupts, causes) = irq.save();
        let (absent_until, stuck_ns) = presence.save();
        let flap = |flap: &Flap| SavedFlap {
            up_at: flap.up_at,
            peer: flap.peer,
        };
        // Each lock is given back before the next is taken.
        let attached = lock(attachment).is_some();
        let config_space = lock(config_space).values();
        let flaps = lock(flaps).iter().map(flap).collect();
        GpuState {
            version: VERSION,
            shape: self.shape(),
            attached,
            clock_ns: clock.now_ns(),
            config_space,
            registers: registers.values(),
            doorbells: doorbells.values(),
            msix: msix.values(),
            boot: boot.save(),
            lose_interrupts,
            causes,
            mode,
            modes,
            queues: queues.iter().map(|queue| queue.save()).collect(),
            links: member.links.iter().map(|end| end.save()).collect(),
            health: health.save(),
            absent_until,
            stuck_ns,
            flaps,
        }
    }

    pub(super) fn shape(&self) -> Shape {
        let config = &self.config;
        let ids = &config.ids;
        let mut bars = [0; 6];
        for bar in &self.layout().bars {
            if let Some(size) = bars.get_mut(usize::from(bar.index)) {
                *size = bar.size;
            }
        }
        let partitions = config.partitions.iter();
        let links = config.links.iter();
        Shape {
            index: config.index,
            ids: [
                ids.vendor.into(),
                ids.device.into(),
                ids.subsystem_vendor.into(),
                ids.subsystem.into(),
                ids.class,
                ids.revision.into(),
            ],
            bars,
            queues: config.queues,
            partitions: partitions
                .map(|it| [it.base, it.size, it.pxm.unwrap_or(NO_PXM).into()])
                .collect(),
            hive_id: config.hive_id,
            node_id: config.node_id,
            hive_size: config.hive_size,
            cpu_pxm: config.cpu_pxm,
            links: links
                .map(|it| {
                    let peer = it.peer.unwrap_or(LINK_PEER_CPU);
                    [peer, it.width, it.bandwidth_mbs, it.latency_ns]
                })
                .collect(),
            boot_us: self.boot.delay_us(),
            timing: config.timing.code(),
        }
    }

    /// Becomes the GPU that was saved: the same registers, the same owners; queues go on with their work, and what
    /// was RELEASING is scrubbed. The contents of the HBM have to be there already.
    ///
    /// The GPU has to be of the same configuration and as after power-on or a reset: no queue enabled, no partition
    /// owned. Its HBM is not touched before all is checked.
    ///
    /// # Errors
    /// [`RestoreError`]; then the GPU is as it was before.
    pub fn restore(&self, state: &GpuState) -> Result<(), RestoreError> {
        let checked = self.check(state)?;
        let _one = lock(&self.lifecycle);
        self.scrubber.wait(SCRUB_WAIT);
        // Without it no queue is enabled and no partition claimed while this goes on.
        let boot = self.boot.save();
        self.boot.reset();
        if let Err(refused) = self.is_ready_for(state) {
            self.boot.restore(&boot);
            return Err(refused);
        }
        self.put(state, checked);
        Ok(())
    }

    /// Checks whether this GPU is made as one was whose state is of that version.
    pub(super) fn check_shape(&self, version: u32, shape: &Shape) -> Result<(), RestoreError> {
        if version != VERSION {
            return Err(RestoreError::Version {
                have: version,
                want: VERSION,
            });
        }
        shape.check(&self.shape())
    }

    /// Checks every value against this GPU, and changes nothing.
    fn check(&self, state: &GpuState) -> Result<Checked, RestoreError> {
        let bad = |what, index, value| RestoreError::Bad { what, index, value };
        let len = |what, have: usize, want: usize| same(what, 0, have as u64, want as u64);
        self.check_shape(state.version, &state.shape)?;
        if state.clock_ns > LATEST {
            return Err(bad("clock", 0, state.clock_ns));
        }
        let config_space = lock(&self.config_space).with_values(&state.config_space)?;
        let is_counter = |at: crate::registers::RegisterAt| at.is(&irq::BLOCK, &irq::RAISED);
        for (what, file, values) in [
            ("register", &*self.registers, &state.registers),
            ("doorbell", &self.doorbells, &state.doorbells),
            ("MSI-X register", &self.msix, &state.msix),
        ] {
            len(what, values.len(), file.values().len())?;
            if let Some(index) = file.misfit(values, is_counter) {
                return Err(bad(what, index, values.get(index).copied().unwrap_or(0)));
            }
        }
        if let crate::state::NextBoot::Fault(0) = state.boot.next {
            return Err(bad("code of the next boot's fault", 0, 0));
        }
        let machines = self.check_partitions(state)?;
        len("queues", state.queues.len(), self.queues.len())?;
        for (index, queue) in state.queues.iter().enumerate() {
            queue.check(index)?;
        }
        len("links", state.links.len(), self.member.links.len())?;
        for (index, (saved, end)) in state.links.iter().zip(&self.member.links).enumerate() {
            if saved.lanes > end.width() {
                return Err(bad("lanes of link", index, saved.lanes.into()));
            }
        }
        let is_hbm = |address: u64| {
            let mut planned = self.member.modes.planned().iter();
            planned.any(|it| (it.base()..it.end()).contains(&address))
        };
        state.health.check(is_hbm)?;
        for (index, flap) in state.flaps.iter().enumerate() {
            let is_peer = self
                .config
                .links
                .iter()
                .any(|it| it.peer == Some(flap.peer));
            let mut before = state.flaps.iter().take(index);
            if !is_peer || before.any(|it| it.peer == flap.peer) {
                return Err(bad("peer of flapping link", index, flap.peer.into()));
            }
        }
        Ok(Checked {
            config_space,
            machines,
        })
    }

    fn check_partitions(&self, state: &GpuState) -> Result<Vec<Vec<Machine>>, RestoreError> {
        let bad = |what, index, value| RestoreError::Bad { what, index, value };
        let (modes, _) = self.member.modes.modes();
        same(
            "partition modes",
            0,
            state.modes.len() as u64,
            modes.len() as u64,
        )?;
        let active = state.modes.get(state.mode);
        let active = active.ok_or_else(|| bad("partition mode", 0, state.mode as u64))?;
        let releasing = OwnerState::Releasing.code();
        let all_releasing = active.iter().all(|it| it.state == releasing);
        let mut machines = Vec::new();
        for (mode, (saved, own)) in state.modes.iter().zip(modes).enumerate() {
            let count = "partitions of mode";
            same(count, mode, saved.len() as u64, own.len() as u64)?;
            let machine = |(index, it): (usize, &SavedPartition)| {
                // A scrub of another mode's would come behind the back of an owner in this one.
                let late = it.state == releasing && !all_releasing;
                let owned = it.state == OwnerState::Claimed.code();
                if mode != state.mode && (owned || late) {
                    let state = it.state.into();
                    return Err(bad(
                        "state, in a mode not in force, of partition",
                        index,
                        state,
                    ));
                }
                Machine::restored(it, index)
            };
            let mode = saved.iter().enumerate().map(machine);
            machines.push(mode.collect::<Result<_, _>>()?);
        }
        Ok(machines)
    }

    /// Whether nobody uses it, and each queue that has to go on has a worker.
    fn is_ready_for(&self, state: &GpuState) -> Result<(), RestoreError> {
        for (index, partition) in self.partitions().iter().enumerate() {
            if partition.state_code() != OwnerState::Free.code() {
                let what = "partition";
                return Err(RestoreError::InUse { what, index });
            }
        }
        let mut queues = self.queues.iter().zip(&state.queues);
        queues.try_for_each(|(queue, saved)| queue.is_ready_for(saved))
    }

    /// Puts a checked state in the place of this GPU's. Under `lifecycle`, with the boot undone.
    fn put(&self, state: &GpuState, checked: Checked) {
        let Checked {
            config_space,
            machines,
        } = checked;
        self.clock.set(state.clock_ns);
        self.dma_allowed
            .store(config_space.dma_allowed(), Ordering::SeqCst);
        *lock(&self.config_space) = config_space;
        self.registers.set_values(&state.registers);
        self.doorbells.set_values(&state.doorbells);
        self.msix.set_values(&state.msix);
        self.irq.restore(state.lose_interrupts, state.causes);
        self.health.restore(&state.health);
        self.presence.restore(state.absent_until, state.stuck_ns);
        let flap = |it: &SavedFlap| Flap {
            up_at: it.up_at,
            peer: it.peer,
        };
        *lock(&self.flaps) = state.flaps.iter().map(flap).collect();
        for (saved, end) in state.links.iter().zip(&self.member.links) {
            end.restore(saved);
        }
        let (modes, _) = self.member.modes.modes();
        if let Some(mode) = modes.get(state.mode) {
            self.fabric.divide(&self.member, mode.len());
        }
        // What was given up before the borders moved is scrubbed first.
        let in_order = |index: &usize| *index == state.mode;
        let mut order: Vec<usize> = (0..modes.len()).collect();
        order.sort_by_key(in_order);
        let mut machines: Vec<_> = machines.into_iter().map(Some).collect();
        for index in order {
            let machines = machines.get_mut(index).and_then(Option::take);
            let own = modes.get(index).zip(state.modes.get(index));
            let Some((machines, (own, saved))) = machines.zip(own) else {
                continue;
            };
            for ((partition, machine), saved) in own.iter().zip(machines).zip(saved) {
                let duty: Duty = partition.restore(machine, saved.fail_scrub);
                self.scrubber.settle(partition, duty);
            }
        }
        self.judge_coherence();
        let waits = state.attached && lock(&self.attachment).is_none();
        for (queue, saved) in self.queues.iter().zip(&state.queues) {
            let reach = saved.run.as_ref().map(|run| self.reach(run.token));
            queue.restore(saved, reach, waits);
        }
        self.boot.restore(&state.boot);
        match &self.mapped_doorbells {
            Some(page) if self.queues.iter().any(Queue::is_enabled) => page.poller().wake(),
            _ => {}
        }
        let mut leases = self.partitions().iter().filter_map(|it| it.lease_end());
        if leases.next().is_some() || !state.flaps.is_empty() {
            self.ticker.wake();
        }
    }
}
