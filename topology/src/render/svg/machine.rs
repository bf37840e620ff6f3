//! CPU nodes, GPUs and links.

use std::collections::BTreeSet;
use std::fmt;

use super::canvas::{Canvas, fit, number, text_width};
use super::place::{Boxes, CPU_HEIGHT, CpuBox, GpuBox, PARTITION, Rect, depth, place};
use super::{FAINT, HBM, INK, Part, RAM, heading};
use crate::plan::{GpuLink, Plan};
use crate::render::links::{self, Drawn};
use crate::render::parts::{self, State};
use crate::render::text::cpu_list;
use crate::size::Size;

/// By bandwidth, the highest first.
const COLOURS: [&str; 6] = [
    "#b3312c", "#e08a1e", "#2f7f9e", "#5c8a3a", "#7d5aa6", "#8a6d4b",
];
const CPU_LINK: &str = "#4a6076";

pub(super) fn draw(plan: &Plan) -> Result<Part, fmt::Error> {
    let mut canvas = Canvas::new();
    heading(
        &mut canvas,
        "Nodes, GPUs and links",
        "node = Linux's number, PXM = the number in the ACPI tables",
    )?;
    let boxes = place(plan);
    for cpu in &boxes.cpus {
        let ground = cpu.ground;
        canvas.rect(
            (ground.x, ground.y, ground.w, ground.h),
            "rx=\"10\" fill=\"#f3f6f9\" stroke=\"#d7dfe6\" stroke-width=\"1\"",
        )?;
    }
    let style = Style::new(plan);
    let ports = ports(plan, &boxes);
    for (index, drawn) in links::drawn(plan).into_iter().enumerate() {
        link(&mut canvas, &boxes, &style, &ports, (index, &drawn))?;
    }
    attachments(&mut canvas, &boxes)?;
    for cpu in &boxes.cpus {
        cpu_box(&mut canvas, plan, cpu)?;
    }
    for gpu in &boxes.gpus {
        gpu_box(&mut canvas, plan, gpu)?;
    }
    for label in &ports {
        label.draw(&mut canvas, &style)?;
    }
    let width = boxes.width.max(440.0);
    let height = legend(&mut canvas, plan, &style, (width, boxes.bottom + 30.0))?;
    Ok(Part {
        canvas,
        width,
        height,
    })
}

/// How links look.
struct Style {
    widest: f64,
    /// Width of the widest link: the more links a GPU has, the thinner.
    thickest: f64,
    /// Bandwidths between GPUs, the highest first.
    classes: Vec<u32>,
}

impl Style {
    fn new(plan: &Plan) -> Style {
        let between = links::drawn(plan).into_iter();
        let speeds: BTreeSet<u32> = between
            .filter(|drawn| drawn.peer.is_some())
            .map(|drawn| drawn.link.bandwidth_mbs)
            .collect();
        let most = plan
            .gpus
            .iter()
            .map(|gpu| gpu.links.len())
            .max()
            .unwrap_or(0);
        Style {
            widest: f64::from(links::widest(plan).max(1)),
            thickest: (26.0 / number(most.max(1))).clamp(2.0, 8.0),
            classes: speeds.into_iter().rev().collect(),
        }
    }

    fn colour(&self, link: &GpuLink, to_gpu: bool) -> &'static str {
        if !to_gpu {
            return CPU_LINK;
        }
        let class = self
            .classes
            .iter()
            .position(|mbs| *mbs == link.bandwidth_mbs);
        let last = COLOURS.last().copied().unwrap_or(INK);
        class
            .and_then(|class| COLOURS.get(class))
            .copied()
            .unwrap_or(last)
    }

    fn stroke(&self, link: &GpuLink, to_gpu: bool) -> String {
        let width = 1.4 + (self.thickest - 1.4) * f64::from(link.bandwidth_mbs) / self.widest;
        let dashes = match link.bandwidth_mbs {
            0 => " stroke-dasharray=\"6 3\"",
            _ => "",
        };
        format!(
            "stroke=\"{}\" stroke-width=\"{width:.1}\"{dashes}",
            self.colour(link, to_gpu)
        )
    }
}

