//! Whether a QEMU and its surroundings can carry a machine, before anything is started.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use thiserror::Error;

/// Oldest QEMU that has what is needed.
pub const OLDEST_QEMU: (u32, u32) = (11, 1);
/// Devices that a QEMU has to have.
const DEVICES: [&str; 2] = ["sp-mem", "vfio-user-pci"];

/// Why a QEMU cannot be used.
#[derive(Debug, Error)]
pub enum EmulatorError {
    /// It is not there or does not run.
    #[error(
        "no QEMU: {path} does not run ({source}); run `cargo xtask guest`, or give --qemu PATH"
    )]
    Missing {
        /// What was tried.
        path: PathBuf,
        /// The host's error.
        source: std::io::Error,
    },
    /// It says nothing that looks like a version.
    #[error("{path} is no QEMU: `-version` says {said:?}; give --qemu PATH")]
    NotQemu {
        /// What was tried.
        path: PathBuf,
        /// First line of what it said.
        said: String,
    },
    /// It is too old.
    #[error(
        "{path} is QEMU {major}.{minor}, but {}.{} is the first with sp-mem and vfio-user-pci; run `cargo xtask guest`, or give --qemu PATH",
        OLDEST_QEMU.0, OLDEST_QEMU.1
    )]
    TooOld {
        /// What was tried.
        path: PathBuf,
        /// Its version.
        major: u32,
        /// Its version.
        minor: u32,
    },
    /// It was built without a device.
    #[error(
        "{path} has no device `{device}` (built without it); run `cargo xtask guest`, or give --qemu PATH"
    )]
    NoDevice {
        /// What was tried.
        path: PathBuf,
        /// The device.
        device: &'static str,
    },
}

fn say(path: &Path, arguments: &[&str]) -> Result<String, EmulatorError> {
    let output = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    let output = output.map_err(|source| EmulatorError::Missing {
        path: path.to_owned(),
        source,
    })?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Major and minor number in `QEMU emulator version 11.1.3 (Debian ...)`.
fn version(text: &str) -> Option<(u32, u32)> {
    let number = text.split_once("version ")?.1.split_whitespace().next()?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??))
}

/// Checks that QEMU runs, is new enough and has the devices.
///
/// # Errors
/// [`EmulatorError`], in one line that says what to do.
pub fn check_qemu(path: &Path) -> Result<(), EmulatorError> {
    let text = say(path, &["-version"])?;
    let Some((major, minor)) = version(&text) else {
        let said = text.lines().next().unwrap_or_default().to_owned();
        return Err(EmulatorError::NotQemu {
            path: path.to_owned(),
            said,
        });
    };
    if (major, minor) < OLDEST_QEMU {
        return Err(EmulatorError::TooOld {
            path: path.to_owned(),
            major,
            minor,
        });
    }
    let devices = say(path, &["-device", "help"])?;
    for device in DEVICES {
        if !devices.contains(&format!("name \"{device}\"")) {
            return Err(EmulatorError::NoDevice {
                path: path.to_owned(),
                device,
            });
        }
    }
    Ok(())
}

/// The accelerator to use: `kvm` where /dev/kvm can be opened and the processor has the extensions that a Linux guest
/// needs, else `tcg`. A paravirtual KVM without them runs micro-guests only.
pub fn accelerator() -> &'static str {
    let usable = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info
        .lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default();
    let extensions = flags
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    if usable && extensions { "kvm" } else { "tcg" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_read() {
        assert_eq!(
            version("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)\n"),
            Some((11, 1))
        );
        assert_eq!(version("QEMU emulator version 7.2.19"), Some((7, 2)));
        assert_eq!(version("hello"), None);
    }

    #[test]
    fn what_is_no_qemu_is_named() {
        let error = check_qemu(Path::new("/nonexistent/qemu"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no QEMU: /nonexistent/qemu") && error.contains("cargo xtask guest"),
            "{error}"
        );
        let error = check_qemu(Path::new("/bin/true")).unwrap_err().to_string();
        assert!(error.contains("is no QEMU"), "{error}");
    }
}
