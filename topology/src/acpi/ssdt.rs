//! A secondary description table that gives each GPU its node, and GPUs with a coherent BAR the place of their HBM.

use acpi_tables::aml::{Device, EISAName, Name, Package, Path, Scope, Uuid};
use acpi_tables::{Aml, AmlSink};

use super::{Table, begun, table};
use crate::machine::Exposure;
use crate::plan::{Gpu, Plan};

/// Marks a `_DSD` package of device properties (UEFI Forum, _DSD implementation guide, section 3.1).
const DEVICE_PROPERTIES: &str = "daffd814-6eba-4d8c-8a91-bc9bbf4aa301";

/// A sink for AML.
struct Body(Vec<u8>);

impl AmlSink for Body {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// A name of a letter and the GPU's number in three digits of base 36, enough for 46,656 GPUs.
fn name(letter: char, number: u32) -> Path {
    let digit = |place: u32| {
        let digit = number / 36u32.pow(place) % 36;
        char::from_digit(digit, 36)
            .unwrap_or('0')
            .to_ascii_uppercase()
    };
    let name: String = [letter, digit(2), digit(1), digit(0)].into_iter().collect();
    Path::new(&name)
}

/// What NVIDIA's firmware tells of a GPU's HBM, by which drivers for Grace find it: `GPUMemoryInfo.c` of edk2-nvidia writes
/// it, Linux `drivers/vfio/pci/nvgrace-gpu/main.c` reads base and size, open-gpu-kernel-modules `nv-pci.c` also the
/// proximity domains where no Generic Initiator names the GPU. None for GPUs without a coherent BAR.
fn properties(gpu: &Gpu) -> Vec<(&'static str, u64)> {
    let base = gpu.hbm.first().map(|hbm| hbm.base);
    let Some(base) = base.filter(|_| gpu.exposure == Exposure::Bar) else {
        return Vec::new();
    };
    let bytes = gpu.hbm.iter().map(|hbm| hbm.size).sum();
    let mut all = vec![("nvidia,gpu-mem-base-pa", base)];
    let mut domains: Vec<u64> = gpu.domains.iter().map(|d| u64::from(d.pxm)).collect();
    domains.sort_unstable();
    let consecutive = (0..).zip(&domains);
    // Start and count would name other GPUs' domains if there were a hole; Generic Initiators name them in any case.
    if let Some(first) = domains.first()
        && consecutive.clone().all(|(i, domain)| first + i == *domain)
    {
        all.push(("nvidia,gpu-mem-pxm-start", *first));
        all.push(("nvidia,gpu-mem-pxm-count", domains.len() as u64));
    }
    all.push(("nvidia,gpu-mem-size", bytes));
    all
}

/// A PCI root bridge for each GPU, on the GPU's segment, bus and node, with the function below it (ACPI 6.5, sections
/// 6.1.1, 6.2.5 `_DSD`, 6.2.15 `_PXM`, 6.5.5 `_BBN`, 6.5.6 `_SEG`). None without GPUs.
pub(super) fn ssdt(plan: &Plan) -> Option<Table> {
    if plan.gpus.is_empty() {
        return None;
    }
    let mut body = Body(begun(0));
    for gpu in &plan.gpus {
        let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
        let (segment, bus) = (u32::from(gpu.segment), u32::from(gpu.bus));
        let names = [
            Name::new(Path::new("_HID"), &hid),
            Name::new(Path::new("_CID"), &cid),
            Name::new(Path::new("_UID"), &(segment << 8 | bus)),
            Name::new(Path::new("_SEG"), &segment),
            Name::new(Path::new("_BBN"), &bus),
            Name::new(Path::new("_PXM"), &gpu.pci_pxm),
        ];
        let (address, domain) = (
            Name::new(Path::new("_ADR"), &0u32),
            Name::new(Path::new("_PXM"), &gpu.pci_pxm),
        );
        let properties = properties(gpu);
        let pairs: Vec<Package> = properties
            .iter()
            .map(|(key, value)| Package::new(vec![key, value]))
            .collect();
        let pairs = Package::new(pairs.iter().map(|pair| pair as &dyn Aml).collect());
        let uuid = Uuid::new(DEVICE_PROPERTIES);
        let described = Package::new(vec![&uuid, &pairs]);
        let described = Name::new(Path::new("_DSD"), &described);
        let mut inside: Vec<&dyn Aml> = vec![&address, &domain];
        if !properties.is_empty() {
            inside.push(&described);
        }
        let function = Device::new(name('G', gpu.index), inside);
        let mut children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
        children.push(&function);
        let bridge = Device::new(name('P', gpu.index), children);
        Scope::new(Path::new("_SB_"), vec![&bridge]).to_aml_bytes(&mut body);
    }
    Some(table("SSDT", 2, body.0))
}
