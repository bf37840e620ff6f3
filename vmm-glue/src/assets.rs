//! What a guest is booted with: QEMU, firmware and kernels that `cargo xtask guest` provides.
//!
//! The list is one JSON file, `assets.json`, in the directory that holds the files. Paths in the
//! file are relative to that directory, so the directory can be moved or copied; [`Assets::load`]
//! hands them out joined to it. A path outside (an installed QEMU) is absolute and stays so.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Version of the schema that this code reads and writes.
pub const SCHEMA: u32 = 1;

/// The list's file name within its directory.
pub const FILE_NAME: &str = "assets.json";

/// Environment variable that names the directory, for a checkout that borrows another's assets.
pub const DIR_ENV: &str = "NUMAGPU_GUEST_DIR";

/// Everything needed to boot a guest on a machine that has none of it installed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Assets {
    /// [`SCHEMA`] of the writer.
    pub schema: u32,
    /// The emulator.
    pub qemu: Qemu,
    /// UEFI firmware that hands soft-reserved memory to the guest.
    pub ovmf: Ovmf,
    /// Kernels, each with its own initramfs, oldest first.
    pub kernels: Vec<Kernel>,
}

/// The emulator and the firmware files that came with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qemu {
    /// What to execute: the program itself, or a script that `exec`s it (same pid).
    pub path: PathBuf,
    /// Version as the program states it, such as `11.1.3`.
    pub version: String,
    /// Where it is from and why it was taken, for people.
    pub chosen: String,
    /// SeaBIOS, QEMU's default firmware; absent if an installed QEMU hides it.
    pub seabios: Option<PathBuf>,
    /// qboot, which passes soft-reserved entries verbatim and sets up no PCI bridges.
    pub qboot: Option<PathBuf>,
}

/// UEFI firmware (edk2 stable202605 or newer).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ovmf {
    /// Code and variables in one file, for `-bios`: nothing is written back.
    pub combined: Option<PathBuf>,
    /// Code only, for the first, read-only `pflash` drive.
    pub code: PathBuf,
    /// Pristine variables for the second `pflash` drive; give each guest a copy.
    pub vars: PathBuf,
    /// Package version, such as `2026.08+ds-2`.
    pub version: String,
    /// Where it is from and why it was taken, for people.
    pub chosen: String,
}

/// A Linux kernel with the initramfs that fits it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Series, such as `6.12`; the directory is `kernel-` and this name.
    pub name: String,
    /// What was asked for: a series, or `newest`.
    pub asked: String,
    /// What `uname -r` says in the guest.
    pub release: String,
    /// Package version.
    pub version: String,
    /// The compressed kernel, for `-kernel`.
    pub vmlinuz: PathBuf,
    /// The initramfs, for `-initrd`.
    pub initrd: PathBuf,
    /// Modules in the initramfs, in load order.
    pub modules: Vec<String>,
    /// Kernel configuration that decides what becomes of HBM: `CONFIG_` name (without the
    /// prefix) to value, `n` where unset.
    pub config: BTreeMap<String, String>,
}

