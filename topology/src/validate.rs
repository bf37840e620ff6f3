//! Checks of a description that need no addresses.

use std::collections::BTreeMap;

use toml::Spanned;

use crate::error::MachineError;
use crate::machine::{Cpus, Exposure, MAX_CPUS, Machine, PciNode};
use crate::size::{MIB, Size, TIB};

/// Linux makes dax devices of multiples of 2 MiB only (`drivers/dax/hmem`, PMD_SIZE), and QEMU's `sp-mem` refuses
/// anything else.
pub(crate) const HBM_UNIT: u64 = 2 * MIB;
/// Most nodes that Linux takes: `NODES_SHIFT=10` is the most x86-64 can be configured for, and what Debian has.
pub(crate) const MAX_NODES: usize = 1024;
/// Links that a GPU's registers have room for.
const MAX_LINKS: usize = 32;
/// More RAM than any x86-64 guest has, and far from the end of its addresses.
const MAX_RAM: u64 = 64 * TIB;

/// One end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum End {
    /// Index of a CPU node.
    Cpu(usize),
    /// Index of a GPU.
    Gpu(usize),
}

/// What validation has worked out.
pub(crate) struct Checked {
    /// Ids of the GPUs.
    pub ids: Vec<String>,
    /// CPUs of each CPU node.
    pub cpus: Vec<Vec<u32>>,
    /// Ends of each link.
    pub links: Vec<(End, End)>,
}

type Check<T> = Result<T, MachineError>;

/// An error at a value.
pub(crate) fn wrong<T>(
    machine: &Machine,
    at: &Spanned<T>,
    key: impl Into<String>,
    message: impl Into<String>,
    help: Option<String>,
) -> MachineError {
    machine.text.error(at.span().start, key, message, help)
}

/// Checks all that needs no addresses.
pub(crate) fn check(machine: &Machine) -> Check<Checked> {
    if machine.name.get_ref().trim().is_empty() {
        return Err(wrong(
            machine,
            &machine.name,
            "name",
            "is empty",
            Some("a word such as \"two-gpu\"".to_owned()),
        ));
    }
    let cpus = check_cpus(machine)?;
    let ids = check_gpus(machine)?;
    let links = check_links(machine, &ids)?;
    check_limits(machine)?;
    let nodes = check_nodes(machine)?;
    check_distances(machine, nodes)?;
    Ok(Checked { ids, cpus, links })
}

/// Counts the proximity domains.
fn check_nodes(machine: &Machine) -> Check<usize> {
    let cpus = machine.cpu.len();
    let too_many = |offset: usize, key: String, nodes: usize| {
        let message = format!(
            "is proximity domain {nodes}, and Linux has at most {MAX_NODES} nodes (NODES_SHIFT=10)"
        );
        let help = "each CPU node and each HBM partition is one".to_owned();
        Err(machine.text.error(offset, key, message, Some(help)))
    };
    if let Some(node) = machine.cpu.get(MAX_NODES) {
        let key = format!("cpu[{MAX_NODES}]");
        return too_many(node.span().start, key, MAX_NODES + 1);
    }
    let mut nodes = cpus;
    for (index, gpu) in machine.gpu.iter().enumerate() {
        nodes = nodes.saturating_add(*gpu.get_ref().partitions.get_ref() as usize);
        if nodes > MAX_NODES {
            return too_many(gpu.span().start, format!("gpu[{index}]"), nodes);
        }
    }
    Ok(nodes)
}

/// What would be `unit`-aligned and not less than `bytes`.
pub(crate) fn would_fit(bytes: u64, unit: u64) -> Option<String> {
    bytes
        .max(1)
        .checked_next_multiple_of(unit)
        .map(|fits| format!("{} would fit", Size(fits)))
}

/// `cpu0 to cpu3`, or `cpu0` where there is one.
fn first_to_last(prefix: &str, count: usize) -> String {
    match count {
        1 => format!("{prefix}0"),
        _ => format!("{prefix}0 to {prefix}{}", count.saturating_sub(1)),
    }
}

