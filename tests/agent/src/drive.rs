//! Brings every GPU up, works in its HBM, and notes how each step went.

use numagpu_spec::regs::{self, IrqBits, OwnerCommand, OwnerResult, QueueFault, QueueState};
use numagpu_spec::{pci, sdma};
use numagpu_topology::seen::{DaxSeen, GpuSeen, PartitionSeen, Pattern, Step, steps};

use crate::device::{Device, Outcome, Queue, Slots, wait};
use crate::hbm::{Partition, WINDOW};
use crate::probe;
use crate::sys::{Mapping, on_kvm};

/// The driver that works.
const TOKEN: u64 = 0x6e75_6d61_0000_0001;
/// Another driver.
const OTHER: u64 = 0x6e75_6d61_0000_0002;

/// Bytes that the CPU writes at each place.
const CPU_BYTES: usize = 0x4000;
/// Bytes of a copy.
const COPY: usize = 0x4_0000;
/// Where in HBM a copy from RAM lands.
const COPY_IN: u64 = 4 << 20;
/// Where in HBM peers' copies land, 2 MiB for each peer.
const COPY_PEER: u64 = 8 << 20;
/// Where the patterns for the host are.
const HELD: u64 = 6 << 20;

const QUEUE: Slots = Slots {
    ring: 0,
    ring_size: 0x1000,
    fences: 0x1_0000,
    rptr: 0x1_1000,
};
const FOREIGN: Slots = Slots {
    ring: 0x2_0000,
    ring_size: 0x1000,
    fences: 0x3_0000,
    rptr: 0x3_1000,
};
const MESSAGE: usize = 0x1_2000;
const SOURCE: usize = 0x10_0000;
const TARGET: usize = 0x18_0000;

/// All GPUs, and the memory that they and we share.
pub struct Drive {
    gpus: Vec<Gpu>,
    buffer: Mapping,
    physical: u64,
}

struct Gpu {
    device: Device,
    seen: GpuSeen,
    partitions: Vec<Partition>,
}

impl Drive {
    /// Finds the GPUs and the dax devices of their HBM.
    pub fn new(dax: &[DaxSeen], problems: &mut Vec<String>) -> Outcome<Drive> {
        std::fs::write("/proc/sys/vm/nr_hugepages", "2")
            .map_err(|error| format!("nr_hugepages: {error}"))?;
        let buffer = Mapping::huge_page().map_err(|error| format!("huge page: {error}"))?;
        buffer.fill(0, buffer.len(), 0);
        let physical = buffer
            .physical()
            .map_err(|error| format!("physical address: {error}"))?;
        let mut gpus: Vec<Gpu> = Device::find(problems)
            .into_iter()
            .map(|device| Gpu::new(device, dax))
            .collect();
        gpus.sort_by_key(|gpu| gpu.seen.index);
        Ok(Drive {
            gpus,
            buffer,
            physical,
        })
    }

    /// Memory for DMA, and where devices reach it. Between steps nobody uses it.
    pub fn buffer(&self) -> (&Mapping, u64) {
        (&self.buffer, self.physical)
    }

    /// What was seen of the GPUs.
    pub fn finish(self) -> Vec<GpuSeen> {
        self.gpus.into_iter().map(|gpu| gpu.seen).collect()
    }

    /// Takes a step with each GPU whose kind goes through it.
    fn each(&mut self, name: &str, step: impl Fn(&Drive, usize) -> Outcome<String>) {
        for index in 0..self.gpus.len() {
            if !self
                .gpus
                .get(index)
                .is_some_and(|gpu| gpu.steps().contains(&name))
            {
                continue;
            }
            let outcome = step(self, index);
            if let Some(gpu) = self.gpus.get_mut(index) {
                let (ok, detail) = match outcome {
                    Ok(detail) => (true, detail),
                    Err(error) => (false, error),
                };
                gpu.seen.steps.push(Step {
                    name: name.to_owned(),
                    ok,
                    detail,
                });
            }
        }
    }

    fn gpu(&self, index: usize) -> Outcome<&Gpu> {
        self.gpus
            .get(index)
            .ok_or_else(|| format!("no GPU {index}"))
    }

