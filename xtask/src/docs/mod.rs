//! `cargo xtask docs`: the pages of `docs/` and the C header that are made from the code.
//!
//! | page | made from |
//! |---|---|
//! | `registers.md` | the tables of `numagpu-spec`, by [`registers`], with the texts that [`comments`] finds |
//! | `cli.md` | what the `numagpu` command says of itself, by [`cli`] |
//! | `config.md` | the schema that the `numagpu` command prints, by [`config`] |
//! | `faults.md` | the table of `devices/src/inject.rs` and the examples of `numagpu-vmm-glue`, by [`faults`] |
//!
//! And the C header `devices/spec/include/numagpu.h`, from the same tables as `registers.md`, by [`header`].

mod cli;
mod comments;
mod config;
mod faults;
mod header;
mod markdown;
mod registers;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::workspace::Workspace;

/// Options of `cargo xtask docs`.
#[derive(clap::Args)]
pub struct Options {
    /// Write nothing, and fail if a page is not what would be written
    #[arg(long)]
    check: bool,
}

/// A page as it should be.
struct Page {
    path: PathBuf,
    text: String,
}

/// Writes the pages, or checks them.
pub fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::open()?;
    if options.check {
        return check(&workspace);
    }
    for page in pages(&workspace)? {
        let path = workspace.root.join(&page.path);
        let dir = path.parent().context("a page is in a directory")?;
        std::fs::create_dir_all(dir)?;
        std::fs::write(&path, &page.text)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("docs: {} written", page.path.display());
    }
    Ok(())
}

/// Fails if a page is not what the code makes it.
pub fn check(workspace: &Workspace) -> Result<()> {
    let mut old = Vec::new();
    for page in pages(workspace)? {
        match difference(&workspace.root.join(&page.path), &page.text) {
            None => println!("docs: {} is up to date", page.path.display()),
            Some(line) => old.push(format!("{}:{line}", page.path.display())),
        }
    }
    if !old.is_empty() {
        bail!(
            "{} is not what the code makes it: run `cargo xtask docs` and commit what it writes",
            old.join(", ")
        );
    }
    Ok(())
}

/// The first line in which a file is not `text`; a file that cannot be read has none of it.
fn difference(path: &Path, text: &str) -> Option<usize> {
    let old = std::fs::read_to_string(path).unwrap_or_default();
    if old == text {
        return None;
    }
    let same = old.lines().zip(text.lines()).take_while(|(a, b)| a == b);
    Some(same.count() + 1)
}

/// Every page.
fn pages(workspace: &Workspace) -> Result<Vec<Page>> {
    let numagpu = workspace.numagpu(&["--workspace"])?;
    let pages = [
        ("docs/registers.md", registers::page(&workspace.root)?),
        (header::PATH, header::text(&workspace.root)?),
        ("docs/cli.md", cli::page(&numagpu)?),
        ("docs/config.md", config::page(&workspace.root, &numagpu)?),
        ("docs/faults.md", faults::page(&workspace.root)?),
    ];
    Ok(pages
        .map(|(path, text)| Page {
            path: path.into(),
            text,
        })
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_that_differs_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page.md");
        assert_eq!(difference(&path, "a\n"), Some(1));
        std::fs::write(&path, "a\nb\nc\n").unwrap();
        assert_eq!(difference(&path, "a\nb\nc\n"), None);
        assert_eq!(difference(&path, "a\nx\nc\n"), Some(2));
        assert_eq!(difference(&path, "a\nb\nc\nd\n"), Some(4));
    }
}
