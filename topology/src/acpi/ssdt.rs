//! A secondary description table that gives each GPU its node.

use acpi_tables::aml::{Device, EISAName, Name, Path, Scope};
use acpi_tables::{Aml, AmlSink};

use super::{Table, begun, table};
use crate::plan::Plan;

/// A sink for AML.
struct Body(Vec<u8>);

impl AmlSink for Body {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

/// GPUs whose number has two hexadecimal digits.
const TWO_DIGITS: u32 = 0x100;

/// A GPU's name below `prefix`, such as `PB00`: four characters, as all names in AML (ACPI 6.5, section 20.2.2). With more
/// than two digits it is the prefix's last letter and three digits of base 36, which no shorter one can be; none for a GPU
/// beyond what these number.
fn name(prefix: &str, index: u32) -> Option<String> {
    if index < TWO_DIGITS {
        return Some(format!("{prefix}{index:02X}"));
    }
    let digit = |value: u32| char::from_digit(value % 36, 36).map(|c| c.to_ascii_uppercase());
    let letter = prefix
        .chars()
        .next_back()
        .filter(|_| index < 36 * 36 * 36)?;
    [
        Some(letter),
        digit(index / (36 * 36)),
        digit(index / 36),
        digit(index),
    ]
    .into_iter()
    .collect()
}

/// A PCI root bridge for each GPU, on the GPU's bus and node, with the function below it (ACPI 6.5, sections 6.1.1,
/// 6.2.15 `_PXM`, 6.5.5 `_BBN`). None without GPUs.
pub(super) fn ssdt(plan: &Plan) -> Option<Table> {
    if plan.gpus.is_empty() {
        return None;
    }
    let mut body = Body(begun(0));
    for gpu in &plan.gpus {
        let (Some(bridge), Some(function)) = (name("PB", gpu.index), name("GP", gpu.index)) else {
            break;
        };
        let (segment, bus) = (u32::from(gpu.segment), u32::from(gpu.bus));
        let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
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
        let function = Device::new(Path::new(&function), vec![&address, &domain]);
        let mut children: Vec<&dyn Aml> = names.iter().map(|name| name as &dyn Aml).collect();
        children.push(&function);
        let bridge = Device::new(Path::new(&bridge), children);
        Scope::new(Path::new("_SB_"), vec![&bridge]).to_aml_bytes(&mut body);
    }
    Some(table("SSDT", 2, body.0))
}
