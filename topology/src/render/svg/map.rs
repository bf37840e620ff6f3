//! The memory map: a bar for each range, its height by the logarithm of its size; holes are broken out.

use std::fmt;

use super::canvas::{Canvas, N, fit};
use super::{FAINT, HBM, INK, Part, RAM, RESERVED, heading};
use crate::plan::{E820Entry, NodeKind, Plan};
use crate::platform::{AMD_HT, FOUR_GIB};
use crate::ranges::Range;
use crate::render::links;
use crate::render::text::cpu_list;
use crate::size::{GIB, KIB, MIB, Size, TIB};
use crate::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED};

const BAR: f64 = 124.0;
const BAR_WIDTH: f64 = 118.0;
const NOTE: f64 = BAR + BAR_WIDTH + 10.0;
const WIDTH: f64 = NOTE + 190.0;
const TOP: f64 = 52.0;

/// A range, or what is between two.
struct Segment {
    base: u64,
    size: u64,
    /// None in a hole.
    colour: Option<&'static str>,
    /// What it is.
    note: String,
    /// Whose it is.
    owner: String,
}

pub(super) fn draw(plan: &Plan) -> Result<Part, fmt::Error> {
    let mut canvas = Canvas::new();
    heading(
        &mut canvas,
        "Guest physical addresses",
        "height by logarithm of size; holes are cut short",
    )?;
    let segments = segments(plan);
    let crowded = segments.len() > 44;
    let digits = usize::try_from(plan.phys_bits.div_ceil(4)).unwrap_or(13);
    let address = |value: u64| format!("{value:#0width$x}", width = digits + 2);
    let mono = format!(
        "font-size=\"10.5\" font-family=\"'DejaVu Sans Mono', Menlo, Consolas, monospace\" \
         text-anchor=\"end\" fill=\"{FAINT}\""
    );
    let mut y = TOP;
    for segment in &segments {
        let height = height(segment, crowded);
        let tick = format!("stroke=\"{FAINT}\" stroke-width=\"0.8\"");
        canvas.line((BAR - 6.0, y), (BAR, y), &tick)?;
        canvas.text((BAR - 9.0, y + 3.7), &mono, &address(segment.base))?;
        range(&mut canvas, segment, y, height)?;
        y += height;
    }
    if let Some(last) = segments.last() {
        let tick = format!("stroke=\"{FAINT}\" stroke-width=\"0.8\"");
        canvas.line((BAR - 6.0, y), (BAR, y), &tick)?;
        let end = address(last.base.saturating_add(last.size));
        canvas.text((BAR - 9.0, y + 3.7), &mono, &end)?;
    }
    let height = legend(&mut canvas, plan, y + 26.0)?;
    Ok(Part {
        canvas,
        width: WIDTH,
        height,
    })
}

/// Ranges and holes, ascending, up to the last address.
fn segments(plan: &Plan) -> Vec<Segment> {
    let mut all = Vec::new();
    let mut end = 0;
    for entry in &plan.e820 {
        all.extend(hole(end, entry.base));
        all.push(used(plan, entry));
        end = entry.base.saturating_add(entry.size);
    }
    let last = hole(end, 1u64.checked_shl(plan.phys_bits).unwrap_or(end));
    all.extend(last.map(|hole| Segment {
        note: "hole, with 64-bit PCI in it".to_owned(),
        ..hole
    }));
    all
}

fn hole(base: u64, end: u64) -> Option<Segment> {
    let size = end.checked_sub(base).filter(|size| *size > 0)?;
    let range = Range { base, size };
    let note = if end <= FOUR_GIB {
        "hole: PCI below 4 GiB"
    } else if range.base < AMD_HT.end() && AMD_HT.base < range.end() {
        "hole, AMD's own in it"
    } else {
        "hole"
    };
    Some(Segment {
        base,
        size,
        colour: None,
        note: note.to_owned(),
        owner: String::new(),
    })
}

fn used(plan: &Plan, entry: &E820Entry) -> Segment {
    let end = entry.base.saturating_add(entry.size);
    let within = |range: &Range| range.base < end && entry.base < range.end();
    let nodes: Vec<u32> = plan
        .nodes
        .iter()
        .filter(|node| node.ranges.iter().any(within))
        .map(|node| node.linux_node)
        .collect();
    let node = match nodes.len() {
        0 => String::new(),
        1 => format!("node {}", cpu_list(&nodes)),
        _ => format!("nodes {}", cpu_list(&nodes)),
    };
    let (colour, note, owner) = match entry.kind {
        E820_RAM => (RAM, "RAM".to_owned(), node),
        E820_SOFT_RESERVED => {
            let names: Vec<String> = plan
                .nodes
                .iter()
                .filter(|node| node.kind == NodeKind::Hbm && node.ranges.iter().any(within))
                .map(|node| links::node_name(plan, node))
                .collect();
            let pxms: Vec<String> = plan
                .hbm()
                .filter(|hbm| within(&hbm.range()))
                .filter_map(|hbm| hbm.pxm)
                .map(|pxm| pxm.to_string())
                .collect();
            let owner = format!("PXM {}, {node}", pxms.join(","));
            (HBM, format!("HBM of {}", names.join(", ")), owner)
        }
        _ => (RESERVED, "reserved".to_owned(), String::new()),
    };
    Segment {
        base: entry.base,
        size: entry.size,
        colour: Some(colour),
        note,
        owner,
    }
}

