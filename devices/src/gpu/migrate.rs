//! A GPU's state as a stream of bytes: JSON of [`GpuState`]. Its outline is JSON too.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Gpu;
use crate::bus::{Migrate, MigrateError};
use crate::state::{GpuState, RestoreError, Shape, VERSION};

/// How long queues and scrubs may take to finish what they are at. A VMM waits for the answer; QEMU waits 5 s.
const STOP_WAIT: Duration = Duration::from_secs(4);

/// What two GPUs have to agree in.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Outline {
    /// [`VERSION`].
    version: u32,
    shape: Shape,
}

fn bad(error: impl ToString) -> MigrateError {
    MigrateError::Bad(error.to_string())
}

impl Migrate for Gpu {
    fn stop(&self) -> Result<(), MigrateError> {
        let end = Instant::now() + STOP_WAIT;
        let paused = self.begin_pause(STOP_WAIT);
        paused.map_err(|error| MigrateError::Busy(error.to_string()))?;
        // One that ended later would clear pages behind the VMM's last look at the log, and show as done in the state.
        if !self
            .scrubber
            .wait(end.saturating_duration_since(Instant::now()))
        {
            self.end_pause();
            let waited_ms = STOP_WAIT.as_millis();
            let busy = format!("HBM is scrubbed still after {waited_ms} ms");
            return Err(MigrateError::Busy(busy));
        }
        Ok(())
    }

    fn run(&self) {
        self.end_pause();
    }

    fn save(&self) -> Result<Vec<u8>, MigrateError> {
        serde_json::to_vec(&self.snapshot()).map_err(bad)
    }

    fn load(&self, state: &[u8]) -> Result<(), MigrateError> {
        let state: GpuState = serde_json::from_slice(state).map_err(bad)?;
        self.restore(&state).map_err(|error| match error {
            RestoreError::InUse { .. } => MigrateError::InUse(error.to_string()),
            other => bad(other),
        })
    }

    fn outline(&self) -> Result<Vec<u8>, MigrateError> {
        let outline = Outline {
            version: VERSION,
            shape: self.shape(),
        };
        serde_json::to_vec(&outline).map_err(bad)
    }

    fn fits(&self, outline: &[u8]) -> Result<(), MigrateError> {
        let outline: Outline = serde_json::from_slice(outline).map_err(bad)?;
        self.check_shape(outline.version, &outline.shape)
            .map_err(bad)
    }
}
