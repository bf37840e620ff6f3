//! GPUs whose HBM is reached through a BAR, and GPUs without any.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use numagpu_spec::regs::{Caps, Coherence, NO_PXM, identity, partition};
use numagpu_spec::sdma::{const_fill, copy_linear, fence};
use vm_memory::{VolatileMemoryError, VolatileSlice};

use super::*;
use crate::aperture::{ApertureConfig, ApertureError};
use crate::bus::{Area, BackingId, Bar, ResetKind};
use crate::config::GpuError;

const APERTURE: u8 = pci::BAR_APERTURE;
const SIZE: u64 = 64 << 20;
/// Bytes of both partitions.
const ALL: u64 = 2 * HBM_SIZE;

/// Three GPUs with apertures; the VMM maps no HBM.
fn machine(coherent: bool) -> Machine {
    let machine = Machine::of(|config| {
        let size = SIZE;
        config.aperture = Some(ApertureConfig { size, coherent });
        for partition in &mut config.partitions {
            partition.pxm = None;
        }
    });
    for gpu in 0..3 {
        for partition in 0..2 {
            machine.vmms[0].dma.unmap(hbm(gpu, partition));
        }
        machine.gpus[gpu as usize].dma_changed();
    }
    machine
}

fn ready(coherent: bool) -> Machine {
    let machine = machine(coherent);
    for gpu in 0..3 {
        machine.boot(gpu);
        for partition in 0..2 {
            assert_eq!(machine.claim(gpu, partition, TOKEN), OwnerResult::Ok);
        }
    }
    machine.enable(0, 0, TOKEN);
    machine
}

fn read(machine: &Machine, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    machine.gpus[0].bar_read(APERTURE, offset, &mut data);
    data
}

fn caps(machine: &Machine) -> Caps {
    let caps = machine.read(0, &identity::BLOCK, 0, &identity::CAPS);
    Caps::from_bits(caps).unwrap()
}

#[test]
fn the_aperture_is_told_of_everywhere() {
    for coherent in [true, false] {
        let machine = machine(coherent);
        let expected = Caps::HBM_APERTURE | Caps::PEER_COPY | Caps::PARTITION_MODES | Caps::KICKS;
        let coherent = if coherent {
            Caps::COHERENT_HBM
        } else {
            Caps::empty()
        };
        assert_eq!(caps(&machine), expected | coherent);
        for partition in 0..2 {
            let get = |reg| machine.partition(0, partition, reg);
            assert_eq!(get(&partition::PXM), u64::from(NO_PXM));
            assert_eq!(get(&partition::COHERENCE), 7);
        }
        let layout = machine.gpus[0].layout();
        let bar = |index, size, is_64bit, prefetchable| Bar {
            index,
            size,
            is_64bit,
            prefetchable,
            mappable: Vec::new(),
        };
        let bars = [
            bar(0, 0x1_0000, false, false),
            bar(1, 0x2000, false, false),
            bar(2, 0x1000, true, false),
            bar(4, SIZE, true, true),
        ];
        assert_eq!(layout.bars, bars);
        assert!(machine.gpus[0].bar_file(APERTURE).is_none(), "no file");
        machine.gpus[0].config_write(0x10, &[0xff; 24]);
        let mut sizes = [0; 24];
        machine.gpus[0].config_read(0x10, &mut sizes);
        let words: Vec<u32> = sizes
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        let low = !(SIZE as u32 - 1) | 12;
        assert_eq!(
            words,
            [0xffff_0000, 0xffff_e000, 0xffff_f004, !0, low, !0],
            "{words:x?}"
        );
    }
    let plain = Machine::new();
    assert_eq!(
        caps(&plain),
        Caps::COHERENT_HBM | Caps::PEER_COPY | Caps::PARTITION_MODES | Caps::KICKS
    );
    assert_eq!(plain.gpus[0].layout().bars.len(), 3);
    plain.gpus[0].bar_write(APERTURE, 0, &[1; 8]);
    assert_eq!(read(&plain, 0, 8), [0; 8], "no such BAR");
}

#[test]
fn accesses_of_any_length_and_place_reach_the_partitions() {
    let machine = machine(false);
    let gpu = &machine.gpus[0];
    for (offset, len) in [
        (0, 1),
        (3, 2),
        (7, 8),
        (0x1234, 4),
        (HBM_SIZE - 3, 8),
        (HBM_SIZE - 100, 100_000),
        (ALL - 1, 1),
        (0, ALL as usize),
    ] {
        let data = noise(len);
        gpu.bar_write(APERTURE, offset, &data);
        assert!(read(&machine, offset, len) == data, "{len} at {offset:#x}");
        let first = HBM_SIZE.saturating_sub(offset).min(len as u64) as usize;
        let seen = if first > 0 {
            bytes(&machine.stores[0][0], offset, first)
        } else {
            Vec::new()
        };
        assert!(seen == data[..first]);
        let behind = offset.saturating_sub(HBM_SIZE);
        let seen = bytes(&machine.stores[0][1], behind, len - first);
        assert!(seen == data[first..]);
    }
    // Nothing of another GPU's.
    assert_eq!(bytes(&machine.stores[1][0], 0, 64), [0; 64]);
}

