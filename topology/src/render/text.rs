//! The plan as a picture for a terminal.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::plan::{NodeKind, Plan};
use crate::render::e820_type;
use crate::size::Size;
use crate::{E820_SOFT_RESERVED, linux};

/// Address map, node table, distances and links, at most 100 columns wide for machines of up to 16 nodes.
pub fn text(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_text(plan, &mut out);
    out
}

fn write_text(plan: &Plan, out: &mut String) -> std::fmt::Result {
    writeln!(out, "{}: {}", plan.name, plan.description)?;
    writeln!(out)?;
    writeln!(out, "memory map ({} address bits)", plan.phys_bits)?;
    let owners: BTreeMap<u64, &str> = plan
        .gpus
        .iter()
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
            NodeKind::Cpu => ("cpu", cpu_list(&node.cpus)),
            NodeKind::Hbm => ("hbm", node.gpu.clone().unwrap_or_default()),
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
        let pxms: Vec<String> = gpu.hbm.iter().map(|hbm| hbm.pxm.to_string()).collect();
        writeln!(
            out,
            "  {:8} {}  PCI node {node}  {}  HBM PXM {}",
            gpu.id,
            gpu.bdf,
            gpu.exposure,
            pxms.join(" ")
        )?;
        for link in &gpu.links {
            let speed = match link.bandwidth_mbs {
                0 => String::new(),
                mbs => format!("  {}.{} GB/s each way", mbs / 1000, mbs % 1000 / 100),
            };
            writeln!(out, "           -- {} x{}{speed}", link.peer, link.count)?;
        }
    }
    writeln!(out)?;
    writeln!(out, "guest kernel arguments (OVMF)")?;
    let arguments =
        linux::command_line(linux::BootPath::Ovmf, plan.guest.driver, &plan.hbm_ranges());
    writeln!(out, "  {}", arguments.join(" "))?;
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
