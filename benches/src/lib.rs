//! What benchmarks share: figures that are taken in turns, where threads run, and the floor of a message over a socket.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

pub mod figures;
pub mod line;
pub mod place;
