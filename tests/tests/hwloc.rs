//! What hwloc itself makes of the XML of every preset.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use numagpu_topology::plan::{NodeKind, Plan};
use numagpu_topology::{parse, plan, preset, render};
use roxmltree::{Document, Node, ParsingOptions};

/// Reads the plan's XML with lstopo and gives what that writes.
#[track_caller]
fn lstopo(plan: &Plan, arguments: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("machine.xml");
    fs::write(&file, render::hwloc(plan)).unwrap();
    let output = Command::new("lstopo-no-graphics")
        .arg("-i")
        .arg(&file)
        .args(arguments)
        // Says what it ignores, and ends where an object is in a wrong place.
        .env("HWLOC_XML_VERBOSE", "1")
        .env("HWLOC_DEBUG_CHECK", "1")
        .output()
        .unwrap_or_else(|error| {
            panic!("lstopo-no-graphics: {error}; install hwloc-nox; cargo xtask test does")
        });
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{}: {errors}", plan.name);
    assert_eq!(errors, "", "{}", plan.name);
    String::from_utf8(output.stdout).unwrap()
}

fn attribute<'a>(node: &Node<'a, '_>, name: &str) -> &'a str {
    node.attribute(name).unwrap_or_default()
}

fn objects<'a, 'i>(within: Node<'a, 'i>, kind: &str) -> Vec<Node<'a, 'i>> {
    within
        .descendants()
        .filter(|node| node.has_tag_name("object") && attribute(node, "type") == kind)
        .collect()
}

/// All numbers of a matrix' elements of one name.
fn numbers(matrix: &Node, element: &str) -> Vec<u64> {
    let lists = matrix.children().filter(|node| node.has_tag_name(element));
    lists
        .flat_map(|list| list.text().unwrap_or_default().split_whitespace())
        .map(|number| number.parse().unwrap())
        .collect()
}

fn matrix<'a, 'i>(document: &'a Document<'i>, name: &str) -> Node<'a, 'i> {
    let mut found = document
        .descendants()
        .filter(|node| node.has_tag_name("distances2") && attribute(node, "name") == name);
    found.next().unwrap_or_else(|| panic!("no {name}"))
}

/// Presets, and a machine whose sets need more than one word.
fn machines() -> Vec<Plan> {
    let mut texts: Vec<String> = preset::ALL.iter().map(|p| p.source.to_owned()).collect();
    texts.push(
        "name = \"a <&> \\\" b\"\n\
         [[cpu]]\ncpus = \"0-19,40-59\"\nmemory = \"1GiB\"\n\
         [[cpu]]\ncpus = \"20-39,60-79\"\nmemory = \"1GiB\"\n\
         [[gpu]]\nhbm = \"16GiB\"\npartitions = 8\ncpu = 1\ngeneric_initiator = true\n\
         [[gpu]]\nhbm = \"16GiB\"\npartitions = 8\ncpu = 0\n\
         [[gpu]]\nhbm = \"32GiB\"\npartitions = 8\ncpu = 1\n\
         [[gpu]]\nhbm = \"32GiB\"\npartitions = 8\ncpu = 0\npci_node = \"hbm\"\ngeneric_initiator = true\n\
         [[link]]\nfrom = \"gpu0\"\nto = \"gpu1\"\nbandwidth_mbs = 64000\n"
            .to_owned(),
    );
    let planned = |text: String| plan(&parse("machine.toml", &text).unwrap()).unwrap();
    texts.into_iter().map(planned).collect()
}

