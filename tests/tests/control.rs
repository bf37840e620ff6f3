//! Driving a served machine from outside: `numagpu status`, `numagpu inject`, scenarios.
#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "tests fail by panicking"
)]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use numagpu_spec::regs::{self, OwnerCommand, OwnerResult, boot, irq, partition, queue, ras};
use numagpu_spec::table::Reg;
use numagpu_spec::{pci, sdma};
use numagpu_tests::corner::{COMMAND, Corner};
use numagpu_tests::host::wait_until;
use numagpu_tests::process::{Ended, Process};
use numagpu_vmm_glue::control::Fault;
use rustix::process::Signal;
use serde_json::Value;
use vfio_user::Client;

/// First address and bytes of each GPU's HBM in `two-gpu`.
const HBM: [u64; 2] = [0x1_0000_0000, 0x2_8000_0000];
const HBM_SIZE: u64 = 4 << 30;
/// Guest RAM: the ring.
const RAM: u64 = 0x10_0000;
const RING: u64 = 4096;
/// Nobody else's number.
const TOKEN: u64 = 0x7654_3210_fedc_ba98;

/// A served `two-gpu`.
struct Served {
    corner: Corner,
    process: Process,
}

impl Served {
    fn new(arguments: &[&str]) -> Served {
        Served::in_corner(Corner::new(), arguments)
    }

    fn in_corner(corner: Corner, arguments: &[&str]) -> Served {
        let directory = corner.file("");
        let directory = directory.to_string_lossy();
        let mut all = vec!["serve", "two-gpu", "--socket-dir", &directory];
        all.extend(arguments);
        let mut process = Process::spawn(corner.numagpu(&all));
        process.wait_for("ready: 2 GPU(s)", COMMAND);
        Served { corner, process }
    }

    /// Plays a scenario.
    fn playing(scenario: &str) -> Served {
        let corner = Corner::new();
        let path = corner.write("scenario.toml", scenario);
        Served::in_corner(corner, &["--scenario", &path.to_string_lossy()])
    }

    fn socket(&self) -> PathBuf {
        self.corner.file("control.sock")
    }

    /// All that the instance says of itself.
    #[track_caller]
    fn status(&self) -> Value {
        let ended = self.corner.command(&["status", "--json"]);
        ended.assert_code(0);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    #[track_caller]
    fn gpu(&self, index: usize) -> Value {
        self.status()["gpus"][index].clone()
    }

    fn inject(&self, line: &str) -> Ended {
        let mut arguments = vec!["inject"];
        arguments.extend(line.split(' '));
        self.corner.command(&arguments)
    }

    #[track_caller]
    fn injected(&self, line: &str) {
        let ended = self.inject(line);
        ended.assert_code(0);
        assert_eq!(ended.stderr, "", "{ended}");
    }

    /// How often each fault of the scenario has come.
    #[track_caller]
    fn fired(&self) -> Vec<u64> {
        let status = self.status();
        let faults = status["scenario"]["faults"].as_array().unwrap();
        faults
            .iter()
            .map(|it| it["fired"].as_u64().unwrap())
            .collect()
    }

    #[track_caller]
    fn wait_fired(&self, wanted: &[u64]) {
        let come = wait_until(COMMAND, || self.fired() == wanted);
        assert!(come, "{:?}, not {wanted:?}", self.fired());
    }

    fn stop(mut self) {
        self.process.signal(Signal::TERM);
        let ended = self.process.wait(COMMAND);
        ended.assert_code(0);
        assert!(!self.corner.file("control.sock").exists());
        self.corner.assert_empty();
    }
}

/// A VMM with a driver for one GPU.
struct Driver {
    client: Client,
    ram: OwnedFd,
    written: u64,
    hbm: File,
}

impl Driver {
    /// Connects and maps the HBM and some RAM.
    fn new(served: &Served, gpu: usize) -> Driver {
        let mut client = Client::new(&served.corner.file(&format!("gpu{gpu}.sock"))).unwrap();
        let hbm = served.corner.file(&format!("gpu{gpu}-p0.hbm"));
        let hbm = File::options().read(true).write(true).open(hbm).unwrap();
        client
            .dma_map(0, HBM[gpu], HBM_SIZE, hbm.as_raw_fd())
            .unwrap();
        let ram = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&ram, RING).unwrap();
        client.dma_map(0, RAM, RING, ram.as_raw_fd()).unwrap();
        // Memory and bus master.
        client.region_write(7, 4, &[6, 0]).unwrap();
        Driver {
            client,
            ram,
            written: 0,
            hbm,
        }
    }

