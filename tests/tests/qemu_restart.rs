//! The same GPUs with one QEMU after the other, each of them killed in the midst of work. No guest runs: the test itself
//! plays the driver, over the qtest protocol.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::time::Duration;

use numagpu_spec::regs::{
    BootState, Coherence, OwnerResult, OwnerState, QUEUE_ENABLE, boot, partition, queue,
};
use numagpu_spec::table::Reg;
use numagpu_spec::{pci, sdma};
use numagpu_tests::corner::Corner;
use numagpu_tests::host::wait_until;
use numagpu_tests::programs::assets;
use numagpu_tests::qtest::Qtest;
use numagpu_topology::linux::BootPath;
use numagpu_topology::{parse, plan, preset};
use numagpu_vmm_glue::instance::Instance;

/// How often QEMU is killed.
const LIVES: u32 = 50;
/// Where the test puts the BARs.
const REGISTERS: u64 = 0xc000_0000;
const DOORBELLS: u64 = 0xc010_0000;
/// In the machine's RAM: the ring, and a word.
const RING: u64 = 0x10_0000;
const WORD: u64 = 0x11_0000;
const TOKEN: u64 = 0x0b50_1e7e;
const LIMIT: Duration = Duration::from_secs(20);

/// A GPU on the root bus of a QEMU.
struct Driver {
    qemu: Qtest,
    device: u8,
    hbm: u64,
}

impl Driver {
    fn get(&mut self, base: u32, reg: &Reg) -> u64 {
        let at = REGISTERS + u64::from(base + reg.offset);
        self.qemu.read(at, reg.width.bytes())
    }

    fn set(&mut self, base: u32, reg: &Reg, value: u64) {
        let at = REGISTERS + u64::from(base + reg.offset);
        self.qemu.write(at, reg.width.bytes(), value);
    }

    #[track_caller]
    fn wait(&mut self, base: u32, reg: &Reg, wanted: u32) {
        let came = wait_until(LIMIT, || self.get(base, reg) == u64::from(wanted));
        assert!(came, "{} is {:#x}", reg.name, self.get(base, reg));
    }

    fn place_bars(&mut self) {
        for (bar, address) in [
            (pci::BAR_REGISTERS, REGISTERS),
            (pci::BAR_DOORBELLS, DOORBELLS),
        ] {
            let low = u32::try_from(address).unwrap();
            self.qemu.config(self.device, 0x10 + 4 * bar, Some(low));
        }
        self.qemu
            .config(self.device, 0x10 + 4 * (pci::BAR_DOORBELLS + 1), Some(0));
        // Memory space and bus master.
        self.qemu.config(self.device, 4, Some(6));
    }

    /// Boots the GPU, claims its HBM, which reads as zero, and has `mark` put all over a part of it.
    fn work(&mut self, mark: u32) {
        self.place_bars();
        self.set(boot::BASE, &boot::CONTROL, 1);
        self.wait(boot::BASE, &boot::STATUS, BootState::Ready.code());
        let coherent = Coherence::Coherent.code();
        self.wait(partition::BASE, &partition::COHERENCE, coherent);
        self.wait(partition::BASE, &partition::STATE, OwnerState::Free.code());
        self.set(partition::BASE, &partition::TOKEN, TOKEN);
        self.set(partition::BASE, &partition::COMMAND, 1);
        let result = self.get(partition::BASE, &partition::RESULT);
        assert_eq!(result, u64::from(OwnerResult::Ok.code()));
        assert_eq!(self.qemu.memory(self.hbm, 64), [0; 64]);

        let packets = [
            sdma::const_fill(self.hbm, mark, 4096).as_slice(),
            &sdma::fence(WORD, mark),
        ]
        .concat();
        for (at, word) in (RING..).step_by(4).zip(&packets) {
            self.qemu.write(at, 4, (*word).into());
        }
        self.set(queue::BASE, &queue::RING_BASE, RING);
        self.set(queue::BASE, &queue::RING_SIZE, 4096);
        self.set(queue::BASE, &queue::TOKEN, TOKEN);
        self.set(queue::BASE, &queue::CONTROL, QUEUE_ENABLE.into());
        self.qemu.write(DOORBELLS, 8, 4 * packets.len() as u64);
        let done = wait_until(LIMIT, || self.qemu.read(WORD, 4) == u64::from(mark));
        assert!(done, "the fence of life {mark} did not come");
        let bytes = mark.to_le_bytes().repeat(1024);
        assert!(self.qemu.memory(self.hbm, 4096) == bytes);
    }
}

#[test]
fn each_of_fifty_qemus_that_are_killed_finds_a_working_device() {
    let preset = preset::find("two-gpu").unwrap();
    let plan = plan(&parse(preset.name, preset.source).unwrap()).unwrap();
    let corner = Corner::new();
    let directory = corner.file("");
    let instance = Instance::start(&plan, &directory, None, None).unwrap();
    let gpu = plan.gpus.first().unwrap();
    let hbm = gpu.hbm.first().unwrap().base;
    let qemu = assets().qemu.path;
    for life in 1..=LIVES {
        let qemu = Qtest::start_as(BootPath::Qboot, &qemu, &plan, &instance, &directory);
        let mut driver = Driver {
            qemu,
            // The functions follow the host bridge and QEMU's own device on the root bus.
            device: 2,
            hbm,
        };
        let id = driver.qemu.config(driver.device, 0, None);
        assert_ne!(id, u32::MAX, "no function in life {life}");
        driver.work(life);
        // Killed here.
    }
}
