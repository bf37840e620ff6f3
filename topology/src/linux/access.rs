//! Access classes: which nodes Linux thinks reach a node's memory best, and how fast.
//!
//! Linux reads the HMAT into `/sys/devices/system/node/nodeN/access0` (any initiator) and `access1` (nodes with CPUs).
//! Source: `drivers/acpi/numa/hmat.c` of Linux 6.12 (`hmat_register_target_initiators`, `hmat_update_target_attrs`,
//! `hmat_normalize`); 6.1 and 7.3 come to the same (measured with both presets).

use std::collections::{BTreeMap, BTreeSet};

/// Values by initiator and target.
pub type Matrix = BTreeMap<(u32, u32), u64>;

/// What an HMAT of revision 2 says, by proximity domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hmat {
    /// Domains that access memory, and whether they have CPUs.
    pub initiators: BTreeMap<u32, bool>,
    /// Memory whose processor the table names (Memory Proximity Domain Attributes), with that processor's domain.
    pub attached: BTreeMap<u32, u32>,
    /// Picoseconds of every pair that has a latency.
    pub latency_ps: Matrix,
    /// MB/s of every pair that has a bandwidth.
    pub bandwidth_mbs: Matrix,
}

/// What Linux shows of one access class of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Class {
    /// Domains of the initiators, ascending.
    pub initiators: Vec<u32>,
    /// Nanoseconds; 0 = not known.
    pub latency_ns: u32,
    /// MB/s; 0 = not known.
    pub bandwidth_mbs: u32,
}

/// Nanoseconds that Linux reads: rounded up, and nothing from 2^32 ps on.
fn nanoseconds(picoseconds: u64) -> u32 {
    u32::try_from(picoseconds).map_or(0, |value| value.div_ceil(1000))
}

/// MB/s that Linux reads: nothing from 2^32 on.
fn megabytes(mbs: u64) -> u32 {
    u32::try_from(mbs).unwrap_or(0)
}

impl Hmat {
    fn latency(&self, initiator: u32, target: u32) -> u32 {
        let value = self.latency_ps.get(&(initiator, target));
        value.map_or(0, |value| nanoseconds(*value))
    }

    fn bandwidth(&self, initiator: u32, target: u32) -> u32 {
        let value = self.bandwidth_mbs.get(&(initiator, target));
        value.map_or(0, |value| megabytes(*value))
    }

    /// Access class 0 (any initiator) or 1 (only those with CPUs) of the memory of a domain.
    ///
    /// The processor that the table names is the only initiator, whatever the values. Without one, or for class 1 with
    /// one that has no CPUs, it is those with the lowest latency and, among these, the highest bandwidth. What is not
    /// known is worse than any value; if nothing is known, all are as good.
    pub fn class(&self, target: u32, class: u32) -> Class {
        let has_cpus = |pxm: &u32| self.initiators.get(pxm) == Some(&true);
        let attached = self.attached.get(&target);
        if let Some(processor) = attached.filter(|pxm| class == 0 || has_cpus(pxm)) {
            return Class {
                initiators: vec![*processor],
                latency_ns: self.latency(*processor, target),
                bandwidth_mbs: self.bandwidth(*processor, target),
            };
        }
        let mut best: BTreeSet<u32> = self.initiators.keys().copied().collect();
        best.retain(|pxm| class == 0 || has_cpus(pxm));
        let latencies = best.iter().map(|pxm| self.latency(*pxm, target));
        let latency_ns = latencies.filter(|ns| *ns > 0).min().unwrap_or(0);
        best.retain(|pxm| latency_ns == 0 || self.latency(*pxm, target) == latency_ns);
        let bandwidths = best.iter().map(|pxm| self.bandwidth(*pxm, target));
        let bandwidth_mbs = bandwidths.max().unwrap_or(0);
        best.retain(|pxm| self.bandwidth(*pxm, target) == bandwidth_mbs);
        Class {
            initiators: best.into_iter().collect(),
            latency_ns,
            bandwidth_mbs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two CPU nodes, 0 and 1, and two GPUs, 2 and 3; memory of 0 and 1 has its processor.
    fn machine(latencies: &[(u32, u32, u64)], bandwidths: &[(u32, u32, u64)]) -> Hmat {
        let matrix = |values: &[(u32, u32, u64)], unit: u64| {
            let pair = |(from, to, value): &(u32, u32, u64)| ((*from, *to), value * unit);
            values.iter().map(pair).collect()
        };
        Hmat {
            initiators: BTreeMap::from([(0, true), (1, true), (2, false), (3, false)]),
            attached: BTreeMap::from([(0, 0), (1, 1)]),
            latency_ps: matrix(latencies, 1000),
            bandwidth_mbs: matrix(bandwidths, 1),
        }
    }

    fn class(initiators: &[u32], latency_ns: u32, bandwidth_mbs: u32) -> Class {
        Class {
            initiators: initiators.to_vec(),
            latency_ns,
            bandwidth_mbs,
        }
    }

    #[test]
    fn the_named_processor_is_the_only_one_even_if_it_is_slower() {
        let hmat = machine(&[(0, 0, 100), (2, 0, 50)], &[(2, 0, 9000)]);
        assert_eq!(hmat.class(0, 0), class(&[0], 100, 0));
        assert_eq!(hmat.class(0, 1), class(&[0], 100, 0));
    }

    #[test]
    fn class_1_looks_further_if_the_named_processor_has_no_cpus() {
        let mut hmat = machine(&[(2, 2, 300), (0, 2, 500), (1, 2, 700)], &[]);
        hmat.attached.insert(2, 3);
        assert_eq!(hmat.class(2, 0), class(&[3], 0, 0));
        assert_eq!(hmat.class(2, 1), class(&[0], 500, 0));
    }

    #[test]
    fn latency_decides_before_bandwidth() {
        let latencies = [(0, 2, 600), (1, 2, 600), (2, 2, 300), (3, 2, 900)];
        let bandwidths = [(0, 2, 100), (1, 2, 200), (2, 2, 50), (3, 2, 1000)];
        let hmat = machine(&latencies, &bandwidths);
        assert_eq!(hmat.class(2, 0), class(&[2], 300, 50));
        assert_eq!(hmat.class(2, 1), class(&[1], 600, 200));
    }

    #[test]
    fn equals_share_and_what_is_not_known_is_worse() {
        let hmat = machine(&[], &[(1, 2, 7), (3, 2, 7)]);
        assert_eq!(hmat.class(2, 0), class(&[1, 3], 0, 7));
        let hmat = machine(&[(3, 2, 7)], &[(0, 2, 7)]);
        assert_eq!(hmat.class(2, 0), class(&[3], 7, 0));
        assert_eq!(hmat.class(2, 1), class(&[0], 0, 7));
    }

    #[test]
    fn all_are_as_good_where_nothing_is_known() {
        let hmat = machine(&[(0, 0, 100)], &[]);
        assert_eq!(hmat.class(3, 0), class(&[0, 1, 2, 3], 0, 0));
        assert_eq!(hmat.class(3, 1), class(&[0, 1], 0, 0));
    }

    #[test]
    fn values_beyond_32_bits_are_not_known() {
        let hmat = machine(
            &[(0, 2, 4_294_968), (1, 2, 4_294_967)],
            &[(1, 2, 1 << 32), (0, 3, (1 << 32) - 1)],
        );
        assert_eq!(hmat.class(2, 0), class(&[1], 4_294_967, 0));
        assert_eq!(hmat.class(3, 0), class(&[0], 0, u32::MAX));
        assert_eq!(nanoseconds(1), 1);
        assert_eq!(nanoseconds(1001), 2);
    }
}
