//! The type of a register table, and the checks that a table passes when it is compiled.

/// Access width that a register has, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 4 bytes.
    W4,
    /// 8 bytes; may be accessed as two halves.
    W8,
}

impl Width {
    /// Number of bytes.
    pub const fn bytes(self) -> u32 {
        match self {
            Width::W4 => 4,
            Width::W8 => 8,
        }
    }

    /// Mask of the bits that the register has.
    pub const fn mask(self) -> u64 {
        match self {
            Width::W4 => 0xffff_ffff,
            Width::W8 => u64::MAX,
        }
    }
}

/// One register of a block.
#[derive(Clone, Copy, Debug)]
pub struct Reg {
    /// Name in upper case, unique in its block.
    pub name: &'static str,
    /// Offset from the start of the block, in bytes; a multiple of the width.
    pub offset: u32,
    /// Width.
    pub width: Width,
    /// Value after reset, where it does not depend on the machine.
    pub reset: u64,
    /// Bits that a write replaces.
    pub writable: u64,
    /// Bits that writing a one clears; disjoint from `writable`.
    pub w1c: u64,
    /// Whether a write makes the device act.
    pub effect: bool,
    /// Whether it reads as zero whatever it holds, as secrets and commands do.
    pub hidden: bool,
    /// What it is, in one line, for documents.
    pub doc: &'static str,
}

impl Reg {
    /// A register that the driver can only read.
    pub const fn ro(name: &'static str, offset: u32, width: Width, doc: &'static str) -> Reg {
        Reg {
            name,
            offset,
            width,
            reset: 0,
            writable: 0,
            w1c: 0,
            effect: false,
            hidden: false,
            doc,
        }
    }

    /// A register whose bits the driver can read and write.
    pub const fn rw(name: &'static str, offset: u32, width: Width, doc: &'static str) -> Reg {
        Reg {
            writable: width.mask(),
            ..Reg::ro(name, offset, width, doc)
        }
    }

    /// The same register with a reset value.
    pub const fn reset(self, reset: u64) -> Reg {
        Reg { reset, ..self }
    }

    /// The same register with only these bits writable.
    pub const fn writable(self, mask: u64) -> Reg {
        Reg {
            writable: mask,
            ..self
        }
    }

    /// The same register with these bits cleared by writing ones.
    pub const fn w1c(self, mask: u64) -> Reg {
        Reg { w1c: mask, ..self }
    }

    /// The same register, marked as one whose write makes the device act.
    pub const fn effect(self) -> Reg {
        Reg {
            effect: true,
            ..self
        }
    }

    /// The same register, reading as zero.
    pub const fn hidden(self) -> Reg {
        Reg {
            hidden: true,
            ..self
        }
    }
}

/// A block of registers, repeated `count` times.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Name in upper case.
    pub name: &'static str,
    /// Offset of the first instance in the BAR.
    pub base: u32,
    /// Bytes from one instance to the next.
    pub stride: u32,
    /// Number of instances.
    pub count: u32,
    /// Registers in ascending order of offset.
    pub regs: &'static [Reg],
    /// What it is, in one line, for documents.
    pub doc: &'static str,
}

/// A packet of the copy queue, as a sequence of 32-bit words.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    /// Name in upper case.
    pub name: &'static str,
    /// Bits 7:0 of the first word.
    pub op: u8,
    /// Bits 15:8 of the first word.
    pub sub_op: u8,
    /// Names of the words in upper case, the first of them `HEADER`.
    pub words: &'static [&'static str],
    /// What it does, in one line, for documents.
    pub doc: &'static str,
}

/// Stops compilation where a table of blocks is not well formed: blocks ascending, disjoint and inside `size`;
/// registers ascending, aligned, disjoint and inside their stride; masks inside the width and disjoint.
#[allow(
    clippy::indexing_slicing,
    clippy::panic,
    reason = "runs at compile time, where a panic is the error"
)]
pub const fn check(blocks: &[Block], size: u32) {
    let mut end = 0;
    let mut b = 0;
    while b < blocks.len() {
        let block = &blocks[b];
        assert!(block.count > 0 && block.stride > 0, "a block has instances");
        assert!(block.base >= end, "blocks are ascending and disjoint");
        end = block.base + block.stride * block.count;
        assert!(end <= size, "a block lies inside its BAR");
        let mut reg_end = 0;
        let mut r = 0;
        while r < block.regs.len() {
            let reg = &block.regs[r];
            assert!(
                reg.offset >= reg_end,
                "registers are ascending and disjoint"
            );
            assert!(
                reg.offset.is_multiple_of(reg.width.bytes()),
                "a register is aligned to its width"
            );
            reg_end = reg.offset + reg.width.bytes();
            assert!(reg_end <= block.stride, "a register lies inside its block");
            let mask = reg.width.mask();
            assert!(reg.writable & !mask == 0, "writable bits exist");
            assert!(
                reg.w1c & !mask == 0 && reg.reset & !mask == 0,
                "reset and W1C bits exist"
            );
            assert!(
                reg.writable & reg.w1c == 0,
                "a bit is written or cleared, not both"
            );
            r += 1;
        }
        b += 1;
    }
}
