//! Linux reads the tables that we make: it is handed our SRAT, SLIT and HMAT in place of QEMU's
//! (Linux `Documentation/admin-guide/acpi/initrd_table_override.rst`), and finds what they say.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use cpio::newc::{Builder, trailer};
use numagpu_tests::corner::Corner;
use numagpu_tests::programs::{Turn, assets};
use numagpu_tests::tables::{self, Affinity};
use numagpu_topology::acpi::{self, Table};
use numagpu_topology::linux::BootPath;
use numagpu_topology::seen::{AccessSeen, Report, SratMemory};
use numagpu_topology::verify::{table, verify};
use numagpu_topology::{Plan, parse, plan, preset, qemu};
use numagpu_vmm_glue::run::{Interrupt, Options, Watch, run};

/// Tables that Linux is handed.
const HANDED: [&str; 3] = ["SRAT", "SLIT", "HMAT"];

/// Remembers what a run warned of.
#[derive(Default)]
struct Warnings(Vec<String>);

impl Watch for Warnings {
    fn progress(&mut self, _: &str) {}
    fn warning(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
}

fn planned(text: &str) -> Plan {
    plan(&parse("two-gpu", text).unwrap()).unwrap()
}

/// The preset, and the same machine with other distances and accesses, which QEMU's tables do not have.
fn machines() -> (Plan, Plan) {
    let preset = preset::find("two-gpu").unwrap().source;
    let mut changed = preset.to_owned();
    for (from, to) in [
        (
            "latency_ns = 100\nbandwidth_mbs = 48000",
            "latency_ns = 90\nbandwidth_mbs = 52000",
        ),
        ("hbm_latency_ns = 350", "hbm_latency_ns = 280"),
        ("hbm_bandwidth_mbs = 1600000", "hbm_bandwidth_mbs = 1200000"),
        ("latency_ns = 600", "latency_ns = 640"),
        (
            "[[source]]",
            "[distances]\ncpu_hbm_local = 33\nhbm_hbm_linked = 77\n[[source]]",
        ),
    ] {
        assert!(changed.contains(from), "{from}");
        changed = changed.replace(from, to);
    }
    let (theirs, ours) = (planned(preset), planned(&changed));
    assert_eq!(theirs.e820, ours.e820);
    assert_eq!(theirs.nodes, ours.nodes);
    assert!(theirs.slit != ours.slit && theirs.accesses != ours.accesses);
    (theirs, ours)
}

/// The table as Linux takes it in place of QEMU's: by the same maker and of a later revision.
fn in_place_of_qemus(table: &Table) -> Vec<u8> {
    let mut bytes = table.bytes.clone();
    bytes[10..16].copy_from_slice(b"BOCHS ");
    bytes[16..24].copy_from_slice(b"BXPC    ");
    bytes[24..28].copy_from_slice(&2u32.to_le_bytes());
    bytes[9] = 0;
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[9] = sum.wrapping_neg();
    bytes
}

/// The tables in an archive that comes before the kernel's initramfs.
fn initrd(corner: &Corner, tables: &[Table], initramfs: &PathBuf) -> PathBuf {
    let mut archive = Vec::new();
    for table in tables {
        let bytes = in_place_of_qemus(table);
        let name = format!(
            "kernel/firmware/acpi/{}.aml",
            table.signature.to_lowercase()
        );
        let mut file = Builder::new(&name)
            .mode(0o100_644)
            .nlink(1)
            .write(&mut archive, u32::try_from(bytes.len()).unwrap());
        file.write_all(&bytes).unwrap();
        file.finish().unwrap();
    }
    let mut archive = trailer(archive).unwrap();
    archive.extend(fs::read(initramfs).unwrap());
    let path = corner.file("initrd.img");
    fs::write(&path, archive).unwrap();
    path
}

/// Boots the first machine with the tables of the second. Gives the guest's report and its console.
fn boot(theirs: &Plan, ours: &Plan, kernel: &str) -> (Report, String) {
    let turn = Turn::wait();
    let corner = Corner::new();
    let assets = assets();
    let kernel = assets.kernel(kernel).unwrap();
    let mut handed = acpi::tables(ours);
    handed.retain(|table| HANDED.contains(&table.signature));
    assert_eq!(handed.len(), HANDED.len());
    let console = corner.file("console");
    let options = Options {
        qemu: assets.qemu.path.clone(),
        boot: BootPath::SeaBios,
        firmware: None,
        kernel: kernel.vmlinuz.clone(),
        initrd: Some(initrd(&corner, &handed, &kernel.initrd)),
        append: String::new(),
        accel: None,
        hbm_dir: None,
        scenario: None,
        qemu_arguments: Vec::new(),
        agent: true,
        console: Some(console.clone()),
        timeout: Duration::from_secs(300),
    };
    let mut warnings = Warnings::default();
    let report = run(theirs, &options, &Interrupt::default(), &mut warnings)
        .unwrap_or_else(|error| panic!("{error}"));
    drop(turn);
    assert_eq!(warnings.0, Vec::<String>::new());
    let console = fs::read(&console).unwrap();
    (
        report.unwrap(),
        String::from_utf8_lossy(&console).into_owned(),
    )
}

#[track_caller]
fn check(kernel: &str) {
    let (theirs, ours) = machines();
    // QEMU's table could say the same, so one prediction is for both.
    let table_of = |signature: &str| {
        let mut tables = acpi::tables(&ours).into_iter();
        tables
            .find(|table| table.signature == signature)
            .unwrap()
            .bytes
    };
    let hmat = tables::hmat(&table_of("HMAT"));
    assert_eq!(Some(hmat.reads()), qemu::hmat(&ours));

    let (report, console) = boot(&theirs, &ours, kernel);
    for signature in HANDED {
        let line = format!("Table Upgrade: override [{signature}-BOCHS -BXPC");
        assert!(console.contains(&line), "{line}: {console}");
    }
    // All that a guest has to be like holds for the machine of our tables.
    let facts = verify(&ours, BootPath::SeaBios, &report);
    assert!(facts.iter().all(|fact| fact.ok), "{}", table(&facts, false));
    // And some of it not for the machine of QEMU's.
    let differing: Vec<String> = verify(&theirs, BootPath::SeaBios, &report)
        .into_iter()
        .filter(|fact| !fact.ok)
        .map(|fact| fact.what)
        .collect();
    let mut wanted = vec!["SLIT".to_owned()];
    wanted.extend((0..3).map(|node| format!("node {node} CPUs and distances")));
    wanted.extend(
        (0..3).flat_map(|node| (0..2).map(move |class| format!("node {node} access{class}"))),
    );
    assert_eq!(differing, wanted);

    // The SRAT in sysfs is ours: without the free space that QEMU makes memory of the last node.
    let memory = |entry: Affinity| match entry {
        Affinity::Memory {
            pxm,
            range,
            hotplug,
        } => Some(SratMemory {
            pxm,
            range,
            hotplug,
        }),
        _ => None,
    };
    let srat: Vec<SratMemory> = tables::srat(&table_of("SRAT"))
        .into_iter()
        .filter_map(memory)
        .collect();
    assert_eq!(report.srat_memory, srat);
    // Written down here, not taken from the plan.
    let numbers: Vec<&[u32]> = report
        .nodes
        .iter()
        .map(|node| &node.distances[..])
        .collect();
    assert_eq!(numbers, [[10, 33, 33], [33, 10, 77], [33, 77, 10]]);
    let class = |class: u32, initiator: u32, ns: u32, mbs: u32| AccessSeen {
        class,
        initiators: vec![initiator],
        latency_ns: (ns, ns),
        bandwidth_mbs: (mbs, mbs),
    };
    assert_eq!(
        report.nodes[0].access,
        [class(0, 0, 90, 52_000), class(1, 0, 90, 52_000)]
    );
    for node in [1, 2] {
        let seen = &report.nodes[node as usize].access;
        assert_eq!(
            *seen,
            [class(0, node, 280, 1_200_000), class(1, 0, 640, 36_000)]
        );
    }
    let targets: Vec<i32> = report.dax.iter().map(|dax| dax.target_node).collect();
    assert_eq!(targets, [1, 2]);
}

#[test]
fn guest_reads_our_tables_6_12() {
    check("6.12");
}

#[test]
fn guest_reads_our_tables_newest() {
    check("newest");
}
