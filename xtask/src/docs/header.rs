//! `devices/spec/include/numagpu.h`: the device as a driver in C sees it, from the tables of `numagpu-spec`.
//!
//! Registers, their codes and packets come from tables. Numbers, flags and the enums of packets are Rust items, which
//! no table holds: they are listed here, and [`text`] fails where the source has one that is not.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::str::FromStr as _;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use numagpu_spec::table::{Block, Packet, Reg};
use numagpu_spec::{pci, regs, sdma};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::comments::Comments;
use super::registers::{access, named_bits};

/// Where the header is.
pub const PATH: &str = "devices/spec/include/numagpu.h";

/// Where the tables are.
const SOURCES: &str = "devices/spec/src";

/// Types of numbers.
const INTEGERS: [&str; 5] = ["u8", "u16", "u32", "u64", "usize"];

/// A value that the header names.
struct Value {
    /// As in the source.
    name: &'static str,
    /// Before the name in C, behind `NUMAGPU_`.
    prefix: &'static str,
    value: u64,
}

/// Numbers of one module, each with what stands before its name.
macro_rules! numbers {
    ($($prefix:literal $module:ident { $($name:ident)* })*) => {
        vec![$($(Value {
            name: stringify!($name),
            prefix: $prefix,
            #[allow(clippy::unnecessary_cast, reason = "numbers have several types")]
            value: $module::$name as u64,
        },)*)*]
    };
}

/// Every number that no register and no enum has.
fn numbers() -> Vec<Value> {
    numbers! {
        "" pci {
            VENDOR_ID DEVICE_ID CLASS_CODE
            BAR_REGISTERS BAR_REGISTERS_SIZE BAR_MSIX BAR_MSIX_SIZE BAR_DOORBELLS BAR_DOORBELLS_SIZE BAR_APERTURE
            MSIX_TABLE_OFFSET MSIX_PBA_OFFSET DOORBELL_STRIDE KICK_OFFSET VECTOR_EVENTS VECTOR_QUEUE0 VECTOR_COUNT
        }
        "" regs {
            MAX_PARTITIONS MAX_QUEUES MAX_LINKS MAGIC VERSION BOOT_START LINK_PEER_CPU NO_PXM
            LEASE_ENDLESS HISTORY_EVENT_SHIFT HISTORY_TO_SHIFT RAS_PAGE MAX_RETIRED NO_ENTRY
            QUEUE_ENABLE QUEUE_RESET PRIORITY_MAX RING_MIN RING_MAX
        }
        "SDMA_" sdma {
            OP_NOP OP_COPY OP_WRITE OP_FENCE OP_TRAP OP_POLL_REGMEM OP_ATOMIC OP_CONST_FILL OP_TIMESTAMP
            SUBOP_COPY_LINEAR SUBOP_COPY_SUB_WINDOW SUBOP_WRITE_LINEAR
            SUBOP_TIMESTAMP_SET SUBOP_TIMESTAMP_GET SUBOP_TIMESTAMP_GET_GLOBAL
            COPY_LINEAR_WORDS WRITE_LINEAR_HEADER_WORDS FENCE_WORDS TRAP_WORDS CONST_FILL_WORDS POLL_REGMEM_WORDS
            ATOMIC_WORDS TIMESTAMP_WORDS COPY_SUB_WINDOW_WORDS
            WINDOW_ELEMENT_SHIFT WINDOW_ELEMENT_MAX WINDOW_XY_MASK WINDOW_Y_SHIFT WINDOW_Z_MASK WINDOW_PITCH_SHIFT
            WINDOW_SLICE_MASK
            POLL_MEMORY POLL_FUNCTION_SHIFT POLL_INTERVAL_MASK POLL_RETRIES_SHIFT POLL_RETRIES_MASK
            ATOMIC_LOOP ATOMIC_OP_SHIFT ATOMIC_WIDE ATOMIC_NO_RETURN ATOMIC_INTERVAL_MASK
            COUNT_MASK MAX_COPY WRITE_COUNT_MASK TRAP_CONTEXT_MASK FILL_SIZE_SHIFT
        }
    }
}

/// Names and values of an enum or of flags.
type Names = Vec<(String, u64)>;

/// Every enum of codes.
fn codes() -> Vec<(&'static str, Names)> {
    let registers = regs::CODES.iter().map(|table| {
        let names = table.codes.iter();
        let names = names.map(|&(code, name)| (name.to_owned(), code.into()));
        (table.name, names.collect())
    });
    macro_rules! packets {
        ($($name:ident)*) => { [$((
            stringify!($name),
            sdma::$name::ALL.iter().map(|&code| (format!("{code:?}"), code as u64)).collect(),
        ),)*] };
    }
    registers.chain(packets!(PollFunction AtomicOp)).collect()
}

