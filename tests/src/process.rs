//! A child whose output is kept and whose end is certain.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::host;

/// How long output may still come after a process has ended.
const DRAIN: Duration = Duration::from_secs(10);

/// A running child; killed and reaped when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    stdout: Output,
    stderr: Output,
}

/// What a process has said and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code or signal.
    pub status: ExitStatus,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error output.
    pub stderr: String,
}

impl Ended {
    /// Asserts its exit code.
    ///
    /// # Panics
    /// With all that it said, if the code is another.
    #[track_caller]
    pub fn assert_code(&self, code: i32) {
        assert_eq!(self.status.code(), Some(code), "{self}");
    }

    /// The line of standard error output that says what went wrong: the first that `numagpu` starts.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn message(&self) -> &str {
        self.stderr
            .lines()
            .find(|line| line.starts_with("numagpu: "))
            .unwrap_or_else(|| panic!("no message: {self}"))
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ended {
            status,
            stdout,
            stderr,
        } = self;
        write!(f, "{status}\n--- stdout\n{stdout}\n--- stderr\n{stderr}")
    }
}

/// What a pipe has delivered so far.
#[derive(Clone, Debug, Default)]
struct Output(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    closed: bool,
}

impl Output {
    /// Reads a pipe in a thread of its own, which ends when the last writer has closed it.
    fn of(mut pipe: impl Read + Send + 'static) -> Output {
        let output = Output::default();
        let into = output.clone();
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            loop {
                let read = match pipe.read(&mut piece) {
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Ok(read @ 1..) => read,
                    Ok(0) | Err(_) => break,
                };
                into.with(|state| state.bytes.extend(piece.iter().take(read)));
            }
            into.with(|state| state.closed = true);
        });
        output
    }

    fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn text(&self) -> String {
        self.with(|state| String::from_utf8_lossy(&state.bytes).into_owned())
    }
}

impl Process {
    /// Starts a command with its output in pipes and no input.
    ///
    /// # Panics
    /// If it cannot be started.
    #[track_caller]
    pub fn spawn(mut command: Command) -> Process {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("start {name}: {error}"));
        let stdout = child.stdout.take().map(Output::of).unwrap_or_default();
        let stderr = child.stderr.take().map(Output::of).unwrap_or_default();
        Process {
            child,
            name,
            stdout,
            stderr,
        }
    }

    /// Starts a command and waits for its end.
    ///
    /// # Panics
    /// If it does not end in time.
    #[track_caller]
    pub fn run(command: Command, limit: Duration) -> Ended {
        Process::spawn(command).wait(limit)
    }

    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// What it has said so far, on both outputs.
    #[must_use]
    pub fn said(&self) -> String {
        format!("{}\n--- stderr\n{}", self.stdout.text(), self.stderr.text())
    }

    /// Waits until a line with `text` is on either output.
    ///
    /// # Panics
    /// If it ends before, or says nothing of the kind in time.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str, limit: Duration) {
        let said = |process: &Process| {
            [&process.stdout, &process.stderr].into_iter().any(|out| {
                let all = out.text();
                let whole = all.rfind('\n').and_then(|end| all.get(..end));
                whole.is_some_and(|lines| lines.contains(text))
            })
        };
        let mut ended = false;
        let heard = host::wait_until(limit, || {
            ended = self.has_ended() && self.is_drained();
            said(self) || ended
        });
        assert!(
            heard && said(self),
            "{} {} `{text}`: {}",
            self.name,
            if ended {
                "ended without"
            } else {
                "did not say in time"
            },
            self.said()
        );
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it has ended already.
    #[track_caller]
    pub fn signal(&mut self, signal: Signal) {
        assert!(
            !self.has_ended(),
            "{} has ended: {}",
            self.name,
            self.said()
        );
        kill_process(self.id(), signal).expect("send a signal");
    }

    /// Sends its process group a signal, as a terminal does. It has to be the leader of one.
    ///
    /// # Panics
    /// If it has ended already.
    #[track_caller]
    pub fn signal_group(&mut self, signal: Signal) {
        assert!(
            !self.has_ended(),
            "{} has ended: {}",
            self.name,
            self.said()
        );
        kill_process_group(self.id(), signal).expect("send a signal");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end in time; it is killed then.
    #[track_caller]
    pub fn wait(mut self, limit: Duration) -> Ended {
        let ended = host::wait_until(limit, || self.has_ended());
        assert!(
            ended,
            "{} has not ended after {limit:?}: {}",
            self.name,
            self.said()
        );
        let status = self.child.wait().expect("wait for a child");
        // A grandchild may hold the pipes; what it says is no business of ours.
        host::wait_until(DRAIN, || self.is_drained());
        Ended {
            status,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
        }
    }

    fn is_drained(&self) -> bool {
        self.stdout.with(|state| state.closed) && self.stderr.with(|state| state.closed)
    }

    fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it is gone and reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