fn check_cpus(machine: &Machine) -> Check<Vec<Vec<u32>>> {
    if machine.cpu.is_empty() {
        let help = Some("add a table [[cpu]] with cpus and memory".to_owned());
        return Err(machine
            .text
            .error(0, "cpu", "the machine has no CPU node", help));
    }
    let mut owner: BTreeMap<u32, usize> = BTreeMap::new();
    let mut all = Vec::new();
    for (index, node) in machine.cpu.iter().enumerate() {
        let node = node.get_ref();
        let key = format!("cpu[{index}]");
        let next = owner
            .keys()
            .next_back()
            .map_or(0, |last| last.saturating_add(1));
        let cpus: Vec<u32> = match node.cpus.get_ref() {
            Cpus::Count(count) => (next..next.saturating_add(*count)).collect(),
            Cpus::List(cpus) => cpus.clone(),
        };
        for cpu in &cpus {
            if let Some(other) = owner.insert(*cpu, index) {
                let message = format!("CPU {cpu} is in cpu[{other}] already");
                let help = format!("the first number that no node before has is {next}");
                return Err(wrong(
                    machine,
                    &node.cpus,
                    format!("{key}.cpus"),
                    message,
                    Some(help),
                ));
            }
        }
        if owner.len() > MAX_CPUS as usize {
            let message = format!("makes {} CPUs; q35 has at most {MAX_CPUS}", owner.len());
            return Err(wrong(
                machine,
                &node.cpus,
                format!("{key}.cpus"),
                message,
                None,
            ));
        }
        let memory = node.memory.get_ref().0;
        if memory == 0 || !memory.is_multiple_of(HBM_UNIT) {
            return Err(wrong(
                machine,
                &node.memory,
                format!("{key}.memory"),
                format!("{memory} bytes is not a positive multiple of 2 MiB"),
                would_fit(memory, HBM_UNIT),
            ));
        }
        all.push(cpus);
    }
    for (expected, (cpu, node)) in (0u32..).zip(&owner) {
        if *cpu == expected {
            continue;
        }
        let offset = machine
            .cpu
            .get(*node)
            .map_or(0, |node| node.get_ref().cpus.span().start);
        let message = format!("has CPU {cpu}, but no node has CPU {expected}");
        let help = "CPUs are numbered from 0 without holes, over all nodes".to_owned();
        return Err(machine
            .text
            .error(offset, format!("cpu[{node}].cpus"), message, Some(help)));
    }
    let mut total = 0u64;
    for (index, node) in machine.cpu.iter().enumerate() {
        let memory = &node.get_ref().memory;
        total = total.saturating_add(memory.get_ref().0);
        if total > MAX_RAM {
            let message = format!(
                "brings the machine's RAM to {}; at most {} can be planned",
                Size(total),
                Size(MAX_RAM)
            );
            return Err(wrong(
                machine,
                memory,
                format!("cpu[{index}].memory"),
                message,
                None,
            ));
        }
    }
    Ok(all)
}