/// Every set of flags.
fn flags() -> Vec<(&'static str, Names)> {
    macro_rules! list {
        ($($name:ident)*) => { vec![$((
            stringify!($name),
            named_bits::<regs::$name>().into_iter().map(|(flag, bit)| (flag.to_owned(), bit)).collect(),
        ),)*] };
    }
    list! { Caps IrqBits }
}

/// Every block, with the BAR that it is in.
fn blocks() -> impl Iterator<Item = (u8, &'static Block)> {
    let registers = regs::BLOCKS.iter().map(|block| (pci::BAR_REGISTERS, block));
    let doorbells = pci::DOORBELL_BLOCKS.iter();
    registers
        .chain(doorbells.map(|block| (pci::BAR_DOORBELLS, block)))
        .chain([(pci::BAR_MSIX, &pci::msix::BLOCK)])
}

/// The header.
///
/// # Errors
/// If a source cannot be read, holds something that the header would lack, or two macros have one name.
pub fn text(root: &Path) -> Result<String> {
    let sources = Sources::read(&root.join(SOURCES))?;
    sources.all_listed()?;
    let mut header = Header::default();
    header.text += INTRODUCTION;
    header.section("Numbers");
    for number in numbers() {
        let doc = sources.doc_of_number(number.name)?;
        header.define(
            &format!("{}{}", number.prefix, number.name),
            number.value,
            Some(doc),
        )?;
    }
    for (bar, block) in blocks() {
        header.block(bar, block)?;
    }
    for (name, values) in flags() {
        header.section(sources.doc_of(name)?);
        for (flag, value) in values {
            let doc = sources.doc_of(&format!("{name}::{flag}"))?;
            header.define(&format!("{}_{flag}", upper(name)), value, Some(doc))?;
        }
    }
    for (name, values) in codes() {
        header.section(sources.doc_of(name)?);
        for (code, value) in values {
            let doc = sources.doc_of(&format!("{name}::{code}"))?;
            header.define(
                &format!("{}_{}", upper(name), upper(&code)),
                value,
                Some(doc),
            )?;
        }
    }
    header.section("Packets: first words without further bits, and the number of each word");
    for packet in sdma::PACKETS {
        header.packet(packet)?;
    }
    header.text += "\n#endif\n";
    Ok(header.text)
}

/// What stands before everything.
const INTRODUCTION: &str = "\
/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Registers, packets and status codes of the numagpu device, for drivers in C and C++.
 * Made by `cargo xtask docs` from the tables of numagpu-spec: do not edit. docs/registers.md says how a driver
 * uses the device.
 *
 * NUMAGPU_<BLOCK>_<REGISTER> is the offset of a register in its BAR; in a block with several instances it is a
 * macro that takes the instance, from 0. With a suffix: _BYTES its width, _WRITABLE the bits that a write replaces,
 * _W1C the bits that writing a one clears, _RESET its value after reset where that is fixed and not 0. All are
 * little-endian. NUMAGPU_BLOCK_<BLOCK> with _BAR, _BASE, _STRIDE and _COUNT says where a block's instances are.
 */
#ifndef NUMAGPU_H
#define NUMAGPU_H
";

/// A header while it is written.
#[derive(Default)]
struct Header {
    text: String,
    /// Macros so far.
    macros: BTreeMap<String, String>,
}

impl Header {
    fn comment(&mut self, text: &str) {
        // No text may end its comment.
        let text = text.replace("*/", "* /");
        self.text += &format!("/* {text} */\n");
    }

    fn section(&mut self, title: &str) {
        self.text.push('\n');
        self.comment(title);
    }

    /// A macro with its comment. The same again is left out; another value under a name is an error.
    fn raw(&mut self, head: &str, body: String, doc: Option<&str>) -> Result<()> {
        let name = head.split('(').next().unwrap_or(head);
        match self.macros.get(name) {
            Some(old) if *old == body => return Ok(()),
            Some(old) => bail!("{name} would be both {old} and {body}"),
            None => {}
        }
        if let Some(doc) = doc {
            self.comment(doc);
        }
        writeln!(self.text, "#define {head} {body}")?;
        self.macros.insert(name.to_owned(), body);
        Ok(())
    }

    fn define(&mut self, name: &str, value: u64, doc: Option<&str>) -> Result<()> {
        self.raw(&format!("NUMAGPU_{name}"), literal(value), doc)
    }

