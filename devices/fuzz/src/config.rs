//! Target `config`: configuration space against a model of its own.
//!
//! The model knows the values after power-on and which bits a write replaces; both are read from the device once, and
//! held against the BARs that the function announces and the identity it was given. After every action the whole space
//! has to be as the model says, and a queue has to do DMA exactly while the model allows it.

use std::cell::RefCell;

use numagpu_devices::bus::{PciFunction, ResetKind};
use numagpu_devices::config_space::{CAP_AER, CAP_PCIE, CAP_PM, CONFIG_SIZE};
use numagpu_spec::pci;
use numagpu_spec::regs::{QueueFault, QueueState};

use crate::Tally;
use crate::input::{self, Near, actions, bytes_of};
use crate::machine::{Machine, Shape};

actions! {
    /// What is done to GPU 0.
    pub enum Action {
        /// Reads up to 64 bytes.
        Read { at: Near, len: u8 },
        /// Writes up to 64 bytes.
        Write { at: Near, value: u64, len: u8 },
        /// Writes all ones to a BAR and reads its size.
        SizeBar { bar: u8 },
        /// Starts a function-level reset.
        Flr {},
        /// Sets the power state, an existing one or not.
        Power { state: u8 },
        /// Sets or clears bus master enable.
        BusMaster { on: bool },
        /// Boots, if that was not done.
        Boot {},
        /// Gives a queue one packet.
        Work {},
        /// Resets from outside.
        Reset { disconnect: bool },
        /// Reads what is far beyond the space.
        ReadBeyond { offset: u32, len: u8 },
        /// Writes there.
        WriteBeyond { offset: u32, value: u64, len: u8 },
    }
}

/// Where fields with an effect begin, and the borders of the space.
const SPOTS: [u64; 16] = [
    0x00, 0x04, 0x06, 0x0c, 0x10, 0x18, 0x20, 0x28, 0x30, 0x34, 0x3c, 0x40, 0x50, 0x58, 0x90, 0xff8,
];
const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const FLR: usize = CAP_PCIE as usize + 9;
/// The registers of the AER capability (PCIe Base 6.0 section 7.8.4).
const ERRORS: std::ops::Range<usize> = CAP_AER as usize..CAP_AER as usize + 0x2c;
const POWER: usize = CAP_PM as usize + 4;

/// What the space holds, and how it changes.
struct Model {
    reset: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    now: [u8; CONFIG_SIZE],
}

impl Model {
    /// Learns the values after power-on and what is writable.
    fn learn(machine: &Machine) -> Model {
        let gpu = &machine.gpus[0];
        let reset = whole(machine);
        let mut writable = [0; CONFIG_SIZE];
        for (offset, mask) in writable.iter_mut().enumerate() {
            let mut seen = [0; 2];
            for (value, seen) in [0x7f, 0x00].iter().zip(&mut seen) {
                // Bit 7 apart, which starts a reset in one byte and is power state in none.
                gpu.config_write(offset as u32, &[*value]);
                gpu.config_read(offset as u32, std::slice::from_mut(seen));
            }
            *mask = seen[0] ^ seen[1];
            if offset != FLR {
                gpu.config_write(offset as u32, &[0x80]);
                gpu.config_read(offset as u32, std::slice::from_mut(&mut seen[0]));
                *mask |= (seen[0] ^ seen[1]) & 0x80;
            }
        }
        gpu.reset(ResetKind::Disconnect);
        let model = Model {
            reset,
            writable,
            now: reset,
        };
        model.check_fixed(machine);
        model
    }

    /// Holds what was learnt against what is known otherwise.
    fn check_fixed(&self, machine: &Machine) {
        let word = |offset: usize| u16::from_le_bytes([self.reset[offset], self.reset[offset + 1]]);
        assert_eq!([word(0), word(2)], [pci::VENDOR_ID, pci::DEVICE_ID]);
        for fixed in [0x00..0x04, 0x06..0x0c, 0x0d..0x10, 0x28..0x3c, 0x3d..0x42] {
            assert_eq!(self.writable[fixed.clone()], vec![0; fixed.len()]);
        }
        let mut mask = [0; 24];
        for bar in &machine.gpus[0].layout().bars {
            let len = if bar.is_64bit { 8 } else { 4 };
            let at = 4 * usize::from(bar.index);
            mask[at..at + len].copy_from_slice(&(!(bar.size - 1)).to_le_bytes()[..len]);
        }
        assert_eq!(self.writable[BAR0..BAR0 + 24], mask, "BARs tell their size");
    }

    fn write(&mut self, offset: usize, data: &[u8]) -> bool {
        let power = self.now[POWER] & 3;
        let mut flr = false;
        for (at, new) in (offset..CONFIG_SIZE).zip(data) {
            let mask = self.writable[at];
            self.now[at] = self.now[at] & !mask | new & mask;
            flr |= at == FLR && new & 0x80 != 0;
        }
        if !matches!(self.now[POWER] & 3, 0 | 3) {
            self.now[POWER] = self.now[POWER] & !3 | power;
        }
        if flr {
            self.reset(false);
        }
        flr
    }