/// Why the assets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AssetsError {
    /// No list: the assets were never provided, or not in this directory.
    #[error("no guest assets: {path} cannot be read; run `cargo xtask guest`")]
    Missing {
        /// The list.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The list is not what this version writes.
    #[error("{path} is not understood; run `cargo xtask guest`")]
    Malformed {
        /// The list.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The list is of another version.
    #[error("{path} has schema {found}, this numagpu reads {SCHEMA}; run `cargo xtask guest`")]
    Schema {
        /// The list.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A listed file is gone.
    #[error("{list} names {file}, which is gone; run `cargo xtask guest`")]
    Gone {
        /// The list.
        list: PathBuf,
        /// The file.
        file: PathBuf,
    },
}

/// Read ahead of the rest, so that another schema is named as such and not as a missing field.
#[derive(Deserialize)]
struct SchemaOnly {
    schema: u32,
}

impl Assets {
    /// Reads the list in `dir`, makes its paths usable from anywhere, and checks that each exists.
    ///
    /// # Errors
    ///
    /// If the list or a file is missing or the list is of another version; each message names the
    /// command that provides them.
    pub fn load(dir: &Path) -> Result<Self, AssetsError> {
        let path = dir.join(FILE_NAME);
        let text = std::fs::read_to_string(&path).map_err(|source| AssetsError::Missing {
            path: path.clone(),
            source,
        })?;
        let malformed = |source| AssetsError::Malformed {
            path: path.clone(),
            source,
        };
        let found = serde_json::from_str::<SchemaOnly>(&text)
            .map_err(malformed)?
            .schema;
        if found != SCHEMA {
            return Err(AssetsError::Schema { path, found });
        }
        let mut assets: Self = serde_json::from_str(&text).map_err(malformed)?;
        // An executable script finds its tree by its own address, which must not depend on the
        // working directory of whoever starts it.
        let dir = std::path::absolute(dir).map_err(|source| AssetsError::Missing {
            path: path.clone(),
            source,
        })?;
        for file in assets.paths_mut() {
            *file = dir.join(&*file);
            if !file.exists() {
                return Err(AssetsError::Gone {
                    list: path,
                    file: file.clone(),
                });
            }
        }
        Ok(assets)
    }

    /// Where to look: the directory that [`DIR_ENV`] names, else the first with a list in it going
    /// upwards from `start`, as `target/guest` or, from a program within cargo's target directory,
    /// as `guest`.
    #[must_use]
    pub fn find_dir(start: &Path) -> Option<PathBuf> {
        if let Some(dir) = std::env::var_os(DIR_ENV).filter(|dir| !dir.is_empty()) {
            return Some(PathBuf::from(dir));
        }
        start
            .ancestors()
            .flat_map(|up| [up.join("target").join("guest"), up.join("guest")])
            .find(|dir| dir.join(FILE_NAME).is_file())
    }

    /// The kernel of that series, or the one that was asked for by that name (`newest`).
    #[must_use]
    pub fn kernel(&self, name: &str) -> Option<&Kernel> {
        self.kernels
            .iter()
            .find(|kernel| kernel.name == name || kernel.asked == name)
    }

    /// Every path in the list.
    pub fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let Self {
            schema: _,
            qemu,
            ovmf,
            kernels,
        } = self;
        std::iter::once(&mut qemu.path)
            .chain(qemu.seabios.as_mut())
            .chain(qemu.qboot.as_mut())
            .chain(ovmf.combined.as_mut())
            .chain([&mut ovmf.code, &mut ovmf.vars])
            .chain(
                kernels
                    .iter_mut()
                    .flat_map(|k| [&mut k.vmlinuz, &mut k.initrd]),
            )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Assets {
        Assets {
            schema: SCHEMA,
            qemu: Qemu {
                path: "bin/qemu".into(),
                version: "11.1.3".into(),
                chosen: "test".into(),
                seabios: None,
                qboot: Some("qboot.rom".into()),
            },
            ovmf: Ovmf {
                combined: None,
                code: "code.fd".into(),
                vars: "vars.fd".into(),
                version: "2026.08".into(),
                chosen: "test".into(),
            },
            kernels: vec![Kernel {
                name: "6.12".into(),
                asked: "newest".into(),
                release: "6.12.1".into(),
                version: "6.12.1-1".into(),
                vmlinuz: "vmlinuz".into(),
                initrd: "initrd".into(),
                modules: vec![],
                config: BTreeMap::new(),
            }],
        }
    }

    fn write(dir: &Path, assets: &Assets) {
        std::fs::create_dir_all(dir.join("bin")).unwrap();
        for file in [
            "bin/qemu",
            "qboot.rom",
            "code.fd",
            "vars.fd",
            "vmlinuz",
            "initrd",
        ] {
            std::fs::write(dir.join(file), "x").unwrap();
        }
        std::fs::write(dir.join(FILE_NAME), serde_json::to_vec(assets).unwrap()).unwrap();
    }

    #[test]
    fn a_missing_list_names_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let error = Assets::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("cargo xtask guest"), "{error}");
    }

    #[test]
    fn relative_paths_are_joined_to_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &sample());
        let assets = Assets::load(dir.path()).unwrap();
        assert_eq!(assets.qemu.path, dir.path().join("bin/qemu"));
        assert_eq!(assets.kernel("newest"), assets.kernel("6.12"));
    }

    #[test]
    fn the_directory_is_found_from_sources_and_from_programs() {
        let top = tempfile::tempdir().unwrap();
        let dir = top.path().join("target/guest");
        write(&dir, &sample());
        let sources = top.path().join("vmm-glue/src");
        let programs = top.path().join("target/debug/deps");
        // A developer may have the variable set; then it wins, and there is nothing to search.
        if std::env::var_os(DIR_ENV).is_none() {
            assert_eq!(Assets::find_dir(&sources).as_ref(), Some(&dir));
            assert_eq!(Assets::find_dir(&programs).as_ref(), Some(&dir));
        }
    }

    #[test]
    fn another_schema_is_named_even_if_its_fields_differ() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE_NAME), r#"{"schema": 9, "other": 1}"#).unwrap();
        let error = Assets::load(dir.path()).unwrap_err();
        assert!(
            matches!(error, AssetsError::Schema { found: 9, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_gone_is_named() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &sample());
        std::fs::remove_file(dir.path().join("code.fd")).unwrap();
        let error = Assets::load(dir.path()).unwrap_err();
        assert!(error.to_string().contains("code.fd"), "{error}");
    }
}
