//! The guest agent: init of the test guest.
//!
//! It mounts what Linux offers, loads the modules of the initramfs, notes what Linux found, drives every GPU as a
//! user-space driver would, sends one report to the host over the second serial port, and powers off.
//!
//! A word on the kernel's command line asks for another program than that of every guest:
//!
//! | word | program |
//! |---|---|
//! | `numagpu.hold` | the same, and the host looks into the HBM while it is owned |
//! | `numagpu.faults` | the faults of a scenario, one after the other ([`drive`]) |
//! | `numagpu.times` | accesses to registers, timed ([`drive`]) |
//! | `numagpu.vfio` | functions passed on by VFIO, behind an IOMMU ([`passthrough`]) |

mod device;
mod drive;
mod example;
mod hbm;
mod passthrough;
mod probe;
mod sys;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

use numagpu_topology::seen::{Message, Pattern, Report, SEPARATOR};
use rustix::mount::{MountFlags, mount};

use crate::drive::Drive;

/// The line to the host.
struct Host {
    port: Option<File>,
}

impl Host {
    fn open() -> Host {
        let port = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/ttyS1")
            .ok();
        Host {
            port: port.filter(|port| sys::raw_terminal(port).is_ok()),
        }
    }

    fn send(&mut self, message: &Message) {
        let Ok(text) = serde_json::to_string(message) else {
            return;
        };
        let line = format!("{}{text}\n", char::from(SEPARATOR));
        match &mut self.port {
            // A host that does not listen loses the line; there is nobody else to tell.
            Some(port) => drop(port.write_all(line.as_bytes()).and_then(|()| port.flush())),
            None => print!("{line}"),
        }
    }

    fn progress(&mut self, text: &str) {
        self.send(&Message::Progress {
            text: text.to_owned(),
        });
    }

    fn line(&mut self) -> io::Result<String> {
        let port = self.port.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let mut line = String::new();
        BufReader::new(port).read_line(&mut line)?;
        Ok(line)
    }
}

fn mounts(problems: &mut Vec<String>) {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        let mounted = fs::create_dir_all(target).and_then(|()| {
            mount(kind, target, kind, MountFlags::empty(), None).map_err(io::Error::from)
        });
        if let Err(error) = mounted
            && error.raw_os_error() != Some(rustix::io::Errno::BUSY.raw_os_error())
        {
            problems.push(format!("mount {target}: {error}"));
        }
    }
}

/// Loads the modules that `/modules.list` names, in its order, with the parameters that the kernel's command line has
/// for them, as modprobe does.
fn modules(problems: &mut Vec<String>) {
    let command_line = probe::text("/proc/cmdline");
    for line in probe::text("/modules.list").lines() {
        let path = Path::new("/").join(line.trim().trim_start_matches('/'));
        let stem = path
            .file_stem()
            .map(|stem| stem.to_string_lossy().replace('-', "_"))
            .unwrap_or_default();
        let prefix = format!("{stem}.");
        let parameters: Vec<&str> = command_line
            .split_whitespace()
            .filter(|word| word.replace('-', "_").starts_with(&prefix))
            .filter_map(|word| word.split_once('.').map(|(_, parameter)| parameter))
            .collect();
        let loaded =
            File::open(&path).and_then(|file| sys::load_module(&file, &parameters.join(" ")));
        if let Err(error) = loaded
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            problems.push(format!("module {}: {error}", path.display()));
        }
    }
}

/// Shows the host patterns in HBM, and looks for those that it writes in answer.
fn hold(host: &mut Host, drive: &Drive) -> Result<(), String> {
    let patterns = drive.write_patterns()?;
    host.send(&Message::Held { patterns });
    let answer = host
        .line()
        .map_err(|error| format!("the host's answer: {error}"))?;
    let patterns: Vec<Pattern> = serde_json::from_str(&answer)
        .map_err(|error| format!("the host's answer {answer:?}: {error}"))?;
    drive
        .check_patterns(&patterns)
        .map_err(|error| format!("the host's patterns: {error}"))
}

fn memory() -> u64 {
    probe::mem_total("/proc/meminfo")
}

fn main() {
    let mut report = Report::default();
    mounts(&mut report.problems);
    let mut host = Host::open();
    host.progress("Linux is up");
    modules(&mut report.problems);
    report.mem_total_kib.push(memory());
    report.dax = probe::dax(&mut report.problems);
    let command_line = probe::text("/proc/cmdline");
    let told = |program: &str| command_line.split_whitespace().any(|word| word == program);
    if told("numagpu.vfio") {
        host.progress("driver: functions behind the IOMMU");
        report.passthrough = passthrough::run(&report.dax);
        end(host, report);
        return;
    }
    match Drive::new(&report.dax, &mut report.problems) {
        Ok(mut drive) if told("numagpu.faults") => {
            host.progress("driver: meets the faults of the scenario");
            drive.faults();
            report.gpus = drive.finish();
        }
        Ok(mut drive) if told("numagpu.times") => {
            host.progress("driver: times accesses to registers");
            drive.time_accesses();
            report.gpus = drive.finish();
        }
        Ok(mut drive) => {
            host.progress("driver: boot and claim");
            drive.start();
            host.progress("driver: CPU access, copies, packets, interrupts, faults");
            drive.work();
            report.mem_total_kib.push(memory());
            // The host wants to look into the HBM while it is owned.
            if told("numagpu.hold") {
                host.progress("driver: holds its HBM");
                report.problems.extend(hold(&mut host, &drive).err());
            }
            let (buffer, physical) = drive.buffer();
            example::drive(buffer, physical, &mut report.problems);
            host.progress("driver: owners, leases, resets, partition modes");
            drive.stop();
            report.gpus = drive.finish();
        }
        Err(error) => report.problems.push(error),
    }
    end(host, report);
}

/// Sends the report, and powers off.
fn end(mut host: Host, mut report: Report) {
    probe::machine(&mut report);
    report.mem_total_kib.push(memory());
    host.send(&Message::Report(Box::new(report)));
    if std::process::id() == 1 {
        rustix::fs::sync();
        // Closing the port waits until the last byte is out.
        drop(host);
        let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    }
}
