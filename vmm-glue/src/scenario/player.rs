//! Plays a scenario on an instance.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{collections::BTreeMap, io};

use numagpu_devices::GpuStatus;
use numagpu_devices::ownership::Event;
use numagpu_devices::spec::regs::{BootState, OwnerState};
use serde::{Deserialize, Serialize};

use super::{Planned, Scenario, Trigger};
use crate::control::{Desk, Fault};

/// How often triggers are looked at while one waits for something other than time. What begins and ends between two
/// looks is not seen, but for claims, which a partition remembers.
const POLL: Duration = Duration::from_millis(1);

/// How far a scenario is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Played {
    /// Name of its file.
    pub file: String,
    /// Milliseconds since a VMM first connected to a GPU, from which `at_ms` counts; null before.
    pub now_ms: Option<u64>,
    /// Its faults, in the order of the file.
    pub faults: Vec<PlayedFault>,
}

/// How far a fault of a scenario is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlayedFault {
    /// Index of the GPU.
    pub gpu: u32,
    /// Which fault.
    pub fault: Fault,
    /// When it comes.
    pub trigger: Trigger,
    /// How often it comes.
    pub repeat: u32,
    /// How often it has come.
    pub fired: u32,
    /// When it first did, in milliseconds since a VMM first connected.
    pub fired_at_ms: Option<u64>,
    /// Why the GPU did not take it the last time, if it did not.
    pub error: Option<String>,
}

impl PlayedFault {
    /// Whether it is still to come, once more at least.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.fired < self.repeat
    }
}

/// A fault and how far it is.
struct Running {
    planned: Planned,
    fired: u32,
    fired_at: Option<Duration>,
    /// When it comes again, once its trigger was there.
    next: Option<Duration>,
    error: Option<String>,
}

impl Running {
    fn is_pending(&self) -> bool {
        self.fired < self.planned.repeat
    }

    /// When it is due, if only time is awaited.
    fn due(&self) -> Option<Duration> {
        match (self.next, self.planned.trigger) {
            (Some(next), _) => Some(next),
            (None, Trigger::AtMs(ms)) => Some(Duration::from_millis(ms)),
            (None, _) => None,
        }
    }
}

struct State {
    /// When a VMM first connected.
    start: Option<Instant>,
    faults: Vec<Running>,
    stop: bool,
}

/// What the runner and the status share.
pub struct Player {
    file: String,
    state: Mutex<State>,
    /// Tells the runner to stop.
    stopped: Condvar,
}

impl Player {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far it is.
    pub fn played(&self) -> Played {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let state = self.lock();
        let faults = state.faults.iter().map(|running| PlayedFault {
            gpu: running.planned.gpu,
            fault: running.planned.fault,
            trigger: running.planned.trigger,
            repeat: running.planned.repeat,
            fired: running.fired,
            fired_at_ms: running.fired_at.map(ms),
            error: running.error.clone(),
        });
        Played {
            file: self.file.clone(),
            now_ms: state.start.map(|start| ms(start.elapsed())),
            faults: faults.collect(),
        }
    }

    /// Looks at all triggers once and fires those that are there: first by time, then in the order of the file.
    /// How long until the next look; `None` if nothing is left to come.
    fn turn(&self, desk: &Desk) -> Option<Duration> {
        let mut state = self.lock();
        if state.start.is_none() && desk.gpus().any(|gpu| gpu.is_attached()) {
            state.start = Some(Instant::now());
        }
        let Some(start) = state.start else {
            return Some(POLL);
        };
        let now = start.elapsed();
        let mut seen = BTreeMap::new();
        let mut ready = Vec::new();
        for (index, running) in state.faults.iter().enumerate() {
            if !running.is_pending() {
                continue;
            }
            let due = running.due().or_else(|| {
                let gpu = running.planned.gpu;
                let status = seen
                    .entry(gpu)
                    .or_insert_with(|| desk.gpu(gpu).map(|gpu| gpu.status()));
                let status = status.as_ref()?;
                is_there(running.planned.trigger, status).then_some(now)
            });
            if let Some(due) = due.filter(|due| *due <= now) {
                ready.push((due, index));
            }
        }
        ready.sort_unstable();
        for (due, index) in ready {
            if let Some(running) = state.faults.get_mut(index) {
                fire(running, due, now, desk);
            }
        }
        let pending = state.faults.iter().filter(|running| running.is_pending());
        let waits = pending.map(|running| match running.due() {
            Some(due) => due.saturating_sub(start.elapsed()).max(POLL),
            None => POLL,
        });
        waits.min()
    }

