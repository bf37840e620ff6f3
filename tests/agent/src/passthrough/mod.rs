//! Functions that the guest passes on by VFIO, behind an IOMMU of its own: QEMU's `edu` device, whose DMA reaches HBM, and
//! a GPU, whose addresses are then those of the IOMMU.

mod edu;
mod gpu;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use numagpu_topology::seen::steps::passthrough as names_of;
use numagpu_topology::seen::{DaxSeen, Step};
use numagpu_vmm_glue::vfio::{Container, Memory};
use vfio_ioctls::VfioDevice;

use crate::device::Outcome;
use crate::probe::{kernel_log, names, number, text};

/// Region that is configuration space (Linux `include/uapi/linux/vfio.h`, `VFIO_PCI_CONFIG_REGION_INDEX`).
const CONFIG: u32 = 7;
/// Offset of the command register, and its bits memory space and bus master.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 0b110;

/// Does it all; what came out, step by step. What follows a step that failed is not tried.
pub fn run(dax: &[DaxSeen]) -> Vec<Step> {
    let mut done = Vec::new();
    edu::run(dax, &mut done);
    gpu::run(dax, &mut done);
    let step = |(name, outcome): (&str, Outcome<String>)| {
        let (ok, detail) = match outcome {
            Ok(detail) => (true, detail),
            Err(error) => (false, error),
        };
        Step {
            name: name.to_owned(),
            ok,
            detail,
        }
    };
    done.into_iter().map(step).collect()
}

/// A step by name, and what came out.
type Done = (&'static str, Outcome<String>);

/// Notes what came out of a step; whether to go on.
fn note(done: &mut Vec<Done>, name: &'static str, outcome: Outcome<String>) -> bool {
    let ok = outcome.is_ok();
    done.push((name, outcome));
    ok
}

/// Any error in words.
fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A function that is bound to vfio-pci, in an address space of its own.
struct Passed {
    device: VfioDevice,
    container: Container,
    path: PathBuf,
}

impl Passed {
    /// Finds the first function of these ids, binds it, and opens it.
    fn open(ids: (u16, u16)) -> Outcome<Passed> {
        let path = find(ids)?;
        bind(&path)?;
        let container = Container::open().map_err(words)?;
        let device = container.device(&path).map_err(words)?;
        let mut passed = Passed {
            device,
            container,
            path,
        };
        passed.enable();
        Ok(passed)
    }

    /// Turns on memory decoding and bus mastering.
    fn enable(&mut self) {
        let mut command = [0; 2];
        self.device.region_read(CONFIG, &mut command, COMMAND);
        let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
        self.device
            .region_write(CONFIG, &command.to_le_bytes(), COMMAND);
    }

    fn read32(&self, bar: u32, at: u64) -> u32 {
        let mut bytes = [0xff; 4];
        self.device.region_read(bar, &mut bytes, at);
        u32::from_le_bytes(bytes)
    }

    fn write32(&self, bar: u32, at: u64, value: u32) {
        self.device.region_write(bar, &value.to_le_bytes(), at);
    }

    /// Its number in `/dev/vfio`.
    fn group(&self) -> String {
        let link = fs::read_link(self.path.join("iommu_group")).unwrap_or_default();
        let name = link.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

fn find((vendor, function): (u16, u16)) -> Outcome<PathBuf> {
    let devices = Path::new("/sys/bus/pci/devices");
    let id = |path: &Path, name: &str| number(&text(path.join(name)));
    names(devices)
        .iter()
        .map(|name| devices.join(name))
        .find(|path| {
            (id(path, "vendor"), id(path, "device")) == (Some(vendor.into()), Some(function.into()))
        })
        .ok_or_else(|| format!("no function {vendor:04x}:{function:04x}"))
}

/// Gives a function to vfio-pci (Linux `Documentation/ABI/testing/sysfs-bus-pci`, `driver_override`).
fn bind(path: &Path) -> Outcome {
    let write = |file: &Path, text: &str| {
        fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))
    };
    if !path.join("iommu_group").exists() {
        return Err(format!("{} is in no IOMMU group", path.display()));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let driver = path.join("driver");
    write(&path.join("driver_override"), "vfio-pci")?;
    if driver.exists() {
        write(&driver.join("unbind"), &name)?;
    }
    write(Path::new("/sys/bus/pci/drivers_probe"), &name)?;
    let bound = fs::read_link(&driver).unwrap_or_default();
    match bound.file_name() {
        Some(driver) if driver == "vfio-pci" => Ok(()),
        other => Err(format!("{name} is bound to {other:?}")),
    }
}

/// HBM from the start of a dax device, `size` bytes rounded up to what the device can be mapped in.
fn hbm(dax: &DaxSeen, size: u64) -> Outcome<Arc<Memory>> {
    let path = format!("/dev/{}", dax.name);
    let file = File::options().read(true).write(true).open(&path);
    let file = file.map_err(|error| format!("{path}: {error}"))?;
    let size = size.next_multiple_of(dax.align.max(1)).min(dax.size);
    Memory::of_file(&file, 0, size).map_err(words)
}

/// The kernel's last word of an IOMMU fault, if there is one at this address.
fn iommu_fault(address: u64) -> Option<String> {
    let log = kernel_log();
    let fault = format!("fault addr {address:#x} ");
    let line = log.lines().rev().find(|line| line.contains(&fault))?;
    Some(
        line.split_once(';')
            .map_or(line, |(_, text)| text)
            .to_owned(),
    )
}
