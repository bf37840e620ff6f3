//! Compares what a guest saw with what was planned, one fact at a time.

mod access;

use serde::Serialize;

use crate::plan::{NodeKind, Plan};
use crate::ranges::Range;
use crate::seen::{Report, steps};
use crate::size::{MIB, Size};

/// One comparison.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact {
    /// What is compared.
    pub what: String,
    /// What the plan says.
    pub planned: String,
    /// What the guest saw.
    pub seen: String,
    /// Whether the two agree.
    pub ok: bool,
}

impl Fact {
    fn equal<T: PartialEq + ToString>(what: impl Into<String>, planned: &T, seen: &T) -> Fact {
        Fact {
            what: what.into(),
            planned: planned.to_string(),
            seen: seen.to_string(),
            ok: planned == seen,
        }
    }

    fn text(what: impl Into<String>, planned: String, seen: String) -> Fact {
        let ok = planned == seen;
        Fact {
            what: what.into(),
            planned,
            seen,
            ok,
        }
    }

    fn check(
        what: impl Into<String>,
        planned: impl Into<String>,
        seen: impl Into<String>,
        ok: bool,
    ) -> Fact {
        Fact {
            what: what.into(),
            planned: planned.into(),
            seen: seen.into(),
            ok,
        }
    }
}

/// A range as `0x100000000 + 4 GiB`.
pub fn range_text(range: Range) -> String {
    format!("{:#x} + {}", range.base, Size(range.size))
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        "none".to_owned()
    } else {
        items.join(" ")
    }
}

/// All of what should be one: more than one is as wrong as none.
fn each(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() {
        "none".to_owned()
    } else {
        items.join(" and ")
    }
}

/// Compares a report with the plan. Every fact is listed, whether it holds or not.
pub fn verify(plan: &Plan, report: &Report) -> Vec<Fact> {
    let mut facts = Vec::new();
    memory_map(plan, report, &mut facts);
    nodes(plan, report, &mut facts);
    access::classes(plan, report, &mut facts);
    dax(plan, report, &mut facts);
    gpus(plan, report, &mut facts);
    totals(plan, report, &mut facts);
    let problems = if report.problems.is_empty() {
        "none".to_owned()
    } else {
        report.problems.join("; ")
    };
    facts.push(Fact::text(
        "problems in the guest",
        "none".to_owned(),
        problems,
    ));
    facts
}

fn memory_map(plan: &Plan, report: &Report, facts: &mut Vec<Fact>) {
    let mut planned = plan.hbm_ranges();
    planned.sort();
    facts.push(Fact::equal(
        "E820 soft-reserved entries",
        &planned.len(),
        &report.soft_reserved.len(),
    ));
    for gpu in &plan.gpus {
        for (partition, hbm) in gpu.hbm.iter().enumerate() {
            let seen = report
                .soft_reserved
                .iter()
                .filter(|range| range.overlaps(&hbm.range()));
            facts.push(Fact::text(
                format!("E820 {} partition {partition}", gpu.id),
                range_text(hbm.range()),
                each(seen.map(|range| range_text(*range))),
            ));
            let entries = report
                .srat_memory
                .iter()
                .filter(|entry| !entry.hotplug && entry.range.overlaps(&hbm.range()));
            facts.push(Fact::text(
                format!("SRAT {} partition {partition}", gpu.id),
                format!("PXM {} {}", hbm.pxm, range_text(hbm.range())),
                each(entries.map(|entry| format!("PXM {} {}", entry.pxm, range_text(entry.range)))),
            ));
        }
    }
    let overlapping = report
        .usable
        .iter()
        .filter(|usable| planned.iter().any(|hbm| hbm.overlaps(usable)))
        .count();
    facts.push(Fact::check(
        "usable E820 entries with HBM",
        "0",
        if report.usable.is_empty() {
            "no usable entry seen".to_owned()
        } else {
            overlapping.to_string()
        },
        overlapping == 0 && !report.usable.is_empty(),
    ));
}

