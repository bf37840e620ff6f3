//! A range of addresses that lies in one place, and what an engine may do with it.

use numagpu_spec::regs::QueueFault;
use vm_memory::VolatileSlice;

use crate::bus::{DmaAccess, DmaError, DmaPort};
use crate::engine::Fault;
use crate::health::BadMemory;
use crate::partition::Entry;
use crate::route::Seen;

/// Whose a range is.
pub(crate) enum Owner<'e> {
    /// With the distance from the partition's start.
    Hbm(&'e Seen, u64),
    Ram(&'e dyn DmaPort),
}

/// A range that lies in one place.
pub(crate) struct Span<'e> {
    pub(crate) owner: Owner<'e>,
    pub(crate) address: u64,
    pub(crate) len: u64,
    /// The port of the GPU at work.
    pub(crate) port: Option<&'e dyn DmaPort>,
}

pub(crate) fn fault(code: QueueFault, address: u64) -> Fault {
    Fault { code, address }
}

impl From<BadMemory> for Fault {
    fn from(bad: BadMemory) -> Fault {
        fault(bad.code, bad.address)
    }
}

pub(crate) fn dma_fault(error: DmaError, address: u64) -> Fault {
    let address = match error {
        DmaError::Unmapped { address, .. }
        | DmaError::ReadOnly { address }
        | DmaError::Failed { address } => address,
        DmaError::Disconnected => address,
    };
    fault(QueueFault::Unmapped, address)
}

impl Span<'_> {
    /// Passes the gate of the partition, if it is one.
    pub(crate) fn enter(&self, token: u64) -> Result<Option<Entry<'_>>, Fault> {
        match &self.owner {
            Owner::Ram(_) => Ok(None),
            Owner::Hbm(seen, _) => match seen.partition.enter(token) {
                Ok(entry) => Ok(Some(entry)),
                Err(code) => Err(fault(code, self.address)),
            },
        }
    }

    /// Whether the first `len` bytes, if they are HBM, are fit to be read.
    pub(crate) fn readable(&self, len: u64) -> Result<(), Fault> {
        match &self.owner {
            Owner::Ram(_) => Ok(()),
            Owner::Hbm(seen, _) => Ok(seen.partition.health().check_read(self.address, len)?),
        }
    }

    /// Whether the first `len` bytes, if they are HBM, are fit to be written.
    pub(crate) fn writable(&self, len: u64) -> Result<(), Fault> {
        match &self.owner {
            Owner::Ram(_) => Ok(()),
            Owner::Hbm(seen, _) => Ok(seen.partition.health().check_write(self.address, len)?),
        }
    }

    /// The first `len` bytes have new contents.
    pub(crate) fn renewed(&self, len: u64) {
        if let Owner::Hbm(seen, _) = &self.owner {
            seen.partition.health().wrote(self.address, len);
        }
    }

    /// Calls `f` with each piece of the first `len` bytes and its distance from the start: the only way of engines to
    /// memory, HBM in one piece. The caller is inside the gate.
    pub(crate) fn pieces(
        &self,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(usize, VolatileSlice<'_>),
    ) -> Result<(), Fault> {
        match &self.owner {
            Owner::Hbm(seen, offset) => {
                let f = &mut |piece: VolatileSlice<'_>| f(0, piece);
                let touched = seen.partition.touch(*offset, len, access, self.port, f);
                touched.map_err(|_| self.unmapped())
            }
            Owner::Ram(dma) => {
                let mut at = 0;
                dma.access(self.address, len, access, &mut |piece| {
                    let count = piece.len();
                    f(at, piece);
                    at += count;
                })
                .map_err(|error| dma_fault(error, self.address))
            }
        }
    }

    pub(crate) fn unmapped(&self) -> Fault {
        fault(QueueFault::Unmapped, self.address)
    }
}
