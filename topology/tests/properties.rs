//! What holds for every machine: a random one is either refused with a message, or its plan keeps all the rules.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test fails by a panic"
)]

use std::collections::BTreeSet;
use std::fmt::Write;

use numagpu_topology::cloud_hypervisor::{self, Obstacle};
use numagpu_topology::linux::{self, BootPath};
use numagpu_topology::machine::{Exposure, Machine};
use numagpu_topology::plan::{Aperture, Gpu, Hbm, NodeKind, Plan};
use numagpu_topology::qemu::{self, Host};
use numagpu_topology::ranges::Range;
use numagpu_topology::size::{GIB, MIB};
use numagpu_topology::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED};
use numagpu_topology::{parse, plan, platform, predict, preset, render};
use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::{Index, select};

/// A GPU of the text: HBM in units of 2 MiB for each partition, and what else it says.
#[derive(Clone, Debug)]
struct GpuText {
    units: u64,
    partitions: u64,
    cpu: Index,
    initiator: bool,
    on_hbm: bool,
    base: Option<u64>,
    bus: Option<u32>,
    id: Option<String>,
    exposure: &'static str,
    domains: u32,
}

impl GpuText {
    /// Whether the text keeps what its exposure makes likely to be refused.
    fn is_spm(&self) -> bool {
        self.exposure == "spm"
    }

    /// Proximity domains of its own.
    fn domains(&self) -> u64 {
        match self.exposure {
            "spm" => self.partitions,
            "bar" => u64::from(self.domains),
            _ => 0,
        }
    }

    fn partitions(&self) -> u64 {
        if self.exposure == "ram" {
            1
        } else {
            self.partitions
        }
    }
}

#[derive(Clone, Debug)]
struct MachineText {
    cpus: Vec<(u32, u64)>,
    /// Memory nodes: CPU node and units of RAM.
    memory: Vec<(Index, u64)>,
    /// Where the PCI hole begins, in units, and whether AMD's range is reserved.
    holes: (Option<u64>, bool),
    interleaved: bool,
    /// Whether it keeps what is likely to be refused: links as they come, any base and bus.
    wild: bool,
    gpus: Vec<GpuText>,
    links: Vec<(Index, Index, u32)>,
    distances: Option<[u32; 6]>,
    matrix: Option<Vec<u32>>,
    phys_bits: u32,
    align_shift: u32,
    gap_units: u64,
}

/// Sizes in units of 2 MiB: small ones, GiBs, and such as reach the HyperTransport range.
fn units() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => 1u64..2048,
        5 => (1u64..64).prop_map(|gib| gib * 512),
        2 => (64u64..600).prop_map(|gib| gib * 512),
        1 => (1u64..16).prop_map(|tib| tib << 19),
    ]
}

fn gpu_text() -> impl Strategy<Value = GpuText> {
    let base = prop_oneof![
        (0u64..2048).prop_map(|gib| gib * GIB),
        (0u64..1 << 20).prop_map(|units| units * 2 * MIB),
        select(vec![
            1 << 40,
            1 << 51,
            (1 << 52) - 2 * MIB,
            u64::MAX / MIB / 2 * 2 * MIB
        ]),
    ];
    (
        units(),
        prop_oneof![4 => Just(1u64), 2 => 2u64..5, 1 => 5u64..9],
        any::<Index>(),
        weighted(0.3, any::<bool>()),
        weighted(0.12, base),
        weighted(0.1, 0u32..258),
        weighted(0.2, "[a-z][a-z0-9_-]{0,5}"),
        prop_oneof![5 => Just("spm"), 1 => Just("ram"), 1 => Just("bar"), 1 => Just("private")],
        1u32..9,
    )
        .prop_map(
            |(units, partitions, cpu, initiator, base, bus, id, exposure, domains)| GpuText {
                units,
                partitions,
                cpu,
                initiator: initiator.is_some(),
                on_hbm: initiator == Some(true),
                base,
                bus,
                id,
                exposure,
                domains: domains.max(u32::try_from(partitions).unwrap()),
            },
        )
}

