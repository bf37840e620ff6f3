//! The machine as hwloc 2 XML, which `lstopo -i` opens.
//!
//! Format: `hwloc/hwloc2.dtd` and `hwloc/topology-xml.c` of open-mpi/hwloc. A package stands for a CPU node; HBM is
//! attached to the package of the CPU node that its GPU is attached to, as hwloc does with memory that has no CPUs.

use std::fmt::{self, Write};

use crate::machine::Exposure;
use crate::plan::{Gpu, Node, NodeKind, Plan};
use crate::render::links;
use crate::render::xml::Escaped;

/// Class of the devices that `numagpu serve` presents: processing accelerator.
const PCI_CLASS: u16 = 0x1200;
/// Vendor and device of the devices that `numagpu serve` presents.
const PCI_ID: &str = "1234:6770";
/// QEMU's `pcie-root-port`.
const ROOT_PORT_ID: &str = "1b36:000c";
/// `HWLOC_DISTANCES_KIND_FROM_OS` and `HWLOC_DISTANCES_KIND_MEANS_LATENCY`.
const KIND_LATENCY: u32 = 1 | 4;
/// `HWLOC_DISTANCES_KIND_FROM_OS` and `HWLOC_DISTANCES_KIND_MEANS_BANDWIDTH`.
const KIND_BANDWIDTH: u32 = 1 | 8;
/// What hwloc's ROCm SMI backend has for a GPU and itself.
const OWN_BANDWIDTH: u32 = 1_000_000;

/// A set of numbers as hwloc writes it: 32 bits each, the highest first, nothing for zero except at the end.
struct Bitmap(Vec<u32>);

impl fmt::Display for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(highest) = self.0.iter().max().map(|bit| bit / 32) else {
            return f.write_str("0x0");
        };
        for word in (0..=highest).rev() {
            let bits = self.0.iter().filter(|bit| **bit / 32 == word);
            let value = bits.fold(0u32, |value, bit| value | 1 << (bit % 32));
            if word != highest {
                f.write_str(",")?;
            }
            match value {
                0 if word == 0 => f.write_str("0x0")?,
                0 => {}
                value => write!(f, "{value:#010x}")?,
            }
        }
        Ok(())
    }
}

/// `cpuset` and `nodeset` attributes of an object.
fn sets(cpus: &[u32], nodes: &[u32]) -> String {
    let (cpus, nodes) = (Bitmap(cpus.to_vec()), Bitmap(nodes.to_vec()));
    format!(
        "cpuset=\"{cpus}\" complete_cpuset=\"{cpus}\" nodeset=\"{nodes}\" complete_nodeset=\"{nodes}\""
    )
}

/// Writes objects, each with a number of its own.
struct Writer {
    out: String,
    number: u64,
    /// Numbers of the GPUs' PCI devices, by position in the description.
    devices: Vec<(u32, u64)>,
}

