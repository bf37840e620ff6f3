//! `cargo xtask bench`: the benchmarks, each with its floor in the same run.

use anyhow::Result;

use crate::workspace::{self, Workspace};

/// Options of `cargo xtask bench`.
#[derive(clap::Args)]
pub struct Options {
    /// Arguments of `cargo bench`, such as `--bench vfio_user -- FILTER`
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGS"
    )]
    arguments: Vec<String>,
}

/// Runs them.
pub fn run(options: &Options) -> Result<()> {
    let mut command = Workspace::open()?.cargo();
    command
        .args(["bench", "-p", "numagpu-benches"])
        .args(&options.arguments);
    workspace::run(&mut command)
}
