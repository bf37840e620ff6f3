//! The guest's first file system: the agent as `/init`, the modules of one kernel, and lspci.
//!
//! It is not compressed: at 2 MB (and at 7 MB) neither gzip nor zstd changed the time to `/init`
//! under emulation by more than runs differ, and a plain one is easier to look into.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use cpio::newc::{Builder, trailer};
use numagpu_vmm_glue::assets::Kernel;

use super::{Workshop, host, lspci};
use crate::workspace::cargo;

/// The agent's package and program.
const AGENT: &str = "numagpu-agent";

/// The agent runs on a bare kernel, so it is linked statically; naming the target keeps the flag
/// off build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Mount points and `/dev`, which also holds the console that the kernel opens for `/init`.
const DIRS: [&str; 10] = [
    "proc",
    "sys",
    "dev",
    "tmp",
    "run",
    "modules",
    lspci::DIR,
    "usr",
    "lib",
    "lib/modules",
];

/// File type and permissions of what the archive holds.
const DIR: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The device number of `/dev/console`.
const CONSOLE: (u32, u32) = (5, 1);

/// Builds the agent, if its sources changed, and each kernel's initramfs, if that changed.
pub fn provide(shop: &Workshop, kernels: &[Kernel]) -> Result<()> {
    let agent = build_agent(shop)?;
    let init = std::fs::read(&agent).with_context(|| format!("no {}", agent.display()))?;
    let lspci = lspci::program()?;
    for kernel in kernels {
        let dir = kernel
            .initrd
            .parent()
            .context("an initramfs is in its kernel's directory")?;
        let modules = dir.join("modules");
        let index = lspci::module_index(&kernel.release, &modules, &kernel.modules)?;
        let files = Files {
            init: &init,
            modules_dir: &modules,
            modules: &kernel.modules,
            release: &kernel.release,
            others: lspci.iter().chain(&index).collect(),
        };
        let image = image(&files)?;
        if host::write_if_new(&kernel.initrd, &image)? {
            let size = host::megabytes(u64::try_from(image.len())?);
            host::say(format!("kernel {}: initramfs made, {size}", kernel.name));
        }
    }
    Ok(())
}

/// Has cargo build the agent, which costs little if nothing changed; returns where it is.
fn build_agent(shop: &Workshop) -> Result<PathBuf> {
    host::need(&["cc"])?;
    // A target directory of its own: other flags would make cargo build everything anew in turns.
    let target_dir = shop.dir.join("agent-target");
    let mut command = cargo();
    command
        .current_dir(&shop.workspace)
        .args([
            "build",
            "--quiet",
            "--release",
            "--target",
            TARGET,
            "--package",
            AGENT,
        ])
        .arg("--target-dir")
        .arg(&target_dir)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    let agent = target_dir.join(TARGET).join("release").join(AGENT);
    if !agent.exists() {
        host::say("building the guest's agent");
    }
    // cargo speaks to the user itself: warnings and errors of the compiler are of use in full.
    let status = command.status().context("cargo cannot be started")?;
    if !status.success() {
        bail!("the guest's agent does not build: {status}");
    }
    Ok(agent)
}

/// What goes into an archive.
struct Files<'a> {
    /// The agent.
    init: &'a [u8],
    /// Where the modules are, and their names in the order of loading.
    modules_dir: &'a Path,
    modules: &'a [String],
    /// The kernel's release.
    release: &'a str,
    /// Programs and their data.
    others: Vec<&'a lspci::File>,
}

/// The archive in memory. Same input, same bytes: no times, no owners.
fn image(files: &Files<'_>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for name in DIRS {
        archive.add(name, DIR, &[])?;
    }
    archive.device = CONSOLE;
    archive.add("dev/console", CHARACTER_DEVICE, &[])?;
    archive.device = (0, 0);
    archive.add("init", PROGRAM, files.init)?;
    archive.add("usr/lib", LINK, b"../lib")?;
    archive.add(&format!("lib/modules/{}", files.release), DIR, &[])?;
    for file in &files.others {
        archive.add(&file.path, PROGRAM, &file.content)?;
    }
    let mut list = String::new();
    for module in files.modules {
        let path = files.modules_dir.join(module);
        let content =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        archive.add(&format!("modules/{module}"), FILE, &content)?;
        list += &format!("/modules/{module}\n");
    }
    archive.add("modules.list", FILE, list.as_bytes())?;
    Ok(trailer(archive.bytes)?)
}

/// A cpio archive as it grows.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    count: u32,
    /// Device number of the entries to come.
    device: (u32, u32),
}

impl Archive {
    /// Appends an entry, with an inode number of its own (equal ones would be hard links).
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.count += 1;
        let builder = Builder::new(name)
            .ino(self.count)
            .nlink(1)
            .mode(mode)
            .rdev_major(self.device.0)
            .rdev_minor(self.device.1);
        let mut writer = builder.write(&mut self.bytes, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_lists_its_modules_in_order_and_is_the_same_each_time() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.ko", "a.ko"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let modules = ["b.ko".to_owned(), "a.ko".to_owned()];
        let program = lspci::File {
            path: "lspci/lspci".to_owned(),
            content: b"program".to_vec(),
        };
        let files = Files {
            init: b"init program",
            modules_dir: dir.path(),
            modules: &modules,
            release: "6.12",
            others: vec![&program],
        };
        let first = image(&files).unwrap();
        assert_eq!(first, image(&files).unwrap());

        let mut rest = first.as_slice();
        let (mut names, mut list) = (Vec::new(), String::new());
        loop {
            let mut reader = cpio::NewcReader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let name = reader.entry().name().to_owned();
            if name == "modules.list" {
                std::io::Read::read_to_string(&mut reader, &mut list).unwrap();
            }
            names.push(name);
            rest = reader.finish().unwrap();
        }
        assert_eq!(list, "/modules/b.ko\n/modules/a.ko\n");
        assert!(
            names.iter().position(|n| n == "modules")
                < names.iter().position(|n| n == "modules/b.ko")
        );
        for name in ["init", "dev/console", "lspci/lspci", "lib/modules/6.12"] {
            assert!(names.contains(&name.to_owned()), "{name} in {names:?}");
        }
    }
}
