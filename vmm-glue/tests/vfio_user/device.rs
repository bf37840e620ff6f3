//! A small PCI function that keeps what is written and remembers what happened to it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use numagpu_devices::bus::{Attachment, Bar, FunctionLayout, PciFunction, ResetKind};
use numagpu_vmm_glue::vfio_user::{Listener, SecondClient, Server};
use tempfile::TempDir;

/// Bytes of BAR 0.
pub const BAR0: u64 = 2 << 20;

/// MSI-X vectors.
pub const VECTORS: u16 = 32;

pub struct Probe {
    layout: FunctionLayout,
    state: Mutex<State>,
}

pub struct State {
    pub config: Vec<u8>,
    pub bar0: Vec<u8>,
    pub events: Vec<&'static str>,
    pub attachment: Option<Attachment>,
    /// Whether a reset panics.
    pub broken: bool,
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
    let dir = tempfile::tempdir().unwrap();
    let listener = Listener::bind(dir.path().join("gpu0")).unwrap();
    serve_on(listener, SecondClient::Refuse, dir)
}

/// A probe behind a socket of the test's own, in a directory that lasts as long.
pub fn serve_on(listener: Listener, second: SecondClient, dir: TempDir) -> Served {
    let probe = probe();
    let server = Server::start(listener, Arc::clone(&probe) as _, second).unwrap();
    Served { probe, server, dir }
}

fn probe() -> Arc<Probe> {
    Arc::new(Probe {
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
            on_write: None,
        }),
    })
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

    fn reset(&self, kind: ResetKind) {
        let broken = self.state().broken;
        assert!(!broken, "a bug in the device");
        assert_eq!(kind, ResetKind::Hot);
        self.state().events.push("reset");
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
