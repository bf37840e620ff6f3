//! The `numagpu` command.

mod args;
mod boot;
mod control;
mod handed;
mod machine;
mod selftest;
mod serve;

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use clap::{CommandFactory, Parser};
use numagpu_topology::machine::Mark;
use numagpu_topology::qemu::Host;
use numagpu_topology::{
    Plan, Prediction, acpi, cloud_hypervisor, linux, memory_map, predict, preset, qemu, render,
    schema,
};
use numagpu_vmm_glue::scenario;

use args::{Args, Command, FileKind, Format, PlanArgs};

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
        .log_internal_errors(false)
        .init();
    // Beyond a file-size limit (`ulimit -f`) the kernel would kill us before an error can say so.
    let ignored = Arc::new(AtomicBool::new(false));
    if let Err(error) = signal_hook::flag::register(libc::SIGXFSZ, ignored) {
        tracing::debug!("SIGXFSZ: {error}");
    }
    let result = match args.command {
        Command::Presets => presets(),
        Command::Plan(args) => plan(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Run(args) => boot::run(&args),
        Command::Selftest(args) => selftest::selftest(&args),
        Command::Status(args) => control::status(&args),
        Command::Inject(args) => control::inject(&args),
        Command::Schema(args) => print_schema(args.of),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "numagpu", &mut text);
            print(&text).map(|()| ExitCode::SUCCESS)
        }
        Command::Man => man(),
    };
    match result {
        Ok(code) => code,
        Err(Failure::Input(error)) => {
            tell(format_args!("numagpu: {}", in_words(&error)));
            ExitCode::from(2)
        }
        Err(Failure::Failed(error)) => {
            // Whoever closed our output early, as `head` does, has what they wanted.
            if error.downcast_ref().is_some_and(is_closed) {
                return ExitCode::SUCCESS;
            }
            tell(format_args!("numagpu: {}", in_words(&error)));
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes. Most of our errors have their cause in their own words; it is not said twice.
fn in_words(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

/// Writes a line to the standard error output, if anybody still reads that.
fn tell(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes to the standard output.
fn print(text: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    Ok(out.write_all(text).and_then(|()| out.flush())?)
}

/// Whether nobody reads an output any more.
fn is_closed(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
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

/// Writes ACPI tables: one file for each into a directory, or all behind each other into one file.
fn acpi(plan: &Plan, path: &Path) -> Result<ExitCode, Failure> {
    let tables = acpi::tables(plan);
    let write = |path: &Path, bytes: &[u8]| {
        std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
    };
    if path.is_dir() {
        for table in &tables {
            write(&path.join(format!("{}.aml", table.signature)), &table.bytes)?;
        }
    } else {
        let bytes: Vec<u8> = tables.into_iter().flat_map(|table| table.bytes).collect();
        write(path, &bytes)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes a zero page with the memory map in it, and behind it the `setup_data` for entries that it does not hold.
fn boot_params(plan: &Plan, path: &Path) -> Result<ExitCode, Failure> {
    let params = memory_map::boot_params(plan);
    let mut bytes = vec![0; 4096];
    params.write(&mut bytes)?;
    bytes.extend(params.setup_data(0).unwrap_or_default());
    std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes bytes into a file, or shows them as hexadecimal.
fn bytes(bytes: &[u8], args: &PlanArgs) -> Result<ExitCode, Failure> {
    match &args.output {
        Some(path) => {
            std::fs::write(path, bytes).with_context(|| format!("write {}", path.display()))?;
        }
        None => print(memory_map::hex(bytes).as_bytes())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Says what the reader should know before booting.
fn warn(plan: &Plan, prediction: &Prediction) {
    for warning in &prediction.warnings {
        tell(format_args!("warning: {warning}"));
    }
    for warning in &plan.warnings {
        tell(format_args!("warning: {warning}"));
    }
}

fn plan(args: &PlanArgs) -> Result<ExitCode, Failure> {
    let plan = machine::load(&args.machine)?;
    let boot = args.boot.path();
    let prediction = predict(&plan, boot);
    // Of a VMM that is none of the ways of booting that are predicted.
    let mut own_warnings = None;
    let text = match args.format {
        Format::Acpi => match &args.output {
            Some(path) => return acpi(&plan, path),
            None => acpi::dump(&acpi::tables(&plan)),
        },
        Format::BootParams => match &args.output {
            Some(path) => return boot_params(&plan, path),
            None => memory_map::boot_params(&plan).dump(),
        },
        Format::FwCfgE820 => return bytes(&memory_map::fw_cfg_e820(&plan), args),
        Format::PvhMemmap => return bytes(&memory_map::pvh_memory_map(&plan), args),
        Format::EfiMemmap => return bytes(&memory_map::efi_memory_map(&plan), args),
        Format::Prediction => serde_json::to_string_pretty(&prediction)? + "\n",
        Format::Text => render::text(&plan, boot),
        Format::Json => render::json(&plan)?,
        Format::E820 => render::e820(&plan),
        Format::Qemu => {
            let host = Host::placeholders(&plan, boot, &args.socket_dir, &args.hbm_dir);
            qemu::shell("qemu-system-x86_64", &qemu::arguments(&plan, &host)?)
        }
        Format::CloudHypervisor => {
            let host = cloud_hypervisor::Host::placeholders(&plan, &args.socket_dir);
            let line = cloud_hypervisor::command_line(&plan, &host)?;
            own_warnings = Some(line.warnings);
            qemu::shell("cloud-hypervisor", &line.arguments)
        }
        Format::LinuxCmdline => {
            let arguments = linux::command_line(boot, plan.guest.driver, &plan.hbm_ranges());
            format!("{}\n", arguments.join(" "))
        }
        Format::Svg => render::svg(&plan),
        Format::Dot => render::dot(&plan),
        Format::Hwloc => render::hwloc(&plan),
    };
    match &args.output {
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?
        }
        None => print(text.as_bytes())?,
    }
    match own_warnings {
        Some(warnings) => {
            for warning in warnings.iter().chain(&plan.warnings) {
                tell(format_args!("warning: {warning}"));
            }
        }
        None if matches!(args.format, Format::Text | Format::Prediction) => {}
        None => warn(&plan, &prediction),
    }
    Ok(ExitCode::SUCCESS)
}

fn print_schema(of: FileKind) -> Result<ExitCode, Failure> {
    let text = match of {
        FileKind::Machine => schema::text()?,
        FileKind::Scenario => scenario::schema_text()?,
    };
    print(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn man() -> Result<ExitCode, Failure> {
    let command = Args::command();
    let mut out = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut out)?;
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        clap_mangen::Man::new(sub.clone()).render(&mut out)?;
    }
    print(&out)?;
    Ok(ExitCode::SUCCESS)
}