fn check_gpus(machine: &Machine) -> Check<Vec<String>> {
    let mut ids: Vec<String> = Vec::new();
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let mut buses: BTreeMap<u32, usize> = BTreeMap::new();
    for (index, spanned) in machine.gpu.iter().enumerate() {
        let gpu = spanned.get_ref();
        let key = |name: &str| format!("gpu[{index}].{name}");
        let id = gpu
            .id
            .as_ref()
            .map_or_else(|| format!("gpu{index}"), |id| id.get_ref().clone());
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if let Some(at) = &gpu.id
            && (!id.starts_with(|c: char| c.is_ascii_alphabetic())
                || !id.chars().all(plain)
                || id.len() > 32)
        {
            let message = format!("`{id}` is not a name that can be used for files and objects");
            let help = "1 to 32 letters, digits, - and _, a letter first".to_owned();
            return Err(wrong(machine, at, key("id"), message, Some(help)));
        }
        let at = gpu
            .id
            .as_ref()
            .map_or(spanned.span().start, |id| id.span().start);
        if let Some(other) = known.insert(id.clone(), index) {
            let (message, help) = if gpu.id.is_some() {
                (format!("gpu[{other}] is named `{id}` already"), None)
            } else {
                let message = format!("is `{id}` by default, but gpu[{other}] is named so");
                (message, Some("give this GPU an id".to_owned()))
            };
            return Err(machine.text.error(at, key("id"), message, help));
        }
        let number = id.strip_prefix("cpu").unwrap_or_default();
        if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            let message = format!("`{id}` would be mistaken for a CPU node in links");
            let help = "any name but cpu and a number".to_owned();
            return Err(machine.text.error(at, key("id"), message, Some(help)));
        }
        ids.push(id);
        let partitions = *gpu.partitions.get_ref();
        if !(1..=8).contains(&partitions) {
            let message = format!("{partitions} partitions; a GPU has 1 to 8");
            return Err(wrong(
                machine,
                &gpu.partitions,
                key("partitions"),
                message,
                None,
            ));
        }
        let unit = HBM_UNIT * u64::from(partitions);
        let hbm = *gpu.hbm.get_ref();
        if hbm.0 == 0 || !hbm.0.is_multiple_of(unit) {
            return Err(wrong(
                machine,
                &gpu.hbm,
                key("hbm"),
                match partitions {
                    1 => format!("{} bytes is not a positive multiple of 2 MiB", hbm.0),
                    _ => format!(
                        "{} bytes cannot be {partitions} partitions that are positive multiples of 2 MiB",
                        hbm.0
                    ),
                },
                would_fit(hbm.0, unit),
            ));
        }
        if *gpu.cpu.get_ref() >= machine.cpu.len() {
            return Err(wrong(
                machine,
                &gpu.cpu,
                key("cpu"),
                format!(
                    "there is no CPU node {}; the machine has {}",
                    gpu.cpu.get_ref(),
                    machine.cpu.len()
                ),
                Some(format!(
                    "they are numbered {}, in the order of the [[cpu]] tables",
                    first_to_last("", machine.cpu.len())
                )),
            ));
        }
        if *gpu.exposure.get_ref() != Exposure::Spm {
            let message = format!(
                "exposure `{}` cannot be planned by this version",
                gpu.exposure.get_ref()
            );
            let help = Some(
                "`spm` can: soft-reserved memory with a proximity domain of its own".to_owned(),
            );
            return Err(wrong(
                machine,
                &gpu.exposure,
                key("exposure"),
                message,
                help,
            ));
        }
        if *gpu.pci_node.get_ref() == PciNode::Hbm && !gpu.generic_initiator {
            return Err(wrong(
                machine,
                &gpu.pci_node,
                key("pci_node"),
                "is `hbm`, but without a Generic Initiator that node is not online when Linux boots",
                Some("set generic_initiator = true, or pci_node = \"cpu\"".to_owned()),
            ));
        }
        if let Some(bus) = &gpu.bus {
            let number = *bus.get_ref();
            if !(2..=255).contains(&number) {
                let message = format!("bus {number} is not in 2 to 255");
                let help = "0 is the root bus, and the GPU's expander bridge takes the bus before"
                    .to_owned();
                return Err(wrong(machine, bus, key("bus"), message, Some(help)));
            }
            // The expander bridge takes the number before.
            for taken in [number - 1, number] {
                if let Some(other) = buses.insert(taken, index) {
                    let message =
                        format!("{number:#x} needs bus {taken:#x}, which is gpu[{other}]'s");
                    let help = Some(
                        "each GPU takes its bus and the one before, for its expander bridge"
                            .to_owned(),
                    );
                    return Err(wrong(machine, bus, key("bus"), message, help));
                }
            }
        }
    }
    Ok(ids)
}

fn check_links(machine: &Machine, ids: &[String]) -> Check<Vec<(End, End)>> {
    let by_id: BTreeMap<&str, usize> = ids.iter().map(String::as_str).zip(0..).collect();
    let mut seen: BTreeMap<(End, End), usize> = BTreeMap::new();
    let mut degree: BTreeMap<End, usize> = BTreeMap::new();
    let mut ends = Vec::new();
    for (index, spanned) in machine.link.iter().enumerate() {
        let link = spanned.get_ref();
        let end = |name: &Spanned<String>, which: &str| {
            let text = name.get_ref();
            if let Some(gpu) = by_id.get(text.as_str()) {
                return Ok(End::Gpu(*gpu));
            }
            let cpu = text
                .strip_prefix("cpu")
                .and_then(|number| number.parse::<usize>().ok());
            cpu.filter(|cpu| *cpu < machine.cpu.len())
                .map(End::Cpu)
                .ok_or_else(|| {
                    let message = format!("there is no `{text}`");
                    let mut ends: Vec<&str> = ids.iter().map(String::as_str).collect();
                    if ends.len() > 16 {
                        ends.truncate(16);
                        ends.push("...");
                    }
                    let cpus = first_to_last("cpu", machine.cpu.len());
                    ends.push(&cpus);
                    let help = Some(format!("an end is one of {}", ends.join(", ")));
                    wrong(
                        machine,
                        name,
                        format!("link[{index}].{which}"),
                        message,
                        help,
                    )
                })
        };
        let (from, to) = (end(&link.from, "from")?, end(&link.to, "to")?);
        let key = format!("link[{index}]");
        if from == to {
            let message = format!("joins `{}` with itself", link.from.get_ref());
            return Err(wrong(machine, &link.to, format!("{key}.to"), message, None));
        }
        if matches!((from, to), (End::Cpu(_), End::Cpu(_))) {
            let message = "joins two CPU nodes; one end has to be a GPU".to_owned();
            let help = "distances.cpu_cpu says how far CPU nodes are from each other".to_owned();
            return Err(wrong(
                machine,
                &link.to,
                format!("{key}.to"),
                message,
                Some(help),
            ));
        }
        if !(1..=64).contains(link.count.get_ref()) {
            let message = format!("{} links in parallel; 1 to 64 can be", link.count.get_ref());
            return Err(wrong(
                machine,
                &link.count,
                format!("{key}.count"),
                message,
                None,
            ));
        }
        if let Some(other) = seen.insert((from.min(to), from.max(to)), index) {
            let message = format!(
                "link[{other}] joins `{}` and `{}` already",
                link.from.get_ref(),
                link.to.get_ref()
            );
            let help = Some("links in parallel are one entry with `count`".to_owned());
            return Err(wrong(machine, spanned, key, message, help));
        }
        for (end, name) in [(from, &link.from), (to, &link.to)] {
            let links = degree.entry(end).or_insert(0usize);
            *links += 1;
            if matches!(end, End::Gpu(_)) && *links > MAX_LINKS {
                let message = format!(
                    "is one more than the {MAX_LINKS} links that `{}` can have",
                    name.get_ref()
                );
                return Err(wrong(machine, spanned, key, message, None));
            }
        }
        ends.push((from, to));
    }
    Ok(ends)
}

