//! What joins the parts: PCI buses, hives, links, distances.

use std::collections::{BTreeMap, BTreeSet};

use super::number::Numbering;
use super::{GpuLink, domains};
use crate::error::MachineError;
use crate::machine::{Distances, Machine};
use crate::validate::{Checked, End, wrong};

/// PCI segment and bus of each GPU: the bus it names, on segment 0, otherwise spread over the numbers that are left
/// there, and then over further segments.
pub(super) fn buses(machine: &Machine) -> Result<Vec<(u16, u8)>, MachineError> {
    let wish = |gpu: &toml::Spanned<crate::machine::Gpu>| {
        gpu.get_ref()
            .bus
            .as_ref()
            .and_then(|bus| u8::try_from(*bus.get_ref()).ok())
    };
    let taken: BTreeSet<u8> = machine
        .gpu
        .iter()
        .filter_map(wish)
        .flat_map(|bus| [bus - 1, bus])
        .collect();
    let candidates = (0x01..=0x0fu8)
        .step_by(2)
        .flat_map(|low| (1..=0x0fu8).map(move |high| high << 4 | low));
    // Candidates are two apart, so they cannot take each other's; only a bus that is named is in the way of one.
    let mut free = (0..=u16::MAX)
        .flat_map(|segment| candidates.clone().map(move |bus| (segment, bus)))
        .filter(|(segment, bus)| {
            *segment > 0 || !taken.contains(bus) && !taken.contains(&(bus - 1))
        });
    let mut buses = Vec::new();
    for (index, gpu) in machine.gpu.iter().enumerate() {
        let named = wish(gpu).map(|bus| (0, bus));
        let Some(place) = named.or_else(|| free.next()) else {
            let key = format!("gpu[{index}].bus");
            return Err(wrong(machine, gpu, key, "no PCI bus is left", None));
        };
        buses.push(place);
    }
    Ok(buses)
}

/// A GPU's place in its hive.
pub(super) struct Hive {
    /// The hive's number, 0 if the GPU is alone.
    pub id: u64,
    /// Position of the GPU.
    pub node: u32,
    /// GPUs in it.
    pub size: u32,
}

/// GPUs that reach each other over links form a hive.
pub(super) fn hives(machine: &Machine, checked: &Checked) -> Vec<Hive> {
    let count = machine.gpu.len();
    // The first GPU of a hive stands for it; each other one names one before itself.
    let mut before: Vec<usize> = (0..count).collect();
    let first = |before: &mut Vec<usize>, gpu: usize| {
        let mut at = gpu;
        while let Some(next) = before.get(at).copied().filter(|next| *next != at) {
            at = next;
        }
        let mut on_the_way = gpu;
        while let Some(next) = before.get_mut(on_the_way).filter(|next| **next != at) {
            on_the_way = std::mem::replace(next, at);
        }
        at
    };
    for (from, to) in &checked.links {
        let (End::Gpu(from), End::Gpu(to)) = (from, to) else {
            continue;
        };
        let (a, b) = (first(&mut before, *from), first(&mut before, *to));
        if let Some(entry) = before.get_mut(a.max(b)) {
            *entry = a.min(b);
        }
    }
    let root: Vec<usize> = (0..count).map(|gpu| first(&mut before, gpu)).collect();
    let mut sizes: BTreeMap<usize, u32> = BTreeMap::new();
    let nodes: Vec<u32> = root
        .iter()
        .map(|own| {
            let size = sizes.entry(*own).or_default();
            *size += 1;
            *size - 1
        })
        .collect();
    // FNV-1a of the name: two machines' hives differ, and the same machine's stay.
    let seed = machine
        .name
        .get_ref()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    root.iter()
        .zip(nodes)
        .map(|(own, node)| {
            let size = sizes.get(own).copied().unwrap_or(1);
            let alone = size < 2;
            Hive {
                id: if alone { 0 } else { (seed ^ *own as u64) | 1 },
                node,
                size,
            }
        })
        .collect()
}

/// The links of every GPU, as it sees them.
pub(super) fn links(machine: &Machine, checked: &Checked, hives: &[Hive]) -> Vec<Vec<GpuLink>> {
    let mut links: Vec<Vec<GpuLink>> = hives.iter().map(|_| Vec::new()).collect();
    for (link, (from, to)) in machine.link.iter().zip(&checked.links) {
        let link = link.get_ref();
        for (own, peer, name) in [(from, to, &link.to), (to, from, &link.from)] {
            let End::Gpu(own) = own else {
                continue;
            };
            let peer_hive_node = match peer {
                End::Gpu(index) => hives.get(*index).map(|hive| hive.node),
                End::Cpu(_) => None,
            };
            if let Some(links) = links.get_mut(*own) {
                links.push(GpuLink {
                    peer: name.get_ref().clone(),
                    peer_hive_node,
                    count: *link.count.get_ref(),
                    bandwidth_mbs: link.bandwidth_mbs,
                    latency_ns: link.latency_ns,
                });
            }
        }
    }
    links
}

