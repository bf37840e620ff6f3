//! Developer commands.

mod bench;
mod demo;
mod docs;
mod fuzz;
mod guest;
mod lint;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Developer commands of numagpu.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// What to do.
#[derive(Subcommand)]
enum Command {
    /// Boot two machines with numagpu and compare what the guests see with what was planned
    Demo,
    /// Run every check and test of the project
    Test(test::Options),
    /// Provide QEMU, firmware, kernels and initramfs for test guests, without touching the system
    Guest(guest::Options),
    /// Run the benchmarks
    Bench(bench::Options),
    /// Fuzz the GPU model with libFuzzer; needs a C++ compiler
    Fuzz(fuzz::Options),
    /// Check what no compiler checks: who depends on whom, where unsafe code is, what files hold
    Lint,
    /// Write the generated pages of docs/
    Docs(docs::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo => demo::run(),
        Command::Test(options) => test::run(&options),
        Command::Guest(options) => guest::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Lint => lint::run(),
        Command::Docs(options) => docs::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
