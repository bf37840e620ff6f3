//! The driver of the device that `vmm-glue/examples/checksum.rs` serves, if there is one: as for any function that is
//! not a GPU, all that it knows is the device's registers.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::device::{Outcome, route_vector, wait};
use crate::probe::{names, number, text};
use crate::sys::Mapping;

/// Vendor and device id.
const IDS: (u64, u64) = (0x1234, 0x6771);
/// Registers.
const SOURCE: usize = 0x00;
const DESTINATION: usize = 0x08;
const LENGTH: usize = 0x10;
const DOORBELL: usize = 0x14;
const STATUS: usize = 0x18;
const SUM: usize = 0x20;
/// Bits of `STATUS`.
const DONE: u32 = 1;
const FAILED: u32 = 2;

/// Where source, destination and message are in the buffer, and how much is copied.
const FROM: usize = 0;
const TO: usize = 0x10000;
const MESSAGE: usize = 0x20000;
const BYTES: u16 = 0x3000;

/// Drives every such device with a buffer that it reaches at a physical address.
pub fn drive(buffer: &Mapping, physical: u64, problems: &mut Vec<String>) {
    let devices = Path::new("/sys/bus/pci/devices");
    for name in names(devices) {
        let path = devices.join(&name);
        let id = |file: &str| number(&text(path.join(file)));
        if (id("vendor"), id("device")) != (Some(IDS.0), Some(IDS.1)) {
            continue;
        }
        if let Err(error) = drive_one(&path, buffer, physical) {
            problems.push(format!("{name}: {error}"));
        }
    }
}

fn drive_one(path: &Path, buffer: &Mapping, physical: u64) -> Outcome {
    let failed = |error: std::io::Error| error.to_string();
    fs::write(path.join("enable"), "1").map_err(failed)?;
    let open = |file: &str| -> Outcome<File> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path.join(file));
        opened.map_err(|error| format!("{file}: {error}"))
    };
    let registers = Mapping::file(&open("resource0")?, 0, 0x1000).map_err(failed)?;
    let msix = Mapping::file(&open("resource1")?, 0, 0x2000).map_err(failed)?;
    let config = open("config")?;
    let bytes = usize::from(BYTES);
    let command = |bits: u16| config.write_all_at(&bits.to_le_bytes(), 4).map_err(failed);

    buffer.fill(FROM, bytes, 0x0102_0304_0506_0708);
    buffer.fill(TO, bytes, 0);
    buffer.write32(MESSAGE, 0);
    route_vector(&config, &msix, 0, physical + MESSAGE as u64, 0x600d)?;
    let job = |expected: u32| {
        registers.write64(SOURCE, physical + FROM as u64);
        registers.write64(DESTINATION, physical + TO as u64);
        registers.write32(LENGTH, BYTES.into());
        registers.write32(DOORBELL, 1);
        let status = wait("a job's end", || {
            Some(registers.read32(STATUS)).filter(|status| *status != 0)
        })?;
        registers.write32(STATUS, status);
        if status != expected {
            return Err(format!("status {status} instead of {expected}"));
        }
        Ok(())
    };
    // Memory without bus master: the device must not reach the buffer. Its message would be a memory write as well.
    command(0b010)?;
    job(FAILED)?;
    command(0b110)?;
    buffer.write32(MESSAGE, 0);
    job(DONE)?;
    wait("the device's message", || {
        (buffer.read32(MESSAGE) == 0x600d).then_some(())
    })?;
    buffer.check(TO, bytes, 0x0102_0304_0506_0708)?;
    let mut sum = 0;
    for at in (FROM..FROM + bytes).step_by(8) {
        sum += buffer
            .read64(at)
            .to_le_bytes()
            .map(u64::from)
            .iter()
            .sum::<u64>();
    }
    let seen = registers.read64(SUM);
    if seen != sum {
        return Err(format!("sum {seen:#x} instead of {sum:#x}"));
    }
    Ok(())
}
