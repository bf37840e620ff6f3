//! `numagpu serve`.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow};
use numagpu_vmm_glue::control::SOCKET;
use numagpu_vmm_glue::instance::Instance;
use numagpu_vmm_glue::run_dir::RunDir;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::ServeArgs;
use crate::{Failure, is_closed, machine};

/// Links that are removed at the end.
struct Links(Vec<PathBuf>);

impl Drop for Links {
    fn drop(&mut self) {
        for link in &self.0 {
            let _ = std::fs::remove_file(link);
        }
    }
}

/// Serves until a signal comes.
pub fn serve(args: &ServeArgs) -> Result<ExitCode, Failure> {
    let plan = machine::load(&args.machine)?;
    let scenario = machine::scenario(args.scenario.as_deref(), &plan)?;
    if !args.socket_dir.is_dir() {
        let dir = args.socket_dir.display();
        return Err(Failure::Failed(anyhow!(
            "--socket-dir {dir} is not a directory; make it, mode 0700"
        )));
    }
    // Before the first thread, so that no signal is missed.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("listen for signals")?;
    let (sockets, hbm) = (&args.socket_dir, args.hbm_dir.as_deref());
    let instance = Instance::start(&plan, sockets, hbm, scenario.as_ref())?;
    let listed = list(sockets);
    let mut links = Links(Vec::new());
    if args.hbm_dir.is_none() {
        // A name for memory that has none: whoever opens the link gets the memory file.
        for (name, fd) in instance.unnamed_hbm() {
            let link = args.socket_dir.join(name);
            if link.is_symlink() {
                std::fs::remove_file(&link)
                    .with_context(|| format!("replace {}", link.display()))?;
            }
            let target = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
            symlink(target, &link).with_context(|| format!("link {}", link.display()))?;
            links.0.push(link);
        }
    }
    match announce(&instance, plan.gpus.len()) {
        // It is served all the same.
        Err(error) if is_closed(&error) => {}
        other => other?,
    }
    let signal = signals.forever().next();
    tracing::info!(?signal, "stopping");
    drop(listed);
    drop(instance);
    Ok(ExitCode::SUCCESS)
}

/// A run directory with a link to the control socket, by which `numagpu status` finds it without being told where.
/// It is served all the same if there is none.
fn list(sockets: &Path) -> Option<RunDir> {
    let link = || -> anyhow::Result<RunDir> {
        let run = RunDir::create()?;
        let socket = sockets.canonicalize()?.join(SOCKET);
        symlink(socket, run.path().join(SOCKET))?;
        Ok(run)
    };
    link()
        .inspect_err(|error| {
            tracing::warn!("numagpu status will have to be told the socket directory: {error:#}");
        })
        .ok()
}

fn announce(instance: &Instance, gpus: usize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for socket in instance.sockets() {
        writeln!(out, "{}", socket.display())?;
    }
    writeln!(out, "ready: {gpus} GPU(s)")?;
    out.flush()
}
