//! OVMF that passes soft-reserved memory on: edk2-stable202605 was the first.
//!
//! The file itself does not tell its age (its volumes are compressed), so an installed one is
//! judged by its package's version.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use numagpu_vmm_glue::assets::Ovmf;

use super::stamp::Stamp;
use super::{Workshop, apt, host, version};

/// The first version that does it.
const LEAST: &str = "2026.05";

/// The suite that has it; its package depends on nothing.
const SUITE: &str = "sid";

/// Debian's package, under its name of today and of before.
const PACKAGES: [&str; 2] = ["ovmf-generic", "ovmf"];

/// See [`Stamp::form`].
const FORM: u32 = 1;

/// The package's files: one that is code and variables, and the two apart.
const COMBINED: &str = "usr/share/ovmf/OVMF.fd";
const CODE: &str = "usr/share/OVMF/OVMF_CODE_4M.fd";
const VARS: &str = "usr/share/OVMF/OVMF_VARS_4M.fd";

/// OVMF, fetched if need be.
pub fn provide(shop: &Workshop) -> Result<Ovmf> {
    let why = match installed() {
        Some(version) if version::at_least(&version, LEAST) => {
            let root = Path::new("/");
            if let Some((code, vars)) = files(root, CODE, VARS) {
                let chosen = format!("installed; its package is not older than {LEAST}");
                let combined = Some(root.join(COMBINED)).filter(|path| path.is_file());
                return Ok(Ovmf {
                    combined,
                    code,
                    vars,
                    version,
                    chosen,
                });
            }
            format!("the installed {version} is without its files")
        }
        Some(version) => format!("the installed one is {version}, needed is {LEAST}"),
        None => "none is installed".to_owned(),
    };
    let dir = shop.dir.join("ovmf");
    let known = Stamp::<String>::read(&dir, FORM);
    let version = match known {
        Some(stamp) if !shop.options.update => stamp.facts,
        known => make(shop, &dir, known, &why)?,
    };
    let chosen = format!("Debian {SUITE}; {why}");
    let combined = Some(dir.join("OVMF.fd")).filter(|path| path.is_file());
    let (code, vars) = (dir.join("OVMF_CODE_4M.fd"), dir.join("OVMF_VARS_4M.fd"));
    Ok(Ovmf {
        combined,
        code,
        vars,
        version,
        chosen,
    })
}

/// Fetches the package and keeps the three files; returns its version.
fn make(shop: &Workshop, dir: &Path, known: Option<Stamp<String>>, why: &str) -> Result<String> {
    let apt = shop.apt(&[SUITE])?;
    let newest = version::newest(apt.versions(PACKAGES[0])?).context("the archive has no OVMF")?;
    if !version::at_least(&newest, LEAST) {
        bail!("the archive's OVMF is {newest}, needed is {LEAST}");
    }
    let package = apt::Package {
        name: PACKAGES[0].to_owned(),
        version: newest.clone(),
    };
    let packages = vec![package];
    if let Some(stamp) = known.filter(|stamp| stamp.is_of(&packages)) {
        return Ok(stamp.facts);
    }
    host::say(format!("ovmf: taking Debian's; {why}"));
    let debs = apt.exactly(&packages)?;
    let part = host::part_name(dir);
    host::remove_dir(&part)?;
    let unpacked = part.join("package");
    std::fs::create_dir_all(&unpacked)?;
    for file in apt.fetch("ovmf", &debs)? {
        apt::unpack(&file, &unpacked)?;
    }
    for name in [COMBINED, CODE, VARS] {
        let from = unpacked.join(name);
        let to = part.join(Path::new(name).file_name().unwrap_or_default());
        if from.is_file() {
            std::fs::rename(&from, &to)?;
        } else if name != COMBINED {
            bail!("{} {newest} has no {name}", PACKAGES[0]);
        }
    }
    host::remove_dir(&unpacked)?;
    Stamp {
        form: FORM,
        packages,
        facts: newest.clone(),
    }
    .write(&part)?;
    host::replace_dir(&part, dir)?;
    Ok(newest)
}

/// The installed package's version.
fn installed() -> Option<String> {
    host::which("dpkg-query")?;
    PACKAGES.iter().find_map(|package| {
        let mut query = Command::new("dpkg-query");
        query.args(["-W", "-f", "${db:Status-Status} ${Version}", package]);
        let text = host::output(&mut query).ok()?;
        text.strip_prefix("installed ").map(str::to_owned)
    })
}

/// Both files, if both are there.
fn files(root: &Path, code: &str, vars: &str) -> Option<(PathBuf, PathBuf)> {
    let (code, vars) = (root.join(code), root.join(vars));
    (code.is_file() && vars.is_file()).then_some((code, vars))
}