    /// The GPU that `index` has a link to, or itself where there is none.
    fn peer(&self, index: usize) -> Outcome<usize> {
        let gpu = self.gpu(index)?;
        let linked = gpu
            .seen
            .links
            .iter()
            .find(|(peer, _, _)| *peer != regs::LINK_PEER_CPU);
        let Some((position, _, _)) = linked else {
            return Ok(index);
        };
        self.gpus
            .iter()
            .position(|other| {
                other.seen.hive.0 == gpu.seen.hive.0 && other.seen.hive.1 == *position
            })
            .ok_or_else(|| format!("no GPU at position {position} of the hive"))
    }

    /// Boots every GPU and claims every partition.
    pub fn start(&mut self) {
        self.each(steps::BOOT, |drive, index| {
            drive.gpu(index)?.device.boot().map(|()| String::new())
        });
        for gpu in &mut self.gpus {
            gpu.read_partitions();
        }
        self.each(steps::CLAIM, |drive, index| {
            drive.gpu(index)?.each_partition(|gpu, partition| {
                gpu.device
                    .expect(partition, OwnerCommand::Claim, TOKEN, OwnerResult::Ok)
            })
        });
        self.each(steps::SECOND_CLAIM, |drive, index| {
            drive.gpu(index)?.each_partition(|gpu, partition| {
                gpu.device
                    .expect(partition, OwnerCommand::Claim, OTHER, OwnerResult::Busy)?;
                gpu.device.expect(
                    partition,
                    OwnerCommand::Release,
                    OTHER,
                    OwnerResult::NotOwner,
                )
            })
        });
    }

    /// Works in HBM, by CPU and by copy engine.
    pub fn work(&mut self) {
        self.each(steps::CPU_ACCESS, |drive, index| drive.cpu_access(index));
        self.each(steps::COPY_IN, |drive, index| drive.copy_in(index));
        self.each(steps::COPY_PEER, |drive, index| drive.copy_peer(index));
        self.each(steps::COPY_OUT, |drive, index| drive.copy_out(index));
        self.each(steps::COPY_RAM, |drive, index| drive.copy_ram(index));
        self.each(steps::FENCES, |drive, index| drive.fences(index));
        self.each(steps::INTERRUPT, |drive, index| drive.interrupt(index));
        self.each(steps::FOREIGN, |drive, index| drive.foreign(index));
    }

    /// Gives all partitions back and looks at them as another driver.
    pub fn stop(&mut self) {
        self.each(steps::RELEASE, |drive, index| {
            drive
                .gpu(index)?
                .each_partition(|gpu, partition| gpu.release(partition, TOKEN))
        });
        self.each(steps::SCRUBBED, |drive, index| drive.scrubbed(index));
        self.each(steps::RESET, |drive, index| {
            let gpu = drive.gpu(index)?;
            gpu.device
                .reset()
                .map_err(|error| format!("reset: {error}"))?;
            gpu.device.boot()?;
            if gpu.partitions.is_empty() {
                // That it works again shows in what it did before.
                return drive.copy_ram(index);
            }
            gpu.each_partition(|gpu, partition| {
                gpu.device
                    .expect(partition, OwnerCommand::Claim, TOKEN, OwnerResult::Ok)?;
                gpu.release(partition, TOKEN)
            })
        });
    }

    fn cpu_access(&self, index: usize) -> Outcome<String> {
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

    fn queue(&self, index: usize, number: u32, slots: Slots, token: u64) -> Outcome<Queue<'_>> {
        Ok(Queue::enable(
            &self.gpu(index)?.device,
            (&self.buffer, self.physical),
            number,
            slots,
            token,
        ))
    }

    /// One copy by the engine, with its fence waited for.
    fn copy(&self, index: usize, source: u64, destination: u64) -> Outcome {
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        queue.push_copy(source, destination, COPY as u64);
        queue.push_fence(0, 0x600d);
        queue.go();
        queue.wait_fence(0, 0x600d)
    }

    fn seed(index: usize) -> u64 {
        0xc0de_0000_0000_0000 | (index as u64) << 32
    }

