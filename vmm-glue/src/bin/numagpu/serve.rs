//! `numagpu serve`.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use numagpu_devices::ownership;
use numagpu_vmm_glue::control::SOCKET;
use numagpu_vmm_glue::instance::{Instance, Prepared, Serving};
use numagpu_vmm_glue::run_dir::RunDir;
use numagpu_vmm_glue::sandbox::{self, Leavings, Mode};
use numagpu_vmm_glue::service::{self, Manager};
use numagpu_vmm_glue::vfio_user::{self, Listener};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{OnDisconnect, Polling, Sandbox, SecondClient, ServeArgs};
use crate::{Failure, handed, is_closed, machine};

/// Links that are removed at the end.
#[derive(Default)]
struct Links(Vec<PathBuf>);

impl Links {
    /// Makes a link, in place of one that is there.
    fn add(&mut self, link: PathBuf, target: impl AsRef<Path>) -> anyhow::Result<()> {
        if link.is_symlink() {
            std::fs::remove_file(&link).with_context(|| format!("replace {}", link.display()))?;
        }
        symlink(target, &link).with_context(|| format!("link {}", link.display()))?;
        self.0.push(link);
        Ok(())
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        for link in &self.0 {
            let _ = std::fs::remove_file(link);
        }
    }
}

/// Serves until a signal comes, or no client can come any more.
pub fn serve(args: &ServeArgs) -> Result<ExitCode, Failure> {
    let plan = machine::load(&args.machine)?;
    let scenario = machine::scenario(args.scenario.as_deref(), &plan)?;
    let handed = handed::take(&args.handed, &plan, args.socket_dir.is_some())?;
    let is_last = handed.len() == plan.gpus.len() && handed.values().all(Listener::is_connected);
    if let Some(dir) = args.socket_dir.as_deref().filter(|dir| !dir.is_dir()) {
        let dir = dir.display();
        return Err(Failure::Failed(anyhow!(
            "--socket-dir {dir} is not a directory; make it, mode 0700"
        )));
    }
    // Before the first thread, so that no signal is missed.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("listen for signals")?;
    service::take_descriptors();
    let manager = Manager::connect().context("the service manager's NOTIFY_SOCKET")?;
    // `numagpu status` finds the control socket here without being told where.
    let mut run = match (RunDir::create(), &args.socket_dir) {
        (Ok(run), _) => Some(run),
        (Err(error), None) => return Err(error.into()),
        (Err(error), Some(_)) => {
            tracing::warn!("numagpu status will have to be told the socket directory: {error:#}");
            None
        }
    };
    let place = match (&args.socket_dir, &run) {
        (Some(dir), _) => dir.canonicalize().context("--socket-dir")?,
        (None, Some(run)) => run.path().to_owned(),
        (None, None) => return Err(Failure::Failed(anyhow!("no directory for sockets"))),
    };
    let serving = Serving {
        hbm_dir: args.hbm_dir.as_deref(),
        scenario: scenario.as_ref(),
        handed,
        second_client: match args.second_client {
            SecondClient::Refuse => vfio_user::SecondClient::Refuse,
            SecondClient::Queue => vfio_user::SecondClient::Queue,
        },
        on_disconnect: match args.hbm_on_disconnect {
            OnDisconnect::Scrub => ownership::OnDisconnect::Scrub,
            OnDisconnect::Keep => ownership::OnDisconnect::Keep,
        },
        polling: match args.polling {
            Polling::Off => vfio_user::Polling::Off,
            Polling::Auto => vfio_user::Polling::Auto,
            Polling::Always => vfio_user::Polling::Always,
        },
    };
    let sockets = args.socket_dir.as_deref().unwrap_or(&place);
    let prepared = Prepared::new(&plan, sockets, serving)?;
    let mut links = Links::default();
    if let (Some(run), Some(_)) = (&run, &args.socket_dir) {
        links.add(run.path().join(SOCKET), place.join(SOCKET))?;
    }
    if args.hbm_dir.is_none() {
        // A name for memory that has none: whoever opens the link gets the memory file.
        for (name, fd) in prepared.instance().unnamed_hbm() {
            let target = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
            links.add(place.join(name), target)?;
        }
    }
    let mode = match args.sandbox {
        Sandbox::On => Mode::On,
        Sandbox::Log => Mode::Log,
        Sandbox::Off => Mode::Off,
    };
    let leavings = leavings(&prepared, &place, run.as_ref());
    let sandbox = sandbox::enter(mode, &leavings)?;
    sandbox::explain_panics(sandbox);
    let instance = prepared.start(&sandbox)?;
    match announce(&instance, plan.gpus.len()) {
        // It is served all the same.
        Err(error) if is_closed(&error) => {}
        other => other?,
    }
    manager.ready();
    if is_last {
        // No other client can come: when these have gone, it is over.
        let (end, handle) = (instance.end(), signals.handle());
        let thread = std::thread::Builder::new().name("end".to_owned());
        let wait = move || {
            end();
            handle.close();
        };
        thread
            .spawn(wait)
            .context("start the thread that waits for the end")?;
    }
    match signals.forever().next() {
        Some(signal) => tracing::info!(signal, "stopping"),
        None => tracing::info!("stopping: all clients have gone"),
    }
    manager.stopping();
    drop(links);
    if args.socket_dir.is_some() {
        // Nobody finds an instance that is going.
        drop(run.take());
    }
    drop(instance);
    drop(run);
    Ok(ExitCode::SUCCESS)
}

/// The names that are removed at the end.
fn leavings(prepared: &Prepared<'_>, place: &Path, run: Option<&RunDir>) -> Leavings {
    let mut leavings = Leavings {
        files_in: vec![place.to_owned()],
        directories_in: Vec::new(),
    };
    leavings
        .files_in
        .extend(prepared.instance().hbm_directories());
    if let Some(run) = run {
        leavings.files_in.push(run.path().to_owned());
        leavings
            .directories_in
            .extend(run.path().parent().map(Path::to_owned));
    }
    leavings
}

fn announce(instance: &Instance, gpus: usize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for socket in instance.sockets() {
        writeln!(out, "{}", socket.display())?;
    }
    writeln!(out, "ready: {gpus} GPU(s)")?;
    out.flush()
}
