//! `docs/registers.md`: the device as a driver sees it, from the tables of `numagpu-spec`.

use std::path::Path;

use anyhow::{Context, Result};
use numagpu_spec::regs::{self, Caps, CodeTable, IrqBits};
use numagpu_spec::table::{Block, Reg};
use numagpu_spec::{pci, sdma};

use super::comments::Comments;
use super::markdown::table;

/// What a driver does, in the order in which it does it.
const INTRODUCTION: &str = include_str!("registers_introduction.md");

/// The page.
pub fn page(root: &Path) -> Result<String> {
    let read = |file: &str| {
        let path = root.join("devices/spec/src").join(file);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Comments::read(&text).with_context(|| format!("{} is not understood", path.display()))
    };
    let (registers, packets) = (read("regs/codes.rs")?, read("sdma.rs")?);
    let mut page = INTRODUCTION.to_owned();
    page += &function();
    page += "\n## Registers (BAR 0)\n\n";
    page += &map(regs::BLOCKS);
    page += LEGEND;
    for one in regs::BLOCKS {
        page += &block(one);
    }
    page += "\n## Doorbells (BAR 2)\n";
    for one in pci::DOORBELL_BLOCKS {
        page += &block(one);
    }
    page += "\n## MSI-X (BAR 1)\n\n";
    page += &format!(
        "The table is at {:#x}, the pending bits are at {:#x}. Vector {} tells of faults and \
         ownership, vector {} + `q` of traps of queue `q`; there are {} vectors.\n",
        pci::MSIX_TABLE_OFFSET,
        pci::MSIX_PBA_OFFSET,
        pci::VECTOR_EVENTS,
        pci::VECTOR_QUEUE0,
        pci::VECTOR_COUNT
    );
    page += &block(&pci::msix::BLOCK);
    page += "\n## Bits\n";
    page += &bits("Caps", &named_bits::<Caps>(), &registers)?;
    page += &bits("IrqBits", &named_bits::<IrqBits>(), &registers)?;
    page += "\n## Codes\n";
    page += &codes(&registers)?;
    page += &packet_section(&packets)?;
    Ok(page)
}

/// What the columns of register tables mean.
const LEGEND: &str = "\n\
    Access: `RO` is read only, `RW` read and write, `W1C` cleared by writing ones. A mask says which \
    bits that holds for, where it is not all of them. *Hidden* registers read as zero whatever they \
    hold. *Acts* marks those whose write makes the device do something at once. A reset value of `-` \
    depends on the machine or on what the device does.\n";

/// The identity of the PCI function and its BARs.
fn function() -> String {
    let row = |bar: u8, size: u64, bits: &str, what: &str| {
        [
            bar.to_string(),
            format!("{size:#x}"),
            format!("{bits}-bit, not prefetchable"),
            what.to_owned(),
        ]
    };
    let bars = [
        row(
            pci::BAR_REGISTERS,
            pci::BAR_REGISTERS_SIZE,
            "32",
            "registers",
        ),
        row(
            pci::BAR_MSIX,
            pci::BAR_MSIX_SIZE,
            "32",
            "MSI-X table and pending bits",
        ),
        row(
            pci::BAR_DOORBELLS,
            pci::BAR_DOORBELLS_SIZE,
            "64",
            "doorbells",
        ),
        [
            pci::BAR_APERTURE.to_string(),
            "a power of two".to_owned(),
            "64-bit, prefetchable".to_owned(),
            "HBM, one partition behind the other; only with `HBM_APERTURE` in `CAPS`".to_owned(),
        ],
    ];
    format!(
        "\n## PCI function\n\nVendor {:#06x}, device {:#06x} by default; class {:#08x}, a processing \
         accelerator. It has MSI-X and function-level reset.\n\n{}",
        pci::VENDOR_ID,
        pci::DEVICE_ID,
        pci::CLASS_CODE,
        table(["BAR", "size", "kind", "holds"], &bars)
    )
}

