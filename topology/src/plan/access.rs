//! How fast a domain reaches the memory of another, as far as the description says.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Gpu, Plan};
use crate::machine::Machine;

/// Latency and bandwidth from one proximity domain to the memory of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Access {
    /// Domain of the CPUs or the GPU that accesses.
    pub initiator: u32,
    /// Domain of the memory.
    pub target: u32,
    /// Nanoseconds; 0 = not known.
    pub latency_ns: u32,
    /// MB/s; 0 = not known.
    pub bandwidth_mbs: u32,
}

/// Everything that the description says of accesses: CPUs to their own memory, GPUs to their own HBM, and both to what
/// their links lead to.
pub(super) fn access(machine: &Machine, gpus: &[Gpu]) -> Vec<Access> {
    let mut all = Vec::new();
    let mut push = |initiator: u32, target: u32, latency_ns: u32, bandwidth_mbs: u32| {
        if latency_ns > 0 || bandwidth_mbs > 0 {
            all.push(Access {
                initiator,
                target,
                latency_ns,
                bandwidth_mbs,
            });
        }
    };
    for (pxm, node) in (0u32..).zip(&machine.cpu) {
        let node = node.get_ref();
        push(pxm, pxm, node.latency_ns, node.bandwidth_mbs);
    }
    let first_memory = u32::try_from(machine.cpu.len()).unwrap_or(u32::MAX);
    for (pxm, node) in (first_memory..).zip(&machine.memory) {
        let node = node.get_ref();
        let cpu = u32::try_from(*node.cpu.get_ref()).unwrap_or(u32::MAX);
        push(cpu, pxm, node.latency_ns, node.bandwidth_mbs);
    }
    let by_id: BTreeMap<&str, &Gpu> = gpus.iter().map(|gpu| (gpu.id.as_str(), gpu)).collect();
    for (gpu, described) in gpus.iter().zip(&machine.gpu) {
        let described = described.get_ref();
        for from in &gpu.domains {
            for to in &gpu.domains {
                push(
                    from.pxm,
                    to.pxm,
                    described.hbm_latency_ns,
                    described.hbm_bandwidth_mbs,
                );
            }
        }
        for link in &gpu.links {
            let (latency, bandwidth) = (link.latency_ns, link.bandwidth_mbs);
            if let Some(cpu) = link
                .peer
                .strip_prefix("cpu")
                .and_then(|cpu| cpu.parse().ok())
            {
                for own in &gpu.domains {
                    push(cpu, own.pxm, latency, bandwidth);
                    push(own.pxm, cpu, latency, bandwidth);
                }
            }
            // Each link between GPUs is in the lists of both, so one direction each makes two.
            let peer = by_id.get(link.peer.as_str());
            for to in peer.into_iter().flat_map(|peer| &peer.domains) {
                gpu.domains
                    .iter()
                    .for_each(|from| push(from.pxm, to.pxm, latency, bandwidth));
            }
        }
    }
    all.sort_by_key(|access| (access.initiator, access.target));
    all
}

impl Plan {
    /// What is known of accesses from one domain to another's memory.
    pub fn access(&self, initiator: u32, target: u32) -> Option<&Access> {
        let key = |access: &Access| (access.initiator, access.target);
        let found = self
            .accesses
            .binary_search_by_key(&(initiator, target), key)
            .ok()?;
        self.accesses.get(found)
    }

    /// CPUs of each socket: those of a CPU node if all nodes have as many, in order; else 1.
    pub fn cores_per_socket(&self) -> u32 {
        let nodes: Vec<_> = self
            .nodes
            .iter()
            .filter(|node| !node.cpus.is_empty())
            .collect();
        let each = nodes.first().map_or(1, |node| node.cpus.len());
        let even = nodes
            .iter()
            .all(|node| node.cpus.len() == each && node.cpus.is_sorted());
        let consecutive = nodes.iter().flat_map(|node| &node.cpus).is_sorted();
        if even && consecutive {
            u32::try_from(each).unwrap_or(1).max(1)
        } else {
            1
        }
    }

    /// The APIC id of a CPU: socket above core, the core in as many bits as a socket needs (Intel SDM volume 3,
    /// section 10.9.1, as QEMU's `include/hw/i386/topology.h` has it).
    pub fn apic_id(&self, cpu: u32) -> u32 {
        self.apic_ids()(cpu)
    }

    /// The same for all CPUs: what a socket has is looked at once.
    pub(crate) fn apic_ids(&self) -> impl Fn(u32) -> u32 + use<> {
        let cores = self.cores_per_socket();
        let bits = cores.next_power_of_two().trailing_zeros();
        move |cpu| ((cpu / cores) << bits) | (cpu % cores)
    }
}
