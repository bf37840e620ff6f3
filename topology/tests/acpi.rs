//! ACPI tables of presets and of other machines: well formed, and read by Linux's rules they say what the plan says.
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test fails by panicking"
)]

use numagpu_topology::acpi::{Table, tables};
use numagpu_topology::linux::node_numbers;
use numagpu_topology::machine::Exposure;
use numagpu_topology::{Plan, parse, plan, preset};

fn planned(name: &str, text: &str) -> Plan {
    plan(&parse(name, text).unwrap()).unwrap()
}

/// Presets, and machines that have what presets have not.
fn machines() -> Vec<Plan> {
    let cpu = |cpus: &str| {
        format!(
            "[[cpu]]\ncpus = {cpus}\nmemory = \"1GiB\"\nlatency_ns = 90\nbandwidth_mbs = 40000\n"
        )
    };
    let gpu = |more: &str| {
        format!(
            "[[gpu]]\nhbm = \"8GiB\"\ncpu = 0\nhbm_latency_ns = 346\nhbm_bandwidth_mbs = 3600000\n{more}\n"
        )
    };
    let link = |a: &str, b: &str| {
        format!("[[link]]\nfrom = \"{a}\"\nto = \"{b}\"\nbandwidth_mbs = 64000\nlatency_ns = 690\n")
    };
    let mixed = format!(
        "name = \"mixed\"\n{}{}{}{}{}{}{}",
        cpu("3"),
        cpu("300"),
        gpu("partitions = 4"),
        gpu("generic_initiator = true"),
        gpu("partitions = 2\ngeneric_initiator = true\npci_node = \"hbm\""),
        link("gpu0", "gpu1"),
        link("gpu1", "cpu0"),
    );
    let interleaved = format!(
        "name = \"interleaved\"\n{}{}{}",
        cpu("\"0,2\""),
        cpu("\"1,3\""),
        gpu("")
    );
    let bare = format!("name = \"bare\"\n{}", cpu("1"));
    let presets = preset::ALL
        .iter()
        .map(|preset| planned(preset.name, preset.source));
    presets
        .chain([
            planned("mixed", &mixed),
            planned("interleaved", &interleaved),
            planned("bare", &bare),
        ])
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn find(plan: &Plan, signature: &str) -> Option<Table> {
    tables(plan)
        .into_iter()
        .find(|table| table.signature == signature)
}

/// Entries of an SRAT by type.
fn entries(srat: &[u8]) -> Vec<&[u8]> {
    let (mut at, mut all) = (48, Vec::new());
    while at < srat.len() {
        let len = usize::from(srat[at + 1]);
        all.push(&srat[at..at + len]);
        at += len;
    }
    assert_eq!(at, srat.len(), "entries end where the table ends");
    all
}

#[test]
fn headers_are_right() {
    for plan in machines() {
        for table in tables(&plan) {
            let bytes = &table.bytes;
            assert_eq!(&bytes[..4], table.signature.as_bytes());
            assert_eq!(
                u32_at(bytes, 4) as usize,
                bytes.len(),
                "{} of {}",
                table.signature,
                plan.name
            );
            let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(sum, 0, "checksum of {} of {}", table.signature, plan.name);
            let revision = match table.signature {
                "SRAT" => 3,
                "SLIT" => 1,
                _ => 2,
            };
            assert_eq!(bytes[8], revision);
        }
    }
}

#[test]
fn linux_numbers_nodes_as_planned() {
    for plan in machines() {
        let srat = find(&plan, "SRAT").unwrap().bytes;
        let entries = entries(&srat);
        let first = entries.iter().filter_map(|entry| match entry[0] {
            0 => Some(u32::from_le_bytes([
                entry[2], entry[9], entry[10], entry[11],
            ])),
            2 | 5 => Some(u32_at(entry, 4)),
            _ => None,
        });
        let second = entries
            .iter()
            .filter(|entry| entry[0] == 1)
            .map(|entry| u32_at(entry, 2));
        let numbers = node_numbers(first.collect::<Vec<_>>(), second.collect::<Vec<_>>());
        for node in &plan.nodes {
            assert_eq!(
                numbers.get(&node.pxm),
                Some(&node.linux_node),
                "PXM {} of {}",
                node.pxm,
                plan.name
            );
        }
    }
}

#[test]
fn memory_is_the_plans_byte_for_byte() {
    for plan in machines() {
        let srat = find(&plan, "SRAT").unwrap().bytes;
        let mut seen: Vec<(u32, u64, u64)> = entries(&srat)
            .iter()
            .filter(|entry| entry[0] == 1)
            .map(|entry| (u32_at(entry, 2), u64_at(entry, 8), u64_at(entry, 16)))
            .collect();
        let ranges = |node: &numagpu_topology::plan::Node| {
            node.ranges
                .iter()
                .map(|range| (node.pxm, range.base, range.size))
                .collect::<Vec<_>>()
        };
        let mut planned: Vec<(u32, u64, u64)> = plan.nodes.iter().flat_map(ranges).collect();
        seen.sort_unstable();
        planned.sort_unstable();
        assert_eq!(seen, planned);
    }
}

#[test]
fn processors_have_the_ids_that_qemu_gives() {
    let plan = machines()
        .into_iter()
        .find(|plan| plan.name == "mixed")
        .unwrap();
    // 303 CPUs that are not spread evenly: a socket each, so ids are numbers, and those over 254 need x2APIC entries.
    let srat = find(&plan, "SRAT").unwrap().bytes;
    let entries = entries(&srat);
    let kinds = |kind: u8| entries.iter().filter(|entry| entry[0] == kind).count();
    assert_eq!((kinds(0), kinds(2)), (255, 48));
    assert_eq!(
        entries
            .iter()
            .filter(|entry| entry[0] == 2)
            .map(|entry| u32_at(entry, 8))
            .next(),
        Some(255)
    );
}

#[test]
fn slit_is_the_plans() {
    for plan in machines() {
        let slit = find(&plan, "SLIT").unwrap().bytes;
        let count = plan.slit.len();
        assert_eq!(u64_at(&slit, 36), count as u64);
        assert_eq!(
            slit[44..]
                .chunks(count)
                .map(<[u8]>::to_vec)
                .collect::<Vec<_>>(),
            plan.slit
        );
    }
}

#[test]
fn hmat_says_what_is_known_and_nothing_else() {
    for plan in machines() {
        let Some(table) = find(&plan, "HMAT") else {
            assert!(plan.accesses.is_empty());
            continue;
        };
        let bytes = &table.bytes;
        let (mut at, mut seen) = (40, 0);
        while at < bytes.len() {
            let len = u32_at(bytes, at + 4) as usize;
            let entry = &bytes[at..at + len];
            at += len;
            if entry[0] == 0 {
                assert_eq!(len, 40, "Linux refuses the table otherwise");
                continue;
            }
            let (latency, initiators, targets) = (
                entry[9] == 0,
                u32_at(entry, 12) as usize,
                u32_at(entry, 16) as usize,
            );
            let unit = u64_at(entry, 24);
            assert_eq!(
                len,
                32 + 4 * initiators + 4 * targets + 2 * initiators * targets
            );
            for (i, from) in (0..initiators).map(|i| (i, u32_at(entry, 32 + 4 * i))) {
                for (t, to) in (0..targets).map(|t| (t, u32_at(entry, 32 + 4 * (initiators + t)))) {
                    let cell = 32 + 4 * (initiators + targets) + 2 * (i * targets + t);
                    let raw = u16::from_le_bytes([entry[cell], entry[cell + 1]]);
                    let value = if raw == u16::MAX {
                        0
                    } else {
                        u64::from(raw) * unit
                    };
                    let access = plan.access(from, to);
                    let planned = access.map_or(0, |access| match latency {
                        true => u64::from(access.latency_ns) * 1000,
                        false => u64::from(access.bandwidth_mbs),
                    });
                    assert_eq!(value, planned, "{from} to {to} of {}", plan.name);
                    seen += usize::from(value > 0);
                }
            }
        }
        assert_eq!(at, bytes.len());
        assert!(seen > 0);
    }
}

/// Where `needle` begins in `bytes`.
fn position(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|at| at == needle)
}

