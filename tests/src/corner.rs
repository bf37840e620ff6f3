//! A test's own corner of the host.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use numagpu_topology::seen::Report;
use tempfile::TempDir;

use crate::host::{mentioning, wait_until};
use crate::process::{Ended, Process};
use crate::programs;

/// How long a guest's run may take on a host that does other things too; `numagpu` itself gives up before.
pub const GUEST: Duration = Duration::from_secs(420);
/// How long a command without a guest may take.
pub const COMMAND: Duration = Duration::from_secs(60);

/// Directories that no other test sees: `XDG_RUNTIME_DIR`, one for HBM files, and one for whatever a test writes.
#[derive(Debug)]
pub struct Corner {
    directory: TempDir,
    shared_memory: BTreeSet<PathBuf>,
}

impl Default for Corner {
    fn default() -> Corner {
        Corner::new()
    }
}

impl Corner {
    /// A fresh corner.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new() -> Corner {
        // A socket's path has at most 107 bytes.
        let directory = tempfile::Builder::new()
            .prefix("ngt")
            .tempdir()
            .expect("make a directory");
        for name in ["run", "hbm", "files"] {
            fs::create_dir(directory.path().join(name)).expect("make a directory");
        }
        Corner {
            directory,
            shared_memory: shared_memory(),
        }
    }

    /// The corner's directory, which stands in the command line of whatever serves it.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Directory for HBM files.
    #[must_use]
    pub fn hbm(&self) -> PathBuf {
        self.path().join("hbm")
    }

    /// A place for a file of the test's own.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join("files").join(name)
    }

    /// Writes a file of the test's own.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.file(name);
        fs::write(&path, text).expect("write a file");
        path
    }

    /// Run directories that are there.
    #[must_use]
    pub fn run_dirs(&self) -> Vec<PathBuf> {
        list(&self.path().join("run/numagpu"))
    }

    /// The `numagpu` command in this corner.
    #[must_use]
    pub fn numagpu(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs::numagpu());
        command
            .args(arguments)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("XDG_RUNTIME_DIR", self.path().join("run"))
            .env_remove("NUMAGPU_LOG");
        command
    }

    /// Runs `numagpu` without a guest.
    ///
    /// # Panics
    /// If it does not end.
    #[track_caller]
    pub fn command(&self, arguments: &[&str]) -> Ended {
        Process::run(self.numagpu(arguments), COMMAND)
    }

    /// Boots a machine, wants all of it verified, and gives the guest's report.
    ///
    /// # Panics
    /// If a line differs from the plan, or if anything is left of the run.
    #[track_caller]
    pub fn verified(&self, machine: &str, arguments: &[&str]) -> (Report, Ended) {
        let verified = self.report(machine, arguments);
        self.assert_empty();
        verified
    }

    /// Boots a machine as [`Corner::verified`] does, beside a process of the corner that stays.
    ///
    /// # Panics
    /// If a line differs from the plan, or if anything but that process is left of the run.
    #[track_caller]
    pub fn verified_beside(
        &self,
        machine: &str,
        arguments: &[&str],
        process: &Process,
    ) -> (Report, Ended) {
        let verified = self.report(machine, arguments);
        let own = format!("{} ", process.pid());
        let mut left = self.leftovers();
        left.retain(|left| !left.starts_with(&own));
        assert_eq!(left, Vec::<String>::new());
        verified
    }

    #[track_caller]
    fn report(&self, machine: &str, arguments: &[&str]) -> (Report, Ended) {
        let path = self.file("report.json");
        let report = path.to_string_lossy();
        let mut all = vec!["run", machine, "--verify", "--report", &report];
        all.extend(arguments);
        let ended = Process::run(self.numagpu(&all), GUEST);
        ended.assert_code(0);
        let facts = facts(&ended.stdout);
        assert!(
            facts.is_some_and(|(good, all)| good == all && all >= 16),
            "{ended}"
        );
        let text = fs::read(&path).expect("read the report");
        fs::remove_file(&path).expect("remove the report");
        let report = serde_json::from_slice(&text).expect("understand the report");
        (report, ended)
    }

    /// Processes that serve or use this corner.
    #[must_use]
    pub fn users(&self) -> Vec<String> {
        let users = mentioning(&self.path().to_string_lossy());
        users
            .into_iter()
            .map(|user| format!("{} {}", user.pid, user.command))
            .collect()
    }

    /// What runs have left: run directories, HBM files, processes, names in shared memory.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = self.users();
        let shared = shared_memory().into_iter();
        let files = self
            .run_dirs()
            .into_iter()
            .chain(list(&self.hbm()))
            .chain(shared.filter(|path| !self.shared_memory.contains(path)));
        left.extend(files.map(|path| path.display().to_string()));
        left
    }

    /// Asserts that runs have left nothing.
    ///
    /// # Panics
    /// With what they have left.
    #[track_caller]
    pub fn assert_empty(&self) {
        assert_eq!(self.leftovers(), Vec::<String>::new());
    }

    /// Asserts that nothing in this corner runs any more within this time.
    ///
    /// # Panics
    /// With what still runs.
    #[track_caller]
    pub fn assert_idle(&self, limit: Duration) {
        let idle = wait_until(limit, || self.users().is_empty());
        assert!(idle, "after {limit:?} there still run {:?}", self.users());
    }
}

/// The numbers in `verified: N of M`, the last line.
#[must_use]
pub fn facts(stdout: &str) -> Option<(u32, u32)> {
    let numbers = stdout.lines().last()?.strip_prefix("verified: ")?;
    let (good, all) = numbers.split_once(" of ")?;
    Some((good.parse().ok()?, all.parse().ok()?))
}

/// Names in shared memory that could be a run's. Others use it too.
fn shared_memory() -> BTreeSet<PathBuf> {
    let ours = |path: &PathBuf| {
        let name = path.to_string_lossy().to_lowercase();
        ["gpu", "hbm", "gcd", "qemu"]
            .iter()
            .any(|word| name.contains(word))
    };
    list(Path::new("/dev/shm"))
        .into_iter()
        .filter(ours)
        .collect()
}

/// Names in a directory, sorted; none if there is no directory.
fn list(directory: &Path) -> Vec<PathBuf> {
    let mut names: Vec<PathBuf> = fs::read_dir(directory)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    names.sort();
    names
}
