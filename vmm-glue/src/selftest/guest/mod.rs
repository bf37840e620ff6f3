//! The second part: a guest of our own under KVM, whose program is a driver, with the GPU in this process.
//!
//! What the program tells is not believed: each step is held against what the host knows, and the HBM is looked at in its
//! own file while the guest stands still.

mod program;
mod protocol;
mod vm;
mod writer;

use std::time::{Duration, Instant};

use numagpu_devices::bus::HbmStore as _;
use numagpu_devices::spec::pci;
use numagpu_devices::spec::regs::{self, Coherence, IrqBits, OwnerState, QueueFault, QueueState};
use numagpu_topology::Plan;
use vm_memory::Bytes as _;

use self::protocol::Step;
use self::vm::{Event, Machine};
use super::{Journal, Options, Outcome, Verdict, expect, noise};
use crate::instance::Gpus;

/// Name of the part's first check, which says whether there is KVM.
const OPEN: &str = "open";

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Start => "long mode and local APIC",
            Step::Find => "find by ECAM",
            Step::FindByPorts => "find by ports",
            Step::SizeBars => "size and place BARs",
            Step::Decode => "decode as the command register says",
            Step::Msix => "MSI-X",
            Step::Boot => "boot",
            Step::Hbm => "coherent HBM",
            Step::Claim => "claim",
            Step::ReadZeros => "claimed HBM is zero",
            Step::Enable => "enable a queue",
            Step::Copy => "copy, fence, interrupt",
            Step::Compare => "HBM through the processor",
            Step::Kick => "kick by ioeventfd",
            Step::ReadOften => "register reads by exits",
            Step::KickOften => "kicks without exits",
            Step::Release => "release and scrub",
            Step::Refusal => "what is not owned is refused",
        }
    }
}

/// What the host knows of the run.
struct Known<'a> {
    plan: &'a Plan,
    source: &'a [u8],
}

/// Bytes of the HBM's file where the guest works.
fn held(gpus: &Gpus) -> Outcome<Vec<u8>> {
    let (_, memory) = gpus.memory().next().ok_or("no HBM")?;
    let slice = memory.slice(protocol::TARGET, protocol::LEN);
    let slice = slice.map_err(|error| error.to_string())?;
    let mut data = vec![0; slice.len()];
    let read = slice.read_slice(&mut data, 0);
    read.map_err(|error| error.to_string())?;
    Ok(data)
}

/// Two values as one number.
fn long(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// Of what the guest did so often.
fn each(took: Duration) -> String {
    let one = took.checked_div(protocol::OFTEN).unwrap_or_default();
    format!("{:.1} us each", one.as_secs_f64() * 1e6)
}

/// The sum that the guest makes over what it compares.
fn sum(data: &[u8]) -> u64 {
    let words = data.chunks_exact(8).map(|word| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        u64::from_le_bytes(bytes)
    });
    words.fold(0, |sum: u64, word| sum.wrapping_add(word).rotate_left(1))
}

