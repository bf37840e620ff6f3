//! Target `ownership`: several drivers, tokens right and wrong, resets, disconnects and scrubs that wait or fail.
//!
//! A model that was written from the register's documentation, not from the table of edges, says after every step what
//! state, generation, result, coherence and contents each partition has. So nobody finds another owner's data, there
//! are never two owners, and every refusal says why.

use std::cell::RefCell;

use numagpu_devices::bus::{PciFunction, ResetKind};
use numagpu_spec::regs::{
    self, BootState, Coherence, IrqBits, OwnerResult, OwnerState, QueueState,
};
use numagpu_spec::sdma;

use crate::Tally;
use crate::input::{self, actions};
use crate::machine::{BOOT_NS, GPUS, Machine, PARTITIONS, Shape, Shown, wait};

actions! {
    /// What is done; numbers are taken modulo what there is.
    pub enum Action {
        /// A command with both tokens; `stale` leaves them out, so that those of the last command would count.
        Command { gpu: u8, partition: u8, command: u8, token: u8, new_token: u8, stale: bool },
        /// The owner writes, by a CPU.
        Scribble { gpu: u8, partition: u8, value: u8 },
        /// A queue fills a partition for a token.
        Fill { gpu: u8, target: u8, partition: u8, token: u8, value: u8 },
        /// Starts a boot.
        Boot { gpu: u8 },
        /// Lets time pass, in tenths of a boot.
        Tick { tenths: u8 },
        /// Sets bus master enable.
        BusMaster { gpu: u8, on: bool },
        /// Resets a function from outside.
        Reset { gpu: u8, disconnect: bool },
        /// Resets a function as a driver does.
        Flr { gpu: u8 },
        /// The VMM goes.
        Detach { gpu: u8 },
        /// A VMM comes, whether the last one has gone or not.
        Attach { gpu: u8 },
        /// The VMM maps a partition in another way, and says so.
        Map { gpu: u8, partition: u8, how: u8 },
        /// Scrubs of a GPU wait from now on.
        Hold { gpu: u8 },
        /// They go on, and fail if asked.
        LetGo { gpu: u8, fail: bool },
    }
}

const HBM: u64 = 8 << 10;
/// Tokens of drivers; 0 is nobody's.
const TOKENS: [u64; 5] = [0, 1, 2, 0x8000_0000_0000_0001, u64::MAX];
/// Resets that meet a scrub which waits: each one takes the milliseconds that a reset waits for scrubs.
const SLOW_RESETS: u32 = 2;

/// What is known of a partition.
#[derive(Clone, Copy)]
struct Known {
    state: OwnerState,
    /// 0 unless claimed.
    owner: u64,
    generation: u32,
    result: OwnerResult,
    how: Shown,
    /// How the VMM maps it, as it was when the GPU last looked.
    seen: Coherence,
    /// What every byte is; unknown while it is scrubbed and after that failed.
    contents: Option<u8>,
    /// An owner lost it by a reset and is to be told.
    lost: bool,
}

/// What is known of a GPU.
#[derive(Clone, Copy)]
struct Function {
    attached: bool,
    started: Option<u64>,
    bus_master: bool,
    hold: bool,
    told: bool,
    /// Interrupts' causes, so that a check does not come before the last one.
    causes: u64,
}

struct Play<'m> {
    machine: &'m Machine,
    partitions: [[Known; PARTITIONS]; GPUS],
    functions: [Function; GPUS],
    now: u64,
    slow: u32,
    tally: Tally,
}

