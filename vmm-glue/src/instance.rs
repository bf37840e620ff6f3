//! A machine's GPUs, their HBM and their sockets: what a VMM connects to.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use numagpu_devices::bus::HbmStore;
use numagpu_devices::ownership::OnDisconnect;
use numagpu_devices::spec::pci::BAR_DOORBELLS_SIZE;
use numagpu_devices::spec::regs::TimingMode;
use numagpu_devices::{
    ApertureConfig, Fabric, Gpu, GpuConfig, GpuError, GpuStatus, LinkConfig, PartitionConfig,
    PciIds,
};
use numagpu_topology::device::{Device, Timing};
use numagpu_topology::machine::{BackingKind, Exposure};
use numagpu_topology::plan::Gpu as PlannedGpu;
use numagpu_topology::{MachineError, Plan};
use thiserror::Error;

use crate::control::server::Bounds;
use crate::control::{self, Control, Desk};
use crate::hbm::{HbmBacking, HbmError};
use crate::sandbox::Sandbox;
use crate::scenario::{Runner, Scenario};
use crate::vfio_user::{
    Limits, Listener, Policy, Polling, SecondClient, Server, ServerError, Stopper,
};

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
    /// Files are wanted, and nobody says where.
    #[error("backing.kind is `file`: give backing.directory in the description, or --hbm-dir")]
    NoDirectory,
    /// No socket.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The scenario does not fit the machine.
    #[error(transparent)]
    Scenario(#[from] MachineError),
    /// The scenario cannot be played.
    #[error("cannot play the scenario: {0}")]
    Player(std::io::Error),
}

/// `config` with what the description says of the PCI functions.
fn device(described: &Device, config: GpuConfig) -> GpuConfig {
    let usual = config.ids;
    let vendor = described.vendor.as_ref();
    let vendor = vendor.map_or(usual.vendor, |it| *it.get_ref());
    let device = described.device.unwrap_or(usual.device);
    let class = described.class.as_ref();
    let queues = described.queues.as_ref();
    let boot = described.boot_us.map(u64::from);
    GpuConfig {
        ids: PciIds {
            vendor,
            device,
            subsystem_vendor: described.subsystem_vendor.unwrap_or(vendor),
            subsystem: described.subsystem.unwrap_or(device),
            class: class.map_or(usual.class, |it| *it.get_ref()),
            revision: described.revision.unwrap_or(usual.revision),
        },
        queues: queues.map_or(config.queues, |it| *it.get_ref()),
        boot_delay: boot.map_or(config.boot_delay, Duration::from_micros),
        ..config
    }
}

/// Ids of the PCI functions that a description asks for.
pub(crate) fn ids(described: &Device) -> PciIds {
    device(described, GpuConfig::new(0, Vec::new())).ids
}

/// Copy queues of each GPU that a description asks for.
pub(crate) fn queues(described: &Device) -> u32 {
    device(described, GpuConfig::new(0, Vec::new())).queues
}

fn timing(described: Timing) -> TimingMode {
    match described {
        Timing::Off => TimingMode::Off,
        Timing::Modelled => TimingMode::Modelled,
        Timing::Paced => TimingMode::Paced,
    }
}

/// GPUs that wait for a VMM, one socket each.
pub struct Instance {
    // In the order in which they are dropped: whoever injects goes before the GPUs; a server uses its GPU.
    control: Option<Control>,
    runner: Option<Runner>,
    servers: Vec<Server>,
    gpus: Gpus,
}

/// A machine's GPUs and their HBM, for a VMM in this process to plug in (see [`crate::kvm`]).
pub struct Gpus {
    // A GPU uses its HBM.
    gpus: Vec<Arc<Gpu>>,
    hbm: Vec<HbmFile>,
}

/// One file of HBM.
struct HbmFile {
    /// What it is called if it has a file name, or would be.
    name: String,
    memory: Arc<HbmBacking>,
    /// Where it is, if the VMM makes memory of the machine of it; if not, the VMM gets it from the GPU's socket.
    base: Option<u64>,
}

/// A GPU's HBM as its plan has it.
struct Exposed {
    /// How CPUs reach it.
    exposure: Exposure,
    /// First address, bytes and proximity domain of each partition. With [`Exposure::Ram`], where the RAM is that the
    /// GPU works in.
    hbm: Vec<(u64, u64, Option<u32>)>,
    /// Bytes of the BAR, with [`Exposure::Bar`] and [`Exposure::Private`].
    aperture: Option<u64>,
}

