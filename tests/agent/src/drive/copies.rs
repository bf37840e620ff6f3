//! Memory moved by the CPU and by the copy engine, the links it goes over, and fences.

use numagpu_spec::regs::{self, LinkState, link};

use super::{COPY, COPY_IN, COPY_PEER, CPU_BYTES, Drive, Gpu, QUEUE, SOURCE, TARGET, TOKEN};
use crate::device::Outcome;
use crate::hbm::WINDOW;

impl Drive {
    pub(super) fn cpu_access(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let seed =
            |partition: usize, place: u64| (index as u64) << 56 | (partition as u64) << 48 | place;
        for (number, partition) in gpu.partitions.iter().enumerate() {
            for place in partition.places() {
                let map = partition.map(place)?;
                // Starting with zeros is the device's promise to a new owner.
                map.check_zero(0, CPU_BYTES)?;
                map.fill(0, CPU_BYTES, seed(number, place));
                map.fill(WINDOW - CPU_BYTES, CPU_BYTES, seed(number, place) ^ 1 << 40);
            }
        }
        for (number, partition) in gpu.partitions.iter().enumerate() {
            for place in partition.places() {
                let map = partition.map(place)?;
                map.check(0, CPU_BYTES, seed(number, place))?;
                map.check(WINDOW - CPU_BYTES, CPU_BYTES, seed(number, place) ^ 1 << 40)?;
            }
        }
        Ok(String::new())
    }

    pub(super) fn copy_in(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        for (number, partition) in gpu.partitions.iter().enumerate() {
            let seed = Drive::seed(index) | (number as u64) << 24;
            self.buffer.fill(SOURCE, COPY, seed);
            self.copy(
                index,
                self.physical + SOURCE as u64,
                partition.range.base + COPY_IN,
            )?;
            partition.map(COPY_IN)?.check(0, COPY, seed)?;
        }
        Ok(String::new())
    }

    /// Where in a peer's first partition GPU `index` copies to.
    pub(super) fn peer_offset(index: usize) -> u64 {
        COPY_PEER + (index * WINDOW) as u64
    }

    pub(super) fn copy_peer(&self, index: usize) -> Outcome<String> {
        let peer = self.peer(index)?;
        let source = self.gpu(index)?.first()?.range.base + COPY_IN;
        let target = self.gpu(peer)?.first()?;
        let offset = Drive::peer_offset(index);
        self.copy(index, source, target.range.base + offset)?;
        target.map(offset)?.check(0, COPY, Drive::seed(index))?;
        Ok(if peer == index {
            "works within its own HBM, no peer".to_owned()
        } else {
            String::new()
        })
    }

    pub(super) fn copy_out(&self, index: usize) -> Outcome<String> {
        let source = self.gpu(self.peer(index)?)?.first()?.range.base + Drive::peer_offset(index);
        self.buffer.fill(TARGET, COPY, 0xdead);
        self.copy(index, source, self.physical + TARGET as u64)?;
        self.buffer.check(TARGET, COPY, Drive::seed(index))?;
        Ok(String::new())
    }

    pub(super) fn copy_ram(&self, index: usize) -> Outcome<String> {
        let seed = Drive::seed(index);
        self.buffer.fill(SOURCE, COPY, seed);
        self.buffer.fill(TARGET, COPY, 0xdead);
        self.copy(
            index,
            self.physical + SOURCE as u64,
            self.physical + TARGET as u64,
        )?;
        self.buffer.check(TARGET, COPY, seed)?;
        Ok(String::new())
    }

    /// A train of copies and fences that wraps the ring several times.
    pub(super) fn fences(&self, index: usize) -> Outcome<String> {
        // In HBM, or in RAM from SOURCE to TARGET.
        let base = match self.gpu(index)?.partitions.first() {
            Some(partition) => partition.range.base + COPY_IN,
            None => self.physical + SOURCE as u64,
        };
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        const ROUNDS: u32 = 8;
        const FENCES: u32 = 32;
        for round in 1..=ROUNDS {
            for fence in 0..FENCES {
                queue.push_copy(base, base + (TARGET - SOURCE) as u64, 4096);
                queue.push_fence(fence as usize, round << 16 | fence);
            }
            queue.go();
            let last = FENCES - 1;
            queue.wait_fence(last as usize, round << 16 | last)?;
            // The last fence is there, so all before it are.
            for fence in 0..FENCES {
                let seen = self.buffer.read32(QUEUE.fences + fence as usize * 4);
                if seen != round << 16 | fence {
                    return Err(format!(
                        "fence {fence} is {seen:#x} when fence {last} is there"
                    ));
                }
            }
        }
        queue.check_drained()?;
        Ok(String::new())
    }

    /// Every link is up, and counts at both ends what a copy moves over it.
    pub(super) fn links(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        for number in 0..gpu.links() {
            let base = link::BASE + number * link::STRIDE;
            let read = |reg| gpu.device.read32(base, reg);
            let state = read(link::STATE);
            let (width, now) = (read(link::WIDTH), read(link::WIDTH_NOW));
            if state != LinkState::Up.code() || now != width || read(link::ERRORS) != 0 {
                let errors = read(link::ERRORS);
                return Err(format!(
                    "link {number}: state {state}, {now} of {width} links, {errors} errors"
                ));
            }
        }
        if gpu.links() == 0 {
            return Ok("works: no links".to_owned());
        }
        let mut seen = vec![format!("{} up", gpu.links())];
        let bytes = COPY as u64;
        let grew = |what: &str, before: u64, after: u64| {
            if after.wrapping_sub(before) < bytes {
                return Err(format!("{what} went from {before} to {after} by {bytes}"));
            }
            Ok(after - before)
        };
        let peer = self.peer(index)?;
        if peer != index && !gpu.partitions.is_empty() {
            let far = self.gpu(peer)?;
            let out = || gpu.traffic(far.seen.hive.1, link::BYTES_OUT);
            let back = || far.traffic(gpu.seen.hive.1, link::BYTES_IN);
            let before = (out(), back());
            let source = gpu.first()?.range.base + COPY_IN;
            self.copy(
                index,
                source,
                far.first()?.range.base + Drive::peer_offset(index),
            )?;
            let out = grew("BYTES_OUT", before.0, out())?;
            let back = grew("the peer's BYTES_IN", before.1, back())?;
            seen.push(format!("{out} bytes out to the peer, {back} in there"));
        }
        if gpu.has_link(regs::LINK_PEER_CPU) {
            let traffic = |reg| gpu.traffic(regs::LINK_PEER_CPU, reg);
            let before = (traffic(link::BYTES_IN), traffic(link::BYTES_OUT));
            self.copy_ram(index)?;
            let came = grew("BYTES_IN of the CPU", before.0, traffic(link::BYTES_IN))?;
            let left = grew("BYTES_OUT to the CPU", before.1, traffic(link::BYTES_OUT))?;
            seen.push(format!("CPU {came} in, {left} out"));
        }
        Ok(format!("works: {}", seen.join(", ")))
    }
}

impl Gpu {
    fn links(&self) -> u32 {
        u32::try_from(self.seen.links.len()).unwrap_or(0)
    }

    fn has_link(&self, peer: u32) -> bool {
        self.seen.links.iter().any(|(to, _, _)| *to == peer)
    }

    /// A counter of the links to a peer.
    fn traffic(&self, peer: u32, counter: numagpu_spec::table::Reg) -> u64 {
        let ends = (0..self.links()).map(|number| link::BASE + number * link::STRIDE);
        ends.filter(|base| self.device.read32(*base, link::PEER) == peer)
            .map(|base| self.device.read(base, counter))
            .sum()
    }
}