thread_local! {
    static MACHINE: RefCell<Option<Machine>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(bytes: &[u8]) -> Tally {
    let actions: Vec<Action> = input::decode(bytes);
    MACHINE.with_borrow_mut(|slot| {
        let machine = slot.get_or_insert_with(|| {
            Machine::new(Shape {
                ram: 4096,
                hbm: HBM,
                aperture: false,
            })
        });
        machine.refresh();
        let mut play = Play::new(machine);
        play.check();
        for action in actions {
            play.act(action);
            play.check();
        }
        play.tally
    })
}

impl Play<'_> {
    fn new(machine: &Machine) -> Play<'_> {
        for gpu in &machine.gpus {
            // The first waits for what the input before has left on its way, the second clears what came.
            gpu.reset(ResetKind::Function);
            gpu.reset(ResetKind::Function);
        }
        let generation = |gpu, partition| {
            let reg = &regs::partition::GENERATION;
            machine.partition(gpu, partition, reg) as u32
        };
        let known = |gpu, partition| Known {
            state: OwnerState::Free,
            owner: 0,
            generation: generation(gpu, partition),
            result: OwnerResult::None,
            how: Shown::Whole,
            seen: Coherence::Coherent,
            contents: Some(0),
            lost: false,
        };
        Play {
            machine,
            partitions: [0, 1].map(|gpu| [0, 1].map(|partition| known(gpu, partition))),
            functions: [0, 1].map(|gpu: usize| Function {
                attached: true,
                started: None,
                bus_master: false,
                hold: false,
                told: false,
                causes: machine.gpus[gpu].causes(),
            }),
            now: 0,
            slow: 0,
            tally: Tally::default(),
        }
    }

    fn ready(&self, gpu: usize) -> bool {
        let started = self.functions[gpu].started;
        started.is_some_and(|at| self.now >= at + BOOT_NS)
    }

    fn act(&mut self, action: Action) {
        let machine = self.machine;
        let of = |gpu: u8| usize::from(gpu) % GPUS;
        let at = |gpu: u8, partition: u8| (of(gpu), usize::from(partition) % PARTITIONS);
        let token_of = |token: u8| TOKENS[usize::from(token) % TOKENS.len()];
        match action {
            Action::Command {
                gpu,
                partition,
                command,
                token,
                new_token,
                stale,
            } => {
                let (gpu, partition) = at(gpu, partition);
                let tokens = match stale {
                    true => (0, 0),
                    false => (token_of(token), token_of(new_token)),
                };
                self.command(gpu, partition, (command % 6).into(), tokens, stale);
            }
            Action::Scribble {
                gpu,
                partition,
                value,
            } => {
                let (gpu, partition) = at(gpu, partition);
                let known = &mut self.partitions[gpu][partition];
                if known.state == OwnerState::Claimed {
                    machine.stores[gpu][partition].fill(value);
                    known.contents = Some(value);
                }
            }
            Action::Fill {
                gpu,
                target,
                partition,
                token,
                value,
            } => {
                self.fill(of(gpu), at(target, partition), token_of(token), value);
            }
            Action::Boot { gpu } => {
                let gpu = of(gpu);
                let (block, control) = (&regs::boot::BLOCK, &regs::boot::CONTROL);
                machine.write(gpu, block, 0, control, 1);
                self.tally.boots += u32::from(self.functions[gpu].started.is_none());
                self.functions[gpu].started.get_or_insert(self.now);
            }
            Action::Tick { tenths } => {
                let ns = u64::from(tenths) * (BOOT_NS / 10);
                machine.clock.advance(ns);
                self.now += ns;
            }
            Action::BusMaster { gpu, on } => {
                machine.set_bus_master(of(gpu), on);
                if std::mem::replace(&mut self.functions[of(gpu)].bus_master, on) && !on {
                    self.lost_all(of(gpu));
                }
            }
            Action::Reset {
                gpu,
                disconnect: false,
            } => {
                self.before_reset(of(gpu));
                machine.gpus[of(gpu)].reset(ResetKind::Function);
                self.was_reset(of(gpu), false);
            }
            Action::Reset {
                gpu,
                disconnect: true,
            } => {
                self.before_reset(of(gpu));
                machine.gpus[of(gpu)].reset(ResetKind::Disconnect);
                self.was_reset(of(gpu), true);
            }
            Action::Flr { gpu } => {
                self.before_reset(of(gpu));
                machine.gpus[of(gpu)].config_write(0x59, &[0x80]);
                self.was_reset(of(gpu), false);
            }
            Action::Detach { gpu } => {
                self.before_reset(of(gpu));
                machine.gpus[of(gpu)].detach();
                self.functions[of(gpu)].attached = false;
                self.look(of(gpu));
                self.was_reset(of(gpu), true);
            }
            Action::Attach { gpu } => {
                let gpu = of(gpu);
                let was_attached = self.functions[gpu].attached;
                if was_attached {
                    self.before_reset(gpu);
                }
                machine.gpus[gpu].attach(machine.vmms[gpu].attachment());
                self.functions[gpu].attached = true;
                self.look(gpu);
                if was_attached {
                    self.was_reset(gpu, true);
                }
            }
            Action::Map {
                gpu,
                partition,
                how,
            } => {
                let (gpu, partition) = at(gpu, partition);
                let how = Shown::ALL[usize::from(how) % Shown::ALL.len()];
                machine.show(gpu, partition, how);
                machine.gpus[gpu].dma_changed();
                self.partitions[gpu][partition].how = how;
                self.look(gpu);
            }
            Action::Hold { gpu } => self.hold(of(gpu), true, false),
            Action::LetGo { gpu, fail } => self.hold(of(gpu), false, fail),
        }
        (0..GPUS).for_each(|gpu| self.scrubbed(gpu, false));
    }

    /// What a command has to say and do.
    fn command(
        &mut self,
        gpu: usize,
        partition: usize,
        command: u32,
        tokens: (u64, u64),
        stale: bool,
    ) {
        let machine = self.machine;
        let (token, new_token) = tokens;
        let ready = self.ready(gpu);
        let known = &mut self.partitions[gpu][partition];
        let is_owner = known.state == OwnerState::Claimed && token == known.owner;
        use OwnerResult as R;
        use OwnerState as S;
        let result = match (command, known.state) {
            (1, S::Free | S::Claimed) if token == 0 => R::BadToken,
            (1, S::Free) if !ready => R::NotReady,
            (1, S::Free) if known.seen != Coherence::Coherent => R::NotCoherent,
            (1, S::Claimed) => R::Busy,
            (1..=4, S::Releasing) => R::Releasing,
            (1..=4, S::Faulted) => R::Faulted,
            (2..=4, _) if !is_owner => R::NotOwner,
            (3, _) if new_token == 0 => R::BadToken,
            (1..=4, _) => R::Ok,
            _ => R::BadCommand,
        };
        known.result = result;
        match (command, result) {
            (1, R::Ok) => {
                known.state = S::Claimed;
                known.owner = token;
                known.generation = known.generation.wrapping_add(1);
                self.tally.claims += 1;
            }
            (2, R::Ok) => {
                known.state = S::Releasing;
                known.owner = 0;
                known.contents = None;
            }
            (3, R::Ok) => known.owner = new_token,
            (4, R::Ok) => {}
            _ => self.tally.refusals += 1,
        }
        let claimed = (command, result) == (1, R::Ok);
        use regs::partition::{BLOCK, COMMAND, NEW_TOKEN, TOKEN};
        let instance = partition as u32;
        if !stale {
            machine.write(gpu, &BLOCK, instance, &TOKEN, token);
            machine.write(gpu, &BLOCK, instance, &NEW_TOKEN, new_token);
        }
        machine.write(gpu, &BLOCK, instance, &COMMAND, command.into());
        if claimed {
            let store = &machine.stores[gpu][partition];
            assert!(store.is_all(0), "a new owner finds data");
        }
    }

    /// A queue reaches exactly what its token owns.
    fn fill(&mut self, gpu: usize, target: (usize, usize), token: u64, value: u8) {
        let machine = self.machine;
        let Function {
            attached,
            bus_master,
            ..
        } = self.functions[gpu];
        let hbm = machine.hbm(target.0, target.1);
        let packet = sdma::const_fill(hbm, u32::from_ne_bytes([value; 4]), HBM);
        machine.run_one(gpu, 0, token, &packet);
        let state = machine.settle(gpu, 0);
        machine.reset_queue(gpu, 0);
        let ready = self.ready(gpu);
        let known = &mut self.partitions[target.0][target.1];
        let owns = token != 0 && known.owner == token;
        let expected = if !ready {
            QueueState::Disabled
        } else if attached && bus_master && owns && known.seen == Coherence::Coherent {
            known.contents = Some(value);
            self.tally.packets += 1;
            QueueState::Idle
        } else {
            self.tally.faults += 1;
            self.functions[gpu].causes += 1;
            QueueState::Fault
        };
        assert_eq!(
            state, expected,
            "a fill for token {token:#x}, owner {:#x}",
            known.owner
        );
    }

    /// A GPU looks at what its VMM maps.
    fn look(&mut self, gpu: usize) {
        for known in &mut self.partitions[gpu] {
            known.seen = match known.how {
                _ if !self.functions[gpu].attached => Coherence::NotMapped,
                Shown::Whole => Coherence::Coherent,
                Shown::Nowhere => Coherence::NotMapped,
                Shown::ReadOnly => Coherence::ReadOnly,
                Shown::NoFd => Coherence::NoFd,
                Shown::Part => Coherence::Partial,
            };
        }
    }

    /// Keeps inputs fast: a reset waits for a scrub some milliseconds.
    fn before_reset(&mut self, gpu: usize) {
        if self.functions[gpu].hold {
            self.slow += 1;
            if self.slow > SLOW_RESETS {
                self.hold(gpu, false, false);
            }
        }
    }

    fn was_reset(&mut self, gpu: usize, disconnect: bool) {
        self.tally.resets += 1;
        let function = &mut self.functions[gpu];
        function.started = None;
        function.bus_master = false;
        function.told = false;
        for known in &mut self.partitions[gpu] {
            known.result = OwnerResult::None;
            known.lost = !disconnect && (known.lost || known.state == OwnerState::Claimed);
            known.owner = 0;
            // What was free is scrubbed for another VMM only: its CPUs may have written there.
            if known.state != OwnerState::Free || disconnect {
                known.state = OwnerState::Releasing;
                known.contents = None;
            }
        }
    }

    /// Whoever owns a partition loses it, and is to be told.
    fn lost_all(&mut self, gpu: usize) {
        for known in &mut self.partitions[gpu] {
            if known.state == OwnerState::Claimed {
                known.state = OwnerState::Releasing;
                known.owner = 0;
                known.contents = None;
                known.lost = true;
            }
        }
    }

    fn hold(&mut self, gpu: usize, hold: bool, fail: bool) {
        for store in &self.machine.stores[gpu] {
            store.hold(hold, fail);
        }
        self.functions[gpu].hold = hold;
        self.scrubbed(gpu, fail);
        if fail {
            for store in &self.machine.stores[gpu] {
                store.hold(hold, false);
            }
        }
    }

    /// Waits for the scrubs of a GPU, unless they are held, and takes what comes of them.
    fn scrubbed(&mut self, gpu: usize, fail: bool) {
        if self.functions[gpu].hold {
            return;
        }
        for (partition, known) in self.partitions[gpu].iter_mut().enumerate() {
            if known.state != OwnerState::Releasing {
                continue;
            }
            self.machine.wait_scrubbed(gpu, partition);
            if fail {
                known.state = OwnerState::Faulted;
                self.tally.failed_scrubs += 1;
                continue;
            }
            known.state = OwnerState::Free;
            known.generation = known.generation.wrapping_add(1);
            known.contents = Some(0);
            if std::mem::take(&mut known.lost) {
                self.functions[gpu].told = true;
                self.functions[gpu].causes += 1;
            }
            self.tally.scrubs += 1;
        }
    }

    fn check(&self) {
        for gpu in 0..GPUS {
            let boot = match self.functions[gpu].started {
                None => BootState::Reset,
                Some(_) if self.ready(gpu) => BootState::Ready,
                Some(_) => BootState::Booting,
            };
            let status = |block, reg| self.machine.read(gpu, block, 0, reg);
            let code = status(&regs::boot::BLOCK, &regs::boot::STATUS);
            assert_eq!(code, u64::from(boot.code()));
            let told = || {
                let bits = status(&regs::irq::BLOCK, &regs::irq::STATUS);
                bits & u64::from(IrqBits::OWNERSHIP.bits()) != 0
            };
            // They come right after the state is shown.
            wait(|| self.machine.gpus[gpu].causes() >= self.functions[gpu].causes);
            assert_eq!(
                told(),
                self.functions[gpu].told,
                "who lost a partition is told"
            );
            for partition in 0..PARTITIONS {
                self.check_partition(gpu, partition);
            }
        }
    }

    fn check_partition(&self, gpu: usize, partition: usize) {
        let known = &self.partitions[gpu][partition];
        let name = format!("partition {gpu}.{partition}");
        let get = |reg| self.machine.partition(gpu, partition, reg);
        use regs::partition::{COHERENCE, COMMAND, GENERATION, NEW_TOKEN, TOKEN};
        let state = self.machine.owner_state(gpu, partition);
        assert_eq!(state, known.state, "{name}");
        assert_eq!(self.machine.result(gpu, partition), known.result, "{name}");
        assert_eq!(get(&GENERATION), u64::from(known.generation), "{name}");
        assert_eq!(get(&COHERENCE), u64::from(known.seen.code()), "{name}");
        for hidden in [&TOKEN, &NEW_TOKEN, &COMMAND] {
            assert_eq!(get(hidden), 0, "{name}: {} shows", hidden.name);
        }
        if let Some(byte) = known.contents {
            let store = &self.machine.stores[gpu][partition];
            assert!(store.is_all(byte), "{name} has not what its owner wrote");
        }
    }
}
