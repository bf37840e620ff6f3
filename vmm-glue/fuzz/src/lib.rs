//! Fuzz targets of the vfio-user server.
//!
//! An input is a stream of messages as a client sends it. The reserved error field of a command says what else the client
//! does: how many descriptors go with it, of what they are, whether it goes over the second socket, where the message is cut
//! in two, and how long it waits then.
//!
//! | part | what it does |
//! |---|---|
//! | [`messages`] | the stream's messages, as the size fields cut it |
//! | [`wire`] | decodes them, without a server |
//! | [`session`] | sends them to a GPU's session, and holds every reply against what the specification says |
//! | [`seeds`] | where the fuzzer begins |
//!
//! `cargo xtask fuzz` builds the programs of `src/bin` with coverage counters and libFuzzer. Built in any other way
//! they replay the files they are given (`numagpu_devices_fuzz::replay`). `cargo run -p numagpu-vmm-glue-fuzz --example message_seeds` writes the corpus anew.

#![forbid(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::expect_used,
    clippy::panic,
    reason = "a target that panics has found something; its own sizes are small"
)]

pub mod messages;
pub mod seeds;
pub mod session;
pub mod wire;

/// What an input reached; seeds are held against it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Messages that were whole.
    pub messages: u32,
    /// Requests that were decoded, or answered without an error.
    pub good: u32,
    /// Requests that were refused.
    pub refused: u32,
    /// Commands that the server sent: memory that it asked for.
    pub asked: u32,
}

/// A target: its name and what runs an input, which panics if something does not hold.
pub struct Target {
    /// Name of the program, and of the directory of the corpus.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]) -> Tally,
}

/// Every target. They begin with the same seeds.
pub const TARGETS: [Target; 2] = [
    Target {
        name: "wire",
        run: wire::run,
    },
    Target {
        name: "session",
        run: session::run,
    },
];