/// Distances by proximity domain.
pub(super) fn slit(machine: &Machine, checked: &Checked, numbering: &Numbering) -> Vec<Vec<u8>> {
    let before = machine.cpu.len() + machine.memory.len();
    // Position in the description by proximity domain.
    let mut position: Vec<usize> = (0..before).collect();
    let mut own: Vec<(u32, usize)> = numbering.pxm.iter().copied().zip(before..).collect();
    own.sort_unstable();
    position.extend(own.into_iter().map(|(_, index)| index));
    let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    if let Some(matrix) = &machine.distances.matrix {
        let rows = matrix.get_ref();
        let cell = |row: Option<&Vec<u32>>, to: &usize| {
            let value = row.and_then(|row| row.get(*to)).copied();
            byte(value.unwrap_or(255))
        };
        return position
            .iter()
            .map(|from| rows.get(*from))
            .map(|row| position.iter().map(|to| cell(row, to)).collect())
            .collect();
    }
    let described: Vec<usize> = domains(machine).iter().map(|domain| domain.gpu).collect();
    let ends: Vec<usize> = position
        .iter()
        .filter_map(|index| described.get(index.checked_sub(before)?).copied())
        .collect();
    let rules = Rules::new(machine, checked, ends);
    let from_cpu = (0..machine.cpu.len()).map(|cpu| rules.cpu_row(cpu));
    let from_memory = rules.memory_cpus.iter().map(|cpu| rules.hbm_row(*cpu));
    let from_gpu = rules.ends.iter().map(|gpu| rules.gpu_row(*gpu));
    let rows = from_cpu.chain(from_memory).chain(from_gpu).enumerate();
    rows.map(|(pxm, row)| rules.by_domain(pxm, row)).collect()
}

/// Distances by kind.
struct Rules<'a> {
    distances: &'a Distances,
    cpus: usize,
    /// CPU node next to each memory node.
    memory_cpus: Vec<usize>,
    /// CPU node that each GPU is attached to.
    gpu_cpus: Vec<usize>,
    /// GPU of every proximity domain behind those of the CPU and memory nodes.
    ends: Vec<usize>,
    /// GPUs that a GPU has links with.
    linked: Vec<Vec<usize>>,
}

/// Distances from a domain: to CPU nodes and memory nodes by proximity domain, and to each GPU.
struct Row {
    nodes: Vec<u8>,
    gpus: Vec<u8>,
}

impl<'a> Rules<'a> {
    fn new(machine: &'a Machine, checked: &Checked, ends: Vec<usize>) -> Rules<'a> {
        let mut linked = vec![Vec::new(); machine.gpu.len()];
        for (from, to) in &checked.links {
            if let (End::Gpu(from), End::Gpu(to)) = (from, to) {
                for (own, peer) in [(from, to), (to, from)] {
                    if let Some(peers) = linked.get_mut(*own) {
                        peers.push(*peer);
                    }
                }
            }
        }
        let (memory, gpus) = (machine.memory.iter(), machine.gpu.iter());
        Rules {
            distances: &machine.distances,
            cpus: machine.cpu.len(),
            memory_cpus: memory.map(|node| *node.get_ref().cpu.get_ref()).collect(),
            gpu_cpus: gpus.map(|gpu| *gpu.get_ref().cpu.get_ref()).collect(),
            ends,
            linked,
        }
    }

    /// Between a CPU node and what is next to one.
    fn local_or_remote(&self, is_local: bool) -> u8 {
        let distances = self.distances;
        distance(if is_local {
            &distances.cpu_hbm_local
        } else {
            &distances.cpu_hbm_remote
        })
    }

    fn cpu_row(&self, own: usize) -> Row {
        let next_to = |cpu: &usize| self.local_or_remote(*cpu == own);
        let mut nodes = vec![distance(&self.distances.cpu_cpu); self.cpus];
        nodes.extend(self.memory_cpus.iter().map(next_to));
        Row {
            nodes,
            gpus: self.gpu_cpus.iter().map(next_to).collect(),
        }
    }

    /// From HBM or a memory node next to the CPU node `own`.
    fn hbm_row(&self, own: usize) -> Row {
        let hbm = distance(&self.distances.hbm_hbm);
        let mut nodes = vec![self.local_or_remote(false); self.cpus];
        if let Some(value) = nodes.get_mut(own) {
            *value = self.local_or_remote(true);
        }
        nodes.resize(self.cpus + self.memory_cpus.len(), hbm);
        Row {
            nodes,
            gpus: vec![hbm; self.gpu_cpus.len()],
        }
    }

    fn gpu_row(&self, gpu: usize) -> Row {
        let mut row = self.hbm_row(self.gpu_cpus.get(gpu).copied().unwrap_or(usize::MAX));
        for peer in self.linked.get(gpu).into_iter().flatten() {
            if let Some(value) = row.gpus.get_mut(*peer) {
                *value = distance(&self.distances.hbm_hbm_linked);
            }
        }
        if let Some(value) = row.gpus.get_mut(gpu) {
            *value = distance(&self.distances.hbm_hbm_same_gpu);
        }
        row
    }

    /// The row of domain `pxm`, by proximity domain.
    fn by_domain(&self, pxm: usize, from: Row) -> Vec<u8> {
        let mut row = from.nodes;
        row.reserve_exact(self.ends.len());
        let to = |gpu: &usize| from.gpus.get(*gpu).copied().unwrap_or(u8::MAX);
        row.extend(self.ends.iter().map(to));
        if let Some(own) = row.get_mut(pxm) {
            *own = 10;
        }
        row
    }
}

/// A distance as the table has it: at most 255.
fn distance(value: &toml::Spanned<u32>) -> u8 {
    u8::try_from(*value.get_ref()).unwrap_or(u8::MAX)
}