/// Where a link meets the inner side of a GPU's box.
struct Port<'a> {
    /// Position among the links drawn.
    link: usize,
    /// Position of the GPU in the description.
    gpu: u32,
    x: f64,
    y: f64,
    drawn: Drawn<'a>,
    /// Up or down, away from the box.
    away: f64,
    /// Space to the next port.
    room: f64,
}

impl Port<'_> {
    /// Its bandwidth in GB/s.
    fn draw(&self, canvas: &mut Canvas, style: &Style) -> fmt::Result {
        let mbs = self.drawn.link.bandwidth_mbs;
        let Some(text) = links::bandwidth(mbs).map(|text| text.replace(" GB/s", "")) else {
            return Ok(());
        };
        let width = text_width(&text, 10.0) + 5.0;
        if width + 6.0 > self.room {
            return Ok(());
        }
        let y = self.y + self.away * 15.0;
        label(
            canvas,
            (self.x, y),
            &text,
            style.colour(self.drawn.link, true),
        )
    }
}

/// A text on a link.
fn label(canvas: &mut Canvas, (x, y): (f64, f64), text: &str, colour: &str) -> fmt::Result {
    let width = text_width(text, 10.0) + 5.0;
    canvas.rect(
        (x - width / 2.0, y - 7.0, width, 14.0),
        "rx=\"4\" fill=\"#ffffff\" fill-opacity=\"0.94\"",
    )?;
    canvas.text(
        (x, y + 3.6),
        &format!("font-size=\"10\" font-weight=\"bold\" text-anchor=\"middle\" fill=\"{colour}\""),
        text,
    )
}

/// Two GPUs side by side are joined by a straight line, all others by way of ports.
fn neighbours(a: &GpuBox<'_>, b: &GpuBox<'_>) -> bool {
    a.row == b.row && a.column.abs_diff(b.column) == 1
}

fn find<'b, 'a>(boxes: &'b Boxes<'a>, index: u32) -> Option<&'b GpuBox<'a>> {
    boxes.gpus.iter().find(|gpu| gpu.gpu.index == index)
}

