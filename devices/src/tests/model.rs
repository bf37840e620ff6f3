//! The device and a simple model of it, side by side, for many random steps.
//!
//! The model knows no threads, no gates and no chunks: it does everything at once and in order. After each step all
//! registers and all memory have to be as the model has them, at the latest when scrubbers and workers are done.

use std::collections::BTreeSet;

use numagpu_spec::regs::{
    BootState, IrqBits, OwnerCommand, OwnerEvent, OwnerLoss, boot, irq, partition, queue,
};
use numagpu_spec::sdma::{self, AtomicOp, atomic, const_fill, copy_linear, fence, trap};

use super::*;
use crate::bus::ResetKind;

/// Steps of one run.
const STEPS: u64 = 100_000;
/// Bytes that are compared, of RAM and of each partition.
const WINDOW: usize = 1024;
const PARTITION: usize = 64 << 10;
const GPUS: usize = 2;
/// Nothing is mapped here.
const NOWHERE: u64 = 0xdead_0000_0000;
const MS: u64 = 1_000_000;

/// Random numbers (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A packet as the model knows it.
#[derive(Clone, Debug)]
enum Task {
    Nop,
    Copy { from: u64, to: u64, len: u64 },
    Fill { to: u64, value: u32, len: u64 },
    Write { to: u64, words: Vec<u32> },
    Fence { to: u64, value: u32 },
    Trap { context: u32 },
    Add { to: u64, value: u32 },
    Unknown,
}

