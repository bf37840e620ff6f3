//! Debian kernels, each in `kernel-SERIES` with the modules that the guest's agent loads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use numagpu_vmm_glue::assets::Kernel;
use serde::{Deserialize, Serialize};

use super::apt::{Apt, Package};
use super::modules::Modules;
use super::stamp::Stamp;
use super::{Workshop, apt, host, qemu, version};

/// The name for the highest version there is.
const NEWEST: &str = "newest";

/// Depends on the kernel of its suite.
const PACKAGE: &str = "linux-image-amd64";

/// What the agent loads: the drivers that may own HBM, and those that give a PCI function to a
/// user-space driver. Never `kmem`: it would make the HBM ordinary memory of the guest.
const MODULES: [&str; 5] = [
    "dax_hmem",
    "device_dax",
    "vfio_pci",
    "vfio_iommu_type1",
    "uio_pci_generic",
];

/// The module that must not be there.
const FORBIDDEN: &str = "kmem.ko";

/// Configuration that decides what becomes of HBM and of its device.
const CONFIG: [&str; 24] = [
    "ACPI_HMAT",
    "ACPI_TABLE_UPGRADE",
    "DEVICE_MIGRATION",
    "DEVICE_PRIVATE",
    "DEV_DAX",
    "DEV_DAX_CXL",
    "DEV_DAX_HMEM",
    "DEV_DAX_KMEM",
    "EFI_SOFT_RESERVE",
    "INTEL_IOMMU",
    "IO_STRICT_DEVMEM",
    "MEMORY_HOTPLUG_DEFAULT_ONLINE",
    "MHP_DEFAULT_ONLINE_TYPE_ONLINE_AUTO",
    "MODULE_SIG_FORCE",
    "NODES_SHIFT",
    "PVH",
    "STRICT_DEVMEM",
    "TEST_HMM",
    "UIO_PCI_GENERIC",
    "VFIO_IOMMU_TYPE1",
    "VFIO_NOIOMMU",
    "VFIO_PCI",
    "VIRTIO_IOMMU",
    "ZONE_DEVICE",
];

/// See [`Stamp::form`].
const FORM: u32 = 1;

/// What is known of a finished kernel directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Facts {
    asked: String,
    release: String,
    version: String,
    modules: Vec<String>,
    config: BTreeMap<String, String>,
}

/// Refuses what is neither `newest` nor a series such as `6.12`.
pub fn check_name(asked: &str) -> Result<()> {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    match asked.split_once('.') {
        Some((major, minor)) if number(major) && number(minor) => Ok(()),
        _ if asked == NEWEST => Ok(()),
        _ => bail!("kernel {asked:?}: a series such as 6.12, or {NEWEST}"),
    }
}

/// The suites that have a series.
fn suites(asked: &str) -> &'static [&'static str] {
    match asked {
        "6.1" => &["bookworm"],
        _ => &qemu::SUITES,
    }
}

/// The kernels asked for, made if need be, and those that are there already; oldest first.
pub fn provide(shop: &Workshop) -> Result<Vec<Kernel>> {
    for asked in &shop.options.kernels {
        let there = present(&shop.dir)?;
        let known = there
            .into_iter()
            .find(|(name, stamp)| name == asked || stamp.facts.asked == *asked);
        if known.is_none() || shop.options.update {
            make(shop, asked, known)?;
        }
    }
    let mut kernels: Vec<Kernel> = present(&shop.dir)?
        .into_iter()
        .map(|(name, stamp)| describe(&shop.dir, name, stamp.facts))
        .collect();
    kernels.sort_by(|a, b| version::compare(&a.version, &b.version));
    Ok(kernels)
}

/// Finished kernels by series.
fn present(dir: &Path) -> Result<Vec<(String, Stamp<Facts>)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let file = entry.file_name();
        let Some(series) = file.to_str().and_then(|name| name.strip_prefix("kernel-")) else {
            continue;
        };
        if let Some(stamp) = Stamp::read(&entry.path(), FORM) {
            found.push((series.to_owned(), stamp));
        }
    }
    Ok(found)
}

/// A finished kernel as the list of assets has it.
fn describe(dir: &Path, name: String, facts: Facts) -> Kernel {
    let dir = dir.join(format!("kernel-{name}"));
    Kernel {
        vmlinuz: dir.join("vmlinuz"),
        initrd: dir.join("initrd.img"),
        name,
        asked: facts.asked,
        release: facts.release,
        version: facts.version,
        modules: facts.modules,
        config: facts.config,
    }
}