/// File name of the memory behind a GPU's aperture.
fn aperture_file(gpu: &PlannedGpu) -> String {
    format!("{}-aperture.hbm", gpu.id)
}

/// What a GPU's HBM is made of.
struct Memory {
    partitions: Vec<PartitionConfig>,
    aperture: Option<ApertureConfig>,
    files: Vec<HbmFile>,
}

impl Exposed {
    /// Makes the HBM of `gpu`, each file of it by `make` from a name and a size: one for each partition that is
    /// memory of the machine, or one behind the whole aperture.
    fn make(
        &self,
        gpu: &PlannedGpu,
        make: impl Fn(&str, u64) -> Result<HbmBacking, HbmError>,
    ) -> Result<Memory, HbmError> {
        let mut files = Vec::new();
        let mut file = |name: String, size, base| {
            let memory = Arc::new(make(&name, size)?);
            files.push(HbmFile {
                name,
                memory: Arc::clone(&memory),
                base,
            });
            Ok::<_, HbmError>(memory)
        };
        let mut stores: Vec<Arc<dyn HbmStore>> = Vec::new();
        match self.exposure {
            Exposure::Ram => {}
            Exposure::Spm => {
                for (index, (base, size, _)) in self.hbm.iter().enumerate() {
                    stores.push(file(Plan::hbm_file(gpu, index), *size, Some(*base))?);
                }
            }
            Exposure::Bar | Exposure::Private => {
                let sizes: Vec<u64> = self.hbm.iter().map(|(_, size, _)| *size).collect();
                let all = sizes
                    .iter()
                    .fold(0, |all, size| u64::saturating_add(all, *size));
                let whole = file(aperture_file(gpu), all, None)?;
                let parts = whole.split(&sizes)?;
                stores.extend(parts.into_iter().map(|part| Arc::new(part) as _));
            }
        }
        let partitions = self.hbm.iter().zip(stores);
        let partitions = partitions.map(|(&(base, size, pxm), store)| PartitionConfig {
            base,
            size,
            pxm,
            store,
        });
        Ok(Memory {
            partitions: partitions.collect(),
            aperture: self.aperture.map(|size| ApertureConfig {
                size,
                coherent: self.exposure == Exposure::Bar,
            }),
            files,
        })
    }
}

impl Gpus {
    /// Makes the HBM of all GPUs as the plan's backing says, or in `hbm_dir` if that is given, and the GPUs. None of them
    /// has a thread before it is attached.
    ///
    /// # Errors
    /// [`InstanceError`]; nothing is left behind then.
    pub fn new(
        plan: &Plan,
        hbm_dir: Option<&Path>,
        on_disconnect: OnDisconnect,
    ) -> Result<Gpus, InstanceError> {
        let fabric = Fabric::new();
        let mut made = Gpus {
            gpus: Vec::new(),
            hbm: Vec::new(),
        };
        let backing = &plan.backing;
        let described = backing.directory.as_ref().map(PathBuf::from);
        let place = hbm_dir.map(Path::to_owned).or(described);
        if place.is_none() && backing.kind == BackingKind::File {
            return Err(InstanceError::NoDirectory);
        }
        for gpu in &plan.gpus {
            let partitions = gpu.hbm.iter();
            let exposed = Exposed {
                exposure: gpu.exposure,
                hbm: partitions
                    .map(|hbm| (hbm.base, hbm.size, hbm.pxm))
                    .collect(),
                aperture: gpu.aperture.map(|aperture| aperture.size),
            };
            let memory = exposed.make(gpu, |name, size| match (&place, backing.kind) {
                (Some(dir), _) => HbmBacking::in_dir(dir, name, size),
                (None, BackingKind::Hugetlb) => HbmBacking::hugetlb(name, size, backing.page),
                (None, _) => HbmBacking::memfd(name, size),
            })?;
            made.hbm.extend(memory.files);
            let links = gpu.links.iter().map(|link| LinkConfig {
                peer: link.peer_hive_node,
                width: link.count,
                bandwidth_mbs: link.bandwidth_mbs,
                latency_ns: link.latency_ns,
            });
            let doorbells = match memory.aperture {
                // Where one BAR is mapped, QEMU waits for the answer to each write to the others.
                Some(_) => {
                    let page = Arc::new(HbmBacking::memfd("doorbells", BAR_DOORBELLS_SIZE)?);
                    let mut lent = page.split(&[BAR_DOORBELLS_SIZE])?;
                    lent.pop().map(|page| Arc::new(page) as _)
                }
                None => None,
            };
            let config = GpuConfig {
                doorbells,
                hive_id: gpu.hive_id,
                node_id: gpu.hive_node,
                hive_size: gpu.hive_size,
                cpu_pxm: gpu.cpu_pxm,
                links: links.collect(),
                aperture: memory.aperture,
                on_disconnect,
                timing: timing(plan.device.timing),
                hbm_bandwidth_mbs: gpu.hbm_bandwidth_mbs,
                hbm_latency_ns: gpu.hbm_latency_ns,
                ..device(&plan.device, GpuConfig::new(gpu.index, memory.partitions))
            };
            let model =
                Gpu::new(config, Arc::clone(&fabric)).map_err(|source| InstanceError::Gpu {
                    gpu: gpu.id.clone(),
                    source,
                })?;
            made.gpus.push(model);
        }
        Ok(made)
    }

