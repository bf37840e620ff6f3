//! Links as pictures draw them: each once.

use std::collections::BTreeMap;

use crate::plan::{Gpu, GpuLink, Node, NodeKind, Plan};

/// A link, told from the end of the GPU that comes first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Drawn<'a> {
    /// The GPU.
    pub gpu: &'a Gpu,
    /// The link as that GPU sees it.
    pub link: &'a GpuLink,
    /// The GPU at the other end; none if that is a CPU node.
    pub peer: Option<&'a Gpu>,
}

/// All links, each once, in the order of GPUs.
pub(super) fn drawn(plan: &Plan) -> Vec<Drawn<'_>> {
    let gpus = plan.gpus.iter();
    let by_id: BTreeMap<&str, &Gpu> = gpus.map(|gpu| (gpu.id.as_str(), gpu)).collect();
    let mut all = Vec::new();
    for gpu in &plan.gpus {
        for link in &gpu.links {
            let peer = by_id.get(link.peer.as_str()).copied();
            if peer.is_none_or(|peer| peer.index > gpu.index) {
                all.push(Drawn { gpu, link, peer });
            }
        }
    }
    all
}

/// What a CPU node is called in links: `cpu0`, `cpu1` and so on.
pub(super) fn cpu_name(pxm: u32) -> String {
    format!("cpu{pxm}")
}

/// Position among the memory nodes.
fn memory_index(plan: &Plan, node: &Node) -> usize {
    let memory = plan.ram_nodes().filter(|node| node.kind == NodeKind::Hbm);
    memory.take_while(|other| other.pxm < node.pxm).count()
}

/// `cpu0`, `memory0`, `gcd1`, or `gpu0/2` where a GPU has several domains.
pub(super) fn node_name(plan: &Plan, node: &Node) -> String {
    if node.kind == NodeKind::Cpu {
        return cpu_name(node.pxm);
    }
    let Some(id) = &node.gpu else {
        return format!("memory{}", memory_index(plan, node));
    };
    let gpu = plan.gpus.iter().find(|gpu| gpu.id == *id);
    let partition = gpu
        .filter(|gpu| gpu.domains.len() > 1)
        .and_then(|gpu| gpu.domains.iter().position(|own| own.pxm == node.pxm));
    match partition {
        Some(partition) => format!("{id}/{partition}"),
        None => id.clone(),
    }
}

/// Whether a GPU has a link to the CPU node it is attached to.
pub(super) fn has_cpu_link(gpu: &Gpu) -> bool {
    let name = cpu_name(gpu.cpu_pxm);
    gpu.links.iter().any(|link| link.peer == name)
}

/// Proximity domains of CPU nodes with the GPUs attached to each.
pub(super) fn cpu_nodes(plan: &Plan) -> Vec<(&Node, Vec<&Gpu>)> {
    plan.nodes
        .iter()
        .filter(|node| node.kind == NodeKind::Cpu)
        .map(|node| {
            let gpus = plan.gpus.iter().filter(|gpu| gpu.cpu_pxm == node.pxm);
            (node, gpus.collect())
        })
        .collect()
}

/// The highest bandwidth of any link, in MB/s.
pub(super) fn widest(plan: &Plan) -> u32 {
    let links = plan.gpus.iter().flat_map(|gpu| &gpu.links);
    links.map(|link| link.bandwidth_mbs).max().unwrap_or(0)
}

/// `200 GB/s`, `36.5 GB/s`; nothing where it is not known.
pub(super) fn bandwidth(mbs: u32) -> Option<String> {
    match (mbs / 1000, mbs % 1000 / 100) {
        _ if mbs == 0 => None,
        (0, _) => Some(format!("{mbs} MB/s")),
        (whole, 0) => Some(format!("{whole} GB/s")),
        (whole, tenth) => Some(format!("{whole}.{tenth} GB/s")),
    }
}

/// `4 links, 200 GB/s each way`.
pub(super) fn label(link: &GpuLink) -> String {
    let mut text = match link.count {
        1 => "1 link".to_owned(),
        count => format!("{count} links"),
    };
    if let Some(speed) = bandwidth(link.bandwidth_mbs) {
        text += &format!(", {speed} each way");
    }
    if link.latency_ns > 0 {
        text += &format!(", {} ns", link.latency_ns);
    }
    text
}