    fn get(&mut self, base: u32, reg: &Reg) -> u64 {
        let mut value = [0; 8];
        let len = reg.width.bytes() as usize;
        let offset = (base + reg.offset).into();
        let region = pci::BAR_REGISTERS.into();
        self.client
            .region_read(region, offset, &mut value[..len])
            .unwrap();
        u64::from_le_bytes(value)
    }

    fn set(&mut self, base: u32, reg: &Reg, value: u64) {
        let data = &value.to_le_bytes()[..reg.width.bytes() as usize];
        let offset = (base + reg.offset).into();
        self.client
            .region_write(pci::BAR_REGISTERS.into(), offset, data)
            .unwrap();
    }

    fn wait(&mut self, base: u32, reg: &Reg, value: u32) {
        let reached = wait_until(COMMAND, || self.get(base, reg) == u64::from(value));
        assert!(reached, "{} is {:#x}", reg.name, self.get(base, reg));
    }

    fn start(&mut self) {
        self.set(boot::BASE, &boot::CONTROL, 1);
    }

    fn boot(&mut self) {
        self.start();
        self.wait(boot::BASE, &boot::STATUS, regs::BootState::Ready.code());
    }

    fn command(&mut self, command: OwnerCommand) -> Option<OwnerResult> {
        self.set(partition::BASE, &partition::TOKEN, TOKEN);
        self.set(partition::BASE, &partition::COMMAND, command.code().into());
        let result = self.get(partition::BASE, &partition::RESULT);
        OwnerResult::from_code(u32::try_from(result).unwrap())
    }

    fn claim(&mut self) {
        assert_eq!(self.command(OwnerCommand::Claim), Some(OwnerResult::Ok));
    }

    /// Enables queue 0 anew.
    fn enable(&mut self) {
        self.set(queue::BASE, &queue::CONTROL, regs::QUEUE_RESET.into());
        self.set(queue::BASE, &queue::RING_BASE, RAM);
        self.set(queue::BASE, &queue::RING_SIZE, RING);
        self.set(queue::BASE, &queue::TOKEN, TOKEN);
        self.set(queue::BASE, &queue::CONTROL, regs::QUEUE_ENABLE.into());
        self.written = 0;
    }

    /// Puts a packet into the ring and rings the doorbell.
    fn submit(&mut self, packet: &[u32]) {
        let bytes: Vec<u8> = packet.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(
            rustix::io::pwrite(&self.ram, &bytes, self.written),
            Ok(bytes.len())
        );
        self.written += bytes.len() as u64;
        self.ring();
    }

    fn ring(&mut self) {
        let wptr = self.written.to_le_bytes();
        self.client
            .region_write(pci::BAR_DOORBELLS.into(), 0, &wptr)
            .unwrap();
    }

    fn wait_state(&mut self, state: regs::QueueState) {
        self.wait(queue::BASE, &queue::STATUS, state.code());
    }
}

/// The message of a command that failed, all of its standard error output.
#[track_caller]
fn failed(ended: &Ended, code: i32) -> String {
    ended.assert_code(code);
    assert_eq!(ended.stdout, "", "{ended}");
    ended.stderr.clone()
}

