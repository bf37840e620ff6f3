//! `cargo xtask fuzz`: the fuzz targets of the GPU model and of the vfio-user server, on stable Rust.
//!
//! The compiler's own coverage pass puts counters into everything but the standard library, and libFuzzer, which
//! comes with the crate `libfuzzer-sys` and is built by a C++ compiler, drives the programs. Only this build has the
//! cfg `fuzzing`. What is found is kept below the target directory, from run to run; the seeds that are committed
//! are read and not written.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::guest::host;
use crate::workspace::{self, Workspace};

/// The targets, which are programs of [`package`].
const TARGETS: [&str; 6] = ["bar", "config", "packets", "ownership", "wire", "session"];

/// The package of a target, and the package's directory.
fn package(target: &str) -> (&'static str, &'static str) {
    match target {
        "wire" | "session" => ("numagpu-vmm-glue-fuzz", "vmm-glue/fuzz"),
        _ => ("numagpu-devices-fuzz", "devices/fuzz"),
    }
}

/// What makes counters: the flags of cargo-fuzz, without a sanitizer, which stable Rust does not have.
const FLAGS: [&str; 8] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg",
    "fuzzing",
];

/// An input that takes longer hangs: usual ones take less than a millisecond.
const TIMEOUT: Duration = Duration::from_secs(25);

/// A target that takes more memory grows without bound: usual ones take a tenth.
const MEMORY_MB: u32 = 1024;

/// Longest input in bytes; more actions than fit into it are not looked at.
const MAX_INPUT: u32 = 2048;

/// Options of `cargo xtask fuzz`.
#[derive(clap::Args)]
pub struct Options {
    /// Targets; all if none is named
    #[arg(value_name = "TARGET", value_parser = TARGETS)]
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Processes that work on one target at once, sharing what they find
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    jobs: u32,
}

impl Options {
    /// Every target for a short time.
    pub fn short(seconds: u32) -> Options {
        Options {
            targets: Vec::new(),
            seconds,
            jobs: 1,
        }
    }
}

/// The C++ compiler that is not there, if it is not.
pub fn missing() -> Option<String> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".to_owned());
    let program = compiler.split_whitespace().next().unwrap_or("g++");
    host::which(program).is_none().then(|| {
        format!("{program}, which builds libFuzzer, is not here; as root: apt-get install g++")
    })
}

/// Builds the targets and runs them one after the other.
pub fn run(options: &Options) -> Result<()> {
    if let Some(missing) = missing() {
        bail!("{missing}");
    }
    let workspace = Workspace::open()?;
    let names: Vec<&str> = match options.targets.as_slice() {
        [] => TARGETS.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    let programs = build(&workspace, &names)?;
    let mut table = format!(
        "{:10} {:>10} {:>8} {:>8} {:>8} {:>6} {:>7}\n",
        "target", "executions", "exec/s", "counters", "features", "inputs", "peak MB"
    );
    for name in names {
        let done = fuzz(&workspace, &programs.join(name), name, options)?;
        let count = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
        table += &format!(
            "{name:10} {:>10} {:>8} {:>8} {:>8} {:>6} {:>7}\n",
            count(done.executions),
            count(done.per_second),
            count(done.counters),
            count(done.features),
            count(done.inputs),
            count(done.peak_mb),
        );
    }
    print!("\n{table}");
    Ok(())
}

/// Builds the programs with counters; returns their directory.
fn build(workspace: &Workspace, names: &[&str]) -> Result<PathBuf> {
    let triple = triple()?;
    let mut command = workspace.cargo();
    command
        .args(["build", "--profile", "fuzz"])
        // With a target named, flags are for the targets only, and not for programs that build them.
        .args(["--target", &triple]);
    for name in names {
        command.args(["--package", package(name).0, "--bin", name]);
    }
    command.env("RUSTFLAGS", FLAGS.join(" "));
    command.env_remove("CARGO_ENCODED_RUSTFLAGS");
    workspace::run(&mut command)?;
    Ok(workspace.target.join(triple).join("fuzz"))
}

/// What rustc builds for.
fn triple() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let said = host::output(Command::new(rustc).arg("-vV"))?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not say its host")?.to_owned())
}

/// What libFuzzer said of a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Done {
    executions: Option<u64>,
    per_second: Option<u64>,
    /// Counters that were reached.
    counters: Option<u64>,
    /// Counters, and how often, and values compared.
    features: Option<u64>,
    /// Inputs kept.
    inputs: Option<u64>,
    peak_mb: Option<u64>,
    /// The file of the input that failed.
    failed: Option<PathBuf>,
}

