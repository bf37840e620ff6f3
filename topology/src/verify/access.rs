//! Access classes: what Linux made of QEMU's HMAT.

use super::{Fact, list};
use crate::linux::access::Class;
use crate::plan::Plan;
use crate::qemu;
use crate::seen::{AccessSeen, NodeSeen, Report};

fn text(initiators: &[u32], latency_ns: (u32, u32), bandwidth_mbs: (u32, u32)) -> String {
    let value = |what: &str, (read, write): (u32, u32), unit: &str| match (read, write) {
        (0, 0) => format!("{what} not known"),
        (read, write) if read == write => format!("{what} {read} {unit}"),
        (read, write) => format!("{what} {read}/{write} {unit}"),
    };
    format!(
        "initiators {} {} {}",
        list(initiators),
        value("latency", latency_ns, "ns"),
        value("bandwidth", bandwidth_mbs, "MB/s")
    )
}

/// Each online node's two classes; without an HMAT, that there are none.
pub(super) fn classes(plan: &Plan, report: &Report, facts: &mut Vec<Fact>) {
    let hmat = qemu::hmat(plan);
    // Domains without memory are no target.
    let with_memory = plan.nodes.iter().filter(|node| !node.ranges.is_empty());
    let mut online: Vec<_> = with_memory.filter(|node| node.online).collect();
    online.sort_by_key(|node| node.linux_node);
    // A node that only is an initiator of others' memory has the directories, with no initiator in them.
    let is_target = |node: &&NodeSeen| node.access.iter().any(|a| !a.initiators.is_empty());
    let with_classes = report.nodes.iter().filter(is_target);
    let planned: Vec<u32> = match hmat {
        Some(_) => online.iter().map(|node| node.linux_node).collect(),
        None => Vec::new(),
    };
    facts.push(Fact::check(
        "nodes with access classes",
        list(&planned),
        if report.nodes.is_empty() {
            "no node seen".to_owned()
        } else {
            list(with_classes.clone().map(|node| node.node))
        },
        !report.nodes.is_empty() && with_classes.map(|node| node.node).eq(planned),
    ));
    let Some(hmat) = hmat else { return };
    let planned = |class: &Class| {
        let nodes = class.initiators.iter();
        let mut nodes: Vec<u32> = nodes.filter_map(|pxm| plan.linux_node(*pxm)).collect();
        nodes.sort_unstable();
        let (latency, bandwidth) = (class.latency_ns, class.bandwidth_mbs);
        text(&nodes, (latency, latency), (bandwidth, bandwidth))
    };
    for node in online {
        let mut all = report.nodes.iter();
        let seen = all.find(|seen| seen.node == node.linux_node);
        for class in [0, 1] {
            let of_class = |access: &&AccessSeen| access.class == class;
            let access = seen.and_then(|seen| seen.access.iter().find(of_class));
            facts.push(Fact::text(
                format!("node {} access{class}", node.linux_node),
                planned(&hmat.class(node.pxm, class)),
                access.map_or("none".to_owned(), |access| {
                    text(&access.initiators, access.latency_ns, access.bandwidth_mbs)
                }),
            ));
        }
    }
}
