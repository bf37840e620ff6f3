//! Checks of a description that need no addresses.

mod gpus;
mod limits;
mod links;

use std::collections::BTreeMap;

use toml::Spanned;

use crate::error::MachineError;
use crate::machine::{Cpus, Exposure, Gpu, MAX_CPUS, Machine};
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
    let ids = gpus::check_gpus(machine)?;
    check_memory(machine)?;
    let links = links::check_links(machine, &ids)?;
    limits::check_limits(machine)?;
    limits::check_backing(machine)?;
    limits::check_device(machine)?;
    let nodes = check_nodes(machine)?;
    limits::check_distances(machine, nodes)?;
    Ok(Checked { ids, cpus, links })
}

/// Counts the proximity domains.
fn check_nodes(machine: &Machine) -> Check<usize> {
    let cpus = machine.cpu.len();
    let too_many = |offset: usize, key: String, nodes: usize| {
        let message = format!(
            "is proximity domain {nodes}, and Linux has at most {MAX_NODES} nodes (NODES_SHIFT=10)"
        );
        let help = "each CPU node, memory node and HBM partition is one".to_owned();
        Err(machine.text.error(offset, key, message, Some(help)))
    };
    if let Some(node) = machine.cpu.get(MAX_NODES) {
        let key = format!("cpu[{MAX_NODES}]");
        return too_many(node.span().start, key, MAX_NODES + 1);
    }
    let mut nodes = cpus;
    for (index, node) in machine.memory.iter().enumerate() {
        nodes = nodes.saturating_add(1);
        if nodes > MAX_NODES {
            return too_many(node.span().start, format!("memory[{index}]"), nodes);
        }
    }
    for (index, gpu) in machine.gpu.iter().enumerate() {
        nodes = nodes.saturating_add(gpu.get_ref().domain_count() as usize);
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
    Ok(all)
}

/// RAM of CPU nodes and memory nodes, and which CPU node a memory node is next to.
fn check_memory(machine: &Machine) -> Check<()> {
    let positive = |at: &Spanned<Size>, key: String| {
        let memory = at.get_ref().0;
        if memory > 0 && memory.is_multiple_of(HBM_UNIT) {
            return Ok(());
        }
        let message = format!("{memory} bytes is not a positive multiple of 2 MiB");
        Err(wrong(
            machine,
            at,
            key,
            message,
            would_fit(memory, HBM_UNIT),
        ))
    };
    let mut total = 0u64;
    let mut add = |at: usize, key: String, bytes: u64| {
        total = total.saturating_add(bytes);
        if total <= MAX_RAM {
            return Ok(());
        }
        let message = format!(
            "brings the machine's RAM to {}; at most {} can be planned",
            Size(total),
            Size(MAX_RAM)
        );
        Err(machine.text.error(at, key, message, None))
    };
    for (index, node) in machine.cpu.iter().enumerate() {
        let key = format!("cpu[{index}].memory");
        let brings = |gpu: &Spanned<Gpu>| {
            *gpu.get_ref().exposure.get_ref() == Exposure::Ram
                && *gpu.get_ref().cpu.get_ref() == index
        };
        match &node.get_ref().memory {
            Some(memory) => {
                positive(memory, key.clone())?;
                add(memory.span().start, key, memory.get_ref().0)?;
            }
            None if machine.gpu.iter().any(brings) => {}
            None => {
                let message =
                    "is not given, and no GPU with exposure `ram` brings the node's memory";
                let help = "memory = \"1GiB\", or a GPU with exposure = \"ram\" and cpu = ";
                return Err(machine.text.error(
                    node.span().start,
                    key,
                    message,
                    Some(format!("{help}{index}")),
                ));
            }
        }
    }
    for (index, node) in machine.memory.iter().enumerate() {
        let (memory, cpu) = (&node.get_ref().memory, &node.get_ref().cpu);
        let key = format!("memory[{index}].memory");
        positive(memory, key.clone())?;
        add(memory.span().start, key, memory.get_ref().0)?;
        check_cpu_index(machine, cpu, format!("memory[{index}].cpu"))?;
    }
    for (index, gpu) in machine.gpu.iter().enumerate() {
        let gpu = gpu.get_ref();
        if *gpu.exposure.get_ref() == Exposure::Ram {
            let key = format!("gpu[{index}].hbm");
            add(gpu.hbm.span().start, key, gpu.hbm.get_ref().0)?;
        }
    }
    Ok(())
}

/// Whether there is a CPU node of this number.
fn check_cpu_index(machine: &Machine, cpu: &Spanned<usize>, key: String) -> Check<()> {
    if *cpu.get_ref() < machine.cpu.len() {
        return Ok(());
    }
    let message = format!(
        "there is no CPU node {}; the machine has {}",
        cpu.get_ref(),
        machine.cpu.len()
    );
    let help = format!(
        "they are numbered {}, in the order of the [[cpu]] tables",
        first_to_last("", machine.cpu.len())
    );
    Err(wrong(machine, cpu, key, message, Some(help)))
}