impl Known<'_> {
    /// Holds what the guest told of a step against what is so; what is worth telling.
    fn check(&self, step: Step, told: &[u32], took: Duration, gpus: &Gpus) -> Outcome<String> {
        let status = || gpus.gpus().first().map(|gpu| gpu.status()).ok_or("no GPU");
        let hbm = self.plan.gpus.first().and_then(|gpu| gpu.hbm.first());
        let hbm = hbm.ok_or("no HBM in the plan")?;
        let mut said = String::new();
        match (step, told) {
            (Step::Start, [id]) => expect("the APIC's id", *id, 0)?,
            (Step::Find, [ids, device]) => {
                let wanted = u32::from(pci::VENDOR_ID) | u32::from(pci::DEVICE_ID) << 16;
                expect("its ids", *ids, wanted)?;
                expect("its device number", *device, vm::GPU.device.into())?;
                said = vm::GPU.to_string();
            }
            (Step::FindByPorts, [ids, device_id, before, after]) => {
                let wanted = u32::from(pci::VENDOR_ID) | u32::from(pci::DEVICE_ID) << 16;
                expect("its ids", *ids, wanted)?;
                expect("its device id", *device_id, pci::DEVICE_ID.into())?;
                let absent = (*before, *after);
                expect("the ids beside it", absent, (u32::MAX, u32::MAX))?;
            }
            (Step::SizeBars, [registers, msix, doorbells, high]) => {
                let bits =
                    |size: u64| u32::try_from(size.wrapping_neg() & 0xffff_ffff).unwrap_or(0);
                expect("BAR 0", *registers, bits(pci::BAR_REGISTERS_SIZE))?;
                expect("BAR 1", *msix, bits(pci::BAR_MSIX_SIZE))?;
                expect("BAR 2", *doorbells, bits(pci::BAR_DOORBELLS_SIZE) | 0b100)?;
                expect("BAR 3", *high, u32::MAX)?;
            }
            (Step::Decode, [before, after]) => {
                expect("what is read while decoding is off", *before, u32::MAX)?;
                expect("MAGIC", *after, regs::MAGIC)?;
            }
            (Step::Msix, [table, control]) => {
                let wanted = pci::MSIX_TABLE_OFFSET | u32::from(pci::BAR_MSIX);
                expect("the table's place", *table, wanted)?;
                let wanted = 1 << 15 | u32::from(pci::VECTOR_COUNT - 1);
                expect("message control", *control, wanted)?;
            }
            (Step::Boot, [state]) => {
                expect("STATUS", *state, status()?.boot.code())?;
                expect("STATUS", *state, regs::BootState::Ready.code())?;
            }
            (Step::Hbm, [base_low, base_high, size_low, size_high, coherence]) => {
                let seen = (long(*base_low, *base_high), long(*size_low, *size_high));
                expect("HBM", seen, (hbm.base, hbm.size))?;
                expect("COHERENCE", *coherence, Coherence::Coherent.code())?;
                said = format!("{:#x} bytes at {:#x}", hbm.size, hbm.base);
            }
            (Step::Claim, [_, state]) => expect("STATE", *state, OwnerState::Claimed.code())?,
            (Step::ReadZeros, [low, high]) => expect("its bits", long(*low, *high), 0)?,
            (Step::Enable, [state]) => expect("STATUS", *state, QueueState::Idle.code())?,
            (Step::Copy, [interrupts, _, causes, context]) => {
                self.check_trap([*interrupts, *causes, *context], 0)?;
                if held(gpus)? != self.source {
                    return Err("the file behind the HBM has other bytes".to_owned());
                }
                said = format!("{:#x} bytes, in the file behind the HBM", protocol::LEN);
            }
            (Step::Compare, [low, high]) => {
                expect("the sum over it", long(*low, *high), sum(self.source))?;
            }
            (Step::Kick, [interrupts, _, causes, context, word]) => {
                self.check_trap([*interrupts, *causes, *context], 1)?;
                expect("what the processor reads", *word, protocol::FILL)?;
                let filled = held(gpus)?;
                let mut words = filled.chunks_exact(4);
                if !words.all(|word| word == protocol::FILL.to_le_bytes()) {
                    return Err("the file behind the HBM is not filled".to_owned());
                }
            }
            (Step::ReadOften, [read]) => {
                expect("SCRATCH", *read, protocol::SCRATCH)?;
                said = each(took);
            }
            (Step::KickOften, [fault, low, high]) => {
                expect("FAULT_CODE", *fault, 0)?;
                expect("WPTR", long(*low, *high), program::submitted())?;
                said = each(took);
            }
            (Step::Release, [_, state, low, high]) => {
                expect("STATE", *state, OwnerState::Free.code())?;
                expect("its bits", long(*low, *high), 0)?;
                if held(gpus)?.iter().any(|byte| *byte != 0) {
                    return Err("bytes of its last owner are left in the file".to_owned());
                }
            }
            (Step::Refusal, [interrupts, code, low, high]) => {
                expect("interrupts of vector 0", *interrupts, 1)?;
                expect("FAULT_CODE", *code, QueueFault::NotOwned.code())?;
                expect("FAULT_ADDR", long(*low, *high), hbm.base + protocol::TARGET)?;
                if held(gpus)?.iter().any(|byte| *byte != 0) {
                    return Err("the HBM was written".to_owned());
                }
            }
            _ => return Err(format!("the guest told of {} values", told.len())),
        }
        Ok(said)
    }

    /// What a submission brought: interrupts so far, causes and context.
    fn check_trap(&self, [interrupts, causes, context]: [u32; 3], number: usize) -> Outcome<()> {
        let bit = IrqBits::QUEUE0.bits();
        expect("interrupts", interrupts as usize, number + 1)?;
        expect("IRQ.STATUS", causes & bit, bit)?;
        let wanted = protocol::CONTEXTS.get(number).copied();
        expect("TRAP_CONTEXT", Some(context), wanted)
    }
}

