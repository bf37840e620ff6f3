//! Touches the host.

pub mod assets;
