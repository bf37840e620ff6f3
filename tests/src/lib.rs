//! What the integration tests share: where the programs are, a corner of the host for each test, and processes that
//! do not outlive it.
//!
//! | module | what it is for |
//! |---|---|
//! | [`programs`] | the `numagpu` binary, the guest assets, and one guest at a time |
//! | [`corner`] | a test's own directories, and whether anything is left in them |
//! | [`process`] | a child with its output, deadlines, and a certain end |
//! | [`handing`] | a command that is started with descriptors, as a service manager does |
//! | [`guests`] | boots of machines, and what every guest has to say |
//! | [`host`] | what `/proc` says of processes |
//! | [`numbers`] | a seeded generator |
//! | [`qtest`] | a QEMU that runs no guest, to look into its machine |
//! | [`tables`] | ACPI tables, decoded |
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a harness fails by panicking, in the test that called it"
)]

pub mod corner;
pub mod guests;
pub mod handing;
pub mod host;
pub mod numbers;
pub mod process;
pub mod programs;
pub mod qtest;
pub mod tables;