/// A field of `/proc/PID/status`.
fn of_process(pid: u32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = status.lines().find_map(|line| line.strip_prefix(field));
    value.unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
fn a_whole_session_goes_on_inside_the_sandbox() {
    let served = Served::new(&[]);
    let said = served.status()["sandbox"].as_str().unwrap().to_owned();
    assert!(said.starts_with("on ("), "{said}");
    let pid = served.process.pid();
    // Of each thread: they were started inside.
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let tasks: Vec<u32> = tasks
        .map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    assert!(tasks.len() > 4, "{tasks:?}");
    for task in tasks {
        let of = |field| of_process(task, field);
        assert_eq!(
            (of("Seccomp").as_str(), of("NoNewPrivs").as_str()),
            ("2", "1")
        );
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(of(set), "0000000000000000", "{set}");
        }
    }
    for round in 0..3 {
        let mut driver = Driver::new(&served, 0);
        driver.boot();
        driver.claim();
        driver.enable();
        let fill = sdma::const_fill(HBM[0] + (4 << 20), 0x5a5a_5a5a, 1 << 20);
        driver.submit(&fill);
        // Scrubbed by a thread that starts inside.
        assert_eq!(driver.command(OwnerCommand::Release), Some(OwnerResult::Ok));
        driver.wait(
            partition::BASE,
            &partition::STATE,
            regs::OwnerState::Free.code(),
        );
        driver.claim();
        served.injected("0 correctable-error --address 0x1_0000_0040");
        assert_eq!(served.gpu(0)["health"]["correctable"], 1, "round {round}");
    }
    served.stop();
}

