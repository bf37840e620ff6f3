//! A guest under QEMU, started as `numagpu run` starts it, whose GPUs this process serves.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use numagpu_benches::place::Place;
use numagpu_topology::linux::BootPath;
use numagpu_topology::qemu::{self, Host};
use numagpu_topology::seen::{Message, Report, SEPARATOR};
use numagpu_topology::{Plan, parse, plan};
use numagpu_vmm_glue::assets::Assets;
use numagpu_vmm_glue::emulator::accelerator;
use numagpu_vmm_glue::instance::Instance;
use numagpu_vmm_glue::sys::child::spawn_tied;
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

/// Time units of `/proc/PID/stat` in a second (`USER_HZ`, proc_pid_stat(5)), which x86 never changed.
const TICKS: u64 = 100;

/// What of its machine a guest has.
#[derive(Clone, Copy, Debug)]
pub enum With {
    /// All of it.
    Gpus,
    /// All but the GPUs, the bridges in front of them, and the Generic Initiators that they are. The HBM is there: the same
    /// soft-reserved memory at the same addresses, with the same nodes, distances and dax devices.
    MemoryOnly,
}

/// A guest that runs, until it is dropped.
pub struct Guest {
    qemu: Child,
    started: Instant,
    cpu_time: Duration,
    said: BufReader<UnixStream>,
    _instance: Instance,
    dir: TempDir,
}

/// The plan of a description.
pub fn planned(name: &str, description: &str) -> Plan {
    plan(&parse(name, description).unwrap()).unwrap()
}

/// CPU time of this process.
fn own_cpu_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap()
}

/// An option of QEMU that gives the machine a GPU, by its value.
fn is_of_a_gpu(value: &str) -> bool {
    let kinds = ["pxb-pcie,", "pcie-root-port,", "acpi-generic-initiator,"];
    kinds.iter().any(|kind| value.starts_with(kind)) || value.contains("\"vfio-user-pci\"")
}

impl Guest {
    /// Starts QEMU where clients run, and the GPUs where servers do. `append` is for the kernel's command line.
    pub fn start(plan: &Plan, with: With, place: Place, append: &str) -> Guest {
        let program = std::env::current_exe().unwrap();
        let assets = Assets::find_dir(&program).map(|dir| Assets::load(&dir).unwrap());
        let assets = assets.expect("no guest assets: run `cargo xtask guest`");
        let kernel = assets.kernel("6.12").or(assets.kernels.first()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let cpu_time = own_cpu_time();
        let instance = place.serve(|| Instance::start(plan, dir.path(), None, None).unwrap());

        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        let host = Host {
            boot: BootPath::Ovmf,
            accel: accelerator().to_owned(),
            firmware: assets.ovmf.combined.as_deref().map(text),
            kernel: text(&kernel.vmlinuz),
            initrd: Some(text(&kernel.initrd)),
            append: format!("console=ttyS0 panic=-1 {append}"),
            hbm: instance
                .hbm_paths_for_child()
                .iter()
                .map(|path| text(path))
                .collect(),
            sockets: instance.sockets().map(text).collect(),
            console: Some(text(&dir.path().join("console"))),
            ..Host::default()
        };
        let (ours, guests) = UnixStream::pair().unwrap();
        let mut arguments = Vec::new();
        for argument in qemu::arguments(plan, &host).unwrap() {
            match with {
                // The option's name is the word before.
                With::MemoryOnly if is_of_a_gpu(&argument) => drop(arguments.pop()),
                With::MemoryOnly | With::Gpus => arguments.push(argument),
            }
        }
        let report = format!("socket,id=report,fd={}", guests.as_raw_fd());
        arguments.extend(["-chardev", &report, "-serial", "chardev:report"].map(String::from));

        let log = File::create(dir.path().join("qemu.log")).unwrap();
        let mut command = Command::new(&assets.qemu.path);
        command.args(arguments).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let mut inherited = instance.hbm_fds();
        inherited.push(guests.as_fd());
        let started = Instant::now();
        let qemu = spawn_tied(command, &inherited).unwrap();
        Guest {
            qemu,
            started,
            cpu_time,
            said: BufReader::new(ours),
            _instance: instance,
            dir,
        }
    }

    /// The next message of the agent. Firmware writes its console to the same port.
    fn hear(&mut self) -> Message {
        loop {
            let mut line = Vec::new();
            if self.said.read_until(b'\n', &mut line).unwrap() == 0 {
                let log = fs::read_to_string(self.dir.path().join("qemu.log")).unwrap();
                panic!("QEMU ended before the guest had said all: {log}");
            }
            if let Some(at) = line.iter().rposition(|byte| *byte == SEPARATOR) {
                return serde_json::from_slice(line.split_at(at + 1).1).unwrap();
            }
        }
    }

    /// Waits until Linux has started the agent, the first program. Gives the time since QEMU's start, and the CPU time that
    /// QEMU and the GPUs' threads have had, in ns.
    pub fn up(&mut self) -> [u64; 2] {
        self.hear();
        let wall = self.started.elapsed();
        let cpu_time = self.qemu_cpu_time() + own_cpu_time() - self.cpu_time;
        [wall, cpu_time].map(|time| u64::try_from(time.as_nanos()).unwrap())
    }

    /// Waits for all that the agent has to report.
    pub fn report(&mut self) -> Report {
        loop {
            if let Message::Report(report) = self.hear() {
                return *report;
            }
        }
    }

    /// CPU time of QEMU in both modes (`proc_pid_stat`(5), fields 14 and 15).
    fn qemu_cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.qemu.id())).unwrap();
        // The program's name, field 2, may have blanks in it.
        let (_, rest) = stat.rsplit_once(')').unwrap();
        let modes = rest.split_whitespace().skip(11).take(2);
        let ticks: u64 = modes.map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 1000 / TICKS)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }
}
