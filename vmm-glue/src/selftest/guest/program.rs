//! The guest's program: a GPU driver in 64-bit machine code that tells the host of each step through I/O ports.
//!
//! It runs alone in long mode with paging on, as [`super::vm`] sets the processor up. Registers that keep their meaning:
//!
//! | register | what it has |
//! |---|---|
//! | `r11` | the step at hand, for whoever fails |
//! | `r12` | first address of BAR 0, the registers |
//! | `r13` | first address of BAR 2, the doorbells |
//! | `r14` | the function's configuration space in ECAM |
//! | `r15` | first address of the HBM |

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use numagpu_devices::spec::regs::{
    self, BootState, IrqBits, OwnerCommand, OwnerResult, OwnerState, QueueState,
};
use numagpu_devices::spec::{pci, sdma};

use super::protocol::{
    CODE_SELECTOR, CONTEXTS, EXCEPTION, FENCES, FILL, LEN, MESSAGE_ADDRESS, OFTEN, PORT_FAILED,
    Place, RING_SIZE, SCRATCH, Step, TOKEN, TOO_LONG, VECTOR_TOO_LONG, VECTORS, ram,
};
use super::writer::{Writer, Written, at};
use crate::kvm::CONFIG_DATA;

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_X2APIC_ID: u32 = 0x802;
const MSR_X2APIC_SPURIOUS: u32 = 0x80f;
/// Bits of [`MSR_APIC_BASE`] that enable the local APIC and its x2APIC mode.
const X2APIC: u32 = 0b11 << 10;
/// Software enable, and vector 0xff for spurious interrupts.
const APIC_ON: u32 = 0x1ff;
/// An interrupt gate that is there, for the kernel.
const GATE: u32 = 0x8e00;

/// Offsets in configuration space.
const COMMAND: i32 = 0x04;
const BAR0: i32 = 0x10;
const CAPABILITIES: i32 = 0x34;
/// From a device to the next one in what goes to [`CONFIG_ADDRESS`](crate::kvm::CONFIG_ADDRESS).
const NEXT_DEVICE: i32 = 1 << 11;
const MSIX_CAPABILITY: u32 = 0x11;
/// Memory space and bus master.
const COMMAND_ON: u32 = 0b110;
const MSIX_ENABLE: u32 = 1 << 15;

/// Interrupts, then everything that a driver does. The machine code, to be run at [`ram::CODE`].
pub(super) fn assemble(place: &Place) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let [
        mut set_gate,
        mut exception,
        mut too_long,
        mut events,
        mut traps,
        mut stop,
    ] = std::array::from_fn(|_| a.create_label());
    let failed = a.create_label();
    let mut w = Writer { a, failed };

    start(&mut w, [set_gate, exception, too_long, events, traps])?;
    find(&mut w, place)?;
    find_by_ports(&mut w)?;
    bars(&mut w, place)?;
    msix(&mut w, place)?;
    boot(&mut w)?;
    own(&mut w)?;
    enable(&mut w)?;
    copy(&mut w)?;
    compare(&mut w)?;
    kick(&mut w)?;
    often(&mut w)?;
    release(&mut w)?;
    refusal(&mut w)?;
    w.a.jmp(stop)?;

    // Enters `rax` as the handler of the gate at `rdi`, and goes to the next gate.
    w.a.set_label(&mut set_gate)?;
    w.a.mov(word_ptr(rdi), ax)?;
    w.a.mov(word_ptr(rdi + 2), u32::from(CODE_SELECTOR))?;
    w.a.mov(word_ptr(rdi + 4), GATE)?;
    w.a.shr(rax, 16)?;
    w.a.mov(word_ptr(rdi + 6), ax)?;
    w.a.shr(rax, 16)?;
    w.a.mov(dword_ptr(rdi + 8), eax)?;
    w.a.mov(dword_ptr(rdi + 12), 0)?;
    w.a.add(rdi, 16)?;
    w.a.ret()?;

    w.handler(&mut events, pci::VECTOR_EVENTS)?;
    w.handler(&mut traps, pci::VECTOR_QUEUE0)?;
    w.a.set_label(&mut exception)?;
    // The first word is the error code or where it happened, the second that or the code segment.
    for place in [0, 8] {
        w.a.mov(rax, qword_ptr(rsp + place))?;
        w.tell_long()?;
    }
    w.a.or(r11d, EXCEPTION)?;
    w.a.jmp(failed)?;
    w.a.set_label(&mut too_long)?;
    w.a.or(r11d, TOO_LONG)?;
    let mut failed = w.failed;
    w.a.set_label(&mut failed)?;
    w.tell()?;
    w.a.mov(eax, r11d)?;
    w.a.mov(edx, u32::from(PORT_FAILED))?;
    w.a.out(dx, eax)?;
    w.a.set_label(&mut stop)?;
    w.a.cli()?;
    w.a.hlt()?;
    w.a.jmp(stop)?;
    w.a.assemble(ram::CODE)
}