impl Writer {
    fn number(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    fn info(&mut self, depth: usize, name: &str, value: &str) -> fmt::Result {
        writeln!(
            self.out,
            "{:depth$}<info name=\"{name}\" value=\"{}\"/>",
            "",
            Escaped(value)
        )
    }
}

/// The machine with all of its nodes, also those that Linux has as possible only; these have `Online` `no`.
pub fn hwloc(plan: &Plan) -> String {
    let mut writer = Writer {
        out: String::new(),
        number: 0,
        devices: Vec::new(),
    };
    // Writing to a string cannot fail.
    let _ = topology(plan, &mut writer);
    writer.out
}

fn topology(plan: &Plan, w: &mut Writer) -> fmt::Result {
    w.out += "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";
    w.out += "<!DOCTYPE topology SYSTEM \"hwloc2.dtd\">\n";
    w.out += "<topology version=\"2.0\">\n";
    let cpus: Vec<u32> = plan
        .nodes
        .iter()
        .flat_map(|node| node.cpus.iter().copied())
        .collect();
    let nodes: Vec<u32> = plan.nodes.iter().map(|node| node.linux_node).collect();
    let number = w.number();
    writeln!(
        w.out,
        "  <object type=\"Machine\" os_index=\"0\" {} allowed_cpuset=\"{}\" allowed_nodeset=\"{}\" gp_index=\"{number}\">",
        sets(&cpus, &nodes),
        Bitmap(cpus.clone()),
        Bitmap(nodes.clone()),
    )?;
    w.info(4, "Backend", "numagpu")?;
    w.info(4, "OSName", "Linux")?;
    w.info(4, "Architecture", "x86_64")?;
    w.info(4, "MachineName", &plan.name)?;
    if !plan.description.is_empty() {
        w.info(4, "MachineDescription", &plan.description)?;
    }
    for (node, gpus) in links::cpu_nodes(plan) {
        package(plan, node, &gpus, w)?;
    }
    w.out += "  </object>\n";
    latencies(plan, w)?;
    bandwidths(plan, w)?;
    w.out += "</topology>\n";
    Ok(())
}

/// A CPU node with the memory and the GPUs attached to it.
fn package(plan: &Plan, cpu: &Node, gpus: &[&Gpu], w: &mut Writer) -> fmt::Result {
    let hbm = |node: &&Node| node.kind == NodeKind::Hbm && node.cpu_pxm == Some(cpu.pxm);
    let mut members: Vec<&Node> = plan.nodes.iter().filter(hbm).collect();
    members.push(cpu);
    members.sort_by_key(|node| node.linux_node);
    let nodes: Vec<u32> = members.iter().map(|node| node.linux_node).collect();
    let number = w.number();
    writeln!(
        w.out,
        "    <object type=\"Package\" os_index=\"{}\" {} gp_index=\"{number}\">",
        cpu.pxm,
        sets(&cpu.cpus, &nodes)
    )?;
    for node in members {
        numa_node(plan, cpu, node, w)?;
    }
    let mut cpus = cpu.cpus.clone();
    cpus.sort_unstable();
    for index in cpus {
        let number = w.number();
        writeln!(
            w.out,
            "      <object type=\"PU\" os_index=\"{index}\" {} gp_index=\"{number}\"/>",
            sets(&[index], &nodes)
        )?;
    }
    let mut gpus = gpus.to_vec();
    gpus.sort_by_key(|gpu| gpu.bus);
    for gpu in gpus {
        device(plan, gpu, w)?;
    }
    w.out += "    </object>\n";
    Ok(())
}

/// Subtypes as hwloc names them: `SPM` for soft-reserved memory, `HBM` for high-bandwidth RAM, `GPUMemory` for what a
/// driver fills.
fn subtype(plan: &Plan, node: &Node) -> &'static str {
    let gpu = plan
        .gpus
        .iter()
        .find(|gpu| node.gpu.as_ref() == Some(&gpu.id));
    match (node.kind, gpu.map(|gpu| gpu.exposure)) {
        (NodeKind::Cpu, None) => "DRAM",
        (NodeKind::Hbm, Some(Exposure::Spm)) => "SPM",
        (NodeKind::Hbm, Some(_)) => "GPUMemory",
        (NodeKind::Cpu, Some(_)) | (NodeKind::Hbm, None) => "HBM",
    }
}

fn numa_node(plan: &Plan, cpu: &Node, node: &Node, w: &mut Writer) -> fmt::Result {
    let bytes: u64 = node.ranges.iter().map(|range| range.size).sum();
    let subtype = subtype(plan, node);
    let number = w.number();
    writeln!(
        w.out,
        "      <object type=\"NUMANode\" subtype=\"{subtype}\" os_index=\"{}\" {} gp_index=\"{number}\" local_memory=\"{bytes}\">",
        node.linux_node,
        sets(&cpu.cpus, &[node.linux_node])
    )?;
    w.info(8, "ProximityDomain", &node.pxm.to_string())?;
    w.info(8, "Online", if node.online { "yes" } else { "no" })?;
    if let Some(gpu) = &node.gpu {
        w.info(8, "GPU", gpu)?;
    }
    w.out += "      </object>\n";
    Ok(())
}

