//! A QEMU that runs no guest: its machine is put together and then looked into over the qtest protocol (QEMU
//! `docs/devel/testing/qtest.rst`).

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use numagpu_topology::Plan;
use numagpu_topology::linux::BootPath;
use numagpu_topology::qemu::{self, Host};
use numagpu_vmm_glue::instance::Instance;
use numagpu_vmm_glue::sys::child::spawn_tied;

use crate::corner::COMMAND;

/// Port of fw_cfg's DMA address, upper half; the lower half is at the next four (QEMU `docs/specs/fw_cfg.rst`).
const FW_CFG_DMA: u16 = 0x514;
/// Key of fw_cfg's directory.
const FW_CFG_DIRECTORY: u16 = 0x19;
/// `FW_CFG_DMA_CTL_READ` and `FW_CFG_DMA_CTL_SELECT`.
const READ_SELECTED: u32 = 2 | 8;
/// Bytes of a directory entry: size, key, two bytes of nothing, a name of 56.
const DIRECTORY_ENTRY: usize = 64;
/// Where a DMA command is put in the guest's RAM.
const COMMAND_AT: u32 = 0x1000;
/// Where fw_cfg is told to put what it has.
const DATA_AT: u64 = 0x1_0000;

/// A QEMU with a planned machine; killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Qtest {
    stream: BufReader<UnixStream>,
    child: Child,
}

impl Drop for Qtest {
    fn drop(&mut self) {
        // Both fail only if it is gone and reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The plan's command line with a test instead of processors, and nothing to boot.
fn arguments(plan: &Plan, instance: &Instance, boot: BootPath, socket: &Path) -> Vec<String> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let hbm = instance.hbm_paths_for_child();
    let host = Host {
        boot,
        accel: "qtest".to_owned(),
        hbm: hbm.iter().map(|path| text(path)).collect(),
        sockets: instance.sockets().map(text).collect(),
        // Nobody connects, but the order in which QEMU walks its objects depends on the number of its monitors.
        qmp: Some(text(&socket.with_extension("qmp"))),
        ..Host::default()
    };
    let all = qemu::arguments(plan, &host).unwrap_or_else(|error| panic!("{error}"));
    let mut kept = Vec::new();
    let mut rest = all.into_iter();
    while let Some(argument) = rest.next() {
        if ["-kernel", "-append", "-serial"].contains(&argument.as_str()) {
            rest.next();
        } else {
            kept.push(argument);
        }
    }
    let socket = format!("unix:{}", socket.display());
    kept.extend(["-qtest", &socket, "-qtest-log", "none"].map(str::to_owned));
    kept
}

impl Qtest {
    /// Starts QEMU with the plan's machine, whose GPUs `instance` serves. Sockets are made in `directory`.
    ///
    /// # Panics
    /// With what QEMU said, if it ends instead.
    #[track_caller]
    pub fn start(qemu: &Path, plan: &Plan, instance: &Instance, directory: &Path) -> Qtest {
        // The limit on ranges under OVMF is the firmware's, and none runs.
        Qtest::start_as(BootPath::SeaBios, qemu, plan, instance, directory)
    }