    /// The GPUs, in the order of the plan.
    #[must_use]
    pub fn gpus(&self) -> &[Arc<Gpu>] {
        &self.gpus
    }

    /// The HBM that is memory of the machine, with its first guest-physical address, in order of GPUs and partitions.
    pub fn memory(&self) -> impl Iterator<Item = (u64, &Arc<HbmBacking>)> {
        let hbm = self.hbm.iter();
        hbm.filter_map(|hbm| Some((hbm.base?, &hbm.memory)))
    }
}

impl Drop for Gpus {
    fn drop(&mut self) {
        self.gpus.clear();
        // A GPU's threads may hold the memory a moment longer, and the process end before they let go.
        self.hbm.iter().for_each(|hbm| hbm.memory.remove_name());
    }
}

/// How a machine's GPUs are served.
#[derive(Debug, Default)]
pub struct Serving<'a> {
    /// Directory for HBM files, instead of what the plan's backing says.
    pub hbm_dir: Option<&'a Path>,
    /// Faults that come by themselves.
    pub scenario: Option<&'a Scenario>,
    /// Sockets that were handed to this process, by index of the GPU.
    pub handed: BTreeMap<usize, Listener>,
    /// What becomes of a client that comes while another is served.
    pub second_client: SecondClient,
    /// What becomes of HBM when a client goes.
    pub on_disconnect: OnDisconnect,
    /// Whether sessions look for messages before they sleep.
    pub polling: Polling,
}

/// GPUs with their HBM and sockets, all open; nobody is served yet, and no thread runs.
pub struct Prepared<'a> {
    instance: Instance,
    plan: &'a Plan,
    scenario: Option<&'a Scenario>,
    policy: Policy,
    listeners: Vec<Listener>,
    control: Listener,
}

impl<'a> Prepared<'a> {
    /// Makes the HBM of all GPUs, a socket for each in `socket_dir` unless one was handed over, and
    /// [`control::SOCKET`] beside them. Clients that connect from now on wait until they are served.
    ///
    /// # Errors
    /// [`InstanceError`]; nothing is left behind then.
    pub fn new(
        plan: &'a Plan,
        socket_dir: &Path,
        mut serving: Serving<'a>,
    ) -> Result<Prepared<'a>, InstanceError> {
        let scenario = serving.scenario;
        scenario.map_or(Ok(()), |scenario| scenario.check(plan))?;
        let instance = Instance {
            control: None,
            runner: None,
            servers: Vec::new(),
            gpus: Gpus::new(plan, serving.hbm_dir, serving.on_disconnect)?,
        };
        let mut listeners = Vec::new();
        for (index, gpu) in plan.gpus.iter().enumerate() {
            listeners.push(match serving.handed.remove(&index) {
                Some(handed) => handed,
                None => Listener::bind(socket_dir.join(Plan::socket_file(gpu)))?,
            });
        }
        Ok(Prepared {
            instance,
            plan,
            scenario,
            policy: Policy {
                second_client: serving.second_client,
                polling: serving.polling,
                limits: Limits::default(),
            },
            listeners,
            control: Listener::bind(socket_dir.join(control::SOCKET))?,
        })
    }

    /// The HBM.
    #[must_use]
    pub fn instance(&self) -> &Instance {
        &self.instance
    }

    /// Begins to serve, and to play the scenario. `sandbox` is what this process is in, for the status.
    ///
    /// # Errors
    /// [`InstanceError`]; nothing is left behind then.
    pub fn start(self, sandbox: &Sandbox) -> Result<Instance, InstanceError> {
        let Prepared {
            mut instance,
            plan,
            scenario,
            policy,
            listeners,
            control,
        } = self;
        for (model, listener) in instance.gpus.gpus().iter().zip(listeners) {
            let function: Arc<dyn numagpu_devices::bus::PciFunction> = Arc::<Gpu>::clone(model);
            let server = Server::start(listener, function, policy)?;
            instance.servers.push(server);
        }
        instance.take_orders(plan, control, scenario, sandbox)?;
        Ok(instance)
    }
}

