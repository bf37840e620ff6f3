//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand, ValueEnum};
use numagpu_topology::linux::BootPath;
use numagpu_vmm_glue::control::Fault;

/// GPUs whose HBM is coherent memory of a virtual machine.
#[derive(Parser)]
#[command(name = "numagpu", version, propagate_version = true)]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// List the machines that come with numagpu, what real machine each matches, and how far.
    Presets,
    /// Show the plan of a machine.
    Plan(PlanArgs),
    /// Serve a machine's GPUs on vfio-user sockets, for a VMM of your own.
    Serve(ServeArgs),
    /// Boot a Linux guest with a machine's GPUs and show what it sees beside what was planned.
    Run(RunArgs),
    /// Test this build on this host, without QEMU: a client in this process drives a GPU over vfio-user, and where there is
    /// KVM, a guest of our own drives one that is plugged into its virtual machine.
    Selftest(SelftestArgs),
    /// Show what the GPUs of a running instance are doing.
    Status(StatusArgs),
    /// Make a fault happen in a running instance.
    Inject(InjectArgs),
    /// Print the JSON Schema of a machine description, for editors and programs that write one.
    Schema(SchemaArgs),
    /// Print a shell's completions.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

/// A kind of file.
#[derive(Clone, Copy, ValueEnum)]
pub enum FileKind {
    /// A machine description.
    Machine,
    /// A scenario, for `serve` and `run`.
    Scenario,
}

/// Arguments of `schema`.
#[derive(clap::Args)]
pub struct SchemaArgs {
    /// Of what.
    #[arg(value_enum, default_value = "machine")]
    pub of: FileKind,
}

/// Arguments of `selftest`.
#[derive(clap::Args)]
pub struct SelftestArgs {
    /// KVM's device.
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    pub kvm: PathBuf,
    /// Fail where there is no KVM, instead of skipping that part.
    #[arg(long)]
    pub require_kvm: bool,
}

/// Arguments of `status`.
#[derive(clap::Args)]
pub struct StatusArgs {
    /// Control socket, or the directory that has it; without it, the one running instance of this user.
    pub path: Option<PathBuf>,
    /// Print one JSON object with all there is.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `inject`.
#[derive(clap::Args)]
#[command(subcommand_value_name = "FAULT", subcommand_help_heading = "Faults")]
pub struct InjectArgs {
    /// Control socket, or the directory that has it; without it, the one running instance of this user.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Index of the GPU.
    pub gpu: u32,
    /// Which fault.
    #[command(subcommand)]
    pub fault: Fault,
}

/// Outputs of a plan.
#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    /// A picture for a terminal.
    Text,
    /// One JSON object.
    Json,
    /// The memory map.
    E820,
    /// ACPI tables: text as acpidump's, or with -o a file of bytes, or one file for each in an existing directory.
    Acpi,
    /// The memory map for Linux's boot protocol: text, or with -o a zero page, with entries beyond 128 as setup_data behind it.
    BootParams,
    /// The memory map as fw_cfg's etc/e820: hexadecimal, or with -o bytes.
    FwCfgE820,
    /// The memory map for the PVH entry point: hexadecimal, or with -o bytes.
    PvhMemmap,
    /// The memory map as EFI memory descriptors: hexadecimal, or with -o bytes.
    EfiMemmap,
    /// A QEMU command line.
    Qemu,
    /// A Cloud Hypervisor command line, or everything for which Cloud Hypervisor cannot carry the machine.
    CloudHypervisor,
    /// The kernel arguments that the guest needs.
    LinuxCmdline,
    /// One JSON object: what Linux will make of the machine, booted this way, and what is lost on the way.
    Prediction,
    /// A picture: memory map, nodes, GPUs, links, distances.
    Svg,
    /// A graph for Graphviz.
    Dot,
    /// hwloc 2 XML, for `lstopo -i`.
    Hwloc,
}

