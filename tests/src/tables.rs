//! ACPI tables, decoded: whoever wrote them, they are compared as what they say.

use std::collections::BTreeMap;

use numagpu_topology::linux::access;
use numagpu_topology::ranges::Range;

/// Bytes of a table's header (ACPI 6.5, section 5.2.6).
const HEADER: usize = 36;

/// A number of 1 to 8 bytes, lowest first.
///
/// # Panics
/// If the table ends before it.
#[track_caller]
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len);
    let field = field.unwrap_or_else(|| panic!("{len} bytes at {at} of {}", bytes.len()));
    field
        .iter()
        .rev()
        .fold(0, |all, byte| (all << 8) | u64::from(*byte))
}

#[track_caller]
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::try_from(number(bytes, at, 4)).expect("four bytes")
}

/// The table of that signature in what QEMU hands to firmware: tables one after the other, with zeros between some.
///
/// # Panics
/// If what is there is not tables.
#[must_use]
pub fn find<'a>(mut tables: &'a [u8], signature: &str) -> Option<&'a [u8]> {
    loop {
        let start = tables.iter().position(|byte| *byte != 0)?;
        tables = tables.split_at(start).1;
        let name = tables.get(..4)?;
        assert!(name.is_ascii(), "no table at {name:?}");
        let length = usize::try_from(number(tables, 4, 4)).expect("a length");
        let (table, rest) = tables
            .split_at_checked(length.max(8))
            .expect("a whole table");
        if name == signature.as_bytes() {
            return Some(table);
        }
        tables = rest;
    }
}

/// An entry of the SRAT that is enabled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Affinity {
    /// Of a processor.
    Processor {
        /// APIC id.
        apic: u32,
        /// Proximity domain.
        pxm: u32,
    },
    /// Of memory.
    Memory {
        /// Proximity domain.
        pxm: u32,
        /// Addresses.
        range: Range,
        /// Whether it is marked as hot-pluggable.
        hotplug: bool,
    },
    /// Of a Generic Initiator.
    Initiator {
        /// Proximity domain.
        pxm: u32,
        /// PCI bus.
        bus: u8,
    },
}

/// Enabled entries of an SRAT in order (ACPI 6.5, section 5.2.16).
///
/// # Panics
/// If it is malformed, has entries of other types, or a range that is disabled and not empty.
#[must_use]
#[track_caller]
pub fn srat(table: &[u8]) -> Vec<Affinity> {
    let mut entries = Vec::new();
    let mut rest = table.split_at(HEADER + 12).1;
    while !rest.is_empty() {
        let length = usize::try_from(number(rest, 1, 1)).expect("a length");
        let (entry, more) = rest.split_at_checked(length).expect("a whole entry");
        rest = more;
        let is_enabled = |at: usize| word(entry, at) & 1 == 1;
        match (number(entry, 0, 1), length) {
            (0, 16) => {
                let pxm = number(entry, 2, 1) | (number(entry, 9, 3) << 8);
                let apic = u32::try_from(number(entry, 3, 1)).expect("a byte");
                let pxm = u32::try_from(pxm).expect("four bytes");
                entries.extend(is_enabled(4).then_some(Affinity::Processor { apic, pxm }));
            }
            (2, 24) => {
                let (pxm, apic) = (word(entry, 4), word(entry, 8));
                entries.extend(is_enabled(12).then_some(Affinity::Processor { apic, pxm }));
            }
            (1, 40) => {
                let range = Range {
                    base: number(entry, 8, 8),
                    size: number(entry, 16, 8),
                };
                assert!(is_enabled(28) || range.size == 0, "{range:x?} is disabled");
                entries.extend(is_enabled(28).then_some(Affinity::Memory {
                    pxm: word(entry, 2),
                    range,
                    hotplug: word(entry, 28) & 2 != 0,
                }));
            }
            (5, 32) => {
                let (pxm, bus) = (word(entry, 4), number(entry, 10, 1));
                let bus = u8::try_from(bus).expect("a byte");
                entries.extend(is_enabled(24).then_some(Affinity::Initiator { pxm, bus }));
            }
            other => panic!("an entry of type and length {other:?}"),
        }
    }
    entries
}

