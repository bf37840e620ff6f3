//! The guest agent: init of the test guest.

fn main() {}