/// Gates for exceptions and for the GPU's vectors, and the local APIC in x2APIC mode.
fn start(
    w: &mut Writer,
    [set_gate, exception, too_long, events, traps]: [CodeLabel; 5],
) -> Written {
    w.begin(Step::Start)?;
    w.gates(0, 32, exception, set_gate)?;
    w.gates(
        u32::from(VECTORS) + u32::from(pci::VECTOR_EVENTS),
        1,
        events,
        set_gate,
    )?;
    w.gates(
        u32::from(VECTORS) + u32::from(pci::VECTOR_QUEUE0),
        1,
        traps,
        set_gate,
    )?;
    w.gates(VECTOR_TOO_LONG.into(), 1, too_long, set_gate)?;
    w.a.mov(rbx, ram::IDTR)?;
    w.a.mov(word_ptr(rbx), 0xfff)?;
    w.a.mov(rax, ram::IDT)?;
    w.a.mov(qword_ptr(rbx + 2), rax)?;
    w.a.lidt(ptr(rbx))?;
    w.a.mov(ecx, MSR_APIC_BASE)?;
    w.a.rdmsr()?;
    w.a.or(eax, X2APIC)?;
    w.a.wrmsr()?;
    w.wrmsr(MSR_X2APIC_SPURIOUS, APIC_ON)?;
    w.a.mov(ecx, MSR_X2APIC_ID)?;
    w.a.rdmsr()?;
    w.tell()?;
    w.a.sti()?;
    w.done()
}

/// The first function of bus 0 that is ours: tells of its device number and its ids.
fn find(w: &mut Writer, place: &Place) -> Written {
    let (mut again, mut found) = (w.a.create_label(), w.a.create_label());
    w.begin(Step::Find)?;
    w.a.mov(r14, place.ecam)?;
    w.a.xor(ecx, ecx)?;
    w.a.set_label(&mut again)?;
    w.a.mov(eax, dword_ptr(r14))?;
    w.a.cmp(
        eax,
        u32::from(pci::VENDOR_ID) | u32::from(pci::DEVICE_ID) << 16,
    )?;
    w.a.je(found)?;
    w.a.add(r14, 8 * 4096)?;
    w.a.inc(ecx)?;
    w.a.cmp(ecx, 32)?;
    w.a.jb(again)?;
    w.a.jmp(w.failed)?;
    w.a.set_label(&mut found)?;
    w.tell()?;
    w.a.mov(eax, ecx)?;
    w.tell()?;
    w.done()
}

/// What ECAM showed at device number `ecx`, by the ports of configuration space: tells of its ids, of its device id alone,
/// and of what the numbers before and behind it have. The ids have to be those of ECAM.
fn find_by_ports(w: &mut Writer) -> Written {
    w.begin(Step::FindByPorts)?;
    w.a.mov(ebx, ecx)?;
    w.a.shl(ebx, 11)?;
    w.a.or(ebx, 1 << 31)?;
    w.select(0)?;
    w.a.mov(edx, u32::from(CONFIG_DATA))?;
    w.a.in_(eax, dx)?;
    w.a.cmp(eax, dword_ptr(r14))?;
    w.a.jne(w.failed)?;
    w.tell()?;
    w.a.mov(edx, u32::from(CONFIG_DATA + 2))?;
    w.a.xor(eax, eax)?;
    w.a.in_(ax, dx)?;
    w.a.cmp(ax, word_ptr(r14 + 2))?;
    w.a.jne(w.failed)?;
    w.tell()?;
    for beside in [-NEXT_DEVICE, NEXT_DEVICE] {
        w.select(beside)?;
        w.a.mov(edx, u32::from(CONFIG_DATA))?;
        w.a.in_(eax, dx)?;
        w.tell()?;
    }
    w.done()
}