impl Instance {
    /// Makes the HBM of all GPUs as the plan's backing says, or in `hbm_dir` if that is given, and serves each GPU on a socket of its own in
    /// `socket_dir`, and [`control::SOCKET`] beside them. Clients can connect when this returns. `scenario` is played from
    /// then on.
    ///
    /// # Errors
    /// [`InstanceError`]; nothing is left behind then.
    pub fn start(
        plan: &Plan,
        socket_dir: &Path,
        hbm_dir: Option<&Path>,
        scenario: Option<&Scenario>,
    ) -> Result<Instance, InstanceError> {
        let serving = Serving {
            hbm_dir,
            scenario,
            ..Serving::default()
        };
        Prepared::new(plan, socket_dir, serving)?.start(&Sandbox::NONE)
    }

    /// Answers on the control socket and begins to play the scenario.
    fn take_orders(
        &mut self,
        plan: &Plan,
        control: Listener,
        scenario: Option<&Scenario>,
        sandbox: &Sandbox,
    ) -> Result<(), InstanceError> {
        let names = plan.gpus.iter().map(|gpu| gpu.id.clone());
        let gpus = names.zip(self.gpus.gpus().iter().map(Arc::clone));
        let desk = Desk::new(&plan.name, gpus.collect()).in_sandbox(sandbox);
        let desk = Arc::new(desk);
        if let Some(scenario) = scenario {
            let runner = Runner::start(scenario, &desk).map_err(InstanceError::Player)?;
            self.runner = Some(runner);
        }
        let answer = Arc::new(move |request| desk.answer(request));
        self.control = Some(Control::start(control, answer, Bounds::default())?);
        Ok(())
    }

