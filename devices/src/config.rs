//! What a GPU is made of, and the checks before it is made.

use std::sync::Arc;
use std::time::Duration;

use numagpu_spec::regs::TimingMode;
use numagpu_spec::{pci, regs};
use thiserror::Error;

use crate::aperture::{ApertureConfig, ApertureError};
use crate::bus::{Area, Bar, HbmStore};
use crate::clock::{Clock, HostClock};
use crate::config_space::ResizableBar;
use crate::fabric::FabricError;
use crate::ownership::OnDisconnect;
use crate::registers::TableError;

/// Identity of the PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
    /// Class code, 24 bits: base class, sub-class, programming interface.
    pub class: u32,
    /// Revision.
    pub revision: u8,
}

impl Default for PciIds {
    fn default() -> PciIds {
        PciIds {
            vendor: pci::VENDOR_ID,
            device: pci::DEVICE_ID,
            subsystem_vendor: pci::VENDOR_ID,
            subsystem: pci::DEVICE_ID,
            class: pci::CLASS_CODE,
            revision: 1,
        }
    }
}

/// One HBM partition.
#[derive(Clone)]
pub struct PartitionConfig {
    /// First address for packets, a multiple of 4096: the guest physical address, or in a GPU with an aperture any
    /// address at which the guest has no memory.
    pub base: u64,
    /// Bytes, a multiple of 4096 above 0, equal to the store's size.
    pub size: u64,
    /// ACPI proximity domain, if the machine's firmware gives it one.
    pub pxm: Option<u32>,
    /// Its memory; reads as zeros.
    pub store: Arc<dyn HbmStore>,
}

/// One link that leaves the GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// Hive position of the peer; `None` is the CPU.
    pub peer: Option<u32>,
    /// Physical links in parallel.
    pub width: u32,
    /// MB/s in one direction, all links together; 0 = not known.
    pub bandwidth_mbs: u32,
    /// Latency in ns; 0 = not known.
    pub latency_ns: u32,
}

/// Everything that makes one GPU differ from another. [`GpuConfig::new`] gives a single GPU without links; set
/// the fields that differ.
#[derive(Clone)]
pub struct GpuConfig {
    /// Index of the GPU in its machine.
    pub index: u32,
    /// PCI identity.
    pub ids: PciIds,
    /// HBM, at most 8 partitions that do not overlap; none for a GPU that works in the machine's RAM.
    pub partitions: Vec<PartitionConfig>,
    /// The BAR through which CPUs reach the HBM, if it is no memory of the machine. All partitions are in it.
    pub aperture: Option<ApertureConfig>,
    /// Memory of the doorbell page, of [`pci::BAR_DOORBELLS_SIZE`] bytes, for VMMs to map: for a GPU with an aperture,
    /// where a VMM that maps that waits for each write that it has to send. None if doorbells come as writes only.
    pub doorbells: Option<Arc<dyn HbmStore>>,
    /// Copy queues, 1 to 8.
    pub queues: u32,
    /// Id shared by the GPUs that reach each other; 0 = no hive, no peers.
    pub hive_id: u64,
    /// Position in the hive, below `hive_size`.
    pub node_id: u32,
    /// GPUs in the hive.
    pub hive_size: u32,
    /// Proximity domain of the CPU node that the GPU is attached to.
    pub cpu_pxm: u32,
    /// Links, at most 32. Each link between two GPUs is in the list of both.
    pub links: Vec<LinkConfig>,
    /// What becomes of HBM when the VMM goes away.
    pub on_disconnect: OnDisconnect,
    /// Modelled boot time.
    pub boot_delay: Duration,
    /// Code with which the boot fails; 0 = it does not.
    pub boot_fault: u32,
    /// Source of time.
    pub clock: Arc<dyn Clock>,
    /// What time stamps of queues mean, and whether work takes as long.
    pub timing: TimingMode,
    /// MB/s of the HBM; 0 = not known, no limit to modelled time.
    pub hbm_bandwidth_mbs: u32,
    /// Latency of the HBM in ns; 0 = not known.
    pub hbm_latency_ns: u32,
}

impl GpuConfig {
    /// A GPU on its own: default ids, no aperture, 2 queues, no hive, no links, a scrub at each disconnect, 1 ms to
    /// boot, the host's clock and speed.
    pub fn new(index: u32, partitions: Vec<PartitionConfig>) -> GpuConfig {
        GpuConfig {
            index,
            ids: PciIds::default(),
            partitions,
            aperture: None,
            doorbells: None,
            queues: 2,
            hive_id: 0,
            node_id: 0,
            hive_size: 1,
            cpu_pxm: 0,
            links: Vec::new(),
            on_disconnect: OnDisconnect::Scrub,
            boot_delay: Duration::from_millis(1),
            boot_fault: 0,
            clock: Arc::new(HostClock::new()),
            timing: TimingMode::Off,
            hbm_bandwidth_mbs: 0,
            hbm_latency_ns: 0,
        }
    }

