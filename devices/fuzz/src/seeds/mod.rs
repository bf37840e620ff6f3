//! Where each target begins: short inputs that reach deep states, written as actions.

pub mod bar;
pub mod config;
pub mod ownership;
pub mod packets;
