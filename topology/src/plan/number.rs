//! Numbers: which proximity domain each HBM range gets, and what Linux will call it.

use std::collections::BTreeMap;

use super::{NodeRange, partitions};
use crate::linux::{self, WindowEntry};
use crate::machine::Machine;
use crate::qom;
use crate::ranges::Range;
use crate::validate::Checked;

/// QEMU's names of its memory backends, in the order of the command line.
pub(crate) fn backend_names(cpu_nodes: usize, hbm: usize) -> Vec<String> {
    (0..cpu_nodes)
        .map(|i| format!("ram{i}"))
        .chain((0..hbm).map(|i| format!("hbm{i}")))
        .collect()
}

/// The Generic Initiator object of every HBM range, and QEMU's order of them.
pub(super) struct Initiators {
    /// Name for every HBM range in order, none where the machine wants no initiator.
    pub names: Vec<Option<String>>,
    /// HBM ranges in the order in which QEMU walks their initiators.
    walked: Vec<usize>,
}

/// Names the initiators, and says in which order QEMU will walk them.
pub(super) fn name_initiators(machine: &Machine) -> Initiators {
    let all = partitions(machine);
    let named: Vec<usize> = (0..all.len())
        .filter(|i| {
            all.get(*i)
                .and_then(|(gpu, _)| machine.gpu.get(*gpu))
                .is_some_and(|gpu| gpu.get_ref().generic_initiator)
        })
        .collect();
    let backends = backend_names(machine.cpu.len(), all.len());
    let chosen = qom::initiator_names(named.len(), &backends);
    let mut names = vec![None; all.len()];
    for (name, index) in chosen.iter().zip(&named) {
        if let Some(slot) = names.get_mut(*index) {
            *slot = Some(name.clone());
        }
    }
    let walked = qom::initiators_walked(&chosen, &backends)
        .into_iter()
        .filter_map(|position| named.get(position).copied())
        .collect();
    Initiators { names, walked }
}

/// Proximity domains of the HBM ranges in order, and Linux's numbers.
pub(super) struct Numbering {
    pub hbm_pxm: Vec<u32>,
    pub linux: BTreeMap<u32, u32>,
}

/// Numbers the HBM ranges so that Linux's node numbers ascend with them, if there is a way.
pub(super) fn number(
    machine: &Machine,
    checked: &Checked,
    ram: &[NodeRange],
    window: Range,
    placed: &[Range],
    initiators: &Initiators,
) -> Numbering {
    let cpus = u32::try_from(machine.cpu.len()).unwrap_or(u32::MAX);
    let count = u32::try_from(placed.len()).unwrap_or(u32::MAX);
    let owner: BTreeMap<u32, u32> = (0u32..)
        .zip(&checked.cpus)
        .flat_map(|(pxm, cpus)| cpus.iter().map(move |cpu| (*cpu, pxm)))
        .collect();
    let attempt = |hbm_pxm: Vec<u32>| {
        let ranges: Vec<(u32, Range)> = hbm_pxm
            .iter()
            .copied()
            .zip(placed.iter().copied())
            .collect();
        let last = (cpus + count).saturating_sub(1);
        let entries = linux::window_entries(window, &ranges, last);
        let first = owner
            .values()
            .copied()
            .chain(
                initiators
                    .walked
                    .iter()
                    .filter_map(|index| hbm_pxm.get(*index).copied()),
            )
            .collect::<Vec<u32>>();
        let second = ram
            .iter()
            .map(|range| range.pxm)
            .chain(entries.iter().map(|entry: &WindowEntry| entry.pxm));
        let linux = linux::node_numbers(first, second);
        Numbering { hbm_pxm, linux }
    };
    let in_order = |numbering: &Numbering| {
        numbering
            .hbm_pxm
            .iter()
            .zip(cpus..)
            .all(|(pxm, node)| numbering.linux.get(pxm) == Some(&node))
    };
    let plain = attempt((0..count).map(|i| cpus + i).collect());
    if in_order(&plain) || count == 0 {
        return plain;
    }
    // The range at the start of the window gets the highest number, the others ascend: then the free space between
    // the ranges, which QEMU credits to the highest, comes when that number has been met.
    let turned = attempt((0..count).map(|i| cpus + (i + count - 1) % count).collect());
    if in_order(&turned) { turned } else { plain }
}
