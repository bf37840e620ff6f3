//! QEMU: the machine's own if it is new enough, else Debian's in a tree of its own.
//!
//! Debian's needs a newer libc than this machine may have, so the tree brings its own and QEMU is
//! started through the tree's dynamic loader by a small script.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use numagpu_vmm_glue::assets::Qemu;

use super::stamp::Stamp;
use super::{Workshop, apt, host, version};

/// The program.
const PROGRAM: &str = "qemu-system-x86_64";

/// The first version with `sp-mem`.
const LEAST: &str = "11.1";

/// Devices that a machine of ours needs.
const DEVICES: [&str; 2] = ["sp-mem", "vfio-user-pci"];

/// Suites for the tree: QEMU is in the second, most of what it needs in the first.
pub const SUITES: [&str; 2] = ["trixie", "trixie-backports"];

/// What is asked of apt; `ipxe-qemu` has the ROM files of network cards, which QEMU wants to read
/// for its default card.
const PACKAGES: [&str; 2] = ["qemu-system-x86", "ipxe-qemu"];

/// See [`Stamp::form`].
const FORM: u32 = 1;

/// Where firmware lies below the prefix that QEMU is installed in.
const SEABIOS: [&str; 2] = ["share/seabios/bios-256k.bin", "share/qemu/bios-256k.bin"];
const QBOOT: [&str; 1] = ["share/qemu/qboot.rom"];

