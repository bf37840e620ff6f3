//! A GPU's HBM in the parts that pictures show.

use super::text::cpu_list;
use crate::machine::Exposure;
use crate::plan::{Gpu, Node, NodeKind, Plan};

/// What Linux has of a part at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// A node that is online.
    Online,
    /// A node that is not online.
    Possible,
    /// No node.
    Nowhere,
}

/// A part of a GPU's HBM.
pub(super) struct Part {
    /// Bytes.
    pub size: u64,
    /// What Linux has of it.
    pub state: State,
    /// Linux nodes; none for HBM without a node.
    nodes: Vec<u32>,
    /// Proximity domains.
    pxms: Vec<u32>,
}

impl Part {
    /// Linux nodes, such as `node 4` or `nodes 1-8`.
    pub fn nodes(&self) -> String {
        let many = if self.nodes.len() > 1 { "s" } else { "" };
        format!("node{many} {}", cpu_list(&self.nodes))
    }

    /// Proximity domains, such as `PXM 5`.
    pub fn pxms(&self) -> String {
        format!("PXM {}", cpu_list(&self.pxms))
    }
}

/// How many parts a GPU's HBM has in pictures.
pub(super) fn count(gpu: &Gpu) -> usize {
    match gpu.exposure {
        Exposure::Spm => gpu.hbm.len(),
        Exposure::Ram | Exposure::Bar | Exposure::Private => 1,
    }
}

/// The parts: partitions that are soft reserved one by one, other HBM as a whole.
pub(super) fn of(plan: &Plan, gpu: &Gpu) -> Vec<Part> {
    let node = |pxm: u32| plan.linux_node(pxm).unwrap_or(pxm);
    let part = |size: u64, pxms: Vec<u32>| Part {
        size,
        state: match pxms.first() {
            None => State::Nowhere,
            Some(pxm) if plan.is_online(*pxm) => State::Online,
            Some(_) => State::Possible,
        },
        nodes: pxms.iter().map(|pxm| node(*pxm)).collect(),
        pxms,
    };
    let whole = || gpu.hbm.iter().map(|hbm| hbm.size).sum();
    match gpu.exposure {
        Exposure::Spm => gpu
            .hbm
            .iter()
            .map(|hbm| part(hbm.size, hbm.pxm.into_iter().collect()))
            .collect(),
        Exposure::Ram => vec![part(whole(), vec![gpu.cpu_pxm])],
        Exposure::Bar => {
            let pxms = gpu.domains.iter().map(|domain| domain.pxm).collect();
            vec![part(whole(), pxms)]
        }
        Exposure::Private => vec![part(whole(), Vec::new())],
    }
}

/// A memory node's HBM.
pub(super) fn of_memory(node: &Node) -> Part {
    Part {
        size: node.ranges.iter().map(|range| range.size).sum(),
        state: State::Online,
        nodes: vec![node.linux_node],
        pxms: vec![node.pxm],
    }
}

/// Memory nodes next to a CPU node.
pub(super) fn memory_nodes<'a>(plan: &'a Plan, cpu: &'a Node) -> impl Iterator<Item = &'a Node> {
    let memory = plan.ram_nodes().filter(|node| node.kind == NodeKind::Hbm);
    memory.filter(|node| node.cpu_pxm == Some(cpu.pxm))
}
