//! Heterogeneous Memory Attribute Table (ACPI 6.5, section 5.2.28), revision 2.

use super::{Table, table};
use crate::plan::Plan;

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

/// System Locality Latency and Bandwidth Information, section 5.2.28.4; none if no pair has a value.
fn locality(plan: &Plan, data_type: u8, value: impl Fn(u32, u32) -> u64) -> Option<Vec<u8>> {
    let domains: Vec<u32> = plan.nodes.iter().map(|node| node.pxm).collect();
    let initiators: Vec<u32> = plan
        .nodes
        .iter()
        .filter(|node| !node.cpus.is_empty() || (node.gpu.is_some() && node.online))
        .map(|node| node.pxm)
        .collect();
    let pairs = || {
        initiators
            .iter()
            .flat_map(|from| domains.iter().map(move |to| (*from, *to)))
    };
    let values: Vec<u64> = pairs().map(|(from, to)| value(from, to)).collect();
    let known: Vec<u64> = values.iter().copied().filter(|value| *value > 0).collect();
    if known.is_empty() {
        return None;
    }
    let unit = base_unit(&known);
    let length = 32 + 4 * initiators.len() + 4 * domains.len() + 2 * values.len();
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
        .chain(&domains)
        .for_each(|domain| body.extend(domain.to_le_bytes()));
    for value in values {
        let entry = match value {
            0 => UNKNOWN,
            value => u16::try_from((value + unit / 2) / unit)
                .unwrap_or(UNKNOWN - 1)
                .max(1),
        };
        body.extend(entry.to_le_bytes());
    }
    Some(body)
}

/// The table; none if the machine gives neither latencies nor bandwidths.
pub(super) fn hmat(plan: &Plan) -> Option<Table> {
    let latency = |from: u32, to: u32| {
        plan.access(from, to)
            .map_or(0, |access| u64::from(access.latency_ns) * 1000)
    };
    let bandwidth = |from: u32, to: u32| {
        plan.access(from, to)
            .map_or(0, |access| u64::from(access.bandwidth_mbs))
    };
    // Data types 0, access latency in picoseconds, and 3, access bandwidth in MB/s.
    let structures: Vec<Vec<u8>> = [locality(plan, 0, latency), locality(plan, 3, bandwidth)]
        .into_iter()
        .flatten()
        .collect();
    if structures.is_empty() {
        return None;
    }
    let mut body = vec![0; 4];
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
    body.extend(structures.into_iter().flatten());
    Some(table("HMAT", 2, &body))
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