fn nodes(plan: &Plan, report: &Report, facts: &mut Vec<Fact>) {
    let mut online: Vec<u32> = plan
        .nodes
        .iter()
        .filter(|node| node.online)
        .map(|node| node.linux_node)
        .collect();
    online.sort_unstable();
    facts.push(Fact::text(
        "online nodes",
        list(&online),
        list(&report.nodes_online),
    ));
    let possible = plan
        .nodes
        .iter()
        .all(|node| report.nodes_possible.contains(&node.linux_node));
    facts.push(Fact::check(
        "possible nodes",
        format!("0 to {}", plan.nodes.len().saturating_sub(1)),
        list(&report.nodes_possible),
        possible && report.nodes_possible.len() == plan.nodes.len(),
    ));
    let initiators: Vec<u32> = plan
        .hbm()
        .filter(|hbm| hbm.initiator.is_some())
        .filter_map(|hbm| plan.linux_node(hbm.pxm))
        .collect();
    let mut sorted = initiators.clone();
    sorted.sort_unstable();
    facts.push(Fact::text(
        "nodes with a Generic Initiator",
        list(&sorted),
        list(&report.nodes_initiator),
    ));
    let rows = |matrix: &[Vec<u8>]| list(matrix.iter().map(|row| format!("[{}]", list(row))));
    facts.push(Fact::text("SLIT", rows(&plan.slit), rows(&report.slit)));
    let mut by_node: Vec<_> = plan.nodes.iter().filter(|node| node.online).collect();
    by_node.sort_by_key(|node| node.linux_node);
    for node in &by_node {
        let seen = report
            .nodes
            .iter()
            .find(|seen| seen.node == node.linux_node);
        let distance = |to: u32| {
            plan.slit
                .get(node.pxm as usize)
                .and_then(|row| row.get(to as usize))
                .copied()
                .unwrap_or(0)
        };
        facts.push(Fact::text(
            format!("node {} CPUs and distances", node.linux_node),
            format!(
                "cpus {} distances {}",
                list(&node.cpus),
                list(by_node.iter().map(|to| distance(to.pxm)))
            ),
            seen.map_or("not online".to_owned(), |seen| {
                format!(
                    "cpus {} distances {}",
                    list(&seen.cpus),
                    list(&seen.distances)
                )
            }),
        ));
        if node.kind == NodeKind::Hbm {
            facts.push(Fact::text(
                format!("node {} page-allocator memory in KiB", node.linux_node),
                "0".to_owned(),
                seen.map_or("not online".to_owned(), |seen| {
                    seen.mem_total_kib.to_string()
                }),
            ));
        }
    }
}

fn dax(plan: &Plan, report: &Report, facts: &mut Vec<Fact>) {
    use crate::machine::Driver;
    let user = plan.guest.driver == Driver::User;
    let expected = if user { plan.hbm().count() } else { 0 };
    facts.push(Fact::equal("dax devices", &expected, &report.dax.len()));
    if !user {
        return;
    }
    for gpu in &plan.gpus {
        for (partition, hbm) in gpu.hbm.iter().enumerate() {
            let seen = report.dax.iter().find(|dax| dax.region == hbm.range());
            let node = plan.linux_node(hbm.pxm).unwrap_or(u32::MAX);
            facts.push(Fact::text(
                format!("dax of {} partition {partition}", gpu.id),
                format!(
                    "{} target node {node} driver device_dax",
                    range_text(hbm.range())
                ),
                seen.map_or("none".to_owned(), |dax| {
                    let range = Range {
                        base: dax.region.base,
                        size: dax.size,
                    };
                    format!(
                        "{} target node {} driver {}",
                        range_text(range),
                        dax.target_node,
                        dax.driver
                    )
                }),
            ));
        }
    }
}

