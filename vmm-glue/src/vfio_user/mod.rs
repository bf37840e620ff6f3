//! A vfio-user server for any [`PciFunction`](numagpu_devices::bus::PciFunction).
//!
//! One [`Server`] serves one function on one UNIX socket to one client at a time. Its parts, from the socket
//! inwards:
//!
//! - [`listener`]: the socket that clients come through, made here or handed over.
//! - [`server`]: its threads, who may connect and when, shutdown.
//! - [`framing`]: bytes and file descriptors of the stream become messages, however the stream is cut.
//! - [`polling`]: whether a session looks for messages before it sleeps.
//! - [`wire`]: messages become validated requests, results become replies. Pure.
//! - [`refusal`]: why a request is not carried out, and its error number.
//! - [`session`]: one connection's life: version first and once, then any request in order.
//! - [`device`]: what each request does to the function.
//! - [`regions`]: which accesses a function's regions take, and what of them a client may map.
//! - [`dma`]: guest memory that the client mapped, as the function's `DmaPort`.
//! - [`dma::dirty`]: which pages the device wrote; [`migration`]: its state on the way to another process.
//! - [`version`]: negotiation of version and capabilities.
//! - [`client`]: what goes to the client: replies, and `DMA_READ` and `DMA_WRITE`.
//! - `channel`, `twin`: a socket as it is written to; a second one for the server's commands.
//! - `io_fds`, `kicks`: event descriptors that a client's kernel signals in place of writes.
//! - [`irq`]: the client's event descriptors, as the function's `InterruptSink`.
//!
//! Not here: ioregionfds, which no kernel has.
//!
//! "The specification" in this module is QEMU's `docs/interop/vfio-user.rst`, protocol 0.0.

mod bounce;
mod channel;
pub mod client;
pub mod device;
pub mod dma;
mod features;
pub mod framing;
mod io_fds;
pub mod irq;
pub mod listener;
pub mod migration;
pub mod polling;
mod pump;
pub mod refusal;
pub mod regions;
pub mod server;
pub mod session;
mod twin;
pub mod version;
pub mod wire;

pub use listener::{HandedError, Listener};
pub use polling::Polling;
pub use server::{Policy, SecondClient, Server, ServerError, Stopper};

/// Most data bytes of one region access (`max_data_xfer_size`), which is the specification's default.
pub const MAX_TRANSFER: usize = 1 << 20;

/// Most file descriptors taken with one message. QEMU and Cloud Hypervisor send up to 16 whatever was
/// negotiated.
pub const MAX_FDS: usize = 16;

/// Most DMA maps at a time (`max_dma_maps`), which is the specification's default.
pub const MAX_DMA_MAPS: usize = 65_535;

/// What a server takes of a client, who is told (specification, "Version").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most data bytes of one access (`max_data_xfer_size`), at most [`MAX_TRANSFER`].
    pub max_transfer: usize,
    /// Most DMA maps at a time (`max_dma_maps`), at most [`MAX_DMA_MAPS`].
    pub max_dma_maps: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_transfer: MAX_TRANSFER,
            max_dma_maps: MAX_DMA_MAPS,
        }
    }
}

impl Limits {
    /// What can be kept of them.
    fn bounded(self) -> Self {
        Self {
            max_transfer: self.max_transfer.min(MAX_TRANSFER),
            max_dma_maps: self.max_dma_maps.min(MAX_DMA_MAPS),
        }
    }
}

/// Page sizes of DMA maps, or'ed together (`pgsizes`).
pub const PAGE_SIZES: u64 = 4096;

/// Longest message taken, header included: the largest region write, and as much again as any other
/// command's fixed part needs.
pub const MAX_MESSAGE: usize = MAX_TRANSFER + 4096;

const _: () = assert!(MAX_MESSAGE <= u32::MAX as usize && usize::BITS >= 64);