    fn block(&mut self, bar: u8, block: &Block) -> Result<()> {
        let name = block.name;
        self.section(&format!("{name}, BAR {bar}: {}", block.doc));
        self.define(&format!("BLOCK_{name}_BAR"), bar.into(), None)?;
        self.define(&format!("BLOCK_{name}_BASE"), block.base.into(), None)?;
        self.define(&format!("BLOCK_{name}_STRIDE"), block.stride.into(), None)?;
        self.define(&format!("BLOCK_{name}_COUNT"), block.count.into(), None)?;
        for reg in block.regs {
            self.register(block, reg)?;
        }
        Ok(())
    }

    fn register(&mut self, block: &Block, reg: &Reg) -> Result<()> {
        let name = format!("{}_{}", block.name, reg.name);
        let doc = format!("{name}: {}; {}", reg.doc, access(reg));
        let first = block
            .base
            .checked_add(reg.offset)
            .with_context(|| format!("{name} is nowhere"))?;
        let first = literal(first.into());
        if block.count == 1 {
            self.raw(&format!("NUMAGPU_{name}"), first, Some(&doc))?;
        } else {
            let body = format!("({first} + {} * (i))", literal(block.stride.into()));
            self.raw(&format!("NUMAGPU_{name}(i)"), body, Some(&doc))?;
        }
        self.define(&format!("{name}_BYTES"), reg.width.bytes().into(), None)?;
        for (suffix, value) in [
            ("WRITABLE", reg.writable),
            ("W1C", reg.w1c),
            ("RESET", reg.reset),
        ] {
            if value != 0 {
                self.define(&format!("{name}_{suffix}"), value, None)?;
            }
        }
        Ok(())
    }

    fn packet(&mut self, packet: &Packet) -> Result<()> {
        let name = format!("SDMA_{}", packet.name);
        let doc = format!("{}: {}", packet.name, packet.doc);
        let first = u64::from(packet.op) | u64::from(packet.sub_op) << 8;
        self.define(&format!("{name}_FIRST"), first, Some(&doc))?;
        for (word, index) in packet.words.iter().zip(0..) {
            self.define(&format!("{name}_WORD_{word}"), index, None)?;
        }
        Ok(())
    }
}

/// A number in C, unsigned: small ones decimal.
fn literal(value: u64) -> String {
    match value {
        0..=9 => format!("{value}u"),
        _ if u32::try_from(value).is_ok() => format!("{value:#x}u"),
        _ => format!("{value:#x}ull"),
    }
}

/// `UpperCase` as `UPPER_CASE`.
fn upper(name: &str) -> String {
    let mut text = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.push(letter.to_ascii_uppercase());
    }
    text
}

/// What the sources of the tables define.
#[derive(Default)]
struct Sources {
    comments: Vec<Comments>,
    /// Numbers with their comments.
    numbers: BTreeMap<String, String>,
    /// Enums and flags.
    types: Vec<String>,
    /// Constants that are blocks.
    blocks: usize,
}

impl Sources {
    /// Reads every file below `dir`.
    fn read(dir: &Path) -> Result<Self> {
        let mut sources = Self::default();
        for path in files(dir)? {
            let understood = || format!("{} is not understood", path.display());
            let text = std::fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let comments = Comments::read(&text).with_context(understood)?;
            let tokens = TokenStream::from_str(&text).map_err(|error| anyhow!("{error}"));
            sources
                .collect(&tokens.with_context(understood)?, "", &comments)
                .with_context(understood)?;
            sources.comments.push(comments);
        }
        Ok(sources)
    }

    /// Adds what `tokens`, within the module `outer`, define.
    fn collect(&mut self, tokens: &TokenStream, outer: &str, comments: &Comments) -> Result<()> {
        let tokens: Vec<TokenTree> = tokens.clone().into_iter().collect();
        let word = |at: usize| match tokens.get(at) {
            Some(TokenTree::Ident(word)) => word.to_string(),
            Some(TokenTree::Punct(mark)) => mark.as_char().to_string(),
            _ => String::new(),
        };
        for at in 0..tokens.len() {
            let (name, kind) = (word(at + 1), word(at + 3));
            match word(at).as_str() {
                "const" if word(at + 2) == ":" && kind == "Block" => self.blocks += 1,
                // Base and stride of a block are in its table.
                "const"
                    if word(at + 2) == ":"
                        && at > 0
                        && word(at - 1) == "pub"
                        && INTEGERS.contains(&kind.as_str())
                        && !["BASE", "STRIDE"].contains(&name.as_str()) =>
                {
                    let doc = comments.on(&inside(outer, &name))?.to_owned();
                    let earlier = self.numbers.insert(name.clone(), doc);
                    ensure!(earlier.is_none(), "{name} is there twice");
                }
                "enum" if at > 0 && word(at - 1) == "pub" => self.types.push(name),
                _ => {}
            }
            let Some(TokenTree::Group(group)) = tokens.get(at) else {
                continue;
            };
            if group.delimiter() != Delimiter::Brace || at < 2 {
                continue;
            }
            match (word(at - 2).as_str(), word(at - 1).as_str()) {
                ("mod", module) => {
                    let module = inside(outer, module);
                    self.collect(&group.stream(), &module, comments)?;
                }
                ("bitflags", "!") => self.types.extend(defined_by_macro(group.stream())),
                _ => {}
            }
        }
        Ok(())
    }

