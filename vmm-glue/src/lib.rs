//! Touches the host.