/// Fetches a kernel and picks from it what a guest needs.
fn make(shop: &Workshop, asked: &str, known: Option<(String, Stamp<Facts>)>) -> Result<()> {
    let apt = shop.apt(suites(asked))?;
    let version = pick(&apt, asked)?;
    let series = version::series(&version);
    let label = format!("kernel {series}");
    let dir = shop.dir.join(format!("kernel-{series}"));
    // A series by its own name may be the newest, too; then one directory serves both.
    let asked = match Stamp::<Facts>::read(&dir, FORM) {
        Some(there) if there.facts.asked == NEWEST => NEWEST,
        _ => asked,
    };
    let package = Package {
        name: PACKAGE.to_owned(),
        version: version.clone(),
    };
    let packages = apt.same_source(package)?;
    let there = Stamp::<Facts>::read(&dir, FORM).filter(|stamp| stamp.is_of(&packages));
    if let Some(mut stamp) = there {
        if stamp.facts.asked != asked {
            stamp.facts.asked = asked.to_owned();
            stamp.write(&dir)?;
        }
    } else {
        host::say(format!("{label}: taking {version}"));
        let part = host::part_name(&dir);
        host::remove_dir(&part)?;
        let unpacked = part.join("package");
        std::fs::create_dir_all(&unpacked)?;
        let debs = apt.exactly(&packages)?;
        let files = apt.fetch(&label, &debs)?;
        host::say(format!("{label}: unpacking {} packages", files.len()));
        for file in &files {
            apt::unpack(file, &unpacked)?;
        }
        let facts = gather(&unpacked, &part, asked, version)?;
        host::remove_dir(&unpacked)?;
        Stamp {
            form: FORM,
            packages,
            facts,
        }
        .write(&part)?;
        host::replace_dir(&part, &dir)?;
    }
    // What was the newest and is no more makes room.
    match known {
        Some((name, stamp)) if stamp.facts.asked == NEWEST && name != series => {
            host::remove_dir(&shop.dir.join(format!("kernel-{name}")))
        }
        _ => Ok(()),
    }
}

/// The package version to take.
fn pick(apt: &Apt, asked: &str) -> Result<String> {
    let versions = apt.versions(PACKAGE)?;
    let fits = |v: &String| asked == NEWEST || version::series(v) == asked;
    version::newest(versions.iter().filter(|v| fits(v)).cloned()).with_context(|| {
        format!(
            "no kernel {asked} in {}; there is {}",
            suites(asked).join(", "),
            versions.join(", ")
        )
    })
}

/// Moves kernel, configuration and modules from the unpacked packages to `to`.
fn gather(unpacked: &Path, to: &Path, asked: &str, version: String) -> Result<Facts> {
    let modules_dir = modules_dir(unpacked)?;
    let release = modules_dir
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    // Newer packages keep all in the modules' directory, older ones have /boot.
    let take = |name: &str, as_name: &str| -> Result<PathBuf> {
        let boot = unpacked.join("boot").join(format!("{name}-{release}"));
        let to = to.join(as_name);
        let from = [boot, modules_dir.join(name)]
            .into_iter()
            .find(|path| path.is_file());
        let from = from.with_context(|| format!("the packages have no {name}"))?;
        std::fs::rename(from, &to)?;
        Ok(to)
    };
    take("vmlinuz", "vmlinuz")?;
    let config = std::fs::read_to_string(take("config", "config")?)?;
    let modules = Modules::open(&modules_dir)?.load_order(&MODULES)?;
    let dir = to.join("modules");
    std::fs::create_dir_all(&dir)?;
    for module in &modules {
        if module.file == FORBIDDEN {
            bail!("{FORBIDDEN} would come along as a dependency");
        }
        std::fs::write(dir.join(&module.file), &module.content)?;
    }
    let modules = modules.into_iter().map(|module| module.file).collect();
    Ok(Facts {
        asked: asked.to_owned(),
        release,
        version,
        modules,
        config: config_facts(&config),
    })
}

/// The one directory below `lib/modules`.
fn modules_dir(unpacked: &Path) -> Result<PathBuf> {
    let parents = ["usr/lib/modules", "lib/modules"];
    let mut found = parents
        .iter()
        .filter_map(|parent| std::fs::read_dir(unpacked.join(parent)).ok());
    let entry = found
        .find_map(|mut entries| entries.next())
        .context("the packages have no modules")?;
    Ok(entry?.path())
}

/// Values of [`CONFIG`] in a kernel's configuration.
fn config_facts(config: &str) -> BTreeMap<String, String> {
    let set: BTreeMap<&str, &str> = config
        .lines()
        .filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('='))
        .collect();
    let value = |name: &str| set.get(name).copied().unwrap_or("n").to_owned();
    CONFIG
        .iter()
        .map(|name| ((*name).to_owned(), value(name)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_series_or_newest() {
        assert!(
            ["6.1", "6.12", "newest"]
                .iter()
                .all(|name| check_name(name).is_ok())
        );
        assert!(
            ["", "6", "6.", "6.12.1", "latest", "../x"]
                .iter()
                .all(|n| check_name(n).is_err())
        );
    }

    #[test]
    fn unset_configuration_is_n() {
        let facts = config_facts("CONFIG_NODES_SHIFT=10\n# CONFIG_TEST_HMM is not set\n");
        assert_eq!(facts["NODES_SHIFT"], "10");
        assert_eq!(facts["TEST_HMM"], "n");
        assert_eq!(facts.len(), CONFIG.len());
    }
}