#[test]
fn behind_the_hbm_reads_are_ones_and_writes_are_dropped() {
    let machine = machine(true);
    let gpu = &machine.gpus[0];
    gpu.bar_write(APERTURE, ALL - 4, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let seen = read(&machine, ALL - 4, 8);
    assert_eq!(seen, [1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff]);
    for offset in [ALL, ALL + 5, SIZE - 1, SIZE, u64::MAX - 2, u64::MAX] {
        gpu.bar_write(APERTURE, offset, &[9; 8]);
        assert_eq!(read(&machine, offset, 8), [0xff; 8], "{offset:#x}");
    }
    gpu.bar_write(APERTURE, 0, &[]);
    assert_eq!(read(&machine, 0, 0), [0_u8; 0]);
    assert_eq!(read(&machine, 0, 8), [0; 8], "nothing wraps");
}

#[test]
fn engines_reach_the_same_bytes_by_address() {
    for coherent in [true, false] {
        let machine = ready(coherent);
        let data = noise(100_000);
        let len = data.len();
        machine.poke(DATA, &data);
        let source = 0x1003;
        let into = copy_linear(DATA, hbm(0, 1) + source, len as u64);
        assert_eq!(machine.run(&into), QueueState::Idle);
        assert!(read(&machine, HBM_SIZE + source, len) == data);
        machine.gpus[0].bar_write(APERTURE, 0x77, b"by the CPU");
        let out = copy_linear(hbm(0, 0) + 0x77, DATA, 10);
        assert_eq!(machine.run(&out), QueueState::Idle);
        assert_eq!(machine.peek(DATA, 10), b"by the CPU");
        // A peer's, over a link.
        let peer = copy_linear(hbm(0, 0) + 0x77, hbm(1, 1) + 5, 10);
        assert_eq!(machine.run(&peer), QueueState::Idle);
        let mut seen = [0; 10];
        machine.gpus[1].bar_read(APERTURE, HBM_SIZE + 5, &mut seen);
        assert_eq!(&seen, b"by the CPU");
        // What nobody owns stays out of reach.
        assert_eq!(machine.release(1, 1, TOKEN), OwnerResult::Ok);
        machine.wait_free(1, 1);
        assert_eq!(machine.run(&peer), QueueState::Fault);
        assert_eq!(machine.fault(0, 0).0, QueueFault::NotOwned);
    }
}

#[test]
fn a_map_has_no_say_in_who_reaches_an_aperture() {
    let machine = ready(false);
    let gpu = &machine.gpus[0];
    let code = || machine.partition(0, 0, &partition::COHERENCE);
    let aperture = u64::from(Coherence::Aperture.code());
    machine.vmms[0].dma.map_ram(hbm(0, 0), 0x1000).unwrap();
    gpu.dma_changed();
    assert_eq!(code(), aperture);
    assert_eq!(machine.run(&const_fill(hbm(0, 0), 7, 64)), QueueState::Idle);
    assert_eq!(read(&machine, 0, 4), [7, 0, 0, 0]);
    gpu.detach();
    assert_eq!(code(), aperture);
    machine.wait_free(0, 0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::NotReady);
}

#[test]
fn what_is_given_up_reads_as_zeros() {
    let machine = ready(true);
    let gpu = &machine.gpus[0];
    let fill = || {
        gpu.bar_write(APERTURE, 0, &[0xaa; 4096]);
        gpu.bar_write(APERTURE, HBM_SIZE, &[0xbb; 4096]);
    };
    fill();
    assert_eq!(machine.release(0, 1, TOKEN), OwnerResult::Ok);
    machine.wait_free(0, 1);
    assert_eq!(read(&machine, HBM_SIZE, 4096), [0; 4096]);
    assert_eq!(read(&machine, 0, 4096), [0xaa; 4096], "still owned");
    assert_eq!(machine.claim(0, 1, TOKEN), OwnerResult::Ok);
    for kind in [ResetKind::Function, ResetKind::Disconnect] {
        fill();
        gpu.reset(kind);
        for partition in 0..2 {
            machine.wait_free(0, partition);
            let offset = u64::from(partition) * HBM_SIZE;
            assert_eq!(read(&machine, offset, 4096), [0; 4096]);
        }
        machine.boot(0);
        for partition in 0..2 {
            assert_eq!(machine.claim(0, partition, TOKEN), OwnerResult::Ok);
        }
    }
}

#[test]
fn a_gpu_without_hbm_works_in_ram() {
    let machine = Machine::of(|config| config.partitions.clear());
    assert_eq!(caps(&machine), Caps::PEER_COPY | Caps::KICKS);
    let count = machine.read(0, &identity::BLOCK, 0, &identity::PARTITION_COUNT);
    assert_eq!(count, 0);
    for gpu in 0..3 {
        machine.boot(gpu);
    }
    machine.enable(0, 0, TOKEN);
    let data = noise(300_000);
    machine.poke(DATA, &data);
    let target = DATA + (1 << 20) + 3;
    let mut words = copy_linear(DATA, target, data.len() as u64).to_vec();
    words.extend(fence(WRITEBACK + 0x1000, 0x600d));
    assert_eq!(machine.run(&words), QueueState::Idle);
    assert!(machine.peek(target, data.len()) == data);
    assert_eq!(machine.peek32(WRITEBACK + 0x1000), 0x600d);
    // There is nothing to claim, and nothing answers.
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::None);
    for partition in 0..regs::MAX_PARTITIONS {
        for reg in partition::BLOCK.regs {
            assert_eq!(machine.partition(0, partition, reg), 0, "{}", reg.name);
        }
    }
    machine.gpus[0].reset(ResetKind::Function);
    assert_eq!(machine.queue_state(0, 0), QueueState::Disabled);
    machine.boot(0);
    machine.enable(0, 0, 0);
    assert_eq!(machine.run(&words[..0]), QueueState::Idle);
}

