//! Answers requests about one instance.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use numagpu_devices::Gpu;
use numagpu_devices::inject::InjectError;

use super::protocol::{RefusalKind, Reply, Request};
use super::status::{self, Status};
use crate::sandbox::Sandbox;
use crate::scenario::Player;

/// An instance's GPUs, as far as the control socket and a scenario reach.
pub struct Desk {
    machine: String,
    /// Names and models, in their order.
    gpus: Vec<(String, Arc<Gpu>)>,
    started: Instant,
    sandbox: String,
    player: OnceLock<Arc<Player>>,
}

impl Desk {
    /// A desk for GPUs that are served from now on.
    #[must_use]
    pub fn new(machine: &str, gpus: Vec<(String, Arc<Gpu>)>) -> Desk {
        Desk {
            machine: machine.to_owned(),
            gpus,
            started: Instant::now(),
            sandbox: Sandbox::NONE.to_string(),
            player: OnceLock::new(),
        }
    }

    /// The same in a process that is in a sandbox.
    #[must_use]
    pub fn in_sandbox(mut self, sandbox: &Sandbox) -> Desk {
        self.sandbox = sandbox.to_string();
        self
    }

    /// The GPUs, in their order.
    pub fn gpus(&self) -> impl Iterator<Item = &Arc<Gpu>> {
        self.gpus.iter().map(|(_, gpu)| gpu)
    }

    /// The GPU with this index.
    #[must_use]
    pub fn gpu(&self, index: u32) -> Option<&Arc<Gpu>> {
        self.gpus.get(index as usize).map(|(_, gpu)| gpu)
    }

    /// Shows a scenario in the status from now on. An instance has one at most; false if it has one already.
    pub(crate) fn show(&self, player: Arc<Player>) -> bool {
        self.player.set(player).is_ok()
    }

    /// Snapshot of all.
    #[must_use]
    pub fn status(&self) -> Status {
        let gpus = self.gpus.iter();
        Status {
            machine: self.machine.clone(),
            pid: std::process::id(),
            sandbox: self.sandbox.clone(),
            up_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            gpus: gpus
                .map(|(id, gpu)| status::Gpu::new(id, gpu.status()))
                .collect(),
            scenario: self.player.get().map(|player| player.played()),
        }
    }

    /// The reply to a request.
    #[must_use]
    pub fn answer(&self, request: Request) -> Reply {
        match request {
            Request::Status {} => Reply::Status(Box::new(self.status())),
            Request::Inject { gpu, fault } => {
                let Some(model) = self.gpu(gpu) else {
                    let have = self.gpus.len();
                    let message =
                        format!("the machine has {have} GPU(s), so there is no number {gpu}");
                    return Reply::refused(RefusalKind::Invalid, message);
                };
                tracing::info!(gpu, %fault, "injecting");
                match model.inject(fault.into()) {
                    Ok(()) => Reply::Injected { gpu, fault },
                    Err(error @ InjectError::TooManyErrors) => {
                        Reply::refused(RefusalKind::Failed, error.to_string())
                    }
                    Err(error) => Reply::refused(RefusalKind::Invalid, error.to_string()),
                }
            }
        }
    }
}
