//! Target `bar`: BARs in any way a CPU, a driver or a VMM can use them.
//!
//! GPU 0 has its HBM in the machine's memory, GPU 1 behind an aperture. Whatever is done, tokens do not show, constant
//! registers stay, what does not exist reads as documented, and after a reset everything works.

use std::cell::RefCell;

use numagpu_devices::bus::{PciFunction, ResetKind};
use numagpu_spec::regs::{self, QueueState, identity};
use numagpu_spec::{pci, sdma};

use crate::Tally;
use crate::input::{self, Near, actions, bytes_of};
use crate::machine::{BOOT_NS, GPUS, Machine, PARTITIONS, QUEUES, RAM, Shape, Shown, width};

actions! {
    /// What is done; numbers are taken modulo what there is.
    pub enum Action {
        /// Reads up to 64 bytes of a BAR.
        Read { gpu: u8, bar: u8, at: Near, len: u8 },
        /// Writes up to 64 bytes of a BAR.
        Write { gpu: u8, bar: u8, at: Near, value: u64, len: u8 },
        /// Reads from any offset.
        ReadFar { gpu: u8, bar: u8, offset: u64, len: u8 },
        /// Writes at any offset.
        WriteFar { gpu: u8, bar: u8, offset: u64, value: u64, len: u8 },
        /// Writes a register of the table.
        Register { gpu: u8, block: u8, instance: u8, register: u8, value: u64 },
        /// Rings a doorbell.
        Doorbell { gpu: u8, queue: u8, value: u32 },
        /// Gives a queue a token and a ring, and enables it.
        Enable { gpu: u8, queue: u8, token: u8 },
        /// Puts a fill of HBM, a fence and a trap in a ring, and rings.
        Submit { gpu: u8, queue: u8, partition: u8, value: u8 },
        /// Claims, releases or transfers a partition.
        Command { gpu: u8, partition: u8, command: u8, token: u8, new_token: u8 },
        /// Lets microseconds pass.
        Tick { us: u16 },
        /// Starts a boot and waits for it.
        Boot { gpu: u8 },
        /// Sets bus master enable.
        BusMaster { gpu: u8, on: bool },
        /// Resets a function.
        Reset { gpu: u8, disconnect: bool },
        /// The VMM goes.
        Detach { gpu: u8 },
        /// A VMM comes.
        Attach { gpu: u8 },
        /// The VMM maps a partition in another way, and says so.
        Map { gpu: u8, partition: u8, how: u8 },
        /// The link between the GPUs changes.
        Link { up: bool },
    }
}

/// Blocks, first instances, and the ends of BARs.
const SPOTS: [u64; 20] = [
    0x0000, 0x0100, 0x0200, 0x0300, 0x0400, 0x0800, 0x0820, 0x0be0, 0x2000, 0x2100, 0x2700, 0x8000,
    0x8100, 0x8700, 0x1000, 0x4000, 0x6000, 0x1_0000, 0x8_0000, 0,
];
const HBM: u64 = 8 << 10;

/// Bytes of BAR 0 that belong to registers which show nothing.
fn hidden() -> Vec<bool> {
    let mut hidden = vec![false; pci::BAR_REGISTERS_SIZE as usize];
    for block in regs::BLOCKS {
        for (instance, reg) in (0..block.count).flat_map(|i| block.regs.iter().map(move |r| (i, r)))
        {
            let start = (block.base + instance * block.stride + reg.offset) as usize;
            hidden[start..start + width(reg)].fill(reg.hidden);
        }
    }
    hidden
}

struct Stage {
    machine: Machine,
    hidden: Vec<bool>,
}

thread_local! {
    static STAGE: RefCell<Option<Stage>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(bytes: &[u8]) -> Tally {
    let actions: Vec<Action> = input::decode(bytes);
    STAGE.with_borrow_mut(|slot| {
        let stage = slot.get_or_insert_with(|| Stage {
            machine: Machine::new(Shape {
                ram: 64 << 10,
                hbm: HBM,
                aperture: true,
            }),
            hidden: hidden(),
        });
        stage.machine.refresh();
        let mut play = Play {
            constant: constant(&stage.machine),
            stage,
            worked: false,
            tally: Tally::default(),
        };
        for action in actions {
            play.act(action);
            play.check();
        }
        play.end();
        play.tally
    })
}

/// The registers of each GPU that say what it is.
fn constant(machine: &Machine) -> Vec<Vec<u8>> {
    let read = |gpu: usize| {
        let mut data = vec![0; identity::SCRATCH.offset as usize];
        machine.gpus[gpu].bar_read(0, identity::BASE.into(), &mut data);
        data
    };
    (0..GPUS).map(read).collect()
}

struct Play<'s> {
    stage: &'s Stage,
    constant: Vec<Vec<u8>>,
    /// Whether a queue may have changed HBM behind the aperture's back.
    worked: bool,
    tally: Tally,
}