fn machine_text() -> impl Strategy<Value = MachineText> {
    (
        (
            vec((1u32..5, units()), 1..5),
            prop_oneof![3 => vec((any::<Index>(), units()), 0..1), 1 => vec((any::<Index>(), units()), 1..3)],
            (weighted(0.2, 100u64..1500), weighted(0.2, Just(()))),
        ),
        any::<(bool, bool)>(),
        vec(gpu_text(), 0..9),
        vec((any::<Index>(), any::<Index>(), 1u32..5), 0..8),
        weighted(0.4, prop::array::uniform6(11u32..256)),
        weighted(0.1, vec(11u32..256, 64)),
        prop_oneof![1 => 36u32..44, 4 => 44u32..53],
        0u32..16,
        prop_oneof![2 => 1u64..4096, 2 => (1u64..16).prop_map(|gib| gib * 512), 1 => Just(0)],
    )
        .prop_map(
            |(
                (cpus, memory, (hole, intel)),
                (interleaved, wild),
                gpus,
                links,
                distances,
                matrix,
                phys_bits,
                align_shift,
                gap_units,
            )| {
                MachineText {
                    cpus,
                    memory,
                    holes: (hole, intel.is_none()),
                    interleaved,
                    wild,
                    gpus,
                    links,
                    distances,
                    matrix,
                    phys_bits,
                    align_shift,
                    gap_units,
                }
            },
        )
}

impl MachineText {
    fn render(&self) -> String {
        let mut out = String::from("name = \"random\"\n");
        self.write(&mut out).unwrap();
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let nodes = self.cpus.len();
        for (index, (cpus, units)) in self.cpus.iter().enumerate() {
            writeln!(out, "[[cpu]]\nmemory = \"{}MiB\"", units * 2)?;
            if self.interleaved {
                writeln!(out, "cpus = \"{index},{}\"", index + nodes)?;
            } else {
                writeln!(out, "cpus = {cpus}")?;
            }
        }
        let mut ends: Vec<String> = (0..nodes).map(|i| format!("cpu{i}")).collect();
        for (index, gpu) in self.gpus.iter().enumerate() {
            let hbm = gpu.units * gpu.partitions() * 2;
            writeln!(out, "[[gpu]]\nhbm = \"{hbm}MiB\"")?;
            writeln!(
                out,
                "partitions = {}\ncpu = {}\nexposure = \"{}\"",
                gpu.partitions(),
                gpu.cpu.index(nodes),
                gpu.exposure
            )?;
            if gpu.exposure == "bar" {
                writeln!(out, "domains = {}", gpu.domains)?;
            }
            if gpu.is_spm() {
                writeln!(out, "generic_initiator = {}", gpu.initiator)?;
            }
            if gpu.on_hbm && (gpu.is_spm() || gpu.exposure == "bar") {
                writeln!(out, "pci_node = \"hbm\"")?;
            }
            let base = gpu.base.filter(|_| gpu.is_spm());
            if let Some(base) = base.filter(|_| self.wild || index == 0) {
                writeln!(out, "base = \"{base}\"")?;
            }
            if let Some(bus) = gpu.bus.filter(|_| self.wild || index == 0) {
                writeln!(out, "bus = {bus}")?;
            }
            if let Some(id) = &gpu.id {
                writeln!(out, "id = \"{id}\"")?;
            }
            ends.push(gpu.id.clone().unwrap_or_else(|| format!("gpu{index}")));
        }
        for (cpu, units) in &self.memory {
            let cpu = cpu.index(nodes);
            writeln!(
                out,
                "[[memory]]\nmemory = \"{}MiB\"\ncpu = {cpu}",
                units * 2
            )?;
        }
        let mut joined = BTreeSet::new();
        for (from, to, count) in &self.links {
            let (from, to) = (from.index(ends.len()), to.index(ends.len()));
            let joined = !joined.insert((from.min(to), from.max(to)));
            if !self.wild && (joined || from == to || from.max(to) < nodes) {
                continue;
            }
            let (from, to) = (&ends[from], &ends[to]);
            writeln!(
                out,
                "[[link]]\nfrom = \"{from}\"\nto = \"{to}\"\ncount = {count}"
            )?;
        }
        writeln!(out, "[distances]")?;
        if let Some([a, b, c, d, e, f]) = self.distances {
            writeln!(
                out,
                "cpu_cpu = {a}\ncpu_hbm_local = {b}\ncpu_hbm_remote = {c}"
            )?;
            writeln!(
                out,
                "hbm_hbm_same_gpu = {d}\nhbm_hbm_linked = {e}\nhbm_hbm = {f}"
            )?;
        }
        if let Some(values) = &self.matrix {
            let domains: u64 = self.gpus.iter().map(GpuText::domains).sum();
            let size = nodes + self.memory.len() + usize::try_from(domains).unwrap();
            let value = |a: usize, b: usize| if a == b { 10 } else { values[(a * 7 + b) % 64] };
            let rows: Vec<Vec<u32>> = (0..size)
                .map(|a| (0..size).map(|b| value(a, b)).collect())
                .collect();
            writeln!(out, "matrix = {rows:?}")?;
        }
        writeln!(out, "[limits]\nphys_bits = {}", self.phys_bits)?;
        writeln!(out, "amd_hole = {}", self.holes.1)?;
        if let Some(units) = self.holes.0 {
            writeln!(out, "pci_hole = \"{}MiB\"", units * 2)?;
        }
        writeln!(
            out,
            "[placement]\nalign = {}",
            (2 * MIB) << self.align_shift
        )?;
        writeln!(out, "gap = \"{} MiB\"", self.gap_units * 2)
    }
}