/// Why a step ended, in words.
fn failure(code: u32, told: &[u32]) -> String {
    let reason = match code & (protocol::EXCEPTION | protocol::TOO_LONG) {
        protocol::EXCEPTION => "an exception of the processor",
        protocol::TOO_LONG => "it took too long",
        _ => "the guest saw something else than it has to",
    };
    format!("{reason}; it told of {told:x?}")
}

/// Makes the checks of this part.
pub(super) fn run(plan: &Plan, options: &Options, journal: &mut Journal<'_>) {
    let kvm = match vm::open(&options.kvm) {
        Ok(kvm) => kvm,
        Err(error) if options.require_kvm => return journal.note(OPEN, Verdict::Failed(error)),
        Err(error) => return journal.note(OPEN, Verdict::Skipped(error)),
    };
    journal.note(OPEN, Verdict::Ok(String::new()));
    let source = noise(usize::try_from(protocol::LEN).unwrap_or(0));
    let machine = journal.check("machine", || {
        let machine = Machine::new(&kvm, plan, &source)?;
        Ok((machine, String::new()))
    });
    let mut steps = Step::ALL.into_iter().peekable();
    if let Some(mut machine) = machine {
        let known = Known {
            plan,
            source: &source,
        };
        let mut told = Vec::new();
        let mut kicks = 0;
        let mut last = Instant::now();
        let result = machine.run(|gpus, event| {
            let (port, value) = match event {
                Event::Port(port, value) => (port, value),
                Event::Kick => {
                    kicks += 1;
                    return Ok(false);
                }
            };
            match port {
                protocol::PORT_VALUE => told.push(value),
                protocol::PORT_FAILED => return Err(failure(value, &told)),
                protocol::PORT_STEP => {
                    let Some(step) = steps.peek().copied() else {
                        return Err(format!("the guest told of a step {value} behind the last"));
                    };
                    expect("the step", value, u32::from(step as u8))?;
                    let mut said = known.check(step, &told, last.elapsed(), gpus)?;
                    if step == Step::Kick {
                        said = "without an exit to this process".to_owned();
                    }
                    expect("stores to the kick that came to this process", kicks, 0)?;
                    journal.note(step.name(), Verdict::Ok(said));
                    told.clear();
                    last = Instant::now();
                    steps.next();
                }
                _ => return Err(format!("the guest stored {value:#x} to port {port:#x}")),
            }
            Ok(steps.peek().is_none())
        });
        if let (Err(error), Some(step)) = (result, steps.next()) {
            journal.check::<()>(step.name(), || Err(error));
        }
    }
    for step in steps {
        journal.check::<()>(step.name(), || Err("not reached".to_owned()));
    }
}
