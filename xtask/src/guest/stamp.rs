//! What a finished directory was made from; a directory without its stamp is made again.

use std::path::Path;

use anyhow::Result;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::apt::Package;
use super::host;

/// The stamp's file name.
const FILE_NAME: &str = "stamp.json";

/// A directory's origin, with facts found while making it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp<T> {
    /// The form of the directory's content: counts up when the code lays it out anew.
    pub form: u32,
    /// Packages that went in.
    pub packages: Vec<Package>,
    /// Facts of this kind of directory.
    pub facts: T,
}

impl<T: Serialize + DeserializeOwned> Stamp<T> {
    /// The stamp of `dir`, if the directory is complete and of the form `form`.
    pub fn read(dir: &Path, form: u32) -> Option<Self> {
        let text = std::fs::read(dir.join(FILE_NAME)).ok()?;
        serde_json::from_slice(&text)
            .ok()
            .filter(|stamp: &Self| stamp.form == form)
    }

    /// Declares `dir` complete.
    pub fn write(&self, dir: &Path) -> Result<()> {
        host::write_atomic(&dir.join(FILE_NAME), &serde_json::to_vec_pretty(self)?)
    }

    /// Whether the directory was made of these packages.
    pub fn is_of(&self, packages: &[Package]) -> bool {
        self.packages == packages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_of_another_form_or_none_is_no_stamp() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Stamp::<u8>::read(dir.path(), 1).is_none());
        let package = Package {
            name: "a".into(),
            version: "1".into(),
        };
        let stamp = Stamp {
            form: 1,
            packages: vec![package.clone()],
            facts: 7_u8,
        };
        stamp.write(dir.path()).unwrap();
        assert!(Stamp::<u8>::read(dir.path(), 2).is_none());
        let read = Stamp::<u8>::read(dir.path(), 1).unwrap();
        assert_eq!(read, stamp);
        assert!(read.is_of(&[package]) && !read.is_of(&[]));
    }
}
