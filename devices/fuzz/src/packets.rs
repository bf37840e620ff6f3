//! Target `packets`: rings of packets on the queues of two GPUs of a hive.
//!
//! The queues act for one token, which owns a partition of each GPU. Another token owns a second partition of GPU 1,
//! and one of GPU 0 is nobody's: no engine may ever look into those, wherever a packet points. Every queue has to end
//! idle, faulted, or waiting in a packet that waits, and has to come back by a reset.

use std::cell::RefCell;
use std::time::Duration;

use numagpu_devices::bus::PciFunction;
use numagpu_spec::regs::{self, OwnerResult, QueueFault, QueueState};
use numagpu_spec::sdma::{self, AtomicOp, PollFunction};

use crate::Tally;
use crate::input::{self, Near, actions};
use crate::machine::{GPUS, Machine, PARTITIONS, QUEUES, RAM, RING_SIZE, Shape, Shown, wait_for};

actions! {
    /// What is done; `queue` counts the queues of both GPUs, modulo their number.
    pub enum Action {
        /// A linear copy.
        Copy { queue: u8, from: Near, to: Near, bytes: u32 },
        /// A fill, of words or of bytes.
        Fill { queue: u8, to: Near, value: u32, bytes: u32, by_bytes: bool },
        /// A linear write of up to 64 words.
        Write { queue: u8, to: Near, words: u8, value: u32 },
        /// A fence.
        Fence { queue: u8, at: Near, value: u32 },
        /// A trap.
        Trap { queue: u8 },
        /// A poll.
        Poll { queue: u8, at: Near, function: u8, reference: u32, mask: u32, retries: u16, interval: u16 },
        /// An atomic operation.
        Atomic { queue: u8, at: Near, op: u8, flags: u8, operand: u64, comparand: u64 },
        /// A timestamp; 0 sets, 1 gets, 2 gets the device's.
        Timestamp { queue: u8, sub: u8, at: Near, ns: u64 },
        /// Nothing, and words to skip.
        Nop { queue: u8, skip: u16 },
        /// Words as they come.
        Raw { queue: u8, header: u32, a: u32, b: u32, c: u32, d: u32, e: u32, f: u32, words: u8 },
        /// Rings the doorbell for what was put in the ring.
        Ring { queue: u8 },
        /// Rings it with something else.
        Doorbell { queue: u8, wptr: u32 },
        /// Waits for the queue.
        Settle { queue: u8 },
        /// Resets and enables the queue, with a place for the read pointer.
        Restart { queue: u8, writeback: Near },
        /// The same with a ring anywhere.
        Elsewhere { queue: u8, ring: Near },
        /// Stops the queue without a reset.
        Disable { queue: u8 },
        /// Gives an own partition back, or claims it again.
        Own { gpu: u8, claim: bool },
        /// The VMM maps a partition in another way, and says so.
        Map { gpu: u8, partition: u8, how: u8 },
        /// The link between the GPUs changes.
        Link { up: bool },
        /// Bus master enable changes.
        BusMaster { gpu: u8, on: bool },
        /// Resets a GPU and boots it again.
        Reset { gpu: u8 },
    }
}

const HBM: u64 = 64 << 10;
/// More than two chunks of the engine.
const RAM_SIZE: usize = 640 << 10;
/// Whose the queues are.
const TOKEN: u64 = 0x1234_5678_9abc_def0;
/// Whose the foreign partition is, and what is in it.
const OTHER: u64 = 0x0fed_cba9_8765_4321;
const SECRET: u8 = 0xa5;
/// The foreign partition and the free one.
const FOREIGN: (usize, usize) = (1, 1);
const FREE: (usize, usize) = (0, 1);
/// How long a packet that waits is waited for.
const PATIENCE: Duration = Duration::from_micros(200);

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(bytes: &[u8]) -> Tally {
    let actions: Vec<Action> = input::decode(bytes);
    MACHINE.with_borrow_mut(|slot| {
        let machine = slot.get_or_insert_with(|| {
            Machine::new(Shape {
                ram: RAM_SIZE,
                hbm: HBM,
                aperture: false,
            })
        });
        machine.refresh();
        let mut play = Play::new(machine);
        for action in actions {
            play.act(action);
        }
        play.end();
        play.tally
    })
}