    /// The same, put together as for a way to boot: for [`BootPath::Qboot`] all functions are on the root bus.
    #[track_caller]
    pub fn start_as(
        boot: BootPath,
        qemu: &Path,
        plan: &Plan,
        instance: &Instance,
        directory: &Path,
    ) -> Qtest {
        let socket = directory.join("qtest.sock");
        let listener = UnixListener::bind(&socket).expect("bind a socket");
        listener.set_nonblocking(true).expect("a socket's mode");
        let mut command = Command::new(qemu);
        command
            .args(arguments(plan, instance, boot, &socket))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = spawn_tied(command, &instance.hbm_fds()).expect("start QEMU");
        let deadline = Instant::now() + COMMAND;
        let stream = loop {
            if let Ok((stream, _)) = listener.accept() {
                break stream;
            }
            let ended = child.try_wait().expect("QEMU's status");
            if ended.is_some() || Instant::now() > deadline {
                let said = last_words(&mut child);
                panic!("QEMU ended or did not connect ({ended:?}): {said}");
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        std::fs::remove_file(&socket).expect("remove a socket");
        stream.set_nonblocking(false).expect("a socket's mode");
        stream
            .set_read_timeout(Some(COMMAND))
            .expect("a socket's time-out");
        Qtest {
            stream: BufReader::new(stream),
            child,
        }
    }

    /// Gives QEMU a command, and returns what stands behind `OK`.
    ///
    /// # Panics
    /// With what QEMU said, if it does not obey.
    #[track_caller]
    fn command(&mut self, command: &str) -> String {
        let mut line = String::new();
        let sent = writeln!(self.stream.get_mut(), "{command}");
        let heard = sent.and_then(|()| self.stream.read_line(&mut line));
        match line.strip_prefix("OK") {
            Some(answer) => answer.trim().to_owned(),
            None => {
                let said = last_words(&mut self.child);
                panic!("QEMU to `{command}`: {heard:?} {line:?}: {said}");
            }
        }
    }

    /// Reads or writes configuration space of a function on the root bus, 4 bytes at `offset`, by the ports of PCI Local
    /// Bus 3.0 section 3.2.2.3.2.
    #[track_caller]
    pub fn config(&mut self, device: u8, offset: u8, value: Option<u32>) -> u32 {
        let address = 0x8000_0000 | u32::from(device) << 11 | u32::from(offset);
        self.command(&format!("outl 0xcf8 {address:#x}"));
        match value {
            Some(value) => {
                self.command(&format!("outl 0xcfc {value:#x}"));
                value
            }
            None => u32::try_from(number(&self.command("inl 0xcfc"))).expect("4 bytes"),
        }
    }

    /// Reads 4 or 8 bytes at an address.
    #[track_caller]
    pub fn read(&mut self, at: u64, bytes: u32) -> u64 {
        let letter = if bytes == 8 { 'q' } else { 'l' };
        number(&self.command(&format!("read{letter} {at:#x}")))
    }

    /// Writes 4 or 8 bytes at an address.
    #[track_caller]
    pub fn write(&mut self, at: u64, bytes: u32, value: u64) {
        let letter = if bytes == 8 { 'q' } else { 'l' };
        self.command(&format!("write{letter} {at:#x} {value:#x}"));
    }

    /// Reads the guest's RAM.
    #[track_caller]
    pub fn memory(&mut self, at: u64, len: usize) -> Vec<u8> {
        let answer = self.command(&format!("read {at:#x} {len:#x}"));
        let hex = answer.strip_prefix("0x").expect("hexadecimal digits");
        let byte = |pair: &[u8]| {
            let digits = std::str::from_utf8(pair).expect("digits");
            u8::from_str_radix(digits, 16).expect("digits")
        };
        hex.as_bytes().chunks(2).map(byte).collect()
    }

    /// Reads an item of fw_cfg by its key, by DMA into the guest's RAM.
    #[track_caller]
    fn item(&mut self, key: u16, len: usize) -> Vec<u8> {
        let control = (u32::from(key) << 16) | READ_SELECTED;
        let bytes = u32::try_from(len).expect("an item's size");
        // All fields are big-endian.
        let command = (u128::from(control) << 96) | (u128::from(bytes) << 64) | u128::from(DATA_AT);
        self.command(&format!("write {COMMAND_AT:#x} 16 {command:#034x}"));
        self.command(&format!("outl {FW_CFG_DMA:#x} 0"));
        let (port, address) = (FW_CFG_DMA + 4, COMMAND_AT.swap_bytes());
        self.command(&format!("outl {port:#x} {address:#x}"));
        assert_eq!(
            self.memory(u64::from(COMMAND_AT), 4),
            [0; 4],
            "fw_cfg's DMA failed"
        );
        self.memory(DATA_AT, len)
    }

    /// Reads a file of fw_cfg, such as `etc/e820`.
    ///
    /// # Panics
    /// If there is none of that name.
    #[track_caller]
    pub fn file(&mut self, name: &str) -> Vec<u8> {
        let number = |bytes: &[u8]| {
            bytes
                .iter()
                .fold(0usize, |all, byte| (all << 8) | usize::from(*byte))
        };
        let count = number(&self.item(FW_CFG_DIRECTORY, 4));
        let directory = self.item(FW_CFG_DIRECTORY, 4 + count * DIRECTORY_ENTRY);
        for entry in directory.split_at(4).1.chunks_exact(DIRECTORY_ENTRY) {
            let (numbers, text) = entry.split_at(8);
            let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
            if text == name.as_bytes() {
                let (size, key) = numbers.split_at(4);
                let key = u16::try_from(number(key.split_at(2).0)).expect("a key");
                return self.item(key, number(size));
            }
        }
        panic!("fw_cfg has no {name}");
    }
}

/// A number as QEMU writes it.
fn number(text: &str) -> u64 {
    let digits = text.strip_prefix("0x").expect("hexadecimal digits");
    u64::from_str_radix(digits, 16).expect("a number")
}

/// What a QEMU that is no longer wanted has said.
fn last_words(child: &mut Child) -> String {
    // Otherwise its output has no end.
    let _ = child.kill();
    let mut said = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        let _ = pipe.read_to_string(&mut said);
    }
    said
}