/// Firmware of the guest.
#[derive(Clone, Copy, ValueEnum)]
pub enum Boot {
    /// OVMF of edk2-stable202605 or newer, which announces HBM itself.
    Ovmf,
    /// SeaBIOS, with memmap= arguments that announce HBM.
    Seabios,
    /// qboot, which hands the memory map to the kernel as it is, but knows no PCI bridges.
    Qboot,
    /// A VMM that loads the kernel itself, with the plan's own memory map and ACPI tables.
    Direct,
}

impl Boot {
    /// As the planner has it.
    pub fn path(self) -> BootPath {
        match self {
            Boot::Ovmf => BootPath::Ovmf,
            Boot::Seabios => BootPath::SeaBios,
            Boot::Qboot => BootPath::Qboot,
            Boot::Direct => BootPath::Direct,
        }
    }
}

/// What the GPUs' time stamps mean.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Timing {
    /// The host's time
    Off,
    /// What the machine's bandwidths and latencies give
    Modelled,
    /// The same, and work takes that long
    Paced,
}

/// Which machine.
#[derive(clap::Args)]
pub struct MachineArgs {
    /// Preset or TOML file.
    pub machine: String,
    /// Make it small enough for a guest on an ordinary host: one CPU for each CPU node, at most 512 MiB of RAM for each node
    /// (1 GiB if there is only one). Nodes, distances, links and HBM that is not RAM stay.
    #[arg(long)]
    pub small: bool,
    /// What the GPUs' time stamps mean, instead of what the description says.
    #[arg(long, value_enum, value_name = "MODE")]
    pub timing: Option<Timing>,
}

/// Arguments of `plan`.
#[derive(clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// What to write.
    #[arg(long, value_enum, default_value = "text")]
    pub format: Format,
    /// How the guest is booted, for `text`, `qemu`, `linux-cmdline` and `prediction`.
    #[arg(long, value_enum, default_value = "ovmf")]
    pub boot: Boot,
    /// Directory of the sockets in `qemu` and `cloud-hypervisor`.
    #[arg(long, value_name = "DIR", default_value = "sockets")]
    pub socket_dir: String,
    /// Directory of the HBM files in `qemu`.
    #[arg(long, value_name = "DIR", default_value = "sockets")]
    pub hbm_dir: String,
    /// File to write to instead of the terminal.
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
}

/// What a running server gives up.
#[derive(Clone, Copy, ValueEnum)]
pub enum Sandbox {
    /// All that it does not need: system calls (seccomp), files and network (landlock), capabilities
    On,
    /// Nothing, but the kernel logs each system call that would be refused
    Log,
    /// Nothing
    Off,
}

/// What becomes of a client that comes while another is served.
#[derive(Clone, Copy, ValueEnum)]
pub enum SecondClient {
    /// Its connection is closed at once
    Refuse,
    /// It waits until the other has gone
    Queue,
}

/// What becomes of HBM when a client goes.
#[derive(Clone, Copy, ValueEnum)]
pub enum OnDisconnect {
    /// It is cleared: the next client finds zeros
    Scrub,
    /// It stays: the next client, whoever that is, reads what this one left, claimed or not
    Keep,
}

/// Whether the server looks for a client's next message before it sleeps.
#[derive(Clone, Copy, ValueEnum)]
pub enum Polling {
    /// It sleeps until one comes
    Off,
    /// It looks for up to 50 us while messages come soon after one another
    Auto,
    /// It looks for 1 ms after each
    Always,
}

/// A socket that `serve` was started with.
#[derive(Clone)]
pub struct Handed {
    /// Id of the GPU; with one GPU it may be left out.
    pub gpu: Option<String>,
    /// Number of the descriptor.
    pub fd: i32,
}

impl FromStr for Handed {
    type Err = String;

    fn from_str(text: &str) -> Result<Handed, String> {
        let (gpu, number) = match text.rsplit_once('=') {
            Some((gpu, number)) => (Some(gpu.to_owned()), number),
            None => (None, text),
        };
        match number.parse() {
            Ok(fd @ 3..) => Ok(Handed { gpu, fd }),
            Ok(fd) => Err(format!(
                "descriptor {fd} is below 3, the first that can be handed over"
            )),
            Err(error) => Err(format!("{number:?} is no number of a descriptor: {error}")),
        }
    }
}