fn ports<'a>(plan: &'a Plan, boxes: &Boxes<'a>) -> Vec<Port<'a>> {
    let mut all = Vec::new();
    let drawn = links::drawn(plan);
    for own in &boxes.gpus {
        // To the left the nearest first, then across by place, then to the right the farthest first: fewest crossings.
        let mut ends: Vec<((u8, f64), usize, Drawn<'a>)> = Vec::new();
        for (index, link) in drawn.iter().enumerate() {
            let Some(peer) = link.peer else { continue };
            let other = match own.gpu.index {
                gpu if gpu == link.gpu.index => peer.index,
                gpu if gpu == peer.index => link.gpu.index,
                _ => continue,
            };
            let Some(other) = find(boxes, other) else {
                continue;
            };
            if neighbours(own, other) {
                continue;
            }
            let key = match (own.row == other.row, other.column < own.column) {
                (true, true) => (0, -other.rect.x),
                (false, _) => (1, other.rect.x),
                (true, false) => (2, -other.rect.x),
            };
            ends.push((key, index, *link));
        }
        ends.sort_by(|(a, ..), (b, ..)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let step = own.rect.w / (number(ends.len()) + 1.0);
        let mut x = own.rect.x;
        for (_, link, drawn) in ends {
            x += step;
            let (y, away) = match own.row {
                0 => (own.rect.bottom(), 1.0),
                _ => (own.rect.y, -1.0),
            };
            let gpu = own.gpu.index;
            all.push(Port {
                link,
                gpu,
                x,
                y,
                drawn,
                away,
                room: step,
            });
        }
    }
    all
}

fn link(
    canvas: &mut Canvas,
    boxes: &Boxes<'_>,
    style: &Style,
    ports: &[Port<'_>],
    (index, drawn): (usize, &Drawn<'_>),
) -> fmt::Result {
    canvas.open(&format!(
        "{} - {}: {}",
        drawn.gpu.id,
        drawn.link.peer,
        links::label(drawn.link)
    ))?;
    let stroke = style.stroke(drawn.link, drawn.peer.is_some());
    let colour = style.colour(drawn.link, drawn.peer.is_some());
    let speed = links::bandwidth(drawn.link.bandwidth_mbs).unwrap_or_default();
    let own = find(boxes, drawn.gpu.index);
    match (own, drawn.peer.and_then(|peer| find(boxes, peer.index))) {
        (Some(a), Some(b)) if neighbours(a, b) => {
            let (a, b) = if a.column < b.column { (a, b) } else { (b, a) };
            let y = a.rect.y + 21.0;
            canvas.line((a.rect.right(), y), (b.rect.x, y), &stroke)?;
            if boxes.roomy && !speed.is_empty() {
                let x = (a.rect.right() + b.rect.x) / 2.0;
                label(canvas, (x, y + 16.0), &speed, colour)?;
            }
        }
        (Some(a), Some(b)) => {
            let port = |of: &GpuBox<'_>| {
                let mut own = ports.iter().filter(|port| port.link == index);
                own.find(|port| port.gpu == of.gpu.index)
                    .map(|port| (port.x, port.y))
            };
            if let (Some(from), Some(to)) = (port(a), port(b)) {
                canvas.curve(curve(a, b, from, to), &stroke)?;
            }
        }
        (Some(gpu), None) => {
            let cpu = boxes
                .cpus
                .iter()
                .find(|cpu| links::cpu_name(cpu.node.pxm) == drawn.link.peer);
            if let Some(cpu) = cpu {
                to_cpu(canvas, gpu, cpu, &stroke)?;
                if cpu.node.pxm == gpu.gpu.cpu_pxm && !speed.is_empty() {
                    let y = drop_middle(gpu, cpu);
                    label(canvas, (gpu.rect.middle() + 32.0, y), &speed, colour)?;
                }
            }
        }
        _ => {}
    }
    canvas.close()
}

/// Halfway between a GPU and the CPU node it is attached to.
fn drop_middle(gpu: &GpuBox<'_>, cpu: &CpuBox<'_>) -> f64 {
    match gpu.row {
        0 => (gpu.rect.y + cpu.rect.bottom()) / 2.0,
        _ => (gpu.rect.bottom() + cpu.rect.y) / 2.0,
    }
}

fn curve(a: &GpuBox<'_>, b: &GpuBox<'_>, from: (f64, f64), to: (f64, f64)) -> [(f64, f64); 4] {
    if a.row == b.row {
        // A cubic reaches three quarters of the way to its control points.
        let reach = depth(a.column.abs_diff(b.column)) * 4.0 / 3.0;
        let reach = if a.row == 0 { reach } else { -reach };
        let lean = (to.0 - from.0) * 0.12;
        return [
            from,
            (from.0 + lean, from.1 + reach),
            (to.0 - lean, to.1 + reach),
            to,
        ];
    }
    let half = (to.1 - from.1) * 0.55;
    [from, (from.0, from.1 + half), (to.0, to.1 - half), to]
}

fn to_cpu(canvas: &mut Canvas, gpu: &GpuBox<'_>, cpu: &CpuBox<'_>, stroke: &str) -> fmt::Result {
    let x = gpu.rect.middle();
    if cpu.node.pxm == gpu.gpu.cpu_pxm {
        let (from, to) = match gpu.row {
            0 => (cpu.rect.bottom(), gpu.rect.y),
            _ => (gpu.rect.bottom(), cpu.rect.y),
        };
        return canvas.line((x, from), (x, to), stroke);
    }
    // To another CPU node: behind the boxes.
    let to = (cpu.rect.middle(), cpu.rect.y + cpu.rect.h / 2.0);
    let from = (x, gpu.rect.y + gpu.rect.h / 2.0);
    let half = (to.1 - from.1) * 0.5;
    canvas.curve(
        [from, (from.0, from.1 + half), (to.0, to.1 - half), to],
        stroke,
    )
}

/// A dotted line from each GPU without a link to its CPU node.
fn attachments(canvas: &mut Canvas, boxes: &Boxes<'_>) -> fmt::Result {
    for gpu in boxes
        .gpus
        .iter()
        .filter(|gpu| !links::has_cpu_link(gpu.gpu))
    {
        let cpu = boxes
            .cpus
            .iter()
            .find(|cpu| cpu.node.pxm == gpu.gpu.cpu_pxm);
        if let Some(cpu) = cpu {
            let stroke =
                format!("stroke=\"{FAINT}\" stroke-width=\"1.4\" stroke-dasharray=\"2 4\"");
            to_cpu(canvas, gpu, cpu, &stroke)?;
        }
    }
    Ok(())
}

fn cpu_box(canvas: &mut Canvas, plan: &Plan, cpu: &CpuBox<'_>) -> fmt::Result {
    let (rect, node) = (cpu.rect, cpu.node);
    let bytes: u64 = node.ranges.iter().map(|range| range.size).sum();
    let cpus = match node.cpus.len() {
        1 => format!("CPU {}", cpu_list(&node.cpus)),
        count => format!("{count} CPUs: {}", cpu_list(&node.cpus)),
    };
    canvas.open(&format!("{}: {cpus}", links::cpu_name(node.pxm)))?;
    canvas.rect(
        (rect.x, rect.y, rect.w, rect.h),
        &format!("rx=\"6\" fill=\"{RAM}\" stroke=\"{INK}\" stroke-width=\"1.1\""),
    )?;
    let x = rect.middle();
    let room = rect.w - 12.0;
    let small = "font-size=\"11\" text-anchor=\"middle\"";
    canvas.text(
        (x, rect.y + 19.0),
        "font-size=\"14\" font-weight=\"bold\" text-anchor=\"middle\"",
        &links::cpu_name(node.pxm),
    )?;
    let numbers = format!("node {} · PXM {}", node.linux_node, node.pxm);
    canvas.text((x, rect.y + 35.0), small, &numbers)?;
    canvas.text((x, rect.y + 50.0), small, &fit(&cpus, room, 11.0))?;
    canvas.text((x, rect.y + 65.0), small, &format!("{} RAM", Size(bytes)))?;
    let mut y = rect.y + CPU_HEIGHT;
    for memory in parts::memory_nodes(plan, node) {
        part_box(canvas, rect, y, &parts::of_memory(memory))?;
        y += PARTITION;
    }
    canvas.close()
}

/// A part of HBM in the box `rect`.
fn part_box(canvas: &mut Canvas, rect: Rect, y: f64, part: &parts::Part) -> fmt::Result {
    let dashes = match part.state {
        State::Online => "",
        State::Possible | State::Nowhere => " fill-opacity=\"0.45\" stroke-dasharray=\"4 3\"",
    };
    let (x, height) = (rect.middle(), PARTITION - 4.0);
    canvas.rect(
        (rect.x + 6.0, y, rect.w - 12.0, height),
        &format!("rx=\"4\" fill=\"{HBM}\" stroke=\"{INK}\" stroke-width=\"0.9\"{dashes}"),
    )?;
    let size = format!("{} HBM", Size(part.size));
    let bold = "font-size=\"11\" font-weight=\"bold\" text-anchor=\"middle\"";
    canvas.text((x, y + 13.5), bold, &fit(&size, rect.w - 16.0, 11.0))?;
    let numbers = match part.state {
        State::Nowhere => "in a BAR, no node".to_owned(),
        _ => format!("{} · {}", part.nodes(), part.pxms()),
    };
    let plain = "font-size=\"10.5\" text-anchor=\"middle\"";
    canvas.text((x, y + 26.5), plain, &numbers)
}

fn gpu_box(canvas: &mut Canvas, plan: &Plan, of: &GpuBox<'_>) -> fmt::Result {
    let (rect, gpu) = (of.rect, of.gpu);
    let pci = format!("{} · {}", gpu.bdf, gpu.exposure);
    canvas.open(&format!("{} {pci}", gpu.id))?;
    canvas.rect(
        (rect.x, rect.y, rect.w, rect.h),
        &format!("rx=\"6\" fill=\"#ffffff\" stroke=\"{INK}\" stroke-width=\"1.3\""),
    )?;
    let x = rect.middle();
    canvas.text(
        (x, rect.y + 18.0),
        "font-size=\"14\" font-weight=\"bold\" text-anchor=\"middle\"",
        &fit(&gpu.id, rect.w - 12.0, 14.0),
    )?;
    let faint = format!("font-size=\"10.5\" text-anchor=\"middle\" fill=\"{FAINT}\"");
    canvas.text((x, rect.y + 33.0), &faint, &pci)?;
    let mut y = rect.y + 41.0;
    for part in parts::of(plan, gpu) {
        part_box(canvas, rect, y, &part)?;
        y += PARTITION;
    }
    canvas.close()
}

/// What lines and frames mean; gives where it ends.
fn legend(
    canvas: &mut Canvas,
    plan: &Plan,
    style: &Style,
    (width, top): (f64, f64),
) -> Result<f64, fmt::Error> {
    let mut kinds: Vec<(bool, &GpuLink)> = Vec::new();
    for drawn in links::drawn(plan) {
        let to_gpu = drawn.peer.is_some();
        let same = |(other, link): &(bool, &GpuLink)| {
            *other == to_gpu && links::label(link) == links::label(drawn.link)
        };
        if !kinds.iter().any(same) {
            kinds.push((to_gpu, drawn.link));
        }
    }
    kinds.sort_by_key(|(to_gpu, link)| (!*to_gpu, u32::MAX - link.bandwidth_mbs, link.count));
    let (mut x, mut y) = (0.0, top);
    let mut item = |canvas: &mut Canvas, text: &str, online: Option<bool>, stroke: &str| {
        let needed = 44.0 + text_width(text, 11.0) + 14.0;
        if x > 0.0 && x + needed > width {
            (x, y) = (0.0, y + 22.0);
        }
        match online {
            Some(_) => canvas.rect(
                (x + 4.0, y - 7.0, 26.0, 14.0),
                &format!("rx=\"3\" {stroke}"),
            )?,
            None => canvas.line((x, y), (x + 34.0, y), stroke)?,
        }
        canvas.text((x + 42.0, y + 4.0), "font-size=\"11\"", text)?;
        x += needed;
        Ok::<f64, fmt::Error>(y)
    };
    let mut end = top;
    for (to_gpu, link) in kinds {
        let ends = if to_gpu { "GPU to GPU" } else { "GPU to CPU" };
        let text = format!("{ends}: {}", links::label(link));
        end = item(canvas, &text, None, &style.stroke(link, to_gpu))?;
    }
    let attached = plan.gpus.iter().any(|gpu| !links::has_cpu_link(gpu));
    if attached {
        let stroke = format!("stroke=\"{FAINT}\" stroke-width=\"1.4\" stroke-dasharray=\"2 4\"");
        end = item(canvas, "attached, no link given", None, &stroke)?;
    }
    let frame = format!("fill=\"{HBM}\" stroke=\"{INK}\" stroke-width=\"0.9\"");
    let states: Vec<State> = plan
        .gpus
        .iter()
        .flat_map(|gpu| parts::of(plan, gpu))
        .map(|part| part.state)
        .collect();
    if states.contains(&State::Online) {
        end = item(canvas, "HBM node, online at boot", Some(true), &frame)?;
    }
    let dashed = format!("{frame} fill-opacity=\"0.45\" stroke-dasharray=\"4 3\"");
    if states.contains(&State::Possible) {
        let text = "HBM node, possible: not online at boot";
        end = item(canvas, text, Some(false), &dashed)?;
    }
    if states.contains(&State::Nowhere) {
        end = item(canvas, "HBM without a node", Some(false), &dashed)?;
    }
    Ok(end + 12.0)
}
