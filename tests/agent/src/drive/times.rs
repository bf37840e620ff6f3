//! What an access to a register costs a driver.

use std::time::{Duration, Instant};

use numagpu_spec::regs::{identity, irq};
use numagpu_topology::seen::AccessTimes;

use super::Drive;
use crate::device::Device;

/// Accesses of a block: enough that reading the clock, which may be an access to a device too, does not count.
const ACCESSES: u32 = 1000;
const BLOCKS: usize = 40;

impl Drive {
    /// Times accesses to the registers of every GPU.
    pub fn time_accesses(&mut self) {
        for gpu in &mut self.gpus {
            gpu.seen.access_times = Some(access_times(&gpu.device));
        }
    }
}

/// Nanoseconds of one access in a block that took so long.
fn each(block: Duration) -> u64 {
    u64::try_from(block.as_nanos() / u128::from(ACCESSES)).unwrap_or(u64::MAX)
}

fn access_times(device: &Device) -> AccessTimes {
    let read = || device.read32(identity::BASE, identity::MAGIC);
    let mut times = AccessTimes::default();
    for _ in 0..BLOCKS {
        let begun = Instant::now();
        for _ in 0..ACCESSES {
            read();
        }
        times.read_ns.push(each(begun.elapsed()));
        let begun = Instant::now();
        for _ in 0..ACCESSES {
            device.write(irq::BASE, irq::ENABLE, 0);
        }
        times.write_ns.push(each(begun.elapsed()));
        read();
        times.done_ns.push(each(begun.elapsed()));
    }
    times
}
