//! `cargo xtask test`: every check and test, in stages; what CI runs.

mod runner;
mod stages;

use std::path::Path;

use anyhow::Result;

use crate::workspace::{self, Workspace};
use crate::{docs, fuzz, guest, lint};
use stages::{Outcome, Stages};

/// The kernels that tests boot.
const KERNELS: [&str; 2] = ["6.12", "newest"];
/// Those that the long ones boot.
const LONG_KERNELS: [&str; 3] = ["6.1", "6.12", "newest"];

/// Seconds that each fuzz target gets; longer runs are for `cargo xtask fuzz`.
const FUZZ_SECONDS: u32 = 10;

/// Stages that say nothing about a few tests picked by name.
const WHY_NOT: &str = "tests were picked by name; run without a filter for this";

/// Options of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Options {
    /// Run the tests that are too long for every day as well: every preset, kernel 6.1, HBM across 1 TiB
    #[arg(long)]
    all: bool,
    /// Run only these tests: names, or other arguments of `cargo nextest run`
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "FILTER"
    )]
    filter: Vec<String>,
}

/// Runs the stages up to the first failure.
pub fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::open()?;
    let mut stages = Stages::default();
    let mut closing = Vec::new();
    let result = all(&workspace, options, &mut stages, &mut closing);
    println!("\n{}", stages.table());
    for line in closing {
        println!("{line}");
    }
    result
}

/// The stages in order; `closing` becomes the last lines of the test runner.
fn all(
    workspace: &Workspace,
    options: &Options,
    stages: &mut Stages,
    closing: &mut Vec<String>,
) -> Result<()> {
    let picked = !options.filter.is_empty();
    let cargo = |arguments: &str| {
        let mut command = workspace.cargo();
        command.args(arguments.split(' '));
        command
    };
    let check = |arguments: &str| {
        workspace::run(&mut cargo(arguments))?;
        Ok(Outcome::Passed)
    };
    let unless_picked = |then: &dyn Fn() -> Result<Outcome>| {
        if picked {
            return Ok(Outcome::Skipped(WHY_NOT.to_owned()));
        }
        then()
    };

    let mut dir = None;
    stages.run("guest assets", || {
        let kernels: &[&str] = if options.all { &LONG_KERNELS } else { &KERNELS };
        dir = Some(guest::provide(&guest::Options::for_kernels(kernels))?);
        Ok(Outcome::Passed)
    })?;
    // Software that is not ours, against which outputs are held.
    stages.run("tools", || {
        guest::host::need(&["iasl", "lspci", "lstopo-no-graphics"])?;
        Ok(Outcome::Passed)
    })?;
    stages.run("format", || unless_picked(&|| check("fmt --all --check")))?;
    stages.run("lint", || {
        unless_picked(&|| lint::run().map(|()| Outcome::Passed))
    })?;
    stages.run("clippy", || {
        unless_picked(&|| check("clippy --workspace --all-targets -- -D warnings"))
    })?;
    // Tests start programs of the workspace that are not of their own package.
    stages.run("build", || check("build --workspace --bins --examples"))?;
    stages.run("kvm", || Ok(kvm()))?;
    let dir = dir.unwrap_or_default();
    stages.run("tests", || {
        runner::run(workspace, options.all, &options.filter, &dir, closing)
    })?;
    stages.run("doc tests", || {
        unless_picked(&|| check("test --workspace --doc --quiet"))
    })?;
    stages.run("rustdoc", || {
        unless_picked(&|| {
            let mut command = cargo("doc --workspace --no-deps --quiet");
            workspace::run(command.env("RUSTDOCFLAGS", "-D warnings"))?;
            Ok(Outcome::Passed)
        })
    })?;
    stages.run("generated docs", || {
        unless_picked(&|| docs::check(workspace).map(|()| Outcome::Passed))
    })?;
    // After what is sure to be there and finds the same each time.
    stages.run("fuzz", || {
        unless_picked(&|| match fuzz::missing() {
            Some(missing) => Ok(Outcome::Skipped(missing)),
            None => fuzz::run(&fuzz::Options::short(FUZZ_SECONDS)).map(|()| Outcome::Passed),
        })
    })
}

/// Whether tests that need KVM can run; they leave themselves out where they cannot.
fn kvm() -> Outcome {
    let device = Path::new("/dev/kvm");
    let opened = std::fs::File::options().read(true).write(true).open(device);
    match opened {
        Ok(_) => Outcome::Passed,
        Err(error) => Outcome::Skipped(format!(
            "{}: {error}; tests that need KVM leave themselves out",
            device.display()
        )),
    }
}
