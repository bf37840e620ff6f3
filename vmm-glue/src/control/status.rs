//! What an instance says of itself. Addresses and sizes are in bytes, times in their unit; states have the names of
//! the register tables in kebab case. Owners' tokens are not in the snapshots that this is made of.

use numagpu_devices::GpuStatus;
use numagpu_devices::gpu::LinkStatus;
use numagpu_devices::health::HealthStatus;
use numagpu_devices::ownership;
use numagpu_devices::partition::PartitionStatus;
use numagpu_devices::queue::QueueStatus;
use serde::{Deserialize, Serialize};

use crate::scenario::Played;

/// A whole instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the machine.
    pub machine: String,
    /// Process that serves it.
    pub pid: u32,
    /// What that process has given up: `off`, `log (...)` or `on (...)`. Empty in the status of one that does not say.
    #[serde(default)]
    pub sandbox: String,
    /// Milliseconds since its GPUs began to be served.
    pub up_ms: u64,
    /// Its GPUs, in their order.
    pub gpus: Vec<Gpu>,
    /// Its scenario, if it has one.
    pub scenario: Option<Played>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Index in its machine.
    pub index: u32,
    /// Name in its machine.
    pub id: String,
    /// Whether a VMM is connected.
    pub attached: bool,
    /// Whether the function answers on the bus.
    pub present: bool,
    /// Boot handshake.
    pub boot: String,
    /// MSI-X messages sent since reset.
    pub interrupts: u64,
    /// Causes of interrupts since power-on, whether a message was sent or not.
    pub causes: u64,
    /// HBM partitions.
    pub partitions: Vec<Partition>,
    /// Copy queues.
    pub queues: Vec<Queue>,
    /// Links.
    pub links: Vec<Link>,
    /// Memory errors.
    pub health: Health,
}

/// An HBM partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// First address for packets.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Proximity domain, if it is in one.
    pub pxm: Option<u32>,
    /// Ownership state.
    pub state: String,
    /// Claims and frees so far.
    pub generation: u32,
    /// Why an owner last lost it without asking.
    pub loss: String,
    /// Whether and how the VMM maps it.
    pub coherence: String,
    /// Last steps of its ownership, oldest first.
    pub history: Vec<Step>,
}

/// A step of a partition's ownership.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// Device clock in nanoseconds.
    pub at_ns: u64,
    /// State before.
    pub from: String,
    /// What happened.
    pub event: String,
    /// State after.
    pub to: String,
}

/// A copy queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    /// State.
    pub state: String,
    /// Bytes consumed since enable.
    pub rptr: u64,
    /// Bytes produced since enable.
    pub wptr: u64,
    /// Packets completed since enable.
    pub packets: u64,
    /// Bytes copied, written and filled since enable.
    pub bytes: u64,
    /// Context of the last TRAP since reset.
    pub trap_context: u32,
    /// Why it stopped.
    pub fault: String,
    /// Address that the fault is about.
    pub fault_address: u64,
    /// Index of the packet since enable.
    pub fault_packet: u64,
    /// Nanoseconds that packets took since enable.
    pub busy_ns: u64,
    /// When the last packet that moved data began, in nanoseconds of the device's clock.
    pub stamp_start_ns: u64,
    /// When it ended.
    pub stamp_end_ns: u64,
}

/// A link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Hive position of the peer; null is the CPU.
    pub peer: Option<u32>,
    /// Whether all its lanes carry traffic (`up`), some (`degraded`) or none (`down`).
    pub state: String,
    /// Lanes that carry traffic.
    pub lanes: u32,
    /// Errors since reset.
    pub errors: u32,
    /// Bytes that left through it since reset.
    pub bytes_out: u64,
    /// Bytes that came through it since reset.
    pub bytes_in: u64,
}

/// Memory errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Correctable errors since reset.
    pub correctable: u32,
    /// Uncorrectable errors since reset.
    pub uncorrectable: u32,
    /// Pages with a poisoned line in them that are not retired.
    pub poisoned: u32,
    /// Retired pages.
    pub retired: u32,
}

/// A name of the register tables in kebab case: `FunctionReset` is `function-reset`.
fn kebab(name: &str) -> String {
    let mut kebab = String::with_capacity(name.len() + 4);
    for (index, letter) in name.char_indices() {
        if letter.is_ascii_uppercase() && index > 0 {
            kebab.push('-');
        }
        kebab.push(letter.to_ascii_lowercase());
    }
    kebab
}

impl Gpu {
    /// The GPU of this name in a machine.
    // Each snapshot is taken apart by all its fields, so that a new one cannot be forgotten.
    #[must_use]
    pub fn new(id: &str, status: GpuStatus) -> Gpu {
        let GpuStatus {
            index,
            attached,
            boot,
            partitions,
            queues,
            links,
            health,
            present,
            interrupts,
            causes,
        } = status;
        Gpu {
            index,
            id: id.to_owned(),
            attached,
            present,
            boot: kebab(boot.name()),
            interrupts,
            causes,
            partitions: partitions.into_iter().map(Partition::from).collect(),
            queues: queues.into_iter().map(Queue::from).collect(),
            links: links.into_iter().map(Link::from).collect(),
            health: health.into(),
        }
    }
}

impl From<PartitionStatus> for Partition {
    fn from(status: PartitionStatus) -> Partition {
        let PartitionStatus {
            base,
            size,
            pxm,
            state,
            generation,
            loss,
            coherence,
            history,
        } = status;
        Partition {
            base,
            size,
            pxm,
            state: kebab(state.name()),
            generation,
            loss: kebab(loss.name()),
            coherence: kebab(coherence.name()),
            history: history.into_iter().map(Step::from).collect(),
        }
    }
}

impl From<ownership::Step> for Step {
    fn from(step: ownership::Step) -> Step {
        let ownership::Step {
            at_ns,
            from,
            event,
            to,
        } = step;
        Step {
            at_ns,
            from: kebab(from.name()),
            event: kebab(event.name()),
            to: kebab(to.name()),
        }
    }
}

impl From<QueueStatus> for Queue {
    fn from(status: QueueStatus) -> Queue {
        let QueueStatus {
            state,
            rptr,
            wptr,
            packets,
            bytes,
            trap_context,
            fault,
            fault_address,
            fault_packet,
            busy_ns,
            stamp_start_ns,
            stamp_end_ns,
        } = status;
        Queue {
            state: kebab(state.name()),
            rptr,
            wptr,
            packets,
            bytes,
            trap_context,
            fault: kebab(fault.name()),
            fault_address,
            fault_packet,
            busy_ns,
            stamp_start_ns,
            stamp_end_ns,
        }
    }
}

impl From<LinkStatus> for Link {
    fn from(status: LinkStatus) -> Link {
        let LinkStatus {
            peer,
            state,
            lanes,
            errors,
            bytes_out,
            bytes_in,
        } = status;
        Link {
            peer,
            state: kebab(state.name()),
            lanes,
            errors,
            bytes_out,
            bytes_in,
        }
    }
}

impl From<HealthStatus> for Health {
    fn from(status: HealthStatus) -> Health {
        let HealthStatus {
            correctable,
            uncorrectable,
            poisoned,
            retired,
        } = status;
        Health {
            correctable,
            uncorrectable,
            poisoned,
            retired,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_register_tables() {
        assert_eq!(kebab("FunctionReset"), "function-reset");
        assert_eq!(kebab("Ready"), "ready");
        assert_eq!(kebab(""), "");
    }
}
