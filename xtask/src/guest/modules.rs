//! Kernel modules: which are needed, in which order they load, and their bytes.
//!
//! A kernel package has no `modules.dep` (its installation makes it), so dependencies are read
//! from where depmod would read them: the `depends=` entry of each module's `.modinfo` section.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

/// The modules of one kernel.
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module to load.
pub struct Module {
    /// File name in the initramfs, such as `vfio-pci.ko`.
    pub file: String,
    /// The decompressed module.
    pub content: Vec<u8>,
}

impl Modules {
    /// Reads the directory `lib/modules/RELEASE`.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        find(&dir.join("kernel"), &mut files)?;
        let list = std::fs::read_to_string(dir.join("modules.builtin")).unwrap_or_default();
        let builtin = list
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self { files, builtin })
    }

    /// `wanted` and what they depend on, each after its dependencies. A module that this kernel
    /// has built in is left out, and so is a wanted one that it does not have at all.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let mut read = BTreeMap::new();
        let wanted: Vec<&str> = wanted
            .iter()
            .copied()
            .filter(|name| self.files.contains_key(*name))
            .collect();
        let order = order(&wanted, |name| {
            if self.builtin.contains(name) {
                return Ok(None);
            }
            let path = self
                .files
                .get(name)
                .with_context(|| format!("no module {name}"))?;
            let content = decompress(path)?;
            let depends = depends(&content)
                .with_context(|| format!("{} is not understood", path.display()))?;
            read.insert(name.to_owned(), (file_name(path), content));
            Ok(Some(depends))
        })?;
        let module = |name: String| {
            read.remove(&name)
                .map(|(file, content)| Module { file, content })
        };
        Ok(order.into_iter().filter_map(module).collect())
    }
}

/// Depth first: a module follows all that it depends on; `depends` says `None` of a built-in.
fn order(
    wanted: &[&str],
    mut depends: impl FnMut(&str) -> Result<Option<Vec<String>>>,
) -> Result<Vec<String>> {
    /// Visits one module; `path` is how it was reached.
    fn visit(
        name: &str,
        path: &mut Vec<String>,
        done: &mut Vec<String>,
        seen: &mut BTreeSet<String>,
        depends: &mut dyn FnMut(&str) -> Result<Option<Vec<String>>>,
    ) -> Result<()> {
        if path.iter().any(|above| above == name) {
            bail!(
                "modules depend on each other in a circle: {} {name}",
                path.join(" ")
            );
        }
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(needs) = depends(name)? else {
            return Ok(());
        };
        path.push(name.to_owned());
        for need in needs {
            visit(&need, path, done, seen, depends)?;
        }
        path.pop();
        done.push(name.to_owned());
        Ok(())
    }
    let (mut done, mut seen) = (Vec::new(), BTreeSet::new());
    for name in wanted {
        visit(name, &mut Vec::new(), &mut done, &mut seen, &mut depends)?;
    }
    Ok(done)
}

/// All module files below `dir`, by module name.
fn find(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(dir).with_context(|| format!("no modules in {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `vfio_pci` of `.../vfio-pci.ko.xz`; `-` and `_` are the same in module names.
fn module_name(path: &Path) -> Option<String> {
    let (stem, rest) = path.file_name()?.to_str()?.split_once(".ko")?;
    ["", ".xz", ".zst"]
        .contains(&rest)
        .then(|| stem.replace('-', "_"))
}

/// `vfio-pci.ko` of `.../vfio-pci.ko.xz`.
fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name
        .split_once(".ko")
        .map_or(name.as_ref(), |(stem, _)| stem);
    format!("{stem}.ko")
}

/// A module's bytes. The guest's agent loads them as they are, so no decompressor runs in it.
fn decompress(path: &Path) -> Result<Vec<u8>> {
    let raw = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut content = Vec::new();
    let done = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => lzma_rust2::XzReader::new(raw.as_slice(), true).read_to_end(&mut content),
        Some("zst") => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(raw.as_slice());
            decoder
                .map_err(std::io::Error::other)
                .and_then(|mut d| d.read_to_end(&mut content))
        }
        _ => return Ok(raw),
    };
    done.with_context(|| format!("cannot decompress {}", path.display()))?;
    Ok(content)
}

/// Names after `depends=` in the `.modinfo` section.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(module)?;
    let section = file
        .section_by_name(".modinfo")
        .context("it has no .modinfo")?;
    depends_in(section.data()?).context("its .modinfo has no depends")
}

/// The same, of the section's NUL-terminated `key=value` strings.
fn depends_in(modinfo: &[u8]) -> Option<Vec<String>> {
    let value = modinfo
        .split(|byte| *byte == 0)
        .find_map(|s| s.strip_prefix(b"depends="))?;
    let names = std::str::from_utf8(value)
        .ok()?
        .split(',')
        .filter(|name| !name.is_empty());
    Some(names.map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depends_of(name: &str) -> Result<Option<Vec<String>>> {
        let list: &[&str] = match name {
            "vfio_pci" => &["vfio_pci_core", "vfio"],
            "vfio_pci_core" => &["vfio", "irqbypass"],
            "vfio_iommu_type1" => &["vfio"],
            "loop_a" => &["loop_b"],
            "loop_b" => &["loop_a"],
            "irqbypass" => return Ok(None),
            "gone" => bail!("no module gone"),
            _ => &[],
        };
        Ok(Some(list.iter().map(|name| (*name).to_owned()).collect()))
    }

    #[test]
    fn dependencies_come_first_and_once_and_builtins_not_at_all() {
        let order = order(&["vfio_pci", "vfio_iommu_type1"], depends_of).unwrap();
        assert_eq!(
            order,
            ["vfio", "vfio_pci_core", "vfio_pci", "vfio_iommu_type1"]
        );
    }

    #[test]
    fn circles_and_missing_dependencies_are_errors() {
        assert!(order(&["loop_a"], depends_of).is_err());
        assert!(order(&["gone"], depends_of).is_err());
    }

    #[test]
    fn names_ignore_directory_compression_and_dashes() {
        assert_eq!(
            module_name(Path::new("a/vfio-pci.ko.xz")).as_deref(),
            Some("vfio_pci")
        );
        assert_eq!(module_name(Path::new("a/kmem.ko")).as_deref(), Some("kmem"));
        assert_eq!(module_name(Path::new("a/modules.order")), None);
        assert_eq!(file_name(Path::new("a/vfio-pci.ko.zst")), "vfio-pci.ko");
    }

    #[test]
    fn modinfo_lists_dependencies() {
        let section = b"\0license=GPL\0depends=dax,a-b\0name=x\0";
        assert_eq!(depends_in(section).unwrap(), ["dax", "a_b"]);
        assert_eq!(depends_in(b"depends=\0").unwrap(), Vec::<String>::new());
        assert_eq!(depends_in(b"license=GPL\0"), None);
    }
}
