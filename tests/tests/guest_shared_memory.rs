//! HBM is one memory: what a guest's CPU writes, what the device's copy engine writes, and what is in the backing
//! file are the same bytes at the same offsets.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use numagpu_tests::corner::Corner;
use numagpu_tests::host;
use numagpu_tests::programs::{Turn, assets};
use numagpu_topology::linux::BootPath;
use numagpu_topology::seen::{Pattern, Report};
use numagpu_topology::{Plan, preset};
use numagpu_vmm_glue::run::{Interrupt, Options, Watch, run};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Looks into the backing files while the guest's driver owns its HBM.
struct Look<'a> {
    corner: &'a Corner,
    /// Writes other bytes than it says.
    lies: bool,
    progress: Vec<String>,
    looks: usize,
}

impl Look<'_> {
    fn file(&self, gpu: u32) -> PathBuf {
        self.corner.hbm().join(format!("gpu{gpu}-p0.hbm"))
    }
}

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

/// The words of a file, 8 bytes each, little-endian.
fn words(file: &File, offset: u64, len: u64) -> Vec<u64> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    file.read_exact_at(&mut bytes, offset).unwrap();
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    bytes.chunks_exact(8).map(word).collect()
}

/// `seed`, `seed + 1` and so on.
fn counting(seed: u64, len: u64) -> Vec<u64> {
    (0..len / 8).map(|word| seed.wrapping_add(word)).collect()
}

/// Whether a process maps the very file, all of it, shared and writable.
fn maps(pid: u32, path: &Path) -> bool {
    let inode = fs::metadata(path).unwrap().ino().to_string();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (first, last) = fields[0].split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        fields[1] == "rw-s"
            && number(last) - number(first) == 4 * GIB
            && number(fields[2]) == 0
            && fields[4] == inode
            && fields[5..] == [path.to_str().unwrap()]
    })
}

impl Watch for Look<'_> {
    fn progress(&mut self, text: &str) {
        self.progress.push(text.to_owned());
    }

    fn warning(&mut self, text: &str) {
        panic!("warning: {text}");
    }

    fn held(&mut self, patterns: &[Pattern]) -> Vec<Pattern> {
        self.looks += 1;
        assert_eq!(patterns.len(), 2, "{patterns:?}");
        let mut answers = Vec::new();
        let qemu = host::mentioning(&self.corner.path().to_string_lossy());
        assert_eq!(qemu.len(), 1, "{qemu:?}");
        for (pattern, gpu) in patterns.iter().zip(0..) {
            assert_eq!((pattern.gpu, pattern.partition), (gpu, 0));
            assert!(pattern.len >= 4096 && pattern.seed != 0, "{pattern:?}");
            let path = self.file(gpu);
            // One memory: the device, which is in this process, and QEMU have the file mapped itself.
            assert!(
                maps(std::process::id(), &path),
                "the device does not map {path:?}"
            );
            assert!(maps(qemu[0].pid, &path), "QEMU does not map {path:?}");
            let file = open(&path);
            assert_eq!(file.metadata().unwrap().len(), 4 * GIB);
            // What the guest's CPU wrote through its dax device.
            let seen = words(&file, pattern.offset, pattern.len);
            assert!(seen == counting(pattern.seed, pattern.len), "{pattern:?}");
            // What the device's copy engine wrote: the driver let it copy RAM to 4 MiB into the HBM.
            let copied = words(&file, 4 * MIB, 0x4_0000);
            assert_eq!(copied[0], 0xc0de_0000_0000_0000 | u64::from(gpu) << 32);
            assert!(copied == counting(copied[0], 0x4_0000));
            // What nobody wrote.
            assert!(words(&file, GIB, 2 * MIB).iter().all(|word| *word == 0));
            for (place, offset) in (1..).zip([GIB + 0x3000, 3 * GIB + 2 * MIB - 0x8000]) {
                let seed = 0x5eed_0000_0000_0000 | u64::from(gpu) << 40 | place << 32;
                let written = seed ^ u64::from(self.lies && gpu == 1);
                let bytes: Vec<u8> = counting(written, 0x8000)
                    .into_iter()
                    .flat_map(u64::to_le_bytes)
                    .collect();
                file.write_all_at(&bytes, offset).unwrap();
                answers.push(Pattern {
                    gpu,
                    partition: 0,
                    offset,
                    len: 0x8000,
                    seed,
                });
            }
        }
        answers
    }
}

/// Boots `two-gpu` with HBM in files and looks into them; gives what the guest reported.
fn look(corner: &Corner, lies: bool) -> Report {
    let preset = preset::find("two-gpu").unwrap();
    let machine = numagpu_topology::parse(preset.name, preset.source).unwrap();
    let plan: Plan = numagpu_topology::plan(&machine).unwrap();
    let assets = assets();
    let kernel = assets.kernels.first().unwrap();
    let options = Options {
        qemu: assets.qemu.path.clone(),
        boot: BootPath::Ovmf,
        firmware: assets.ovmf.combined.clone(),
        kernel: kernel.vmlinuz.clone(),
        initrd: Some(kernel.initrd.clone()),
        append: "numagpu.hold".to_owned(),
        accel: None,
        hbm_dir: Some(corner.hbm()),
        scenario: None,
        qemu_arguments: Vec::new(),
        agent: true,
        console: None,
        timeout: std::time::Duration::from_secs(300),
    };
    let mut watch = Look {
        corner,
        lies,
        progress: Vec::new(),
        looks: 0,
    };
    let report = run(&plan, &options, &Interrupt::default(), &mut watch);
    let report = report.unwrap_or_else(|error| panic!("{error}")).unwrap();
    assert_eq!(watch.looks, 1, "{:?}", watch.progress);
    // The files are gone, and so is QEMU.
    corner.assert_empty();
    report
}

#[test]
fn guest_cpu_device_and_host_see_one_memory() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let report = look(&corner, false);
    assert_eq!(report.problems, Vec::<String>::new());
    for gpu in &report.gpus {
        assert_eq!(gpu.steps.iter().find(|step| !step.ok), None);
    }
}

#[test]
fn guest_does_not_find_what_the_host_did_not_write() {
    let _turn = Turn::wait();
    let corner = Corner::new();
    let report = look(&corner, true);
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
    assert!(
        report.problems[0].starts_with("the host's patterns: "),
        "{:?}",
        report.problems
    );
}
