//! Pictures and hwloc's XML: well-formed, and nothing of the plan is left out.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test fails by a panic"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;

use numagpu_topology::machine::Exposure;
use numagpu_topology::plan::{NodeKind, Plan};
use numagpu_topology::{parse, plan, preset, render};
use roxmltree::{Document, Node, ParsingOptions};

fn planned(text: &str) -> Plan {
    plan(&parse("machine.toml", text).unwrap()).unwrap()
}

/// Both presets; a machine with partitions, some of them online; one GPU; 32 GPUs; words that XML has to escape.
fn machines() -> Vec<Plan> {
    let mut all: Vec<Plan> = preset::ALL.iter().map(|p| planned(p.source)).collect();
    let cpus = |count: u32, each: u32| {
        format!("[[cpu]]\ncpus = {each}\nmemory = \"1GiB\"\n").repeat(count as usize)
    };
    let mut nps = format!("name = \"nps\"\n{}", cpus(2, 40));
    for gpu in 0..4 {
        let (cpu, initiator) = (gpu / 2, gpu % 2 == 0);
        writeln!(
            nps,
            "[[gpu]]\nhbm = \"8GiB\"\npartitions = 4\ncpu = {cpu}\ngeneric_initiator = {initiator}"
        )
        .unwrap();
    }
    nps += "[[link]]\nfrom = \"gpu0\"\nto = \"cpu1\"\n[[link]]\nfrom = \"gpu1\"\nto = \"gpu3\"\n";
    all.push(planned(&nps));
    all.push(planned(&format!(
        "name = \"a <&> \\\" '\\u0001 b\"\ndescription = \"<![CDATA[ -- ]]> \\n \\\\\"\n{}[[gpu]]\nhbm = \"2MiB\"\ncpu = 0\n",
        cpus(1, 1)
    )));
    let mut many = format!("name = \"many\"\n{}", cpus(4, 32));
    for gpu in 0..32 {
        writeln!(many, "[[gpu]]\nhbm = \"1GiB\"\ncpu = {}", gpu / 8).unwrap();
    }
    for gpu in 0..32 {
        let peer = (gpu + 9) % 32;
        writeln!(
            many,
            "[[link]]\nfrom = \"gpu{gpu}\"\nto = \"gpu{peer}\"\nbandwidth_mbs = {}",
            gpu * 500
        )
        .unwrap();
    }
    all.push(planned(&many));
    all
}

fn attribute<'a>(node: &Node<'a, '_>, name: &str) -> &'a str {
    node.attribute(name).unwrap_or_default()
}

fn elements<'a, 'i>(document: &'a Document<'i>, name: &str) -> Vec<Node<'a, 'i>> {
    let all = document.descendants();
    all.filter(|node| node.has_tag_name(name)).collect()
}

/// Both names of each link, once.
fn pairs(plan: &Plan) -> BTreeSet<(String, String)> {
    let links = plan.gpus.iter().flat_map(|gpu| {
        gpu.links.iter().map(|link| {
            let (a, b) = (gpu.id.clone(), link.peer.clone());
            let swapped = plan
                .gpus
                .iter()
                .any(|peer| peer.id == b && peer.index < gpu.index);
            if swapped { (b, a) } else { (a, b) }
        })
    });
    links.collect()
}

