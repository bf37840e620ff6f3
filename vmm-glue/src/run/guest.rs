//! One guest, from QEMU's start to its end.

use std::fs;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use numagpu_topology::Plan;
use numagpu_topology::qemu::{self, Host};
use numagpu_topology::seen::{Message, Report};
use serde_json::json;

use super::report::{self, Heard};
use super::{Options, RunError, Watch};
use crate::instance::Instance;
use crate::qmp::Qmp;
use crate::sys::child::spawn_tied;

/// How often a run looks whether QEMU still lives or a signal has come.
const TICK: Duration = Duration::from_millis(50);
/// How long QEMU may take to end once the guest has powered off or it was told to quit.
const ENDING: Duration = Duration::from_secs(20);

/// Tells a run to stop.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicI32>);

impl Interrupt {
    /// Stops the run, as this signal would.
    pub fn raise(&self, signal: i32) {
        self.0.store(signal, Ordering::Release);
    }

    /// The signal, if there was one.
    pub fn raised(&self) -> Option<i32> {
        Some(self.0.load(Ordering::Acquire)).filter(|signal| *signal != 0)
    }
}

/// A QEMU that is killed and reaped when this is dropped.
struct Qemu(Child);

impl Qemu {
    fn start(
        options: &Options,
        arguments: &[String],
        log: &Path,
        hbm: &[BorrowedFd<'_>],
    ) -> Result<Qemu, RunError> {
        let failed = |doing| move |source| RunError::Host { doing, source };
        let mut command = Command::new(&options.qemu);
        command.args(arguments).args(&options.qemu_arguments);
        if options.agent {
            let log = fs::File::create(log).map_err(failed("create QEMU's log"))?;
            let errors = log.try_clone().map_err(failed("create QEMU's log"))?;
            command.stdin(Stdio::null()).stdout(log).stderr(errors);
        }
        spawn_tied(command, hbm)
            .map(Qemu)
            .map_err(failed("start QEMU"))
    }

    fn ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }

    /// Waits for its end; false if it does not come.
    fn wait(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if self.ended().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it is gone and reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The start of a line without what would move a terminal's cursor: firmware paints its console with escape sequences
/// (ECMA-48, `ESC [` up to a byte from `@` to `~`).
fn plain(line: &str) -> String {
    let mut plain = String::new();
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        if c == '\u{1b}' {
            if rest.next() == Some('[') {
                rest.find(|c| ('@'..='~').contains(c));
            }
        } else if !c.is_control() {
            plain.push(c);
        }
    }
    plain.chars().take(200).collect()
}

/// The last lines, or those from a kernel's first cry on: what it says there is the cause, and all after it a register
/// dump.
fn last_words<'a, 'b>(lines: &'a [&'b str]) -> &'a [&'b str] {
    const LINES: usize = 15;
    const CRIES: [&str; 4] = ["Oops: ", "BUG: ", "kernel BUG at ", "Kernel panic - "];
    let end = lines.len();
    let cry = lines
        .iter()
        .position(|line| CRIES.iter().any(|cry| line.contains(cry)));
    let from = end.saturating_sub(LINES);
    let (from, to) = match cry {
        Some(cry) if cry < from => (cry, (cry + 2 * LINES).min(end)),
        _ => (from, end),
    };
    lines.get(from..to).unwrap_or_default()
}

/// The last words of a file, for an error message.
fn tail(title: &str, path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text
        .lines()
        .filter(|line| !plain(line).trim().is_empty())
        .collect();
    let last: Vec<String> = last_words(&lines).iter().map(|line| plain(line)).collect();
    if last.is_empty() {
        String::new()
    } else {
        format!("\n{title}:\n  {}", last.join("\n  "))
    }
}

/// Boots the guest and waits for its report or its end.
pub(super) fn boot(
    plan: &Plan,
    options: &Options,
    host: Host,
    instance: &Instance,
    directory: &Path,
    interrupt: &Interrupt,
    watch: &mut dyn Watch,
) -> Result<Option<Report>, RunError> {
    let result = attempt(plan, options, host, instance, directory, interrupt, watch);
    // A terminal sends its signal to QEMU too, and QEMU may be gone before we look.
    match (result, interrupt.raised()) {
        (Err(_), Some(signal)) => Err(RunError::Interrupted { signal }),
        (result, _) => result,
    }
}

