//! Migration: the states of a device on its way to another process, and its state as a stream of bytes
//! (specification, `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, `VFIO_USER_MIG_DATA_READ`, `VFIO_USER_MIG_DATA_WRITE`).
//!
//! Every step either happens or leaves the device in the state that it had, so there is no `ERROR`. `PRE_COPY` is not
//! offered, nor are the states that the specification does not use.

use numagpu_devices::bus::{Migrate, MigrateError};
use rustix::io::Errno;
use thiserror::Error;

/// `VFIO_MIGRATION_STOP_COPY`, all that is offered.
pub const OFFERED: u64 = 1;

/// Most bytes of a device's state.
pub const MAX_STATE: usize = 64 << 20;

/// `vfio_device_mig_state`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Stands still.
    Stop = 1,
    /// Works.
    #[default]
    Running = 2,
    /// Stands still, and its state can be read.
    StopCopy = 3,
    /// Stands still, and takes another one's state.
    Resuming = 4,
}

/// Why a step is not taken. The state is the last that was reached on the way.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// No state that a client may ask for.
    #[error("migration state {0}")]
    NoState(u32),
    /// Data is read or written in another state.
    #[error("migration data in state {0:?}")]
    WrongState(State),
    /// Data that does not fit.
    #[error("{bytes} bytes of migration data; at most {max} are possible")]
    TooLarge {
        /// Bytes there would be.
        bytes: u64,
        /// Most there may be.
        max: usize,
    },
    /// The device did not.
    #[error(transparent)]
    Device(#[from] MigrateError),
}

impl MigrationError {
    /// The error number for the client.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::NoState(_) | Self::WrongState(_) => Errno::INVAL,
            Self::TooLarge { .. } => Errno::TOOBIG,
            Self::Device(MigrateError::Busy(_)) => Errno::BUSY,
            Self::Device(MigrateError::InUse(_)) => Errno::EXIST,
            Self::Device(MigrateError::Bad(_)) => Errno::INVAL,
        }
    }
}

/// How far the migration of a function is. All calls of one migration name the same function.
#[derive(Debug, Default)]
pub struct Migration {
    state: State,
    /// In [`State::StopCopy`] what is left to be read from `at` on, in [`State::Resuming`] what was written.
    data: Vec<u8>,
    at: usize,
}

impl Migration {
    /// Where it is.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// Goes to a state, by the shortest way that saves nothing in between ("Complex State Transitions").
    ///
    /// # Errors
    /// [`MigrationError`]. A state that the device refuses is forgotten: another can be written, or none.
    pub fn set(&mut self, function: &dyn Migrate, state: u32) -> Result<(), MigrationError> {
        let to = match state {
            1 => State::Stop,
            2 => State::Running,
            3 => State::StopCopy,
            4 => State::Resuming,
            other => return Err(MigrationError::NoState(other)),
        };
        while self.state != to {
            let next = match self.state {
                State::Stop => to,
                // Every way from one of the others to another one leads through it.
                _ => State::Stop,
            };
            self.step(function, next)?;
            self.state = next;
        }
        Ok(())
    }

    /// One of the "Direct State Transitions".
    fn step(&mut self, function: &dyn Migrate, next: State) -> Result<(), MigrationError> {
        let data = std::mem::take(&mut self.data);
        self.at = 0;
        match (self.state, next) {
            (State::Running, _) => function.stop()?,
            (_, State::Running) => function.run(),
            (_, State::StopCopy) => {
                let state = function.save()?;
                check_size(state.len() as u64)?;
                self.data = state;
            }
            // Nothing written is nothing to load.
            (State::Resuming, _) if !data.is_empty() => function.load(&data)?,
            _ => {}
        }
        Ok(())
    }

    /// The next bytes of the state, at most `size`; fewer only at its end.
    ///
    /// # Errors
    /// [`MigrationError::WrongState`].
    pub fn read(&mut self, size: usize) -> Result<&[u8], MigrationError> {
        if self.state != State::StopCopy {
            return Err(MigrationError::WrongState(self.state));
        }
        let rest = self.data.get(self.at..).unwrap_or_default();
        let part = rest.get(..size).unwrap_or(rest);
        self.at += part.len();
        Ok(part)
    }

    /// Takes the next bytes of a state.
    ///
    /// # Errors
    /// [`MigrationError::WrongState`], or that there are too many.
    pub fn write(&mut self, data: &[u8]) -> Result<(), MigrationError> {
        if self.state != State::Resuming {
            return Err(MigrationError::WrongState(self.state));
        }
        check_size(self.data.len() as u64 + data.len() as u64)?;
        self.data.extend_from_slice(data);
        Ok(())
    }

    /// The function was reset or detached: it runs, and nothing of the migration is left.
    pub fn reset(&mut self, function: &dyn Migrate) {
        if std::mem::take(self).state != State::Running {
            function.run();
        }
    }
}

fn check_size(bytes: u64) -> Result<(), MigrationError> {
    let max = MAX_STATE;
    match bytes > max as u64 {
        true => Err(MigrationError::TooLarge { bytes, max }),
        false => Ok(()),
    }
}
