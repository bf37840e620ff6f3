//! A small PCI function that keeps what is written and remembers what happened to it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use numagpu_devices::bus::{
    Attachment, Bar, FunctionLayout, IoFd, Migrate, MigrateError, PciFunction, ResetKind,
};
use numagpu_vmm_glue::vfio_user::{Limits, Listener, SecondClient, Server};
use tempfile::TempDir;

/// Bytes of BAR 0.
pub const BAR0: u64 = 2 << 20;

/// MSI-X vectors.
pub const VECTORS: u16 = 32;

pub struct Probe {
    layout: FunctionLayout,
    state: Mutex<State>,
    /// Whether its state can be carried.
    pub migrates: bool,
    /// Offset, size and value of writes to BAR 0 that come as events, and which event.
    pub io: Vec<(u64, u64, Option<u64>, usize)>,
    pub events: Vec<OwnedFd>,
}

pub struct State {
    pub config: Vec<u8>,
    pub bar0: Vec<u8>,
    pub events: Vec<&'static str>,
    pub attachment: Option<Attachment>,
    /// Whether a reset panics.
    pub broken: bool,
    /// Does not give its state.
    pub unsaved: bool,
    /// What it says that it is.
    pub outline: &'static [u8],
    /// What the serving thread does at each write to BAR 0.
    pub on_write: Option<OnWrite>,
}

pub type OnWrite = Arc<dyn Fn(&Attachment) + Send + Sync>;

impl Probe {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn attachment(&self) -> Attachment {
        self.state().attachment.clone().unwrap()
    }

    /// Waits until the last client is gone.
    pub fn wait_detached(&self) -> Duration {
        let since = Instant::now();
        while self.state().attachment.is_some() {
            assert!(since.elapsed() < Duration::from_secs(5), "still attached");
            std::thread::sleep(Duration::from_micros(100));
        }
        since.elapsed()
    }
}

/// A served probe with its socket in a directory of its own.
pub struct Served {
    pub probe: Arc<Probe>,
    pub server: Server,
    pub dir: TempDir,
}

impl Served {
    pub fn path(&self) -> PathBuf {
        self.server.path().to_owned()
    }
}

pub fn serve() -> Served {
    serve_with(|_| {})
}

/// Serves a probe that was changed before.
pub fn serve_with(change: impl FnOnce(&mut Probe)) -> Served {
    serve_limited(change, Limits::default())
}

/// Serves it and takes less of a client than it could.
pub fn serve_limited(change: impl FnOnce(&mut Probe), limits: Limits) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(dir.path().join("gpu0")).unwrap();
    let mut probe = probe();
    change(&mut probe);
    let probe = Arc::new(probe);
    let server = Server::start(listener, Arc::clone(&probe) as _, limits).unwrap();
    Served { probe, server, dir }
}

/// A probe behind a socket of the test's own, in a directory that lasts as long.
pub fn serve_on(listener: Listener, second: SecondClient, dir: TempDir) -> Served {
    let probe = Arc::new(probe());
    let server = Server::start(listener, Arc::clone(&probe) as _, second).unwrap();
    Served { probe, server, dir }
}

fn probe() -> Probe {
    Probe {
        layout: FunctionLayout {
            bars: vec![Bar {
                index: 0,
                size: BAR0,
                is_64bit: true,
                prefetchable: false,
                mappable: Vec::new(),
            }],
            config_size: 4096,
            msix_vectors: VECTORS,
        },
        state: Mutex::new(State {
            config: vec![0; 4096],
            bar0: vec![0; usize::try_from(BAR0).unwrap()],
            events: Vec::new(),
            attachment: None,
            broken: false,
            unsaved: false,
            outline: b"a probe",
            on_write: None,
        }),
        migrates: false,
        io: Vec::new(),
        events: Vec::new(),
    }
}

fn at(offset: u64, len: usize) -> std::ops::Range<usize> {
    let offset = usize::try_from(offset).unwrap();
    offset..offset + len
}

