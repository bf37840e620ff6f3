//! Compares what a guest saw with what was planned, one fact at a time.

mod access;

use serde::Serialize;

use crate::linux::BootPath;
use crate::machine::Exposure;
use crate::plan::{Gpu, Hbm, NodeKind, Plan};
use crate::predict::{Prediction, predict};
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

/// A proximity domain, or that there is none.
fn domain(pxm: Option<u32>) -> String {
    pxm.map_or("no PXM".to_owned(), |pxm| format!("PXM {pxm}"))
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

/// Compares a report of a guest that booted this way with the plan. Every fact is listed, whether it holds or not.
pub fn verify(plan: &Plan, boot: BootPath, report: &Report) -> Vec<Fact> {
    let prediction = predict(plan, boot);
    let mut facts = Vec::new();
    memory_map(plan, &prediction, report, &mut facts);
    nodes(plan, &prediction, report, &mut facts);
    access::classes(plan, report, &mut facts);
    dax(plan, &prediction, report, &mut facts);
    gpus(plan, &prediction, report, &mut facts);
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

fn memory_map(plan: &Plan, prediction: &Prediction, report: &Report, facts: &mut Vec<Fact>) {
    facts.push(Fact::equal(
        "E820 soft-reserved entries",
        &prediction.soft_reserved.len(),
        &report.soft_reserved.len(),
    ));
    let spm = |gpu: &&Gpu| gpu.exposure == Exposure::Spm;
    for gpu in plan.gpus.iter().filter(spm) {
        for (partition, hbm) in gpu.hbm.iter().enumerate() {
            let range = hbm.range();
            let of = |ranges: &[Range]| {
                let overlapping = ranges.iter().filter(|other| other.overlaps(&range));
                each(overlapping.map(|other| range_text(*other)))
            };
            facts.push(Fact::text(
                format!("E820 {} partition {partition}", gpu.id),
                of(&prediction.soft_reserved),
                of(&report.soft_reserved),
            ));
            let entries = report
                .srat_memory
                .iter()
                .filter(|entry| !entry.hotplug && entry.range.overlaps(&range));
            facts.push(Fact::text(
                format!("SRAT {} partition {partition}", gpu.id),
                format!("{} {}", domain(hbm.pxm), range_text(range)),
                each(entries.map(|entry| format!("PXM {} {}", entry.pxm, range_text(entry.range)))),
            ));
        }
    }
    let planned = plan.hbm_ranges();
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

fn nodes(plan: &Plan, prediction: &Prediction, report: &Report, facts: &mut Vec<Fact>) {
    facts.push(Fact::text(
        "online nodes",
        list(&prediction.online),
        list(&report.nodes_online),
    ));
    facts.push(Fact::text(
        "possible nodes",
        list(&prediction.possible),
        list(&report.nodes_possible),
    ));
    facts.push(Fact::text(
        "nodes with a Generic Initiator",
        list(&prediction.initiators),
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
        let soft_reserved = node.kind == NodeKind::Hbm && node.gpu.is_some();
        let what = format!("node {} page-allocator memory", node.linux_node);
        if soft_reserved {
            facts.push(Fact::text(
                what,
                "0 KiB".to_owned(),
                seen.map_or("not online".to_owned(), |seen| {
                    format!("{} KiB", seen.mem_total_kib)
                }),
            ));
        } else {
            let planned = node.ranges.iter().map(|range| range.size).sum::<u64>() / 1024;
            facts.push(Fact::check(
                what,
                format!("at most {} MiB, its RAM", planned / 1024),
                seen.map_or("not online".to_owned(), |seen| {
                    format!("{} MiB", seen.mem_total_kib / 1024)
                }),
                // A kernel keeps some for itself, mostly of the first node.
                seen.is_some_and(|s| s.mem_total_kib <= planned && s.mem_total_kib >= planned / 4),
            ));
        }
    }
}

fn dax(plan: &Plan, prediction: &Prediction, report: &Report, facts: &mut Vec<Fact>) {
    facts.push(Fact::equal(
        "dax devices",
        &prediction.dax.len(),
        &report.dax.len(),
    ));
    for dax in &prediction.dax {
        let seen = report
            .dax
            .iter()
            .find(|seen| seen.region.base == dax.range.base);
        let owner = plan.gpus.iter().find(|gpu| {
            let own = |hbm: &Hbm| hbm.base == dax.range.base;
            gpu.exposure == Exposure::Spm && gpu.hbm.iter().any(own)
        });
        let partition = owner.and_then(|gpu| gpu.hbm.iter().position(|h| h.base == dax.range.base));
        facts.push(Fact::text(
            format!(
                "dax of {} partition {}",
                owner.map_or("no GPU", |gpu| &gpu.id),
                partition.unwrap_or_default()
            ),
            format!(
                "{} target node {} near node {} driver device_dax",
                range_text(dax.range),
                dax.target_node,
                dax.numa_node
            ),
            seen.map_or("none".to_owned(), |seen| {
                let range = Range {
                    base: seen.region.base,
                    size: seen.size,
                };
                format!(
                    "{} target node {} near node {} driver {}",
                    range_text(range),
                    seen.target_node,
                    seen.numa_node,
                    seen.driver
                )
            }),
        ));
    }
}

fn gpus(plan: &Plan, prediction: &Prediction, report: &Report, facts: &mut Vec<Fact>) {
    facts.push(Fact::equal("GPUs", &plan.gpus.len(), &report.gpus.len()));
    for (gpu, function) in plan.gpus.iter().zip(&prediction.functions) {
        let seen = report.gpus.iter().find(|seen| seen.index == gpu.index);
        let node = function
            .node
            .map_or("-1".to_owned(), |node| node.to_string());
        facts.push(Fact::text(
            format!("{} PCI function", gpu.id),
            format!(
                "{} class {:04x} node {node}",
                function.bdf,
                plan.device.class() >> 8
            ),
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
        // HBM that is RAM is nothing that the device has.
        let owned = match gpu.exposure {
            Exposure::Ram => &[][..],
            Exposure::Spm | Exposure::Bar | Exposure::Private => &gpu.hbm[..],
        };
        facts.push(Fact::text(
            format!("{} partitions", gpu.id),
            owned.len().to_string(),
            seen.map_or("none".to_owned(), |seen| seen.partitions.len().to_string()),
        ));
        let coherence = match gpu.aperture {
            Some(_) => "Aperture",
            None => "Coherent",
        };
        for (partition, hbm) in owned.iter().enumerate() {
            let registers = seen.and_then(|seen| seen.partitions.get(partition));
            facts.push(Fact::text(
                format!("{} partition {partition} registers", gpu.id),
                format!(
                    "{} {} {coherence}",
                    range_text(hbm.range()),
                    domain(hbm.pxm)
                ),
                registers.map_or("none".to_owned(), |p| {
                    let pxm = Some(p.pxm).filter(|pxm| *pxm != u32::MAX);
                    format!("{} {} {}", range_text(p.range), domain(pxm), p.coherence)
                }),
            ));
        }
        facts.push(Fact::text(
            format!("{} clock", gpu.id),
            format!("{:?}", plan.device.timing),
            seen.map_or("none".to_owned(), |seen| seen.clock.clone()),
        ));
        let instances = [
            ("Link", gpu.links.len()),
            ("Partition", owned.len()),
            ("Queue", plan.device.queues() as usize),
        ];
        let several = |(name, _): &&(String, u32)| instances.iter().any(|(it, _)| it == name);
        facts.push(Fact::text(
            format!("{} instances of blocks", gpu.id),
            list(instances.map(|(name, count)| format!("{name}x{count}"))),
            seen.map_or("none".to_owned(), |seen| {
                let blocks = seen.blocks.iter().filter(several);
                list(blocks.map(|(name, count)| format!("{name}x{count}")))
            }),
        ));
        let driven = match gpu.exposure {
            Exposure::Ram => steps::UNIFIED,
            Exposure::Spm | Exposure::Bar | Exposure::Private => steps::ALL,
        };
        for name in driven {
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
