//! Outputs for people and programs: functions of the plan.

mod dot;
mod hwloc;
mod json;
mod links;
mod parts;
mod svg;
pub mod text;
mod xml;

pub use dot::dot;
pub use hwloc::hwloc;
pub use json::json;
pub use svg::svg;
pub use text::text;

use crate::plan::Plan;
use crate::{E820_RAM, E820_SOFT_RESERVED};

/// Name of an E820 type, as Linux 6.12 prints it.
pub fn e820_type(kind: u32) -> &'static str {
    match kind {
        E820_RAM => "usable",
        E820_SOFT_RESERVED => "soft reserved",
        _ => "reserved",
    }
}

/// The memory map, one line for each entry, as Linux 6.12 prints it.
pub fn e820(plan: &Plan) -> String {
    plan.e820
        .iter()
        .map(|entry| {
            let last = entry.base.saturating_add(entry.size).saturating_sub(1);
            format!(
                "[mem {:#018x}-{last:#018x}] {}\n",
                entry.base,
                e820_type(entry.kind)
            )
        })
        .collect()
}