impl PciFunction for Probe {
    fn layout(&self) -> &FunctionLayout {
        &self.layout
    }

    fn attach(&self, attachment: Attachment) {
        let mut state = self.state();
        assert!(state.attachment.is_none());
        state.events.push("attach");
        state.attachment = Some(attachment);
    }

    fn detach(&self) {
        let mut state = self.state();
        assert!(state.attachment.is_some());
        state.events.push("detach");
        state.attachment = None;
    }

    fn dma_changed(&self) {
        self.state().events.push("dma");
    }

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        data.copy_from_slice(&self.state().config[at(offset.into(), data.len())]);
    }

    fn config_write(&self, offset: u32, data: &[u8]) {
        self.state().config[at(offset.into(), data.len())].copy_from_slice(data);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let state = self.state();
        assert!(bar == 0 && state.attachment.is_some());
        data.copy_from_slice(&state.bar0[at(offset, data.len())]);
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let mut state = self.state();
        assert!(bar == 0 && state.attachment.is_some());
        state.bar0[at(offset, data.len())].copy_from_slice(data);
        let (hook, attachment) = (state.on_write.clone(), state.attachment.clone());
        drop(state);
        if let (Some(hook), Some(attachment)) = (hook, attachment) {
            hook(&attachment);
        }
    }

    fn io_fds(&self, bar: u8) -> Vec<IoFd<'_>> {
        let io = self.io.iter().filter(|_| bar == 0);
        let io = io.map(|&(offset, size, datamatch, event)| IoFd {
            offset,
            size,
            datamatch,
            event: self.events[event].as_fd(),
        });
        io.collect()
    }

    fn migrate(&self) -> Option<&dyn Migrate> {
        self.migrates.then_some(self)
    }

    fn reset(&self, kind: ResetKind) {
        let broken = self.state().broken;
        assert!(!broken, "a bug in the device");
        assert_eq!(kind, ResetKind::Hot);
        self.state().events.push("reset");
    }
}

/// Its state is BAR 0, after a word by which it is known.
const KNOWN: &[u8; 8] = b"a probe:";

impl Migrate for Probe {
    fn stop(&self) -> Result<(), MigrateError> {
        let mut state = self.state();
        if state.broken {
            return Err(MigrateError::Busy("it is broken".to_owned()));
        }
        state.events.push("stop");
        Ok(())
    }

    fn run(&self) {
        self.state().events.push("run");
    }

    fn save(&self) -> Result<Vec<u8>, MigrateError> {
        let state = self.state();
        match state.unsaved {
            true => Err(MigrateError::Bad("it has none".to_owned())),
            false => Ok([KNOWN, state.bar0.as_slice()].concat()),
        }
    }

    fn outline(&self) -> Result<Vec<u8>, MigrateError> {
        Ok(self.state().outline.to_vec())
    }

    fn fits(&self, outline: &[u8]) -> Result<(), MigrateError> {
        match outline == self.state().outline {
            true => Ok(()),
            false => Err(MigrateError::Bad(format!("not {outline:?}"))),
        }
    }

    fn load(&self, state: &[u8]) -> Result<(), MigrateError> {
        let bar0 = state.strip_prefix(KNOWN);
        let bar0 = bar0.filter(|it| it.len() as u64 == BAR0);
        let bar0 = bar0.ok_or_else(|| MigrateError::Bad(format!("{} bytes", state.len())))?;
        self.state().bar0.copy_from_slice(bar0);
        Ok(())
    }
}

/// Whether this process runs no test but `name`, so that its descriptors can be counted. If not, the test is run
/// in a process that does.
pub fn is_alone(name: &str) -> bool {
    let alone = |key| std::env::var_os(key).is_some();
    if alone("NEXTEST") || alone("PROBE_ALONE") {
        return true;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env("PROBE_ALONE", "1")
        .status();
    assert!(status.unwrap().success());
    false
}
