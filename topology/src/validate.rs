//! Checks of a description that need no addresses.

use std::collections::BTreeMap;

use toml::Spanned;

use crate::error::MachineError;
use crate::machine::{Cpus, Exposure, Machine, PciNode};
use crate::size::{MIB, Size};

/// Linux makes dax devices of multiples of 2 MiB only (`drivers/dax/hmem`, PMD_SIZE), and QEMU's `sp-mem` refuses
/// anything else.
pub(crate) const HBM_UNIT: u64 = 2 * MIB;
/// Most proximity domains that QEMU takes (`MAX_NODES`).
const MAX_NODES: usize = 128;

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
        return Err(wrong(machine, &machine.name, "name", "is empty", None));
    }
    let cpus = check_cpus(machine)?;
    let ids = check_gpus(machine)?;
    let links = check_links(machine, &ids)?;
    check_limits(machine)?;
    let hbm: usize = machine
        .gpu
        .iter()
        .map(|gpu| *gpu.get_ref().partitions.get_ref() as usize)
        .sum();
    let nodes = machine.cpu.len() + hbm;
    if nodes > MAX_NODES {
        return Err(machine.text.error(
            0,
            "gpu",
            format!(
                "{} CPU nodes and {hbm} HBM partitions make {nodes} proximity domains",
                machine.cpu.len()
            ),
            Some(format!("QEMU takes at most {MAX_NODES}")),
        ));
    }
    check_distances(machine, nodes)?;
    Ok(Checked { ids, cpus, links })
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
        let next = owner.keys().next_back().map_or(0, |last| last + 1);
        let cpus: Vec<u32> = match node.cpus.get_ref() {
            Cpus::Count(count) => (next..next.saturating_add(*count)).collect(),
            Cpus::List(cpus) => cpus.clone(),
        };
        for cpu in &cpus {
            if let Some(other) = owner.insert(*cpu, index) {
                let message = format!("CPU {cpu} is in cpu[{other}] already");
                return Err(wrong(
                    machine,
                    &node.cpus,
                    format!("{key}.cpus"),
                    message,
                    None,
                ));
            }
        }
        let memory = node.memory.get_ref().0;
        if memory == 0 || !memory.is_multiple_of(HBM_UNIT) {
            return Err(wrong(
                machine,
                &node.memory,
                format!("{key}.memory"),
                format!(
                    "{} ({memory} bytes) is not a positive multiple of 2 MiB",
                    node.memory.get_ref()
                ),
                Some(format!(
                    "{} would fit",
                    Size(memory.max(1).next_multiple_of(HBM_UNIT))
                )),
            ));
        }
        all.push(cpus);
    }
    let count = u32::try_from(owner.len()).unwrap_or(u32::MAX);
    if let Some(missing) = (0..count).find(|cpu| !owner.contains_key(cpu)) {
        let message =
            format!("CPU {missing} is in no node, though the {count} CPUs are numbered from 0");
        return Err(machine.text.error(0, "cpu", message, None));
    }
    let total = machine.cpu.iter().try_fold(0u64, |sum, node| {
        sum.checked_add(node.get_ref().memory.get_ref().0)
    });
    if total.is_none_or(|total| total > 1 << 46) {
        return Err(machine.text.error(
            0,
            "cpu",
            "the CPU nodes have more than 64 TiB of memory together",
            None,
        ));
    }
    Ok(all)
}

fn check_gpus(machine: &Machine) -> Check<Vec<String>> {
    let mut ids: Vec<String> = Vec::new();
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
            let message = format!(
                "`{id}` is not a name of 1 to 32 letters, digits, - and _ that starts with a letter"
            );
            return Err(wrong(machine, at, key("id"), message, None));
        }
        if ids.contains(&id) || (id.starts_with("cpu") && id.len() > 3) {
            let message = format!("`{id}` names something else already");
            return Err(wrong(machine, spanned, key("id"), message, None));
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
                format!(
                    "{hbm} ({} bytes) in {partitions} partition(s) is not a positive multiple of {} each",
                    hbm.0,
                    Size(HBM_UNIT)
                ),
                hbm.0
                    .max(1)
                    .checked_next_multiple_of(unit)
                    .map(|fits| format!("{} would fit", Size(fits))),
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
                    "CPU nodes are 0 to {}, in the order of the [[cpu]] tables",
                    machine.cpu.len().saturating_sub(1)
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
        if gpu.pci_node == PciNode::Hbm && !gpu.generic_initiator {
            return Err(wrong(
                machine,
                spanned,
                key("pci_node"),
                "is `hbm`, but nothing keeps that node online",
                Some("set generic_initiator = true, or pci_node = \"cpu\"".to_owned()),
            ));
        }
        if let Some(bus) = &gpu.bus {
            let number = *bus.get_ref();
            if !(2..=255).contains(&number) {
                let message = format!("bus {number} is not in 2 to 255");
                return Err(wrong(machine, bus, key("bus"), message, None));
            }
            // The expander bridge takes the number before.
            for taken in [number - 1, number] {
                if let Some(other) = buses.insert(taken, index) {
                    let message = format!("bus {taken} ({taken:#x}) is gpu[{other}]'s already");
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
    let mut seen: BTreeMap<(End, End), usize> = BTreeMap::new();
    let mut ends = Vec::new();
    for (index, spanned) in machine.link.iter().enumerate() {
        let link = spanned.get_ref();
        let end = |name: &Spanned<String>, which: &str| {
            let text = name.get_ref();
            if let Some(gpu) = ids.iter().position(|id| id == text) {
                return Ok(End::Gpu(gpu));
            }
            let cpu = text
                .strip_prefix("cpu")
                .and_then(|number| number.parse::<usize>().ok());
            cpu.filter(|cpu| *cpu < machine.cpu.len())
                .map(End::Cpu)
                .ok_or_else(|| {
                    let message = format!("there is no `{text}`");
                    let help = Some(format!(
                        "ends are {} and cpu0 to cpu{}",
                        ids.join(", "),
                        machine.cpu.len().saturating_sub(1)
                    ));
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
        if from == to || matches!((from, to), (End::Cpu(_), End::Cpu(_))) {
            let message = format!(
                "`{}` to `{}` is no link of a GPU",
                link.from.get_ref(),
                link.to.get_ref()
            );
            return Err(wrong(machine, spanned, key, message, None));
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
        ends.push((from, to));
    }
    for (gpu, id) in ids.iter().enumerate() {
        let degree = ends
            .iter()
            .filter(|(a, b)| *a == End::Gpu(gpu) || *b == End::Gpu(gpu))
            .count();
        if degree > 32 {
            return Err(machine.text.error(
                0,
                "link",
                format!("`{id}` has {degree} links; a GPU has at most 32"),
                None,
            ));
        }
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
        return Err(wrong(machine, align, "placement.align", message, None));
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
    if rows.len() != nodes || rows.iter().any(|row| row.len() != nodes) {
        let message =
            format!("is not {nodes} rows of {nodes}, one for each CPU node and HBM partition");
        return Err(wrong(machine, matrix, "distances.matrix", message, None));
    }
    for (from, row) in rows.iter().enumerate() {
        for (to, value) in row.iter().enumerate() {
            let allowed = if from == to { 10..=10 } else { 11..=255 };
            if !allowed.contains(value) {
                let message = format!(
                    "row {from}, column {to} is {value}; it has to be {}",
                    if from == to { "10" } else { "11 to 255" }
                );
                return Err(wrong(machine, matrix, "distances.matrix", message, None));
            }
        }
    }
    Ok(())
}