/// Sizes of the BARs, their places, and that they are decoded only where the command register says so.
fn bars(w: &mut Writer, place: &Place) -> Written {
    w.begin(Step::SizeBars)?;
    for bar in 0..4 {
        let register = BAR0 + 4 * bar;
        w.a.mov(dword_ptr(r14 + register), u32::MAX)?;
        w.a.mov(eax, dword_ptr(r14 + register))?;
        w.tell()?;
    }
    let halves = [place.doorbells & 0xffff_ffff, place.doorbells >> 32];
    let [low, high] = halves.map(|half| u32::try_from(half).unwrap_or(0));
    for (bar, value) in (0..).zip([place.registers, place.msix, low, high]) {
        w.a.mov(dword_ptr(r14 + (BAR0 + 4 * bar)), value)?;
    }
    w.a.mov(r12, u64::from(place.registers))?;
    w.a.mov(r13, place.doorbells)?;
    w.done()?;

    w.begin(Step::Decode)?;
    let identity = regs::identity::BASE;
    w.read(identity, &regs::identity::MAGIC)?;
    w.tell()?;
    w.must_be(u32::MAX)?;
    w.a.mov(word_ptr(r14 + COMMAND), COMMAND_ON)?;
    w.read(identity, &regs::identity::MAGIC)?;
    w.tell()?;
    w.must_be(regs::MAGIC)?;
    w.done()
}

/// Finds MSI-X, gives two vectors their messages and turns it on.
fn msix(w: &mut Writer, place: &Place) -> Written {
    let (mut again, mut found) = (w.a.create_label(), w.a.create_label());
    w.begin(Step::Msix)?;
    w.a.movzx(eax, byte_ptr(r14 + CAPABILITIES))?;
    w.a.set_label(&mut again)?;
    w.a.test(eax, eax)?;
    w.a.jz(w.failed)?;
    w.a.mov(rbx, r14)?;
    w.a.add(rbx, rax)?;
    w.a.movzx(ecx, byte_ptr(rbx))?;
    w.a.cmp(ecx, MSIX_CAPABILITY)?;
    w.a.je(found)?;
    w.a.movzx(eax, byte_ptr(rbx + 1))?;
    w.a.jmp(again)?;
    w.a.set_label(&mut found)?;
    // Where the table is; the BAR is the one that holds MSI-X and nothing else.
    w.a.mov(eax, dword_ptr(rbx + 4))?;
    w.tell()?;
    w.a.mov(rsi, u64::from(place.msix))?;
    w.a.and(eax, -8)?;
    w.a.add(rsi, rax)?;
    for vector in [pci::VECTOR_EVENTS, pci::VECTOR_QUEUE0] {
        let entry = 16 * i32::from(vector);
        w.a.mov(dword_ptr(rsi + entry), MESSAGE_ADDRESS)?;
        w.a.mov(dword_ptr(rsi + (entry + 4)), 0)?;
        w.a.mov(
            dword_ptr(rsi + (entry + 8)),
            u32::from(VECTORS) + u32::from(vector),
        )?;
        w.a.mov(dword_ptr(rsi + (entry + 12)), 0)?;
    }
    w.a.movzx(eax, word_ptr(rbx + 2))?;
    w.a.or(eax, MSIX_ENABLE)?;
    w.a.mov(word_ptr(rbx + 2), ax)?;
    w.a.movzx(eax, word_ptr(rbx + 2))?;
    w.tell()?;
    w.done()
}

fn boot(w: &mut Writer) -> Written {
    use regs::boot::{BASE, CONTROL, STATUS};
    w.begin(Step::Boot)?;
    w.read(BASE, &STATUS)?;
    w.must_be(BootState::Reset.code())?;
    w.write(BASE, &CONTROL, regs::BOOT_START)?;
    w.wait_for(BASE, &STATUS, BootState::Ready.code())?;
    w.tell()?;
    w.done()
}

/// Where the HBM is, claims it and sees zeros in it.
fn own(w: &mut Writer) -> Written {
    use regs::partition::{BASE, COHERENCE, COMMAND, HBM_BASE, HBM_SIZE, RESULT, STATE};
    w.begin(Step::Hbm)?;
    w.read_long(BASE, &HBM_BASE)?;
    w.a.mov(r15, rax)?;
    w.tell_long()?;
    w.read_long(BASE, &HBM_SIZE)?;
    w.tell_long()?;
    w.read(BASE, &COHERENCE)?;
    w.tell()?;
    w.done()?;

    w.begin(Step::Claim)?;
    w.write_long(BASE, &regs::partition::TOKEN, TOKEN)?;
    w.write(BASE, &COMMAND, OwnerCommand::Claim.code())?;
    w.read(BASE, &RESULT)?;
    w.tell()?;
    w.must_be(OwnerResult::Ok.code())?;
    w.read(BASE, &STATE)?;
    w.tell()?;
    w.must_be(OwnerState::Claimed.code())?;
    w.done()?;

    w.begin(Step::ReadZeros)?;
    w.bits_of_hbm()?;
    w.tell_long()?;
    w.done()
}

