//! `numagpu run`.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use numagpu_topology::linux::BootPath;
use numagpu_topology::verify::{table, verify};
use numagpu_topology::{Plan, predict, seen::Report};
use numagpu_vmm_glue::assets::{Assets, Kernel};
use numagpu_vmm_glue::run::{self, Interrupt, Options, Watch};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::RunArgs;
use crate::{Failure, is_closed, machine, print, tell, warn};

/// Says on the terminal how far a run is.
struct Terminal {
    started: Instant,
}

impl Watch for Terminal {
    fn progress(&mut self, text: &str) {
        let plain: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
        let seconds = self.started.elapsed().as_secs_f64();
        tell(format_args!("[{seconds:5.1} s] {plain}"));
    }

    fn warning(&mut self, text: &str) {
        tell(format_args!("warning: {text}"));
    }
}

/// The files to boot: those of the command line, else those of `cargo xtask guest`.
fn options(args: &RunArgs) -> anyhow::Result<Options> {
    let directory = Assets::find_dir(&std::env::current_dir().context("current directory")?);
    // Only an error if something is needed from there.
    let assets = match &directory {
        Some(directory) => Assets::load(directory).map_err(anyhow::Error::from),
        None => Err(anyhow!(
            "no guest assets: run `cargo xtask guest`, or give --qemu, --kernel and --firmware"
        )),
    };
    let need = || assets.as_ref().map_err(|error| anyhow!("{error:#}"));
    let own_kernel = Path::new(&args.kernel).is_file();
    let (kernel, initrd): (PathBuf, Option<PathBuf>) = if own_kernel {
        (args.kernel.clone().into(), args.initrd.clone())
    } else {
        let assets = need()?;
        let found = assets
            .kernel(&args.kernel)
            .or_else(|| assets.kernels.first().filter(|_| args.kernel == "6.12"));
        let names: Vec<&str> = assets
            .kernels
            .iter()
            .map(|kernel: &Kernel| kernel.name.as_str())
            .collect();
        let kernel = found.ok_or_else(|| {
            anyhow!(
                "no kernel `{}`: it is no file, and `cargo xtask guest` has provided {}",
                args.kernel,
                names.join(", ")
            )
        })?;
        (
            kernel.vmlinuz.clone(),
            args.initrd.clone().or_else(|| Some(kernel.initrd.clone())),
        )
    };
    let (boot, firmware) = match args.firmware.as_str() {
        "seabios" => (BootPath::SeaBios, None),
        "qboot" => {
            let provided = assets.as_ref().ok().and_then(|a| a.qemu.qboot.clone());
            // QEMU finds its own by name.
            let own = PathBuf::from("qboot.rom");
            (BootPath::Qboot, Some(provided.unwrap_or(own)))
        }
        "ovmf" => {
            let ovmf = &need()?.ovmf;
            let combined = ovmf.combined.clone();
            (
                BootPath::Ovmf,
                Some(combined.ok_or_else(|| {
                    anyhow!("the provided OVMF has no combined image; give --firmware PATH")
                })?),
            )
        }
        path => (BootPath::Ovmf, Some(path.into())),
    };
    let qemu = match (&args.qemu, &assets) {
        (Some(qemu), _) => qemu.clone(),
        (None, Ok(assets)) => assets.qemu.path.clone(),
        (None, Err(_)) => "qemu-system-x86_64".into(),
    };
    Ok(Options {
        qemu,
        boot,
        firmware,
        kernel,
        agent: !own_kernel && args.initrd.is_none(),
        initrd,
        append: args.append.clone(),
        accel: args.accel.clone(),
        hbm_dir: args.hbm_dir.clone(),
        scenario: None,
        qemu_arguments: args.qemu_arguments.clone(),
        console: args.console.clone(),
        timeout: Duration::from_secs(args.timeout),
    })
}

/// Boots, compares, says how it went.
pub fn run(args: &RunArgs) -> Result<ExitCode, Failure> {
    let plan = machine::load(&args.machine)?;
    let scenario = machine::scenario(args.scenario.as_deref(), &plan)?;
    let options = Options {
        scenario,
        ..options(args)?
    };
    warn(&plan, &predict(&plan, options.boot));
    if args.verify && !options.agent {
        return Err(Failure::Input(anyhow!(
            "--verify needs the guest agent, which a kernel or initrd of your own does not have"
        )));
    }
    if args.dry_run {
        print(run::command_line(&plan, &options)?.as_bytes())?;
        return Ok(ExitCode::SUCCESS);
    }
    let interrupt = Interrupt::default();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("listen for signals")?;
    let raise = interrupt.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(|signal| raise.raise(signal)))
        .context("start the thread that waits for signals")?;
    let mut terminal = Terminal {
        started: Instant::now(),
    };
    terminal.progress(&format!("{}: {}", plan.name, plan.description));
    let Some(report) = run::run(&plan, &options, &interrupt, &mut terminal)? else {
        return Ok(ExitCode::SUCCESS);
    };
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    }
    compare(&plan, &options, &report, args.verify)
}

fn compare(
    plan: &Plan,
    options: &Options,
    report: &Report,
    strict: bool,
) -> Result<ExitCode, Failure> {
    let facts = verify(plan, options.boot, report);
    let text = format!(
        "{} on Linux {}, {}\n{}",
        plan.name,
        report.kernel,
        options.boot.words(),
        table(&facts, true)
    );
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The exit code still tells.
        Err(error) if is_closed(&error) => {}
        other => other?,
    }
    if report.soft_reserved.is_empty()
        && plan.hbm().next().is_some()
        && options.boot == BootPath::Ovmf
    {
        tell(format_args!(
            "numagpu: the firmware announced none of the {} soft-reserved ranges: it needs edk2-stable202605 or newer; run `cargo xtask guest`, give --firmware PATH, or use --firmware seabios",
            plan.hbm_ranges().len()
        ));
    }
    let ok = facts.iter().all(|fact| fact.ok);
    if !ok && io::stderr().is_terminal() {
        tell("numagpu: the guest is not what was planned; the lines with DIFF say where");
    }
    Ok(if ok || !strict {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
