//! The test runner: cargo-nextest, or `cargo test` where that cannot be had.

use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use numagpu_vmm_glue::assets;

use super::stages::Outcome;
use crate::workspace::{self, Workspace};

/// The runner's program, and the version that is installed where there is none.
const NEXTEST: (&str, &str) = ("cargo-nextest", "0.9.143");

/// How the line of the runner begins that sums up its run.
const SUMMARY: &str = "Summary [";

/// The feature that brings the tests that are too long for every day.
const LONG: &str = "--features=numagpu-tests/long";

/// The package whose tests boot guests.
const GUESTS: &str = "numagpu-tests";

/// Runs the tests that `filter` names, or all; `closing` becomes the runner's last lines.
pub fn run(
    workspace: &Workspace,
    long_too: bool,
    filter: &[String],
    assets: &Path,
    closing: &mut Vec<String>,
) -> Result<Outcome> {
    let Some(nextest) = nextest(workspace) else {
        return cargo_test(workspace, long_too, filter, assets).map(|()| Outcome::Passed);
    };
    let mut command = Command::new(nextest);
    command
        .current_dir(&workspace.root)
        .env(assets::DIR_ENV, assets)
        .args(["nextest", "run", "--workspace"])
        .args(long_too.then_some(LONG))
        .args(filter);
    workspace::say(&command);
    // Read by us on its way to the terminal, it would take the terminal for none.
    if std::io::stderr().is_terminal() {
        command.arg("--color=always");
    }
    watch(&mut command, closing)?;
    Ok(Outcome::Passed)
}

/// Runs the runner, passes on what it says, and keeps its lines from the summary on.
fn watch(command: &mut Command, closing: &mut Vec<String>) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("the test runner cannot be started")?;
    let output = child.stderr.take().context("a pipe was asked for")?;
    let mut lines = BufReader::new(output);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let mut terminal = std::io::stderr().lock();
        terminal.write_all(&line)?;
        terminal.flush()?;
        let text = String::from_utf8_lossy(&line);
        if !closing.is_empty() || plain(&text).trim_start().starts_with(SUMMARY) {
            closing.push(text.trim_end().to_owned());
        }
        line.clear();
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("cargo-nextest: {status}");
    }
    Ok(())
}

/// Text without a terminal's colours.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain += before;
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    plain + rest
}

/// Where the runner is; it is installed below the target directory if need be. `None` if that fails.
fn nextest(workspace: &Workspace) -> Option<PathBuf> {
    let (program, version) = NEXTEST;
    let tools = workspace.target.join("tools");
    let ours = tools.join("bin").join(program);
    let found = std::env::var_os("PATH")
        .iter()
        .flat_map(std::env::split_paths)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file());
    if let Some(found) = found.or_else(|| ours.is_file().then(|| ours.clone())) {
        return Some(found);
    }
    println!(
        "{program} is not on this machine: building {version} from crates.io into {}, some minutes",
        tools.display()
    );
    let mut command = workspace.cargo();
    command
        .args(["install", program, "--version", version, "--locked"])
        // Without the part that updates it in place.
        .args([
            "--no-default-features",
            "--features",
            "default-no-update",
            "--root",
        ])
        .arg(&tools)
        .arg("--target-dir")
        .arg(tools.join("build"))
        // It waits for tests most of the time: what counts is that it is built soon.
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    match workspace::run(&mut command) {
        Ok(()) => Some(ours),
        Err(error) => {
            println!("{program} cannot be installed ({error:#}): going on with cargo test");
            None
        }
    }
}

/// The same tests by cargo itself, those that boot guests one at a time.
fn cargo_test(
    workspace: &Workspace,
    long_too: bool,
    filter: &[String],
    assets: &Path,
) -> Result<()> {
    if let Some(option) = filter.iter().find(|word| word.starts_with('-')) {
        bail!("{option} is an argument of cargo-nextest, which is not here; give names of tests");
    }
    let run = |packages: &[&str], threads: &[&str]| {
        let mut command = workspace.cargo();
        command
            .env(assets::DIR_ENV, assets)
            .args(["test", "--lib", "--bins", "--tests", "--no-fail-fast"])
            .args(packages)
            .arg("--")
            .args(threads)
            .args(filter);
        workspace::run(&mut command)
    };
    run(&["--workspace", "--exclude", GUESTS], &[])?;
    let mut guests = vec!["--package", GUESTS];
    guests.extend(long_too.then_some(LONG));
    run(&guests, &["--test-threads=1"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runner_s_lines_from_the_summary_on_are_kept() {
        let mut closing = Vec::new();
        let mut shell = Command::new("sh");
        let script = r"printf 'PASS a\n\033[32;1m Summary\033[0m [ 1s] 2 tests run\nFAIL b\n' >&2";
        watch(shell.args(["-c", script]), &mut closing).unwrap();
        let plain: Vec<String> = closing.iter().map(|line| plain(line)).collect();
        assert_eq!(plain, [" Summary [ 1s] 2 tests run", "FAIL b"]);
    }

    #[test]
    fn a_runner_that_fails_is_an_error() {
        let mut shell = Command::new("sh");
        assert!(watch(shell.args(["-c", "exit 100"]), &mut Vec::new()).is_err());
    }
}
