//! The machine as a picture: SVG 1.1 without anything from outside.
//!
//! Left the memory map (`map`), right CPU nodes, GPUs and links (`machine`), below that the distances (`matrix`).

mod canvas;
mod machine;
mod map;
mod matrix;
mod place;

use std::fmt;

use crate::machine::Exposure;
use crate::plan::{NodeKind, Plan};
use crate::render::xml::Escaped;
use crate::size::Size;
use canvas::{Canvas, N, fit};

const MARGIN: f64 = 36.0;
const COLUMN_GAP: f64 = 44.0;
const INK: &str = "#1f2d3a";
const FAINT: &str = "#5d6f80";
const RAM: &str = "#a9cdea";
const HBM: &str = "#f8c987";
const RESERVED: &str = "#c3c9cf";

/// Memory map, CPU nodes, GPUs, links and distances in one picture.
pub fn svg(plan: &Plan) -> String {
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write_svg(plan, &mut out);
    out
}

/// A part of the picture with its size.
struct Part {
    canvas: Canvas,
    width: f64,
    height: f64,
}

fn write_svg(plan: &Plan, out: &mut String) -> fmt::Result {
    let map = map::draw(plan)?;
    let machine = machine::draw(plan)?;
    let matrix = matrix::draw(plan)?;
    let right = MARGIN + map.width + COLUMN_GAP;
    let top = 116.0;
    let below = top + machine.height + 34.0;
    let width = right + machine.width.max(matrix.width).max(420.0) + MARGIN;
    let height = (top + map.height).max(below + matrix.height) + MARGIN;
    let mut page = Canvas::new();
    page.rect((0.0, 0.0, width, height), "fill=\"#ffffff\"")?;
    let room = width - 2.0 * MARGIN;
    page.text(
        (MARGIN, 50.0),
        "font-size=\"26\" font-weight=\"bold\"",
        &fit(&plan.name, room, 26.0),
    )?;
    page.text(
        (MARGIN, 74.0),
        &format!("font-size=\"14\" fill=\"{FAINT}\""),
        &fit(&plan.description, room, 14.0),
    )?;
    page.text((MARGIN, 96.0), "font-size=\"12\"", &summary(plan))?;
    page.part((MARGIN, top), &map.canvas)?;
    page.part((right, top), &machine.canvas)?;
    page.part((right, below), &matrix.canvas)?;
    frame(plan, (width, height), &page, out)
}

/// The root element around a page.
fn frame(plan: &Plan, (width, height): (f64, f64), page: &Canvas, out: &mut String) -> fmt::Result {
    use fmt::Write;
    let (width, height) = (N(width), N(height));
    writeln!(out, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>")?;
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" version=\"1.1\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"title desc\" \
         font-family=\"Inter, 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif\" fill=\"{INK}\">"
    )?;
    writeln!(out, "<title id=\"title\">{}</title>", Escaped(&plan.name))?;
    writeln!(
        out,
        "<desc id=\"desc\">{}. {}. Memory map, CPU nodes, GPUs, links and NUMA distances.</desc>",
        Escaped(&plan.description),
        Escaped(&summary(plan))
    )?;
    out.push_str(&page.out);
    writeln!(out, "</svg>")
}

/// What there is, in numbers.
fn summary(plan: &Plan) -> String {
    let count = |kind: NodeKind| plan.nodes.iter().filter(|node| node.kind == kind).count();
    let several = |count: usize, what: &str| match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    };
    let bytes = |is_ram: bool| -> u64 {
        let gpus = plan.gpus.iter();
        let gpus = gpus.filter(|gpu| (gpu.exposure == Exposure::Ram) == is_ram);
        gpus.flat_map(|gpu| &gpu.hbm).map(|hbm| hbm.size).sum()
    };
    let memory = plan.ram_nodes().filter(|node| node.kind == NodeKind::Hbm);
    let memory: u64 = memory
        .flat_map(|node| &node.ranges)
        .map(|range| range.size)
        .sum();
    let of_ram = match bytes(true) + memory {
        0 => String::new(),
        hbm => format!(", {} of it HBM", Size(hbm)),
    };
    let nodes = plan.domains().count();
    let mut parts = vec![
        several(count(NodeKind::Cpu), "CPU node"),
        several(plan.cpu_count(), "CPU"),
        format!("{} RAM{of_ram}", Size(plan.ram_bytes())),
        several(plan.gpus.len(), "GPU"),
    ];
    parts.extend(match (bytes(false), nodes) {
        (0, _) => None,
        (hbm, 0) => Some(format!("{} HBM in BARs", Size(hbm))),
        (hbm, nodes) => Some(format!("{} HBM in {}", Size(hbm), several(nodes, "node"))),
    });
    parts.push(format!("{} address bits", plan.phys_bits));
    parts.join("  ·  ")
}

/// Heading of a part, at the part's top.
fn heading(canvas: &mut Canvas, title: &str, note: &str) -> fmt::Result {
    canvas.text((0.0, 14.0), "font-size=\"15\" font-weight=\"bold\"", title)?;
    let attributes = format!("font-size=\"11\" fill=\"{FAINT}\"");
    canvas.text((0.0, 31.0), &attributes, note)
}
