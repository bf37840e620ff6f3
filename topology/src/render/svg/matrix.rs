//! Distances as a heat map.

use std::fmt;

use super::canvas::{Canvas, number};
use super::{FAINT, Part, heading};
use crate::plan::{Node, Plan};
use crate::render::links;

/// What ACPI has for "cannot reach".
const UNREACHABLE: u8 = 255;
const NEAR: [f64; 3] = [255.0, 246.0, 224.0];
const FAR: [f64; 3] = [189.0, 71.0, 38.0];

pub(super) fn draw(plan: &Plan) -> Result<Part, fmt::Error> {
    let mut canvas = Canvas::new();
    heading(
        &mut canvas,
        "Distances",
        "as in the SLIT, by proximity domain (PXM); 10 is a node itself",
    )?;
    let cell = match plan.nodes.len() {
        0..=6 => 38.0,
        7..=16 => 29.0,
        17..=40 => 22.0,
        _ => 15.0,
    };
    let font = cell * 0.4;
    let (left, top) = (176.0, 62.0);
    let (low, high) = extent(plan);
    let middle = |size: f64| format!("font-size=\"{size:.1}\" text-anchor=\"middle\"");
    for (index, node) in plan.nodes.iter().enumerate() {
        let at = number(index) * cell;
        canvas.text(
            (left + at + cell / 2.0, top - 6.0),
            &format!("{} fill=\"{FAINT}\"", middle(font.clamp(8.0, 12.0))),
            &node.pxm.to_string(),
        )?;
        canvas.text(
            (left - 8.0, top + at + cell / 2.0 + 3.8),
            &format!(
                "font-size=\"{:.1}\" text-anchor=\"end\"",
                11.5f64.min(cell * 0.7)
            ),
            &row_name(plan, node),
        )?;
        for (column, other) in plan.nodes.iter().enumerate() {
            let Some(distance) = plan.distance(node.pxm, other.pxm) else {
                continue;
            };
            let x = left + number(column) * cell;
            let share = (f64::from(distance) - low) / (high - low).max(1.0);
            let (fill, ink) = match distance {
                UNREACHABLE => ("#d5d9dd".to_owned(), FAINT),
                _ if index == column => ("#eef2f5".to_owned(), FAINT),
                _ => (
                    blend(share),
                    if share > 0.62 { "#ffffff" } else { "#3a2416" },
                ),
            };
            canvas.rect(
                (x, top + at, cell, cell),
                &format!("fill=\"{fill}\" stroke=\"#ffffff\" stroke-width=\"1.2\""),
            )?;
            canvas.text(
                (x + cell / 2.0, top + at + cell / 2.0 + font * 0.36),
                &format!("{} fill=\"{ink}\"", middle(font)),
                &distance.to_string(),
            )?;
        }
    }
    let side = number(plan.nodes.len()) * cell;
    Ok(Part {
        canvas,
        width: left + side,
        height: top + side,
    })
}

/// Nearest and farthest of two different nodes that reach each other.
fn extent(plan: &Plan) -> (f64, f64) {
    let rows = plan.slit.iter().enumerate();
    let values = rows.flat_map(|(row, values)| {
        let others = values.iter().enumerate();
        others.filter_map(move |(column, value)| {
            (row != column && *value != UNREACHABLE).then_some(f64::from(*value))
        })
    });
    values.fold((f64::MAX, 10.0), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

fn blend(share: f64) -> String {
    let share = share.clamp(0.0, 1.0);
    let mut parts = NEAR
        .iter()
        .zip(FAR)
        .map(|(near, far)| near + (far - near) * share);
    let mut next = || parts.next().unwrap_or_default();
    format!("rgb({:.0},{:.0},{:.0})", next(), next(), next())
}

/// `gcd1 · node 5 · PXM 4`.
fn row_name(plan: &Plan, node: &Node) -> String {
    let name = links::node_name(plan, node);
    format!("{name} · node {} · PXM {}", node.linux_node, node.pxm)
}