/// A client's memory is a file, and the client can cut it short at any time.
#[test]
fn memory_that_is_cut_off_inside_the_sandbox_stops_a_queue_and_not_the_server() {
    const CUT: u64 = 0x1000_0000;
    const LEN: u64 = 0x1_0000;
    let mut served = Served::new(&[]);
    let said = served.status()["sandbox"].as_str().unwrap().to_owned();
    assert!(said.starts_with("on ("), "{said}");
    let mut drivers = [0, 1].map(|gpu| Driver::new(&served, gpu));
    for driver in &mut drivers {
        driver.boot();
        driver.claim();
        driver.enable();
    }
    let [driver, other] = &mut drivers;
    let ram = rustix::fs::memfd_create("cut", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let since = Instant::now();
    for (source, destination) in [(CUT, HBM[0]), (HBM[0], CUT)].repeat(10) {
        rustix::fs::ftruncate(&ram, LEN).unwrap();
        driver.client.dma_map(0, CUT, LEN, ram.as_raw_fd()).unwrap();
        rustix::fs::ftruncate(&ram, 0).unwrap();
        driver.submit(&sdma::copy_linear(source, destination, LEN));
        driver.wait_state(regs::QueueState::Fault);
        let code = driver.get(queue::BASE, &queue::FAULT_CODE);
        assert_eq!(code, u64::from(regs::QueueFault::Unmapped.code()));
        driver.client.dma_unmap(CUT, LEN).unwrap();
        driver.enable();
    }
    const SAID: &str = "0x10000000..=0x1000ffff was cut short";
    served.process.wait_for(SAID, COMMAND);
    let said = served.process.said().matches(SAID).count() as u64;
    assert!(said <= 1 + since.elapsed().as_secs(), "{said} times");
    for (base, driver) in HBM.into_iter().zip([driver, other]) {
        driver.submit(&sdma::const_fill(base + 8, 0x6007_6007, 4096));
        driver.wait_state(regs::QueueState::Idle);
        let mut word = [0; 4];
        driver.hbm.read_exact_at(&mut word, 8).unwrap();
        assert_eq!(u32::from_le_bytes(word), 0x6007_6007);
    }
    drop(drivers);
    served.stop();
}

#[test]
fn no_sandbox_is_in_force_where_none_is_wanted() {
    for (mode, seccomp) in [("off", "0"), ("log", "2")] {
        let served = Served::new(&["--sandbox", mode]);
        let said = served.status()["sandbox"].as_str().unwrap().to_owned();
        assert!(said.starts_with(mode), "{said}");
        assert_eq!(of_process(served.process.pid(), "Seccomp"), seccomp);
        let mut driver = Driver::new(&served, 1);
        driver.boot();
        driver.claim();
        drop(driver);
        served.stop();
    }
}

/// What the next client finds in HBM that one wrote and claimed, and died.
fn left_to_the_next(policy: &[&str]) -> u32 {
    let served = Served::new(policy);
    let mut driver = Driver::new(&served, 0);
    driver.boot();
    driver.claim();
    driver
        .hbm
        .write_all(&0x1234_5678_u32.to_le_bytes())
        .unwrap();
    drop(driver);
    let mut next = Driver::new(&served, 0);
    next.boot();
    next.wait(
        partition::BASE,
        &partition::STATE,
        regs::OwnerState::Free.code(),
    );
    // Nobody owns it in either case.
    next.claim();
    let mut word = [0; 4];
    next.hbm.read_exact_at(&mut word, 0).unwrap();
    drop(next);
    served.stop();
    u32::from_le_bytes(word)
}

#[test]
fn the_next_client_finds_zeros_unless_contents_are_to_be_kept() {
    assert_eq!(left_to_the_next(&[]), 0);
    assert_eq!(left_to_the_next(&["--hbm-on-disconnect", "scrub"]), 0);
    assert_eq!(
        left_to_the_next(&["--hbm-on-disconnect", "keep"]),
        0x1234_5678
    );
}

#[test]
fn a_second_client_waits_for_its_turn_where_that_is_wanted() {
    let served = Served::new(&["--second-client", "queue"]);
    let first = Driver::new(&served, 0);
    let socket = served.corner.file("gpu0.sock");
    let second = std::thread::spawn(move || {
        let mut client = Client::new(&socket).unwrap();
        let mut magic = [0; 4];
        client.region_read(0, 0, &mut magic).unwrap();
        magic
    });
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(&second.join().unwrap(), b"NGPU");
    served.stop();
}

#[test]
fn the_status_shows_both_gpus_and_what_a_driver_does() {
    let served = Served::new(&[]);
    let mode = served.socket().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let status = served.status();
    assert_eq!(status["machine"], "two-gpu");
    assert_eq!(status["pid"], served.process.pid());
    assert_eq!(status["scenario"], Value::Null);
    let gpus = status["gpus"].as_array().unwrap();
    assert_eq!(gpus.len(), 2);
    for (index, gpu) in gpus.iter().enumerate() {
        assert_eq!(gpu["index"], index);
        assert_eq!(gpu["id"], format!("gpu{index}"));
        assert_eq!(
            (&gpu["attached"], &gpu["present"]),
            (&false.into(), &true.into())
        );
        assert_eq!(gpu["boot"], "reset");
        assert_eq!(gpu["partitions"][0]["base"], HBM[index]);
        assert_eq!(gpu["partitions"][0]["size"], HBM_SIZE);
        assert_eq!(gpu["partitions"][0]["coherence"], "not-mapped");
        assert_eq!(gpu["queues"].as_array().unwrap().len(), 2);
        assert_eq!(gpu["links"][0]["peer"], 1 - index);
    }

    let mut driver = Driver::new(&served, 0);
    driver.boot();
    driver.claim();
    driver.enable();
    driver.submit(&sdma::const_fill(HBM[0], 7, 4096));
    driver.wait_state(regs::QueueState::Idle);
    let gpu = served.gpu(0);
    assert_eq!(
        (&gpu["attached"], &gpu["boot"]),
        (&true.into(), &"ready".into())
    );
    let partition = &gpu["partitions"][0];
    assert_eq!(
        (&partition["state"], &partition["generation"]),
        (&"claimed".into(), &1.into())
    );
    assert_eq!(partition["coherence"], "coherent");
    let last = partition["history"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["from"], &last["event"], &last["to"]),
        (&"free".into(), &"claim".into(), &"claimed".into())
    );
    let queue = &gpu["queues"][0];
    assert_eq!(
        (&queue["state"], &queue["packets"]),
        (&"idle".into(), &1.into())
    );
    assert_eq!(
        (&queue["bytes"], &queue["rptr"]),
        (&4096.into(), &20.into())
    );

    // For people, by the socket, its directory, and without either. Nobody learns the token.
    let directory = served.corner.file("");
    let paths = [
        directory.to_string_lossy(),
        served.socket().to_string_lossy().into_owned().into(),
    ];
    for path in paths.iter().map(|path| Some(&**path)).chain([None]) {
        let mut arguments = vec!["status"];
        arguments.extend(path);
        let text = served.corner.command(&arguments);
        text.assert_code(0);
        for words in [
            "two-gpu: 2 GPU(s)",
            "GPU 0 gpu0: VMM connected, boot ready",
            "claimed",
            "GPU 1 gpu1: no VMM, boot reset",
        ] {
            assert!(text.stdout.contains(words), "no `{words}` in {text}");
        }
        let json = served.status().to_string();
        for form in [format!("{TOKEN}"), format!("{TOKEN:x}")] {
            assert!(!text.stdout.contains(&form) && !json.contains(&form));
        }
    }
    drop(driver);
    served.stop();
}

