//! The seeds: committed as the code has them, passing, and each reaching what its name says.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;

use numagpu_devices_fuzz::{TARGETS, Tally, Target};

fn target(name: &str) -> &'static Target {
    let mut targets = TARGETS.iter();
    targets.find(|target| target.name == name).unwrap()
}

/// What a seed reaches.
fn reached(target_name: &str, seed: &str) -> Tally {
    let target = target(target_name);
    let seeds = (target.seeds)();
    let (_, bytes) = seeds.iter().find(|(name, _)| *name == seed).unwrap();
    (target.run)(bytes)
}

#[test]
fn the_corpus_is_what_the_code_says() {
    for target in &TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        let why = "write the corpus anew: cargo run -p numagpu-devices-fuzz --example seeds";
        let files = std::fs::read_dir(&dir).expect(why);
        let files: BTreeSet<String> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        let seeds = (target.seeds)();
        let names = seeds.iter().map(|(name, _)| (*name).to_owned());
        assert_eq!(files, names.collect(), "{why}");
        for (name, bytes) in seeds {
            let file = std::fs::read(dir.join(name)).unwrap();
            assert!(file == bytes, "{}/{name}: {why}", target.name);
        }
    }
}

/// Twice in a row on the same GPUs: an input leaves nothing behind for the next.
#[test]
fn every_seed_passes_and_leaves_nothing_behind() {
    for target in &TARGETS {
        for _ in 0..2 {
            for (_, bytes) in (target.seeds)() {
                (target.run)(&bytes);
            }
        }
    }
}

#[test]
fn seeds_of_bars_boot_claim_and_work() {
    let tally = reached("bar", "boot_claim_fill");
    assert_eq!((tally.boots, tally.claims), (1, 1));
    let tally = reached("bar", "release");
    assert_eq!((tally.refusals, tally.scrubs), (1, 1));
    assert_eq!(reached("bar", "fault").faults, 1);
    let tally = reached("bar", "map");
    assert_eq!((tally.claims, tally.refusals), (1, 1));
}

#[test]
fn seeds_of_configuration_space_allow_and_forbid_dma() {
    let tally = reached("config", "work");
    assert_eq!((tally.packets, tally.faults), (1, 1));
    let tally = reached("config", "power");
    assert_eq!((tally.packets, tally.faults), (1, 1));
    let tally = reached("config", "function_reset");
    assert_eq!((tally.boots, tally.packets, tally.resets), (2, 2, 1));
}

#[test]
fn seeds_of_packets_complete_fault_and_wait() {
    let tally = reached("packets", "copies");
    assert_eq!((tally.packets, tally.faults), (7, 0));
    assert_eq!(reached("packets", "atomics").packets, 26);
    assert_eq!(reached("packets", "times").packets, 3);
    assert_eq!(reached("packets", "write_and_wrap").packets, 20);
    for seed in [
        "foreign",
        "across_the_border",
        "free",
        "end_of_ram",
        "end_of_addresses",
        "link_down",
        "bus_master_off",
        "poll_timeout",
        "unmapped",
        "bad_doorbell",
        "ring_in_hbm",
    ] {
        assert_eq!(reached("packets", seed).faults, 1, "{seed}");
    }
    for seed in ["poll_without_end", "looping_atomic"] {
        assert_eq!(reached("packets", seed).waiting, 1, "{seed}");
    }
    let tally = reached("packets", "poll_and_fence");
    assert_eq!((tally.packets, tally.faults), (2, 0));
    let tally = reached("packets", "release_at_work");
    assert_eq!((tally.scrubs, tally.claims, tally.resets), (1, 4, 1));
}

#[test]
fn seeds_of_ownership_change_hands() {
    let tally = reached("ownership", "a_life");
    assert_eq!((tally.claims, tally.packets, tally.faults), (2, 2, 1));
    assert_eq!((tally.refusals, tally.scrubs), (2, 1));
    let tally = reached("ownership", "transfer");
    assert_eq!((tally.refusals, tally.packets), (4, 1));
    assert_eq!(reached("ownership", "refusals").refusals, 6);
    let tally = reached("ownership", "peers");
    assert_eq!((tally.packets, tally.faults, tally.resets), (2, 2, 1));
    let tally = reached("ownership", "lost_by_reset");
    assert_eq!((tally.claims, tally.resets), (2, 2));
    let tally = reached("ownership", "held_scrub");
    assert_eq!((tally.claims, tally.refusals), (1, 3));
    let tally = reached("ownership", "failed_scrub");
    assert_eq!((tally.failed_scrubs, tally.refusals), (1, 2));
}