/// Plans the text twice; the same bytes have to come out. `None` if it is refused.
fn planned(text: &str) -> Option<(Machine, Plan)> {
    let run = || {
        let machine = parse("random.toml", text)?;
        let plan = plan(&machine)?;
        Ok::<_, numagpu_topology::MachineError>((machine, plan))
    };
    match (run(), run()) {
        (Ok((machine, one)), Ok((_, two))) => {
            assert_eq!(one, two);
            assert_eq!(render::json(&one).unwrap(), render::json(&two).unwrap());
            Some((machine, one))
        }
        (Err(one), Err(two)) => {
            assert_eq!(one, two);
            assert!(!one.message.is_empty() && !one.key.is_empty());
            assert!((1..=text.lines().count() + 1).contains(&one.line), "{one}");
            None
        }
        _ => unreachable!("the same text gave a plan and an error"),
    }
}

fn range(entry: &numagpu_topology::plan::E820Entry) -> Range {
    Range {
        base: entry.base,
        size: entry.size,
    }
}

fn check_memory_map(machine: &Machine, plan: &Plan) {
    let begin = plan.holes.below_4g.unwrap_or(0xb000_0000);
    let pci_hole = Range {
        base: begin,
        size: 4 * GIB - begin,
    };
    let mut last = 0;
    for entry in &plan.e820 {
        assert!(entry.base >= last && entry.size > 0, "{:#x?}", plan.e820);
        last = entry.base + entry.size;
        assert!(last <= 1 << plan.phys_bits);
        assert!(!range(entry).overlaps(&pci_hole));
        assert!(!plan.holes.amd || !range(entry).overlaps(&platform::AMD_HT));
    }
    let bytes = |kind: u32| -> u64 {
        let entries = plan.e820.iter().filter(|entry| entry.kind == kind);
        entries.map(|entry| entry.size).sum()
    };
    let mut described: Vec<u64> = machine
        .cpu
        .iter()
        .map(|node| node.get_ref().own_memory())
        .collect();
    for gpu in machine.gpu.iter().map(toml::Spanned::get_ref) {
        if *gpu.exposure.get_ref() == Exposure::Ram {
            described[*gpu.cpu.get_ref()] += gpu.hbm.get_ref().0;
        }
    }
    let memory = machine.memory.iter();
    described.extend(memory.map(|node| node.get_ref().memory.get_ref().0));
    let total: u64 = described.iter().sum();
    assert_eq!(bytes(E820_RAM) + platform::LEGACY_HOLE.size, total);
    assert_eq!(bytes(E820_RESERVED), platform::LEGACY_HOLE.size);
    assert_eq!(plan.ram_bytes(), total);
    let mut hbm = plan.hbm_ranges();
    hbm.sort();
    let soft: Vec<Range> = plan
        .e820
        .iter()
        .filter(|entry| entry.kind == E820_SOFT_RESERVED)
        .map(range)
        .collect();
    assert_eq!(soft, hbm);
    for (pxm, described) in (0u32..).zip(described) {
        let own = plan.ram.iter().filter(|range| range.pxm == pxm);
        let bytes: u64 = own.map(|range| range.size).sum();
        assert_eq!(bytes, described);
    }
}

