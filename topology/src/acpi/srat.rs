//! System Resource Affinity Table (ACPI 6.5, section 5.2.16).

use super::{Table, begun, table};
use crate::plan::Plan;
use crate::ranges::Range;

/// Highest APIC id that a Processor Local APIC Affinity entry holds; 255 means all of them.
const LAST_APIC: u32 = 254;
/// `Enabled`, the flag of all entries that are not to be ignored.
const ENABLED: u32 = 1;

fn processor(body: &mut Vec<u8>, apic: u32, pxm: u32) {
    let domain = pxm.to_le_bytes();
    if apic <= LAST_APIC && pxm <= u32::from(u8::MAX) {
        // Processor Local APIC Affinity, section 5.2.16.1; the domain's upper bytes are apart from the lowest.
        body.extend([0, 16, domain[0], u8::try_from(apic).unwrap_or(u8::MAX)]);
        body.extend(ENABLED.to_le_bytes());
        body.extend([0, domain[1], domain[2], domain[3]]);
        body.extend([0; 4]);
    } else {
        // Processor Local x2APIC Affinity, section 5.2.16.3.
        body.extend([2, 24, 0, 0]);
        body.extend(domain);
        body.extend(apic.to_le_bytes());
        body.extend(ENABLED.to_le_bytes());
        body.extend([0; 8]);
    }
}

/// Memory Affinity, section 5.2.16.2. HBM is not marked with the flag that ACPI 6.6 has for specific-purpose memory: no
/// kernel reads it yet, QEMU does not set it, and compilers drop it.
fn memory(body: &mut Vec<u8>, pxm: u32, range: Range) {
    body.extend([1, 40]);
    body.extend(pxm.to_le_bytes());
    body.extend([0; 2]);
    body.extend(range.base.to_le_bytes());
    body.extend(range.size.to_le_bytes());
    body.extend([0; 4]);
    body.extend(ENABLED.to_le_bytes());
    body.extend([0; 8]);
}

/// Generic Initiator Affinity with a PCI handle, section 5.2.16.6: segment, then bus, then device and function.
fn initiator(body: &mut Vec<u8>, pxm: u32, (segment, bus): (u16, u8)) {
    body.extend([5, 32, 0, 1]);
    body.extend(pxm.to_le_bytes());
    body.extend(segment.to_le_bytes());
    body.extend([bus, 0]);
    body.extend([0; 12]);
    body.extend(ENABLED.to_le_bytes());
    body.extend([0; 4]);
}

/// Processors in order, Generic Initiators and memory in the order of Linux's node numbers.
pub(super) fn srat(plan: &Plan) -> Table {
    // Table revision 1 that must be there for old software, and 8 reserved bytes.
    let mut body = begun(0);
    body.extend(1u32.to_le_bytes());
    body.extend([0; 8]);

    let mut processors: Vec<(u32, u32)> = plan
        .nodes
        .iter()
        .flat_map(|node| node.cpus.iter().map(|cpu| (*cpu, node.pxm)))
        .collect();
    processors.sort_unstable();
    let apic_id = plan.apic_ids();
    for (cpu, pxm) in processors {
        processor(&mut body, apic_id(cpu), pxm);
    }
    let mut initiators: Vec<(u32, u32, (u16, u8))> = plan
        .gpus
        .iter()
        .flat_map(|gpu| {
            gpu.domains
                .iter()
                .filter(|domain| domain.initiator.is_some())
                .map(move |domain| (domain.pxm, (gpu.segment, gpu.bus)))
        })
        .filter_map(|(pxm, place)| Some((plan.linux_node(pxm)?, pxm, place)))
        .collect();
    initiators.sort_unstable();
    for (_, pxm, place) in initiators {
        initiator(&mut body, pxm, place);
    }
    let mut nodes: Vec<_> = plan.nodes.iter().collect();
    nodes.sort_by_key(|node| node.linux_node);
    for node in nodes {
        for range in &node.ranges {
            memory(&mut body, node.pxm, *range);
        }
    }
    // Revision 3: domains of 32 bits. Linux reads those of 1 and older as 8 bits.
    table("SRAT", 3, body)
}
