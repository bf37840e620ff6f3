//! QEMU command lines.
//!
//! Needs QEMU 11.1 or newer: `sp-mem` gives each HBM range its own soft-reserved E820 entry and SRAT entry, and
//! `vfio-user-pci` connects to the process that serves the GPU.

mod hmat;

use thiserror::Error;

use crate::linux::{self, BootPath};
use crate::machine::Exposure;
use crate::plan::{Gpu, NodeKind, OVMF_MAX_RANGES, Plan, backend_names};
use crate::platform::PCI_HOLE64;
use crate::predict::{QBOOT_MAX_RANGES, root_slot};
use crate::render::text::cpu_list;
use crate::size::MIB;

pub use hmat::{hmat, warnings};

/// Most nodes that QEMU takes (`MAX_NODES` in `include/system/numa.h`).
const MAX_NODES: usize = 128;
/// Expander bridges that fit on q35's root bus beside its own devices.
const MAX_EXPANDERS: usize = 28;

/// What the plan does not know: where things are on the host.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// How the guest learns of its HBM.
    pub boot: BootPath,
    /// Accelerator: `tcg`, `mttcg` (TCG with a thread for each CPU) or `kvm`.
    pub accel: String,
    /// Firmware image, if QEMU's own SeaBIOS is not to be used.
    pub firmware: Option<String>,
    /// Kernel image.
    pub kernel: String,
    /// Initial RAM disk.
    pub initrd: Option<String>,
    /// Further kernel arguments.
    pub append: String,
    /// File of every soft-reserved HBM range, in order.
    pub hbm: Vec<String>,
    /// Socket of every GPU, in order.
    pub sockets: Vec<String>,
    /// File that the guest's first serial port writes to; the terminal if none.
    pub console: Option<String>,
    /// UNIX socket on which the host listens for the guest's second serial port.
    pub report: Option<String>,
    /// UNIX socket on which QEMU listens for QMP.
    pub qmp: Option<String>,
}

impl Host {
    /// Placeholders for a command line that is printed: files as `numagpu serve` makes them in these directories.
    pub fn placeholders(plan: &Plan, boot: BootPath, socket_dir: &str, hbm_dir: &str) -> Host {
        Host {
            boot,
            accel: "tcg".to_owned(),
            firmware: match boot {
                BootPath::Ovmf => Some("OVMF.fd".to_owned()),
                BootPath::Qboot => Some("qboot.rom".to_owned()),
                BootPath::SeaBios | BootPath::Direct => None,
            },
            kernel: "vmlinuz".to_owned(),
            initrd: Some("initrd.img".to_owned()),
            append: "console=ttyS0".to_owned(),
            hbm: plan
                .gpus
                .iter()
                .filter(|gpu| gpu.exposure == Exposure::Spm)
                .flat_map(Plan::hbm_files)
                .map(|(name, _)| format!("{hbm_dir}/{name}"))
                .collect(),
            sockets: plan
                .gpus
                .iter()
                .map(|gpu| format!("{socket_dir}/{}", Plan::socket_file(gpu)))
                .collect(),
            ..Host::default()
        }
    }
}

/// A plan that this path of QEMU cannot carry.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum QemuError {
    /// More proximity domains than QEMU's.
    #[error(
        "QEMU takes at most {MAX_NODES} NUMA nodes and the machine has {nodes}: each CPU node and each HBM partition is one"
    )]
    TooManyNodes {
        /// Nodes of the machine.
        nodes: usize,
    },
    /// More soft-reserved ranges than the firmware keeps.
    #[error(
        "OVMF keeps {OVMF_MAX_RANGES} HBM ranges apart and the machine has {ranges}: use SeaBIOS (--firmware seabios)"
    )]
    TooManyRanges {
        /// HBM ranges of the machine.
        ranges: usize,
    },
    /// More soft-reserved ranges than the zero page has room for.
    #[error(
        "qboot hands {QBOOT_MAX_RANGES} HBM ranges to the kernel and the machine has {ranges}: use SeaBIOS (--firmware seabios)"
    )]
    TooManyEntries {
        /// HBM ranges of the machine.
        ranges: usize,
    },
    /// A way of booting that is not QEMU's.
    #[error(
        "direct boot hands the plan's own tables to the kernel, and QEMU writes its own: use --boot ovmf, seabios or qboot"
    )]
    Direct,
    /// More expander bridges than slots.
    #[error("q35 has room for {MAX_EXPANDERS} expander bridges and the machine has {gpus} GPUs")]
    TooManyGpus {
        /// GPUs of the machine.
        gpus: usize,
    },
    /// The host has more or fewer files than the plan needs.
    #[error("{what}: the plan has {planned}, the host {given}")]
    Files {
        /// Which files.
        what: &'static str,
        /// How many the plan needs.
        planned: usize,
        /// How many were given.
        given: usize,
    },
}

/// Kernel arguments of the guest: the plan's, then the host's.
pub fn kernel_arguments(plan: &Plan, host: &Host) -> String {
    let mut arguments = linux::command_line(host.boot, plan.guest.driver, &plan.hbm_ranges());
    arguments.extend((!host.append.is_empty()).then(|| host.append.clone()));
    arguments.join(" ")
}