fn check_placement(machine: &Machine, plan: &Plan) {
    let align = machine.placement.align.get_ref().0;
    let gap = machine.placement.gap.get_ref().0;
    let mut hbm = plan.hbm_ranges();
    hbm.sort();
    for pair in hbm.windows(2) {
        assert!(pair[0].end() + gap <= pair[1].base, "{hbm:#x?}");
    }
    for (gpu, text) in plan.gpus.iter().zip(&machine.gpu) {
        let text = text.get_ref();
        let partitions = u64::from(*text.partitions.get_ref());
        let bytes: u64 = gpu.hbm.iter().map(|part| part.size).sum();
        assert_eq!(bytes, text.hbm.get_ref().0);
        if gpu.exposure == Exposure::Ram {
            check_ram_hbm(plan, gpu);
            continue;
        }
        assert_eq!(gpu.hbm.len() as u64, partitions);
        if let Some(aperture) = &gpu.aperture {
            check_aperture(plan, gpu, aperture);
            continue;
        }
        for part in &gpu.hbm {
            assert_eq!(part.size * partitions, bytes);
            assert!(plan.window.contains(&part.range()));
            let unit = if text.base.is_some() { 2 * MIB } else { align };
            assert!(part.base.is_multiple_of(unit) || part.base == plan.window.base);
        }
        if let Some(base) = &text.base {
            assert_eq!(gpu.hbm[0].base, base.get_ref().0);
        }
    }
    // QEMU, given RAM and window, puts them where the plan says, with its PCI window behind.
    let layout = plan
        .holes
        .layout(plan.ram_bytes(), plan.window.size)
        .unwrap();
    assert_eq!(layout.window_base, plan.window.base);
    let ram_end = layout.ram.iter().map(Range::end).max().unwrap();
    assert_eq!(
        plan.ram.iter().map(|r| r.base + r.size).max(),
        Some(ram_end)
    );
    assert!(ram_end <= plan.window.base);
    assert!(plan.holes.used_end(plan.window.end()) <= 1 << plan.phys_bits);
}

/// HBM that is RAM lies in its node's RAM, and is nobody else's.
fn check_ram_hbm(plan: &Plan, gpu: &Gpu) {
    let own = |part: &Hbm| {
        plan.ram.iter().any(|ram| {
            let range = Range {
                base: ram.base,
                size: ram.size,
            };
            Some(ram.pxm) == part.pxm && range.contains(&part.range())
        })
    };
    assert!(gpu.hbm.iter().all(own), "{gpu:?}");
    let others = plan.gpus.iter().filter(|other| other.index != gpu.index);
    for other in others.flat_map(|other| &other.hbm) {
        assert!(
            !gpu.hbm
                .iter()
                .any(|part| part.range().overlaps(&other.range()))
        );
    }
}

/// An aperture is aligned to its size, in the 64-bit PCI hole, and holds the partitions from its start.
fn check_aperture(plan: &Plan, gpu: &Gpu, aperture: &Aperture) {
    assert!(aperture.size.is_power_of_two() && aperture.base.is_multiple_of(aperture.size));
    let range = Range {
        base: aperture.base,
        size: aperture.size,
    };
    let hole = Range {
        base: plan.window.end().next_multiple_of(GIB),
        size: plan.holes.pci_hole64,
    };
    assert!(hole.contains(&range), "{hole:x?} {range:x?}");
    assert!(!plan.holes.amd || !range.overlaps(&platform::AMD_HT));
    let mut next = aperture.base;
    for part in &gpu.hbm {
        assert_eq!(part.base, next);
        next = part.range().end();
    }
    assert!(next <= range.end());
    for other in plan.gpus.iter().filter(|other| other.index != gpu.index) {
        if let Some(other) = &other.aperture {
            assert!(other.base >= range.end() || other.base + other.size <= range.base);
        }
    }
}

