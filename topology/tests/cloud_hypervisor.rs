//! Cloud Hypervisor's command line: what of a machine it carries, what it loses, and everything for which it cannot carry it.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test fails by a panic"
)]

use numagpu_topology::cloud_hypervisor::{
    CloudHypervisorError, CommandLine, Host, Obstacle, Payload, command_line,
};
use numagpu_topology::size::GIB;
use numagpu_topology::{Plan, parse, plan};

const CPU: &str = "[[cpu]]\ncpus = 2\nmemory = \"1GiB\"\n";

fn planned(text: &str) -> Plan {
    plan(&parse("m.toml", &format!("name = \"m\"\n{text}")).unwrap()).unwrap()
}

fn line(plan: &Plan) -> Result<CommandLine, CloudHypervisorError> {
    command_line(plan, &Host::placeholders(plan, "s"))
}

fn values(arguments: &[String], option: &str) -> Vec<String> {
    let pairs = arguments.chunks(2).filter(|pair| pair[0] == option);
    pairs.map(|pair| pair[1].clone()).collect()
}

fn private(aperture: &str) -> String {
    format!("[[gpu]]\nhbm = \"2GiB\"\ncpu = 0\nexposure = \"private\"\naperture = \"{aperture}\"\n")
}

#[test]
fn everything_that_is_in_the_way_is_named() {
    let gpu = "[[gpu]]\nhbm = \"2GiB\"\ncpu = 0\n";
    let text = format!("[limits]\nphys_bits = 44\n{CPU}{}", gpu.repeat(96));
    let plan = planned(&text);
    let mut host = Host::placeholders(&plan, "s");
    host.sockets.pop();
    let error = command_line(&plan, &host).unwrap_err();
    assert_eq!(error.0.len(), 3);
    let text = error.to_string();
    for words in [
        "96 HBM range(s) of 192 GiB in all (gpu0, gpu1, ",
        "are soft reserved, and its memory map has RAM and reserved ranges only (use --format qemu); and ",
        "96 GPUs need a PCI segment each, and it has 95 beside",
        "the plan has 96 GPUs, the host 95 sockets",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
}

#[test]
fn nodes_have_the_numbers_that_linux_gives() {
    // QEMU's domains are CPU, memory, GPU; Linux meets Generic Initiators before memory without CPUs.
    let text = format!(
        "{CPU}[[memory]]\nmemory = \"64MiB\"\ncpu = 0\n[[gpu]]\nhbm = \"1GiB\"\ncpu = 0\nexposure = \"bar\"\ndomains = 2\n"
    );
    let plan = planned(&text);
    let line = line(&plan).unwrap();
    assert_eq!(
        values(&line.arguments, "--numa"),
        [
            "guest_numa_id=0,cpus=[0-1],memory_zones=[mem0],distances=[1@15,2@15,3@15],pci_segments=[1]",
            "guest_numa_id=1,device_id=gpu0,distances=[0@15,2@12,3@30]",
            "guest_numa_id=2,device_id=gpu0,distances=[0@15,1@12,3@30]",
            "guest_numa_id=3,memory_zones=[mem3],distances=[0@15,1@30,2@30]",
        ]
    );
    assert_eq!(
        line.warnings[0],
        "proximity domains have the numbers of Linux's nodes (PXM 1 is 3, PXM 2 is 1, PXM 3 is 2): Cloud Hypervisor names them in ascending order"
    );
    // RAM is where it is planned as long as there is less than 2816 MiB.
    assert_eq!(line.warnings.len(), 2);
}

#[test]
fn a_segment_with_a_large_bar_gets_a_larger_window() {
    let gpus = private("1TiB") + &private("4GiB").repeat(3);
    let plan = planned(&format!("[limits]\nphys_bits = 42\n{CPU}{gpus}"));
    let weights = values(&line(&plan).unwrap().arguments, "--pci-segment");
    assert_eq!(weights, ["pci_segment=1,mmio64_aperture_weight=256"]);
    // Where all are alike, equal windows do.
    let plan = planned(&format!(
        "[limits]\nphys_bits = 42\n{CPU}{}",
        private("4GiB")
    ));
    assert!(values(&line(&plan).unwrap().arguments, "--pci-segment").is_empty());
}

#[test]
fn apertures_that_do_not_fit_say_with_what_they_would() {
    let machine = |bits: u32| {
        let gpus = private("256GiB").repeat(2);
        planned(&format!("[limits]\nphys_bits = {bits}\n{CPU}{gpus}"))
    };
    let error = line(&machine(40)).unwrap_err();
    let Obstacle::Apertures {
        apertures,
        space,
        needed,
    } = &error.0[0]
    else {
        unreachable!("{error}");
    };
    assert_eq!(apertures, &["gpu0 256 GiB", "gpu1 256 GiB"]);
    assert_eq!(space.base, 4 * GIB);
    assert!(line(&machine(needed.unwrap())).is_ok());
    assert_eq!(
        error.to_string(),
        "Cloud Hypervisor cannot carry this machine: the 64-bit BARs of 2 GPU(s) (apertures: gpu0 256 GiB, gpu1 256 GiB) do not fit into 0x100000000..0xffffef0000, which its PCI segments divide among themselves; they do with limits.phys_bits = 41"
    );
}

#[test]
fn the_hosts_places_are_in_the_line() {
    let plan = planned(&format!("{CPU}{}", private("2GiB")));
    let host = Host {
        payload: Payload::Firmware("CLOUDHV.fd".to_owned()),
        sockets: vec!["a,b/gpu.sock".to_owned()],
        console: Some("log[1]".to_owned()),
    };
    let arguments = command_line(&plan, &host).unwrap().arguments;
    assert_eq!(values(&arguments, "--firmware"), ["CLOUDHV.fd"]);
    assert_eq!(values(&arguments, "--serial"), ["file=\"log[1]\""]);
    assert_eq!(
        values(&arguments, "--user-device"),
        ["socket=\"a,b/gpu.sock\",id=gpu0,pci_segment=1,pci_device_id=0"]
    );
    for option in ["--kernel", "--initramfs", "--cmdline", "--pci-segment"] {
        assert!(values(&arguments, option).is_empty(), "{option}");
    }
}
