//! Guest harness.