#[test]
fn every_fault_comes_by_the_command_line() {
    let served = Served::new(&[]);
    let mut driver = Driver::new(&served, 0);
    driver.boot();
    for fault in Fault::EXAMPLES {
        let line = format!("0 {fault}");
        let ended = served.inject(&line);
        ended.assert_code(0);
        assert_eq!(
            (&*ended.stdout, &*ended.stderr),
            (&*format!("GPU 0: {fault}\n"), "")
        );
    }
    // The last one plugs it in again.
    assert_eq!(served.gpu(0)["present"], true);
    drop(driver);
    served.stop();
}

#[test]
fn memory_errors_show_in_the_status_and_in_registers() {
    let served = Served::new(&[]);
    let mut driver = Driver::new(&served, 0);
    driver.boot();
    driver.claim();
    driver.enable();
    served.injected("0 correctable-error --address 0x1_0000_0000");
    served.injected("0 uncorrectable-error --address 4294971392");
    let health = &served.gpu(0)["health"];
    assert_eq!(
        (&health["correctable"], &health["uncorrectable"]),
        (&1.into(), &1.into())
    );
    assert_eq!(
        (&health["poisoned"], &health["retired"]),
        (&1.into(), &0.into())
    );
    assert_eq!(driver.get(ras::BASE, &ras::LAST_ADDRESS), HBM[0] + 4096);
    // What stopped a queue is told too: here the line with the error, then a write to HBM that its token does not own.
    driver.submit(&sdma::copy_linear(HBM[0] + 4096, HBM[0] + 8192, 64));
    driver.wait_state(regs::QueueState::Fault);
    let queue = &served.gpu(0)["queues"][0];
    assert_eq!(queue["fault"], "poisoned");
    assert_eq!(queue["fault_address"], HBM[0] + 4096);
    driver.enable();
    assert_eq!(driver.command(OwnerCommand::Release), Some(OwnerResult::Ok));
    driver.submit(&sdma::const_fill(HBM[0] + 4096, 7, 4096));
    driver.wait_state(regs::QueueState::Fault);
    let queue = &served.gpu(0)["queues"][0];
    assert_eq!(
        (&queue["state"], &queue["fault"]),
        (&"fault".into(), &"not-owned".into())
    );
    assert_eq!(queue["fault_address"], HBM[0] + 4096);
    drop(driver);
    served.stop();
}

#[test]
fn engines_doorbells_and_interrupts_get_lost() {
    let served = Served::new(&[]);
    let mut driver = Driver::new(&served, 0);
    driver.boot();
    driver.enable();
    served.injected("0 lost-doorbell --queue 0 --count 2");
    driver.submit(&[0]);
    driver.ring();
    assert_eq!(served.gpu(0)["queues"][0]["wptr"], 0);
    driver.ring();
    driver.wait(queue::BASE, &queue::PACKETS, 1);
    served.injected("0 engine-hang --queue 0");
    driver.submit(&[0]);
    driver.wait_state(regs::QueueState::Running);
    let queue = &served.gpu(0)["queues"][0];
    assert_eq!(
        (&queue["state"], &queue["packets"]),
        (&"running".into(), &1.into())
    );
    driver.enable();
    driver.submit(&[0]);
    driver.wait(queue::BASE, &queue::PACKETS, 1);
    // The message of the trap that follows is lost; its bit is there.
    driver.set(irq::BASE, &irq::ENABLE, u64::MAX);
    served.injected("0 lost-interrupt");
    driver.submit(&sdma::trap(5));
    driver.wait(queue::BASE, &queue::TRAP_CONTEXT, 5);
    assert_ne!(driver.get(irq::BASE, &irq::STATUS), 0);
    assert_eq!(served.gpu(0)["interrupts"], 0);
    served.injected("0 spurious-interrupt --vector 3");
    drop(driver);
    served.stop();
}