    fn run(&self, desk: &Desk) {
        while let Some(wait) = self.turn(desk) {
            let state = self.lock();
            let waited = self
                .stopped
                .wait_timeout_while(state, wait, |state| !state.stop);
            if waited.unwrap_or_else(PoisonError::into_inner).0.stop {
                return;
            }
        }
    }
}

/// Whether what a trigger waits for has come.
fn is_there(trigger: Trigger, status: &GpuStatus) -> bool {
    match trigger {
        Trigger::AtMs(_) => false,
        Trigger::WhenReady => status.boot == BootState::Ready,
        Trigger::WhenClaimed(partition) => {
            let partition = status.partitions.get(partition as usize);
            partition.is_some_and(|partition| {
                let mut history = partition.history.iter();
                partition.state == OwnerState::Claimed
                    || history.any(|step| step.event == Event::Claim && step.to != step.from)
            })
        }
        Trigger::AfterPackets(after) => {
            let queue = status.queues.get(after.queue as usize);
            queue.is_some_and(|queue| queue.packets >= after.packets)
        }
    }
}

fn fire(running: &mut Running, due: Duration, now: Duration, desk: &Desk) {
    let Planned {
        gpu,
        fault,
        trigger,
        repeat,
        every_ms,
    } = running.planned;
    running.fired = running.fired.saturating_add(1);
    running.fired_at.get_or_insert(now);
    running.next = Some(due.saturating_add(Duration::from_millis(every_ms)));
    let fired = running.fired;
    let result = desk.gpu(gpu).map(|gpu| gpu.inject(fault.into()));
    running.error = match result {
        Some(Err(error)) => {
            // The first time tells enough.
            if running.error.is_none() {
                tracing::warn!(gpu, %fault, %trigger, "the GPU does not take the fault: {error}");
            }
            Some(error.to_string())
        }
        Some(Ok(())) | None => {
            tracing::info!(gpu, %fault, %trigger, fired, repeat, "scenario");
            None
        }
    };
}

/// The thread that plays a scenario; it ends with the last fault, or when this is dropped.
#[derive(Debug)]
pub struct Runner {
    player: Arc<Player>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Player {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Player").field("file", &self.file).finish()
    }
}

impl Runner {
    /// Begins to play, and shows in the instance's status how far it is.
    ///
    /// # Errors
    /// The host's, if there is no thread to be had.
    pub fn start(scenario: &Scenario, desk: &Arc<Desk>) -> io::Result<Runner> {
        let faults = scenario.faults().iter().map(|planned| Running {
            planned: *planned,
            fired: 0,
            fired_at: None,
            next: None,
            error: None,
        });
        let player = Arc::new(Player {
            file: scenario.file().to_owned(),
            state: Mutex::new(State {
                start: None,
                faults: faults.collect(),
                stop: false,
            }),
            stopped: Condvar::new(),
        });
        if !desk.show(Arc::clone(&player)) {
            let kind = io::ErrorKind::AlreadyExists;
            return Err(io::Error::new(kind, "a scenario is played already"));
        }
        let thread = std::thread::Builder::new().name("scenario".to_owned());
        let (playing, desk) = (Arc::clone(&player), Arc::clone(desk));
        let thread = thread.spawn(move || playing.run(&desk))?;
        Ok(Runner {
            player,
            thread: Some(thread),
        })
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.player.lock().stop = true;
        self.player.stopped.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the scenario's thread panicked");
        }
    }
}
