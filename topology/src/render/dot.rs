//! The machine as a graph for Graphviz.

use std::fmt::{self, Write};

use crate::plan::{Gpu, Plan};
use crate::render::links;
use crate::render::parts::{self, State};
use crate::render::text::cpu_list;
use crate::size::Size;

/// A string of Graphviz' language, without its quotes; a line end becomes `\n`, which centres.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                c if c.is_control() => f.write_str(" ")?,
                c => write!(f, "{c}")?,
            }
        }
        Ok(())
    }
}

/// CPU nodes as clusters, GPUs inside the one they are attached to, links as edges: the wider, the faster.
pub fn dot(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_dot(plan, &mut out);
    out
}

fn write_dot(plan: &Plan, out: &mut String) -> fmt::Result {
    const FONT: &str = "fontname=\"Helvetica,Arial,sans-serif\"";
    writeln!(out, "graph \"{}\" {{", Quoted(&plan.name))?;
    let title = format!("{}\n{}", plan.name, plan.description);
    writeln!(
        out,
        "  graph [label=\"{}\", labelloc=t, fontsize=18, ranksep=0.9, nodesep=0.6, {FONT}];",
        Quoted(&title)
    )?;
    writeln!(
        out,
        "  node [shape=box, style=\"rounded,filled\", color=\"#33475b\", {FONT}];"
    )?;
    writeln!(out, "  edge [color=\"#33475b\", fontsize=10, {FONT}];")?;
    for (node, gpus) in links::cpu_nodes(plan) {
        let bytes: u64 = node.ranges.iter().map(|range| range.size).sum();
        let name = links::cpu_name(node.pxm);
        writeln!(out, "  subgraph \"cluster_{name}\" {{")?;
        writeln!(
            out,
            "    graph [label=\"PXM {}, Linux node {}\", style=rounded, color=\"#9fb3c8\", fontsize=12];",
            node.pxm, node.linux_node
        )?;
        let label = format!("{name}\nCPUs {}\n{} RAM", cpu_list(&node.cpus), Size(bytes));
        writeln!(
            out,
            "    \"{name}\" [label=\"{}\", fillcolor=\"#cfe3f5\"];",
            Quoted(&label)
        )?;
        for memory in parts::memory_nodes(plan, node) {
            let (name, part) = (links::node_name(plan, memory), parts::of_memory(memory));
            let (size, pxms, nodes) = (Size(part.size), part.pxms(), part.nodes());
            let label = format!("{name}\n{size} HBM\n{pxms}, Linux {nodes}");
            writeln!(
                out,
                "    \"{name}\" [label=\"{}\", fillcolor=\"#fbe0bd\"];",
                Quoted(&label)
            )?;
        }
        for gpu in gpus {
            writeln!(
                out,
                "    \"{}\" [label=\"{}\", fillcolor=\"#fbe0bd\"];",
                Quoted(&gpu.id),
                Quoted(&gpu_label(plan, gpu))
            )?;
        }
        writeln!(out, "  }}")?;
    }
    for gpu in plan.gpus.iter().filter(|gpu| !links::has_cpu_link(gpu)) {
        writeln!(
            out,
            "  \"{}\" -- \"{}\" [style=dotted];",
            links::cpu_name(gpu.cpu_pxm),
            Quoted(&gpu.id)
        )?;
    }
    let widest = links::widest(plan).max(1);
    for drawn in links::drawn(plan) {
        // A CPU node comes first, which puts it above its GPUs.
        let (from, to) = match drawn.peer {
            Some(peer) => (&drawn.gpu.id, &peer.id),
            None => (&drawn.link.peer, &drawn.gpu.id),
        };
        let tenths = 10 + 50 * u64::from(drawn.link.bandwidth_mbs) / u64::from(widest);
        writeln!(
            out,
            "  \"{}\" -- \"{}\" [label=\"{}\", penwidth={}.{}{}];",
            Quoted(from),
            Quoted(to),
            Quoted(&links::label(drawn.link).replace(", ", "\n")),
            tenths / 10,
            tenths % 10,
            if drawn.peer.is_some() {
                ", constraint=false, color=\"#b5532a\""
            } else {
                ""
            }
        )?;
    }
    writeln!(out, "}}")
}

fn gpu_label(plan: &Plan, gpu: &Gpu) -> String {
    let mut label = format!("{}\n{} {}", gpu.id, gpu.bdf, gpu.exposure);
    for part in parts::of(plan, gpu) {
        let (size, pxms, nodes) = (Size(part.size), part.pxms(), part.nodes());
        label += &match part.state {
            State::Online => format!("\n{size} HBM, {pxms}, Linux {nodes}, online"),
            State::Possible => format!("\n{size} HBM, {pxms}, Linux {nodes}, possible"),
            State::Nowhere => format!("\n{size} HBM in a BAR, no node"),
        };
    }
    label
}
