//! A machine's GPUs, their HBM and their sockets: what a VMM connects to.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use numagpu_devices::bus::HbmStore;
use numagpu_devices::{Fabric, Gpu, GpuConfig, GpuError, GpuStatus, LinkConfig, PartitionConfig};
use numagpu_topology::Plan;
use thiserror::Error;

use crate::hbm::{HbmBacking, HbmError};
use crate::vfio_user::{Server, ServerError};

/// Why a machine's GPUs cannot be served.
#[derive(Debug, Error)]
pub enum InstanceError {
    /// No memory for the HBM.
    #[error(transparent)]
    Hbm(#[from] HbmError),
    /// The plan describes a GPU that the model cannot be.
    #[error("{gpu}: {source}")]
    Gpu {
        /// Its id.
        gpu: String,
        /// What the model says.
        source: GpuError,
    },
    /// No socket.
    #[error(transparent)]
    Server(#[from] ServerError),
}

/// GPUs that wait for a VMM, one socket each.
pub struct Instance {
    // Dropped first: a server uses its GPU, and a GPU its HBM.
    servers: Vec<Server>,
    gpus: Vec<Arc<Gpu>>,
    hbm: Vec<Arc<HbmBacking>>,
}

impl Instance {
    /// Makes the HBM of all partitions, in memory files or in `hbm_dir`, and serves each GPU on a socket of its own in
    /// `socket_dir`. Clients can connect when this returns.
    ///
    /// # Errors
    /// [`InstanceError`]; nothing is left behind then.
    pub fn start(
        plan: &Plan,
        socket_dir: &Path,
        hbm_dir: Option<&Path>,
    ) -> Result<Instance, InstanceError> {
        let fabric = Fabric::new();
        let mut instance = Instance {
            servers: Vec::new(),
            gpus: Vec::new(),
            hbm: Vec::new(),
        };
        for gpu in &plan.gpus {
            let mut partitions = Vec::new();
            for (index, hbm) in gpu.hbm.iter().enumerate() {
                let name = Plan::hbm_file(gpu, index);
                let store = Arc::new(match hbm_dir {
                    Some(dir) => HbmBacking::in_dir(dir, &name, hbm.size)?,
                    None => HbmBacking::memfd(&name, hbm.size)?,
                });
                instance.hbm.push(Arc::clone(&store));
                let store: Arc<dyn HbmStore> = store;
                partitions.push(PartitionConfig {
                    base: hbm.base,
                    size: hbm.size,
                    pxm: Some(hbm.pxm),
                    store,
                });
            }
            let links = gpu.links.iter().map(|link| LinkConfig {
                peer: link.peer_hive_node,
                width: link.count,
                bandwidth_mbs: link.bandwidth_mbs,
                latency_ns: link.latency_ns,
            });
            let config = GpuConfig {
                hive_id: gpu.hive_id,
                node_id: gpu.hive_node,
                hive_size: gpu.hive_size,
                cpu_pxm: gpu.cpu_pxm,
                links: links.collect(),
                ..GpuConfig::new(gpu.index, partitions)
            };
            let model =
                Gpu::new(config, Arc::clone(&fabric)).map_err(|source| InstanceError::Gpu {
                    gpu: gpu.id.clone(),
                    source,
                })?;
            instance.gpus.push(model);
        }
        for (gpu, model) in plan.gpus.iter().zip(&instance.gpus) {
            let socket = socket_dir.join(Plan::socket_file(gpu));
            let function: Arc<dyn numagpu_devices::bus::PciFunction> = Arc::<Gpu>::clone(model);
            instance.servers.push(Server::bind(socket, function)?);
        }
        Ok(instance)
    }

    /// The sockets, in order of GPUs.
    pub fn sockets(&self) -> impl Iterator<Item = &Path> {
        self.servers.iter().map(Server::path)
    }

    /// What each GPU says of itself.
    pub fn status(&self) -> Vec<GpuStatus> {
        self.gpus.iter().map(|gpu| gpu.status()).collect()
    }

    /// Descriptors of the HBM that has no file name, in order of GPUs and partitions.
    ///
    /// A child that inherited the descriptor of a named file would hold its lock too, and, while it dies of this
    /// process's death, keep the next one out.
    pub fn hbm_fds(&self) -> Vec<BorrowedFd<'_>> {
        let unnamed = self.hbm.iter().filter(|hbm| hbm.path().is_none());
        unnamed.map(|hbm| hbm.as_fd()).collect()
    }

    /// Paths by which a child that inherits [`Instance::hbm_fds`] opens the HBM, in order of GPUs and partitions.
    pub fn hbm_paths_for_child(&self) -> Vec<PathBuf> {
        let path = |hbm: &Arc<HbmBacking>| {
            hbm.path().map_or_else(
                || format!("/proc/self/fd/{}", hbm.as_fd().as_raw_fd()).into(),
                Path::to_owned,
            )
        };
        self.hbm.iter().map(path).collect()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.servers.clear();
        self.gpus.clear();
        // A GPU's threads may hold the memory a moment longer, and the process end before they let go.
        self.hbm.iter().for_each(|hbm| hbm.remove_name());
    }
}