/// Where the blocks are.
fn map(blocks: &[Block]) -> String {
    let rows: Vec<[String; 5]> = blocks
        .iter()
        .map(|block| {
            [
                format!("{:#06x}", block.base),
                format!("`{}`", block.name),
                block.count.to_string(),
                format!("{:#x}", block.stride),
                block.doc.to_owned(),
            ]
        })
        .collect();
    table(["offset", "block", "instances", "stride", "what"], &rows)
}

/// One block's registers.
fn block(block: &Block) -> String {
    let place = if block.count == 1 {
        format!("At {:#06x}", block.base)
    } else {
        format!(
            "{} instances, number `i` at {:#06x} + `i` * {:#x}",
            block.count, block.base, block.stride
        )
    };
    let rows: Vec<[String; 6]> = block.regs.iter().map(register).collect();
    let head = ["offset", "register", "bytes", "access", "reset", "what"];
    format!(
        "\n### {}: {}\n\n{place}.\n\n{}",
        block.name,
        block.doc,
        table(head, &rows)
    )
}

/// One register's row.
fn register(reg: &Reg) -> [String; 6] {
    let reset = if reg.writable == 0 && reg.w1c == 0 && reg.reset == 0 {
        "-".to_owned()
    } else {
        format!("{:#x}", reg.reset)
    };
    [
        format!("{:#04x}", reg.offset),
        format!("`{}`", reg.name),
        reg.width.bytes().to_string(),
        access(reg),
        reset,
        reg.doc.to_owned(),
    ]
}

/// What a driver may do with a register.
pub(super) fn access(reg: &Reg) -> String {
    let kind = |name: &str, mask: u64| match mask {
        0 => None,
        all if all == reg.width.mask() => Some(name.to_owned()),
        some => Some(format!("{name} {some:#x}")),
    };
    let mut words: Vec<String> = [kind("RW", reg.writable), kind("W1C", reg.w1c)]
        .into_iter()
        .flatten()
        .collect();
    if words.is_empty() {
        words.push("RO".to_owned());
    }
    if reg.hidden {
        words.push("hidden".to_owned());
    }
    if reg.effect {
        words.push("acts".to_owned());
    }
    words.join(", ")
}

