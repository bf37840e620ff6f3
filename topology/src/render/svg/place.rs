//! Where boxes are: CPU nodes in one row or two, their GPUs on the inner side, so that links run between the rows.

use super::canvas::number;
use crate::plan::{Gpu, Node, NodeKind, Plan};
use crate::render::{links, parts};

pub(super) const GPU_WIDTH: f64 = 132.0;
pub(super) const CPU_HEIGHT: f64 = 76.0;
pub(super) const PARTITION: f64 = 36.0;
pub(super) const PAD: f64 = 12.0;
const GPU_HEAD: f64 = 42.0;
/// Between a CPU node and its GPUs.
pub(super) const DROP: f64 = 40.0;
const TOP: f64 = 46.0;

/// A rectangle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rect {
    pub x: f64,
    pub y: f64,
    pub w: f64,
    pub h: f64,
}

impl Rect {
    pub fn middle(&self) -> f64 {
        self.x + self.w / 2.0
    }

    pub fn bottom(&self) -> f64 {
        self.y + self.h
    }

    pub fn right(&self) -> f64 {
        self.x + self.w
    }
}

/// A GPU's box.
pub(super) struct GpuBox<'a> {
    pub gpu: &'a Gpu,
    pub rect: Rect,
    /// Row: 0 has its inner side below, 1 above.
    pub row: usize,
    /// Position in the row.
    pub column: usize,
}

/// A CPU node's box, and the ground it shares with its GPUs.
pub(super) struct CpuBox<'a> {
    pub node: &'a Node,
    pub rect: Rect,
    pub ground: Rect,
}

/// All boxes.
pub(super) struct Boxes<'a> {
    pub cpus: Vec<CpuBox<'a>>,
    pub gpus: Vec<GpuBox<'a>>,
    pub width: f64,
    /// Under all rows and links.
    pub bottom: f64,
    /// Whether neighbours are far enough apart for a label.
    pub roomy: bool,
}

fn gpu_height(gpu: &Gpu) -> f64 {
    GPU_HEAD + number(parts::count(gpu)) * PARTITION + 4.0
}

/// How deep a link between GPUs of one row hangs.
pub(super) fn depth(span: usize) -> f64 {
    (26.0 + 15.0 * number(span)).min(160.0)
}

/// The deepest link within a row; 0 without one.
fn deepest(gpus: &[GpuBox<'_>], plan: &Plan, row: usize) -> f64 {
    let column = |id: &str| {
        let of = gpus.iter().find(|gpu| gpu.row == row && gpu.gpu.id == id);
        of.map(|gpu| gpu.column)
    };
    let spans = links::drawn(plan).into_iter().filter_map(|drawn| {
        let (a, b) = (column(&drawn.gpu.id)?, column(&drawn.peer?.id)?);
        Some(a.abs_diff(b)).filter(|span| *span > 1)
    });
    spans.map(depth).fold(0.0, f64::max)
}

/// Places everything.
pub(super) fn place(plan: &Plan) -> Boxes<'_> {
    let groups = links::cpu_nodes(plan);
    let split = if groups.len() > 1 {
        groups.len().div_ceil(2)
    } else {
        1
    };
    let rows = [groups.get(..split), groups.get(split..)].map(Option::unwrap_or_default);
    let count = |row: &[(&Node, Vec<&Gpu>)]| row.iter().map(|(_, gpus)| gpus.len()).sum::<usize>();
    let roomy = rows.iter().map(|row| count(row)).max().unwrap_or(0) <= 8;
    let gap = if roomy { 70.0 } else { 26.0 };
    let mut boxes = Boxes {
        cpus: Vec::new(),
        gpus: Vec::new(),
        width: 0.0,
        bottom: TOP,
        roomy,
    };
    let memory = plan.ram_nodes().filter(|node| node.kind == NodeKind::Cpu);
    let memory = memory.map(|cpu| parts::memory_nodes(plan, cpu).count());
    let cpu_height = match memory.max().unwrap_or(0) {
        0 => CPU_HEIGHT,
        most => CPU_HEIGHT + number(most) * PARTITION + 4.0,
    };
    let widths = rows.map(|row| row_width(row, gap));
    boxes.width = widths.iter().copied().fold(0.0, f64::max);
    for (index, (row, width)) in rows.into_iter().zip(widths).enumerate() {
        if row.is_empty() {
            continue;
        }
        let tallest = row
            .iter()
            .flat_map(|(_, gpus)| gpus)
            .map(|gpu| gpu_height(gpu))
            .fold(0.0, f64::max);
        let drop = if tallest > 0.0 { DROP } else { 0.0 };
        let height = cpu_height + drop + tallest + 2.0 * PAD;
        let top = boxes.bottom;
        let (cpu_y, gpu_y) = match index {
            0 => (top + PAD, top + PAD + cpu_height + drop),
            _ => (top + PAD + tallest + drop, top + PAD),
        };
        let mut x = (boxes.width - width) / 2.0;
        let mut column = 0;
        for (node, gpus) in row {
            let inner = group_width(gpus.len(), gap);
            boxes.cpus.push(CpuBox {
                node,
                rect: Rect {
                    x: x + PAD,
                    y: cpu_y,
                    w: inner,
                    h: cpu_height,
                },
                ground: Rect {
                    x,
                    y: top,
                    w: inner + 2.0 * PAD,
                    h: height,
                },
            });
            let used = number(gpus.len()) * (GPU_WIDTH + gap) - gap;
            let mut gpu_x = x + PAD + (inner - used) / 2.0;
            for gpu in gpus {
                boxes.gpus.push(GpuBox {
                    gpu,
                    rect: Rect {
                        x: gpu_x,
                        y: gpu_y,
                        w: GPU_WIDTH,
                        h: gpu_height(gpu),
                    },
                    row: index,
                    column,
                });
                gpu_x += GPU_WIDTH + gap;
                column += 1;
            }
            x += inner + 2.0 * PAD + between(gap);
        }
        boxes.bottom = top + height;
        if index == 0 {
            boxes.bottom += corridor(plan, &boxes, &rows);
        }
    }
    boxes
}

/// Space for links under the first row.
fn corridor(plan: &Plan, boxes: &Boxes<'_>, rows: &[&[(&Node, Vec<&Gpu>)]; 2]) -> f64 {
    let hanging = deepest(&boxes.gpus, plan, 0);
    let [_, second] = rows;
    if second.is_empty() {
        return if hanging > 0.0 { hanging + 10.0 } else { 0.0 };
    }
    let mut standing: Vec<GpuBox<'_>> = Vec::new();
    for (column, gpu) in second.iter().flat_map(|(_, gpus)| gpus).enumerate() {
        let rect = Rect {
            x: 0.0,
            y: 0.0,
            w: 0.0,
            h: 0.0,
        };
        standing.push(GpuBox {
            gpu,
            rect,
            row: 1,
            column,
        });
    }
    (hanging + deepest(&standing, plan, 1) + 20.0).max(150.0)
}

fn between(gap: f64) -> f64 {
    (gap - 2.0 * PAD).max(24.0)
}

fn group_width(gpus: usize, gap: f64) -> f64 {
    (number(gpus) * (GPU_WIDTH + gap) - gap).max(GPU_WIDTH + 24.0)
}

fn row_width(row: &[(&Node, Vec<&Gpu>)], gap: f64) -> f64 {
    let groups = row
        .iter()
        .map(|(_, gpus)| group_width(gpus.len(), gap) + 2.0 * PAD);
    groups.sum::<f64>() + between(gap) * (number(row.len()) - 1.0).max(0.0)
}