/// Starts the tree's QEMU: a script, because the loader wants arguments. It finds the tree beside
/// itself, so both can move, and `exec`s, so that signals reach QEMU. The host's library cache is
/// shut out: a library that the tree lacks is an error, not a mixture.
const SCRIPT: &str = r#"#!/bin/sh
# Runs the QEMU of ../qemu-tree with that tree's own loader and libraries.
self=$(readlink -f -- "$0") || exit 127
tree=${self%/*/*}/qemu-tree
lib=$tree/usr/lib/x86_64-linux-gnu
QEMU_MODULE_DIR=$lib/qemu
export QEMU_MODULE_DIR
exec "$lib/ld-linux-x86-64.so.2" --inhibit-cache --library-path "$lib" --argv0 "$0" \
    "$tree/usr/bin/qemu-system-x86_64" \
    -L "$tree/usr/share/qemu" -L "$tree/usr/share/seabios" -L "$tree/usr/lib/ipxe/qemu" "$@"
"#;

/// QEMU, made if need be.
pub fn provide(shop: &Workshop) -> Result<Qemu> {
    let why = match host::which(PROGRAM) {
        None => "none is installed".to_owned(),
        Some(path) => match probe(&path) {
            Ok(version) => {
                let prefix = path.ancestors().nth(2).unwrap_or(Path::new("/usr"));
                return Ok(Qemu {
                    chosen: "installed; it has all that is needed".to_owned(),
                    version,
                    seabios: first_file(prefix, &SEABIOS),
                    qboot: first_file(prefix, &QBOOT),
                    path,
                });
            }
            Err(error) => format!("the installed one will not do: {error:#}"),
        },
    };
    let tree = shop.dir.join("qemu-tree");
    let script = shop.dir.join("bin").join(PROGRAM);
    let known = Stamp::<String>::read(&tree, FORM);
    let version = match known {
        Some(stamp) if !shop.options.update => {
            write_script(&script)?;
            stamp.facts
        }
        known => make(shop, &tree, &script, known, &why)?,
    };
    Ok(Qemu {
        chosen: format!("Debian {}, in a tree of its own; {why}", SUITES[1]),
        version,
        seabios: first_file(&tree.join("usr"), &SEABIOS),
        qboot: first_file(&tree.join("usr"), &QBOOT),
        path: script,
    })
}

/// Fetches and unpacks the tree; returns QEMU's version.
fn make(
    shop: &Workshop,
    tree: &Path,
    script: &Path,
    known: Option<Stamp<String>>,
    why: &str,
) -> Result<String> {
    let apt = shop.apt(&SUITES)?;
    let mut debs = apt.closure(&PACKAGES, SUITES[1])?;
    debs.retain(|deb| is_wanted(&deb.package.name));
    let packages: Vec<_> = debs.iter().map(|deb| deb.package.clone()).collect();
    if let Some(stamp) = known.filter(|stamp| stamp.is_of(&packages)) {
        write_script(script)?;
        return Ok(stamp.facts);
    }
    host::say(format!("qemu: taking Debian's; {why}"));
    let files = apt.fetch("qemu", &debs)?;
    let part = host::part_name(tree);
    host::remove_dir(&part)?;
    std::fs::create_dir_all(&part)?;
    host::say(format!("qemu: unpacking {} packages", files.len()));
    for file in &files {
        apt::unpack(file, &part)?;
    }
    for unused in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/lintian",
    ] {
        host::remove_dir(&part.join(unused))?;
    }
    // The script knows the tree by its final name only, so the stamp comes after the trial.
    host::replace_dir(&part, tree)?;
    write_script(script)?;
    let version = probe(script).context("the unpacked QEMU does not do")?;
    Stamp {
        form: FORM,
        packages,
        facts: version.clone(),
    }
    .write(tree)?;
    Ok(version)
}

/// Whether a package of the closure has something that QEMU reads. The rest is what a Debian
/// system is set up with: users, passwords, PAM.
fn is_wanted(package: &str) -> bool {
    ["lib", "qemu-", "seabios", "ipxe-"]
        .iter()
        .any(|prefix| package.starts_with(prefix))
        && !package.starts_with("libpam")
}

/// Writes the script that starts the tree's QEMU.
fn write_script(script: &Path) -> Result<()> {
    if let Some(dir) = script.parent() {
        std::fs::create_dir_all(dir)?;
    }
    host::write_if_new(script, SCRIPT.as_bytes())?;
    std::fs::set_permissions(script, std::fs::Permissions::from_mode(0o755))
        .with_context(|| format!("cannot make {} executable", script.display()))
}

/// Asks a QEMU for its version and devices, and returns the version if it will do.
fn probe(qemu: &Path) -> Result<String> {
    let text = host::output(Command::new(qemu).arg("-version"))?;
    let version = version::after(&text, "version").context("it does not tell its version")?;
    if !version::at_least(version, LEAST) {
        bail!("it is {version}, needed is {LEAST}");
    }
    let devices = host::output(Command::new(qemu).args(["-device", "help"]))?;
    let missing = missing_devices(&devices);
    if !missing.is_empty() {
        bail!("it is {version} without {}", missing.join(" and "));
    }
    let accelerators = host::output(Command::new(qemu).args(["-accel", "help"]))?;
    if !accelerators.lines().any(|line| line.trim() == "tcg") {
        bail!("it is {version} without TCG");
    }
    Ok(version.to_owned())
}

/// Devices that `-device help` does not name.
fn missing_devices(help: &str) -> Vec<&'static str> {
    let has = |device: &str| help.contains(&format!("name \"{device}\""));
    DEVICES.into_iter().filter(|device| !has(device)).collect()
}

/// The first of these files that is there.
fn first_file(root: &Path, names: &[&str]) -> Option<PathBuf> {
    names
        .iter()
        .map(|name| root.join(name))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_counts_by_its_whole_name() {
        let help = "name \"sp-mem-old\", bus X\nname \"vfio-user-pci\", bus PCI\n";
        assert_eq!(missing_devices(help), ["sp-mem"]);
    }

    #[test]
    fn the_tree_has_libraries_and_roms_only() {
        let wanted = ["libc6", "qemu-system-data", "seabios", "ipxe-qemu"];
        assert!(wanted.iter().all(|name| is_wanted(name)));
        let unwanted = [
            "passwd",
            "debconf",
            "libpam-modules-bin",
            "base-passwd",
            "gcc-14-base",
        ];
        assert!(!unwanted.iter().any(|name| is_wanted(name)));
    }
}