#[test]
fn links_go_down_and_come_back() {
    let served = Served::new(&[]);
    let link = |gpu: usize| served.gpu(gpu)["links"][0].clone();
    served.injected("0 link-loss --peer 1");
    for gpu in 0..2 {
        assert_eq!(
            (&link(gpu)["state"], &link(gpu)["errors"]),
            (&"down".into(), &1.into())
        );
    }
    served.injected("1 link-return --peer 0");
    assert_eq!(
        (&link(0)["state"], &link(1)["state"]),
        (&"up".into(), &"up".into())
    );
    served.injected("0 link-width --peer 1 --lanes 1");
    assert_eq!(
        (&link(1)["state"], &link(1)["lanes"]),
        (&"degraded".into(), &1.into())
    );
    served.injected("1 link-return --peer 0");
    served.injected("0 link-flap --peer 1 --down-ms 1");
    let back = wait_until(COMMAND, || link(0)["state"] == "up");
    assert!(back && link(0)["errors"] == 3, "{}", link(0));
    served.stop();
}

#[test]
fn boots_and_scrubs_fail_and_a_reset_gets_stuck() {
    let served = Served::new(&[]);
    let mut driver = Driver::new(&served, 0);
    served.injected("0 boot-failure --code 0x42");
    driver.start();
    driver.wait(boot::BASE, &boot::STATUS, regs::BootState::Fault.code());
    assert_eq!(driver.get(boot::BASE, &boot::FAULT), 0x42);
    assert_eq!(served.gpu(0)["boot"], "fault");
    served.injected("0 boot-timeout");
    driver.client.reset().unwrap();
    driver.client.region_write(7, 4, &[6, 0]).unwrap();
    driver.start();
    driver.wait(boot::BASE, &boot::STATUS, regs::BootState::Booting.code());
    driver.client.reset().unwrap();
    driver.client.region_write(7, 4, &[6, 0]).unwrap();
    driver.boot();
    served.injected("0 scrub-failure --partition 0");
    driver.claim();
    assert_eq!(driver.command(OwnerCommand::Release), Some(OwnerResult::Ok));
    driver.wait(
        partition::BASE,
        &partition::STATE,
        regs::OwnerState::Faulted.code(),
    );
    assert_eq!(served.gpu(0)["partitions"][0]["state"], "faulted");
    served.injected("0 stuck-reset --ms 0");
    driver.client.reset().unwrap();
    assert_eq!(served.gpu(0)["present"], false);
    assert_eq!(driver.get(boot::BASE, &boot::STATUS), 0xffff_ffff);
    served.injected("0 return");
    assert_eq!(served.gpu(0)["present"], true);
    drop(driver);
    served.stop();
}

#[test]
fn a_gpu_is_pulled_out_and_plugged_in_again() {
    let served = Served::new(&[]);
    let mut driver = Driver::new(&served, 0);
    driver.boot();
    driver.claim();
    served.injected("0 removal");
    let text = served.corner.command(&["status"]).stdout;
    assert!(text.contains("GPU 0 gpu0: does not answer"), "{text}");
    assert_eq!(driver.get(boot::BASE, &boot::STATUS), 0xffff_ffff);
    served.injected("0 return");
    let gpu = served.gpu(0);
    assert_eq!(
        (&gpu["present"], &gpu["boot"]),
        (&true.into(), &"reset".into())
    );
    assert_eq!(gpu["partitions"][0]["loss"], "hot-reset");
    drop(driver);
    served.stop();
}

