//! A secondary description table that gives each GPU its node.

use acpi_tables::aml::{Device, EISAName, Name, Path, Scope};
use acpi_tables::{Aml, AmlSink};

use super::{Table, table};
use crate::plan::Plan;

/// A sink for AML.
#[derive(Default)]
struct Body(Vec<u8>);

impl AmlSink for Body {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// A PCI root bridge for each GPU, on the GPU's bus and node, with the function below it (ACPI 6.5, sections 6.1.1,
/// 6.2.15 `_PXM`, 6.5.5 `_BBN`). None without GPUs.
pub(super) fn ssdt(plan: &Plan) -> Option<Table> {
    if plan.gpus.is_empty() {
        return None;
    }
    let mut body = Body::default();
    for gpu in &plan.gpus {
        let name = |prefix: &str| Path::new(&format!("{prefix}{:02X}", gpu.index));
        let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
        let names = [
            Name::new(Path::new("_HID"), &hid),
            Name::new(Path::new("_CID"), &cid),
            Name::new(Path::new("_UID"), &u32::from(gpu.bus)),
            Name::new(Path::new("_SEG"), &0u32),
            Name::new(Path::new("_BBN"), &u32::from(gpu.bus)),
            Name::new(Path::new("_PXM"), &gpu.pci_pxm),
        ];
        let (address, domain) = (
            Name::new(Path::new("_ADR"), &0u32),
            Name::new(Path::new("_PXM"), &gpu.pci_pxm),
        );
        let function = Device::new(name("GP"), vec![&address, &domain]);
        let mut children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
        children.push(&function);
        let bridge = Device::new(name("PB"), children);
        Scope::new(Path::new("_SB_"), vec![&bridge]).to_aml_bytes(&mut body);
    }
    Some(table("SSDT", 2, &body.0))
}
