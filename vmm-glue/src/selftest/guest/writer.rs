//! Machine code for what the program's steps have in common.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use numagpu_devices::spec::table::Reg;

use super::protocol::{LEN, PORT_STEP, PORT_VALUE, Step, TARGET, ram};
use crate::kvm::CONFIG_ADDRESS;

const MSR_X2APIC_EOI: u32 = 0x80b;
/// Most reads of a register that is to change.
const TRIES: u32 = 1_000_000;

pub(super) type Written = Result<(), IcedError>;

/// The program being written.
pub(super) struct Writer {
    pub(super) a: CodeAssembler,
    /// Where whoever fails goes.
    pub(super) failed: CodeLabel,
}

/// A register of BAR 0 as a displacement from `r12`.
pub(super) fn at(base: u32, reg: &Reg) -> i32 {
    i32::try_from(base + reg.offset).unwrap_or(0)
}

impl Writer {
    /// The steps that follow are those of `step`.
    pub(super) fn begin(&mut self, step: Step) -> Written {
        self.a.mov(r11d, u32::from(step as u8))
    }

    /// Tells of `eax`; spoils `edx`.
    pub(super) fn tell(&mut self) -> Written {
        self.a.mov(edx, u32::from(PORT_VALUE))?;
        self.a.out(dx, eax)
    }

    /// Tells of `rax`, low half first; spoils `rax` and `edx`.
    pub(super) fn tell_long(&mut self) -> Written {
        self.tell()?;
        self.a.shr(rax, 32)?;
        self.tell()
    }

    /// The step is done; spoils `eax` and `edx`.
    pub(super) fn done(&mut self) -> Written {
        self.a.mov(eax, r11d)?;
        self.a.mov(edx, u32::from(PORT_STEP))?;
        self.a.out(dx, eax)
    }

    /// Fails unless `eax` is `wanted`.
    pub(super) fn must_be(&mut self, wanted: u32) -> Written {
        self.a.cmp(eax, wanted)?;
        self.a.jne(self.failed)
    }

    /// Selects configuration space of the function `further` behind that of `ebx`, and fails if the register does not keep
    /// it; spoils `eax`, `edx`, `edi`.
    pub(super) fn select(&mut self, further: i32) -> Written {
        self.a.lea(eax, ptr(rbx + further))?;
        self.a.mov(edx, u32::from(CONFIG_ADDRESS))?;
        self.a.out(dx, eax)?;
        self.a.mov(edi, eax)?;
        self.a.in_(eax, dx)?;
        self.a.cmp(eax, edi)?;
        self.a.jne(self.failed)
    }

    /// Reads a 32-bit register into `eax`.
    pub(super) fn read(&mut self, base: u32, reg: &Reg) -> Written {
        self.a.mov(eax, dword_ptr(r12 + at(base, reg)))
    }

    /// Reads a 64-bit register into `rax`.
    pub(super) fn read_long(&mut self, base: u32, reg: &Reg) -> Written {
        self.a.mov(rax, qword_ptr(r12 + at(base, reg)))
    }

    /// Writes a 32-bit register.
    pub(super) fn write(&mut self, base: u32, reg: &Reg, value: u32) -> Written {
        self.a.mov(dword_ptr(r12 + at(base, reg)), value)
    }

    /// Writes a 64-bit register; spoils `rax`.
    pub(super) fn write_long(&mut self, base: u32, reg: &Reg, value: u64) -> Written {
        self.a.mov(rax, value)?;
        self.a.mov(qword_ptr(r12 + at(base, reg)), rax)
    }

    /// Writes a model-specific register; spoils `eax`, `ecx`, `edx`.
    pub(super) fn wrmsr(&mut self, number: u32, value: u32) -> Written {
        self.a.mov(ecx, number)?;
        self.a.mov(eax, value)?;
        self.a.xor(edx, edx)?;
        self.a.wrmsr()
    }

