//! `cargo xtask lint`: what neither the compiler nor clippy checks.
//!
//! | part | what it checks |
//! |---|---|
//! | [`rooms`] | who may depend on whom, and what every crate's manifest and front door say |
//! | [`source`] | where unsafe code is, lengths and names of files, what is left undone |
//! | [`words`] | what no file may hold: marks of unfinished work, places of one machine |

mod rooms;
mod source;
mod words;

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace::{self, Workspace};

/// Something to be changed, and where.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    /// Path in the workspace.
    file: String,
    /// Line, from 1.
    line: usize,
    /// What is wrong and what to do.
    what: String,
}

impl Finding {
    fn new(file: &str, line: usize, what: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            line,
            what: what.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file, self.line, self.what)
    }
}

/// Checks the workspace and prints what is found; an error if there is anything.
pub fn run() -> Result<()> {
    let root = Workspace::open()?.root;
    let mut findings = rooms::check(&root, &workspace::metadata()?)?;
    let files = files(&root)?;
    for file in &files {
        // What git knows of may be gone from the disk, and what is no text has no lines.
        let Ok(text) = std::fs::read_to_string(root.join(file)) else {
            continue;
        };
        findings.extend(words::check(file, &text));
        if file.ends_with(".rs") {
            findings.extend(source::check(file, &text));
        }
    }
    for finding in &findings {
        println!("{finding}");
    }
    if !findings.is_empty() {
        bail!("{} findings in {} files", findings.len(), files.len());
    }
    println!("lint: {} files, nothing found", files.len());
    Ok(())
}

/// The project's files: what git has or would take, or outside a git checkout everything but `target`.
fn files(root: &Path) -> Result<Vec<String>> {
    let listed = Command::new("git")
        .current_dir(root)
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let mut files = match listed {
        Ok(listed) if listed.status.success() => String::from_utf8(listed.stdout)
            .context("a file's name is not UTF-8")?
            .split_terminator('\0')
            .map(str::to_owned)
            .collect(),
        _ => {
            let mut files = Vec::new();
            walk(root, "", &mut files)?;
            files
        }
    };
    files.sort();
    files.dedup();
    Ok(files)
}

/// Adds the files below `root/inside`.
fn walk(root: &Path, inside: &str, files: &mut Vec<String>) -> Result<()> {
    for entry in std::fs::read_dir(root.join(inside))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if inside.is_empty() {
            name
        } else {
            format!("{inside}/{name}")
        };
        let kind = entry.file_type()?;
        if kind.is_dir() && path != "target" && path != ".git" {
            walk(root, &path, files)?;
        } else if kind.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_git_everything_but_target_is_listed() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["a.rs", "src/b.rs", "target/c.rs"] {
            let path = dir.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let mut files = Vec::new();
        walk(dir.path(), "", &mut files).unwrap();
        files.sort();
        assert_eq!(files, ["a.rs", "src/b.rs"]);
    }
}
