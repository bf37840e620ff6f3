//! The main job: serves a machine's GPUs, boots a guest with exactly that machine, and hears what it saw.

mod guest;
mod report;

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use numagpu_devices::spec::pci;
use numagpu_topology::qemu::{Host, QemuError};
use numagpu_topology::seen::{Pattern, Report};
use numagpu_topology::{Plan, linux::BootPath, qemu};
use thiserror::Error;

pub use guest::Interrupt;

use crate::emulator::{self, EmulatorError};
use crate::instance::{self, Instance, InstanceError};
use crate::qmp::QmpError;
use crate::run_dir::{RunDir, RunDirError};
use crate::scenario::Scenario;

/// What to boot, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The emulator.
    pub qemu: PathBuf,
    /// How the guest learns of its HBM.
    pub boot: BootPath,
    /// Firmware image; QEMU's own SeaBIOS if none.
    pub firmware: Option<PathBuf>,
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Further kernel arguments.
    pub append: String,
    /// Accelerator; chosen if none.
    pub accel: Option<String>,
    /// Directory for HBM files; memory files without a name if none.
    pub hbm_dir: Option<PathBuf>,
    /// Faults that come by themselves.
    pub scenario: Option<Scenario>,
    /// Further arguments of QEMU.
    pub qemu_arguments: Vec<String>,
    /// Whether the guest runs the agent, which reports. Otherwise the guest's console is the terminal.
    pub agent: bool,
    /// File that keeps the guest's console.
    pub console: Option<PathBuf>,
    /// How long the guest may take from start to report.
    pub timeout: Duration,
}

