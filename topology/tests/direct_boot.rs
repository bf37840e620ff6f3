//! The example for VMMs that load Linux themselves: what it makes of every preset fits together, and `docs/vmm.md` shows it
//! as it is.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test fails by a panic"
)]

#[path = "../examples/direct_boot.rs"]
#[allow(dead_code, reason = "its `main` is not used here")]
mod direct_boot;

use std::fs;
use std::path::Path;

use direct_boot::{arguments, load, slots, tables, zero_page};
use numagpu_topology::ranges::Range;
use numagpu_topology::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED, preset};

#[test]
fn slots_are_what_the_memory_map_says() {
    for preset in preset::ALL {
        let plan = load(preset.name).unwrap();
        let mut ranges: Vec<(Range, bool)> = slots(&plan)
            .into_iter()
            .map(|slot| {
                let range = Range {
                    base: slot.base,
                    size: slot.size,
                };
                (range, slot.file.is_some())
            })
            .collect();
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|two| !two[0].0.overlaps(&two[1].0)));
        for entry in &plan.e820 {
            let range = Range {
                base: entry.base,
                size: entry.size,
            };
            let inside = ranges.iter().find(|(slot, _)| slot.contains(&range));
            match entry.kind {
                E820_RAM => assert!(!inside.unwrap().1),
                E820_SOFT_RESERVED => assert_eq!(inside, Some(&(range, true))),
                kind => assert_eq!(kind, E820_RESERVED),
            }
        }
        // What is behind a BAR is where the BAR is planned.
        for gpu in &plan.gpus {
            let Some(bar) = gpu.aperture else { continue };
            let slot = ranges.iter().find(|(slot, _)| slot.base == bar.base);
            let hbm: u64 = gpu.hbm.iter().map(|hbm| hbm.size).sum();
            assert_eq!(slot.unwrap().0.size, hbm);
            assert!(hbm <= bar.size);
        }
    }
}

#[test]
fn the_zero_page_points_to_what_it_does_not_hold() {
    let (page, rest) = zero_page(&load("frontier-node").unwrap(), 0x8000).unwrap();
    assert!(page[0x250..0x258].iter().all(|byte| *byte == 0) && rest.is_empty());
    let gpu = "[[gpu]]\nhbm = \"16MiB\"\npartitions = 8\ncpu = 0\n".repeat(16);
    let text = format!(
        "name = \"many\"\n[limits]\nphys_bits = 46\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n{gpu}"
    );
    let plan = numagpu_topology::parse("many", &text).unwrap();
    let plan = numagpu_topology::plan(&plan).unwrap();
    let (page, rest) = zero_page(&plan, 0x8000).unwrap();
    assert_eq!(page[0x250..0x258], 0x8000u64.to_le_bytes());
    assert_eq!(page[0x1e8], 128);
    assert_eq!(rest.len(), 16 + (plan.e820.len() - 128) * 20);
}

#[test]
fn tables_are_behind_each_other() {
    for preset in preset::ALL {
        let placed = tables(&load(preset.name).unwrap(), 0xa_0000);
        assert_eq!(placed[0].0, 0xa_0000);
        for two in placed.windows(2) {
            assert!(two[0].0 + two[0].1.bytes.len() as u64 <= two[1].0);
            assert_eq!(two[1].0 % 16, 0);
        }
    }
    let frontier = load("frontier-node").unwrap();
    assert_eq!(arguments(&frontier), "dax_hmem.region_idle=1");
    assert_eq!(arguments(&load("mi300x-x8").unwrap()), "");
}

#[test]
fn the_page_for_vmms_shows_the_example() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("../docs/vmm.md")).unwrap();
    // What is behind it is in an example of another crate, whose tests look at it.
    let (page, _) = page.split_once("## The GPUs in your own process").unwrap();
    let example = fs::read_to_string(root.join("examples/direct_boot.rs")).unwrap();
    let blocks: Vec<&str> = page
        .split("```rust\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect();
    assert_eq!(blocks.len(), 4);
    for block in blocks {
        assert!(example.contains(block), "not in the example:\n{block}");
    }
}
