//! Finds a machine by preset name or file, and plans it.

use std::path::Path;

use anyhow::anyhow;
use numagpu_topology::device::Timing;
use numagpu_topology::{Plan, preset};
use numagpu_vmm_glue::scenario::Scenario;

use crate::Failure;
use crate::args::{self, MachineArgs};

/// Largest file that is read; the largest preset has under 10 KiB, a scenario's fault about 100 bytes.
const MAX_FILE: u64 = 4 << 20;

/// Plans a preset or a file.
pub fn load(with: &MachineArgs) -> Result<Plan, Failure> {
    let machine = with.machine.as_str();
    let (file, text) = match preset::find(machine) {
        Some(preset) => (preset.name.to_owned(), preset.source.to_owned()),
        None => (machine.to_owned(), read(machine).map_err(Failure::Input)?),
    };
    let machine =
        numagpu_topology::parse(&file, &text).map_err(|error| Failure::Input(error.into()))?;
    let mut machine = if with.small { machine.small() } else { machine };
    if let Some(timing) = with.timing {
        machine.device.timing = match timing {
            args::Timing::Off => Timing::Off,
            args::Timing::Modelled => Timing::Modelled,
            args::Timing::Paced => Timing::Paced,
        };
    }
    numagpu_topology::plan(&machine).map_err(|error| Failure::Input(error.into()))
}

fn read(machine: &str) -> anyhow::Result<String> {
    let path = Path::new(machine);
    let names: Vec<&str> = preset::ALL.iter().map(|preset| preset.name).collect();
    let metadata = std::fs::metadata(path).map_err(|error| {
        anyhow!(
            "`{machine}` is neither a preset ({}) nor a file: {error}",
            names.join(", ")
        )
    })?;
    bounded(path, "machine description", metadata.len())
}

/// A file's text.
fn bounded(path: &Path, what: &str, len: u64) -> anyhow::Result<String> {
    let name = path.display();
    if len > MAX_FILE {
        return Err(anyhow!(
            "{name} has {len} bytes; a {what} has at most {MAX_FILE}"
        ));
    }
    std::fs::read_to_string(path).map_err(|error| anyhow!("read {name}: {error}"))
}

/// Reads a scenario and holds it against a machine.
pub fn scenario(path: Option<&Path>, plan: &Plan) -> Result<Option<Scenario>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let name = path.display().to_string();
    let text = std::fs::metadata(path)
        .map_err(|error| anyhow!("read {name}: {error}"))
        .and_then(|metadata| bounded(path, "scenario", metadata.len()));
    let scenario = Scenario::read(&name, &text.map_err(Failure::Input)?);
    let scenario = scenario.map_err(|error| Failure::Input(error.into()))?;
    scenario
        .check(plan)
        .map_err(|error| Failure::Input(error.into()))?;
    Ok(Some(scenario))
}
