//! What the registers of BAR 0 show.

use numagpu_spec::regs::{
    self, BOOT_START, BlockId, Caps, LINK_PEER_CPU, NO_PXM, boot, clock, discovery, identity, irq,
    link, partition, queue, ras, topology,
};
use numagpu_spec::{pci, sdma, table::Block};

use super::Gpu;
use crate::registers::{RegisterAt, RegisterDevice};

/// A block of BAR 0, and the id that `DISCOVERY` has for it.
const DIRECTORY: &[(BlockId, &Block)] = &[
    (BlockId::Identity, &identity::BLOCK),
    (BlockId::Boot, &boot::BLOCK),
    (BlockId::Irq, &irq::BLOCK),
    (BlockId::Clock, &clock::BLOCK),
    (BlockId::Topology, &topology::BLOCK),
    (BlockId::Ras, &ras::BLOCK),
    (BlockId::Discovery, &discovery::BLOCK),
    (BlockId::Link, &link::BLOCK),
    (BlockId::Partition, &partition::BLOCK),
    (BlockId::Queue, &queue::BLOCK),
];

/// Bits of `IDENTITY.PACKETS`.
const PACKETS: u64 = 1 << sdma::OP_NOP
    | 1 << sdma::OP_COPY
    | 1 << sdma::OP_WRITE
    | 1 << sdma::OP_FENCE
    | 1 << sdma::OP_TRAP
    | 1 << sdma::OP_POLL_REGMEM
    | 1 << sdma::OP_ATOMIC
    | 1 << sdma::OP_CONST_FILL
    | 1 << sdma::OP_TIMESTAMP;

impl RegisterDevice for Gpu {
    fn read(&self, at: RegisterAt, stored: u64) -> u64 {
        let offset = at.reg.offset;
        match at.block {
            identity::BASE => self.read_identity(offset, stored),
            boot::BASE => self.read_boot(offset, stored),
            irq::BASE => stored,
            clock::BASE if offset == clock::MODE.offset => self.config.timing.code().into(),
            clock::BASE => self.now(),
            topology::BASE => self.read_topology(offset, stored),
            ras::BASE => self.read_ras(offset, stored),
            discovery::BASE => self.read_discovery(at.instance, offset),
            link::BASE => self.read_link(at.instance, offset),
            partition::BASE => self.read_partition(at.instance, offset, stored),
            queue::BASE => self.read_queue(at.instance, offset, stored),
            _ => 0,
        }
    }

    fn written(&self, at: RegisterAt, value: u64, _lanes: u64) {
        match at.block {
            boot::BASE if value & u64::from(BOOT_START) != 0 => self.boot.start(self.now()),
            topology::BASE => self.request_mode(value),
            ras::BASE => self.ras_command(value),
            partition::BASE => self.command(at.instance),
            queue::BASE => self.control_queue(at.instance, value),
            _ => {}
        }
    }
}

impl Gpu {
    fn read_identity(&self, offset: u32, stored: u64) -> u64 {
        let config = &self.config;
        match offset {
            o if o == identity::CAPS.offset => {
                let mut caps = Caps::empty();
                caps.set(Caps::KICKS, config.doorbells.is_none());
                let has_hbm = !config.partitions.is_empty();
                let is_coherent = config.aperture.is_none_or(|it| it.coherent);
                caps.set(Caps::COHERENT_HBM, has_hbm && is_coherent);
                caps.set(Caps::HBM_APERTURE, config.aperture.is_some());
                let modes = self.member.modes.possible();
                caps.set(Caps::PARTITION_MODES, modes.count_ones() > 1);
                caps.set(Caps::PEER_COPY, config.hive_id != 0 && config.hive_size > 1);
                caps.bits()
            }
            o if o == identity::GPU_INDEX.offset => config.index.into(),
            o if o == identity::PARTITION_COUNT.offset => self.partitions().len() as u64,
            o if o == identity::QUEUE_COUNT.offset => config.queues.into(),
            o if o == identity::PACKETS.offset => PACKETS,
            o if o == identity::VECTOR_COUNT.offset => pci::VECTOR_COUNT.into(),
            _ => stored,
        }
    }

    fn read_boot(&self, offset: u32, stored: u64) -> u64 {
        match offset {
            o if o == boot::STATUS.offset => self.boot.state(self.now()).code().into(),
            o if o == boot::FAULT.offset => self.boot.fault(self.now()).into(),
            o if o == boot::DELAY_US.offset => self.boot.delay_us().into(),
            _ => stored,
        }
    }

    fn read_topology(&self, offset: u32, stored: u64) -> u64 {
        let config = &self.config;
        match offset {
            o if o == topology::HIVE_ID.offset => config.hive_id,
            o if o == topology::NODE_ID.offset => config.node_id.into(),
            o if o == topology::HIVE_SIZE.offset => config.hive_size.into(),
            o if o == topology::CPU_PXM.offset => config.cpu_pxm.into(),
            o if o == topology::PARTITION_MODE.offset => self.partitions().len() as u64,
            o if o == topology::PARTITION_MODES.offset => self.member.modes.possible().into(),
            o if o == topology::LINK_COUNT.offset => config.links.len() as u64,
            _ => stored,
        }
    }

