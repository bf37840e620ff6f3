//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use numagpu_topology::linux::BootPath;

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
    /// Print the JSON Schema of a machine description, for editors and programs that write one.
    Schema,
    /// Print a shell's completions.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
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
    /// A QEMU command line.
    Qemu,
    /// The kernel arguments that the guest needs.
    LinuxCmdline,
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
}

impl Boot {
    /// As the planner has it.
    pub fn path(self) -> BootPath {
        match self {
            Boot::Ovmf => BootPath::Ovmf,
            Boot::Seabios => BootPath::SeaBios,
        }
    }
}

/// Arguments of `plan`.
#[derive(clap::Args)]
pub struct PlanArgs {
    /// Preset or TOML file.
    pub machine: String,
    /// What to write.
    #[arg(long, value_enum, default_value = "text")]
    pub format: Format,
    /// Firmware that `qemu` and `linux-cmdline` are for.
    #[arg(long, value_enum, default_value = "ovmf")]
    pub boot: Boot,
    /// Directory of the sockets in `qemu`.
    #[arg(long, value_name = "DIR", default_value = "sockets")]
    pub socket_dir: String,
    /// Directory of the HBM files in `qemu`.
    #[arg(long, value_name = "DIR", default_value = "sockets")]
    pub hbm_dir: String,
    /// File to write to instead of the terminal.
    #[arg(short, long, value_name = "PATH")]
    pub output: Option<PathBuf>,
}

/// Arguments of `serve`.
#[derive(clap::Args)]
pub struct ServeArgs {
    /// Preset or TOML file.
    pub machine: String,
    /// Existing directory for one socket per GPU, named as in `plan --format qemu`.
    #[arg(long, value_name = "DIR")]
    pub socket_dir: PathBuf,
    /// Existing directory for HBM files; without it, HBM is memory without a file, and the socket directory gets links
    /// by which the VMM opens it.
    #[arg(long, value_name = "DIR")]
    pub hbm_dir: Option<PathBuf>,
}

/// Arguments of `run`.
#[derive(clap::Args)]
pub struct RunArgs {
    /// Preset or TOML file.
    pub machine: String,
    /// Exit with 1 unless the guest saw exactly what was planned; list only what differs.
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
    /// `ovmf`, `seabios`, or the file of an OVMF of edk2-stable202605 or newer.
    #[arg(long, value_name = "ovmf|seabios|PATH", default_value = "ovmf")]
    pub firmware: String,
    /// Accelerator; by default kvm where a Linux guest runs under it, else tcg.
    #[arg(long, value_name = "kvm|tcg", value_parser = ["kvm", "tcg"])]
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
    /// Print QEMU's command line and start nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Further arguments of QEMU.
    #[arg(last = true, value_name = "QEMU ARGS")]
    pub qemu_arguments: Vec<String>,
}