impl Done {
    /// Takes a line of output; whether it is one that is not for people.
    fn look(&mut self, line: &str) -> bool {
        if let Some((name, value)) = line
            .strip_prefix("stat::")
            .and_then(|rest| rest.split_once(':'))
        {
            let value = value.trim().parse().ok();
            match name {
                "number_of_executed_units" => self.executions = value,
                "average_exec_per_sec" => self.per_second = value,
                "peak_rss_mb" => self.peak_mb = value,
                _ => {}
            }
            return true;
        }
        if let Some((_, file)) = line.split_once("Test unit written to ") {
            self.failed = Some(file.trim().into());
        }
        let mut words = line.split_whitespace();
        let first = words.next().and_then(|word| word.strip_prefix('#'));
        let Some(Ok(number)) = first.map(|word| word.trim_end_matches(':').parse::<u64>()) else {
            return false;
        };
        // Several jobs have no statistics at the end.
        self.executions = self.executions.max(Some(number));
        while let Some(word) = words.next() {
            let place = match word {
                "cov:" => &mut self.counters,
                "ft:" => &mut self.features,
                "corp:" => &mut self.inputs,
                "exec/s:" => &mut self.per_second,
                _ => continue,
            };
            let number = words.next().unwrap_or_default().split('/').next();
            let number = number.and_then(|number| number.parse().ok());
            *place = (*place).max(number);
        }
        true
    }
}

/// Runs one target; an error if it finds something.
fn fuzz(workspace: &Workspace, program: &Path, name: &str, options: &Options) -> Result<Done> {
    let kept = workspace.target.join("fuzz-corpus").join(name);
    let found = workspace.target.join("fuzz-found").join(name);
    for dir in [&kept, &found] {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    let (package, dir) = package(name);
    let seeds = workspace.root.join(dir).join("corpus").join(name);
    let mut command = Command::new(program);
    command
        .current_dir(&found)
        .arg(format!("-max_total_time={}", options.seconds))
        .arg(format!("-timeout={}", TIMEOUT.as_secs()))
        .arg(format!("-rss_limit_mb={MEMORY_MB}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .args(["-print_final_stats=1", "-reload=1"])
        .arg(format!("-artifact_prefix={}/", found.display()))
        .args((options.jobs > 1).then(|| format!("-fork={}", options.jobs)))
        .arg(&kept)
        .arg(&seeds);
    println!("fuzz: {name} for {} s", options.seconds);
    let mut done = Done::default();
    let result = watch(&mut command, &mut done);
    if let Err(error) = result {
        let mut what = format!("{name}: {error:#}");
        if let Some(file) = &done.failed {
            what += &format!(
                "\nto replay it: cargo run --package {package} --bin {name} -- {file}\n\
                 as it was found: {} {file}",
                program.display(),
                file = file.display()
            );
        }
        bail!(what);
    }
    Ok(done)
}

/// Runs a program of libFuzzer, which speaks on the error stream, and passes on what is for people.
fn watch(command: &mut Command, done: &mut Done) -> Result<()> {
    use std::io::{BufRead, BufReader};
    let mut child = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("a target cannot be started")?;
    let output = child.stderr.take().context("a pipe was asked for")?;
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    let mut last = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if !done.look(&text) {
            last.push(text);
        }
        line.clear();
    }
    let status = child.wait()?;
    if !status.success() {
        for line in &last {
            println!("{line}");
        }
        bail!("{status}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libfuzzer_says_is_understood() {
        let mut done = Done::default();
        let lines = [
            "INFO: seed corpus: files: 9 min: 20b max: 1000b total: 2000b rss: 40Mb",
            "#10\tINITED cov: 700 ft: 900 corp: 9/2000b exec/s: 0 rss: 41Mb",
            "#4096\tpulse  cov: 812 ft: 1500 corp: 60/9Kb lim: 20 exec/s: 2048 rss: 44Mb",
            "stat::number_of_executed_units: 4100",
            "stat::average_exec_per_sec:     2050",
            "stat::peak_rss_mb:              44",
        ];
        let taken = lines.map(|line| done.look(line));
        assert_eq!(taken, [false, true, true, true, true, true]);
        let expected = Done {
            executions: Some(4100),
            per_second: Some(2050),
            counters: Some(812),
            features: Some(1500),
            inputs: Some(60),
            peak_mb: Some(44),
            failed: None,
        };
        assert_eq!(done, expected);
    }

    #[test]
    fn several_jobs_are_counted_as_they_go() {
        let mut done = Done::default();
        done.look("#5995: cov: 1178 ft: 4665 corp: 530 exec/s: 666 oom/timeout/crash: 0/0/0");
        assert_eq!(done.executions, Some(5995));
        assert_eq!((done.inputs, done.per_second), (Some(530), Some(666)));
    }

    #[test]
    fn a_failure_names_its_file() {
        let mut done = Done::default();
        let mut shell = Command::new("sh");
        let script = "echo \"artifact_prefix='./'; Test unit written to /x/crash-1\" >&2; exit 77";
        let error = watch(shell.args(["-c", script]), &mut done).unwrap_err();
        assert!(error.to_string().contains("77"), "{error}");
        assert_eq!(done.failed, Some("/x/crash-1".into()));
    }
}