    fn copy_in(&self, index: usize) -> Outcome<String> {
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
    fn peer_offset(index: usize) -> u64 {
        COPY_PEER + (index * WINDOW) as u64
    }

    fn copy_peer(&self, index: usize) -> Outcome<String> {
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

    fn copy_out(&self, index: usize) -> Outcome<String> {
        let source = self.gpu(self.peer(index)?)?.first()?.range.base + Drive::peer_offset(index);
        self.buffer.fill(TARGET, COPY, 0xdead);
        self.copy(index, source, self.physical + TARGET as u64)?;
        self.buffer.check(TARGET, COPY, Drive::seed(index))?;
        Ok(String::new())
    }

    fn copy_ram(&self, index: usize) -> Outcome<String> {
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
    fn fences(&self, index: usize) -> Outcome<String> {
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

    fn interrupt(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let data = 0x1234_0000 + u32::try_from(index).unwrap_or(0);
        self.buffer.write32(MESSAGE, 0);
        device.route_vector(pci::VECTOR_QUEUE0, self.physical + MESSAGE as u64, data)?;
        let pending =
            || device.read32(regs::irq::BASE, regs::irq::STATUS) & IrqBits::QUEUE0.bits() != 0;
        device.write(regs::irq::BASE, regs::irq::STATUS, u64::from(u32::MAX));
        if pending() {
            return Err("the pending bit does not clear".to_owned());
        }
        device.write(
            regs::irq::BASE,
            regs::irq::ENABLE,
            u64::from(IrqBits::QUEUE0.bits()),
        );
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        queue.push(&sdma::trap(7));
        queue.push_fence(1, 1);
        queue.go();
        queue.wait_fence(1, 1)?;
        wait("pending bit of the trap", || pending().then_some(()))?;
        let arrived = wait("MSI-X message", || {
            (self.buffer.read32(MESSAGE) == data).then_some(())
        });
        device.write(regs::irq::BASE, regs::irq::ENABLE, 0);
        match arrived {
            Ok(()) => Ok("works: MSI-X message seen in memory".to_owned()),
            Err(_) if on_kvm() => {
                Ok("pending bit seen; KVM delivers no message to memory".to_owned())
            }
            Err(error) => Err(error),
        }
    }

    /// A queue of another driver cannot read what is ours.
    fn foreign(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let source = gpu.first()?.range.base + COPY_IN;
        self.buffer.fill(TARGET, COPY, 0xdead);
        let mut queue = self.queue(index, 1, FOREIGN, OTHER)?;
        queue.push_copy(source, self.physical + TARGET as u64, COPY as u64);
        queue.push_fence(0, 1);
        queue.go();
        wait("fault", || {
            (queue.state() == Some(QueueState::Fault)).then_some(())
        })?;
        let code = queue.read(regs::queue::FAULT_CODE);
        let (address, packet) = (
            queue.read(regs::queue::FAULT_ADDR),
            queue.read(regs::queue::FAULT_PACKET),
        );
        if code != u64::from(QueueFault::NotOwned.code()) || address != source || packet != 0 {
            return Err(format!("fault {}", queue.fault()));
        }
        self.buffer.check(TARGET, COPY, 0xdead)?;
        let pending = gpu.device.read32(regs::irq::BASE, regs::irq::STATUS);
        if pending & IrqBits::FAULT.bits() == 0 {
            return Err(format!("IRQ.STATUS {pending:#x} shows no fault"));
        }
        queue.reset();
        if queue.state() != Some(QueueState::Disabled) {
            return Err(format!("state {:?} after reset", queue.state()));
        }
        Ok(String::new())
    }

    fn scrubbed(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        gpu.each_partition(|gpu, partition| {
            gpu.device
                .expect(partition, OwnerCommand::Claim, OTHER, OwnerResult::Ok)
        })?;
        for partition in &gpu.partitions {
            let peers = (0..self.gpus.len()).map(Drive::peer_offset);
            for offset in partition
                .places()
                .into_iter()
                .chain([COPY_IN, HELD])
                .chain(peers)
            {
                if offset + WINDOW as u64 <= partition.range.size {
                    partition.map(offset)?.check_zero(0, WINDOW)?;
                }
            }
        }
        gpu.each_partition(|gpu, partition| gpu.release(partition, OTHER))
    }

    /// Writes patterns that the host can look for in the backing files.
    pub fn write_patterns(&self) -> Outcome<Vec<Pattern>> {
        let mut patterns = Vec::new();
        for gpu in &self.gpus {
            for (number, partition) in (0u32..).zip(&gpu.partitions) {
                let seed = 0x9e37_79b9_7f4a_7c15u64
                    .wrapping_mul(u64::from(gpu.seen.index * 8 + number + 1));
                partition.map(HELD)?.fill(0, COPY, seed);
                patterns.push(Pattern {
                    gpu: gpu.seen.index,
                    partition: number,
                    offset: HELD,
                    len: COPY as u64,
                    seed,
                });
            }
        }
        Ok(patterns)
    }

    /// Looks for patterns that the host has written into the backing files.
    pub fn check_patterns(&self, patterns: &[Pattern]) -> Outcome {
        for pattern in patterns {
            let gpu = self.gpus.iter().find(|gpu| gpu.seen.index == pattern.gpu);
            let partition = gpu
                .and_then(|gpu| gpu.partitions.get(pattern.partition as usize))
                .ok_or_else(|| {
                    format!("no partition {} of GPU {}", pattern.partition, pattern.gpu)
                })?;
            let window = WINDOW as u64;
            let map = partition.map(pattern.offset / window * window)?;
            let (offset, len) = (pattern.offset % window, pattern.len);
            let fits = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
            let (offset, len) = fits
                .filter(|(o, l)| o + l <= WINDOW)
                .ok_or_else(|| format!("pattern {pattern:?} spans 2 MiB"))?;
            map.check(offset, len, pattern.seed)?;
        }
        Ok(())
    }
}

impl Gpu {
    fn new(device: Device, dax: &[DaxSeen]) -> Gpu {
        use regs::{identity, link, topology};
        let count = device
            .read32(identity::BASE, identity::PARTITION_COUNT)
            .min(regs::MAX_PARTITIONS);
        let partitions = (0..count)
            .map(|index| {
                let range = device.hbm(index);
                let dax = dax.iter().find(|dax| dax.region == range).cloned();
                Partition {
                    range,
                    aperture: device.aperture.clone(),
                    dax,
                }
            })
            .collect();
        let hex = |name: &str| probe::number(&device.attribute(name)).unwrap_or(0);
        let short = |name: &str| u16::try_from(hex(name)).unwrap_or(0);
        let links = device
            .read32(topology::BASE, topology::LINK_COUNT)
            .min(regs::MAX_LINKS);
        let seen = GpuSeen {
            index: device.read32(identity::BASE, identity::GPU_INDEX),
            bdf: device.bdf.clone(),
            ids: (short("vendor"), short("device")),
            class: u32::try_from(hex("class")).unwrap_or(0),
            numa_node: device.attribute("numa_node").parse().unwrap_or(-1),
            hive: (
                device.read(topology::BASE, topology::HIVE_ID),
                device.read32(topology::BASE, topology::NODE_ID),
                device.read32(topology::BASE, topology::HIVE_SIZE),
            ),
            links: (0..links)
                .map(|index| {
                    let base = link::BASE + index * link::STRIDE;
                    let read = |reg| device.read32(base, reg);
                    (
                        read(link::PEER),
                        read(link::WIDTH),
                        read(link::BANDWIDTH_MBS),
                    )
                })
                .collect(),
            ..GpuSeen::default()
        };
        Gpu {
            device,
            seen,
            partitions,
        }
    }

    /// What is done with a GPU of its kind.
    fn steps(&self) -> &'static [&'static str] {
        if self.partitions.is_empty() {
            steps::UNIFIED
        } else {
            steps::ALL
        }
    }

    fn read_partitions(&mut self) {
        self.seen.partitions = (0u32..)
            .zip(&self.partitions)
            .map(|(index, partition)| {
                let (pxm, coherence) = self.device.placement(index);
                PartitionSeen {
                    range: partition.range,
                    pxm,
                    coherence,
                }
            })
            .collect();
    }

    fn first(&self) -> Outcome<&Partition> {
        self.partitions
            .first()
            .ok_or_else(|| "no HBM partition".to_owned())
    }

    fn each_partition(&self, act: impl Fn(&Gpu, u32) -> Outcome) -> Outcome<String> {
        for (index, _) in (0u32..).zip(&self.partitions) {
            act(self, index)?;
        }
        if self.partitions.is_empty() {
            Err("no HBM partition".to_owned())
        } else {
            Ok(String::new())
        }
    }

    fn release(&self, partition: u32, token: u64) -> Outcome {
        self.device
            .expect(partition, OwnerCommand::Release, token, OwnerResult::Ok)?;
        self.device.wait_free(partition)
    }
}