#[test]
fn svg_is_xml_that_has_every_node_gpu_and_link() {
    for plan in machines() {
        let svg = render::svg(&plan);
        let document = Document::parse(&svg).unwrap();
        let root = document.root_element();
        assert_eq!(
            root.tag_name().namespace(),
            Some("http://www.w3.org/2000/svg")
        );
        let titles: Vec<&str> = document
            .descendants()
            .filter(|node| node.tag_name().name() == "title")
            .filter_map(|node| node.text())
            .collect();
        let texts: Vec<&str> = document
            .descendants()
            .filter(|node| node.tag_name().name() == "text")
            .filter_map(|node| node.text())
            .collect();
        for gpu in &plan.gpus {
            let title = format!("{} {} · {}", gpu.id, gpu.bdf, gpu.exposure);
            assert!(titles.contains(&title.as_str()), "{title}");
        }
        // Domains without memory are drawn as one, at their GPU.
        let (empty, nodes): (Vec<_>, Vec<_>) =
            plan.nodes.iter().partition(|node| node.ranges.is_empty());
        for node in nodes {
            let numbers = format!("node {} · PXM {}", node.linux_node, node.pxm);
            assert!(texts.contains(&numbers.as_str()), "{numbers}");
        }
        for gpu in empty.chunk_by(|a, b| a.gpu == b.gpu) {
            let (first, last) = (gpu[0], gpu[gpu.len() - 1]);
            let run = |from: u32, to: u32| format!("{from}-{to}");
            let numbers = format!(
                "nodes {} · PXM {}",
                run(first.linux_node, last.linux_node),
                run(first.pxm, last.pxm)
            );
            assert!(texts.contains(&numbers.as_str()), "{numbers}");
        }
        for entry in &plan.e820 {
            let range = format!("{:#x}-{:#x} ", entry.base, entry.base + entry.size - 1);
            assert!(
                titles.iter().any(|title| title.starts_with(&range)),
                "{range}"
            );
        }
        let pairs = pairs(&plan);
        for (from, to) in &pairs {
            let start = format!("{from} - {to}: ");
            let found: Vec<_> = document
                .descendants()
                .filter(|node| node.tag_name().name() == "title")
                .filter(|node| node.text().is_some_and(|text| text.starts_with(&start)))
                .collect();
            assert_eq!(found.len(), 1, "{start}");
            // The title stands for something drawn.
            let group = found[0].parent().unwrap();
            let shape = |node: Node| ["line", "path"].contains(&node.tag_name().name());
            assert!(group.children().any(shape), "{start}");
        }
        let distances = plan.slit.iter().flatten().map(ToString::to_string);
        for distance in distances.collect::<BTreeSet<_>>() {
            assert!(texts.contains(&distance.as_str()));
        }
    }
}

/// Rectangles that stand for GPUs and CPU nodes do not overlap, and nothing is outside the picture.
#[test]
fn svg_boxes_are_apart_and_inside() {
    for plan in machines() {
        let svg = render::svg(&plan);
        let document = Document::parse(&svg).unwrap();
        let value = |node: &Node, name: &str| -> f64 { attribute(node, name).parse().unwrap() };
        let root = document.root_element();
        let (width, height) = (value(&root, "width"), value(&root, "height"));
        let mut boxes: Vec<[f64; 4]> = Vec::new();
        for part in root
            .children()
            .filter(|node| node.has_attribute("transform"))
        {
            let transform = attribute(&part, "transform");
            let inner = transform.strip_prefix("translate(").unwrap();
            let (x, y) = inner.strip_suffix(')').unwrap().split_once(' ').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            for rect in part
                .descendants()
                .filter(|node| node.tag_name().name() == "rect")
            {
                let (left, top) = (x + value(&rect, "x"), y + value(&rect, "y"));
                let (right, bottom) = (left + value(&rect, "width"), top + value(&rect, "height"));
                assert!(left >= 0.0 && top >= 0.0 && right <= width && bottom <= height);
                if rect.attribute("rx") == Some("6") {
                    boxes.push([left, top, right, bottom]);
                }
            }
        }
        let cpus = plan.nodes.iter().filter(|node| node.kind == NodeKind::Cpu);
        assert_eq!(boxes.len(), plan.gpus.len() + cpus.count());
        for (index, a) in boxes.iter().enumerate() {
            for b in &boxes[index + 1..] {
                let apart = a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
                assert!(apart, "{}: {a:?} {b:?}", plan.name);
            }
        }
    }
}

