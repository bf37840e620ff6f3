//! The GPU of numagpu, behind the seam of [`bus`].

#![forbid(unsafe_code)]

pub use numagpu_spec as spec;

pub mod bus;