fn check_nodes(machine: &Machine, plan: &Plan) {
    let count = u32::try_from(plan.nodes.len()).unwrap();
    assert!(plan.nodes.iter().map(|node| node.pxm).eq(0..count));
    let linux: BTreeSet<u32> = plan.nodes.iter().map(|node| node.linux_node).collect();
    assert!(linux.into_iter().eq(0..count));
    for node in &plan.nodes {
        match node.kind {
            NodeKind::Cpu => {
                assert!(node.online && !node.cpus.is_empty() && !node.ranges.is_empty());
                assert_eq!(node.cpu_pxm, Some(node.pxm));
            }
            NodeKind::Hbm if node.gpu.is_none() => {
                assert!(node.online && node.cpus.is_empty() && !node.ranges.is_empty());
            }
            NodeKind::Hbm => assert!(node.cpus.is_empty() && node.ranges.len() <= 1),
        }
    }
    for gpu in &plan.gpus {
        for (index, domain) in gpu.domains.iter().enumerate() {
            let node = &plan.nodes[domain.pxm as usize];
            let memory: Vec<Range> = match gpu.exposure {
                Exposure::Spm => vec![gpu.hbm[index].range()],
                _ => Vec::new(),
            };
            assert_eq!((&node.gpu, &node.ranges), (&Some(gpu.id.clone()), &memory));
            assert_eq!(node.online, domain.initiator.is_some());
            assert_eq!(node.cpu_pxm, Some(gpu.cpu_pxm));
        }
        let own = gpu.hbm.iter().zip(&gpu.domains);
        assert!(own.clone().all(|(hbm, domain)| hbm.pxm == Some(domain.pxm)));
    }
    let plain = |gpu: &toml::Spanned<numagpu_topology::machine::Gpu>| {
        gpu.get_ref().base.is_none() && !gpu.get_ref().is_initiator()
    };
    if machine.gpu.iter().all(plain) {
        let nodes = plan.domains().map(|d| plan.linux_node(d.pxm).unwrap());
        let cpus = u32::try_from(machine.cpu.len() + machine.memory.len()).unwrap();
        assert!(
            nodes.eq(cpus..count),
            "Linux's numbers ascend with the addresses"
        );
    }
    let mut buses = BTreeSet::new();
    for gpu in &plan.gpus {
        let bus = (gpu.segment, gpu.bus);
        assert!(buses.insert(bus) && buses.insert((gpu.segment, gpu.bus - 1)));
        let segment = match gpu.segment {
            0 => String::new(),
            segment => format!("{segment:04x}:"),
        };
        assert_eq!(gpu.bdf, format!("{segment}{:02x}:00.0", gpu.bus));
    }
}

/// Linux takes a SLIT with 10 on the diagonal and more elsewhere (`slit_valid`).
fn check_distances(machine: &Machine, plan: &Plan) {
    assert_eq!(plan.slit.len(), plan.nodes.len());
    for (from, row) in plan.slit.iter().enumerate() {
        assert_eq!(row.len(), plan.nodes.len());
        for (to, value) in row.iter().enumerate() {
            assert_eq!(from == to, *value == 10);
            assert!(*value >= 10);
            if machine.distances.matrix.is_none() {
                assert_eq!(*value, plan.slit[to][from]);
            }
        }
    }
}

/// The keys and types that scripts rely on.
fn check_json(plan: &Plan) {
    let json: serde_json::Value = serde_json::from_str(&render::json(plan).unwrap()).unwrap();
    assert!(json["name"].is_string());
    for entry in json["e820"].as_array().unwrap() {
        assert!(entry["base"].is_u64() && entry["size"].is_u64() && entry["type"].is_u64());
    }
    for node in json["nodes"].as_array().unwrap() {
        assert!(node["pxm"].is_u64() && node["linux_node"].is_u64() && node["cpus"].is_array());
        assert!(
            node["kind"] == "cpu" && !node["cpus"].as_array().unwrap().is_empty()
                || node["kind"] == "hbm" && node["cpus"].as_array().unwrap().is_empty()
        );
        for range in node["ranges"].as_array().unwrap() {
            assert!(range["base"].is_u64() && range["size"].is_u64());
        }
    }
    for row in json["slit"].as_array().unwrap() {
        assert!(
            row.as_array()
                .unwrap()
                .iter()
                .all(serde_json::Value::is_u64)
        );
    }
    for gpu in json["gpus"].as_array().unwrap() {
        assert!(gpu["id"].is_string() && gpu["bdf"].is_string() && gpu["exposure"].is_string());
        let private = gpu["exposure"] == "private";
        assert!(!gpu["hbm"].as_array().unwrap().is_empty());
        for hbm in gpu["hbm"].as_array().unwrap() {
            assert!(hbm["base"].is_u64() && hbm["size"].is_u64());
            assert!(hbm["pxm"].is_u64() || private && hbm["pxm"].is_null());
        }
    }
}