fn enable(w: &mut Writer) -> Written {
    use regs::queue::{BASE, CONTROL, RING_BASE, STATUS, WPTR_POLL};
    w.begin(Step::Enable)?;
    let causes = IrqBits::QUEUE0 | IrqBits::FAULT;
    w.write(regs::irq::BASE, &regs::irq::ENABLE, causes.bits())?;
    w.write_long(BASE, &RING_BASE, ram::RING)?;
    w.write(BASE, &regs::queue::RING_SIZE, RING_SIZE)?;
    w.write_long(BASE, &regs::queue::TOKEN, TOKEN)?;
    w.write_long(BASE, &WPTR_POLL, ram::WPTR)?;
    w.write(BASE, &CONTROL, regs::QUEUE_ENABLE)?;
    w.read(BASE, &STATUS)?;
    w.tell()?;
    w.must_be(QueueState::Idle.code())?;
    w.done()
}

/// Tells of what a submission brought, and clears its cause: interrupts so far in `eax`, fence, cause, context.
fn told_of(w: &mut Writer, number: u32, fence: u32, context: u32) -> Written {
    w.wait_for_interrupt(pci::VECTOR_QUEUE0, number)?;
    w.tell()?;
    w.a.mov(rbx, ram::FENCE)?;
    w.a.mov(eax, dword_ptr(rbx))?;
    w.tell()?;
    w.must_be(fence)?;
    w.read(regs::irq::BASE, &regs::irq::STATUS)?;
    w.tell()?;
    w.a.mov(
        dword_ptr(r12 + at(regs::irq::BASE, &regs::irq::STATUS)),
        eax,
    )?;
    w.read(regs::queue::BASE, &regs::queue::TRAP_CONTEXT)?;
    w.tell()?;
    w.must_be(context)
}

/// Bytes of packets.
fn len(packets: &[&[u32]]) -> u64 {
    packets.iter().map(|packet| 4 * packet.len() as u64).sum()
}

/// Packets of both submissions, with the word where the HBM's address goes.
fn copy_packets() -> [(Vec<u32>, Option<i32>); 3] {
    let [fence, _] = FENCES;
    let [context, _] = CONTEXTS;
    [
        (sdma::copy_linear(ram::SOURCE, 0, LEN).to_vec(), Some(5)),
        (sdma::fence(ram::FENCE, fence).to_vec(), None),
        (sdma::trap(context).to_vec(), None),
    ]
}

fn kick_packets() -> [(Vec<u32>, Option<i32>); 3] {
    let [_, fence] = FENCES;
    let [_, context] = CONTEXTS;
    [
        (sdma::const_fill(0, FILL, LEN).to_vec(), Some(1)),
        (sdma::fence(ram::FENCE, fence).to_vec(), None),
        (sdma::trap(context).to_vec(), None),
    ]
}

fn bytes_of(packets: &[(Vec<u32>, Option<i32>)]) -> u64 {
    packets.iter().map(|(words, _)| len(&[words])).sum()
}

/// Copies from RAM into the HBM, by a doorbell that has the write pointer.
fn copy(w: &mut Writer) -> Written {
    let packets = copy_packets();
    let [fence, _] = FENCES;
    let [context, _] = CONTEXTS;
    w.begin(Step::Copy)?;
    w.a.mov(rbx, ram::RING)?;
    for (words, hbm) in &packets {
        w.put(words, *hbm)?;
    }
    w.a.mov(rax, bytes_of(&packets))?;
    w.a.mov(qword_ptr(r13), rax)?;
    told_of(w, 1, fence, context)?;
    w.done()
}

/// Compares the HBM, as this processor sees it, with what was copied, and tells of a sum over it.
fn compare(w: &mut Writer) -> Written {
    let mut again = w.a.create_label();
    w.begin(Step::Compare)?;
    w.hbm_address(rdi)?;
    w.a.mov(rsi, ram::SOURCE)?;
    w.a.mov(ecx, u32::try_from(LEN / 8).unwrap_or(0))?;
    w.a.xor(ebx, ebx)?;
    w.a.set_label(&mut again)?;
    w.a.mov(rax, qword_ptr(rdi))?;
    w.a.cmp(rax, qword_ptr(rsi))?;
    w.a.jne(w.failed)?;
    w.a.add(rbx, rax)?;
    w.a.rol(rbx, 1)?;
    w.a.add(rsi, 8)?;
    w.a.add(rdi, 8)?;
    w.a.dec(ecx)?;
    w.a.jnz(again)?;
    w.a.mov(rax, rbx)?;
    w.tell_long()?;
    w.done()
}

