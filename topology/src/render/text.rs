//! The plan as a picture for a terminal.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::E820_SOFT_RESERVED;
use crate::linux::{self, BootPath};
use crate::machine::Exposure;
use crate::plan::{NodeKind, Plan};
use crate::predict::{notes, predict};
use crate::render::e820_type;
use crate::size::Size;

/// Address map, node table, distances, links, and what Linux will make of it when it is booted this way, at most 100
/// columns wide for machines of up to 16 nodes.
pub fn text(plan: &Plan, boot: BootPath) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_text(plan, boot, &mut out);
    out
}

fn write_text(plan: &Plan, boot: BootPath, out: &mut String) -> std::fmt::Result {
    writeln!(out, "{}: {}", plan.name, plan.description)?;
    writeln!(out)?;
    writeln!(out, "memory map ({} address bits)", plan.phys_bits)?;
    let owners: BTreeMap<u64, &str> = plan
        .gpus
        .iter()
        .filter(|gpu| gpu.exposure == Exposure::Spm)
        .flat_map(|gpu| gpu.hbm.iter().map(|hbm| (hbm.base, gpu.id.as_str())))
        .collect();
    for entry in &plan.e820 {
        let owner = owners
            .get(&entry.base)
            .filter(|_| entry.kind == E820_SOFT_RESERVED)
            .copied()
            .unwrap_or_default();
        let last = entry.base + (entry.size - 1);
        let size = Size(entry.size).to_string();
        writeln!(
            out,
            "  {:#014x}-{last:#014x}  {size:>9}  {:13}  {owner}",
            entry.base,
            e820_type(entry.kind)
        )?;
    }
    writeln!(out)?;
    writeln!(out, "nodes")?;
    writeln!(out, "  PXM  Linux  kind  at boot   memory     CPUs or GPU")?;
    for node in &plan.nodes {
        let bytes: u64 = node.ranges.iter().map(|range| range.size).sum();
        let (kind, what) = match node.kind {
            NodeKind::Cpu => match &node.gpu {
                None => ("cpu", cpu_list(&node.cpus)),
                Some(gpu) => ("cpu", format!("{}, HBM of {gpu}", cpu_list(&node.cpus))),
            },
            NodeKind::Hbm => match (&node.gpu, node.cpu_pxm) {
                (Some(gpu), _) => ("hbm", gpu.clone()),
                (None, Some(cpu)) => ("hbm", format!("next to cpu{cpu}")),
                (None, None) => ("hbm", String::new()),
            },
        };
        let state = if node.online { "online" } else { "possible" };
        let memory = Size(bytes).to_string();
        writeln!(
            out,
            "  {:3}  {:5}  {kind}   {state:8}  {memory:9}  {what}",
            node.pxm, node.linux_node
        )?;
    }
    writeln!(out)?;
    writeln!(out, "distances by PXM")?;
    let head: String = (0..plan.slit.len()).map(|pxm| format!("{pxm:4}")).collect();
    writeln!(out, "     {head}")?;
    // By far the most of the text: every distance is formatted once, not once a cell.
    let cells: Vec<String> = (0..=u8::MAX).map(|value| format!("{value:4}")).collect();
    for (pxm, row) in plan.slit.iter().enumerate() {
        write!(out, "{pxm:4}:")?;
        for value in row {
            out.push_str(cells.get(usize::from(*value)).map_or("", String::as_str));
        }
        writeln!(out)?;
    }
    writeln!(out)?;
    writeln!(out, "GPUs")?;
    for gpu in &plan.gpus {
        let node = plan.linux_node(gpu.pci_pxm).unwrap_or_default();
        write!(
            out,
            "  {:8} {}  PCI node {node}  {}  HBM ",
            gpu.id, gpu.bdf, gpu.exposure
        )?;
        match gpu.exposure {
            Exposure::Ram => write!(out, "is RAM of PXM {}", gpu.cpu_pxm)?,
            Exposure::Private => {}
            Exposure::Spm | Exposure::Bar => {
                let pxms: Vec<u32> = gpu.domains.iter().map(|domain| domain.pxm).collect();
                write!(out, "PXM {}", cpu_list(&pxms).replace(',', " "))?;
            }
        }
        if let Some(aperture) = &gpu.aperture {
            let bytes = gpu.hbm.iter().map(|hbm| hbm.size).sum();
            let comma = if gpu.exposure == Exposure::Bar {
                ", "
            } else {
                ""
            };
            let size = Size(aperture.size);
            write!(out, "{comma}{} in a BAR of {size}", Size(bytes))?;
        }
        writeln!(out)?;
        for link in &gpu.links {
            let speed = match link.bandwidth_mbs {
                0 => String::new(),
                mbs => format!("  {}.{} GB/s each way", mbs / 1000, mbs % 1000 / 100),
            };
            writeln!(out, "           -- {} x{}{speed}", link.peer, link.count)?;
        }
    }
    writeln!(out)?;
    write_prediction(plan, boot, out)
}

fn write_prediction(plan: &Plan, boot: BootPath, out: &mut String) -> std::fmt::Result {
    let prediction = predict(plan, boot);
    writeln!(out, "Linux under {}", boot.words())?;
    let arguments = linux::command_line(boot, plan.guest.driver, &plan.hbm_ranges());
    if !arguments.is_empty() {
        writeln!(out, "  kernel arguments  {}", arguments.join(" "))?;
    }
    writeln!(out, "  online nodes      {}", cpu_list(&prediction.online))?;
    let nodes = prediction.possible.iter();
    let offline = nodes.filter(|node| !prediction.online.contains(node));
    let offline: Vec<u32> = offline.copied().collect();
    if !offline.is_empty() {
        writeln!(out, "  possible nodes    {}", cpu_list(&offline))?;
    }
    for (title, dax) in std::iter::once("dax devices")
        .chain(std::iter::repeat(""))
        .zip(&prediction.dax)
    {
        let last = dax.range.end().saturating_sub(1);
        writeln!(
            out,
            "  {title:16}  {:#014x}-{last:#014x}  {:>9}  target node {}, near node {}",
            dax.range.base,
            Size(dax.range.size).to_string(),
            dax.target_node,
            dax.numa_node
        )?;
    }
    for note in notes(plan) {
        writeln!(out, "note: {note}")?;
    }
    for warning in &prediction.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    for warning in &plan.warnings {
        writeln!(out, "warning: {warning}")?;
    }
    Ok(())
}

/// CPUs as ranges: `0-15,64-79`.
pub fn cpu_list(cpus: &[u32]) -> String {
    let mut sorted = cpus.to_vec();
    sorted.sort_unstable();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for cpu in sorted {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => runs.push((cpu, cpu)),
        }
    }
    let run = |(first, last): (u32, u32)| {
        if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        }
    };
    runs.into_iter().map(run).collect::<Vec<_>>().join(",")
}