fn check_outputs(plan: &Plan) {
    check_json(plan);
    assert_eq!(render::e820(plan).lines().count(), plan.e820.len());
    assert!(render::text(plan, BootPath::Ovmf).starts_with(&plan.name));
    assert!(render::svg(plan).ends_with("</svg>\n"));
    assert!(render::dot(plan).ends_with("}\n"));
    assert!(render::hwloc(plan).ends_with("</topology>\n"));
    for boot in [BootPath::Ovmf, BootPath::SeaBios, BootPath::Qboot] {
        let prediction = predict(plan, boot);
        assert_eq!(prediction.possible.len(), plan.nodes.len());
        assert!(
            prediction
                .online
                .iter()
                .all(|node| prediction.possible.contains(node))
        );
        let whole: u64 = prediction.dax.iter().map(|dax| dax.range.size).sum();
        let all: u64 = plan.hbm().map(|hbm| hbm.size).sum();
        let lost = prediction
            .warnings
            .iter()
            .any(|w| w.what.contains("are lost"));
        assert!(whole == all || lost && whole < all, "{prediction:?}");
        let host = Host::placeholders(plan, boot, "/s", "/h");
        let Ok(arguments) = qemu::arguments(plan, &host) else {
            assert!(plan.hbm().count() > 32 || plan.gpus.len() > 28);
            continue;
        };
        let maxmem = (plan.ram_bytes() + plan.window.size) / MIB;
        let memory = format!("size={}M,maxmem={maxmem}M", plan.ram_bytes() / MIB);
        assert!(arguments.contains(&memory));
        let starting = |prefix: &str| arguments.iter().filter(|a| a.starts_with(prefix)).count();
        assert_eq!(starting("sp-mem,"), plan.hbm().count());
        assert_eq!(starting("node,"), plan.nodes.len());
        let bridges = if boot == BootPath::Qboot {
            0
        } else {
            plan.gpus.len()
        };
        assert_eq!(starting("pxb-pcie,"), bridges);
        let initiators = plan.domains().filter(|d| d.initiator.is_some()).count();
        assert_eq!(starting("acpi-generic-initiator,"), initiators);
        assert_eq!(plan.initiator_order().len(), initiators);
        assert!(!qemu::shell("qemu", &arguments).is_empty());
    }
}