impl Task {
    fn words(&self) -> Vec<u32> {
        match self {
            Task::Nop => vec![0],
            Task::Copy { from, to, len } => copy_linear(*from, *to, *len).to_vec(),
            Task::Fill { to, value, len } => const_fill(*to, *value, *len).to_vec(),
            Task::Write { to, words } => write_linear(*to, words),
            Task::Fence { to, value } => fence(*to, *value).to_vec(),
            Task::Trap { context } => trap(*context).to_vec(),
            Task::Add { to, value } => {
                atomic(*to, AtomicOp::Add, false, u64::from(*value), 0).to_vec()
            }
            Task::Unknown => vec![u32::from(sdma::OP_TIMESTAMP) + 1],
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Pass {
        ns: u64,
    },
    Start {
        gpu: usize,
    },
    BusMaster {
        gpu: usize,
        on: bool,
    },
    Reset {
        gpu: usize,
        kind: ResetKind,
    },
    Reattach {
        gpu: usize,
    },
    /// Saved, and restored into a new device in its place.
    Migrate {
        gpu: usize,
    },
    Command {
        gpu: usize,
        part: usize,
        command: u32,
        token: u64,
        new: u64,
        lease: u32,
    },
    Control {
        gpu: usize,
        queue: usize,
        value: u32,
        token: u64,
    },
    Submit {
        gpu: usize,
        queue: usize,
        tasks: Vec<Task>,
    },
    Doorbell {
        gpu: usize,
        queue: usize,
        by: i64,
    },
    Clear {
        gpu: usize,
        bits: u32,
    },
    Enable {
        gpu: usize,
        bits: u32,
    },
    Link {
        up: bool,
    },
    Cpu {
        gpu: usize,
        part: usize,
        at: usize,
        value: u8,
    },
}

fn place(random: &mut Random, room: u64, align: u64) -> u64 {
    let base = match random.below(12) {
        0 => NOWHERE,
        1..=4 => DATA,
        n => hbm(n % 2, n / 2 % 2),
    };
    base + random.below((WINDOW as u64 - room) / align) * align
}

fn task(random: &mut Random) -> Task {
    let value = random.next() as u32;
    match random.below(16) {
        0 => Task::Unknown,
        1 => Task::Nop,
        2 => Task::Trap {
            context: value & sdma::TRAP_CONTEXT_MASK,
        },
        3..=4 => Task::Fence {
            to: place(random, 4, 4),
            value,
        },
        5..=6 => Task::Add {
            to: place(random, 4, 4),
            value,
        },
        7..=8 => Task::Fill {
            to: place(random, 256, 4),
            value,
            len: 4 + 4 * random.below(63),
        },
        9 => {
            let words = (0..=random.below(16)).map(|n| value ^ n as u32).collect();
            Task::Write {
                to: place(random, 80, 4),
                words,
            }
        }
        _ => Task::Copy {
            from: place(random, 256, 1),
            to: place(random, 256, 1),
            len: 1 + random.below(255),
        },
    }
}

/// What a driver would do next, which gets the device somewhere.
fn sensible(random: &mut Random, model: &Model, gpu: usize) -> Step {
    let own = &model.gpus[gpu];
    let (part, queue) = (random.below(2) as usize, random.below(2) as usize);
    let token = 7;
    if !own.bus_master {
        return Step::BusMaster { gpu, on: true };
    }
    match model.boot(gpu) {
        BootState::Ready => {}
        BootState::Booting => return Step::Pass { ns: MS },
        _ => return Step::Start { gpu },
    }
    if own.parts[part].owner != token && random.below(4) == 0 {
        return Step::Command {
            gpu,
            part,
            command: if own.parts[part].owner == 0 { 1 } else { 2 },
            token: own.parts[part].owner.max(token),
            new: 0,
            lease: 0,
        };
    }
    if own.queues[queue].state != QueueState::Idle || own.queues[queue].token != token {
        return Step::Control {
            gpu,
            queue,
            value: 3,
            token,
        };
    }
    let tasks = (0..=random.below(3)).map(|_| task(random)).collect();
    Step::Submit { gpu, queue, tasks }
}

fn step(random: &mut Random, model: &Model) -> Step {
    // GPU 0 gets most of it, so that it gets far.
    let gpu = usize::from(random.below(4) == 0);
    if random.below(4) != 0 {
        return sensible(random, model, gpu);
    }
    let (part, queue) = (random.below(2) as usize, random.below(2) as usize);
    let token = random.pick(&[0, 7, 7, 7, 7, 7, 9]);
    match random.below(100) {
        0..=4 => Step::Pass {
            ns: random.below(2 * MS),
        },
        5..=9 => Step::Start { gpu },
        10..=15 => Step::BusMaster {
            gpu,
            on: random.below(8) != 0,
        },
        16 => {
            let kind = random.pick(&[ResetKind::Function, ResetKind::Hot]);
            Step::Reset { gpu, kind }
        }
        17 => Step::Reattach { gpu },
        18 => Step::Migrate { gpu },
        19..=33 => Step::Command {
            gpu,
            part,
            command: random.pick(&[1, 1, 1, 1, 2, 3, 4, 77]),
            token,
            new: random.pick(&[0, 7, 7, 9]),
            lease: random.pick(&[0, 0, 1, 5]),
        },
        34..=47 => {
            let value = random.pick(&[0, 1, 1, 1, 2, 3, 3]);
            Step::Control {
                gpu,
                queue,
                value,
                token,
            }
        }
        48 => {
            // Behind, old, crooked, too far: never one that makes the device look at what is in the ring.
            let by = random.pick(&[-4, 0, 2, i64::from(RING_SIZE) + 4]);
            Step::Doorbell { gpu, queue, by }
        }
        49..=52 => Step::Clear {
            gpu,
            bits: random.next() as u32,
        },
        53..=55 => Step::Enable {
            gpu,
            bits: random.pick(&[0, u32::MAX]),
        },
        56 => Step::Link {
            up: random.below(3) != 0,
        },
        57..=60 => Step::Cpu {
            gpu,
            part,
            at: random.below(WINDOW as u64) as usize,
            value: random.next() as u8,
        },
        _ => {
            let tasks = (0..=random.below(3)).map(|_| task(random)).collect();
            Step::Submit { gpu, queue, tasks }
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
struct PartModel {
    owner: u64,
    generation: u32,
    result: OwnerResult,
    loss: OwnerLoss,
    lease_end: u64,
    steps: usize,
    memory: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq)]
struct QueueModel {
    state: QueueState,
    token: u64,
    rptr: u64,
    wptr: u64,
    packets: u64,
    fault: (QueueFault, u64, u64),
    context: u32,
    pointer: u64,
}

impl QueueModel {
    fn new(pointer: u64) -> QueueModel {
        QueueModel {
            state: QueueState::Disabled,
            token: 0,
            rptr: 0,
            wptr: 0,
            packets: 0,
            fault: (QueueFault::None, 0, 0),
            context: 0,
            pointer,
        }
    }
}

#[derive(Clone, Debug)]
struct GpuModel {
    ready_at: Option<u64>,
    bus_master: bool,
    status: u32,
    enable: u32,
    raised: u64,
    causes: u64,
    parts: Vec<PartModel>,
    queues: Vec<QueueModel>,
}

#[derive(Clone, Debug)]
struct Model {
    now: u64,
    up: bool,
    ram: Vec<u8>,
    gpus: Vec<GpuModel>,
}

/// Where the model finds an address.
#[derive(Clone, Copy)]
enum Where {
    Ram(usize),
    Hbm(usize, usize, usize),
    Nowhere,
}

impl Model {
    fn new() -> Model {
        let part = PartModel {
            owner: 0,
            generation: 0,
            result: OwnerResult::None,
            loss: OwnerLoss::None,
            lease_end: 0,
            steps: 0,
            memory: vec![0; WINDOW],
        };
        let gpu = GpuModel {
            ready_at: None,
            bus_master: false,
            status: 0,
            enable: 0,
            raised: 0,
            causes: 0,
            parts: vec![part; 2],
            queues: vec![QueueModel::new(0); 2],
        };
        Model {
            now: 0,
            up: true,
            ram: vec![0; WINDOW],
            gpus: vec![gpu; GPUS],
        }
    }

    fn find(address: u64) -> Where {
        for gpu in 0..GPUS {
            for part in 0..2 {
                let base = hbm(gpu as u64, part as u64);
                if (base..base + WINDOW as u64).contains(&address) {
                    return Where::Hbm(gpu, part, (address - base) as usize);
                }
            }
        }
        match address.checked_sub(DATA) {
            Some(at) if at < WINDOW as u64 => Where::Ram(at as usize),
            _ => Where::Nowhere,
        }
    }

    fn raise(&mut self, gpu: usize, bit: IrqBits) {
        let gpu = &mut self.gpus[gpu];
        gpu.status |= bit.bits();
        gpu.causes += 1;
        if gpu.enable & bit.bits() != 0 && gpu.bus_master {
            gpu.raised += 1;
        }
    }

    /// A partition changes hands without asking, or is given back: scrubbed, free, and whoever lost it is told.
    fn lose(&mut self, gpu: usize, part: usize, event: OwnerEvent) {
        let target = &mut self.gpus[gpu].parts[part];
        let was_owned = target.owner != 0;
        if !was_owned && event != OwnerEvent::Disconnect {
            return;
        }
        target.owner = 0;
        target.lease_end = 0;
        target.generation += 1;
        target.steps += 2;
        target.memory.fill(0);
        let loss = match event {
            OwnerEvent::FunctionReset => OwnerLoss::FunctionReset,
            OwnerEvent::HotReset => OwnerLoss::HotReset,
            OwnerEvent::BusMasterOff => OwnerLoss::BusMasterOff,
            OwnerEvent::LeaseExpired => OwnerLoss::LeaseExpired,
            OwnerEvent::Disconnect => OwnerLoss::Disconnect,
            _ => return,
        };
        if was_owned {
            target.loss = loss;
            if event != OwnerEvent::Disconnect {
                self.raise(gpu, IrqBits::OWNERSHIP);
            }
        }
    }

    fn reset(&mut self, gpu: usize, event: OwnerEvent) {
        let target = &mut self.gpus[gpu];
        target.ready_at = None;
        target.bus_master = false;
        (target.status, target.enable, target.raised) = (0, 0, 0);
        for queue in &mut target.queues {
            *queue = QueueModel::new(queue.pointer);
        }
        for part in 0..2 {
            self.gpus[gpu].parts[part].result = OwnerResult::None;
            self.lose(gpu, part, event);
        }
    }

    fn pass(&mut self, ns: u64) {
        self.now += ns;
        for gpu in 0..GPUS {
            for part in 0..2 {
                let end = self.gpus[gpu].parts[part].lease_end;
                if end != 0 && self.now >= end {
                    self.lose(gpu, part, OwnerEvent::LeaseExpired);
                }
            }
        }
    }

    fn boot(&self, gpu: usize) -> BootState {
        match self.gpus[gpu].ready_at {
            None => BootState::Reset,
            Some(at) if self.now < at => BootState::Booting,
            Some(_) => BootState::Ready,
        }
    }

    fn command(&mut self, gpu: usize, part: usize, command: u32, token: u64, new: u64, lease: u32) {
        let ready = self.boot(gpu) == BootState::Ready;
        let now = self.now;
        let target = &mut self.gpus[gpu].parts[part];
        let owned = target.owner != 0;
        let is_owner = owned && target.owner == token;
        let lease_end = match lease {
            0 => u64::MAX,
            ms => now + u64::from(ms) * MS,
        };
        target.result = match OwnerCommand::from_code(command) {
            None => OwnerResult::BadCommand,
            Some(OwnerCommand::Claim) => match (token, owned, ready) {
                (0, _, _) => OwnerResult::BadToken,
                (_, true, _) => OwnerResult::Busy,
                (_, false, false) => OwnerResult::NotReady,
                _ => {
                    target.owner = token;
                    target.generation += 1;
                    target.steps += 1;
                    target.lease_end = lease_end;
                    OwnerResult::Ok
                }
            },
            Some(_) if !is_owner => OwnerResult::NotOwner,
            Some(OwnerCommand::Release) => {
                self.lose(gpu, part, OwnerEvent::Release);
                self.gpus[gpu].parts[part].result = OwnerResult::Ok;
                return;
            }
            Some(OwnerCommand::Transfer) if new == 0 => OwnerResult::BadToken,
            Some(command) => {
                if command == OwnerCommand::Transfer {
                    target.owner = new;
                }
                target.steps += 1;
                target.lease_end = lease_end;
                OwnerResult::Ok
            }
        };
    }

    fn control(&mut self, gpu: usize, queue: usize, value: u32, token: u64) {
        let ready = self.boot(gpu) == BootState::Ready;
        let target = &mut self.gpus[gpu].queues[queue];
        if value & 2 != 0 {
            *target = QueueModel::new(target.pointer);
        }
        if value & 1 != 0 {
            if target.state == QueueState::Disabled && ready {
                *target = QueueModel::new(target.pointer);
                target.state = QueueState::Idle;
                target.token = token;
            }
        } else if value & 2 == 0 && target.state != QueueState::Fault {
            target.state = QueueState::Disabled;
        }
    }

    fn fault(&mut self, gpu: usize, queue: usize, code: QueueFault, address: u64) {
        let target = &mut self.gpus[gpu].queues[queue];
        target.state = QueueState::Fault;
        target.fault = (code, address, target.packets);
        self.raise(gpu, IrqBits::FAULT);
    }

    fn doorbell(&mut self, gpu: usize, queue: usize, by: i64) {
        let target = &mut self.gpus[gpu].queues[queue];
        let wptr = target.rptr.wrapping_add_signed(by);
        if target.state != QueueState::Idle {
            return;
        }
        let ahead = wptr.checked_sub(target.rptr);
        if ahead.is_none_or(|ahead| ahead > RING_SIZE.into()) || !wptr.is_multiple_of(4) {
            self.fault(gpu, queue, QueueFault::BadDoorbell, wptr);
        }
    }

    /// Whether a queue reaches an address at all.
    fn route(&self, gpu: usize, address: u64) -> Result<(), (QueueFault, u64)> {
        match Model::find(address) {
            Where::Hbm(other, _, _) if other != gpu && !self.up => {
                Err((QueueFault::LinkDown, address))
            }
            Where::Hbm(..) => Ok(()),
            _ if !self.gpus[gpu].bus_master => Err((QueueFault::BusMasterOff, address)),
            _ => Ok(()),
        }
    }

    fn owned(&self, token: u64, address: u64) -> Result<(), (QueueFault, u64)> {
        match Model::find(address) {
            Where::Hbm(gpu, part, _) if token == 0 || self.gpus[gpu].parts[part].owner != token => {
                Err((QueueFault::NotOwned, address))
            }
            _ => Ok(()),
        }
    }

    fn mapped(address: u64) -> Result<(), (QueueFault, u64)> {
        match Model::find(address) {
            Where::Nowhere => Err((QueueFault::Unmapped, address)),
            _ => Ok(()),
        }
    }

    fn get(&self, address: u64, len: u64) -> Vec<u8> {
        let len = len as usize;
        match Model::find(address) {
            Where::Ram(at) => self.ram[at..at + len].to_vec(),
            Where::Hbm(gpu, part, at) => self.gpus[gpu].parts[part].memory[at..at + len].to_vec(),
            Where::Nowhere => unreachable!("checked before"),
        }
    }

    fn put(&mut self, address: u64, data: &[u8]) {
        let to = match Model::find(address) {
            Where::Ram(at) => &mut self.ram[at..],
            Where::Hbm(gpu, part, at) => &mut self.gpus[gpu].parts[part].memory[at..],
            Where::Nowhere => unreachable!("checked before"),
        };
        to[..data.len()].copy_from_slice(data);
    }

    fn reach(&self, gpu: usize, token: u64, places: &[u64]) -> Result<(), (QueueFault, u64)> {
        places.iter().try_for_each(|at| self.route(gpu, *at))?;
        places.iter().try_for_each(|at| self.owned(token, *at))?;
        places.iter().try_for_each(|at| Model::mapped(*at))
    }

    fn execute(&mut self, gpu: usize, queue: usize, task: &Task) -> Result<(), (QueueFault, u64)> {
        let target = &self.gpus[gpu].queues[queue];
        let token = target.token;
        let here = ring(gpu, queue as u32) + target.rptr % u64::from(RING_SIZE);
        match task {
            Task::Nop => {}
            Task::Unknown => return Err((QueueFault::BadOpcode, here)),
            Task::Copy { from, to, len } => {
                self.reach(gpu, token, &[*from, *to])?;
                let data = self.get(*from, *len);
                self.put(*to, &data);
            }
            Task::Fill { to, value, len } => {
                self.reach(gpu, token, &[*to])?;
                let data: Vec<u8> = value
                    .to_le_bytes()
                    .into_iter()
                    .cycle()
                    .take(*len as usize)
                    .collect();
                self.put(*to, &data);
            }
            Task::Write { to, words } => {
                self.reach(gpu, token, &[*to])?;
                let data: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                self.put(*to, &data);
            }
            Task::Fence { to, value } => {
                self.reach(gpu, token, &[*to])?;
                self.put(*to, &value.to_le_bytes());
            }
            Task::Add { to, value } => {
                self.reach(gpu, token, &[*to])?;
                let old = u32::from_le_bytes(self.get(*to, 4).try_into().unwrap());
                self.put(*to, &old.wrapping_add(*value).to_le_bytes());
            }
            Task::Trap { context } => {
                self.gpus[gpu].queues[queue].context = *context;
                let bit = IrqBits::from_bits_retain(IrqBits::QUEUE0.bits() << queue);
                self.raise(gpu, bit);
            }
        }
        Ok(())
    }

    fn submit(&mut self, gpu: usize, queue: usize, tasks: &[Task]) {
        if self.gpus[gpu].queues[queue].state != QueueState::Idle {
            return;
        }
        let bytes = |task: &Task| 4 * task.words().len() as u64;
        self.gpus[gpu].queues[queue].wptr += tasks.iter().map(bytes).sum::<u64>();
        if !self.gpus[gpu].bus_master {
            // The ring itself is out of reach, and so is the place of the read pointer.
            let at = ring(gpu, queue as u32);
            let at = at + self.gpus[gpu].queues[queue].rptr % u64::from(RING_SIZE);
            return self.fault(gpu, queue, QueueFault::BusMasterOff, at);
        }
        for task in tasks {
            let outcome = self.execute(gpu, queue, task);
            if let Err((code, address)) = outcome {
                self.fault(gpu, queue, code, address);
                break;
            }
            let target = &mut self.gpus[gpu].queues[queue];
            target.rptr += bytes(task);
            target.packets += 1;
        }
        let target = &mut self.gpus[gpu].queues[queue];
        target.pointer = target.rptr;
    }

    fn take(&mut self, step: &Step) {
        match step {
            Step::Pass { ns } => self.pass(*ns),
            Step::Start { gpu } => {
                let ready_at = self.now + MS;
                self.gpus[*gpu].ready_at.get_or_insert(ready_at);
            }
            Step::BusMaster { gpu, on } => {
                if std::mem::replace(&mut self.gpus[*gpu].bus_master, *on) && !on {
                    (0..2).for_each(|part| self.lose(*gpu, part, OwnerEvent::BusMasterOff));
                }
            }
            Step::Reset { gpu, kind } => self.reset(
                *gpu,
                match kind {
                    ResetKind::Hot => OwnerEvent::HotReset,
                    _ => OwnerEvent::FunctionReset,
                },
            ),
            Step::Reattach { gpu } => self.reset(*gpu, OwnerEvent::Disconnect),
            // Nobody notices.
            Step::Migrate { .. } => {}
            Step::Command {
                gpu,
                part,
                command,
                token,
                new,
                lease,
            } => {
                self.command(*gpu, *part, *command, *token, *new, *lease);
            }
            Step::Control {
                gpu,
                queue,
                value,
                token,
            } => {
                self.control(*gpu, *queue, *value, *token);
            }
            Step::Submit { gpu, queue, tasks } => self.submit(*gpu, *queue, tasks),
            Step::Doorbell { gpu, queue, by } => self.doorbell(*gpu, *queue, *by),
            Step::Clear { gpu, bits } => self.gpus[*gpu].status &= !bits,
            Step::Enable { gpu, bits } => self.gpus[*gpu].enable = *bits,
            Step::Link { up } => {
                if std::mem::replace(&mut self.up, *up) != *up {
                    (0..GPUS).for_each(|gpu| self.raise(gpu, IrqBits::LINK));
                }
            }
            Step::Cpu {
                gpu,
                part,
                at,
                value,
            } => {
                self.gpus[*gpu].parts[*part].memory[*at] = *value;
            }
        }
    }
}

/// A machine of two linked GPUs with small partitions, which are scrubbed quickly.
fn machine() -> Machine {
    let mut machine = Machine {
        gpus: Vec::new(),
        vmms: Vec::new(),
        stores: Vec::new(),
        fabric: Fabric::new(),
        clock: Arc::default(),
        ram: Arc::new(AnonymousStore::new(4096).unwrap()),
    };
    let first = TestVmm::default();
    machine.ram = first.dma.map_ram(RAM, RAM_SIZE).unwrap();
    for index in 0..GPUS as u32 {
        let stores: Vec<_> = (0..2)
            .map(|_| Arc::new(AnonymousStore::new(PARTITION).unwrap()))
            .collect();
        let partitions = (0..2).zip(&stores).map(|(part, store)| {
            let base = hbm(index.into(), part);
            first.dma.map(base, Arc::clone(store) as _);
            PartitionConfig {
                base,
                size: PARTITION as u64,
                pxm: None,
                store: Arc::clone(store) as Arc<dyn HbmStore>,
            }
        });
        let config = GpuConfig {
            hive_id: 1,
            node_id: index,
            hive_size: GPUS as u32,
            links: vec![LinkConfig {
                peer: Some(1 - index),
                width: 1,
                bandwidth_mbs: 0,
                latency_ns: 0,
            }],
            clock: Arc::clone(&machine.clock) as _,
            ..GpuConfig::new(index, partitions.collect())
        };
        let gpu = Gpu::new(config, Arc::clone(&machine.fabric)).unwrap();
        let vmm = TestVmm {
            dma: Arc::clone(&first.dma),
            ..TestVmm::default()
        };
        gpu.attach(vmm.attachment());
        machine.gpus.push(gpu);
        machine.vmms.push(vmm);
        machine.stores.push(stores);
    }
    machine
}

/// Puts a new device with the state of the old one in its place.
fn migrate(machine: &mut Machine, gpu: usize) {
    let old = machine.gpus.remove(gpu);
    let state = old.pause().unwrap().finish();
    let config = old.config().clone();
    drop(old);
    let mut new = None;
    // A ticker may hold the old one for a moment.
    wait(|| {
        new = Gpu::new(config.clone(), Arc::clone(&machine.fabric)).ok();
        new.is_some()
    });
    let new = new.unwrap();
    new.attach(machine.vmms[gpu].attachment());
    new.restore(&state).unwrap();
    machine.gpus.insert(gpu, new);
}

fn take(machine: &mut Machine, step: &Step) {
    match step {
        Step::Pass { ns } => {
            machine.clock.advance(*ns);
            machine.gpus.iter().for_each(|gpu| {
                let _next = gpu.tick();
            });
        }
        Step::Start { gpu } => machine.write(*gpu, &boot::BLOCK, 0, &boot::CONTROL, 1),
        Step::BusMaster { gpu, on } => {
            machine.gpus[*gpu].config_write(4, &[2 | u8::from(*on) << 2]);
        }
        Step::Reset { gpu, kind } => machine.gpus[*gpu].reset(*kind),
        Step::Reattach { gpu } => {
            machine.gpus[*gpu].detach();
            machine.gpus[*gpu].attach(machine.vmms[*gpu].attachment());
        }
        Step::Migrate { gpu } => migrate(machine, *gpu),
        Step::Command {
            gpu,
            part,
            command,
            token,
            new,
            lease,
        } => {
            let set = |reg, value| {
                machine.write(*gpu, &partition::BLOCK, *part as u32, reg, value);
            };
            set(&partition::NEW_TOKEN, *new);
            set(&partition::LEASE_MS, u64::from(*lease));
            set(&partition::TOKEN, *token);
            set(&partition::COMMAND, u64::from(*command));
        }
        Step::Control {
            gpu,
            queue,
            value,
            token,
        } => {
            let queue = *queue as u32;
            let set = |reg, value| machine.set_queue(*gpu, queue, reg, value);
            set(&queue::RING_BASE, ring(*gpu, queue));
            set(&queue::RING_SIZE, RING_SIZE.into());
            set(&queue::TOKEN, *token);
            set(&queue::RPTR_WRITEBACK, writeback(*gpu, queue));
            set(&queue::CONTROL, u64::from(*value));
        }
        Step::Submit { gpu, queue, tasks } => {
            if machine.queue_state(*gpu, *queue as u32) == QueueState::Idle {
                let words: Vec<u32> = tasks.iter().flat_map(Task::words).collect();
                machine.submit(*gpu, *queue as u32, &words);
            }
        }
        Step::Doorbell { gpu, queue, by } => {
            let queue = *queue as u32;
            let rptr = machine.queue(*gpu, queue, &queue::RPTR);
            machine.ring_doorbell(*gpu, queue, rptr.wrapping_add_signed(*by));
        }
        Step::Clear { gpu, bits } => {
            machine.write(*gpu, &irq::BLOCK, 0, &irq::STATUS, u64::from(*bits));
        }
        Step::Enable { gpu, bits } => {
            machine.write(*gpu, &irq::BLOCK, 0, &irq::ENABLE, u64::from(*bits));
        }
        Step::Link { up } => machine.fabric.set_link(1, 0, 1, *up).unwrap(),
        Step::Cpu {
            gpu,
            part,
            at,
            value,
        } => {
            let slice = machine.stores[*gpu][*part].slice(*at as u64, 1).unwrap();
            slice.write_slice(&[*value], 0).unwrap();
        }
    }
}

/// The first thing that is not as the model has it.
fn difference(machine: &Machine, model: &Model) -> Result<(), String> {
    let same = |what: &str, device: u64, model: u64| match device == model {
        true => Ok(()),
        false => Err(format!("{what}: device {device:#x}, model {model:#x}")),
    };
    for (g, gpu) in model.gpus.iter().enumerate() {
        let irq = |reg| machine.read(g, &irq::BLOCK, 0, reg);
        let state = machine.read(g, &boot::BLOCK, 0, &boot::STATUS);
        same("boot", state, model.boot(g).code().into())?;
        same("IRQ.RAISED", irq(&irq::RAISED), gpu.raised)?;
        same("causes", machine.gpus[g].status().causes, gpu.causes)?;
        same("IRQ.STATUS", irq(&irq::STATUS), gpu.status.into())?;
        same("IRQ.ENABLE", irq(&irq::ENABLE), gpu.enable.into())?;
        for (p, part) in gpu.parts.iter().enumerate() {
            let get = |reg| machine.partition(g, p as u32, reg);
            let state = match part.owner {
                0 => OwnerState::Free,
                _ => OwnerState::Claimed,
            };
            same("STATE", get(&partition::STATE), state.code().into())?;
            same(
                "GENERATION",
                get(&partition::GENERATION),
                part.generation.into(),
            )?;
            same("RESULT", get(&partition::RESULT), part.result.code().into())?;
            same("LOSS", get(&partition::LOSS), part.loss.code().into())?;
            let left = match part.lease_end {
                u64::MAX => u32::MAX.into(),
                end => end.saturating_sub(model.now).div_ceil(MS),
            };
            same("LEASE_LEFT_MS", get(&partition::LEASE_LEFT_MS), left)?;
            let steps = part.steps.min(crate::ownership::HISTORY) as u64;
            same("HISTORY_COUNT", get(&partition::HISTORY_COUNT), steps)?;
            if bytes(&machine.stores[g][p], 0, WINDOW) != part.memory {
                return Err(format!("memory of GPU {g}, partition {p}"));
            }
        }
        for (q, queue) in gpu.queues.iter().enumerate() {
            let get = |reg| machine.queue(g, q as u32, reg);
            same(
                "queue STATUS",
                get(&queue::STATUS),
                queue.state.code().into(),
            )?;
            same("RPTR", get(&queue::RPTR), queue.rptr)?;
            same("WPTR", get(&queue::WPTR), queue.wptr)?;
            same("PACKETS", get(&queue::PACKETS), queue.packets)?;
            same(
                "FAULT_CODE",
                get(&queue::FAULT_CODE),
                queue.fault.0.code().into(),
            )?;
            same("FAULT_ADDR", get(&queue::FAULT_ADDR), queue.fault.1)?;
            same("FAULT_PACKET", get(&queue::FAULT_PACKET), queue.fault.2)?;
            same(
                "TRAP_CONTEXT",
                get(&queue::TRAP_CONTEXT),
                queue.context.into(),
            )?;
            let pointer = machine.peek(writeback(g, q as u32), 8);
            let pointer = u64::from_le_bytes(pointer.try_into().unwrap());
            same("pointer in RAM", pointer, queue.pointer)?;
        }
    }
    match machine.peek(DATA, WINDOW) == model.ram {
        true => Ok(()),
        false => Err("memory of RAM".into()),
    }
}

/// What a run has met, so that no run passes because it got nowhere.
#[derive(Default)]
struct Met {
    results: BTreeSet<OwnerResult>,
    losses: BTreeSet<OwnerLoss>,
    faults: BTreeSet<QueueFault>,
    packets: u64,
    migrations: u64,
}

impl Met {
    fn see(&mut self, model: &Model) {
        for gpu in &model.gpus {
            for part in &gpu.parts {
                self.results.insert(part.result);
                self.losses.insert(part.loss);
            }
            self.faults
                .extend(gpu.queues.iter().map(|queue| queue.fault.0));
        }
    }
}

/// Takes `steps` random steps, and compares after each.
fn run(seed: u64, steps: u64) -> Met {
    let mut met = Met::default();
    let mut random = Random(seed);
    let (mut machine, mut model) = (machine(), Model::new());
    let mut taken: Vec<Step> = Vec::new();
    for number in 0..steps {
        let step = step(&mut random, &model);
        met.migrations += u64::from(matches!(step, Step::Migrate { .. }));
        take(&mut machine, &step);
        let packets = |model: &Model| -> u64 {
            let queues = model.gpus.iter().flat_map(|gpu| &gpu.queues);
            queues.map(|queue| queue.packets).sum()
        };
        let before = packets(&model);
        model.take(&step);
        met.packets += packets(&model).saturating_sub(before);
        met.see(&model);
        taken.push(step);
        let end = Instant::now() + LIMIT;
        while let Err(what) = difference(&machine, &model) {
            if Instant::now() > end {
                let last: Vec<_> = taken.iter().rev().take(8).collect();
                panic!(
                    "seed {seed:#x}, step {number}: {what}; the last steps, newest first: {last:#?}"
                );
            }
            std::thread::yield_now();
        }
    }
    met
}

#[test]
fn the_device_does_what_the_model_does() {
    let met = run(0x6e75_6d61_6770_7531, STEPS);
    use OwnerResult as R;
    let results = [
        R::None,
        R::Ok,
        R::Busy,
        R::NotOwner,
        R::NotReady,
        R::BadToken,
        R::BadCommand,
    ];
    assert_eq!(met.results, results.into());
    let mut losses: BTreeSet<_> = OwnerLoss::ALL.iter().copied().collect();
    losses.remove(&OwnerLoss::PartitionChange);
    assert_eq!(met.losses, losses);
    use QueueFault as F;
    let faults = [
        F::None,
        F::BadOpcode,
        F::Unmapped,
        F::NotOwned,
        F::BusMasterOff,
        F::BadDoorbell,
        F::LinkDown,
    ];
    assert_eq!(met.faults, faults.into());
    assert!(met.packets > STEPS / 20, "{} packets", met.packets);
    let migrations = met.migrations;
    assert!(migrations > STEPS / 1000, "{migrations} migrations");
}