fn gpus(plan: &Plan, report: &Report, facts: &mut Vec<Fact>) {
    facts.push(Fact::equal("GPUs", &plan.gpus.len(), &report.gpus.len()));
    for gpu in &plan.gpus {
        let seen = report.gpus.iter().find(|seen| seen.index == gpu.index);
        let node = plan.linux_node(gpu.pci_pxm).unwrap_or(u32::MAX);
        facts.push(Fact::text(
            format!("{} PCI function", gpu.id),
            format!("{} class 1200 node {node}", gpu.bdf),
            seen.map_or("none".to_owned(), |seen| {
                format!(
                    "{} class {:04x} node {}",
                    seen.bdf,
                    seen.class >> 8,
                    seen.numa_node
                )
            }),
        ));
        facts.push(Fact::text(
            format!("{} hive", gpu.id),
            format!(
                "{:#x} position {} of {}",
                gpu.hive_id, gpu.hive_node, gpu.hive_size
            ),
            seen.map_or("none".to_owned(), |seen| {
                format!(
                    "{:#x} position {} of {}",
                    seen.hive.0, seen.hive.1, seen.hive.2
                )
            }),
        ));
        let peer = |peer: Option<u32>| peer.map_or("cpu".to_owned(), |peer| peer.to_string());
        facts.push(Fact::text(
            format!("{} links (peer x count @ MB/s)", gpu.id),
            list(
                gpu.links
                    .iter()
                    .map(|l| format!("{}x{}@{}", peer(l.peer_hive_node), l.count, l.bandwidth_mbs)),
            ),
            seen.map_or("none".to_owned(), |seen| {
                let name = |node: u32| peer(Some(node).filter(|node| *node != u32::MAX));
                list(
                    seen.links
                        .iter()
                        .map(|(node, count, mbs)| format!("{}x{count}@{mbs}", name(*node))),
                )
            }),
        ));
        facts.push(Fact::text(
            format!("{} partitions", gpu.id),
            gpu.hbm.len().to_string(),
            seen.map_or("none".to_owned(), |seen| seen.partitions.len().to_string()),
        ));
        for (partition, hbm) in gpu.hbm.iter().enumerate() {
            let registers = seen.and_then(|seen| seen.partitions.get(partition));
            facts.push(Fact::text(
                format!("{} partition {partition} registers", gpu.id),
                format!("{} PXM {} Coherent", range_text(hbm.range()), hbm.pxm),
                registers.map_or("none".to_owned(), |p| {
                    format!("{} PXM {} {}", range_text(p.range), p.pxm, p.coherence)
                }),
            ));
        }
        for name in steps::ALL {
            let done: Vec<_> = seen
                .iter()
                .flat_map(|seen| &seen.steps)
                .filter(|step| step.name == *name)
                .collect();
            // Of a step that was done more than once, the failure counts.
            let step = done.iter().find(|step| !step.ok).or(done.first());
            facts.push(Fact::check(
                format!("{} {name}", gpu.id),
                "works",
                step.map_or("not done".to_owned(), |step| {
                    match (step.detail.as_str(), step.ok) {
                        ("", true) => "works".to_owned(),
                        ("", false) => "failed".to_owned(),
                        (detail, _) => detail.to_owned(),
                    }
                }),
                step.is_some_and(|step| step.ok),
            ));
        }
    }
}

fn totals(plan: &Plan, report: &Report, facts: &mut Vec<Fact>) {
    let ram = plan.ram_bytes() / 1024;
    for (index, when) in ["before", "during", "after"].iter().enumerate() {
        let seen = report.mem_total_kib.get(index).copied();
        facts.push(Fact::check(
            format!("MemTotal {when} the run"),
            format!("at most {} MiB, the RAM", plan.ram_bytes() / MIB),
            seen.map_or("not seen".to_owned(), |kib| format!("{} MiB", kib / 1024)),
            // A kernel keeps some RAM for itself; half of it being gone would be another machine.
            seen.is_some_and(|kib| kib <= ram && kib >= ram / 2),
        ));
    }
}

/// The table of facts, and as its last line `verified: N of N` or how many differ.
pub fn table(facts: &[Fact], all: bool) -> String {
    let mut text = String::new();
    let what = facts
        .iter()
        .map(|fact| fact.what.len())
        .max()
        .unwrap_or(0)
        .max(4);
    let planned = facts
        .iter()
        .map(|fact| fact.planned.len())
        .max()
        .unwrap_or(0)
        .clamp(7, 60);
    if all || facts.iter().any(|fact| !fact.ok) {
        text.push_str(&format!(
            "     {:what$}  {:planned$}  seen\n",
            "fact", "planned"
        ));
    }
    for fact in facts.iter().filter(|fact| all || !fact.ok) {
        let mark = if fact.ok { "ok  " } else { "DIFF" };
        let seen = if fact.seen == fact.planned && fact.seen.len() > 12 {
            "the same"
        } else {
            &fact.seen
        };
        text.push_str(&format!(
            "{mark} {:what$}  {:planned$}  {seen}\n",
            fact.what, fact.planned
        ));
    }
    let good = facts.iter().filter(|fact| fact.ok).count();
    text.push_str(&format!("verified: {good} of {}\n", facts.len()));
    text
}