/// A GPU behind its expander bridge and root port, as the command line for QEMU has it.
fn device(plan: &Plan, gpu: &Gpu, w: &mut Writer) -> fmt::Result {
    let (bus, expander) = (gpu.bus, gpu.bus.saturating_sub(1));
    let (host, port, number) = (w.number(), w.number(), w.number());
    w.devices.push((gpu.index, number));
    writeln!(
        w.out,
        "      <object type=\"Bridge\" gp_index=\"{host}\" bridge_type=\"0-1\" depth=\"0\" bridge_pci=\"0000:[{expander:02x}-{bus:02x}]\">"
    )?;
    writeln!(
        w.out,
        "        <object type=\"Bridge\" gp_index=\"{port}\" bridge_type=\"1-1\" depth=\"1\" bridge_pci=\"0000:[{bus:02x}-{bus:02x}]\" pci_busid=\"0000:{expander:02x}:00.0\" pci_type=\"0604 [{ROOT_PORT_ID}] [0000:0000] 00\" pci_link_speed=\"0.000000\">"
    )?;
    writeln!(
        w.out,
        "          <object type=\"PCIDev\" name=\"{}\" gp_index=\"{number}\" pci_busid=\"0000:{}\" pci_type=\"{PCI_CLASS:04x} [{PCI_ID}] [{PCI_ID}] 00\" pci_link_speed=\"0.000000\">",
        Escaped(&gpu.id),
        gpu.bdf
    )?;
    w.info(12, "Exposure", &gpu.exposure.to_string())?;
    if let Some(node) = plan.linux_node(gpu.pci_pxm) {
        w.info(12, "PCINode", &node.to_string())?;
    }
    let mut nodes: Vec<String> = gpu
        .domains
        .iter()
        .filter_map(|domain| plan.linux_node(domain.pxm))
        .map(|node| node.to_string())
        .collect();
    if gpu.exposure == Exposure::Ram {
        nodes.extend(plan.linux_node(gpu.cpu_pxm).map(|node| node.to_string()));
    }
    w.info(12, "HBMNodes", &nodes.join(","))?;
    for link in &gpu.links {
        let text = format!("{}: {}", link.peer, links::label(link));
        w.info(12, "Link", &text)?;
    }
    w.out += "          </object>\n        </object>\n      </object>\n";
    Ok(())
}

/// A list of numbers in one element.
fn numbers(element: &str, numbers: &[String], w: &mut Writer) -> fmt::Result {
    let text = numbers.join(" ") + " ";
    writeln!(
        w.out,
        "    <{element} length=\"{}\">{text}</{element}>",
        text.len()
    )
}

fn latencies(plan: &Plan, w: &mut Writer) -> fmt::Result {
    let mut nodes: Vec<(u32, u32)> = plan
        .nodes
        .iter()
        .map(|node| (node.linux_node, node.pxm))
        .collect();
    nodes.sort_unstable();
    // hwloc ignores a matrix of one.
    if nodes.len() < 2 {
        return Ok(());
    }
    writeln!(
        w.out,
        "  <distances2 type=\"NUMANode\" nbobjs=\"{}\" kind=\"{KIND_LATENCY}\" name=\"NUMALatency\" indexing=\"os\">",
        nodes.len()
    )?;
    let indexes: Vec<String> = nodes.iter().map(|(linux, _)| linux.to_string()).collect();
    numbers("indexes", &indexes, w)?;
    for (_, row) in &nodes {
        let values: Vec<String> = nodes
            .iter()
            .filter_map(|(_, column)| plan.distance(*row, *column))
            .map(|distance| distance.to_string())
            .collect();
        numbers("u64values", &values, w)?;
    }
    w.out += "  </distances2>\n";
    Ok(())
}

/// Bandwidths between GPUs in MB/s, under the name that hwloc's ROCm SMI backend uses; 0 without a link.
fn bandwidths(plan: &Plan, w: &mut Writer) -> fmt::Result {
    let between = |a: &Gpu, b: &Gpu| {
        let link = a.links.iter().find(|link| link.peer == b.id);
        link.map_or(0, |link| link.bandwidth_mbs)
    };
    let known = |gpu: &Gpu| plan.gpus.iter().any(|peer| between(gpu, peer) > 0);
    if plan.gpus.len() < 2 || !plan.gpus.iter().any(known) {
        return Ok(());
    }
    writeln!(
        w.out,
        "  <distances2 type=\"PCIDev\" nbobjs=\"{}\" kind=\"{KIND_BANDWIDTH}\" name=\"XGMIBandwidth\" indexing=\"gp\">",
        plan.gpus.len()
    )?;
    let mut devices = w.devices.clone();
    devices.sort_unstable();
    let indexes: Vec<String> = devices
        .iter()
        .map(|(_, number)| number.to_string())
        .collect();
    numbers("indexes", &indexes, w)?;
    for a in &plan.gpus {
        let value = |b: &Gpu| match b.index == a.index {
            true => OWN_BANDWIDTH,
            false => between(a, b),
        };
        let values: Vec<String> = plan.gpus.iter().map(|b| value(b).to_string()).collect();
        numbers("u64values", &values, w)?;
    }
    w.out += "  </distances2>\n";
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Bitmap;

    #[test]
    fn sets_are_written_as_hwloc_writes_them() {
        let text = |bits: &[u32]| Bitmap(bits.to_vec()).to_string();
        assert_eq!(text(&[]), "0x0");
        assert_eq!(text(&[0, 1, 5]), "0x00000023");
        assert_eq!(text(&[31, 32]), "0x00000001,0x80000000");
        assert_eq!(text(&[40]), "0x00000100,0x0");
        assert_eq!(text(&[3, 100]), "0x00000010,,,0x00000008");
    }
}