/// The number that follows a property's name in AML (ACPI 6.5, section 20.2.3).
fn property(aml: &[u8], name: &str) -> Option<u64> {
    let mut string = vec![0x0d];
    string.extend(name.bytes());
    string.push(0);
    let rest = &aml[position(aml, &string)? + string.len()..];
    let number = |len: usize| {
        let bytes = rest[1..=len].iter().rev();
        bytes.fold(0u64, |number, byte| number << 8 | u64::from(*byte))
    };
    Some(match rest[0] {
        small @ (0 | 1) => u64::from(small),
        0x0a => number(1),
        0x0b => number(2),
        0x0c => number(4),
        0x0e => number(8),
        other => panic!("{other:#x} is no number"),
    })
}

/// An SSDT in one piece for each GPU.
fn functions(ssdt: &[u8]) -> Vec<&[u8]> {
    // Every GPU has a scope of its own.
    let starts: Vec<usize> = (0..ssdt.len().saturating_sub(4))
        .filter(|at| &ssdt[*at..at + 4] == b"_SB_")
        .collect();
    let ends = starts.iter().skip(1).copied().chain([ssdt.len()]);
    starts
        .iter()
        .zip(ends)
        .map(|(at, end)| &ssdt[*at..end])
        .collect()
}

#[test]
fn drivers_for_grace_find_their_hbm() {
    // daffd814-6eba-4d8c-8a91-bc9bbf4aa301, its first three parts little-endian.
    const PROPERTIES: [u8; 16] = [
        0x14, 0xd8, 0xff, 0xda, 0xba, 0x6e, 0x8c, 0x4d, 0x8a, 0x91, 0xbc, 0x9b, 0xbf, 0x4a, 0xa3,
        0x01,
    ];
    let mut seen = 0;
    for plan in machines() {
        let Some(ssdt) = find(&plan, "SSDT") else {
            assert!(plan.gpus.is_empty());
            continue;
        };
        let functions = functions(&ssdt.bytes);
        assert_eq!(functions.len(), plan.gpus.len());
        for (gpu, aml) in plan.gpus.iter().zip(functions) {
            let bar = gpu.exposure == Exposure::Bar;
            assert_eq!(position(aml, b"_DSD").is_some(), bar, "{}", plan.name);
            assert_eq!(position(aml, &PROPERTIES).is_some(), bar);
            let value = |name: &str| property(aml, &format!("nvidia,gpu-mem-{name}"));
            if !bar {
                assert_eq!(value("base-pa"), None);
                continue;
            }
            seen += 1;
            let bytes: u64 = gpu.hbm.iter().map(|hbm| hbm.size).sum();
            assert_eq!(value("base-pa"), Some(gpu.hbm[0].base));
            assert_eq!(value("base-pa"), gpu.aperture.map(|bar| bar.base));
            assert_eq!(value("size"), Some(bytes));
            let pxms: Vec<u64> = gpu.domains.iter().map(|d| u64::from(d.pxm)).collect();
            let start = value("pxm-start").unwrap();
            let end = start + value("pxm-count").unwrap();
            assert_eq!((start..end).collect::<Vec<_>>(), pxms);
        }
    }
    assert_eq!(seen, 14, "GPUs of the Grace presets");
}