/// Cloud Hypervisor's command line has every node, zone and device once, or an error says why there is none.
fn check_cloud_hypervisor(plan: &Plan) {
    let host = cloud_hypervisor::Host::placeholders(plan, "/s");
    let line = match cloud_hypervisor::command_line(plan, &host) {
        Ok(line) => line,
        Err(error) => {
            assert!(!error.0.is_empty());
            let soft = |o: &Obstacle| matches!(o, Obstacle::SoftReserved { .. });
            assert_eq!(error.0.iter().any(soft), plan.hbm().next().is_some());
            for obstacle in &error.0 {
                match obstacle {
                    Obstacle::SoftReserved { ranges, bytes, .. } => {
                        assert_eq!(*ranges, plan.hbm().count());
                        assert_eq!(*bytes, plan.hbm().map(|hbm| hbm.size).sum::<u64>());
                    }
                    // There are no more than 8 GPUs, so that more address bits always help.
                    Obstacle::Apertures { needed, .. } => {
                        assert!(needed.is_none_or(|bits| bits > plan.phys_bits), "{error}");
                        assert!(needed.is_some() || plan.phys_bits > 45, "{error}");
                    }
                    other => panic!("{other}"),
                }
            }
            return;
        }
    };
    let values = |option: &str| -> Vec<&str> {
        let pairs = line.arguments.chunks(2).filter(|pair| pair[0] == option);
        pairs.map(|pair| pair[1].as_str()).collect()
    };
    let field = |text: &str, key: &str| -> Option<String> {
        let rest = &text[text.find(&format!("{key}="))? + key.len() + 1..];
        let end = match rest.strip_prefix('[') {
            Some(list) => list.find(']').unwrap() + 2,
            None => rest.find(',').unwrap_or(rest.len()),
        };
        Some(rest[..end].trim_matches(['[', ']']).to_owned())
    };
    // Zones: one for each node that has RAM, in the order of the RAM, together all of it.
    let zones = values("--memory-zone");
    assert_eq!(zones.len(), plan.ram_nodes().count());
    let sizes = zones.iter().map(|zone| field(zone, "size").unwrap());
    let mib: u64 = sizes
        .map(|size| size.trim_end_matches('M').parse::<u64>().unwrap())
        .sum();
    assert_eq!(mib * MIB, plan.ram_bytes());
    // Nodes: numbered from 0, and Linux gives them the same numbers.
    let nodes = values("--numa");
    assert_eq!(nodes.len(), plan.nodes.len());
    let (mut first, mut second) = (Vec::new(), Vec::new());
    let (mut used, mut segments) = (Vec::new(), Vec::new());
    for (number, text) in (0u32..).zip(&nodes) {
        assert_eq!(field(text, "guest_numa_id"), Some(number.to_string()));
        let node = plan
            .nodes
            .iter()
            .find(|node| node.linux_node == number)
            .unwrap();
        let owner = node.gpu.as_ref().filter(|_| node.kind == NodeKind::Hbm);
        let device = owner.and_then(|id| plan.gpus.iter().find(|gpu| gpu.id == *id));
        let device = device.map(|gpu| format!("gpu{}", gpu.index));
        assert_eq!(field(text, "device_id"), device);
        let zone = field(text, "memory_zones");
        assert!(device.is_none() || zone.is_none() && !text.contains("cpus="));
        match text.contains("cpus=") || device.is_some() {
            true => first.push(number),
            false => second.push(number),
        }
        used.extend(zone);
        let here = field(text, "pci_segments").unwrap_or_default();
        for segment in here.split(',').filter(|segment| !segment.is_empty()) {
            let gpu = &plan.gpus[segment.parse::<usize>().unwrap() - 1];
            assert_eq!(plan.linux_node(gpu.pci_pxm), Some(number));
            segments.push(segment.to_owned());
        }
        let distances = field(text, "distances").unwrap_or_default();
        let distances: Vec<&str> = distances.split(',').filter(|d| !d.is_empty()).collect();
        assert_eq!(distances.len(), plan.nodes.len() - 1);
        for pair in distances {
            let (to, value) = pair.split_once('@').unwrap();
            let to = plan
                .nodes
                .iter()
                .find(|node| node.linux_node.to_string() == to)
                .unwrap();
            let planned = plan.distance(node.pxm, to.pxm).unwrap();
            assert_eq!(value, planned.to_string());
        }
    }
    // Every zone belongs to one node. Zones are in the order of the RAM, which need not be that of Linux's numbers.
    used.sort();
    let mut named: Vec<String> = zones
        .iter()
        .map(|zone| field(zone, "id").unwrap())
        .collect();
    named.sort();
    assert_eq!(used, named);
    assert_eq!(
        segments.iter().collect::<BTreeSet<_>>().len(),
        plan.gpus.len()
    );
    let numbers = linux::node_numbers(first, second);
    assert!(numbers.iter().all(|(id, node)| id == node), "{numbers:?}");
    // Devices: each on a segment of its own.
    let devices = values("--user-device");
    assert_eq!(devices.len(), plan.gpus.len());
    for (gpu, device) in plan.gpus.iter().zip(&devices) {
        let socket = format!("/s/{}", Plan::socket_file(gpu));
        let segment = (gpu.index + 1).to_string();
        let seen = ["socket", "id", "pci_segment"].map(|key| field(device, key).unwrap());
        assert_eq!(seen, [socket, format!("gpu{}", gpu.index), segment]);
    }
    let moved = line
        .warnings
        .iter()
        .any(|text| text.contains("PCI addresses"));
    assert_eq!(moved, !plan.gpus.is_empty());
    let hmat = line.warnings.iter().any(|text| text.contains("HMAT"));
    assert_eq!(hmat, plan.has_hmat());
}

fn check_all(machine: &Machine, plan: &Plan) {
    check_memory_map(machine, plan);
    check_placement(machine, plan);
    check_nodes(machine, plan);
    check_distances(machine, plan);
    check_outputs(plan);
    check_cloud_hypervisor(plan);
}

