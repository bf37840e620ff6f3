//! Brings every GPU up, works in its HBM, and notes how each step went.

mod blocks;
mod copies;
mod faults;
mod interrupts;
mod memory_errors;
mod modes;
mod ownership;
mod packets;
mod times;

use numagpu_spec::regs::{self, OwnerCommand, OwnerResult, TimingMode};
use numagpu_topology::seen::{DaxSeen, GpuSeen, PartitionSeen, Pattern, Step, steps};

use crate::device::{Device, Outcome, Queue, Slots};
use crate::hbm::{Partition, WINDOW};
use crate::probe;
use crate::sys::Mapping;

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
/// Where behind it packets work, so that the copy stays for the host to look at.
const SCRATCH: usize = 0x10_0000;
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
/// Messages of the MSI-X vectors, 8 bytes each.
const MESSAGES: usize = 0x1_2000;
/// Words that packets change.
const WORDS: usize = 0x1_3000;
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

/// Memory that packets work on, as the CPU and as the device reach it.
struct Scratch<'a> {
    hbm: Option<Mapping>,
    buffer: &'a Mapping,
    /// Where it is in the CPU's mapping.
    at: usize,
    /// Where the device has it.
    address: u64,
}

impl Scratch<'_> {
    /// The mapping; the memory begins at `at`.
    fn memory(&self) -> &Mapping {
        self.hbm.as_ref().unwrap_or(self.buffer)
    }
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
        for gpu in &mut gpus {
            gpu.seen.lspci = probe::lspci(&gpu.seen.bdf, problems);
        }
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
        self.each(steps::BLOCKS, Drive::blocks);
        self.each(steps::CAPABILITIES, Drive::capabilities);
        self.each(steps::BOOT, |drive, index| {
            drive.gpu(index)?.device.boot().map(|()| String::new())
        });
        self.each(steps::CLOCK, Drive::clock);
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
        self.each(steps::CPU_ACCESS, Drive::cpu_access);
        self.each(steps::COPY_IN, Drive::copy_in);
        self.each(steps::COPY_PEER, Drive::copy_peer);
        self.each(steps::COPY_OUT, Drive::copy_out);
        self.each(steps::COPY_RAM, Drive::copy_ram);
        self.each(steps::LINKS, Drive::links);
        self.each(steps::FENCES, Drive::fences);
        self.each(steps::SUB_WINDOW, Drive::sub_window);
        self.each(steps::WRITES, Drive::writes);
        self.each(steps::POLLS, Drive::polls);
        self.each(steps::ATOMICS, Drive::atomics);
        self.each(steps::TIMESTAMPS, Drive::timestamps);
        self.each(steps::PRIORITIES, Drive::priorities);
        self.each(steps::INTERRUPT, Drive::interrupt);
        self.each(steps::FAULT, Drive::fault);
        self.each(steps::FOREIGN, Drive::foreign);
    }

    /// Gives all partitions back, looks at them as another driver, and does what only a partition without an owner
    /// allows. What lasts as long as the device comes last.
    pub fn stop(&mut self) {
        self.each(steps::RELEASE, |drive, index| {
            drive
                .gpu(index)?
                .each_partition(|gpu, partition| gpu.release(partition, TOKEN))
        });
        self.each(steps::SCRUBBED, Drive::scrubbed);
        self.each(steps::REFUSALS, Drive::refusals);
        self.each(steps::TRANSFER, Drive::transfer);
        self.each(steps::LEASE, Drive::lease);
        self.each(steps::RESET, Drive::reset);
        self.each(steps::MODES, Drive::partition_modes);
        self.each(steps::HEALTH, Drive::health);
        self.each(steps::RETIRE, Drive::retire);
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

    /// The number of a queue beside queue 0, or 0 where there is none.
    fn second(&self, index: usize) -> Outcome<u32> {
        let count = self
            .gpu(index)?
            .device
            .read32(regs::identity::BASE, regs::identity::QUEUE_COUNT);
        Ok(u32::from(count > 1))
    }

    /// Memory that packets work on: the first partition's HBM, or RAM where there is none.
    fn scratch(&self, index: usize) -> Outcome<Scratch<'_>> {
        let Some(partition) = self.gpu(index)?.partitions.first() else {
            return Ok(Scratch {
                hbm: None,
                buffer: &self.buffer,
                at: TARGET,
                address: self.physical + TARGET as u64,
            });
        };
        Ok(Scratch {
            hbm: Some(partition.map(COPY_IN)?),
            buffer: &self.buffer,
            at: SCRATCH,
            address: partition.range.base + COPY_IN + SCRATCH as u64,
        })
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
            clock: TimingMode::from_code(device.read32(regs::clock::BASE, regs::clock::MODE))
                .map_or("unknown", TimingMode::name)
                .to_owned(),
            blocks: blocks::list(&device),
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
