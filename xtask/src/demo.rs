//! `cargo xtask demo`: from a bare checkout to guests that are what was planned.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};
use numagpu_vmm_glue::assets;

use crate::guest;
use crate::workspace::{self, Workspace};

/// The machines that are booted.
const PRESETS: [&str; 2] = ["two-gpu", "frontier-node"];

/// The kernel that `numagpu run` boots unless told otherwise; the other ones are not fetched for this.
const KERNEL: &str = "6.12";

/// How the last line of a run begins that compared guest and plan.
const VERDICT: &str = "verified: ";

/// Provides what is missing, boots each machine, and fails if one is not what was planned.
pub fn run() -> Result<()> {
    let begun = Instant::now();
    println!("demo: guest assets");
    let assets = guest::provide(&guest::Options::for_kernels(&[KERNEL]))?;
    println!("demo: the numagpu command");
    let numagpu = Workspace::open()?.numagpu(&["-p", "numagpu-vmm-glue"])?;
    // All machines are tried, so that one report says how each did.
    let outcomes = PRESETS.map(|preset| (preset, boot(Command::new(&numagpu), &assets, preset)));
    println!(
        "demo: {} machines in {:.1} s",
        outcomes.len(),
        begun.elapsed().as_secs_f32()
    );
    let mut failed = Vec::new();
    for (preset, outcome) in outcomes {
        match outcome {
            Ok(verdict) => println!("{preset}: {verdict}"),
            Err(error) => {
                println!("{preset}: {error:#}");
                failed.push(preset);
            }
        }
    }
    if !failed.is_empty() {
        bail!(
            "{} differ from their plans or did not run",
            failed.join(", ")
        );
    }
    Ok(())
}

/// Runs one machine, passing on what it prints; returns its last line.
fn boot(mut command: Command, assets: &Path, preset: &str) -> Result<String> {
    command
        .args(["run", preset, "--verify"])
        .env(assets::DIR_ENV, assets);
    println!();
    workspace::say(&command);
    let mut verdict = None;
    let done = workspace::stream(&mut command, |line| {
        if line.starts_with(VERDICT) {
            verdict = Some(line.to_owned());
        }
        true
    });
    match (done, verdict) {
        (Ok(()), Some(verdict)) => Ok(verdict),
        (Ok(()), None) => bail!("ended well, but compared nothing"),
        (Err(error), Some(verdict)) => bail!("{verdict} ({error:#})"),
        (Err(error), None) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Boots a shell's script that stands for `numagpu`.
    fn boot_script(script: &str) -> Result<String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        boot(command, Path::new("."), "any")
    }

    #[test]
    fn the_verdict_of_a_run_is_returned() {
        let verdict = boot_script("echo fact; echo 'verified: 3 of 3'").unwrap();
        assert_eq!(verdict, "verified: 3 of 3");
    }

    #[test]
    fn a_run_that_differs_is_an_error_with_its_verdict() {
        let error = boot_script("echo 'verified: 2 of 3'; exit 1").unwrap_err();
        assert!(error.to_string().contains("verified: 2 of 3"), "{error}");
    }

    #[test]
    fn a_run_that_compared_nothing_is_an_error() {
        assert!(boot_script("echo hello").is_err());
    }
}