#[test]
fn lstopo_reads_every_machine_as_planned() {
    for plan in machines() {
        let xml = lstopo(&plan, &["--of", "xml"]);
        let options = ParsingOptions {
            allow_dtd: true,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(&xml, options).unwrap();
        let root = document.root_element();
        let sizes: BTreeMap<u32, u64> = objects(root, "NUMANode")
            .iter()
            .map(|node| {
                let index = attribute(node, "os_index").parse().unwrap();
                // lstopo leaves it out where there is none.
                let bytes = node.attribute("local_memory").unwrap_or("0");
                (index, bytes.parse().unwrap())
            })
            .collect();
        let planned: BTreeMap<u32, u64> = plan
            .nodes
            .iter()
            .map(|node| (node.linux_node, node.ranges.iter().map(|r| r.size).sum()))
            .collect();
        assert_eq!(sizes, planned, "{}", plan.name);
        assert_eq!(objects(root, "NUMANode").len(), plan.nodes.len());
        check_packages(&plan, root);
        check_distances(&plan, &document);
    }
}

/// CPUs, memory and PCI devices of each CPU node.
fn check_packages(plan: &Plan, root: Node) {
    let cpu_nodes = plan.nodes.iter().filter(|node| node.kind == NodeKind::Cpu);
    let packages = objects(root, "Package");
    assert_eq!(packages.len(), cpu_nodes.clone().count());
    for cpu in cpu_nodes {
        let package = packages
            .iter()
            .find(|package| attribute(package, "os_index") == cpu.pxm.to_string())
            .unwrap();
        let sorted = |kind: &str, key: &str| {
            let mut all: Vec<String> = objects(*package, kind)
                .iter()
                .map(|node| attribute(node, key).to_owned())
                .collect();
            all.sort();
            all
        };
        let mut cpus: Vec<String> = cpu.cpus.iter().map(ToString::to_string).collect();
        cpus.sort();
        assert_eq!(sorted("PU", "os_index"), cpus);
        let gpus = plan.gpus.iter().filter(|gpu| gpu.cpu_pxm == cpu.pxm);
        let mut devices: Vec<String> = gpus
            .clone()
            .map(|gpu| format!("0000:{}", gpu.bdf))
            .collect();
        devices.sort();
        assert_eq!(sorted("PCIDev", "pci_busid"), devices);
        for device in objects(*package, "PCIDev") {
            let ids = format!(
                "{:04x} [{id}] [{id}]",
                numagpu_spec::pci::CLASS_CODE >> 8,
                id = format_args!(
                    "{:04x}:{:04x}",
                    numagpu_spec::pci::VENDOR_ID,
                    numagpu_spec::pci::DEVICE_ID
                )
            );
            assert!(attribute(&device, "pci_type").starts_with(&ids));
        }
        let memory = |node: &&numagpu_topology::plan::Node| {
            node.kind == NodeKind::Hbm && node.cpu_pxm == Some(cpu.pxm)
        };
        let mut nodes: Vec<String> = gpus
            .flat_map(|gpu| &gpu.domains)
            .filter_map(|domain| plan.linux_node(domain.pxm))
            .chain([cpu.linux_node])
            .chain(plan.ram_nodes().filter(memory).map(|node| node.linux_node))
            .map(|node| node.to_string())
            .collect();
        nodes.sort();
        assert_eq!(sorted("NUMANode", "os_index"), nodes);
    }
}

fn check_distances(plan: &Plan, document: &Document) {
    let latencies = matrix(document, "NUMALatency");
    let indexes = numbers(&latencies, "indexes");
    assert_eq!(indexes.len(), plan.nodes.len());
    let pxm = |linux: u64| {
        let of = plan
            .nodes
            .iter()
            .find(|node| u64::from(node.linux_node) == linux);
        of.unwrap().pxm
    };
    let planned: Vec<u64> = indexes
        .iter()
        .flat_map(|row| indexes.iter().map(move |column| (*row, *column)))
        .map(|(row, column)| u64::from(plan.distance(pxm(row), pxm(column)).unwrap()))
        .collect();
    assert_eq!(numbers(&latencies, "u64values"), planned, "{}", plan.name);

    let mut links = plan.gpus.iter().flat_map(|gpu| &gpu.links);
    if !links.any(|link| link.peer_hive_node.is_some() && link.bandwidth_mbs > 0) {
        let named = |node: Node| attribute(&node, "name") == "XGMIBandwidth";
        let all = document.descendants();
        assert!(
            !all.filter(|node| node.has_tag_name("distances2"))
                .any(named)
        );
        return;
    }
    let bandwidths = matrix(document, "XGMIBandwidth");
    let devices = objects(document.root_element(), "PCIDev");
    let gpus: Vec<_> = numbers(&bandwidths, "indexes")
        .into_iter()
        .map(|index| {
            let number = index.to_string();
            let device = devices
                .iter()
                .find(|device| attribute(device, "gp_index") == number);
            let bus = attribute(device.unwrap(), "pci_busid")
                .strip_prefix("0000:")
                .unwrap();
            plan.gpus.iter().find(|gpu| gpu.bdf == bus).unwrap()
        })
        .collect();
    assert_eq!(gpus.len(), plan.gpus.len());
    let values = numbers(&bandwidths, "u64values");
    for (row, a) in gpus.iter().enumerate() {
        for (column, b) in gpus.iter().enumerate().filter(|(column, _)| *column != row) {
            let link = a.links.iter().find(|link| link.peer == b.id);
            let planned = link.map_or(0, |link| link.bandwidth_mbs);
            assert_eq!(values[row * gpus.len() + column], u64::from(planned));
        }
    }
}

#[test]
fn lstopo_shows_a_picture_of_every_machine() {
    for plan in machines() {
        let text = lstopo(&plan, &["--of", "console"]);
        assert_eq!(
            text.matches("NUMANode(SPM)").count(),
            plan.hbm().count(),
            "{text}"
        );
        let empty = plan.nodes.iter().filter(|node| node.ranges.is_empty());
        assert_eq!(text.matches("NUMANode(GPUMemory)").count(), empty.count());
        for gpu in &plan.gpus {
            let line = format!("PCI {} (ProcessingAccelerator)", gpu.bdf);
            assert_eq!(text.matches(&line).count(), 1, "{text}");
        }
    }
}
