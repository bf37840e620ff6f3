//! `cargo xtask guest`: what a test guest is made of, under `target/guest`.
//!
//! | part | what it is |
//! |---|---|
//! | [`qemu`] | the machine's own QEMU if it will do, else Debian's, unpacked and run by its own loader |
//! | [`firmware`] | OVMF that knows soft-reserved memory |
//! | [`kernel`] | Debian kernels, with the modules the agent loads |
//! | [`initramfs`] | the guest agent as `/init`, a kernel's modules, and the host's lspci |
//!
//! Each finished directory carries a stamp and is kept until `--update`; whatever an interrupted
//! run left is under a temporary name or in `cache`, and is continued or made again. Nothing else
//! on the machine is touched, except that missing host programs are installed when run as root.

mod apt;
mod archive;
mod firmware;
pub mod host;
mod initramfs;
mod kernel;
mod lspci;
mod modules;
mod progress;
mod qemu;
mod stamp;
mod version;

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use numagpu_vmm_glue::assets::{self, Assets};

use apt::Apt;
use archive::Archive;

use crate::workspace::Workspace;

/// Options of `cargo xtask guest`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Kernels: series that Debian has (6.1, 6.12), and `newest`; those already there are kept
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "6.12,newest",
        value_name = "LIST"
    )]
    kernels: Vec<String>,
    /// Take what the archive has today, even if older versions are there
    #[arg(long)]
    update: bool,
    /// Address of the Debian archive, instead of the one in this machine's apt configuration
    #[arg(long, value_name = "URL")]
    archive: Option<String>,
}

impl Options {
    /// What suffices for these kernels, from the machine's own archive.
    pub fn for_kernels(kernels: &[&str]) -> Self {
        Self {
            kernels: kernels.iter().map(|&name| name.to_owned()).collect(),
            update: false,
            archive: None,
        }
    }
}

/// Where things are made, and from what.
struct Workshop {
    /// `target/guest`, absolute.
    dir: PathBuf,
    /// The workspace's directory.
    workspace: PathBuf,
    options: Options,
    /// Held while this lives: one run at a time in `dir`.
    lock: File,
    archive: OnceCell<Archive>,
    apts: RefCell<BTreeMap<String, Rc<Apt>>>,
}

/// Provides everything and says where it is.
pub fn run(options: &Options) -> Result<()> {
    let begun = Instant::now();
    let dir = provide(options)?;
    let assets = Assets::load(&dir)?;
    host::say(format!(
        "qemu {}: {}",
        assets.qemu.version, assets.qemu.chosen
    ));
    host::say(format!(
        "ovmf {}: {}",
        assets.ovmf.version, assets.ovmf.chosen
    ));
    for kernel in &assets.kernels {
        host::say(format!("kernel {}: {}", kernel.name, kernel.release));
    }
    let list = dir.join(assets::FILE_NAME);
    let seconds = begun.elapsed().as_secs_f32();
    host::say(format!(
        "all there after {seconds:.1} s: {}",
        list.display()
    ));
    Ok(())
}

/// Provides everything that is not there yet, and returns the directory to load [`Assets`] from.
pub fn provide(options: &Options) -> Result<PathBuf> {
    for asked in &options.kernels {
        kernel::check_name(asked)?;
    }
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        bail!("guests are provided on x86-64 Linux hosts only");
    }
    let Workspace { root, target } = Workspace::open()?;
    let dir = target.join("guest");
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let shop = Workshop {
        lock: lock(&dir)?,
        dir,
        workspace: root,
        options: options.clone(),
        archive: OnceCell::new(),
        apts: RefCell::default(),
    };
    let mut assets = Assets {
        schema: assets::SCHEMA,
        qemu: qemu::provide(&shop)?,
        ovmf: firmware::provide(&shop)?,
        kernels: kernel::provide(&shop)?,
    };
    initramfs::provide(&shop, &assets.kernels)?;
    for path in assets.paths_mut() {
        if let Ok(inside) = path.strip_prefix(&shop.dir) {
            *path = inside.to_owned();
        }
    }
    let list = shop.dir.join(assets::FILE_NAME);
    host::write_if_new(&list, &serde_json::to_vec_pretty(&assets)?)?;
    host::remove_dir(&shop.cache())?;
    Ok(shop.dir)
}

impl Workshop {
    /// Package lists and package files, of use only until everything is there.
    fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// apt for some suites, opened once per run.
    fn apt(&self, suites: &[&str]) -> Result<Rc<Apt>> {
        let name = suites.join("+");
        if let Some(apt) = self.apts.borrow().get(&name) {
            return Ok(Rc::clone(apt));
        }
        let archive = match self.archive.get() {
            Some(archive) => archive,
            None => {
                let given = self.options.archive.as_deref();
                let found = archive::find(given, &self.cache().join("machine"))?;
                self.archive.get_or_init(|| found)
            }
        };
        let (root, debs) = (self.cache().join(&name), self.cache().join("debs"));
        let apt = Rc::new(Apt::open(
            archive,
            suites,
            &root,
            &debs,
            self.lock.try_clone()?,
        )?);
        self.apts.borrow_mut().insert(name, Rc::clone(&apt));
        Ok(apt)
    }
}

/// Keeps a second run out until this one ends; the file stays, the lock goes with the process.
fn lock(dir: &Path) -> Result<File> {
    let file = File::create(dir.join("lock"))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            host::say("another run is at work here: waiting for it");
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error).context("cannot lock"),
    }
    Ok(file)
}
