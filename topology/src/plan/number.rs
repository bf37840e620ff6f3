//! Numbers: which proximity domain each GPU's memory gets, and what Linux will call it.

use std::collections::BTreeMap;

use super::{NodeRange, domains};
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

/// The Generic Initiator object of every GPU's domain, and QEMU's order of them.
pub(super) struct Initiators {
    /// Name for every domain in order, none where the machine wants no initiator.
    pub names: Vec<Option<String>>,
    /// Domains in the order in which QEMU walks their initiators.
    walked: Vec<usize>,
}

/// Names the initiators, and says in which order QEMU will walk them.
pub(super) fn name_initiators(machine: &Machine, ram_nodes: usize, hbm: usize) -> Initiators {
    let all = domains(machine);
    let named: Vec<usize> = all
        .iter()
        .enumerate()
        .filter(|(_, domain)| {
            let gpu = machine.gpu.get(domain.gpu);
            gpu.is_some_and(|gpu| gpu.get_ref().is_initiator())
        })
        .map(|(index, _)| index)
        .collect();
    let backends = backend_names(ram_nodes, hbm);
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

/// Proximity domains of the GPUs' domains in order, and Linux's numbers.
pub(super) struct Numbering {
    pub pxm: Vec<u32>,
    pub linux: BTreeMap<u32, u32>,
}

impl Numbering {
    /// Whether Linux's numbers ascend with the domains.
    pub fn in_order(&self) -> bool {
        let numbers: Option<Vec<u32>> = self
            .pxm
            .iter()
            .map(|pxm| self.linux.get(pxm).copied())
            .collect();
        numbers.is_some_and(|numbers| numbers.is_sorted())
    }
}

/// Numbers the GPUs' domains so that Linux's node numbers ascend with them, if there is a way. `placed` are the
/// soft-reserved HBM ranges in order.
pub(super) fn number(
    machine: &Machine,
    checked: &Checked,
    ram: &[NodeRange],
    window: Range,
    placed: &[Range],
    initiators: &Initiators,
) -> Numbering {
    let before = machine.cpu.len() + machine.memory.len();
    let before = u32::try_from(before).unwrap_or(u32::MAX);
    let all = domains(machine);
    let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
    let owner: BTreeMap<u32, u32> = (0u32..)
        .zip(&checked.cpus)
        .flat_map(|(pxm, cpus)| cpus.iter().map(move |cpu| (*cpu, pxm)))
        .collect();
    let attempt = |pxm: Vec<u32>| {
        let ranges: Vec<(u32, Range)> = pxm
            .iter()
            .zip(&all)
            .filter_map(|(pxm, domain)| Some((*pxm, *placed.get(domain.range?)?)))
            .collect();
        let last = (before + count).saturating_sub(1);
        let entries = linux::window_entries(window, &ranges, last);
        let first = owner
            .values()
            .copied()
            .chain(
                initiators
                    .walked
                    .iter()
                    .filter_map(|index| pxm.get(*index).copied()),
            )
            .collect::<Vec<u32>>();
        let second = ram
            .iter()
            .map(|range| range.pxm)
            .chain(entries.iter().map(|entry: &WindowEntry| entry.pxm));
        let linux = linux::node_numbers(first, second);
        Numbering { pxm, linux }
    };
    let plain = attempt((0..count).map(|i| before + i).collect());
    if plain.in_order() || count == 0 {
        return plain;
    }
    // The range at the start of the window gets the highest number, the others ascend: then the free space between
    // the ranges, which QEMU credits to the highest, comes when that number has been met.
    let turned = attempt(
        (0..count)
            .map(|i| before + (i + count - 1) % count)
            .collect(),
    );
    if turned.in_order() { turned } else { plain }
}