/// What the driver knows of a queue.
#[derive(Clone, Copy, Default)]
struct Driver {
    /// Bytes put in the ring since it was enabled.
    wptr: u64,
    /// Whether the queue may wait in a packet, as long as it likes.
    waits: bool,
}

struct Play<'m> {
    machine: &'m Machine,
    drivers: [Driver; GPUS * QUEUES as usize],
    /// Whether a packet may have written where rings are.
    wild: bool,
    spots: Vec<u64>,
    /// Accesses to the partitions that no queue may enter.
    touched: [u64; 2],
    tally: Tally,
}

fn place(queue: u8) -> (usize, u32) {
    let index = usize::from(queue) % (GPUS * QUEUES as usize);
    (index / QUEUES as usize, index as u32 % QUEUES)
}

impl Play<'_> {
    fn new(machine: &Machine) -> Play<'_> {
        let mut spots = vec![0, RAM, machine.ram_end(), RAM + (256 << 10), RAM + 0x1000];
        for gpu in 0..GPUS {
            for partition in 0..=PARTITIONS {
                spots.push(machine.hbm(gpu, partition));
            }
            spots.push(machine.hbm(gpu, 0) + HBM / 2);
        }
        spots.extend([1 << 22, 1 << 40, u64::MAX - 0x40]);
        let mut play = Play {
            machine,
            drivers: Default::default(),
            wild: false,
            spots,
            touched: [0; 2],
            tally: Tally::default(),
        };
        machine.boot(0);
        machine.boot(1);
        play.tally.boots = 2;
        assert_eq!(machine.claim(FOREIGN.0, FOREIGN.1, OTHER), OwnerResult::Ok);
        machine.stores[FOREIGN.0][FOREIGN.1].fill(SECRET);
        for gpu in 0..GPUS {
            assert_eq!(machine.claim(gpu, 0, TOKEN), OwnerResult::Ok);
            play.tally.claims += 1;
        }
        for index in 0..play.drivers.len() {
            play.restart(index as u8, 0);
        }
        play.touched = [FOREIGN, FREE].map(|at| play.store(at).touched());
        play
    }

    fn store(&self, (gpu, partition): (usize, usize)) -> &crate::machine::Store {
        &self.machine.stores[gpu][partition]
    }

    fn driver(&mut self, queue: u8) -> &mut Driver {
        let (gpu, index) = place(queue);
        &mut self.drivers[gpu * QUEUES as usize + index as usize]
    }

    fn at(&self, near: Near) -> u64 {
        near.among(&self.spots)
    }

    fn restart(&mut self, queue: u8, writeback: u64) {
        let (gpu, index) = place(queue);
        self.count(queue);
        self.machine.reset_queue(gpu, index);
        let ring = Machine::ring(gpu, index);
        self.machine.enable(gpu, index, TOKEN, ring, writeback);
        *self.driver(queue) = Driver::default();
    }

    /// Notes what a queue did before it is reset.
    fn count(&mut self, queue: u8) {
        let (gpu, index) = place(queue);
        self.tally.packets += self.machine.queue(gpu, index, &regs::queue::PACKETS);
        let state = self.machine.queue_state(gpu, index);
        self.tally.faults += u32::from(state == QueueState::Fault);
        self.tally.waiting += u32::from(state == QueueState::Running);
    }

    fn put(&mut self, queue: u8, words: &[u32]) {
        let (gpu, index) = place(queue);
        let wptr = self.driver(queue).wptr;
        let rptr = self.machine.queue(gpu, index, &regs::queue::RPTR);
        let room = u64::from(RING_SIZE).saturating_sub(wptr.saturating_sub(rptr));
        let bytes = 4 * words.len() as u64;
        if bytes > room {
            return;
        }
        self.machine.put(gpu, index, wptr, words);
        self.driver(queue).wptr += bytes;
    }

    fn ring(&mut self, queue: u8) {
        let (gpu, index) = place(queue);
        let wptr = self.driver(queue).wptr;
        self.machine.ring_doorbell(gpu, index, wptr);
    }

    fn act(&mut self, action: Action) {
        let machine = self.machine;
        match action {
            Action::Copy {
                queue,
                from,
                to,
                bytes,
            } => {
                let packet = sdma::copy_linear(self.at(from), self.at(to), bytes.into());
                self.put(queue, &packet);
            }
            Action::Fill {
                queue,
                to,
                value,
                bytes,
                by_bytes,
            } => {
                let mut packet = sdma::const_fill(self.at(to), value, bytes.into());
                if by_bytes {
                    packet[0] &= !(3 << sdma::FILL_SIZE_SHIFT);
                }
                self.put(queue, &packet);
            }
            Action::Write {
                queue,
                to,
                words,
                value,
            } => {
                let [low, high] = halves(self.at(to));
                let count = u32::from(words % 64);
                let mut packet = vec![u32::from(sdma::OP_WRITE), low, high, count];
                packet.extend((0..=count).map(|n| value.wrapping_add(n)));
                self.put(queue, &packet);
            }
            Action::Fence { queue, at, value } => {
                let packet = sdma::fence(self.at(at), value);
                self.put(queue, &packet);
            }
            Action::Trap { queue } => self.put(queue, &sdma::trap(queue.into())),
            Action::Poll {
                queue,
                at,
                function,
                reference,
                mask,
                retries,
                interval,
            } => {
                let functions = PollFunction::ALL;
                let function = functions[usize::from(function) % functions.len()];
                let at = self.at(at);
                let packet =
                    sdma::poll_memory(at, function, reference, mask, retries.into(), interval);
                self.driver(queue).waits |= retries > 4 || interval > 4;
                self.put(queue, &packet);
            }
            Action::Atomic {
                queue,
                at,
                op,
                flags,
                operand,
                comparand,
            } => {
                let ops = AtomicOp::ALL;
                let op = ops[usize::from(op) % ops.len()];
                let mut packet = sdma::atomic(self.at(at), op, flags & 1 != 0, operand, comparand);
                if flags & 2 != 0 {
                    packet[0] |= sdma::ATOMIC_LOOP;
                    self.driver(queue).waits = true;
                }
                packet[7] = u32::from(flags >> 4);
                self.put(queue, &packet);
            }
            Action::Timestamp { queue, sub, at, ns } => {
                let packet = match sub % 3 {
                    0 => sdma::timestamp_set(ns),
                    1 => sdma::timestamp_get(self.at(at)),
                    _ => sdma::timestamp_get_global(self.at(at)),
                };
                self.put(queue, &packet);
            }
            Action::Nop { queue, skip } => {
                let skip = skip % 64;
                let mut packet = vec![u32::from(skip) << 16];
                packet.resize(1 + usize::from(skip), u32::MAX);
                self.put(queue, &packet);
            }
            Action::Raw {
                queue,
                header,
                a,
                b,
                c,
                d,
                e,
                f,
                words,
            } => {
                let packet = [header, a, b, c, d, e, f, header];
                self.wild = true;
                self.put(queue, &packet[..1 + usize::from(words % 8)]);
            }
            Action::Ring { queue } => self.ring(queue),
            Action::Doorbell { queue, wptr } => {
                let (gpu, index) = place(queue);
                // It may give half a packet, and then the next one is read from its middle.
                self.wild = true;
                machine.ring_doorbell(gpu, index, wptr.into());
            }
            Action::Settle { queue } => {
                self.settle(queue);
            }
            Action::Restart { queue, writeback } => {
                let writeback = self.at(writeback);
                self.restart(queue, writeback);
            }
            Action::Elsewhere { queue, ring } => {
                let (gpu, index) = place(queue);
                self.count(queue);
                machine.reset_queue(gpu, index);
                self.wild = true;
                machine.enable(gpu, index, TOKEN, self.at(ring), 0);
                *self.driver(queue) = Driver::default();
            }
            Action::Disable { queue } => {
                let (gpu, index) = place(queue);
                machine.set_queue(gpu, index, &regs::queue::CONTROL, 0);
                assert_ne!(machine.queue_state(gpu, index), QueueState::Running);
            }
            Action::Own { gpu, claim } => {
                let gpu = usize::from(gpu) % GPUS;
                let result = machine.command(gpu, 0, if claim { 1 } else { 2 }, TOKEN);
                if result == OwnerResult::Ok && claim {
                    self.tally.claims += 1;
                } else if result == OwnerResult::Ok {
                    self.tally.scrubs += 1;
                    machine.wait_scrubbed(gpu, 0);
                    let store = self.store((gpu, 0));
                    assert!(store.is_all(0), "an engine wrote behind the scrubber");
                }
            }
            Action::Map {
                gpu,
                partition,
                how,
            } => {
                let gpu = usize::from(gpu) % GPUS;
                let how = Shown::ALL[usize::from(how) % Shown::ALL.len()];
                machine.show(gpu, usize::from(partition) % PARTITIONS, how);
                machine.gpus[gpu].dma_changed();
            }
            Action::Link { up } => machine.set_link(up),
            Action::BusMaster { gpu, on } => {
                let gpu = usize::from(gpu) % GPUS;
                // As with a reset: clearing it takes partitions from their owners.
                if gpu != FOREIGN.0 {
                    machine.set_bus_master(gpu, on);
                    machine.wait_scrubbed(gpu, 0);
                    if on {
                        // Refused where it still has it, or is not mapped.
                        let _result = machine.claim(gpu, 0, TOKEN);
                    }
                }
            }
            Action::Reset { gpu } => {
                // Only of GPU 0: on the other one it would take the foreign owner's partition.
                let gpu = usize::from(gpu) % GPUS;
                if gpu != FOREIGN.0 {
                    self.reset(gpu);
                }
            }
        }
    }

    fn reset(&mut self, gpu: usize) {
        let first = (gpu * QUEUES as usize) as u8;
        (0..QUEUES as u8).for_each(|queue| self.count(first + queue));
        self.machine.gpus[gpu].reset(numagpu_devices::bus::ResetKind::Function);
        self.machine.wait_scrubbed(gpu, 0);
        assert!(self.store((gpu, 0)).is_all(0), "an engine outlived a reset");
        self.machine.boot(gpu);
        self.tally.resets += 1;
        for queue in first..first + QUEUES as u8 {
            assert_eq!(
                self.machine.queue_state(gpu, queue.into()),
                QueueState::Disabled
            );
            self.restart(queue, 0);
        }
    }

    /// Waits until a queue stands still, or for a while if it may wait itself.
    fn settle(&mut self, queue: u8) -> QueueState {
        let (gpu, index) = place(queue);
        let state = if self.wild || self.driver(queue).waits {
            let machine = self.machine;
            wait_for(PATIENCE, || {
                machine.queue_state(gpu, index) != QueueState::Running
            });
            machine.queue_state(gpu, index)
        } else {
            self.machine.settle(gpu, index)
        };
        let get = |reg| self.machine.queue(gpu, index, reg);
        let fault = self.machine.queue_fault(gpu, index);
        match state {
            QueueState::Idle => assert_eq!(get(&regs::queue::RPTR), get(&regs::queue::WPTR)),
            QueueState::Fault => {
                assert_ne!(fault, QueueFault::None);
                assert!(get(&regs::queue::FAULT_PACKET) <= get(&regs::queue::PACKETS));
            }
            QueueState::Running | QueueState::Disabled => {}
        }
        state
    }

    fn end(&mut self) {
        for queue in 0..self.drivers.len() as u8 {
            self.ring(queue);
        }
        for queue in 0..self.drivers.len() as u8 {
            self.settle(queue);
            self.count(queue);
            let (gpu, index) = place(queue);
            self.machine.reset_queue(gpu, index);
        }
        for (at, before) in [FOREIGN, FREE].into_iter().zip(self.touched) {
            let touched = self.store(at).touched();
            assert_eq!(touched, before, "an engine was in partition {at:?}");
        }
        assert!(self.store(FOREIGN).is_all(SECRET), "foreign HBM changed");
        assert!(self.store(FREE).is_all(0), "free HBM changed");
        // Each queue works again.
        for queue in 0..self.drivers.len() as u8 {
            let (gpu, index) = place(queue);
            self.machine.set_bus_master(gpu, true);
            self.machine.run_one(gpu, index, TOKEN, &[0]);
            assert_eq!(self.machine.settle(gpu, index), QueueState::Idle);
        }
    }
}

fn halves(address: u64) -> [u32; 2] {
    [address as u32, (address >> 32) as u32]
}