fn attempt(
    plan: &Plan,
    options: &Options,
    mut host: Host,
    instance: &Instance,
    directory: &Path,
    interrupt: &Interrupt,
    watch: &mut dyn Watch,
) -> Result<Option<Report>, RunError> {
    let started = Instant::now();
    let console = options
        .console
        .clone()
        .unwrap_or_else(|| directory.join("console.log"));
    let (log, report_socket, qmp_socket) = (
        directory.join("qemu.log"),
        directory.join("report.sock"),
        directory.join("qmp.sock"),
    );
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (sender, heard) = channel();
    if options.agent {
        report::listen(&report_socket, sender).map_err(|source| RunError::Host {
            doing: "listen for the guest's report",
            source,
        })?;
        host.report = Some(text(&report_socket));
        host.console = Some(text(&console));
    }
    host.qmp = Some(text(&qmp_socket));
    let mut arguments = qemu::arguments(plan, &host)?;
    // It waits for us, so that its objects can be looked at before the tables are built.
    arguments.push("-S".to_owned());
    let mut qemu = Qemu::start(options, &arguments, &log, &instance.hbm_fds())?;
    let tails = || format!("{}{}", tail("QEMU", &log), tail("guest console", &console));
    let ended = |status: ExitStatus| RunError::Ended {
        status: status.to_string(),
        tail: tails(),
    };

    let deadline = started + options.timeout;
    let connected = Qmp::connect(&qmp_socket, deadline, || {
        qemu.ended().is_none() && interrupt.raised().is_none()
    });
    let mut qmp = match connected {
        Ok(qmp) => qmp,
        Err(error) => {
            // QEMU's own last words say more than a refused connection.
            return Err(
                if interrupt.raised().is_none() && qemu.wait(Duration::from_secs(1)) {
                    ended(qemu.ended().unwrap_or_default())
                } else {
                    error.into()
                },
            );
        }
    };
    check_order(plan, &mut qmp, watch)?;
    qmp.execute("cont", json!({}))?;
    watch.progress(&format!("QEMU runs ({}), the guest boots", host.accel));

    let result = wait(
        options, &mut qemu, &heard, interrupt, watch, started, &tails,
    );
    if matches!(result, Ok(Some(_))) && !qemu.wait(ENDING) {
        watch.warning("the guest did not power off; QEMU is told to quit");
    }
    if qemu.ended().is_none() && qmp.execute("quit", json!({})).is_ok() {
        qemu.wait(ENDING);
    }
    result
}

/// Whether QEMU walks the Generic Initiators as the plan has worked out.
fn check_order(plan: &Plan, qmp: &mut Qmp, watch: &mut dyn Watch) -> Result<(), RunError> {
    let planned = plan.initiator_order();
    let objects = qmp.objects()?;
    let walked: Vec<&String> = objects
        .iter()
        .filter(|name| planned.contains(name))
        .collect();
    if !walked.iter().copied().eq(&planned) {
        watch.warning(&format!(
            "QEMU walks its Generic Initiators as {walked:?}, not as {planned:?}: Linux's node numbers will not be the planned ones"
        ));
    }
    Ok(())
}

fn wait(
    options: &Options,
    qemu: &mut Qemu,
    heard: &Receiver<Heard>,
    interrupt: &Interrupt,
    watch: &mut dyn Watch,
    started: Instant,
    tails: &dyn Fn() -> String,
) -> Result<Option<Report>, RunError> {
    loop {
        if let Some(signal) = interrupt.raised() {
            return Err(RunError::Interrupted { signal });
        }
        match heard.recv_timeout(TICK) {
            Ok(Heard::Message(Message::Progress { text }, _)) => watch.progress(&text),
            Ok(Heard::Message(Message::Held { patterns }, answer)) => {
                let written = watch.held(&patterns);
                answer.patterns(&written).map_err(|source| RunError::Host {
                    doing: "answer the guest",
                    source,
                })?;
            }
            Ok(Heard::Message(Message::Report(report), _)) => return Ok(Some(*report)),
            Ok(Heard::Nonsense(what)) => return Err(RunError::Report { what }),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(TICK),
        }
        if let Some(status) = qemu.ended() {
            // What the guest said last may still be on its way from the listening thread.
            if let Ok(Heard::Message(Message::Report(report), _)) =
                heard.recv_timeout(Duration::from_millis(200))
            {
                return Ok(Some(*report));
            }
            if !options.agent {
                return if status.success() {
                    Ok(None)
                } else {
                    Err(RunError::Ended {
                        status: status.to_string(),
                        tail: tails(),
                    })
                };
            }
            return Err(RunError::Ended {
                status: status.to_string(),
                tail: tails(),
            });
        }
        if options.agent && started.elapsed() > options.timeout {
            return Err(RunError::Timeout {
                seconds: options.timeout.as_secs(),
                tail: tails(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_moves_the_cursor_is_left_out() {
        let console = "\u{1b}[2J\u{1b}[001;001H\u{1b}[=3hEFI stub: Loaded\u{7}\r";
        assert_eq!(plain(console), "EFI stub: Loaded");
        assert_eq!(plain("\u{1b}[0"), "");
        assert_eq!(plain(&"x".repeat(500)).len(), 200);
    }

    #[test]
    fn what_a_kernel_died_of_is_not_lost_behind_its_registers() {
        let dump: Vec<String> = (0..60).map(|n| format!("register {n}")).collect();
        let mut lines = vec!["booting", "Oops: int3: 0000 [#1] SMP"];
        lines.extend(dump.iter().map(String::as_str));
        let words = last_words(&lines);
        assert_eq!(words.first(), Some(&"Oops: int3: 0000 [#1] SMP"));
        assert_eq!(words.len(), 30);
        // A cry among the last lines does not cut what was before it.
        let words = last_words(&lines[..10]);
        assert_eq!(words.first(), Some(&"booting"));
        assert_eq!(last_words(&lines[2..]).len(), 15);
    }

    #[test]
    fn a_tail_has_the_last_lines_that_say_something() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(tail("QEMU", &log), "");
        std::fs::write(&log, b"\x1b[2J\n\n").unwrap();
        assert_eq!(tail("QEMU", &log), "");
        let text: String = (0..40).map(|n| format!("line {n}\n\x1b[0m\n")).collect();
        std::fs::write(&log, text).unwrap();
        let tail = tail("QEMU", &log);
        assert!(tail.starts_with("\nQEMU:\n  line 25\n"), "{tail}");
        assert!(tail.ends_with("  line 39"), "{tail}");
    }
}