fn height(segment: &Segment, crowded: bool) -> f64 {
    let Some(doublings) = (segment.size / (512 * KIB)).max(1).checked_ilog2() else {
        return 20.0;
    };
    match (segment.colour, crowded) {
        (None, false) => 22.0,
        (None, true) => 16.0,
        (Some(_), false) => 24.0 + 1.7 * f64::from(doublings),
        (Some(_), true) => 18.0 + 0.5 * f64::from(doublings),
    }
}

fn range(canvas: &mut Canvas, segment: &Segment, y: f64, height: f64) -> fmt::Result {
    let middle = y + height / 2.0;
    let size = rough(segment.size);
    let end = segment.base.saturating_add(segment.size);
    canvas.open(&format!(
        "{:#x}-{:#x} {} {} {}",
        segment.base,
        end.saturating_sub(1),
        Size(segment.size),
        segment.note,
        segment.owner
    ))?;
    let middled =
        |colour: &str| format!("font-size=\"11\" text-anchor=\"middle\" fill=\"{colour}\"");
    let centre = BAR + BAR_WIDTH / 2.0;
    let room = WIDTH - NOTE;
    let Some(colour) = segment.colour else {
        broken(canvas, y, height)?;
        canvas.text((centre, middle + 3.7), &middled(FAINT), &size)?;
        let faint = format!("font-size=\"11\" font-style=\"italic\" fill=\"{FAINT}\"");
        canvas.text(
            (NOTE, middle + 3.7),
            &faint,
            &fit(&segment.note, room, 11.0),
        )?;
        return canvas.close();
    };
    canvas.rect(
        (BAR, y, BAR_WIDTH, height),
        &format!("fill=\"{colour}\" stroke=\"{INK}\" stroke-width=\"0.9\""),
    )?;
    canvas.text(
        (centre, middle + 3.9),
        &format!("{} font-weight=\"bold\"", middled(INK)),
        &size,
    )?;
    if height >= 34.0 && !segment.owner.is_empty() {
        canvas.text(
            (NOTE, middle - 3.0),
            "font-size=\"12\" font-weight=\"bold\"",
            &fit(&segment.note, room, 12.0),
        )?;
        let faint = format!("font-size=\"11\" fill=\"{FAINT}\"");
        canvas.text(
            (NOTE, middle + 11.0),
            &faint,
            &fit(&segment.owner, room, 11.0),
        )?;
    } else {
        let text = match segment.owner.as_str() {
            "" => segment.note.clone(),
            owner => format!("{}: {owner}", segment.note),
        };
        canvas.text(
            (NOTE, middle + 3.9),
            "font-size=\"11.5\"",
            &fit(&text, room, 11.5),
        )?;
    }
    canvas.close()
}

/// A size in at most four digits before the point; `~` where it is not exact.
fn rough(bytes: u64) -> String {
    let exact = Size(bytes).to_string();
    let digits = exact.chars().take_while(char::is_ascii_digit).count();
    let units = [("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) if digits > 4 => {
            format!("~{}.{} {name}", bytes / unit, bytes % unit * 10 / unit)
        }
        _ => exact,
    }
}

/// A hole: open sides, cut by a zigzag at each.
fn broken(canvas: &mut Canvas, y: f64, height: f64) -> fmt::Result {
    use fmt::Write;
    for x in [BAR, BAR + BAR_WIDTH] {
        let step = height / 6.0;
        write!(
            canvas.out,
            "<polyline fill=\"none\" stroke=\"{FAINT}\" stroke-width=\"0.9\" points=\""
        )?;
        for point in 0..=6u32 {
            let side = match point {
                0 | 6 => 0.0,
                odd if odd % 2 == 1 => 3.0,
                _ => -3.0,
            };
            write!(
                canvas.out,
                "{},{} ",
                N(x + side),
                N(y + step * f64::from(point))
            )?;
        }
        writeln!(canvas.out, "\"/>")?;
    }
    Ok(())
}

/// What the colours mean that are there.
fn legend(canvas: &mut Canvas, plan: &Plan, y: f64) -> Result<f64, fmt::Error> {
    let items = [
        (E820_RAM, RAM, "RAM", 62.0),
        (E820_SOFT_RESERVED, HBM, "HBM, soft reserved", 142.0),
        (E820_RESERVED, RESERVED, "reserved", 0.0),
    ];
    let mut x = BAR - 60.0;
    for (kind, colour, text, width) in items {
        if !plan.e820.iter().any(|entry| entry.kind == kind) {
            continue;
        }
        canvas.rect(
            (x, y - 10.0, 12.0, 12.0),
            &format!("fill=\"{colour}\" stroke=\"{INK}\" stroke-width=\"0.7\""),
        )?;
        canvas.text((x + 17.0, y), "font-size=\"11\"", text)?;
        x += width;
    }
    Ok(y + 8.0)
}