/// A part of some file, as far as it tells.
struct Part {
    memory: AnonymousStore,
    file: Arc<File>,
    id: BackingId,
    offset: u64,
}

impl HbmStore for Part {
    fn size(&self) -> u64 {
        self.memory.size()
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        self.memory.slice(offset, len)
    }

    fn backing(&self) -> (BackingId, u64) {
        (self.id, self.offset)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn scrub(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.memory.scrub(offset, len)
    }
}

/// Partitions at `base` of 8 KiB each, at offsets of files.
fn parts(base: u64, places: &[(u64, u64)]) -> Vec<PartitionConfig> {
    let file = Arc::new(File::open("/dev/null").unwrap());
    let bases = (0..).map(|index| base + index * 8192);
    let parts = bases.zip(places).map(|(base, (inode, offset))| {
        let id = BackingId {
            device: 1,
            inode: *inode,
        };
        PartitionConfig {
            base,
            size: 8192,
            pxm: None,
            store: Arc::new(Part {
                memory: AnonymousStore::new(8192).unwrap(),
                file: Arc::clone(&file),
                id,
                offset: *offset,
            }),
        }
    });
    parts.collect()
}

fn with(partitions: Vec<PartitionConfig>, size: u64) -> GpuConfig {
    GpuConfig {
        aperture: Some(ApertureConfig {
            size,
            coherent: false,
        }),
        ..GpuConfig::new(0, partitions)
    }
}

#[test]
fn one_file_of_all_partitions_can_be_mapped() {
    let partitions = parts(HBM, &[(5, 0), (5, 8192), (5, 16384)]);
    let store = Arc::clone(&partitions[0].store);
    let gpu = Gpu::new(with(partitions, 0x8000), Fabric::new()).unwrap();
    for bar in &gpu.layout().bars {
        let (expected, file): (&[Area], _) = if bar.index == APERTURE {
            let offset = 0;
            let size = 0x6000;
            (&[Area { offset, size }], store.file())
        } else {
            (&[], None)
        };
        assert_eq!(bar.mappable, expected);
        use std::os::fd::AsRawFd as _;
        let number = |fd: BorrowedFd<'_>| fd.as_raw_fd();
        assert_eq!(gpu.bar_file(bar.index).map(number), file.map(number));
    }
}

#[test]
fn apertures_that_cannot_be_are_refused() {
    let refused = |partitions, size| {
        let error = Gpu::new(with(partitions, size), Fabric::new()).err();
        match error.unwrap() {
            GpuError::Aperture(error) => error,
            other => panic!("{other}"),
        }
    };
    let good = || parts(HBM, &[(5, 0), (5, 8192)]);
    assert!(Gpu::new(with(good(), 0x4000), Fabric::new()).is_ok());
    for size in [0, 1, 2048, 0x5000, u64::MAX] {
        assert_eq!(refused(good(), size), ApertureError::Size { size });
    }
    let size = 0x2000;
    let short = refused(good(), size);
    assert_eq!(short, ApertureError::Short { hbm: 0x4000, size });
    assert!(short.to_string().contains("0x4000") && short.to_string().contains("0x2000"));
    assert_eq!(refused(vec![], size), ApertureError::Empty { size });
    let mut gap = good();
    gap[1].base += 4096;
    let gap = refused(gap, 1 << 20);
    let (index, base, want) = (1, HBM + 0x3000, HBM + 0x2000);
    assert_eq!(gap, ApertureError::Gap { index, base, want });
    let mut descending = good();
    descending.swap(0, 1);
    let error = refused(descending, 1 << 20);
    assert!(matches!(error, ApertureError::File { index: 0, .. }));
    for places in [
        [(5, 4096), (5, 8192)],
        [(5, 0), (5, 0)],
        [(5, 0), (6, 8192)],
    ] {
        let error = refused(parts(HBM, &places), 1 << 20);
        assert!(matches!(error, ApertureError::File { .. }), "{error}");
    }
}