    /// Error reporting survives all but power-on.
    fn reset(&mut self, power_on: bool) {
        let mut after = self.reset;
        if !power_on {
            after[ERRORS].copy_from_slice(&self.now[ERRORS]);
        }
        self.now = after;
    }

    fn dma_allowed(&self) -> bool {
        self.now[COMMAND] & 4 != 0 && self.now[POWER] & 3 == 0
    }
}

/// The whole space.
fn whole(machine: &Machine) -> [u8; CONFIG_SIZE] {
    let mut data = [0xee; CONFIG_SIZE];
    machine.gpus[0].config_read(0, &mut data);
    data
}

thread_local! {
    static MACHINE: RefCell<Option<(Machine, Model)>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(bytes: &[u8]) -> Tally {
    let actions: Vec<Action> = input::decode(bytes);
    MACHINE.with_borrow_mut(|slot| {
        let (machine, model) = slot.get_or_insert_with(|| {
            let mut machine = Machine::new(Shape {
                ram: 64 << 10,
                hbm: 4096,
                aperture: true,
            });
            machine.refresh();
            let model = Model::learn(&machine);
            (machine, model)
        });
        machine.refresh();
        model.now = model.reset;
        let mut play = Play {
            machine,
            model,
            booted: false,
            tally: Tally::default(),
        };
        play.check();
        for action in actions {
            play.act(action);
            play.check();
        }
        play.machine.check_alive(0);
        play.tally
    })
}

struct Play<'m> {
    machine: &'m Machine,
    model: &'m mut Model,
    booted: bool,
    tally: Tally,
}

impl Play<'_> {
    fn act(&mut self, action: Action) {
        let gpu = &self.machine.gpus[0];
        match action {
            Action::Read { at, len } => self.read(place(at), len),
            Action::ReadBeyond { offset, len } => self.read(offset, len),
            Action::Write { at, value, len } => self.write(place(at), &bytes_of(value, len)),
            Action::WriteBeyond { offset, value, len } => {
                self.write(offset, &bytes_of(value, len));
            }
            Action::SizeBar { bar } => {
                self.write((BAR0 + 4 * usize::from(bar % 6)) as u32, &[0xff; 4]);
            }
            Action::Flr {} => self.write(FLR as u32, &[0x80]),
            Action::Power { state } => self.write(POWER as u32, &[state]),
            Action::BusMaster { on } => self.write(COMMAND as u32, &[if on { 6 } else { 0 }]),
            Action::Boot {} => {
                self.machine.boot(0);
                self.model.write(COMMAND, &[6, 0]);
                self.tally.boots += u32::from(!self.booted);
                self.booted = true;
            }
            Action::Work {} => self.work(),
            Action::Reset { disconnect } => {
                gpu.reset(if disconnect {
                    ResetKind::Disconnect
                } else {
                    ResetKind::Function
                });
                self.model.reset(disconnect);
                self.was_reset();
            }
        }
    }

    fn was_reset(&mut self) {
        self.booted = false;
        self.tally.resets += 1;
    }

    fn read(&self, offset: u32, len: u8) {
        let mut data = vec![0xee; usize::from(len % 65)];
        self.machine.gpus[0].config_read(offset, &mut data);
        let values = self.model.now.iter().skip(offset as usize);
        let padded = values.copied().chain(std::iter::repeat(0));
        let expected: Vec<u8> = padded.take(data.len()).collect();
        assert_eq!(data, expected, "read at {offset:#x}");
    }

    fn write(&mut self, offset: u32, data: &[u8]) {
        self.machine.gpus[0].config_write(offset, data);
        if self.model.write(offset as usize, data) {
            self.was_reset();
        }
    }

    /// The ring is in RAM: its first read shows whether DMA is allowed.
    fn work(&mut self) {
        self.machine.run_one(0, 0, 0, &[0]);
        let state = self.machine.settle(0, 0);
        if !self.booted {
            assert_eq!(state, QueueState::Disabled, "not enabled before the boot");
        } else if self.model.dma_allowed() {
            assert_eq!(state, QueueState::Idle);
            self.tally.packets += 1;
        } else {
            assert_eq!(state, QueueState::Fault);
            assert_eq!(self.machine.queue_fault(0, 0), QueueFault::BusMasterOff);
            self.tally.faults += 1;
        }
    }

    fn check(&self) {
        let now = whole(self.machine);
        if now != self.model.now {
            let at = now.iter().zip(&self.model.now).position(|(a, b)| a != b);
            let at = at.unwrap_or(0);
            let (is, should) = (now[at], self.model.now[at]);
            assert_eq!(is, should, "byte {at:#x}");
        }
        // The list of capabilities ends, whatever was written.
        let mut next = usize::from(now[0x34]);
        let mut capabilities = 0;
        while next != 0 {
            capabilities += 1;
            assert!(capabilities <= 48, "an endless list of capabilities");
            next = usize::from(now[next + 1]);
        }
        assert_eq!(capabilities, 3);
    }
}

fn place(at: Near) -> u32 {
    at.among(&SPOTS) as u32
}