/// Arguments of `serve`.
#[derive(clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Existing directory for one socket per GPU, named as in `plan --format qemu`, and the control socket. Without it,
    /// each GPU's socket has to be handed over by a service manager (LISTEN_FDS) or --fd.
    #[arg(long, value_name = "DIR")]
    pub socket_dir: Option<PathBuf>,
    /// Existing directory for HBM files; without it, HBM is memory without a file, and the socket directory gets links
    /// by which the VMM opens it.
    #[arg(long, value_name = "DIR")]
    pub hbm_dir: Option<PathBuf>,
    /// TOML file of faults that come by themselves.
    #[arg(long, value_name = "FILE")]
    pub scenario: Option<PathBuf>,
    /// UNIX stream socket that this process was started with, and the id of the GPU that is served there: one that
    /// listens, or one that is connected to the only client. Once for each such GPU; with one GPU its id may be left out.
    #[arg(long = "fd", value_name = "[GPU=]N")]
    pub handed: Vec<Handed>,
    /// What is given up once all sockets and files are open.
    #[arg(long, value_enum, value_name = "MODE", default_value = "on")]
    pub sandbox: Sandbox,
    /// What becomes of a client that comes while another is served.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "refuse")]
    pub second_client: SecondClient,
    /// What becomes of HBM when a client goes, or is killed. It has no owner then in either case.
    #[arg(long, value_enum, value_name = "POLICY", default_value = "scrub")]
    pub hbm_on_disconnect: OnDisconnect,
    /// Whether the server looks for a client's next message before it sleeps: answers come sooner, and a core is busy.
    #[arg(long, value_enum, value_name = "MODE", default_value = "off")]
    pub polling: Polling,
}

/// Arguments of `run`.
#[derive(clap::Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Exit with 1 unless the guest saw exactly what was planned.
    #[arg(long)]
    pub verify: bool,
    /// QEMU 11.1 or newer; by default the one of `cargo xtask guest`, else qemu-system-x86_64.
    #[arg(long, value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// Kernel image, or the name of one of `cargo xtask guest`, such as 6.12 or newest. With an image of your own the
    /// guest's console is the terminal and nothing is compared.
    #[arg(long, value_name = "PATH|NAME", default_value = "6.12")]
    pub kernel: String,
    /// Initial RAM disk, with a kernel of your own.
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Further kernel arguments.
    #[arg(
        long,
        value_name = "STR",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub append: String,
    /// `ovmf`, `seabios`, `qboot`, or the file of an OVMF of edk2-stable202605 or newer.
    #[arg(long, value_name = "ovmf|seabios|qboot|PATH", default_value = "ovmf")]
    pub firmware: String,
    /// Accelerator; by default kvm where a Linux guest runs under it, else tcg. `mttcg` is TCG with a thread for each
    /// CPU: faster where a guest keeps many CPUs busy, but a boot of Linux now and then ends in "Oops: int3".
    #[arg(long, value_name = "kvm|tcg|mttcg", value_parser = ["kvm", "tcg", "mttcg"])]
    pub accel: Option<String>,
    /// Existing directory for HBM files; without it, HBM is memory without a file.
    #[arg(long, value_name = "DIR")]
    pub hbm_dir: Option<PathBuf>,
    /// File that keeps the guest's console.
    #[arg(long, value_name = "PATH")]
    pub console: Option<PathBuf>,
    /// Seconds that the guest may take.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
    /// Write the guest's report as JSON.
    #[arg(long, value_name = "PATH")]
    pub report: Option<PathBuf>,
    /// TOML file of faults that come by themselves.
    #[arg(long, value_name = "FILE")]
    pub scenario: Option<PathBuf>,
    /// Print QEMU's command line and start nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Further arguments of QEMU.
    #[arg(last = true, value_name = "QEMU ARGS")]
    pub qemu_arguments: Vec<String>,
}
