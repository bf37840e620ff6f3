//! Processes, as `/proc` has them.

use std::fs;
use std::time::{Duration, Instant};

/// How often something is looked at again.
const TICK: Duration = Duration::from_millis(5);

/// A process that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Process id.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its command line, words separated by spaces.
    pub command: String,
}

/// All processes that run. One that has ended and was not reaped does not run.
pub fn running() -> Vec<Running> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| process(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

fn process(pid: u32) -> Option<Running> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim().to_owned())
    };
    if field("State:")?.starts_with(['Z', 'X']) {
        return None;
    }
    let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    Some(Running {
        pid,
        parent: field("PPid:")?.parse().ok()?,
        command: String::from_utf8_lossy(&command).replace('\0', " "),
    })
}

/// Whether a process runs.
pub fn runs(pid: u32) -> bool {
    process(pid).is_some()
}

/// Children of a process, their children, and so on.
pub fn descendants(pid: u32) -> Vec<Running> {
    let all = running();
    let mut found: Vec<Running> = Vec::new();
    let mut parents = vec![pid];
    while let Some(parent) = parents.pop() {
        for child in all.iter().filter(|process| process.parent == parent) {
            parents.push(child.pid);
            found.push(child.clone());
        }
    }
    found
}

/// Processes other than this one with `text` in their command lines, whoever their parents are.
pub fn mentioning(text: &str) -> Vec<Running> {
    let mut all = running();
    all.retain(|process| process.pid != std::process::id() && process.command.contains(text));
    all
}

/// Waits until something holds; false if it does not in time.
pub fn wait_until(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(TICK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_grandchild_is_found_by_parents_and_by_words_and_is_gone_once_killed() {
        let word = format!("numagpu-test-{}", std::process::id());
        let script = format!("sh -c 'sleep 60; : {word}'; :");
        let mut child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
        let limit = Duration::from_secs(20);
        assert!(wait_until(limit, || descendants(child.id()).len() == 2));
        assert!(mentioning(&word).len() >= 2);
        let below = descendants(child.id());
        child.kill().unwrap();
        for process in &below {
            let pid = i32::try_from(process.pid).unwrap();
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        child.wait().unwrap();
        assert!(wait_until(limit, || mentioning(&word).is_empty()));
        assert!(!runs(child.id()));
    }
}