    /// Waits, in whatever thread, until no GPU lets a client in any more.
    pub fn end(&self) -> impl FnOnce() + Send + 'static {
        let servers: Vec<Stopper> = self.servers.iter().map(Server::stopper).collect();
        move || servers.iter().for_each(Stopper::wait)
    }

    /// The GPUs and their HBM.
    #[must_use]
    pub fn gpus(&self) -> &Gpus {
        &self.gpus
    }

    /// The sockets, in order of GPUs.
    pub fn sockets(&self) -> impl Iterator<Item = &Path> {
        self.servers.iter().map(Server::path)
    }

    /// What each GPU says of itself.
    pub fn status(&self) -> Vec<GpuStatus> {
        self.gpus.gpus().iter().map(|gpu| gpu.status()).collect()
    }

    /// Names and descriptors of all HBM that has no file name, in order of GPUs and partitions.
    pub fn unnamed_hbm(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        let unnamed = self
            .gpus
            .hbm
            .iter()
            .filter(|hbm| hbm.memory.path().is_none());
        unnamed.map(|hbm| (hbm.name.as_str(), hbm.memory.as_fd()))
    }

    /// Directories with HBM files, which are removed at the end; a directory may come several times.
    pub fn hbm_directories(&self) -> impl Iterator<Item = PathBuf> {
        let paths = self.gpus.hbm.iter().filter_map(|hbm| hbm.memory.path());
        paths.filter_map(|path| match path.parent() {
            // A relative name without a directory.
            Some(parent) if parent.as_os_str().is_empty() => Some(PathBuf::from(".")),
            parent => parent.map(Path::to_owned),
        })
    }

    /// Descriptors of the HBM that is memory of the machine and has no file name, in order of GPUs and partitions.
    ///
    /// A child that inherited the descriptor of a named file would hold its lock too, and, while it dies of this
    /// process's death, keep the next one out.
    pub fn hbm_fds(&self) -> Vec<BorrowedFd<'_>> {
        let memory = self.machine_memory().filter(|hbm| hbm.path().is_none());
        memory.map(|hbm| hbm.as_fd()).collect()
    }

    /// Paths by which a child that inherits [`Instance::hbm_fds`] opens the HBM that is memory of the machine, in
    /// order of GPUs and partitions.
    pub fn hbm_paths_for_child(&self) -> Vec<PathBuf> {
        let path = |hbm: &Arc<HbmBacking>| {
            hbm.path().map_or_else(
                || format!("/proc/self/fd/{}", hbm.as_fd().as_raw_fd()).into(),
                Path::to_owned,
            )
        };
        self.machine_memory().map(path).collect()
    }

    fn machine_memory(&self) -> impl Iterator<Item = &Arc<HbmBacking>> {
        self.gpus.memory().map(|(_, memory)| memory)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.control = None;
        self.runner = None;
        self.servers.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn planned() -> PlannedGpu {
        let preset = numagpu_topology::preset::find("two-gpu").unwrap();
        let machine = numagpu_topology::parse(preset.name, preset.source).unwrap();
        let plan = numagpu_topology::plan(&machine).unwrap();
        plan.gpus.into_iter().next().unwrap()
    }

    /// Names and sizes of the files, and the GPU's configuration.
    fn made(
        exposure: Exposure,
        aperture: Option<u64>,
    ) -> (Vec<(String, u64)>, Vec<HbmFile>, GpuConfig) {
        let exposed = Exposed {
            exposure,
            hbm: vec![(1 << 40, MIB, Some(7)), ((1 << 40) + MIB, 2 * MIB, None)],
            aperture,
        };
        let memory = exposed.make(&planned(), HbmBacking::memfd).unwrap();
        let sizes = memory
            .files
            .iter()
            .map(|file| (file.name.clone(), file.memory.size()))
            .collect();
        let config = GpuConfig {
            aperture: memory.aperture,
            ..GpuConfig::new(0, memory.partitions)
        };
        assert!(Gpu::new(config.clone(), Fabric::new()).is_ok());
        (sizes, memory.files, config)
    }

    #[test]
    fn what_the_description_says_of_the_device_is_what_it_is() {
        let text = "name = \"m\"\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n[[gpu]]\nhbm = \"1GiB\"\ncpu = 0\n\
            [device]\nvendor = 0x1002\ndevice = 0x74a0\nclass = 0x030200\nrevision = 2\nsubsystem = 7\n\
            queues = 8\nboot_us = 5\n";
        let plan = |text| numagpu_topology::plan(&numagpu_topology::parse("m", text).unwrap());
        let given = device(&plan(text).unwrap().device, GpuConfig::new(0, Vec::new()));
        let ids = PciIds {
            vendor: 0x1002,
            device: 0x74a0,
            subsystem_vendor: 0x1002,
            subsystem: 7,
            class: 0x03_0200,
            revision: 2,
        };
        assert_eq!((given.ids, given.queues), (ids, 8));
        assert_eq!(given.boot_delay, Duration::from_micros(5));
        let (plain, _) = text.split_once("[device]").unwrap();
        let usual = device(&plan(plain).unwrap().device, GpuConfig::new(0, Vec::new()));
        assert_eq!(usual.ids, PciIds::default());
        assert_eq!(usual.queues, GpuConfig::new(0, Vec::new()).queues);
    }

    #[test]
    fn memory_of_the_machine_has_a_file_for_each_partition() {
        let (sizes, files, config) = made(Exposure::Spm, None);
        let gpu = planned();
        let name = |index| Plan::hbm_file(&gpu, index);
        assert_eq!(sizes, [(name(0), MIB), (name(1), 2 * MIB)]);
        assert!(files.iter().all(|file| file.base.is_some()));
        let pxm: Vec<_> = config.partitions.iter().map(|it| it.pxm).collect();
        assert_eq!(pxm, [Some(7), None]);
        assert_eq!(config.aperture, None);
    }

    #[test]
    fn an_aperture_has_one_file_that_only_its_client_gets() {
        for (exposure, coherent) in [(Exposure::Bar, true), (Exposure::Private, false)] {
            let (sizes, files, config) = made(exposure, Some(4 * MIB));
            assert_eq!(sizes, [(aperture_file(&planned()), 3 * MIB)]);
            assert!(!files.iter().any(|file| file.base.is_some()));
            let size = 4 * MIB;
            assert_eq!(config.aperture, Some(ApertureConfig { size, coherent }));
            let backings = config.partitions.iter().map(|it| it.store.backing());
            let (id, _) = files.first().unwrap().memory.backing();
            assert!(backings.eq([(id, 0), (id, MIB)]));
        }
    }

    #[test]
    fn a_gpu_that_works_in_ram_has_no_memory() {
        let (sizes, _, config) = made(Exposure::Ram, None);
        assert!(sizes.is_empty() && config.partitions.is_empty());
    }
}