    /// Reads a 32-bit register until it has a value, and fails if it never has; spoils `eax`, `ecx`.
    pub(super) fn wait_for(&mut self, base: u32, reg: &Reg, value: u32) -> Written {
        let (mut again, mut there) = (self.a.create_label(), self.a.create_label());
        self.a.mov(ecx, TRIES)?;
        self.a.set_label(&mut again)?;
        self.read(base, reg)?;
        self.a.cmp(eax, value)?;
        self.a.je(there)?;
        self.a.dec(ecx)?;
        self.a.jnz(again)?;
        self.a.jmp(self.failed)?;
        self.a.set_label(&mut there)?;
        self.a.zero_bytes()
    }

    /// Halts until the GPU's vector has interrupted so often; leaves that in `eax`. Spoils `rbx`.
    pub(super) fn wait_for_interrupt(&mut self, vector: u16, count: u32) -> Written {
        let (mut again, mut came) = (self.a.create_label(), self.a.create_label());
        self.a.mov(rbx, ram::COUNTS + 4 * u64::from(vector))?;
        self.a.set_label(&mut again)?;
        // No interrupt between the look and the halt: `sti` holds them back for one instruction.
        self.a.cli()?;
        self.a.mov(eax, dword_ptr(rbx))?;
        self.a.cmp(eax, count)?;
        self.a.jae(came)?;
        self.a.sti()?;
        self.a.hlt()?;
        self.a.jmp(again)?;
        self.a.set_label(&mut came)?;
        self.a.sti()
    }

    /// Reads [`LEN`] bytes of HBM from [`TARGET`] on; leaves all of their bits, or'ed, in `rax`. Spoils `rcx`, `rdi`.
    pub(super) fn bits_of_hbm(&mut self) -> Written {
        let mut again = self.a.create_label();
        self.hbm_address(rdi)?;
        self.a.mov(ecx, u32::try_from(LEN / 8).unwrap_or(0))?;
        self.a.xor(eax, eax)?;
        self.a.set_label(&mut again)?;
        self.a.or(rax, qword_ptr(rdi))?;
        self.a.add(rdi, 8)?;
        self.a.dec(ecx)?;
        self.a.jnz(again)
    }

    /// Puts the address of [`TARGET`] in the HBM into a register.
    pub(super) fn hbm_address(&mut self, register: AsmRegister64) -> Written {
        self.a.mov(register, TARGET)?;
        self.a.add(register, r15)
    }

    /// Stores words at `rbx` and goes behind them. Where the HBM's address belongs into words `hbm` and `hbm + 1`, puts it
    /// there; spoils `rax`.
    pub(super) fn put(&mut self, words: &[u32], hbm: Option<i32>) -> Written {
        for (place, word) in (0..).step_by(4).zip(words) {
            self.a.mov(dword_ptr(rbx + place), *word)?;
        }
        if let Some(hbm) = hbm {
            self.hbm_address(rax)?;
            self.a.mov(qword_ptr(rbx + 4 * hbm), rax)?;
        }
        self.a.add(rbx, i32::try_from(4 * words.len()).unwrap_or(0))
    }

    /// Enters a gate for vectors from `first` on; spoils `rax`, `ecx`, `rdi`.
    pub(super) fn gates(
        &mut self,
        first: u32,
        count: u32,
        handler: CodeLabel,
        set: CodeLabel,
    ) -> Written {
        let mut again = self.a.create_label();
        self.a.mov(rdi, ram::IDT + 16 * u64::from(first))?;
        self.a.mov(ecx, count)?;
        self.a.set_label(&mut again)?;
        self.a.lea(rax, ptr(handler))?;
        self.a.call(set)?;
        self.a.dec(ecx)?;
        self.a.jnz(again)
    }

    /// Counts an interrupt of the GPU's vector.
    pub(super) fn handler(&mut self, label: &mut CodeLabel, vector: u16) -> Written {
        self.a.set_label(label)?;
        self.a.push(rax)?;
        self.a.push(rcx)?;
        self.a.push(rdx)?;
        self.a.mov(rax, ram::COUNTS + 4 * u64::from(vector))?;
        self.a.inc(dword_ptr(rax))?;
        self.wrmsr(MSR_X2APIC_EOI, 0)?;
        self.a.pop(rdx)?;
        self.a.pop(rcx)?;
        self.a.pop(rax)?;
        self.a.iretq()
    }
}