#[test]
fn dot_has_every_node_gpu_and_link() {
    for plan in machines() {
        let dot = render::dot(&plan);
        assert_eq!(
            dot.matches("subgraph ").count() + 1,
            dot.lines().filter(|line| line.trim() == "}").count()
        );
        for line in dot.lines() {
            let quotes = line
                .replace("\\\\", "")
                .replace("\\\"", "")
                .matches('"')
                .count();
            assert!(quotes.is_multiple_of(2), "{line}");
        }
        for node in plan.nodes.iter().filter(|node| !node.ranges.is_empty()) {
            let numbers = format!("PXM {}, Linux node {}", node.pxm, node.linux_node);
            // A GPU whose HBM is the node's RAM names the node again.
            let gpus = plan.gpus.iter();
            let again = gpus.filter(|g| g.exposure == Exposure::Ram && g.cpu_pxm == node.pxm);
            assert_eq!(
                dot.matches(&format!("{numbers},")).count()
                    + dot.matches(&format!("{numbers}\"")).count(),
                1 + again.count()
            );
        }
        let bar = plan.gpus.iter().filter(|gpu| gpu.exposure == Exposure::Bar);
        assert_eq!(dot.matches(", Linux nodes ").count(), bar.count());
        for gpu in &plan.gpus {
            assert_eq!(dot.matches(&format!("    \"{}\" [", gpu.id)).count(), 1);
        }
        for (from, to) in pairs(&plan) {
            let either = [
                format!("\"{from}\" -- \"{to}\""),
                format!("\"{to}\" -- \"{from}\""),
            ];
            let lines = dot.lines().filter(|line| !line.contains("dotted"));
            let found = lines.filter(|line| either.iter().any(|link| line.contains(link)));
            assert_eq!(found.count(), 1, "{from} {to}");
        }
    }
}

#[test]
fn hwloc_has_every_node_gpu_and_distance() {
    for plan in machines() {
        let xml = render::hwloc(&plan);
        let options = ParsingOptions {
            allow_dtd: true,
            ..ParsingOptions::default()
        };
        let document = Document::parse_with_options(&xml, options).unwrap();
        assert_eq!(document.root_element().attribute("version"), Some("2.0"));
        let objects = elements(&document, "object");
        let of = |kind: &str| -> Vec<_> {
            let of_kind = objects
                .iter()
                .filter(|node| attribute(node, "type") == kind);
            of_kind.copied().collect()
        };
        let numbers: BTreeSet<&str> = objects
            .iter()
            .map(|node| attribute(node, "gp_index"))
            .collect();
        assert_eq!(numbers.len(), objects.len());
        assert!(!numbers.contains("0"));
        assert_eq!(of("NUMANode").len(), plan.nodes.len());
        assert_eq!(of("PCIDev").len(), plan.gpus.len());
        assert_eq!(of("PU").len(), plan.cpu_count());
        for node in &plan.nodes {
            let index = node.linux_node.to_string();
            let found: Vec<_> = of("NUMANode")
                .into_iter()
                .filter(|object| attribute(object, "os_index") == index)
                .collect();
            assert_eq!(found.len(), 1);
            let bytes: u64 = node.ranges.iter().map(|range| range.size).sum();
            assert_eq!(attribute(&found[0], "local_memory"), bytes.to_string());
            let info = |name: &str| {
                let mut infos = found[0]
                    .children()
                    .filter(|info| info.attribute("name") == Some(name));
                infos
                    .next()
                    .map(|info| attribute(&info, "value").to_owned())
            };
            assert_eq!(info("Online").unwrap() == "yes", node.online);
            assert_eq!(info("ProximityDomain").unwrap(), node.pxm.to_string());
            assert_eq!(info("GPU"), node.gpu);
        }
        for element in ["indexes", "u64values"] {
            for list in elements(&document, element) {
                assert_eq!(
                    attribute(&list, "length"),
                    list.text().unwrap().len().to_string()
                );
            }
        }
    }
}