    /// Fails if the header would lack something.
    fn all_listed(&self) -> Result<()> {
        let listed: Vec<&str> = numbers().iter().map(|number| number.name).collect();
        for name in self.numbers.keys() {
            ensure!(
                listed.contains(&name.as_str()),
                "{name} is not in the header: add it to numbers()"
            );
        }
        let (codes, flags) = (codes(), flags());
        for name in &self.types {
            let listed = codes.iter().chain(&flags).any(|(listed, _)| listed == name);
            // How wide a register is shows in the header as a number.
            ensure!(
                listed || name == "Width",
                "{name} is not in the header: add it to codes() or flags()"
            );
        }
        let listed = blocks().count();
        ensure!(
            self.blocks == listed,
            "{} blocks, but {listed} are in the header: see blocks()",
            self.blocks
        );
        let ops: Vec<u64> = sdma::PACKETS
            .iter()
            .map(|packet| packet.op.into())
            .collect();
        for number in numbers() {
            let is_op = number.prefix == "SDMA_" && number.name.starts_with("OP_");
            ensure!(
                !is_op || ops.contains(&number.value),
                "{} has no packet",
                number.name
            );
        }
        Ok(())
    }

    fn doc_of_number(&self, name: &str) -> Result<&str> {
        let doc = self.numbers.get(name).map(String::as_str);
        doc.with_context(|| format!("{name} is listed, but no source has it"))
    }

    /// What stands on the enum, the flags or a variant of them.
    fn doc_of(&self, path: &str) -> Result<&str> {
        let mut found = self.comments.iter().filter_map(|file| file.on(path).ok());
        found
            .next()
            .with_context(|| format!("no doc comment on {path}"))
    }
}

/// The path of `name` in the module `outer`.
fn inside(outer: &str, name: &str) -> String {
    match outer {
        "" => name.to_owned(),
        outer => format!("{outer}::{name}"),
    }
}

/// The type that `bitflags!` defines: the last word before the colon.
fn defined_by_macro(tokens: TokenStream) -> Option<String> {
    let mut last = None;
    for token in tokens {
        match token {
            TokenTree::Ident(word) => last = Some(word.to_string()),
            TokenTree::Punct(mark) if mark.as_char() == ':' => break,
            _ => {}
        }
    }
    last
}

/// Every file below a directory, in order of names.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collected(text: &str) -> Result<Sources> {
        let mut sources = Sources::default();
        let comments = Comments::read(text).unwrap();
        sources.collect(&TokenStream::from_str(text).unwrap(), "", &comments)?;
        Ok(sources)
    }

    #[test]
    fn what_a_source_defines_and_the_header_lacks_is_an_error() {
        for (text, name) in [
            ("/// New.\npub const NEW: u16 = 1;", "NEW"),
            (
                "/// In.\npub mod inner { /// New.\npub const NEW: u64 = 1; }",
                "NEW",
            ),
            (
                "bitflags! { /// New.\n pub struct Fresh: u32 { const ONE = 1; } }",
                "Fresh",
            ),
            ("/// New.\n pub enum Fresh { One }", "Fresh"),
            ("/// New.\n pub const BLOCK: Block = Block {};", "1 blocks"),
        ] {
            let error = collected(text).unwrap().all_listed().unwrap_err();
            assert!(error.to_string().contains(name), "{text}: {error}");
        }
        assert!(collected("pub const NEW: u32 = 1;").is_err(), "no comment");
    }

    #[test]
    fn two_values_under_one_name_are_an_error() {
        let mut header = Header::default();
        header.define("A", 1, None).unwrap();
        header.define("A", 1, None).unwrap();
        assert_eq!(header.text.matches("NUMAGPU_A").count(), 1);
        assert!(header.define("A", 2, None).is_err());
    }

    #[test]
    fn names_and_numbers_are_as_in_c() {
        assert_eq!(upper("NoFd"), "NO_FD");
        assert_eq!(literal(8), "8u");
        assert_eq!(literal(0xffff_ffff), "0xffffffffu");
        assert_eq!(literal(1 << 32), "0x100000000ull");
    }

    #[test]
    fn no_text_ends_its_comment() {
        let mut header = Header::default();
        header.section("a */ b");
        assert_eq!(header.text, "\n/* a * / b */\n");
    }
}
