//! Migration: the states of a device on its way to another process, and its state as a stream of bytes
//! (specification, `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`, `VFIO_USER_MIG_DATA_READ`, `VFIO_USER_MIG_DATA_WRITE`).
//!
//! Every step either happens or leaves the device in the state that it had, so there is no `ERROR`. The states that the
//! specification does not use are not offered.
//!
//! In `PRE_COPY` the device says what it is: a target that is not made so refuses that at once, before the source stands
//! still. The state itself is small, and is all read in `STOP_COPY`. So the stream is, in this order:
//!
//! - if it was begun in `PRE_COPY`: 16 bytes, `NUMAGPU` with a zero and the length of what follows as a little-endian
//!   64-bit number, and then so many bytes of [`Migrate::outline`];
//! - the state, as [`Migrate::save`] gives it, to the end.

use numagpu_devices::bus::{Migrate, MigrateError};
use rustix::io::Errno;
use thiserror::Error;

/// `VFIO_MIGRATION_STOP_COPY` and `VFIO_MIGRATION_PRE_COPY`.
pub const OFFERED: u64 = 1 << 0 | 1 << 2;

/// Most bytes of a device's state.
pub const MAX_STATE: usize = 64 << 20;

/// Most bytes of an outline.
const MAX_OUTLINE: usize = 1 << 20;

/// What an outline begins with.
const MARK: &[u8; 8] = b"NUMAGPU\0";

/// Bytes before an outline.
const OUTLINE_HEAD: usize = 16;

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
    /// Works, and what it is can be read.
    PreCopy = 6,
}

/// Why a step is not taken. The state is the last that was reached on the way.
#[derive(Debug, Error)]
pub enum MigrationError {
    /// No state that a client may ask for.
    #[error("migration state {0}")]
    NoState(u32),
    /// "The `STOP_COPY -> PRE_COPY` transition is explicitly not allowed".
    #[error("no way from STOP_COPY to PRE_COPY")]
    NoWay,
    /// Data is read or written in another state.
    #[error("migration data in state {0:?}")]
    WrongState(State),
    /// Data that does not fit.
    #[error("{bytes} bytes of migration data; at most {max} are possible")]
    TooLarge {
        /// Bytes there would be.
        bytes: usize,
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
            Self::NoState(_) | Self::NoWay | Self::WrongState(_) => Errno::INVAL,
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
    /// In the states that are read what is left of it from `at` on, in [`State::Resuming`] what was written.
    data: Vec<u8>,
    at: usize,
    /// Whether something was written, and whether an outline can no more come first.
    written: bool,
    judged: bool,
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
            6 => State::PreCopy,
            other => return Err(MigrationError::NoState(other)),
        };
        while self.state != to {
            let next = match (self.state, to) {
                (State::StopCopy, State::PreCopy) => return Err(MigrationError::NoWay),
                (State::Running, State::PreCopy) => State::PreCopy,
                (State::PreCopy, State::StopCopy) => State::StopCopy,
                (State::Stop, State::PreCopy) | (State::PreCopy, _) => State::Running,
                (State::Stop, _) => to,
                // Every other way leads through it.
                _ => State::Stop,
            };
            self.step(function, next)?;
            self.state = next;
        }
        Ok(())
    }

    /// One of the "Direct State Transitions".
    fn step(&mut self, function: &dyn Migrate, next: State) -> Result<(), MigrationError> {
        match (self.state, next) {
            (State::PreCopy, State::StopCopy) => {
                function.stop()?;
                // What was not read of the outline comes first.
                let saved = saved(function).inspect_err(|_| function.run())?;
                self.data.extend(saved);
                return Ok(());
            }
            (State::Running, State::PreCopy) => {
                let outline = function.outline()?;
                if !outline.is_empty() {
                    check_size(outline.len(), MAX_OUTLINE)?;
                    self.data = with_head(&outline);
                }
                return Ok(());
            }
            _ => {}
        }
        let Migration { data, written, .. } = std::mem::replace(
            self,
            Migration {
                state: self.state,
                ..Migration::default()
            },
        );
        match (self.state, next) {
            (State::PreCopy, _) => {}
            (State::Running, _) => function.stop()?,
            (_, State::Running) => function.run(),
            (_, State::StopCopy) => {
                let state = saved(function)?;
                // What could be taken for an outline comes behind an empty one.
                if state.starts_with(MARK) {
                    self.data = with_head(&[]);
                }
                self.data.extend(state);
            }
            // Nothing written is nothing to load.
            (State::Resuming, _) if written => function.load(&data)?,
            _ => {}
        }
        Ok(())
    }

    /// The next bytes of the stream, at most `size`; fewer only at the end of what there is in this state.
    ///
    /// # Errors
    /// [`MigrationError::WrongState`].
    pub fn read(&mut self, size: usize) -> Result<&[u8], MigrationError> {
        if !matches!(self.state, State::StopCopy | State::PreCopy) {
            return Err(MigrationError::WrongState(self.state));
        }
        let rest = self.data.get(self.at..).unwrap_or_default();
        let part = rest.get(..size).unwrap_or(rest);
        self.at += part.len();
        Ok(part)
    }

    /// Takes the next bytes of a stream.
    ///
    /// # Errors
    /// [`MigrationError::WrongState`], that there are too many, or that the function is not made as the one that they
    /// are from. In the latter cases the state is not left with what was written.
    pub fn write(&mut self, function: &dyn Migrate, data: &[u8]) -> Result<(), MigrationError> {
        if self.state != State::Resuming {
            return Err(MigrationError::WrongState(self.state));
        }
        check_size(self.data.len().saturating_add(data.len()), MAX_STATE)?;
        self.data.extend_from_slice(data);
        self.written |= !data.is_empty();
        self.judge(function).inspect_err(|_| {
            // No state begins where this ended.
            self.data = Vec::new();
            self.judged = true;
        })
    }

    /// Looks at an outline as soon as it is here, and takes it out.
    fn judge(&mut self, function: &dyn Migrate) -> Result<(), MigrationError> {
        if self.judged {
            return Ok(());
        }
        let Some((head, rest)) = self.data.split_first_chunk::<OUTLINE_HEAD>() else {
            let short = self.data.iter().zip(MARK);
            self.judged = { short }.any(|(have, want)| have != want);
            return Ok(());
        };
        let Some(len) = head.strip_prefix(MARK) else {
            self.judged = true;
            return Ok(());
        };
        let len = <[u8; 8]>::try_from(len).map_or(u64::MAX, u64::from_le_bytes);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        check_size(len, MAX_OUTLINE)?;
        let Some(outline) = rest.get(..len) else {
            return Ok(());
        };
        if !outline.is_empty() {
            function.fits(outline)?;
        }
        self.judged = true;
        self.data.drain(..OUTLINE_HEAD + len);
        Ok(())
    }

    /// The function was reset or detached: it runs, and nothing of the migration is left.
    pub fn reset(&mut self, function: &dyn Migrate) {
        let before = std::mem::take(self).state;
        if !matches!(before, State::Running | State::PreCopy) {
            function.run();
        }
    }
}

fn saved(function: &dyn Migrate) -> Result<Vec<u8>, MigrationError> {
    let state = function.save()?;
    check_size(state.len(), MAX_STATE)?;
    Ok(state)
}

fn with_head(outline: &[u8]) -> Vec<u8> {
    let len = outline.len() as u64;
    [&MARK[..], &len.to_le_bytes(), outline].concat()
}

fn check_size(bytes: usize, max: usize) -> Result<(), MigrationError> {
    match bytes > max {
        true => Err(MigrationError::TooLarge { bytes, max }),
        false => Ok(()),
    }
}
