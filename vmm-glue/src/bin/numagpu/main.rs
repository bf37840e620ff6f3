//! The `numagpu` command.

mod args;
mod boot;
mod machine;
mod serve;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use numagpu_topology::machine::Mark;
use numagpu_topology::qemu::Host;
use numagpu_topology::{linux, preset, qemu, render};

use args::{Args, Command, Format, PlanArgs};

/// What ends the program.
enum Failure {
    /// The input is wrong: exit 2.
    Input(anyhow::Error),
    /// It did not work: exit 1.
    Failed(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Failed(error.into())
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_env("NUMAGPU_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .without_time()
        .init();
    let result = match args.command {
        Command::Presets => presets(),
        Command::Plan(args) => plan(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Run(args) => boot::run(&args),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Args::command(), "numagpu", &mut io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Man => man(),
    };
    match result {
        Ok(code) => code,
        Err(Failure::Input(error)) => {
            eprintln!("numagpu: {error:#}");
            ExitCode::from(2)
        }
        Err(Failure::Failed(error)) => {
            // Whoever closed our output early does not want to hear of it.
            let pipe = error
                .downcast_ref::<io::Error>()
                .is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe);
            if !pipe {
                eprintln!("numagpu: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn presets() -> Result<ExitCode, Failure> {
    let mut out = io::stdout().lock();
    for preset in preset::ALL {
        let machine = numagpu_topology::parse(preset.name, preset.source)?;
        let count = |mark: Mark| {
            machine
                .source
                .iter()
                .filter(|source| source.mark == mark)
                .count()
        };
        writeln!(out, "{:14} {}", preset.name, machine.description)?;
        writeln!(out, "{:14} matches {}", "", machine.matches)?;
        writeln!(
            out,
            "{:14} values: {} published, {} derived, {} hypothetical, {} scaled",
            "",
            count(Mark::Published),
            count(Mark::Derived),
            count(Mark::Hypothetical),
            count(Mark::Scaled)
        )?;
        for source in &machine.source {
            let mark = format!("{:?}", source.mark).to_lowercase();
            writeln!(
                out,
                "{:14}   {mark:12} {}: {}",
                "", source.value, source.from
            )?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn plan(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let plan = machine::load(&args.machine)?;
    let boot = args.boot.path();
    let text = match args.format {
        Format::Text => render::text(&plan),
        Format::Json => render::json(&plan)?,
        Format::E820 => render::e820(&plan),
        Format::Qemu => {
            let host = Host::placeholders(&plan, boot, &args.socket_dir, &args.hbm_dir);
            qemu::shell("qemu-system-x86_64", &qemu::arguments(&plan, &host)?)
        }
        Format::LinuxCmdline => {
            let arguments = linux::command_line(boot, plan.guest.driver, &plan.hbm_ranges());
            format!("{}\n", arguments.join(" "))
        }
    };
    match &args.output {
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?
        }
        None => io::stdout().lock().write_all(text.as_bytes())?,
    }
    if !matches!(args.format, Format::Text) {
        for warning in &plan.warnings {
            eprintln!("warning: {warning}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn man() -> Result<ExitCode, Failure> {
    let command = Args::command();
    let mut out = io::stdout().lock();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        clap_mangen::Man::new(sub.clone()).render(&mut out)?;
    }
    Ok(ExitCode::SUCCESS)
}