    /// Checks every field against its range.
    pub(crate) fn check(&self) -> Result<(), GpuError> {
        within("partitions", self.partitions.len(), 0, regs::MAX_PARTITIONS)?;
        within("queues", self.queues as usize, 1, regs::MAX_QUEUES)?;
        within("links", self.links.len(), 0, regs::MAX_LINKS)?;
        if self.ids.class > 0xff_ffff {
            return Err(GpuError::Class {
                class: self.ids.class,
            });
        }
        if self.node_id >= self.hive_size {
            return Err(GpuError::Node {
                node: self.node_id,
                size: self.hive_size,
            });
        }
        for peer in self.links.iter().filter_map(|link| link.peer) {
            if peer >= self.hive_size || peer == self.node_id {
                return Err(GpuError::Peer {
                    peer,
                    node: self.node_id,
                    size: self.hive_size,
                });
            }
        }
        for (index, partition) in self.partitions.iter().enumerate() {
            let (base, size) = (partition.base, partition.size);
            let page = pci::BAR_DOORBELLS_SIZE;
            let end = base.checked_add(size);
            let aligned = base.is_multiple_of(page) && size.is_multiple_of(page) && size > 0;
            let Some(end) = end.filter(|_| aligned) else {
                return Err(GpuError::Range { index, base, size });
            };
            if partition.store.size() != size {
                return Err(GpuError::StoreSize {
                    index,
                    size,
                    store: partition.store.size(),
                });
            }
            let earlier = self.partitions.iter().take(index).enumerate();
            for (other, range) in earlier {
                if base < range.base.saturating_add(range.size) && range.base < end {
                    return Err(GpuError::Overlap { index, other });
                }
            }
        }
        if let Some(page) = &self.doorbells
            && page.size() != pci::BAR_DOORBELLS_SIZE
        {
            return Err(GpuError::DoorbellPage { size: page.size() });
        }
        if let Some(aperture) = &self.aperture {
            aperture.check(&self.partitions)?;
        }
        Ok(())
    }

    /// The BARs of a configuration that passed the check, ascending.
    pub(crate) fn bars(&self) -> Vec<Bar> {
        let bar = |index, size, is_64bit| Bar {
            index,
            size,
            is_64bit,
            prefetchable: false,
            mappable: Vec::new(),
        };
        let mut doorbells = bar(pci::BAR_DOORBELLS, pci::BAR_DOORBELLS_SIZE, true);
        if let Some(page) = &self.doorbells
            && page.file().is_some()
        {
            let (offset, size) = (0, page.size());
            doorbells.mappable.push(Area { offset, size });
        }
        let mut bars = vec![
            bar(pci::BAR_REGISTERS, pci::BAR_REGISTERS_SIZE, false),
            bar(pci::BAR_MSIX, pci::BAR_MSIX_SIZE, false),
            doorbells,
        ];
        bars.extend(self.aperture.map(|it| it.bar(&self.partitions)));
        bars
    }

    /// How small software may make the aperture of a configuration that passed the check: so that it holds the first
    /// partition.
    pub(crate) fn resizable(&self) -> Option<ResizableBar> {
        let aperture = self.aperture.as_ref()?;
        let first = self.partitions.first()?.size;
        Some(ResizableBar {
            bar: pci::BAR_APERTURE,
            least: first.checked_next_power_of_two()?.min(aperture.size),
        })
    }
}

fn within(what: &'static str, have: usize, min: usize, max: u32) -> Result<(), GpuError> {
    let max = max as usize;
    if (min..=max).contains(&have) {
        Ok(())
    } else {
        Err(GpuError::Count {
            what,
            have,
            min,
            max,
        })
    }
}

/// Why a GPU cannot be made.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum GpuError {
    /// Too few or too many of something.
    #[error("{have} {what}, but a GPU has {min} to {max}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many.
        have: usize,
        /// At least.
        min: usize,
        /// At most.
        max: usize,
    },
    /// A doorbell page of another size than its BAR.
    #[error(
        "a doorbell page of {size:#x} bytes; the BAR has {:#x}",
        pci::BAR_DOORBELLS_SIZE
    )]
    DoorbellPage {
        /// Bytes of the page.
        size: u64,
    },
    /// A class code above 24 bits.
    #[error("class code {class:#x} is above 0xffffff")]
    Class {
        /// Class code.
        class: u32,
    },
    /// Position outside the hive.
    #[error("hive position {node} is not below the hive's size {size}")]
    Node {
        /// Position.
        node: u32,
        /// GPUs in the hive.
        size: u32,
    },
    /// A link to nobody or to itself.
    #[error("GPU {node} of a hive of {size} has a link to {peer}")]
    Peer {
        /// Position of the peer.
        peer: u32,
        /// Own position.
        node: u32,
        /// GPUs in the hive.
        size: u32,
    },
    /// A partition that wraps, is empty or is not made of pages.
    #[error(
        "partition {index} at {base:#x}, {size:#x} bytes: empty, beyond 2^64 or not made of 4096-byte pages"
    )]
    Range {
        /// Partition.
        index: usize,
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// A store of another size than its partition.
    #[error("partition {index} has {size:#x} bytes, its store {store:#x}")]
    StoreSize {
        /// Partition.
        index: usize,
        /// Bytes of the partition.
        size: u64,
        /// Bytes of the store.
        store: u64,
    },
    /// Two partitions of the GPU overlap.
    #[error("partitions {index} and {other} overlap")]
    Overlap {
        /// One.
        index: usize,
        /// The other.
        other: usize,
    },
    /// An aperture that cannot be.
    #[error(transparent)]
    Aperture(#[from] ApertureError),
    /// It clashes with another GPU.
    #[error("the GPU does not fit the fabric")]
    Fabric(#[from] FabricError),
    /// A register table is malformed.
    #[error("the register table is malformed")]
    Table(#[from] TableError),
}