/// A change of a text.
#[derive(Clone, Debug)]
enum Change {
    Byte(Index, u8),
    Insert(Index, u8),
    Cut(Index, usize),
    DeleteLine(Index),
    RepeatLine(Index),
    SwapLines(Index, Index),
    Number(Index, String),
}

fn change() -> impl Strategy<Value = Change> {
    let edge = prop_oneof![
        select(vec![
            "0",
            "1",
            "-1",
            "255",
            "256",
            "4096",
            "4294967295",
            "4294967296",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "4503599627370496",
            "1099511627776",
            "0xfd00000000",
            "1e9",
            "4.5",
        ])
        .prop_map(String::from),
        any::<u64>().prop_map(|number| number.to_string()),
    ];
    let byte = || prop_oneof![select(b"[]{}\"'=.,#-0123456789 \n\\".to_vec()), any::<u8>()];
    prop_oneof![
        (any::<Index>(), byte()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (any::<Index>(), byte()).prop_map(|(at, byte)| Change::Insert(at, byte)),
        (any::<Index>(), 1usize..40).prop_map(|(at, len)| Change::Cut(at, len)),
        any::<Index>().prop_map(Change::DeleteLine),
        any::<Index>().prop_map(Change::RepeatLine),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Change::SwapLines(a, b)),
        (any::<Index>(), edge).prop_map(|(at, number)| Change::Number(at, number)),
    ]
}

/// Runs of digits of a text.
fn numbers(text: &str) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (at, _) in text.match_indices(|c: char| c.is_ascii_digit()) {
        match runs.last_mut() {
            Some((_, end)) if *end == at => *end = at + 1,
            _ => runs.push((at, at + 1)),
        }
    }
    runs
}

fn apply(text: String, change: &Change) -> String {
    if text.is_empty() {
        return text;
    }
    let mut bytes = text.clone().into_bytes();
    let mut lines: Vec<&str> = text.split_inclusive('\n').collect();
    match change {
        Change::Byte(at, byte) => bytes[at.index(text.len())] = *byte,
        Change::Insert(at, byte) => bytes.insert(at.index(text.len()), *byte),
        Change::Cut(at, len) => {
            let at = at.index(text.len());
            bytes.drain(at..(at + len).min(text.len()));
        }
        Change::DeleteLine(at) => {
            lines.remove(at.index(lines.len()));
            return lines.concat();
        }
        Change::RepeatLine(at) => {
            let at = at.index(lines.len());
            lines.insert(at, lines[at]);
            return lines.concat();
        }
        Change::SwapLines(a, b) => {
            let (a, b) = (a.index(lines.len()), b.index(lines.len()));
            lines.swap(a, b);
            return lines.concat();
        }
        Change::Number(at, number) => {
            let runs = numbers(&text);
            if runs.is_empty() {
                return text;
            }
            let (start, end) = *at.get(&runs);
            return format!("{}{number}{}", &text[..start], &text[end..]);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(4500))]
    #[test]
    fn a_machine_is_refused_or_its_plan_keeps_the_rules(machine in machine_text()) {
        let text = machine.render();
        if let Some((machine, plan)) = planned(&text) {
            check_all(&machine, &plan);
        }
    }
}

proptest! {
    #![proptest_config(cases(3000))]
    #[test]
    fn a_changed_preset_is_refused_or_its_plan_keeps_the_rules(
        preset in select(preset::ALL.to_vec()),
        changes in vec(change(), 1..5),
    ) {
        let text = changes.iter().fold(preset.source.to_owned(), apply);
        if let Some((machine, plan)) = planned(&text) {
            check_all(&machine, &plan);
        }
    }

    #[test]
    fn a_changed_machine_is_refused_or_its_plan_keeps_the_rules(
        machine in machine_text(),
        changes in vec(change(), 1..4),
    ) {
        let text = changes.iter().fold(machine.render(), apply);
        if let Some((machine, plan)) = planned(&text) {
            check_all(&machine, &plan);
        }
    }
}

/// The properties are worth something only if many machines get as far as a plan.
#[test]
fn enough_random_machines_can_be_planned() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = machine_text();
    let planned = (0..300)
        .filter(|_| planned(&strategy.new_tree(&mut runner).unwrap().current().render()).is_some())
        .count();
    assert!(planned > 90, "{planned} of 300");
}