/// Fills the HBM, with the write pointer in memory and a kick.
fn kick(w: &mut Writer) -> Written {
    let packets = kick_packets();
    let before = bytes_of(&copy_packets());
    let [_, fence] = FENCES;
    let [_, context] = CONTEXTS;
    w.begin(Step::Kick)?;
    w.a.mov(rbx, ram::RING + before)?;
    for (words, hbm) in &packets {
        w.put(words, *hbm)?;
    }
    w.a.mov(rax, before + bytes_of(&packets))?;
    w.a.mov(rbx, ram::WPTR)?;
    w.a.mov(qword_ptr(rbx), rax)?;
    w.a.mov(
        dword_ptr(r13 + i32::try_from(pci::KICK_OFFSET).unwrap_or(0)),
        0,
    )?;
    told_of(w, 2, fence, context)?;
    w.hbm_address(rdi)?;
    w.a.mov(eax, dword_ptr(rdi))?;
    w.tell()?;
    w.must_be(FILL)?;
    w.done()
}

/// Reads a register, and kicks with nothing new in memory, so often that the host can time it.
fn often(w: &mut Writer) -> Written {
    let [mut read, mut kick] = std::array::from_fn(|_| w.a.create_label());
    let scratch = (regs::identity::BASE, &regs::identity::SCRATCH);
    w.begin(Step::ReadOften)?;
    w.write(scratch.0, scratch.1, SCRATCH)?;
    w.a.mov(ecx, OFTEN)?;
    w.a.set_label(&mut read)?;
    w.read(scratch.0, scratch.1)?;
    w.a.dec(ecx)?;
    w.a.jnz(read)?;
    w.tell()?;
    w.done()?;

    w.begin(Step::KickOften)?;
    w.a.mov(ecx, OFTEN)?;
    w.a.set_label(&mut kick)?;
    let place = i32::try_from(pci::KICK_OFFSET).unwrap_or(0);
    w.a.mov(dword_ptr(r13 + place), ecx)?;
    w.a.dec(ecx)?;
    w.a.jnz(kick)?;
    w.read(regs::queue::BASE, &regs::queue::FAULT_CODE)?;
    w.tell()?;
    w.read_long(regs::queue::BASE, &regs::queue::WPTR)?;
    w.tell_long()?;
    w.done()
}

/// Bytes in the ring after both submissions.
pub(super) fn submitted() -> u64 {
    bytes_of(&copy_packets()) + bytes_of(&kick_packets())
}

/// Gives the HBM back and sees that nothing is left in it.
fn release(w: &mut Writer) -> Written {
    use regs::partition::{BASE, COMMAND, RESULT, STATE};
    w.begin(Step::Release)?;
    w.write_long(BASE, &regs::partition::TOKEN, TOKEN)?;
    w.write(BASE, &COMMAND, OwnerCommand::Release.code())?;
    w.read(BASE, &RESULT)?;
    w.tell()?;
    w.must_be(OwnerResult::Ok.code())?;
    w.wait_for(BASE, &STATE, OwnerState::Free.code())?;
    w.tell()?;
    w.bits_of_hbm()?;
    w.tell_long()?;
    w.done()
}

/// Fills HBM that it does not own any more, and hears of it by the other vector.
fn refusal(w: &mut Writer) -> Written {
    use regs::queue::{BASE, FAULT_ADDR, FAULT_CODE, STATUS};
    let before = submitted();
    let fill = sdma::const_fill(0, FILL, LEN);
    w.begin(Step::Refusal)?;
    w.a.mov(rbx, ram::RING + before)?;
    w.put(&fill, Some(1))?;
    w.a.mov(rax, before + len(&[&fill]))?;
    w.a.mov(qword_ptr(r13), rax)?;
    w.wait_for_interrupt(pci::VECTOR_EVENTS, 1)?;
    w.tell()?;
    w.read(BASE, &STATUS)?;
    w.must_be(QueueState::Fault.code())?;
    w.read(BASE, &FAULT_CODE)?;
    w.tell()?;
    w.read_long(BASE, &FAULT_ADDR)?;
    w.tell_long()?;
    w.done()
}
