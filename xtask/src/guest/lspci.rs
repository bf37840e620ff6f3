//! The host's `lspci` for the guest, and what it needs there: its dynamic loader and libraries in one directory, and the
//! module index that it looks drivers up in.
//!
//! Names of vendors are left out: the guest's agent asks for numbers.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use object::{Object, ObjectSection};

use super::host;

/// Where the guest has program, loader and libraries. The agent runs `lspci/loader --library-path lspci lspci/lspci`.
pub const DIR: &str = "lspci";

/// A file of the guest.
pub struct File {
    /// Path without the leading `/`.
    pub path: String,
    /// Content.
    pub content: Vec<u8>,
}

impl File {
    fn copy(path: String, from: &Path) -> Result<File> {
        let content =
            std::fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        Ok(File { path, content })
    }
}

/// The program, its loader, and the libraries that the loader would take on this host.
pub fn program() -> Result<Vec<File>> {
    host::need(&["lspci"])?;
    let lspci = host::which("lspci").context("lspci is not in PATH")?;
    let program = File::copy(format!("{DIR}/lspci"), &lspci)?;
    let loader = loader(&program.content)
        .with_context(|| format!("{} is not understood", lspci.display()))?;
    let mut files = vec![program];
    // A program that is linked statically needs neither.
    if let Some(loader) = loader {
        let listed = host::output(Command::new(&loader).arg("--list").arg(&lspci))?;
        for (name, path) in libraries(&listed) {
            files.push(File::copy(format!("{DIR}/{name}"), &path)?);
        }
        files.push(File::copy(format!("{DIR}/loader"), &loader)?);
    }
    Ok(files)
}

/// The dynamic loader that a program names.
fn loader(program: &[u8]) -> Result<Option<PathBuf>> {
    let file = object::File::parse(program)?;
    let Some(section) = file.section_by_name(".interp") else {
        return Ok(None);
    };
    let text = std::str::from_utf8(section.data()?)?;
    Ok(Some(PathBuf::from(text.trim_end_matches('\0'))))
}

/// Names and files in what a loader lists: `libpci.so.3 => /lib/x86_64-linux-gnu/libpci.so.3 (0x00007f...)`. What has no
/// file is the kernel's vDSO or the loader itself.
fn libraries(listed: &str) -> Vec<(String, PathBuf)> {
    let library = |line: &str| {
        let (name, rest) = line.trim().split_once(" => ")?;
        let path = rest.rsplit_once(" (").map_or(rest, |(path, _)| path);
        Some((name.to_owned(), PathBuf::from(path)))
    };
    listed.lines().filter_map(library).collect()
}

/// The index of a kernel's modules as depmod makes it of those that the guest has; without one lspci complains.
pub fn module_index(release: &str, modules_dir: &Path, modules: &[String]) -> Result<Vec<File>> {
    host::need(&["kmod"])?;
    let parent = modules_dir.parent().context("modules are in a directory")?;
    let root = parent.join("index.part");
    host::remove_dir(&root)?;
    let files = make_index(&root, release, modules_dir, modules);
    host::remove_dir(&root)?;
    files
}

/// The same, in an empty directory.
fn make_index(
    root: &Path,
    release: &str,
    modules_dir: &Path,
    modules: &[String],
) -> Result<Vec<File>> {
    let dir = root.join("lib/modules").join(release);
    std::fs::create_dir_all(dir.join("kernel"))?;
    // Some builds of kmod look in /usr/lib, and the initramfs has the same link.
    std::fs::create_dir(root.join("usr"))?;
    std::os::unix::fs::symlink("../lib", root.join("usr/lib"))?;
    for module in modules {
        let from = modules_dir.join(module);
        std::fs::copy(&from, dir.join("kernel").join(module))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    // depmod reads which modules there are beside those: no others.
    for list in [
        "modules.order",
        "modules.builtin",
        "modules.builtin.modinfo",
    ] {
        std::fs::write(dir.join(list), "")?;
    }
    // Debian has depmod where a user's PATH does not lead; it is one of the names of kmod.
    let mut depmod = Command::new("kmod");
    host::output(depmod.arg0("depmod").arg("-b").arg(root).arg(release))?;
    let mut names: Vec<String> = std::fs::read_dir(&dir)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".bin"))
        .collect();
    names.sort();
    let file = |name: String| File::copy(format!("lib/modules/{release}/{name}"), &dir.join(name));
    names.into_iter().map(file).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaders_list_gives_names_and_files() {
        let listed = "\tlinux-vdso.so.1 (0x00007f54ca8ef000)\n\
            \tlibpci.so.3 => /lib/x86_64-linux-gnu/libpci.so.3 (0x00007f54ca8b2000)\n\
            \tlibz.so.1 => /opt/with (a) space/libz.so.1 (0x00007f54ca694000)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f54ca8f1000)\n";
        let wanted = [
            ("libpci.so.3", "/lib/x86_64-linux-gnu/libpci.so.3"),
            ("libz.so.1", "/opt/with (a) space/libz.so.1"),
        ];
        let wanted = wanted.map(|(name, path)| (name.to_owned(), PathBuf::from(path)));
        assert_eq!(libraries(listed), wanted);
    }

    #[test]
    fn the_hosts_lspci_comes_with_its_loader_and_libc() {
        let files = program().unwrap();
        let has = |name: &str| files.iter().any(|file| file.path.starts_with(name));
        assert!(has("lspci/lspci") && has("lspci/loader") && has("lspci/libc."));
        assert!(
            files
                .iter()
                .all(|file| file.content.starts_with(b"\x7fELF"))
        );
    }
}