impl Play<'_> {
    fn act(&mut self, action: Action) {
        let machine = &self.stage.machine;
        let gpu_of = |gpu: u8| usize::from(gpu) % GPUS;
        let queue_of = |queue: u8| u32::from(queue) % QUEUES;
        match action {
            Action::Read { gpu, bar, at, len } => {
                self.read(gpu_of(gpu), bar, at.among(&SPOTS), len)
            }
            Action::ReadFar {
                gpu,
                bar,
                offset,
                len,
            } => self.read(gpu_of(gpu), bar, offset, len),
            Action::Write {
                gpu,
                bar,
                at,
                value,
                len,
            } => {
                self.write(gpu_of(gpu), bar, at.among(&SPOTS), &bytes_of(value, len));
            }
            Action::WriteFar {
                gpu,
                bar,
                offset,
                value,
                len,
            } => {
                self.write(gpu_of(gpu), bar, offset, &bytes_of(value, len));
            }
            Action::Register {
                gpu,
                block,
                instance,
                register,
                value,
            } => {
                let block = &regs::BLOCKS[usize::from(block) % regs::BLOCKS.len()];
                let reg = &block.regs[usize::from(register) % block.regs.len()];
                self.worked = true;
                machine.write(
                    gpu_of(gpu),
                    block,
                    u32::from(instance) % block.count,
                    reg,
                    value,
                );
            }
            Action::Doorbell { gpu, queue, value } => {
                self.worked = true;
                machine.ring_doorbell(gpu_of(gpu), queue_of(queue), value.into());
            }
            Action::Enable { gpu, queue, token } => {
                let (gpu, queue) = (gpu_of(gpu), queue_of(queue));
                machine.enable(gpu, queue, token.into(), Machine::ring(gpu, queue), RAM);
            }
            Action::Submit {
                gpu,
                queue,
                partition,
                value,
            } => {
                self.submit(gpu_of(gpu), queue_of(queue), partition, value);
            }
            Action::Command {
                gpu,
                partition,
                command,
                token,
                new_token,
            } => {
                let (gpu, partition) = (gpu_of(gpu), usize::from(partition) % PARTITIONS);
                let new = &regs::partition::NEW_TOKEN;
                machine.write(
                    gpu,
                    &regs::partition::BLOCK,
                    partition as u32,
                    new,
                    new_token.into(),
                );
                let result = machine.command(gpu, partition, command.into(), token.into());
                let done = result == regs::OwnerResult::Ok;
                self.tally.claims += u32::from(done && command == 1);
                self.tally.scrubs += u32::from(done && command == 2);
                self.tally.refusals += u32::from(!done);
                // An aperture is scrubbed behind a write to it.
                self.worked = true;
            }
            Action::Tick { us } => machine.clock.advance(u64::from(us) * 1000),
            Action::Boot { gpu } => {
                machine.boot(gpu_of(gpu));
                self.tally.boots += 1;
            }
            Action::BusMaster { gpu, on } => machine.set_bus_master(gpu_of(gpu), on),
            Action::Reset { gpu, disconnect } => {
                let kind = if disconnect {
                    ResetKind::Disconnect
                } else {
                    ResetKind::Function
                };
                machine.gpus[gpu_of(gpu)].reset(kind);
                self.worked = true;
                self.tally.resets += 1;
            }
            Action::Detach { gpu } => {
                machine.gpus[gpu_of(gpu)].detach();
                self.worked = true;
                self.tally.resets += 1;
            }
            Action::Attach { gpu } => {
                let gpu = gpu_of(gpu);
                machine.gpus[gpu].attach(machine.vmms[gpu].attachment());
                self.worked = true;
            }
            Action::Map {
                gpu,
                partition,
                how,
            } => {
                let gpu = gpu_of(gpu);
                let how = Shown::ALL[usize::from(how) % Shown::ALL.len()];
                machine.show(gpu, usize::from(partition) % PARTITIONS, how);
                machine.gpus[gpu].dma_changed();
            }
            Action::Link { up } => machine.set_link(up),
        }
    }

    fn read(&self, gpu: usize, bar: u8, offset: u64, len: u8) {
        let function = &self.stage.machine.gpus[gpu];
        let bar = bar % 8;
        let mut data = vec![0xee; usize::from(len % 65)];
        function.bar_read(bar, offset, &mut data);
        let layout = function.layout();
        let size = layout
            .bars
            .iter()
            .find(|it| it.index == bar)
            .map(|it| it.size);
        for (index, byte) in data.iter().enumerate() {
            let position = offset.checked_add(index as u64);
            let inside = position.filter(|at| size.is_some_and(|size| *at < size));
            match (bar, inside) {
                (pci::BAR_APERTURE, _) if gpu == 1 => {
                    let behind = position.is_none_or(|at| at >= PARTITIONS as u64 * HBM);
                    assert!(!behind || *byte == 0xff, "behind the HBM of an aperture");
                }
                (pci::BAR_REGISTERS, Some(at)) if self.stage.hidden[at as usize] => {
                    assert_eq!(*byte, 0, "a hidden register shows at {at:#x}");
                }
                (pci::BAR_DOORBELLS, _) => assert_eq!(*byte, 0, "a doorbell shows"),
                (_, None) => assert_eq!(*byte, 0, "BAR {bar} has nothing at {offset:#x}"),
                _ => {}
            }
        }
        if bar == pci::BAR_MSIX {
            for (index, byte) in data.iter().enumerate() {
                let mut single = [0xee];
                function.bar_read(bar, offset.wrapping_add(index as u64), &mut single);
                // Behind the end of the address space there is nothing to ask for.
                let expected = offset.checked_add(index as u64).map_or(0, |_| single[0]);
                assert_eq!(*byte, expected, "a read is the reads of its bytes");
            }
        }
    }

    fn write(&mut self, gpu: usize, bar: u8, offset: u64, data: &[u8]) {
        let function = &self.stage.machine.gpus[gpu];
        let bar = bar % 8;
        function.bar_write(bar, offset, data);
        if bar == pci::BAR_APERTURE && gpu == 1 {
            let end = offset.saturating_add(data.len() as u64);
            if !self.worked && end <= PARTITIONS as u64 * HBM {
                let mut seen = vec![0xee; data.len()];
                function.bar_read(bar, offset, &mut seen);
                assert_eq!(seen, data, "what was written to the aperture");
            }
        } else {
            self.worked = true;
        }
    }

    fn submit(&mut self, gpu: usize, queue: u32, partition: u8, value: u8) {
        let machine = &self.stage.machine;
        let wptr = machine.queue(gpu, queue, &regs::queue::WPTR);
        let hbm = machine.hbm(gpu, usize::from(partition) % PARTITIONS);
        let value = u32::from_ne_bytes([value; 4]);
        let mut words = sdma::const_fill(hbm, value, HBM).to_vec();
        words.extend(sdma::fence(RAM + 0x100, value));
        words.extend(sdma::trap(1));
        machine.put(gpu, queue, wptr, &words);
        self.worked = true;
        machine.ring_doorbell(gpu, queue, wptr.wrapping_add(4 * words.len() as u64));
    }

    fn check(&self) {
        for (gpu, constant) in self.constant.iter().enumerate() {
            let mut seen = vec![0xee; constant.len()];
            let function = &self.stage.machine.gpus[gpu];
            function.bar_read(0, identity::BASE.into(), &mut seen);
            assert_eq!(&seen, constant, "what the device is has changed");
            let status = function.status();
            assert_eq!(status.partitions.len(), PARTITIONS);
            for queue in status.queues {
                assert!(queue.rptr <= queue.wptr || queue.state == QueueState::Running);
            }
        }
    }

    fn end(&mut self) {
        let machine = &self.stage.machine;
        machine.clock.advance(BOOT_NS);
        for gpu in 0..GPUS {
            for queue in 0..QUEUES {
                // A ring of anything may hold a poll: what counts is that a reset ends it, below.
                let status = machine.gpus[gpu].status().queues[queue as usize];
                self.tally.faults += u32::from(status.state == QueueState::Fault);
                self.tally.packets += status.packets;
            }
            machine.check_alive(gpu);
        }
    }
}