fn check_limits(machine: &Machine) -> Check<()> {
    let bits = &machine.limits.phys_bits;
    if !(36..=52).contains(bits.get_ref()) {
        let message = format!(
            "{} physical address bits; x86-64 has 36 to 52",
            bits.get_ref()
        );
        return Err(wrong(machine, bits, "limits.phys_bits", message, None));
    }
    let align = &machine.placement.align;
    if !align.get_ref().0.is_power_of_two() || align.get_ref().0 < HBM_UNIT {
        let message = format!("{} is not a power of two from 2 MiB up", align.get_ref());
        let help = Some("2GiB is the default, and satisfies every rule of Linux".to_owned());
        return Err(wrong(machine, align, "placement.align", message, help));
    }
    let gap = &machine.placement.gap;
    if gap.get_ref().0 < HBM_UNIT
        || !gap.get_ref().0.is_multiple_of(HBM_UNIT)
        || gap.get_ref().0 > 1 << 46
    {
        let message = format!(
            "{} is not a multiple of 2 MiB from 2 MiB to 64 TiB",
            gap.get_ref()
        );
        let help = Some(
            "firmware merges ranges that touch, and credits one GPU's HBM to another".to_owned(),
        );
        return Err(wrong(machine, gap, "placement.gap", message, help));
    }
    Ok(())
}

fn check_distances(machine: &Machine, nodes: usize) -> Check<()> {
    let distances = &machine.distances;
    let rules = [
        ("cpu_cpu", &distances.cpu_cpu),
        ("cpu_hbm_local", &distances.cpu_hbm_local),
        ("cpu_hbm_remote", &distances.cpu_hbm_remote),
        ("hbm_hbm_same_gpu", &distances.hbm_hbm_same_gpu),
        ("hbm_hbm_linked", &distances.hbm_hbm_linked),
        ("hbm_hbm", &distances.hbm_hbm),
    ];
    for (name, value) in rules {
        if !(11..=255).contains(value.get_ref()) {
            let message = format!("{} is not a distance between nodes", value.get_ref());
            let help = Some(
                "11 to 254, or 255 for what cannot be reached; Linux ignores a table with others"
                    .to_owned(),
            );
            return Err(wrong(
                machine,
                value,
                format!("distances.{name}"),
                message,
                help,
            ));
        }
    }
    let Some(matrix) = &distances.matrix else {
        return Ok(());
    };
    let rows = matrix.get_ref();
    let help = || {
        Some(format!(
            "{nodes} rows of {nodes}: one for each CPU node, then one for each HBM partition"
        ))
    };
    if rows.len() != nodes {
        let message = format!("has {} row(s) for {nodes} nodes", rows.len());
        return Err(wrong(machine, matrix, "distances.matrix", message, help()));
    }
    if let Some((row, values)) = rows.iter().enumerate().find(|(_, row)| row.len() != nodes) {
        let message = format!("row {row} has {} value(s) for {nodes} nodes", values.len());
        return Err(wrong(machine, matrix, "distances.matrix", message, help()));
    }
    for (from, row) in rows.iter().enumerate() {
        for (to, value) in row.iter().enumerate() {
            let allowed = if from == to { 10..=10 } else { 11..=255 };
            if !allowed.contains(value) {
                let message = format!(
                    "row {from}, column {to} is {value}; it has to be {}",
                    if from == to {
                        "10, a node's distance to itself"
                    } else {
                        "11 to 255"
                    }
                );
                return Err(wrong(machine, matrix, "distances.matrix", message, None));
            }
        }
    }
    Ok(())
}