#[test]
fn gpus_beyond_the_first_segment_are_named_where_they_are() {
    let gpu = "[[gpu]]\nhbm = \"2MiB\"\ncpu = 0\nexposure = \"bar\"\ndomains = 1\n".repeat(300);
    let text = format!("name = \"many\"\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n{gpu}");
    let plan = planned("many", &text);
    let srat = find(&plan, "SRAT").unwrap().bytes;
    let seen: Vec<(u32, u16, u8)> = entries(&srat)
        .iter()
        .filter(|entry| entry[0] == 5)
        .map(|entry| {
            let segment = u16::from_le_bytes([entry[8], entry[9]]);
            (u32_at(entry, 4), segment, entry[10])
        })
        .collect();
    let mut planned: Vec<(u32, u16, u8)> = plan
        .gpus
        .iter()
        .map(|gpu| (gpu.domains[0].pxm, gpu.segment, gpu.bus))
        .collect();
    planned.sort_by_key(|(pxm, _, _)| plan.linux_node(*pxm));
    assert_eq!(seen, planned);
    assert!(planned.iter().any(|(_, segment, _)| *segment > 0));
    // More than 256, and each with a name of its own.
    let ssdt = find(&plan, "SSDT").unwrap().bytes;
    let functions = functions(&ssdt);
    assert_eq!(functions.len(), 300);
    assert!(position(functions[0], b"G000").is_some());
    assert!(position(functions[299], b"G08B").is_some());
}
