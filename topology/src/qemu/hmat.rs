//! The HMAT that QEMU writes, and the arguments that make it do so.
//!
//! QEMU 11.1.3, measured: it takes a pair only if the initiator has CPUs or a Generic Initiator, and writes `initiator=`
//! of a node into the table only if the node has RAM, so HBM nodes go without. Latencies are whole nanoseconds, bandwidths
//! whole MiB/s, which Linux reads as MB/s. The unit of a matrix is a power of ten (latency) or of two (bandwidth) that
//! divides all its values, and an entry has 16 bits; larger bandwidths are refused, and of larger latencies QEMU silently
//! drops the upper bits.

use crate::linux::access::{Hmat, Matrix};
use crate::plan::Plan;

/// The largest entry of a matrix: 0xffff says that a pair cannot be reached.
const MAX_ENTRY: u64 = 0xfffe;
/// A change of a value in parts of a thousand that is worth a warning.
const WORTH_A_WARNING: u64 = 10;

/// One of the two matrices.
#[derive(Clone, Copy)]
enum Kind {
    Latency,
    Bandwidth,
}

impl Kind {
    /// Units grow by this factor.
    fn step(self) -> u64 {
        match self {
            Kind::Latency => 10,
            Kind::Bandwidth => 2,
        }
    }

    fn argument(self, value: u64) -> String {
        match self {
            Kind::Latency => format!("data-type=access-latency,latency={value}"),
            Kind::Bandwidth => format!("data-type=access-bandwidth,bandwidth={value}M"),
        }
    }

    /// The smallest unit that QEMU can use for these values.
    fn unit(self, values: impl Iterator<Item = u64> + Clone) -> u64 {
        let largest = values.clone().max().unwrap_or(0);
        let mut unit = 1;
        let divides = |unit: u64| values.clone().all(|value| value.is_multiple_of(unit));
        while largest >= unit * self.step() && divides(unit * self.step()) {
            unit *= self.step();
        }
        while rounded(largest, unit) / unit > MAX_ENTRY {
            unit *= self.step();
        }
        unit
    }
}

/// The nearest multiple of `unit`, at least one.
fn rounded(value: u64, unit: u64) -> u64 {
    ((value + unit / 2) / unit).max(1) * unit
}

/// Whether a domain may be an initiator, and if so, whether it has CPUs.
fn initiator(plan: &Plan, pxm: u32) -> Option<bool> {
    let node = plan.nodes.iter().find(|node| node.pxm == pxm)?;
    let has_cpus = !node.cpus.is_empty();
    let named = || {
        plan.domains()
            .any(|domain| domain.pxm == pxm && domain.initiator.is_some())
    };
    (has_cpus || named()).then_some(has_cpus)
}

/// Nanoseconds or MB/s of every pair that QEMU takes, as the plan has them.
fn planned(plan: &Plan, kind: Kind) -> Matrix {
    let initiators = initiators(plan);
    let pair = |access: &crate::plan::Access| {
        let value = match kind {
            Kind::Latency => access.latency_ns,
            Kind::Bandwidth => access.bandwidth_mbs,
        };
        let is_taken = value > 0 && initiators.contains_key(&access.initiator);
        is_taken.then_some(((access.initiator, access.target), u64::from(value)))
    };
    plan.accesses.iter().filter_map(pair).collect()
}

fn initiators(plan: &Plan) -> std::collections::BTreeMap<u32, bool> {
    let domains = plan.nodes.iter().map(|node| node.pxm);
    domains
        .filter_map(|pxm| Some((pxm, initiator(plan, pxm)?)))
        .collect()
}

/// The same as QEMU can write them.
fn carried(plan: &Plan, kind: Kind) -> Matrix {
    let mut matrix = planned(plan, kind);
    let unit = kind.unit(matrix.values().copied());
    for value in matrix.values_mut() {
        *value = rounded(*value, unit);
    }
    matrix
}

/// What QEMU's HMAT says of the machine; none if there is nothing for it to say.
///
/// Only CPU nodes and domains with a Generic Initiator are initiators: what the description says of other GPUs' accesses
/// has no place in the table. Values are rounded where 16-bit entries cannot hold them exactly, which [`warnings`] tells
/// if it changes one by more than 1%.
pub fn hmat(plan: &Plan) -> Option<Hmat> {
    let mut latency_ps = carried(plan, Kind::Latency);
    latency_ps.values_mut().for_each(|value| *value *= 1000);
    let bandwidth_mbs = carried(plan, Kind::Bandwidth);
    let initiators = initiators(plan);
    let with_ram = plan.ram_nodes();
    (!latency_ps.is_empty() || !bandwidth_mbs.is_empty()).then(|| Hmat {
        attached: with_ram
            .filter_map(|node| Some((node.pxm, node.cpu_pxm?)))
            .collect(),
        initiators,
        latency_ps,
        bandwidth_mbs,
    })
}

/// Values of `-numa` for every pair that QEMU takes.
pub(super) fn arguments(plan: &Plan) -> Vec<String> {
    let of_kind = |kind: Kind| {
        let pairs = carried(plan, kind).into_iter();
        pairs.map(move |((from, to), value)| {
            let value = kind.argument(value);
            format!("hmat-lb,initiator={from},target={to},hierarchy=memory,{value}")
        })
    };
    of_kind(Kind::Latency)
        .chain(of_kind(Kind::Bandwidth))
        .collect()
}

