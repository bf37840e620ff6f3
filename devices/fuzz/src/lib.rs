//! Fuzz targets of the GPU model, driven through the seam that a transport uses.
//!
//! | part | what it does |
//! |---|---|
//! | [`input`] | bytes of the fuzzer in, actions out, and back for seeds |
//! | [`machine`] | two GPUs of a hive with a VMM that records, used again by every input |
//! | [`bar`], [`config`], [`packets`], [`ownership`] | the targets: what is done, and what has to hold afterwards |
//! | [`seeds`] | where the fuzzer begins |
//! | [`replay`] | a target as an ordinary program, for inputs that were found |
//!
//! `cargo xtask fuzz` builds the programs of `src/bin` with coverage counters and libFuzzer. Built in any other way
//! they replay the files they are given. `cargo run -p numagpu-devices-fuzz --example seeds` writes the corpus anew.

#![forbid(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a target that panics has found something; its own tables are small"
)]

pub mod bar;
pub mod config;
pub mod input;
pub mod machine;
pub mod ownership;
pub mod packets;
pub mod replay;
pub mod seeds;

/// What an input reached; seeds are held against it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Boots that ended in READY.
    pub boots: u32,
    /// Partitions claimed.
    pub claims: u32,
    /// Commands of owners refused.
    pub refusals: u32,
    /// Partitions that were freed or lost, and scrubbed.
    pub scrubs: u32,
    /// Scrubs that failed.
    pub failed_scrubs: u32,
    /// Packets completed.
    pub packets: u64,
    /// Queues stopped by a fault.
    pub faults: u32,
    /// Queues still waiting in a poll or a loop at the end.
    pub waiting: u32,
    /// Resets of a function, by whatever means.
    pub resets: u32,
}

/// A target: its name, what runs an input, and its seeds with their names.
pub struct Target {
    /// Name of the program, and of the directory of the corpus.
    pub name: &'static str,
    /// Runs one input; panics if something does not hold.
    pub run: fn(&[u8]) -> Tally,
    /// Names and bytes of the seeds.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
}

/// Every target.
pub const TARGETS: [Target; 4] = [
    Target {
        name: "bar",
        run: bar::run,
        seeds: seeds::bar::seeds,
    },
    Target {
        name: "config",
        run: config::run,
        seeds: seeds::config::seeds,
    },
    Target {
        name: "packets",
        run: packets::run,
        seeds: seeds::packets::seeds,
    },
    Target {
        name: "ownership",
        run: ownership::run,
        seeds: seeds::ownership::seeds,
    },
];
