//! `LINK`: one entry for each link that leaves the GPU.

use super::MAX_LINKS;
use crate::table::Width::{W4, W8};
use crate::table::{Block, Reg};

/// Offset of the first instance.
pub const BASE: u32 = 0x0800;
/// Bytes between instances.
pub const STRIDE: u32 = 0x40;
/// Hive position of the GPU at the other end, or [`super::LINK_PEER_CPU`].
pub const PEER: Reg = Reg::ro(
    "PEER",
    0x00,
    W4,
    "hive position of the peer, 0xffffffff = the CPU",
);
/// One of [`super::LinkState`].
pub const STATE: Reg = Reg::ro("STATE", 0x04, W4, "0 Absent, 1 Up, 2 Down, 3 Degraded");
/// Physical links in parallel.
pub const WIDTH: Reg = Reg::ro("WIDTH", 0x08, W4, "physical links in parallel");
/// MB/s in one direction, all links together; 0 = not known.
pub const BANDWIDTH_MBS: Reg = Reg::ro(
    "BANDWIDTH_MBS",
    0x0c,
    W4,
    "MB/s in one direction, 0 = not known",
);
/// Latency in nanoseconds; 0 = not known.
pub const LATENCY_NS: Reg = Reg::ro("LATENCY_NS", 0x10, W4, "latency in ns, 0 = not known");
/// Errors counted.
pub const ERRORS: Reg = Reg::ro("ERRORS", 0x14, W4, "errors since reset");
/// Physical links that carry traffic now.
pub const WIDTH_NOW: Reg = Reg::ro("WIDTH_NOW", 0x18, W4, "physical links that are up now");
/// MB/s in one direction now.
pub const BANDWIDTH_NOW_MBS: Reg = Reg::ro(
    "BANDWIDTH_NOW_MBS",
    0x1c,
    W4,
    "MB/s in one direction with the links that are up, 0 = not known or down",
);
/// Bytes that left through the link.
pub const BYTES_OUT: Reg = Reg::ro("BYTES_OUT", 0x20, W8, "bytes that left since reset");
/// Bytes that came through the link.
pub const BYTES_IN: Reg = Reg::ro("BYTES_IN", 0x28, W8, "bytes that came since reset");
/// The block.
pub const BLOCK: Block = Block {
    name: "LINK",
    base: BASE,
    stride: STRIDE,
    count: MAX_LINKS,
    regs: &[
        PEER,
        STATE,
        WIDTH,
        BANDWIDTH_MBS,
        LATENCY_NS,
        ERRORS,
        WIDTH_NOW,
        BANDWIDTH_NOW_MBS,
        BYTES_OUT,
        BYTES_IN,
    ],
    doc: "links to peers and to the CPU",
};