#[test]
fn what_is_not_there_is_an_error_with_its_numbers() {
    let served = Served::new(&[]);
    for (line, code, message) in [
        (
            "2 removal",
            2,
            "the machine has 2 GPU(s), so there is no number 2",
        ),
        (
            "0 engine-hang --queue 2",
            2,
            "the GPU has 2 queues, so there is no number 2",
        ),
        (
            "0 spurious-interrupt --vector 9",
            2,
            "the GPU has 9 vectors, so there is no number 9",
        ),
        (
            "0 scrub-failure --partition 1",
            2,
            "the GPU has 1 partitions, so there is no number 1",
        ),
        (
            "0 correctable-error --address 0x280000000",
            2,
            "0x280000000 is not in this GPU's HBM",
        ),
        (
            "0 boot-failure --code 0",
            2,
            "a boot fault has a code other than 0",
        ),
    ] {
        let ended = served.inject(line);
        assert_eq!(
            failed(&ended, code),
            format!("numagpu: {message}\n"),
            "{line}"
        );
    }
    for line in [
        "0",
        "0 meteor",
        "0 engine-hang",
        "x removal",
        "0 removal --queue 1",
        "0 boot-failure --code 0x100000000",
    ] {
        let said = failed(&served.inject(line), 2);
        assert!(said.starts_with("error: ") || line == "0", "{said}");
    }
    // 4096 lines are poisoned, and then it is enough.
    let mut stream = UnixStream::connect(served.socket()).unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stream.try_clone().unwrap()));
    for line in 0..4096 {
        let address = HBM[0] + line * 64;
        let kind = "uncorrectable-error";
        writeln!(stream, r#"{{"version":1,"request":"inject","gpu":0,"fault":{{"kind":"{kind}","address":{address}}}}}"#).unwrap();
        let reply = lines.next().unwrap().unwrap();
        assert!(reply.starts_with(r#"{"version":1,"injected":"#), "{reply}");
    }
    let ended = served.inject("0 uncorrectable-error --address 0x1_1000_0000");
    assert_eq!(
        failed(&ended, 1),
        "numagpu: 4096 lines are poisoned already\n"
    );
    drop((stream, lines));
    served.stop();
}

#[test]
fn an_instance_that_is_not_there_or_not_alone_is_named() {
    let corner = Corner::new();
    let none = failed(&corner.command(&["status"]), 1);
    assert_eq!(
        none,
        "numagpu: no instance of this user is running; give the control socket, or the directory that has it\n"
    );
    let nowhere = corner.file("");
    let nowhere = nowhere.to_string_lossy();
    assert_eq!(
        failed(&corner.command(&["status", &nowhere]), 1),
        format!(
            "numagpu: no instance answers at {nowhere}control.sock: No such file or directory (os error 2)\n"
        )
    );
    let first = Served::in_corner(corner, &[]);
    let second = first.corner.file("second");
    std::fs::create_dir(&second).unwrap();
    let arguments = [
        "serve",
        "two-gpu",
        "--socket-dir",
        &second.to_string_lossy(),
    ];
    let mut other = Process::spawn(first.corner.numagpu(&arguments));
    other.wait_for("ready: 2 GPU(s)", COMMAND);
    let sockets = [first.socket(), second.join("control.sock")];
    let several = failed(&first.corner.command(&["inject", "0", "removal"]), 2);
    assert_eq!(
        several,
        format!(
            "numagpu: 2 instances of this user are running; give the control socket of one:\n  {}\n  {}\n",
            sockets[0].display(),
            sockets[1].display()
        )
    );
    let control = second.to_string_lossy();
    let ended = first
        .corner
        .command(&["inject", "--control", &control, "1", "removal"]);
    ended.assert_code(0);
    assert_eq!(first.gpu_at(&sockets[0], 1)["present"], true);
    assert_eq!(first.gpu_at(&sockets[1], 1)["present"], false);
    other.signal(Signal::TERM);
    other.wait(COMMAND).assert_code(0);
    first.stop();
}

impl Served {
    /// A GPU of the instance at this socket.
    #[track_caller]
    fn gpu_at(&self, socket: &std::path::Path, index: usize) -> Value {
        let ended = self
            .corner
            .command(&["status", "--json", &socket.to_string_lossy()]);
        ended.assert_code(0);
        let status: Value = serde_json::from_str(&ended.stdout).unwrap();
        status["gpus"][index].clone()
    }
}

#[test]
fn a_scenario_plays_in_its_order() {
    let served = Served::playing(
        r#"
[[fault]]
gpu = 0
kind = "engine-hang"
queue = 0
after_packets = { queue = 0, packets = 2 }

[[fault]]
gpu = 0
kind = "uncorrectable-error"
address = 0x1_0000_0000
when_claimed = 0

[[fault]]
gpu = 0
kind = "correctable-error"
address = 0x1_0000_0000
when_ready = true
repeat = 3
every_ms = 1

[[fault]]
gpu = 1
kind = "link-loss"
peer = 0
at_ms = 0

[[fault]]
gpu = 1
kind = "scrub-failure"
partition = 3
at_ms = 1

[[fault]]
gpu = 1
kind = "removal"
at_ms = 86400000
"#,
    );
    assert_eq!(served.fired(), [0; 6]);
    assert_eq!(served.status()["scenario"]["now_ms"], Value::Null);
    let text = served.corner.command(&["status"]).stdout;
    assert!(
        text.contains("scenario.toml: 6 fault(s), 6 pending, no VMM has connected yet"),
        "{text}"
    );

    let mut driver = Driver::new(&served, 0);
    served.wait_fired(&[0, 0, 0, 1, 1, 0]);
    assert_eq!(served.gpu(0)["links"][0]["state"], "down");
    let status = served.status();
    let error = &status["scenario"]["faults"][4]["error"];
    assert_eq!(error, "the GPU has 1 partitions, so there is no number 3");
    driver.boot();
    served.wait_fired(&[0, 0, 3, 1, 1, 0]);
    assert_eq!(served.gpu(0)["health"]["correctable"], 3);
    assert_eq!(served.gpu(0)["health"]["poisoned"], 0);
    driver.claim();
    served.wait_fired(&[0, 1, 3, 1, 1, 0]);
    assert_eq!(served.gpu(0)["health"]["poisoned"], 1);
    driver.enable();
    driver.submit(&[0]);
    driver.wait(queue::BASE, &queue::PACKETS, 1);
    driver.submit(&[0]);
    served.wait_fired(&[1, 1, 3, 1, 1, 0]);
    driver.submit(&[0]);
    driver.wait_state(regs::QueueState::Running);
    // Each comes as often as it should and not again.
    driver.enable();
    for _ in 0..3 {
        driver.submit(&[0]);
    }
    driver.wait(queue::BASE, &queue::PACKETS, 3);
    assert_eq!(served.fired(), [1, 1, 3, 1, 1, 0]);
    let status = served.status();
    let order = |index: usize| {
        status["scenario"]["faults"][index]["fired_at_ms"]
            .as_u64()
            .unwrap()
    };
    assert!(
        order(3) <= order(4)
            && order(4) <= order(2)
            && order(2) <= order(1)
            && order(1) <= order(0)
    );
    let text = served.corner.command(&["status"]).stdout;
    assert!(
        text.contains("scenario.toml: 6 fault(s), 1 pending, "),
        "{text}"
    );
    drop(driver);
    // The last one is still to come, and keeps nobody waiting.
    served.stop();
}

#[test]
fn a_claim_that_is_over_soon_is_seen() {
    let served = Served::playing("[[fault]]\ngpu = 1\nkind = \"removal\"\nwhen_claimed = 0\n");
    let mut driver = Driver::new(&served, 1);
    driver.boot();
    driver.claim();
    driver.command(OwnerCommand::Release);
    served.wait_fired(&[1]);
    assert_eq!(served.gpu(1)["present"], false);
    drop(driver);
    served.stop();
}

#[test]
fn a_scenario_that_does_not_fit_is_refused_before_anything_is_served() {
    let corner = Corner::new();
    let directory = corner.file("");
    let directory = directory.to_string_lossy();
    let path = corner.file("it.toml");
    let path = path.to_string_lossy();
    let serve = [
        "serve",
        "two-gpu",
        "--socket-dir",
        &directory,
        "--scenario",
        &path,
    ];
    let run = ["run", "two-gpu", "--scenario", &path];
    let missing = format!("numagpu: read {path}: No such file or directory (os error 2)\n");
    for arguments in [&serve[..], &run] {
        let _ = std::fs::remove_file(&*path);
        assert_eq!(failed(&corner.command(arguments), 2), missing);
        for (text, wanted) in [
            (
                "[[fault]]\ngpu = 4\nkind = \"removal\"\nat_ms = 0\n",
                "2: fault[0].gpu: is 4; there are 2 GPUs\n  help: it is 0 to 1\n",
            ),
            (
                "[[fault]]\ngpu = 0\nkind = \"removal\"\nat = 0\n",
                "4: fault[0].at: there is no such key\n  help: [[fault]] takes gpu, kind, at_ms, when_ready, when_claimed, after_packets, repeat, every_ms, address, code, count, down_ms, lanes, ms, partition, peer, queue, vector\n",
            ),
        ] {
            corner.write("it.toml", text);
            let said = failed(&corner.command(arguments), 2);
            assert_eq!(said, format!("numagpu: {path}:{wanted}"));
        }
    }
    assert!(!corner.file("control.sock").exists() && !corner.file("gpu0.sock").exists());
    corner.assert_empty();
}