/// A size as QEMU reads it without loss.
fn mib(bytes: u64) -> String {
    format!("{}M", bytes / MIB)
}

/// QEMU's arguments, without the program's name. Latencies and bandwidths become an HMAT, see [`hmat`].
///
/// # Errors
/// [`QemuError`] where QEMU or the firmware cannot carry the machine.
pub fn arguments(plan: &Plan, host: &Host) -> Result<Vec<String>, QemuError> {
    let nodes = plan.nodes.len();
    if nodes > MAX_NODES {
        return Err(QemuError::TooManyNodes { nodes });
    }
    let ranges = plan.hbm().count();
    match host.boot {
        BootPath::Ovmf if ranges > OVMF_MAX_RANGES => {
            return Err(QemuError::TooManyRanges { ranges });
        }
        BootPath::Qboot if ranges > QBOOT_MAX_RANGES => {
            return Err(QemuError::TooManyEntries { ranges });
        }
        BootPath::Direct => return Err(QemuError::Direct),
        BootPath::Ovmf | BootPath::SeaBios | BootPath::Qboot => {}
    }
    if plan.gpus.len() > MAX_EXPANDERS {
        return Err(QemuError::TooManyGpus {
            gpus: plan.gpus.len(),
        });
    }
    for (what, planned, given) in [
        ("HBM files", ranges, host.hbm.len()),
        ("sockets", plan.gpus.len(), host.sockets.len()),
    ] {
        if planned != given {
            return Err(QemuError::Files {
                what,
                planned,
                given,
            });
        }
    }
    let mut args: Vec<String> = Vec::new();
    let mut arg = |option: &str, value: String| args.extend([option.to_owned(), value]);

    let accesses = hmat::arguments(plan);
    let hmat = if accesses.is_empty() { "" } else { ",hmat=on" };
    let below_4g = plan.holes.below_4g;
    let below_4g = below_4g.map(|size| format!(",max-ram-below-4g={size}"));
    let below_4g = below_4g.unwrap_or_default();
    // With system management mode each CPU has a view of memory of its own, which QEMU computes anew whenever a guest moves
    // a BAR or a bridge's window: of the boot of 8 GPUs that was a fifth. Firmware that needs the mode needs flash
    // too, which `-bios` is not.
    arg(
        "-machine",
        format!("q35,usb=off,vmport=off,smm=off{hmat}{below_4g}"),
    );
    if plan.holes.pci_hole64 != PCI_HOLE64 {
        let size = plan.holes.pci_hole64;
        arg("-global", format!("q35-pcihost.pci-hole64-size={size}"));
    }
    // Linux patches its own code while other CPUs run it, by way of an int3 that is gone a moment later. With a thread
    // for each CPU, QEMU up to 11.1 may run the int3 after it was taken away, which Linux takes for a breakpoint that
    // nobody set, and now and then a boot ends in "Oops: int3".
    let accel = match host.accel.as_str() {
        "tcg" => "tcg,thread=single",
        "mttcg" => "tcg,thread=multi",
        other => other,
    };
    arg("-accel", accel.to_owned());
    let cpu = if host.accel == "kvm" { "host" } else { "max" };
    // QEMU keeps AMD's range free for CPUs that say they are AMD's, as those of its own emulation do.
    let vendor = if plan.holes.amd {
        ""
    } else {
        ",vendor=GenuineIntel"
    };
    arg(
        "-cpu",
        format!("{cpu},phys-bits={}{vendor}", plan.phys_bits),
    );
    arg("-smp", cpus(plan));
    arg(
        "-m",
        format!(
            "size={},maxmem={}",
            mib(plan.ram_bytes()),
            mib(plan.ram_bytes() + plan.window.size)
        ),
    );

    let ram_nodes: Vec<_> = plan.ram_nodes().collect();
    let backends = backend_names(ram_nodes.len(), ranges);
    let (ram_names, hbm_names) = backends.split_at(ram_nodes.len().min(backends.len()));
    for (node, name) in ram_nodes.iter().zip(ram_names) {
        let size: u64 = node.ranges.iter().map(|range| range.size).sum();
        arg(
            "-object",
            format!("memory-backend-memfd,id={name},size={},share=on", mib(size)),
        );
    }
    let spm = |gpu: &&Gpu| gpu.exposure == Exposure::Spm;
    let owners = plan.gpus.iter().filter(spm);
    let hbm = owners.flat_map(|gpu| gpu.hbm.iter().map(move |hbm| (gpu, hbm)));
    for (((gpu, hbm), name), path) in hbm.zip(hbm_names).zip(&host.hbm) {
        let path = path.replace(',', ",,");
        let node = gpu.host_node;
        let node = node.map(|node| format!(",host-nodes={node},policy=bind"));
        arg(
            "-object",
            format!(
                "memory-backend-file,id={name},mem-path={path},size={},share=on{}",
                mib(hbm.size),
                node.unwrap_or_default()
            ),
        );
    }
    for node in &plan.nodes {
        let list: String = cpu_list(&node.cpus)
            .split(',')
            .filter(|run| !run.is_empty())
            .map(|run| format!(",cpus={run}"))
            .collect();
        let position = ram_nodes.iter().position(|ram| ram.pxm == node.pxm);
        let memory = position
            .and_then(|i| ram_names.get(i))
            .map(|name| format!(",memdev={name}"))
            .unwrap_or_default();
        // RAM without CPUs belongs to the CPUs next to it; other nodes' initiator is what QEMU makes of them.
        let is_memory = node.kind == NodeKind::Hbm && node.gpu.is_none();
        let next_to = node.cpu_pxm.filter(|_| is_memory && !accesses.is_empty());
        let next_to = next_to.map(|cpu| format!(",initiator={cpu}"));
        let next_to = next_to.unwrap_or_default();
        arg(
            "-numa",
            format!("node,nodeid={}{list}{memory}{next_to}", node.pxm),
        );
    }
    for (from, row) in plan.slit.iter().enumerate() {
        for (to, value) in row.iter().enumerate().filter(|(to, _)| *to != from) {
            arg("-numa", format!("dist,src={from},dst={to},val={value}"));
        }
    }
    for access in accesses {
        arg("-numa", access);
    }
    for (index, (hbm, name)) in plan.hbm().zip(hbm_names).enumerate() {
        let (node, base) = (hbm.pxm.unwrap_or_default(), hbm.base);
        arg(
            "-device",
            format!("sp-mem,id=sp{index},memdev={name},node={node},addr={base:#x}"),
        );
    }
    for (gpu, socket) in plan.gpus.iter().zip(&host.sockets) {
        let (i, slot) = (gpu.index, root_slot(gpu));
        let mut device = serde_json::json!({
            "driver": "vfio-user-pci",
            "id": format!("gpu{i}"),
            "bus": "pcie.0",
            "addr": format!("{slot:#x}"),
            "socket": { "type": "unix", "path": socket },
        });
        if host.boot != BootPath::Qboot {
            let (expander, node) = (gpu.bus.saturating_sub(1), gpu.pci_pxm);
            arg(
                "-device",
                format!(
                    "pxb-pcie,id=pxb{i},bus=pcie.0,addr={slot:#x},bus_nr={expander},numa_node={node}"
                ),
            );
            let chassis = i + 1;
            arg(
                "-device",
                format!("pcie-root-port,id=rp{i},bus=pxb{i},chassis={chassis},slot=0"),
            );
            if let Some(device) = device.as_object_mut() {
                device.insert("bus".to_owned(), format!("rp{i}").into());
                device.remove("addr");
            }
        }
        arg("-device", device.to_string());
        for domain in &gpu.domains {
            if let Some(name) = &domain.initiator {
                arg(
                    "-object",
                    format!(
                        "acpi-generic-initiator,id={name},pci-dev=gpu{i},node={}",
                        domain.pxm
                    ),
                );
            }
        }
    }
    if let Some(firmware) = &host.firmware {
        arg("-bios", firmware.clone());
    }
    arg("-kernel", host.kernel.clone());
    if let Some(initrd) = &host.initrd {
        arg("-initrd", initrd.clone());
    }
    arg("-append", kernel_arguments(plan, host));
    arg("-display", "none".to_owned());
    match &host.console {
        Some(path) => {
            arg(
                "-chardev",
                format!("file,id=console,path={}", path.replace(',', ",,")),
            );
            arg("-serial", "chardev:console".to_owned());
        }
        None => arg("-serial", "mon:stdio".to_owned()),
    }
    if let Some(path) = &host.report {
        arg(
            "-chardev",
            format!("socket,id=report,path={}", path.replace(',', ",,")),
        );
        arg("-serial", "chardev:report".to_owned());
    }
    if let Some(path) = &host.qmp {
        arg(
            "-qmp",
            format!("unix:{},server=on,wait=off", path.replace(',', ",,")),
        );
    }
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
    Ok(args)
}

/// Sockets and cores as the plan has them, so that caches do not span nodes where that can be.
fn cpus(plan: &Plan) -> String {
    let (count, cores) = (plan.cpu_count(), plan.cores_per_socket());
    let sockets = count / cores as usize;
    format!("{count},sockets={sockets},cores={cores},threads=1")
}

/// The command line for a shell, one option a line.
pub fn shell(program: &str, arguments: &[String]) -> String {
    let quote = |text: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,.:/+@%".contains(c);
        if !text.is_empty() && text.chars().all(plain) {
            text.to_owned()
        } else {
            format!("'{}'", text.replace('\'', r"'\''"))
        }
    };
    let mut text = quote(program);
    for (index, argument) in arguments.iter().enumerate() {
        let value = index > 0
            && !argument.starts_with('-')
            && arguments.get(index - 1).is_some_and(|a| a.starts_with('-'));
        text.push_str(if value { " " } else { " \\\n  " });
        text.push_str(&quote(argument));
    }
    text.push('\n');
    text
}
