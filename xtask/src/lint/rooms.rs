//! The rooms of the project: arrows between crates go one way, and every crate keeps the house rules.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Finding;

/// Each crate, and the crates of the workspace that it may use.
const ARROWS: [(&str, &[&str]); 10] = [
    ("numagpu-topology", &[]),
    ("numagpu-spec", &[]),
    ("numagpu-devices", &["numagpu-spec", "numagpu-topology"]),
    ("numagpu-devices-fuzz", &["numagpu-devices", "numagpu-spec"]),
    (
        "numagpu-vmm-glue",
        &["numagpu-devices", "numagpu-spec", "numagpu-topology"],
    ),
    (
        "numagpu-vmm-glue-fuzz",
        &[
            "numagpu-devices",
            "numagpu-devices-fuzz",
            "numagpu-vmm-glue",
        ],
    ),
    (
        "numagpu-agent",
        &["numagpu-spec", "numagpu-topology", "numagpu-vmm-glue"],
    ),
    (
        "numagpu-tests",
        &[
            "numagpu-agent",
            "numagpu-devices",
            "numagpu-spec",
            "numagpu-topology",
            "numagpu-vmm-glue",
        ],
    ),
    (
        "numagpu-benches",
        &[
            "numagpu-devices",
            "numagpu-spec",
            "numagpu-topology",
            "numagpu-vmm-glue",
        ],
    ),
    (
        "xtask",
        &["numagpu-spec", "numagpu-topology", "numagpu-vmm-glue"],
    ),
];

/// Crates that hold no unsafe code, by the compiler's word.
const SAFE: [&str; 5] = [
    "numagpu-topology",
    "numagpu-spec",
    "numagpu-devices",
    "numagpu-devices-fuzz",
    "numagpu-vmm-glue-fuzz",
];

/// How a crate's root says so.
const FORBID: &str = "#![forbid(unsafe_code)]";

/// What is of use in the metadata of cargo.
#[derive(Deserialize)]
pub struct Metadata {
    packages: Vec<Package>,
}

/// A crate of the workspace.
#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    dependencies: Vec<Dependency>,
}

/// What a crate uses, for its code, its tests or its build.
#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// Where it is, if it is not from a registry.
    path: Option<PathBuf>,
}

/// Checks all crates of the workspace at `root`.
pub fn check(root: &Path, metadata: &Metadata) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let path = &package.manifest_path;
        let manifest = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let file = inside(root, path);
        findings.extend(arrows(package, &file, &manifest));
        findings.extend(lint_table(&file, &manifest));
        if SAFE.contains(&package.name.as_str()) {
            let door = path.with_file_name("src").join("lib.rs");
            let text = std::fs::read_to_string(&door)
                .with_context(|| format!("cannot read {}", door.display()))?;
            findings.extend(forbids(&inside(root, &door), &text));
        }
    }
    Ok(findings)
}

/// `path` as seen from `root`.
fn inside(root: &Path, path: &Path) -> String {
    path.strip_prefix(root)
        .unwrap_or(path)
        .to_string_lossy()
        .into_owned()
}

/// Dependencies that go against the arrows.
fn arrows(package: &Package, file: &str, manifest: &str) -> Vec<Finding> {
    let name = &package.name;
    let Some((_, allowed)) = ARROWS.iter().find(|(crate_name, _)| crate_name == name) else {
        let what = format!(
            "{name} has no room yet: say in xtask/src/lint/rooms.rs which crates it may use"
        );
        return vec![Finding::new(file, 1, what)];
    };
    let wrong = package
        .dependencies
        .iter()
        .filter(|used| used.path.is_some() && !allowed.contains(&used.name.as_str()));
    wrong
        .map(|used| {
            let may = match allowed {
                [] => "no crate of the workspace".to_owned(),
                some => some.join(", "),
            };
            let line = line_of(manifest, |line| line.starts_with(&used.name));
            let what = format!(
                "{name} must not use {}, it may use {may}: move the code to the room it belongs to",
                used.name
            );
            Finding::new(file, line, what)
        })
        .collect()
}

/// A manifest that does not take the workspace's lints.
fn lint_table(file: &str, manifest: &str) -> Option<Finding> {
    let mut section = "";
    let takes = manifest.lines().map(str::trim).any(|line| {
        if line.starts_with('[') {
            section = line;
        }
        let words: String = line.split_whitespace().collect();
        words == "lints.workspace=true" || (section == "[lints]" && words == "workspace=true")
    });
    let what = "does not take the workspace's lints: add `[lints]` with `workspace = true`";
    (!takes).then(|| {
        let line = line_of(manifest, |line| line.starts_with("[lints"));
        Finding::new(file, line, what)
    })
}

/// A crate's root that does not forbid unsafe code.
fn forbids(file: &str, text: &str) -> Option<Finding> {
    let says = text.lines().any(|line| line.trim() == FORBID);
    (!says).then(|| {
        Finding::new(
            file,
            1,
            format!("add `{FORBID}`: this crate has no need of it"),
        )
    })
}

/// The first line that is meant, 1 if there is none.
fn line_of(text: &str, meant: impl Fn(&str) -> bool) -> usize {
    text.lines().position(meant).map_or(1, |index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, uses: &[(&str, bool)]) -> Package {
        Package {
            name: name.into(),
            manifest_path: "Cargo.toml".into(),
            dependencies: uses
                .iter()
                .map(|(name, ours)| Dependency {
                    name: (*name).into(),
                    path: ours.then(|| "somewhere".into()),
                })
                .collect(),
        }
    }

    #[test]
    fn an_arrow_that_goes_back_is_found_where_it_is_written() {
        let manifest = "[package]\n[dev-dependencies]\nnumagpu-vmm-glue = { workspace = true }\n";
        let package = package(
            "numagpu-devices",
            &[("numagpu-vmm-glue", true), ("numagpu-spec", true)],
        );
        let found = arrows(&package, "devices/Cargo.toml", manifest);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].line, 3);
        assert!(found[0].what.contains("must not use numagpu-vmm-glue"));
    }

    #[test]
    fn crates_of_others_are_free() {
        let package = package("numagpu-topology", &[("serde", false)]);
        assert_eq!(arrows(&package, "Cargo.toml", ""), []);
    }

    #[test]
    fn a_crate_without_a_room_is_found() {
        let found = arrows(&package("numagpu-util", &[]), "util/Cargo.toml", "");
        assert!(found[0].what.contains("no room yet"));
    }

    #[test]
    fn nobody_may_use_tests_benches_or_xtask() {
        for (name, allowed) in ARROWS {
            for used in ["numagpu-tests", "numagpu-benches", "xtask"] {
                assert!(!allowed.contains(&used), "{name} may use {used}");
            }
            assert!(!allowed.contains(&"numagpu-agent") || name == "numagpu-tests");
        }
    }

    #[test]
    fn the_lint_table_must_be_the_workspace_s() {
        assert_eq!(lint_table("", "[lints]\nworkspace = true\n"), None);
        assert_eq!(lint_table("", "[package]\nlints.workspace = true\n"), None);
        let other = "[package]\n[lints.rust]\nworkspace = true\n";
        assert_eq!(lint_table("", other).unwrap().line, 2);
        assert!(lint_table("", "[dependencies.x]\nworkspace = true\n").is_some());
    }

    #[test]
    fn a_door_that_does_not_forbid_unsafe_is_found() {
        assert_eq!(forbids("", "//! Doc.\n\n#![forbid(unsafe_code)]\n"), None);
        assert!(forbids("", "// #![forbid(unsafe_code)]\n").is_some());
    }
}
