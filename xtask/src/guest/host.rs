//! The machine that the assets are made on: its programs, what they say, and words to the user.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// How often a step that needs the network is tried.
const TRIES: u32 = 3;

/// A host program and the Debian package that has it.
const PACKAGES: [(&str, &str); 9] = [
    ("apt-get", "apt"),
    ("apt-cache", "apt"),
    ("dpkg-deb", "dpkg"),
    ("dpkg-query", "dpkg"),
    ("cc", "gcc libc6-dev"),
    ("iasl", "acpica-tools"),
    ("lspci", "pciutils"),
    ("kmod", "kmod"),
    ("lstopo-no-graphics", "hwloc-nox"),
];

/// One line of progress or of a decision taken.
pub fn say(line: impl AsRef<str>) {
    println!("guest: {}", line.as_ref());
}

/// Finds a program as the shell would.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| is_executable(file))
}

/// Whether `file` is a file that may be executed.
fn is_executable(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Sees to it that the programs are there: installs their packages as root, else says what to do.
pub fn need(programs: &[&str]) -> Result<()> {
    let missing: Vec<&str> = programs
        .iter()
        .copied()
        .filter(|program| which(program).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = PACKAGES
        .iter()
        .filter(|(program, _)| missing.contains(program))
        .flat_map(|(_, packages)| packages.split(' '))
        .collect();
    let (missing, names) = (missing.join(", "), packages.join(" "));
    if which("apt-get").is_none() {
        bail!("{missing} not found, and no apt-get to install it: a Debian-like host is needed");
    }
    if !is_root() {
        bail!("{missing} not found; as root: apt-get install {names}");
    }
    say(format!("{missing} not found: installing {names}"));
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "-y", "-qq", "--no-install-recommends"])
            .args(&packages);
        output(command.env("DEBIAN_FRONTEND", "noninteractive"))
    };
    if install().is_err() {
        retry("apt-get update", || {
            output(Command::new("apt-get").args(["-qq", "update"]))
        })?;
        retry("apt-get install", install)?;
    }
    Ok(())
}

/// Whether this process may install packages.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// Runs a command to its end and returns what it printed; its errors become the error's text.
pub fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .env("LC_ALL", "C.UTF-8")
        .stdin(std::process::Stdio::null())
        .output()
        .with_context(|| format!("{program} cannot be started"))?;
    if !done.status.success() {
        bail!("{program}: {}: {}", done.status, last_lines(&done.stderr));
    }
    String::from_utf8(done.stdout).with_context(|| format!("{program} printed no text"))
}

/// The end of what a program complained of, which is where the reason stands.
pub fn last_lines(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines
        .get(lines.len().saturating_sub(6)..)
        .unwrap_or_default()
        .join("; ")
}

/// Tries a step up to three times, with growing pauses: mirrors and proxies have weak moments.
pub fn retry<T>(what: &str, mut step: impl FnMut() -> Result<T>) -> Result<T> {
    let mut tried = 1;
    loop {
        match step() {
            Err(error) if tried < TRIES => {
                let pause = Duration::from_secs(2 * u64::from(tried * tried));
                say(format!(
                    "{what} failed, trying again in {} s: {error:#}",
                    pause.as_secs()
                ));
                std::thread::sleep(pause);
                tried += 1;
            }
            Err(error) => return Err(error.context(format!("{what} failed {TRIES} times"))),
            Ok(value) => return Ok(value),
        }
    }
}

/// Bytes as people read them.
pub fn megabytes(bytes: u64) -> String {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}

/// Writes a file under a temporary name and renames it: readers see the old or the new one.
pub fn write_atomic(path: &Path, content: &[u8]) -> Result<()> {
    let part = part_name(path);
    std::fs::write(&part, content).with_context(|| format!("cannot write {}", part.display()))?;
    std::fs::rename(&part, path).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file unless it has that content already, so that its age says when it changed.
pub fn write_if_new(path: &Path, content: &[u8]) -> Result<bool> {
    let new = std::fs::read(path).map_or(true, |old| old != content);
    if new {
        write_atomic(path, content)?;
    }
    Ok(new)
}

/// `name.part` for `name`: what is not finished.
pub fn part_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    PathBuf::from(name)
}

/// Removes a directory and what is in it, if it is there.
pub fn remove_dir(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Puts the finished directory `from` in the place of `to`.
pub fn replace_dir(from: &Path, to: &Path) -> Result<()> {
    remove_dir(to)?;
    std::fs::rename(from, to).with_context(|| format!("cannot move to {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_the_reason() {
        let text = "Reading\n\nW: odd\nE: Unable to locate package x\n";
        assert_eq!(
            last_lines(text.as_bytes()),
            "Reading; W: odd; E: Unable to locate package x"
        );
    }

    #[test]
    fn sizes_have_one_decimal() {
        assert_eq!(megabytes(37_890_300), "37.8 MB");
    }
}