    fn read_ras(&self, offset: u32, stored: u64) -> u64 {
        let health = &self.health;
        match offset {
            o if o == ras::CORRECTABLE.offset => health.status().correctable.into(),
            o if o == ras::UNCORRECTABLE.offset => health.status().uncorrectable.into(),
            o if o == ras::POISONED.offset => health.status().poisoned.into(),
            o if o == ras::RETIRED.offset => health.status().retired.into(),
            o if o == ras::LAST_ADDRESS.offset => health.last().0,
            o if o == ras::LAST_KIND.offset => health.last().1.into(),
            o if o == ras::RESULT.offset => health.result_code().into(),
            o if o == ras::ENTRY.offset => {
                health.retired(self.registers.get(&ras::BLOCK, 0, &ras::INDEX))
            }
            _ => stored,
        }
    }

    fn read_discovery(&self, instance: u32, offset: u32) -> u64 {
        let Some((id, block)) = DIRECTORY.get(instance as usize) else {
            return 0;
        };
        match offset {
            o if o == discovery::BLOCK_ID.offset => id.code().into(),
            o if o == discovery::OFFSET.offset => block.base.into(),
            o if o == discovery::INSTANCE_STRIDE.offset => block.stride.into(),
            o if o == discovery::COUNT.offset => match id {
                BlockId::Discovery => DIRECTORY.len() as u64,
                BlockId::Link => self.config.links.len() as u64,
                BlockId::Partition => self.partitions().len() as u64,
                BlockId::Queue => self.config.queues.into(),
                _ => 1,
            },
            _ => 0,
        }
    }

    fn read_link(&self, instance: u32, offset: u32) -> u64 {
        let index = instance as usize;
        let both = (self.config.links.get(index), self.member.links.get(index));
        let (Some(config), Some(end)) = both else {
            return 0;
        };
        match offset {
            o if o == link::PEER.offset => config.peer.unwrap_or(LINK_PEER_CPU).into(),
            o if o == link::STATE.offset => end.state().code().into(),
            o if o == link::WIDTH.offset => config.width.into(),
            o if o == link::BANDWIDTH_MBS.offset => config.bandwidth_mbs.into(),
            o if o == link::LATENCY_NS.offset => config.latency_ns.into(),
            o if o == link::ERRORS.offset => end.errors().into(),
            o if o == link::WIDTH_NOW.offset => end.lanes().into(),
            o if o == link::BANDWIDTH_NOW_MBS.offset => end.bandwidth_now_mbs().into(),
            o if o == link::BYTES_OUT.offset => end.bytes_out(),
            o if o == link::BYTES_IN.offset => end.bytes_in(),
            _ => 0,
        }
    }

    fn read_partition(&self, instance: u32, offset: u32, stored: u64) -> u64 {
        let Some(target) = self.partitions().get(instance as usize) else {
            return 0;
        };
        match offset {
            o if o == partition::HBM_BASE.offset => target.base(),
            o if o == partition::HBM_SIZE.offset => target.size(),
            o if o == partition::PXM.offset => target.pxm().unwrap_or(NO_PXM).into(),
            o if o == partition::COHERENCE.offset => target.coherence_code().into(),
            o if o == partition::STATE.offset => target.state_code().into(),
            o if o == partition::GENERATION.offset => target.generation().into(),
            o if o == partition::RESULT.offset => target.result_code().into(),
            o if o == partition::LEASE_LEFT_MS.offset => target.lease_left_ms(self.now()).into(),
            o if o == partition::LOSS.offset => target.loss_code().into(),
            o if o == partition::HISTORY_COUNT.offset => target.history_count().into(),
            o if o == partition::HISTORY_STEP.offset => {
                target.history_step(self.history_index(instance)).0.into()
            }
            o if o == partition::HISTORY_NS.offset => {
                target.history_step(self.history_index(instance)).1
            }
            _ => stored,
        }
    }

    fn history_index(&self, instance: u32) -> u64 {
        let index = &partition::HISTORY_INDEX;
        self.registers.get(&partition::BLOCK, instance, index)
    }

    fn read_queue(&self, instance: u32, offset: u32, stored: u64) -> u64 {
        let Some(target) = self.queues.get(instance as usize) else {
            return 0;
        };
        let status = target.status();
        match offset {
            o if o == queue::RPTR.offset => status.rptr,
            o if o == queue::WPTR.offset => status.wptr,
            o if o == queue::STATUS.offset => status.state.code().into(),
            o if o == queue::FAULT_CODE.offset => status.fault.code().into(),
            o if o == queue::FAULT_ADDR.offset => status.fault_address,
            o if o == queue::FAULT_PACKET.offset => status.fault_packet,
            o if o == queue::PACKETS.offset => status.packets,
            o if o == queue::TRAP_CONTEXT.offset => status.trap_context.into(),
            o if o == queue::BUSY_NS.offset => status.busy_ns,
            o if o == queue::STAMP_START_NS.offset => status.stamp_start_ns,
            o if o == queue::STAMP_END_NS.offset => status.stamp_end_ns,
            _ => stored,
        }
    }
}

#[allow(clippy::indexing_slicing, reason = "runs at compile time")]
const _: () = {
    assert!(DIRECTORY.len() == regs::BLOCKS.len());
    let mut i = 0;
    while i < regs::BLOCKS.len() {
        assert!(
            DIRECTORY[i].1.base == regs::BLOCKS[i].base,
            "every block is in the directory"
        );
        i += 1;
    }
};
