//! Heterogeneous Memory Attribute Table (ACPI 6.5, section 5.2.28), revision 2.

use super::{Table, begun, table};
use crate::plan::{Access, Plan};

/// What an entry says of a pair that is not known.
const UNKNOWN: u16 = 0xffff;

/// The largest number that divides all values and is not 0; 1 for no values.
fn common_divisor(values: &[u64]) -> u64 {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    values.iter().fold(0, |a, b| gcd(a, *b)).max(1)
}

/// The unit for entries of 16 bits: the largest that loses nothing, or, where the values are too far apart for that, the
/// smallest in which the largest of them can be written.
fn base_unit(values: &[u64]) -> u64 {
    let largest = values.iter().copied().max().unwrap_or(1);
    let exact = common_divisor(values);
    if largest / exact < u64::from(UNKNOWN) {
        exact
    } else {
        largest.div_ceil(u64::from(UNKNOWN) - 1)
    }
}

/// System Locality Latency and Bandwidth Information, section 5.2.28.4, of all pairs of `initiators` and `domains`, which
/// ascend; none if no pair has a value. Few of the pairs have one, so the entries are those that are not known first.
fn locality(
    plan: &Plan,
    data_type: u8,
    (initiators, domains): (&[u32], &[u32]),
    value: impl Fn(&Access) -> u64,
) -> Option<Vec<u8>> {
    let position = |access: &Access| -> Option<usize> {
        let row = initiators.binary_search(&access.initiator).ok()?;
        Some(row * domains.len() + domains.binary_search(&access.target).ok()?)
    };
    let accesses = plan.accesses.iter().filter(|access| value(access) > 0);
    let known: Vec<(usize, u64)> = accesses
        .filter_map(|access| Some((position(access)?, value(access))))
        .collect();
    if known.is_empty() {
        return None;
    }
    let unit = base_unit(&known.iter().map(|(_, value)| *value).collect::<Vec<u64>>());
    let head = 32 + 4 * initiators.len() + 4 * domains.len();
    let length = head + 2 * initiators.len() * domains.len();
    let mut body = Vec::with_capacity(length);
    let word = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes();
    body.extend([1, 0, 0, 0]);
    body.extend(word(length));
    // Memory hierarchy 0: memory itself. No minimum transfer size.
    body.extend([0, data_type, 0, 0]);
    body.extend(word(initiators.len()));
    body.extend(word(domains.len()));
    body.extend([0; 4]);
    body.extend(unit.to_le_bytes());
    initiators
        .iter()
        .chain(domains)
        .for_each(|domain| body.extend(domain.to_le_bytes()));
    // Both bytes of `UNKNOWN`.
    body.resize(length, u8::MAX);
    for (position, value) in known {
        let entry = u16::try_from((value + unit / 2) / unit)
            .unwrap_or(UNKNOWN - 1)
            .max(1);
        let bytes = body.iter_mut().skip(head + 2 * position);
        bytes
            .zip(entry.to_le_bytes())
            .for_each(|(to, from)| *to = from);
    }
    Some(body)
}

/// The table; none if the machine gives neither latencies nor bandwidths.
pub(super) fn hmat(plan: &Plan) -> Option<Table> {
    let domains: Vec<u32> = plan.nodes.iter().map(|node| node.pxm).collect();
    let initiators: Vec<u32> = plan
        .nodes
        .iter()
        .filter(|node| !node.cpus.is_empty() || (node.gpu.is_some() && node.online))
        .map(|node| node.pxm)
        .collect();
    let pairs = (initiators.as_slice(), domains.as_slice());
    // Data types 0, access latency in picoseconds, and 3, access bandwidth in MB/s.
    let latency = |access: &Access| u64::from(access.latency_ns) * 1000;
    let bandwidth = |access: &Access| u64::from(access.bandwidth_mbs);
    let structures: Vec<Vec<u8>> = [
        locality(plan, 0, pairs, latency),
        locality(plan, 3, pairs, bandwidth),
    ]
    .into_iter()
    .flatten()
    .collect();
    if structures.is_empty() {
        return None;
    }
    let attributes = 4 + 40 * plan.ram_nodes().count();
    let mut body = begun(attributes + structures.iter().map(Vec::len).sum::<usize>());
    body.extend([0; 4]);
    for node in plan.ram_nodes() {
        // Memory Proximity Domain Attributes, section 5.2.28.3: 40 bytes, with the processor that the memory is attached
        // to. HBM has none, as in QEMU's table: Linux would take that processor for the best initiator, whatever the values.
        body.extend([0, 0, 0, 0]);
        body.extend(40u32.to_le_bytes());
        body.extend(u16::from(node.cpu_pxm.is_some()).to_le_bytes());
        body.extend([0; 2]);
        body.extend(node.cpu_pxm.unwrap_or(0).to_le_bytes());
        body.extend(node.pxm.to_le_bytes());
        body.extend([0; 20]);
    }
    structures
        .iter()
        .for_each(|structure| body.extend_from_slice(structure));
    Some(table("HMAT", 2, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_lose_nothing_that_fits() {
        assert_eq!(base_unit(&[346_000, 690_000]), 2000);
        assert_eq!(base_unit(&[36_000, 50_000, 1_600_000]), 2000);
        assert_eq!(base_unit(&[7]), 7);
    }

    #[test]
    fn units_of_values_too_far_apart_hold_the_largest() {
        let unit = base_unit(&[1, 1_000_000]);
        assert!(
            1_000_000 / unit < u64::from(UNKNOWN)
                && 1_000_000 / (unit - 1) >= u64::from(UNKNOWN) - 1
        );
    }
}
