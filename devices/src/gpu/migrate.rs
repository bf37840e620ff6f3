//! A GPU's state as a stream of bytes: JSON of [`GpuState`].

use std::time::{Duration, Instant};

use super::Gpu;
use crate::bus::{Migrate, MigrateError};
use crate::state::{GpuState, RestoreError};

/// How long queues and scrubs may take to finish what they are at. A VMM waits for the answer; QEMU waits 5 s.
const STOP_WAIT: Duration = Duration::from_secs(4);

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
        let state = serde_json::to_vec(&self.snapshot());
        state.map_err(|error| MigrateError::Bad(error.to_string()))
    }

    fn load(&self, state: &[u8]) -> Result<(), MigrateError> {
        let state: Result<GpuState, _> = serde_json::from_slice(state);
        let state = state.map_err(|error| MigrateError::Bad(error.to_string()))?;
        self.restore(&state).map_err(|error| match error {
            RestoreError::InUse { .. } => MigrateError::InUse(error.to_string()),
            other => MigrateError::Bad(other.to_string()),
        })
    }
}