/// What the reader should know of values that QEMU cannot carry as they are: the one that changes most of latencies and of
/// bandwidths, if it is by more than 1%.
pub fn warnings(plan: &Plan) -> Vec<String> {
    let of_kind = |(kind, what, unit): (Kind, &str, &str)| {
        let (planned, carried) = (planned(plan, kind), carried(plan, kind));
        let change = |((from, to), value): (&(u32, u32), &u64)| {
            let written = *carried.get(&(*from, *to))?;
            let thousandths = value.abs_diff(written) * 1000 / value;
            Some((thousandths, *from, *to, *value, written))
        };
        let worst = planned.iter().filter_map(change).max()?;
        let (thousandths, from, to, value, written) = worst;
        let largest = planned.values().max()?;
        (thousandths > WORTH_A_WARNING).then(|| {
            format!(
                "QEMU's HMAT says {written} {unit} instead of {value} {unit} for the {what} from domain {from} to {to}: its 16-bit entries also have to hold {largest} {unit}"
            )
        })
    };
    [
        (Kind::Latency, "latency", "ns"),
        (Kind::Bandwidth, "bandwidth", "MB/s"),
    ]
    .into_iter()
    .filter_map(of_kind)
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned_machine(text: &str) -> Plan {
        let machine = format!("name = \"m\"\n{text}");
        crate::plan(&crate::parse("m", &machine).unwrap()).unwrap()
    }

    /// A CPU node, a GPU with a Generic Initiator and one without.
    fn mixed(cpu: &str, first: &str, link: &str) -> Plan {
        planned_machine(&format!(
            "[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n{cpu}\n\
             [[gpu]]\nhbm = \"2GiB\"\ncpu = 0\ngeneric_initiator = true\n{first}\n\
             [[gpu]]\nhbm = \"2GiB\"\ncpu = 0\nhbm_latency_ns = 7\nhbm_bandwidth_mbs = 7\n\
             [[link]]\nfrom = \"gpu0\"\nto = \"gpu1\"\n{link}"
        ))
    }

    #[test]
    fn units_are_those_of_qemu() {
        let unit = |kind: Kind, values: &[u64]| kind.unit(values.iter().copied());
        assert_eq!(unit(Kind::Latency, &[100, 90, 346]), 1);
        assert_eq!(unit(Kind::Latency, &[5_000_000, 4_000_000]), 1_000_000);
        assert_eq!(unit(Kind::Latency, &[65_534, 1]), 1);
        assert_eq!(unit(Kind::Latency, &[65_535, 1]), 10);
        assert_eq!(unit(Kind::Latency, &[]), 1);
        assert_eq!(unit(Kind::Bandwidth, &[36_000, 1_600_000]), 32);
        // 1,600,000 is 50,000 times 32, and 50,000 is an odd multiple of 16.
        assert_eq!(unit(Kind::Bandwidth, &[50_000, 1_600_000]), 32);
        assert_eq!(rounded(50_000, 32), 50_016);
        assert_eq!(rounded(1, 32), 32);
        let widest = u64::from(u32::MAX);
        assert!(rounded(widest, unit(Kind::Bandwidth, &[widest])) >= widest);
    }

    #[test]
    fn pairs_without_a_possible_initiator_are_left_out() {
        let plan = mixed(
            "latency_ns = 100",
            "hbm_bandwidth_mbs = 50",
            "latency_ns = 900",
        );
        let domain = |gpu: usize| plan.gpus[gpu].domains[0].pxm;
        let (first, second) = (domain(0), domain(1));
        let hmat = hmat(&plan).unwrap();
        assert_eq!(
            hmat.initiators,
            [(0, true), (first, false)].into_iter().collect()
        );
        assert_eq!(hmat.attached, [(0, 0)].into_iter().collect());
        assert_eq!(
            hmat.latency_ps,
            [((0, 0), 100_000), ((first, second), 900_000)]
                .into_iter()
                .collect()
        );
        assert_eq!(
            hmat.bandwidth_mbs,
            [((first, first), 50)].into_iter().collect()
        );
        assert_eq!(
            arguments(&plan)[0],
            "hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=access-latency,latency=100"
        );
        assert_eq!(
            arguments(&plan)[2],
            format!(
                "hmat-lb,initiator={first},target={first},hierarchy=memory,data-type=access-bandwidth,bandwidth=50M"
            )
        );
    }

    #[test]
    fn a_machine_with_nothing_to_say_has_no_table() {
        let plan = mixed("", "", "");
        assert_eq!(plan.accesses.len(), 1);
        assert_eq!(hmat(&plan), None);
        assert_eq!(arguments(&plan), [""; 0]);
        assert_eq!(warnings(&plan), [""; 0]);
    }

    #[test]
    fn what_is_rounded_away_is_told() {
        let plan = mixed("latency_ns = 1", "hbm_latency_ns = 1000000", "");
        assert_eq!(hmat(&plan).unwrap().latency_ps[&(0, 0)], 100_000);
        assert_eq!(
            warnings(&plan),
            [
                "QEMU's HMAT says 100 ns instead of 1 ns for the latency from domain 0 to 0: its 16-bit entries also have to hold 1000000 ns"
            ]
        );
        let near = mixed("bandwidth_mbs = 50000", "hbm_bandwidth_mbs = 1600000", "");
        assert_eq!(hmat(&near).unwrap().bandwidth_mbs[&(0, 0)], 50_016);
        assert_eq!(warnings(&near), [""; 0]);
    }
}