/// Rows of a SLIT (ACPI 6.5, section 5.2.17).
///
/// # Panics
/// If it is not as long as it says.
#[must_use]
#[track_caller]
pub fn slit(table: &[u8]) -> Vec<Vec<u8>> {
    let count = usize::try_from(number(table, HEADER, 8)).expect("a count");
    let matrix = table.split_at(HEADER + 8).1;
    assert_eq!(matrix.len(), count * count);
    matrix.chunks(count.max(1)).map(<[u8]>::to_vec).collect()
}

/// What an HMAT says of memory itself (ACPI 6.5, section 5.2.28).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hmat {
    /// (domain of the memory, domain of its processor) of every domain that has a structure of type 0.
    pub attached: Vec<(u32, Option<u32>)>,
    /// (initiator, target, picoseconds) of every pair with a latency.
    pub latencies: Vec<(u32, u32, u64)>,
    /// (initiator, target, MB/s) of every pair with a bandwidth.
    pub bandwidths: Vec<(u32, u32, u64)>,
    /// Initiators of the matrices.
    pub initiators: Vec<u32>,
}

impl Hmat {
    /// The same as Linux reads it. Initiators that a structure of type 0 names have CPUs.
    #[must_use]
    pub fn reads(&self) -> access::Hmat {
        let attached = self.attached.iter();
        let attached: BTreeMap<u32, u32> = attached
            .filter_map(|(memory, processor)| Some((*memory, (*processor)?)))
            .collect();
        let matrix = |values: &[(u32, u32, u64)]| {
            let pairs = values.iter();
            pairs
                .map(|(from, to, value)| ((*from, *to), *value))
                .collect()
        };
        let has_cpus = |pxm: &u32| attached.values().any(|processor| processor == pxm);
        access::Hmat {
            initiators: self
                .initiators
                .iter()
                .map(|pxm| (*pxm, has_cpus(pxm)))
                .collect(),
            latency_ps: matrix(&self.latencies),
            bandwidth_mbs: matrix(&self.bandwidths),
            attached,
        }
    }
}

/// The contents of an HMAT of revision 2.
///
/// # Panics
/// If it is malformed, or has structures that neither QEMU nor we write.
#[must_use]
#[track_caller]
pub fn hmat(table: &[u8]) -> Hmat {
    assert_eq!(number(table, 8, 1), 2, "the HMAT's revision");
    let mut hmat = Hmat::default();
    let mut rest = table.split_at(HEADER + 4).1;
    while !rest.is_empty() {
        let length = usize::try_from(number(rest, 4, 4)).expect("a length");
        let (body, more) = rest.split_at_checked(length).expect("a whole structure");
        rest = more;
        match (number(body, 0, 2), length) {
            (0, 40) => {
                let processor = (number(body, 8, 2) & 1 == 1).then(|| word(body, 12));
                hmat.attached.push((word(body, 16), processor));
            }
            (1, _) => locality(body, &mut hmat),
            other => panic!("a structure of type and length {other:?}"),
        }
    }
    hmat
}

fn locality(body: &[u8], hmat: &mut Hmat) {
    assert_eq!(number(body, 8, 1), 0, "of memory, not of a cache");
    let (from, to) = (word(body, 12) as usize, word(body, 16) as usize);
    let unit = number(body, 24, 8);
    let initiators: Vec<u32> = (0..from).map(|i| word(body, 32 + 4 * i)).collect();
    let targets: Vec<u32> = (from..from + to).map(|i| word(body, 32 + 4 * i)).collect();
    let entries = 32 + 4 * (from + to);
    assert_eq!(body.len(), entries + 2 * from * to);
    let pairs = initiators
        .iter()
        .flat_map(|from| targets.iter().map(move |to| (*from, *to)));
    let values = pairs.enumerate().filter_map(|(i, (from, to))| {
        // 0 and 0xffff both say that nothing is known (Linux reads them so).
        let entry = number(body, entries + 2 * i, 2);
        let is_known = entry != 0 && entry != 0xffff;
        is_known.then_some((from, to, entry * unit))
    });
    match number(body, 9, 1) {
        0 => hmat.latencies.extend(values),
        3 => hmat.bandwidths.extend(values),
        other => panic!("a matrix of data type {other}"),
    }
    hmat.initiators = initiators;
}
