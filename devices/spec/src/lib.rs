//! Registers, packets and status codes of the numagpu device.
//!
//! This crate has no behaviour. The device model, guest drivers and the generated documents all read the
//! same tables, so an offset exists once. It is `no_std`, so that a guest driver of any kind can link it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`pci`] | identifiers, BAR roles and capability numbers of the PCI function |
//! | [`table`] | the type of a register table and the checks that every table passes at compile time |
//! | [`regs`] | the register blocks of BAR 0 and the codes their fields take |
//! | [`sdma`] | the packets of the copy queue, in AMD's published SDMA encoding |

#![no_std]
#![forbid(unsafe_code)]

pub mod pci;
pub mod regs;
pub mod sdma;
pub mod table;
