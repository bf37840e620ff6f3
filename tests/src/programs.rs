//! The `numagpu` binary and what guests boot with.

use std::fs::File;
use std::path::{Path, PathBuf};

use numagpu_vmm_glue::assets::Assets;
use rustix::fs::{FlockOperation, flock};

/// The `numagpu` of the same cargo profile as the running test. Cargo names binaries of its own package only.
///
/// # Panics
/// If it is not built.
pub fn numagpu() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let path = test
        .parent()
        .and_then(Path::parent)
        .expect("tests run from target/PROFILE/deps")
        .join("numagpu");
    assert!(
        path.is_file(),
        "{} is not built; run `cargo build -p numagpu-vmm-glue` with the same profile",
        path.display()
    );
    path
}

/// An example of `numagpu-vmm-glue` or of this crate, of the same cargo profile as the running test.
///
/// # Panics
/// If it is not built.
pub fn example(name: &str) -> PathBuf {
    let path = numagpu().with_file_name("examples").join(name);
    assert!(
        path.is_file(),
        "{} is not built; run `cargo build -p numagpu-vmm-glue -p numagpu-tests --examples` with the same profile",
        path.display()
    );
    path
}

/// The directory of the guest assets.
///
/// # Panics
/// If there is none: a guest test that tests nothing must not pass.
pub fn assets_dir() -> PathBuf {
    Assets::find_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .expect("no guest assets: run `cargo xtask guest`")
}

/// The guest assets.
///
/// # Panics
/// If they are missing; the message names the command that provides them.
pub fn assets() -> Assets {
    match Assets::load(&assets_dir()) {
        Ok(assets) => assets,
        Err(error) => panic!("{error}; run `cargo xtask guest`"),
    }
}

/// The turn to run a guest. An emulated guest needs a whole processor, and a test runner starts as many tests as there
/// are processors.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "closing it ends the turn")] File);

impl Turn {
    /// Waits for it.
    ///
    /// # Panics
    /// If the lock cannot be had.
    pub fn wait() -> Turn {
        let file = File::open(numagpu()).expect("open numagpu");
        while let Err(error) = flock(&file, FlockOperation::LockExclusive) {
            assert_eq!(error, rustix::io::Errno::INTR, "lock numagpu");
        }
        Turn(file)
    }
}