/// Why a run came to nothing.
#[derive(Debug, Error)]
pub enum RunError {
    /// The QEMU cannot be used.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    /// QEMU or firmware cannot carry the machine.
    #[error(transparent)]
    Machine(#[from] QemuError),
    /// A file is not there.
    #[error("no {what}: {path}: {source}; run `cargo xtask guest`, or give {option} PATH")]
    File {
        /// Kernel, initrd or firmware.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
        /// Option that names another.
        option: &'static str,
    },
    /// No directory for sockets.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The GPUs cannot be served.
    #[error(transparent)]
    Instance(#[from] InstanceError),
    /// The host refused something.
    #[error("{doing}: {source}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// The monitor failed.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU ended before the guest had reported.
    #[error("QEMU ended ({status}) before the guest reported{tail}")]
    Ended {
        /// How it ended.
        status: String,
        /// What QEMU and the guest said last.
        tail: String,
    },
    /// The guest said nothing in time.
    #[error("no report from the guest after {seconds} s{tail}")]
    Timeout {
        /// How long it had.
        seconds: u64,
        /// What QEMU and the guest said last.
        tail: String,
    },
    /// The guest sent something that is no report.
    #[error("the guest's report is not understood: {what}")]
    Report {
        /// What is wrong with it.
        what: String,
    },
    /// A signal stopped the run.
    #[error("interrupted by {}", signal_hook::low_level::signal_name(*.signal).unwrap_or("a signal"))]
    Interrupted {
        /// Which.
        signal: i32,
    },
}

/// What a caller hears while a run goes on.
pub trait Watch {
    /// Something was reached.
    fn progress(&mut self, text: &str);
    /// Something is not as it should be, but the run goes on.
    fn warning(&mut self, text: &str);
    /// The guest's driver holds its HBM, with these patterns in it; called while it does. Gives patterns that were
    /// written into the HBM and that the guest shall find.
    fn held(&mut self, patterns: &[Pattern]) -> Vec<Pattern> {
        let _ = patterns;
        Vec::new()
    }
}

/// The host's side of a command line for this run.
fn host(plan: &Plan, options: &Options) -> Host {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let mut append = Vec::new();
    if !options.append.contains("console=") {
        append.push("console=ttyS0".to_owned());
    }
    // A guest that nobody looks at ends when its kernel panics.
    append.extend(options.agent.then(|| "panic=-1".to_owned()));
    // The agent looks for the usual ids unless it is told of others.
    let ids = instance::ids(&plan.device);
    let told = options.agent && (ids.vendor, ids.device) != (pci::VENDOR_ID, pci::DEVICE_ID);
    append.extend(told.then(|| format!("numagpu.ids={:04x}:{:04x}", ids.vendor, ids.device)));
    append.extend((!options.append.is_empty()).then(|| options.append.clone()));
    Host {
        boot: options.boot,
        accel: options
            .accel
            .clone()
            .unwrap_or_else(|| emulator::accelerator().to_owned()),
        firmware: options.firmware.as_deref().map(text),
        kernel: text(&options.kernel),
        initrd: options.initrd.as_deref().map(text),
        append: append.join(" "),
        ..Host::default()
    }
}

/// The command line that [`run`] would use, with placeholders for what only a run has.
///
/// # Errors
/// [`RunError::Machine`].
pub fn command_line(plan: &Plan, options: &Options) -> Result<String, RunError> {
    let places = Host::placeholders(plan, options.boot, "SOCKET_DIR", "HBM_DIR");
    let host = Host {
        hbm: places.hbm,
        sockets: places.sockets,
        ..host(plan, options)
    };
    let mut arguments = qemu::arguments(plan, &host)?;
    arguments.extend(options.qemu_arguments.iter().cloned());
    Ok(qemu::shell(&options.qemu.to_string_lossy(), &arguments))
}

fn check_files(options: &Options) -> Result<(), RunError> {
    let files = [
        ("kernel", Some(&options.kernel), "--kernel"),
        ("initrd", options.initrd.as_ref(), "--initrd"),
        ("firmware", options.firmware.as_ref(), "--firmware"),
    ];
    for (what, path, option) in files {
        let Some(path) = path else { continue };
        let failed = |source| RunError::File {
            what,
            path: path.clone(),
            source,
            option,
        };
        let kind = std::fs::File::open(path)
            .and_then(|file| file.metadata())
            .map_err(failed)?
            .file_type();
        if kind.is_dir() || kind.is_socket() {
            return Err(failed(io::Error::other("is not a file")));
        }
    }
    Ok(())
}

/// Boots the machine and waits for what the guest saw, or, without the agent, for the guest's end.
///
/// Must be called from a thread that lives as long as the run: QEMU dies with it.
///
/// # Errors
/// [`RunError`]. Whatever comes, QEMU is gone and nothing is left behind when this returns.
pub fn run(
    plan: &Plan,
    options: &Options,
    interrupt: &Interrupt,
    watch: &mut dyn Watch,
) -> Result<Option<Report>, RunError> {
    let mut host = host(plan, options);
    // What can be known to fail is said before anything is started.
    let count = (plan.hbm().count(), plan.gpus.len());
    let dry = Host {
        hbm: vec![String::new(); count.0],
        sockets: vec![String::new(); count.1],
        ..host.clone()
    };
    qemu::arguments(plan, &dry)?;
    check_files(options)?;
    emulator::check_qemu(&options.qemu)?;
    qemu::warnings(plan)
        .iter()
        .for_each(|warning| watch.warning(warning));

    let run_dir = RunDir::create()?;
    let instance = Instance::start(
        plan,
        run_dir.path(),
        options.hbm_dir.as_deref(),
        options.scenario.as_ref(),
    )?;
    let hbm: u64 = plan.hbm().map(|hbm| hbm.size).sum();
    watch.progress(&format!(
        "{} GPU(s) served, {} of HBM",
        plan.gpus.len(),
        numagpu_topology::size::Size(hbm)
    ));
    let text = |path: &Path| path.to_string_lossy().into_owned();
    host.hbm = instance
        .hbm_paths_for_child()
        .iter()
        .map(|path| text(path))
        .collect();
    host.sockets = instance.sockets().map(text).collect();
    let result = guest::boot(
        plan,
        options,
        host,
        &instance,
        run_dir.path(),
        interrupt,
        watch,
    );
    drop(instance);
    drop(run_dir);
    result
}