/// Names and values of the flags of `F`.
pub(super) fn named_bits<F: bitflags::Flags>() -> Vec<(&'static str, u64)>
where
    F::Bits: Into<u64>,
{
    F::FLAGS
        .iter()
        .filter(|flag| !flag.name().is_empty())
        .map(|flag| (flag.name(), flag.value().bits().into()))
        .collect()
}

/// A table of flags.
fn bits(name: &str, flags: &[(&str, u64)], comments: &Comments) -> Result<String> {
    let mut rows = Vec::new();
    for (flag, value) in flags {
        rows.push([
            value.trailing_zeros().to_string(),
            format!("`{flag}`"),
            comments.on(&format!("{name}::{flag}"))?.to_owned(),
        ]);
    }
    let title = comments.on(name)?;
    Ok(format!(
        "\n### `{name}`\n\n{title}\n\n{}",
        table(["bit", "name", "what"], &rows)
    ))
}

/// Tables of the codes that registers take.
fn codes(comments: &Comments) -> Result<String> {
    let mut text = String::new();
    for one in regs::CODES {
        text += &code_table(one, comments)?;
    }
    Ok(text)
}

/// One table of codes.
fn code_table(one: &CodeTable, comments: &Comments) -> Result<String> {
    let name = one.name;
    let mut rows = Vec::new();
    for (code, variant) in one.codes {
        rows.push([
            code.to_string(),
            format!("`{variant}`"),
            comments.on(&format!("{name}::{variant}"))?.to_owned(),
        ]);
    }
    let title = comments.on(name)?;
    Ok(format!(
        "\n### `{name}`\n\n{title}\n\n{}",
        table(["code", "name", "what"], &rows)
    ))
}

/// The packets of a copy queue.
fn packet_section(comments: &Comments) -> Result<String> {
    let mut rows = Vec::new();
    for (name, op, sub, words) in [
        ("OP_NOP", sdma::OP_NOP, 0, None),
        (
            "OP_COPY",
            sdma::OP_COPY,
            sdma::SUBOP_COPY_LINEAR,
            Some(("COPY_LINEAR_WORDS", sdma::COPY_LINEAR_WORDS)),
        ),
        (
            "OP_WRITE",
            sdma::OP_WRITE,
            sdma::SUBOP_WRITE_LINEAR,
            Some(("WRITE_LINEAR_HEADER_WORDS", sdma::WRITE_LINEAR_HEADER_WORDS)),
        ),
        (
            "OP_FENCE",
            sdma::OP_FENCE,
            0,
            Some(("FENCE_WORDS", sdma::FENCE_WORDS)),
        ),
        (
            "OP_TRAP",
            sdma::OP_TRAP,
            0,
            Some(("TRAP_WORDS", sdma::TRAP_WORDS)),
        ),
        (
            "OP_POLL_REGMEM",
            sdma::OP_POLL_REGMEM,
            0,
            Some(("POLL_REGMEM_WORDS", sdma::POLL_REGMEM_WORDS)),
        ),
        (
            "OP_ATOMIC",
            sdma::OP_ATOMIC,
            0,
            Some(("ATOMIC_WORDS", sdma::ATOMIC_WORDS)),
        ),
        (
            "OP_CONST_FILL",
            sdma::OP_CONST_FILL,
            0,
            Some(("CONST_FILL_WORDS", sdma::CONST_FILL_WORDS)),
        ),
    ] {
        let what = comments.on(name)?;
        // The sub-opcode has a column of its own.
        let what = what.split("; sub-opcode").next().unwrap_or(what);
        let (count, layout) = match words {
            Some((constant, count)) => (count.to_string(), comments.on(constant)?),
            None => ("1".to_owned(), "Words: header."),
        };
        let layout = layout
            .rsplit_once(": ")
            .map_or(layout, |(_, layout)| layout);
        rows.push([
            format!("`{}`", name.trim_start_matches("OP_")),
            op.to_string(),
            sub.to_string(),
            count,
            layout.trim_end_matches('.').to_owned(),
            format!("{}.", what.trim_end_matches('.')),
        ]);
    }
    let timestamp = (sdma::OP_TIMESTAMP, "TIMESTAMP_WORDS", sdma::TIMESTAMP_WORDS);
    let window = (
        sdma::OP_COPY,
        "COPY_SUB_WINDOW_WORDS",
        sdma::COPY_SUB_WINDOW_WORDS,
    );
    for (name, sub, (op, constant, count)) in [
        ("SUBOP_COPY_SUB_WINDOW", sdma::SUBOP_COPY_SUB_WINDOW, window),
        ("SUBOP_TIMESTAMP_SET", sdma::SUBOP_TIMESTAMP_SET, timestamp),
        ("SUBOP_TIMESTAMP_GET", sdma::SUBOP_TIMESTAMP_GET, timestamp),
        (
            "SUBOP_TIMESTAMP_GET_GLOBAL",
            sdma::SUBOP_TIMESTAMP_GET_GLOBAL,
            timestamp,
        ),
    ] {
        let layout = comments.on(constant)?;
        let layout = layout
            .rsplit_once(": ")
            .map_or(layout, |(_, layout)| layout);
        rows.push([
            format!("`{}`", name.trim_start_matches("SUBOP_")),
            op.to_string(),
            sub.to_string(),
            count.to_string(),
            layout.trim_end_matches('.').to_owned(),
            comments.on(name)?.to_owned(),
        ]);
    }
    let head = ["packet", "opcode", "sub-op", "words", "layout", "what"];
    let functions = sdma::PollFunction::ALL.map(|f| (f as u32, format!("{f:?}")));
    let functions = named_codes("PollFunction", &functions, comments)?;
    let operations = sdma::AtomicOp::ALL.map(|op| (op as u32, format!("{op:?}")));
    let operations = named_codes("AtomicOp", &operations, comments)?;
    Ok(format!(
        "\n## Packets\n\n\
         AMD's published SDMA 4.x encoding: little-endian 32-bit words, the first with the opcode in \
         bits 7:0 and the sub-opcode in bits 15:8. Bits that a packet has no use for must be zero; \
         another opcode, a set reserved bit or a misaligned address stops the queue with a \
         `QueueFault`.\n\n{}\n\
         - Counts are bytes minus one for copy and fill, in bits 21:0, so one packet moves at most \
         {:#x} bytes; a linear write has words minus one, in bits 19:0, and its data in the packet \
         after the {} words of the table.\n\
         - A sub-window copy moves a box of elements of 1 << bits 31:29 of the header bytes, at most \
         16; pitches count elements. It goes row by row, the first row first; overlap matters within \
         a row only as for a linear copy.\n\
         - Addresses of a fence, a linear write and a fill by words are multiples of 4.\n\
         - Bits 31:30 of a fill's header are 0 for a fill with the value's low byte, 2 for one with \
         the whole word.\n\
         - Source and destination of a copy may overlap: the result is as if all had been read \
         before any was written.\n\
         - A poll's header has bit 31 set, for memory, and its `PollFunction` in bits 30:28. It tries once and \
         then as often as bits 27:16 of its last word say, {:#x} for without end, every so many microseconds as \
         bits 15:0 say; then it is a fault `PollTimeout`.\n\
         - An atomic's header has its `AtomicOp` in bits 31:25, plus {:#x} for 64 bits and {:#x} for no return \
         value, which changes nothing. Bit 16 makes a `CompareSwap` try until the comparison holds, every so many \
         microseconds as bits 12:0 of the last word say. Addresses are multiples of the operation's width.\n\
         - Timestamps are nanoseconds, in 8 bytes at a multiple of 8.\n{functions}{operations}",
        table(head, &rows),
        sdma::MAX_COPY,
        sdma::WRITE_LINEAR_HEADER_WORDS,
        sdma::POLL_RETRIES_MASK,
        sdma::ATOMIC_WIDE,
        sdma::ATOMIC_NO_RETURN
    ))
}

/// One table of the codes that a packet's field takes.
fn named_codes(name: &str, codes: &[(u32, String)], comments: &Comments) -> Result<String> {
    let mut rows = Vec::new();
    for (code, variant) in codes {
        rows.push([
            format!("{code:#04x}"),
            format!("`{variant}`"),
            comments.on(&format!("{name}::{variant}"))?.to_owned(),
        ]);
    }
    let title = comments.on(name)?;
    Ok(format!(
        "\n### `{name}`\n\n{title}\n\n{}",
        table(["code", "name", "what"], &rows)
    ))
}

#[cfg(test)]
mod tests {
    use numagpu_spec::table::Width;

    use super::*;

    /// The page of this checkout.
    fn this_page() -> String {
        page(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))).unwrap()
    }

    #[test]
    fn every_register_flag_and_code_is_on_the_page() {
        let page = this_page();
        for block in regs::BLOCKS {
            for reg in block.regs {
                assert!(page.contains(&format!("| `{}`", reg.name)), "{}", reg.name);
            }
        }
        for (flag, _) in named_bits::<IrqBits>() {
            assert!(page.contains(&format!("| `{flag}`")), "{flag}");
        }
        for code in regs::QueueFault::ALL {
            assert!(page.contains(&format!("| `{}`", code.name())));
        }
    }

    #[test]
    fn every_table_of_codes_is_on_the_page() {
        let page = this_page();
        for one in regs::CODES {
            assert!(
                page.contains(&format!("### `{}`", one.name)),
                "{}",
                one.name
            );
            for (_, code) in one.codes {
                assert!(
                    page.contains(&format!("| `{code}`")),
                    "{}::{code}",
                    one.name
                );
            }
        }
    }

    #[test]
    fn access_says_what_the_masks_say() {
        let plain = Reg::ro("R", 0, Width::W4, "");
        assert_eq!(access(&plain), "RO");
        assert_eq!(access(&plain.w1c(u64::from(u32::MAX))), "W1C");
        let secret = Reg::rw("R", 0, Width::W8, "").hidden().effect();
        assert_eq!(access(&secret), "RW, hidden, acts");
        assert_eq!(access(&secret.writable(3)), "RW 0x3, hidden, acts");
    }
}
