//! Another number of partitions, and back.

use numagpu_spec::regs::{Caps, OwnerCommand, OwnerResult, identity, topology};
use numagpu_topology::ranges::Range;

use super::{COPY, COPY_IN, Drive, Gpu, QUEUE, SOURCE, TOKEN};
use crate::device::{Device, Outcome};

/// Resets that a change may take: one that finds a scrub under way changes nothing.
const TRIES: usize = 3;

impl Drive {
    /// Divides the HBM otherwise, works in a part, and goes back to what was planned.
    pub(super) fn partition_modes(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let device = &gpu.device;
        let planned = gpu.ranges();
        let count = u32::try_from(planned.len()).unwrap_or(0);
        let modes = device.read32(topology::BASE, topology::PARTITION_MODES);
        let caps = device.read(identity::BASE, identity::CAPS);
        let others = modes & !(1 << count);
        let said = Caps::from_bits_retain(caps).contains(Caps::PARTITION_MODES);
        if modes >> count & 1 == 0 || said != (others != 0) {
            return Err(format!(
                "modes {modes:#x} with {count} partitions, CAPS {caps:#x}"
            ));
        }
        if others == 0 {
            return Ok(format!("works: {count} is the only mode"));
        }
        // A number that is not possible is not kept.
        device.write(topology::BASE, topology::PARTITION_REQUEST, 31);
        let kept = device.read32(topology::BASE, topology::PARTITION_REQUEST);
        if kept != 0 {
            return Err(format!("request for 31 partitions is kept as {kept}"));
        }
        let other = others.trailing_zeros();
        // However it goes, what was planned comes back.
        let worked = gpu
            .change(other)
            .and_then(|()| self.work_in_parts(index, &planned, other));
        let back = gpu.change(count);
        worked?;
        back?;
        let now = gpu.device_ranges();
        if now != planned {
            return Err(format!("{now:x?} instead of {planned:x?} in the end"));
        }
        device.boot()?;
        gpu.each_partition(|gpu, partition| {
            gpu.device
                .expect(partition, OwnerCommand::Claim, TOKEN, OwnerResult::Ok)?;
            gpu.release(partition, TOKEN)
        })?;
        Ok(format!("works: {count} to {other} and back"))
    }

    /// Claims the last part and copies into it.
    fn work_in_parts(&self, index: usize, planned: &[Range], count: u32) -> Outcome {
        let gpu = self.gpu(index)?;
        let parts = gpu.device_ranges();
        let ways = u64::from(count) / planned.len().max(1) as u64;
        let cut = planned.iter().flat_map(|whole| {
            let size = whole.size / ways.max(1);
            (0..ways).map(move |way| Range {
                base: whole.base + size * way,
                size,
            })
        });
        let cut: Vec<Range> = cut.collect();
        if parts != cut {
            return Err(format!("parts {parts:x?} instead of {cut:x?}"));
        }
        let (last, whole) = (count - 1, gpu.partitions.last());
        let (Some(part), Some(whole)) = (parts.last(), whole) else {
            return Err("no part".to_owned());
        };
        gpu.device.boot()?;
        gpu.device.wait_free(last)?;
        let claim = OwnerCommand::Claim;
        gpu.device.expect(last, claim, TOKEN, OwnerResult::Ok)?;
        let seed = 0x9a47_0000 | (index as u64) << 32;
        self.buffer.fill(SOURCE, COPY, seed);
        let target = part.base + COPY_IN;
        self.copy(index, self.physical + SOURCE as u64, target)?;
        whole.map(target - whole.range.base)?.check(0, COPY, seed)?;
        // The part before it is nobody's, so out of reach.
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        queue.push_copy(part.base - COPY as u64, target, COPY as u64);
        queue.go();
        queue.wait_stopped(numagpu_spec::regs::QueueFault::NotOwned)?;
        queue.reset();
        gpu.release(last, TOKEN)?;
        whole.map(target - whole.range.base)?.check_zero(0, COPY)
    }
}

impl Gpu {
    /// The planned partitions.
    fn ranges(&self) -> Vec<Range> {
        let ranges = self.partitions.iter().map(|partition| partition.range);
        ranges.collect()
    }

    /// What the device has now.
    fn device_ranges(&self) -> Vec<Range> {
        let count = self
            .device
            .read32(identity::BASE, identity::PARTITION_COUNT);
        (0..count).map(|index| self.device.hbm(index)).collect()
    }

    /// Asks for a number of partitions and resets the function, and waits until all are free.
    fn change(&self, count: u32) -> Outcome {
        let device: &Device = &self.device;
        let mode = || device.read32(topology::BASE, topology::PARTITION_MODE);
        for _ in 0..TRIES {
            device.write(topology::BASE, topology::PARTITION_REQUEST, count.into());
            device.reset().map_err(|error| format!("reset: {error}"))?;
            for partition in 0..mode() {
                device.wait_free(partition)?;
            }
            if mode() == count {
                return Ok(());
            }
        }
        Err(format!("{} partitions instead of {count}", mode()))
    }
}
