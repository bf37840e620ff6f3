//! The `numagpu` command.

fn main() {}
