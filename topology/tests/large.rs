//! Machines larger than QEMU's: they have a plan, and QEMU's command line says what is too much.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test fails by a panic"
)]

use std::collections::BTreeSet;

use numagpu_topology::acpi::tables;
use numagpu_topology::linux::BootPath;
use numagpu_topology::qemu::{self, Host, QemuError};
use numagpu_topology::{Plan, memory_map, parse, plan, render};

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

/// Every name in AML has four characters: a letter and three digits of base 36.
#[test]
fn every_gpu_of_512_has_a_bridge_and_a_function_of_its_own_in_the_ssdt() {
    let tables = tables(&machine(512, 512, 1));
    let ssdt = tables.iter().find(|table| table.signature == "SSDT");
    let bytes = &ssdt.unwrap().bytes;
    // DeviceOp, a package length of one byte or two, the name.
    let devices: BTreeSet<&[u8]> = (0..bytes.len())
        .filter(|at| bytes[*at..].starts_with(&[0x5b, 0x82]))
        .map(|at| {
            let name = at + 3 + usize::from(bytes[at + 2] >> 6);
            &bytes[name..name + 4]
        })
        .collect();
    assert_eq!(devices.len(), 1024);
    for name in [b"P000", b"G073", b"G074", b"P074", b"P0E7"] {
        assert!(devices.contains(&name[..]), "{name:?}");
    }
    // A GPU on segment 4, bus 0x21: `Name (_UID, 0x0421)`, `Name (_SEG, 0x04)`.
    let has = |wanted: &[u8]| bytes.windows(wanted.len()).any(|window| window == wanted);
    assert!(has(b"\x08_UID\x0b\x21\x04") && has(b"\x08_SEG\x0a\x04"));
}

#[test]
fn a_generic_initiator_is_named_with_its_segment() {
    let plan = machine(512, 512, 1);
    let tables = tables(&plan);
    let srat = tables.iter().find(|table| table.signature == "SRAT");
    let bytes = &srat.unwrap().bytes;
    // Type 5, 32 bytes, a PCI handle; the last GPU's domain; segment 4, bus 0x25.
    let pxm = plan.gpus[511].domains[0].pxm.to_le_bytes();
    let entry = [&[5, 32, 0, 1], &pxm[..], &[4, 0, 0x25, 0]].concat();
    assert!(bytes.windows(entry.len()).any(|window| window == entry));
}

/// SLIT and HMAT are matrices of the nodes; all else that is written grows with nodes, GPUs and links.
#[test]
fn twice_the_machine_has_at_most_twice_the_bytes_outside_matrices() {
    let written = |plan: &Plan| {
        let matrices = ["SLIT", "HMAT"];
        let all = tables(plan);
        let rest = all.iter().filter(|t| !matrices.contains(&t.signature));
        let params = memory_map::boot_params(plan);
        rest.map(|table| table.bytes.len()).sum::<usize>()
            + params.table.len()
            + params.overflow.len()
            + memory_map::fw_cfg_e820(plan).len()
            + memory_map::pvh_memory_map(plan).len()
            + memory_map::efi_memory_map(plan).len()
            + render::e820(plan).len()
    };
    let (half, whole) = (machine(256, 256, 1), machine(512, 512, 1));
    let (half_bytes, whole_bytes) = (written(&half), written(&whole));
    // A tenth for entries that grow with the numbers in them: x2APIC ids, segments.
    assert!(
        whole_bytes * 10 <= half_bytes * 2 * 11,
        "{half_bytes} {whole_bytes}"
    );
    let slit = |plan: &Plan| tables(plan)[1].bytes.len();
    assert_eq!(slit(&whole), 44 + 1024 * 1024);
    assert_eq!(slit(&half), 44 + 512 * 512);
}
