//! What joins the parts: PCI buses, hives, links, distances.

use super::number::Numbering;
use super::{GpuLink, partitions};
use crate::error::MachineError;
use crate::machine::Machine;
use crate::validate::{Checked, End, wrong};

/// A PCI bus for each GPU: its own if it names one, otherwise spread over the numbers that are left.
pub(super) fn buses(machine: &Machine) -> Result<Vec<u8>, MachineError> {
    let wish = |gpu: &toml::Spanned<crate::machine::Gpu>| {
        gpu.get_ref()
            .bus
            .as_ref()
            .and_then(|bus| u8::try_from(*bus.get_ref()).ok())
    };
    let mut taken: Vec<u8> = machine
        .gpu
        .iter()
        .filter_map(wish)
        .flat_map(|bus| [bus - 1, bus])
        .collect();
    let candidates = (0x01..=0x0fu8)
        .step_by(2)
        .flat_map(|low| (1..=0x0fu8).map(move |high| high << 4 | low));
    let candidates: Vec<u8> = candidates.collect();
    let mut buses = Vec::new();
    for (index, gpu) in machine.gpu.iter().enumerate() {
        let free = |bus: &&u8| !taken.contains(bus) && !taken.contains(&(**bus - 1));
        let Some(bus) = wish(gpu).or_else(|| candidates.iter().find(free).copied()) else {
            let help = Some("a PCI segment has 256 buses; each GPU takes two".to_owned());
            return Err(wrong(
                machine,
                gpu,
                format!("gpu[{index}].bus"),
                "no PCI bus is left",
                help,
            ));
        };
        taken.extend([bus - 1, bus]);
        buses.push(bus);
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
    let mut root: Vec<usize> = (0..count).collect();
    for (from, to) in &checked.links {
        let (End::Gpu(from), End::Gpu(to)) = (from, to) else {
            continue;
        };
        let (Some(a), Some(b)) = (root.get(*from).copied(), root.get(*to).copied()) else {
            continue;
        };
        let (low, high) = (a.min(b), a.max(b));
        for entry in root.iter_mut().filter(|entry| **entry == high) {
            *entry = low;
        }
    }
    // FNV-1a of the name: two machines' hives differ, and the same machine's stay.
    let seed = machine
        .name
        .get_ref()
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    root.iter()
        .enumerate()
        .map(|(index, own)| {
            let members: Vec<usize> = (0..count)
                .filter(|gpu| root.get(*gpu) == Some(own))
                .collect();
            let node = members.iter().position(|gpu| *gpu == index).unwrap_or(0);
            let alone = members.len() < 2;
            Hive {
                id: if alone { 0 } else { (seed ^ *own as u64) | 1 },
                node: u32::try_from(node).unwrap_or(u32::MAX),
                size: u32::try_from(members.len()).unwrap_or(u32::MAX),
            }
        })
        .collect()
}

/// The links of a GPU, as it sees them.
pub(super) fn links(
    machine: &Machine,
    checked: &Checked,
    gpu: usize,
    hives: &[Hive],
) -> Vec<GpuLink> {
    let mut links = Vec::new();
    for (link, (from, to)) in machine.link.iter().zip(&checked.links) {
        let link = link.get_ref();
        let (peer, name) = if *from == End::Gpu(gpu) {
            (to, &link.to)
        } else if *to == End::Gpu(gpu) {
            (from, &link.from)
        } else {
            continue;
        };
        let peer_hive_node = match peer {
            End::Gpu(index) => hives.get(*index).map(|hive| hive.node),
            End::Cpu(_) => None,
        };
        links.push(GpuLink {
            peer: name.get_ref().clone(),
            peer_hive_node,
            count: *link.count.get_ref(),
            bandwidth_mbs: link.bandwidth_mbs,
            latency_ns: link.latency_ns,
        });
    }
    links
}

/// Distances by proximity domain.
pub(super) fn slit(machine: &Machine, checked: &Checked, numbering: &Numbering) -> Vec<Vec<u8>> {
    let cpus = machine.cpu.len();
    let all = partitions(machine);
    let distances = &machine.distances;
    let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    let attached = |gpu: usize| machine.gpu.get(gpu).map(|gpu| *gpu.get_ref().cpu.get_ref());
    let linked = |a: usize, b: usize| {
        checked.links.contains(&(End::Gpu(a), End::Gpu(b)))
            || checked.links.contains(&(End::Gpu(b), End::Gpu(a)))
    };
    let between = |a: usize, b: usize| -> u32 {
        if let Some(matrix) = &distances.matrix {
            return matrix
                .get_ref()
                .get(a)
                .and_then(|row| row.get(b))
                .copied()
                .unwrap_or(255);
        }
        let hbm = |index: usize| {
            index
                .checked_sub(cpus)
                .and_then(|i| all.get(i))
                .map(|(gpu, _)| *gpu)
        };
        *match (hbm(a), hbm(b)) {
            _ if a == b => return 10,
            (None, None) => &distances.cpu_cpu,
            (Some(gpu), None) if attached(gpu) == Some(b) => &distances.cpu_hbm_local,
            (None, Some(gpu)) if attached(gpu) == Some(a) => &distances.cpu_hbm_local,
            (Some(_), None) | (None, Some(_)) => &distances.cpu_hbm_remote,
            (Some(one), Some(other)) if one == other => &distances.hbm_hbm_same_gpu,
            (Some(one), Some(other)) if linked(one, other) => &distances.hbm_hbm_linked,
            (Some(_), Some(_)) => &distances.hbm_hbm,
        }
        .get_ref()
    };
    // Position in the description by proximity domain.
    let mut position: Vec<usize> = (0..cpus).collect();
    let mut hbm: Vec<(u32, usize)> = numbering.hbm_pxm.iter().copied().zip(cpus..).collect();
    hbm.sort_unstable();
    position.extend(hbm.into_iter().map(|(_, index)| index));
    position
        .iter()
        .map(|a| position.iter().map(|b| byte(between(*a, *b))).collect())
        .collect()
}
