//! Machines larger than QEMU's: they have a plan, and QEMU's command line says what is too much.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

use std::collections::BTreeSet;

use numagpu_topology::linux::BootPath;
use numagpu_topology::qemu::{self, Host, QemuError};
use numagpu_topology::{Plan, parse, plan};

fn machine(cpus: usize, gpus: usize, partitions: usize) -> Plan {
    let cpu = "[[cpu]]\ncpus = 1\nmemory = \"64MiB\"\n".repeat(cpus);
    let gpu = format!(
        "[[gpu]]\nhbm = \"4GiB\"\ncpu = 0\npartitions = {partitions}\ngeneric_initiator = true\n"
    );
    let text = format!(
        "name = \"m\"\n[limits]\nphys_bits = 46\n{cpu}{}",
        gpu.repeat(gpus)
    );
    plan(&parse("m.toml", &text).unwrap()).unwrap()
}

fn refused(plan: &Plan) -> Option<QemuError> {
    let host = Host::placeholders(plan, BootPath::SeaBios, "s", "h");
    qemu::arguments(plan, &host).err()
}

#[test]
fn a_machine_of_1024_nodes_and_512_gpus_has_a_plan() {
    let plan = machine(512, 512, 1);
    assert_eq!((plan.nodes.len(), plan.slit.len()), (1024, 1024));
    let addresses: BTreeSet<&str> = plan.gpus.iter().map(|gpu| gpu.bdf.as_str()).collect();
    assert_eq!(addresses.len(), 512);
    // 120 GPUs to a segment.
    assert!(addresses.contains("11:00.0") && addresses.contains("ff:00.0"));
    assert!(addresses.contains("0001:11:00.0") && addresses.contains("0004:21:00.0"));
    let numbers: BTreeSet<u32> = plan.nodes.iter().map(|node| node.linux_node).collect();
    assert_eq!(numbers, (0..1024).collect());
    let too_many = refused(&plan).unwrap();
    assert_eq!(too_many, QemuError::TooManyNodes { nodes: 1024 });
    assert_eq!(
        too_many.to_string(),
        "QEMU takes at most 128 NUMA nodes and the machine has 1024: each CPU node and each HBM partition is one"
    );
}

#[test]
fn qemu_takes_128_nodes_and_28_gpus() {
    assert_eq!(refused(&machine(16, 28, 4)), None);
    assert_eq!(
        refused(&machine(17, 28, 4)),
        Some(QemuError::TooManyNodes { nodes: 129 })
    );
    assert_eq!(
        refused(&machine(1, 29, 1)),
        Some(QemuError::TooManyGpus { gpus: 29 })
    );
}
