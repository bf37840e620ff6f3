//! Scenario files: faults that come by themselves.
//!
//! A scenario is a TOML file with a `[[fault]]` table for each fault: which GPU, which fault with the parameters that
//! it has on the command line, one trigger, and whether it comes again. [`Scenario::read`] reads it, [`Scenario::check`]
//! holds it against a machine, [`Runner`] plays it on an instance.
//!
//! ```
//! let text = r#"
//! [[fault]]
//! gpu = 1
//! kind = "uncorrectable-error"
//! address = 0x2_8000_0000
//! when_claimed = 0
//! "#;
//! let scenario = numagpu_vmm_glue::scenario::Scenario::read("mine.toml", text)?;
//! let preset = numagpu_topology::preset::find("two-gpu").unwrap();
//! let machine = numagpu_topology::parse(preset.name, preset.source)?;
//! scenario.check(&numagpu_topology::plan(&machine)?)?;
//! # Ok::<(), numagpu_topology::MachineError>(())
//! ```

mod player;

use std::fmt;

use numagpu_devices::spec::{pci, regs::MAX_PARTITIONS};
use numagpu_topology::machine::{Exposure, SourceText};
use numagpu_topology::{MachineError, Plan, offset_of, plan, schema};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use player::{Played, PlayedFault, Player, Runner};

use crate::control::Fault;

/// Faults of one scenario.
pub const MAX_FAULTS: usize = 4096;
/// How often one fault can come.
pub const MAX_REPEAT: u32 = 1_000_000;
/// Longest time, in milliseconds: one day.
pub const MAX_MS: u64 = 24 * 60 * 60 * 1000;

/// The file.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Scenario")]
struct File {
    /// Faults, in any order.
    fault: Vec<Entry>,
}

/// One fault: `gpu`, `kind`, the parameters that this kind takes, and exactly one trigger of `at_ms`, `when_ready`,
/// `when_claimed` and `after_packets`.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Fault")]
struct Entry {
    /// Index of the GPU in its machine.
    gpu: u32,
    /// Which fault.
    #[schemars(schema_with = "kinds")]
    kind: String,

    /// Trigger: milliseconds since a VMM first connected to any GPU of the machine.
    at_ms: Option<u64>,
    /// Trigger: `true`: the GPU's boot is at READY.
    when_ready: Option<bool>,
    /// Trigger: number of a partition of the GPU: it has been claimed.
    when_claimed: Option<u32>,
    /// Trigger: a queue of the GPU has completed so many packets since it was enabled.
    after_packets: Option<AfterPackets>,

    /// How often it comes, 1 unless given.
    repeat: Option<u32>,
    /// Milliseconds from one time to the next, with `repeat`.
    every_ms: Option<u64>,

    /// Parameter: address in the GPU's HBM, as packets name it.
    address: Option<u64>,
    /// Parameter: what `BOOT.FAULT` shows, not 0.
    code: Option<u32>,
    /// Parameter: how many, 1 unless given.
    count: Option<u32>,
    /// Parameter: how long a link is down, in milliseconds.
    down_ms: Option<u32>,
    /// Parameter: lanes of a link that stay up.
    lanes: Option<u32>,
    /// Parameter: how long a reset is stuck, in milliseconds; 0 = until `return`.
    ms: Option<u32>,
    /// Parameter: partition.
    partition: Option<u32>,
    /// Parameter: hive position of a link's other end.
    peer: Option<u32>,
    /// Parameter: queue.
    queue: Option<u32>,
    /// Parameter: MSI-X vector.
    vector: Option<u16>,
}

/// Keys of [`Entry`] that are no part of its fault.
const NO_PARAMETERS: [&str; 7] = [
    "gpu",
    "at_ms",
    "when_ready",
    "when_claimed",
    "after_packets",
    "repeat",
    "every_ms",
];

/// A queue's progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AfterPackets {
    /// Queue.
    pub queue: u32,
    /// Packets, at least 1.
    pub packets: u64,
}

fn kinds(_: &mut SchemaGenerator) -> Schema {
    let kinds: Vec<String> = Fault::EXAMPLES.iter().map(Fault::kind).collect();
    Schema::try_from(json!({ "type": "string", "enum": kinds })).unwrap_or_default()
}

/// When a fault comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// Milliseconds since a VMM first connected to any GPU of the machine.
    AtMs(u64),
    /// The GPU's boot is at READY.
    WhenReady,
    /// This partition of the GPU has been claimed.
    WhenClaimed(u32),
    /// A queue of the GPU has completed so many packets since it was enabled.
    AfterPackets(AfterPackets),
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trigger::AtMs(ms) => write!(f, "at {ms} ms"),
            Trigger::WhenReady => f.write_str("when ready"),
            Trigger::WhenClaimed(partition) => write!(f, "when partition {partition} is claimed"),
            Trigger::AfterPackets(AfterPackets { queue, packets }) => {
                write!(f, "after {packets} packets of queue {queue}")
            }
        }
    }
}

/// A fault that is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Index of the GPU.
    pub gpu: u32,
    /// Which fault.
    pub fault: Fault,
    /// When.
    pub trigger: Trigger,
    /// How often, at least 1.
    pub repeat: u32,
    /// Milliseconds from one time to the next.
    pub every_ms: u64,
}

/// A scenario that was read.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Where it is from.
    source: SourceText,
    faults: Vec<Planned>,
}

/// The JSON Schema of a scenario file.
///
/// # Errors
/// None that the schema can cause; `serde_json`'s type is passed through.
pub fn schema_text() -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(&schema::of::<File>())?;
    text.push('\n');
    Ok(text)
}

/// Keys that a scenario's table cannot do without.
fn required(table: &str) -> &'static str {
    match table {
        "" => "a scenario needs a [[fault]] table for each fault",
        _ => {
            "a [[fault]] table needs gpu, kind, the parameters of that kind, and a trigger; after_packets needs queue and packets"
        }
    }
}

/// What is wrong with a key, and what would fit.
type Wrong = (&'static str, String, Option<String>);

impl Entry {
    /// The fault that kind and parameters name.
    fn fault(&self) -> Result<Fault, Wrong> {
        let unclear = |error: serde_json::Error| ("kind", error.to_string(), None);
        let mut value = serde_json::to_value(self).map_err(unclear)?;
        if let Value::Object(all) = &mut value {
            all.retain(|key, value| !value.is_null() && !NO_PARAMETERS.contains(&key.as_str()));
        }
        let kind = &self.kind;
        serde_json::from_value(value).map_err(|error| {
            let message = error.to_string();
            let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
            let (first, others) = names.split_first().unwrap_or((&"", &[]));
            let list = others.join(", ");
            if message.starts_with("unknown variant") {
                let help = Some(format!("it is one of {list}"));
                return ("kind", format!("`{kind}` is not known"), help);
            }
            if message.starts_with("missing field") {
                return ("", format!("`{kind}` needs {first}"), None);
            }
            let key = NAMES.iter().find(|name| *name == first).unwrap_or(&"kind");
            let takes = match others {
                [] => "no parameters".to_owned(),
                _ => list,
            };
            (
                key,
                format!("`{kind}` takes no {first}"),
                Some(format!("it takes {takes}")),
            )
        })
    }

    fn trigger(&self) -> Result<Trigger, Wrong> {
        let all = [
            self.at_ms.map(Trigger::AtMs),
            self.when_ready.map(|_| Trigger::WhenReady),
            self.when_claimed.map(Trigger::WhenClaimed),
            self.after_packets.map(Trigger::AfterPackets),
        ];
        let mut given = all.into_iter().flatten();
        let (first, others) = (given.next(), given.count());
        let one = "give one of at_ms, when_ready, when_claimed, after_packets".to_owned();
        let Some(trigger) = first else {
            return Err(("", "has no trigger".to_owned(), Some(one)));
        };
        if others > 0 {
            let message = format!("has {} triggers", others.saturating_add(1));
            return Err(("", message, Some(one)));
        }
        match trigger {
            Trigger::AtMs(ms) if ms > MAX_MS => Err((
                "at_ms",
                format!("is {ms}"),
                Some(format!("the largest is {MAX_MS}, one day")),
            )),
            Trigger::WhenReady if self.when_ready == Some(false) => Err((
                "when_ready",
                "is false".to_owned(),
                Some("write true, or another trigger".to_owned()),
            )),
            Trigger::AfterPackets(AfterPackets { packets: 0, .. }) => Err((
                "after_packets.packets",
                "is 0".to_owned(),
                Some("the least is 1; `when_ready = true` comes before any packet".to_owned()),
            )),
            trigger => Ok(trigger),
        }
    }

    fn planned(&self) -> Result<Planned, Wrong> {
        let (fault, trigger) = (self.fault()?, self.trigger()?);
        let repeat = self.repeat.unwrap_or(1);
        if !(1..=MAX_REPEAT).contains(&repeat) {
            let help = format!("it is 1 to {MAX_REPEAT}");
            return Err(("repeat", format!("is {repeat}"), Some(help)));
        }
        let every_ms = self.every_ms.unwrap_or(0);
        match self.every_ms {
            None if repeat > 1 => {
                let help = "give every_ms, the milliseconds from one time to the next";
                return Err((
                    "repeat",
                    "has no every_ms".to_owned(),
                    Some(help.to_owned()),
                ));
            }
            Some(_) if self.repeat.is_none() => {
                let help = "give repeat, how often the fault comes";
                return Err((
                    "every_ms",
                    "has no repeat".to_owned(),
                    Some(help.to_owned()),
                ));
            }
            Some(ms) if !(1..=MAX_MS).contains(&ms) => {
                let help = format!("it is 1 to {MAX_MS}, one day");
                return Err(("every_ms", format!("is {ms}"), Some(help)));
            }
            _ => {}
        }
        Ok(Planned {
            gpu: self.gpu,
            fault,
            trigger,
            repeat,
            every_ms,
        })
    }
}

/// Keys of parameters, for errors.
const NAMES: [&str; 10] = [
    "address",
    "code",
    "count",
    "down_ms",
    "lanes",
    "ms",
    "partition",
    "peer",
    "queue",
    "vector",
];

impl Scenario {
    /// Reads a scenario. `file` is its name in errors.
    ///
    /// # Errors
    /// [`MachineError`] with file, line and key.
    pub fn read(file: &str, text: &str) -> Result<Scenario, MachineError> {
        let source = SourceText {
            file: file.to_owned(),
            text: text.to_owned(),
        };
        let read: File = numagpu_topology::read(&source, required)?;
        let mut scenario = Scenario {
            source,
            faults: Vec::new(),
        };
        if read.fault.len() > MAX_FAULTS {
            let (have, help) = (read.fault.len(), format!("the most is {MAX_FAULTS}"));
            return Err(scenario.wrong(
                MAX_FAULTS,
                ("", format!("is one of {have} faults"), Some(help)),
            ));
        }
        for (index, entry) in read.fault.iter().enumerate() {
            let planned = entry.planned();
            let planned = planned.map_err(|wrong| scenario.wrong(index, wrong))?;
            scenario.faults.push(planned);
        }
        Ok(scenario)
    }

    /// Its faults, in the order of the file.
    #[must_use]
    pub fn faults(&self) -> &[Planned] {
        &self.faults
    }

    /// Name of its file.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.source.file
    }

    /// Holds it against a machine: GPUs, queues, partitions, links and addresses are there.
    ///
    /// Drivers can divide HBM into more partitions than are planned, so a partition's number may be any that the
    /// planned ones can be divided into.
    ///
    /// # Errors
    /// [`MachineError`] with file, line and key.
    pub fn check(&self, plan: &Plan) -> Result<(), MachineError> {
        for (index, planned) in self.faults.iter().enumerate() {
            check(planned, plan).map_err(|wrong| self.wrong(index, wrong))?;
        }
        Ok(())
    }

    fn wrong(&self, index: usize, (key, message, help): Wrong) -> MachineError {
        let key = match key {
            "" => format!("fault[{index}]"),
            key => format!("fault[{index}].{key}"),
        };
        let offset = offset_of(&self.source.text, &key);
        self.source.error(offset, key, message, help)
    }
}

/// A number that has to be below `have`.
fn below(key: &'static str, number: u32, have: usize, what: &str) -> Result<(), Wrong> {
    if (number as usize) < have {
        return Ok(());
    }
    let message = format!("is {number}; there are {have} {what}");
    let help = have.checked_sub(1).map(|last| format!("it is 0 to {last}"));
    Err((key, message, help))
}

fn check(planned: &Planned, plan: &Plan) -> Result<(), Wrong> {
    below("gpu", planned.gpu, plan.gpus.len(), "GPUs")?;
    let Some(gpu) = plan.gpus.get(planned.gpu as usize) else {
        return Ok(());
    };
    let queues = crate::instance::queues(&plan.device) as usize;
    let own = match gpu.exposure {
        Exposure::Ram => &[],
        _ => gpu.hbm.as_slice(),
    };
    let partitions = match own.len() {
        0 => 0,
        planned => (MAX_PARTITIONS as usize / planned).max(1) * planned,
    };
    let queue = |key, number| below(key, number, queues, "queues");
    let partition = |key, number| below(key, number, partitions, "partitions at most");
    match planned.trigger {
        Trigger::WhenClaimed(number) => partition("when_claimed", number)?,
        Trigger::AfterPackets(after) => queue("after_packets.queue", after.queue)?,
        Trigger::AtMs(_) | Trigger::WhenReady => {}
    }
    match planned.fault {
        Fault::CorrectableError { address } | Fault::UncorrectableError { address } => {
            has_address(address, own)
        }
        Fault::EngineHang { queue: number } => queue("queue", number),
        Fault::LostDoorbell { queue: number, .. } => queue("queue", number),
        Fault::SpuriousInterrupt { vector } => {
            below("vector", vector.into(), pci::VECTOR_COUNT.into(), "vectors")
        }
        Fault::LinkLoss { peer } | Fault::LinkReturn { peer } | Fault::LinkFlap { peer, .. } => {
            has_link(peer, gpu)
        }
        Fault::LinkWidth { peer, lanes } => {
            has_link(peer, gpu)?;
            let widths = gpu.links.iter();
            let widths = widths.filter(|link| link.peer_hive_node == Some(peer));
            let width = widths.map(|link| link.count).min().unwrap_or(0);
            let help = Some(format!("it is 0 to {width}"));
            let message = format!("is {lanes}; the link has {width} lanes");
            match lanes <= width {
                true => Ok(()),
                false => Err(("lanes", message, help)),
            }
        }
        Fault::BootFailure { code: 0 } => {
            let help = Some("the least is 1".to_owned());
            Err(("code", "is 0, which is no fault".to_owned(), help))
        }
        Fault::ScrubFailure { partition: number } => partition("partition", number),
        Fault::LostInterrupt { .. }
        | Fault::BootFailure { .. }
        | Fault::BootTimeout {}
        | Fault::StuckReset { .. }
        | Fault::Removal {}
        | Fault::Return {} => Ok(()),
    }
}

fn has_address(address: u64, own: &[plan::Hbm]) -> Result<(), Wrong> {
    let end = |hbm: &plan::Hbm| hbm.base.saturating_add(hbm.size);
    if own
        .iter()
        .any(|hbm| (hbm.base..end(hbm)).contains(&address))
    {
        return Ok(());
    }
    let ranges = own
        .iter()
        .map(|hbm| format!("{:#x}..{:#x}", hbm.base, end(hbm)));
    let ranges: Vec<String> = ranges.collect();
    let help = match ranges.is_empty() {
        true => "it has no HBM of its own".to_owned(),
        false => format!("its HBM is {}", ranges.join(", ")),
    };
    let message = format!("{address:#x} is not in this GPU's HBM");
    Err(("address", message, Some(help)))
}

fn has_link(peer: u32, gpu: &plan::Gpu) -> Result<(), Wrong> {
    let mut peers: Vec<u32> = gpu
        .links
        .iter()
        .filter_map(|link| link.peer_hive_node)
        .collect();
    peers.sort_unstable();
    peers.dedup();
    if peers.contains(&peer) {
        return Ok(());
    }
    let names: Vec<String> = peers.iter().map(u32::to_string).collect();
    let help = match names.is_empty() {
        true => "it has no links to other GPUs".to_owned(),
        false => format!("it has links to {}", names.join(", ")),
    };
    Err((
        "peer",
        format!("is {peer}, to which this GPU has no link"),
        Some(help),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let preset = numagpu_topology::preset::find("two-gpu").unwrap();
        let machine = numagpu_topology::parse(preset.name, preset.source).unwrap();
        numagpu_topology::plan(&machine).unwrap()
    }

    /// What comes of a scenario with an empty line, and a table with these lines.
    fn read(lines: &str) -> Result<Vec<Planned>, String> {
        let text = format!("\n[[fault]]\n{lines}\n");
        let read = Scenario::read("it.toml", &text).and_then(|it| it.check(&plan()).map(|()| it));
        read.map(|it| it.faults).map_err(|error| error.to_string())
    }

    #[test]
    fn every_fault_can_be_in_a_scenario() {
        for fault in Fault::EXAMPLES {
            let parameters = fault.parameters().into_iter();
            let lines: String = parameters
                .map(|(name, value)| format!("{name} = {value}\n"))
                .collect();
            let text = format!("gpu = 0\nkind = \"{}\"\n{lines}at_ms = 5", fault.kind());
            let wanted = Planned {
                gpu: 0,
                fault: *fault,
                trigger: Trigger::AtMs(5),
                repeat: 1,
                every_ms: 0,
            };
            assert_eq!(read(&text), Ok(vec![wanted]), "{text}");
            assert!(
                fault
                    .parameters()
                    .iter()
                    .all(|(name, _)| NAMES.contains(&name.as_str()))
            );
        }
    }

    #[test]
    fn every_trigger_can_be_in_a_scenario() {
        let trigger = |line: &str| read(&format!("gpu = 1\nkind = \"removal\"\n{line}"));
        for (line, wanted) in [
            ("at_ms = 0", Trigger::AtMs(0)),
            ("when_ready = true", Trigger::WhenReady),
            ("when_claimed = 0", Trigger::WhenClaimed(0)),
            (
                "after_packets = { queue = 1, packets = 100 }",
                Trigger::AfterPackets(AfterPackets {
                    queue: 1,
                    packets: 100,
                }),
            ),
        ] {
            assert_eq!(trigger(line).unwrap()[0].trigger, wanted);
        }
        let often = trigger("when_ready = true\nrepeat = 3\nevery_ms = 20").unwrap();
        assert_eq!((often[0].repeat, often[0].every_ms), (3, 20));
    }

    #[test]
    fn what_is_wrong_has_file_line_and_key() {
        let hang = "gpu = 0\nkind = \"engine-hang\"\nqueue = 0\n";
        for (lines, message) in [
            (
                "gpu = 2\nkind = \"removal\"\nat_ms = 1",
                "it.toml:3: fault[0].gpu: is 2; there are 2 GPUs\n  help: it is 0 to 1",
            ),
            (
                "gpu = 0\nkind = \"meteor\"\nat_ms = 1",
                "it.toml:4: fault[0].kind: `meteor` is not known\n  help: it is one of correctable-error, uncorrectable-error, engine-hang, lost-doorbell, lost-interrupt, spurious-interrupt, link-loss, link-return, link-flap, link-width, boot-failure, boot-timeout, stuck-reset, scrub-failure, removal, return",
            ),
            (
                "gpu = 0\nkind = \"engine-hang\"\nat_ms = 1",
                "it.toml:2: fault[0]: `engine-hang` needs queue",
            ),
            (
                "gpu = 0\nkind = \"removal\"\nqueue = 1\nat_ms = 1",
                "it.toml:5: fault[0].queue: `removal` takes no queue\n  help: it takes no parameters",
            ),
            (
                "gpu = 0\nkind = \"link-flap\"\npeer = 1\ndown_ms = 5\nms = 1\nat_ms = 1",
                "it.toml:7: fault[0].ms: `link-flap` takes no ms\n  help: it takes peer, down_ms",
            ),
            (
                "gpu = 0\nkind = \"engine-hang\"\nqueue = 2\nat_ms = 1",
                "it.toml:5: fault[0].queue: is 2; there are 2 queues\n  help: it is 0 to 1",
            ),
            (
                "gpu = 0\nkind = \"link-loss\"\npeer = 7\nat_ms = 1",
                "it.toml:5: fault[0].peer: is 7, to which this GPU has no link\n  help: it has links to 1",
            ),
            (
                "gpu = 0\nkind = \"link-width\"\npeer = 1\nlanes = 9\nat_ms = 1",
                "it.toml:6: fault[0].lanes: is 9; the link has 4 lanes\n  help: it is 0 to 4",
            ),
            (
                "gpu = 0\nkind = \"scrub-failure\"\npartition = 8\nat_ms = 1",
                "it.toml:5: fault[0].partition: is 8; there are 8 partitions at most\n  help: it is 0 to 7",
            ),
            (
                "gpu = 0\nkind = \"spurious-interrupt\"\nvector = 9\nat_ms = 1",
                "it.toml:5: fault[0].vector: is 9; there are 9 vectors\n  help: it is 0 to 8",
            ),
            (
                "gpu = 0\nkind = \"correctable-error\"\naddress = 0x280000000\nat_ms = 1",
                "it.toml:5: fault[0].address: 0x280000000 is not in this GPU's HBM\n  help: its HBM is 0x100000000..0x200000000",
            ),
            (
                "gpu = 0\nkind = \"boot-failure\"\ncode = 0\nat_ms = 1",
                "it.toml:5: fault[0].code: is 0, which is no fault\n  help: the least is 1",
            ),
            (
                hang,
                "it.toml:2: fault[0]: has no trigger\n  help: give one of at_ms, when_ready, when_claimed, after_packets",
            ),
            (
                &format!("{hang}at_ms = 1\nwhen_ready = true"),
                "it.toml:2: fault[0]: has 2 triggers\n  help: give one of at_ms, when_ready, when_claimed, after_packets",
            ),
            (
                &format!("{hang}when_ready = false"),
                "it.toml:6: fault[0].when_ready: is false\n  help: write true, or another trigger",
            ),
            (
                &format!("{hang}at_ms = 86400001"),
                "it.toml:6: fault[0].at_ms: is 86400001\n  help: the largest is 86400000, one day",
            ),
            (
                &format!("{hang}when_claimed = 9"),
                "it.toml:6: fault[0].when_claimed: is 9; there are 8 partitions at most\n  help: it is 0 to 7",
            ),
            (
                &format!("{hang}after_packets = {{ queue = 3, packets = 1 }}"),
                "it.toml:6: fault[0].after_packets.queue: is 3; there are 2 queues\n  help: it is 0 to 1",
            ),
            (
                &format!("{hang}after_packets = {{ queue = 0, packets = 0 }}"),
                "it.toml:6: fault[0].after_packets.packets: is 0\n  help: the least is 1; `when_ready = true` comes before any packet",
            ),
            (
                &format!("{hang}at_ms = 1\nrepeat = 2"),
                "it.toml:7: fault[0].repeat: has no every_ms\n  help: give every_ms, the milliseconds from one time to the next",
            ),
            (
                &format!("{hang}at_ms = 1\nevery_ms = 2"),
                "it.toml:7: fault[0].every_ms: has no repeat\n  help: give repeat, how often the fault comes",
            ),
            (
                &format!("{hang}at_ms = 1\nrepeat = 0"),
                "it.toml:7: fault[0].repeat: is 0\n  help: it is 1 to 1000000",
            ),
            (
                &format!("{hang}at_ms = 1\nrepeat = 2\nevery_ms = 0"),
                "it.toml:8: fault[0].every_ms: is 0\n  help: it is 1 to 86400000, one day",
            ),
            (
                "gpu = -1\nkind = \"removal\"\nat_ms = 1",
                "it.toml:3: fault[0].gpu: is `-1`; it has to be a whole number from 0 up",
            ),
            (
                "gpu = 0\nkind = \"spurious-interrupt\"\nvector = 70000\nat_ms = 1",
                "it.toml:5: fault[0].vector: is `70000`; it has to be a whole number from 0 up\n  help: the largest is 65535",
            ),
            (
                "kind = \"removal\"\nat_ms = 1",
                "it.toml:2: fault[0]: `gpu` is missing\n  help: a [[fault]] table needs gpu, kind, the parameters of that kind, and a trigger; after_packets needs queue and packets",
            ),
        ] {
            assert_eq!(read(lines), Err(message.to_owned()), "{lines}");
        }
    }

    #[test]
    fn keys_that_there_are_not_and_text_that_is_no_toml_are_errors() {
        let error = |text: &str| Scenario::read("it.toml", text).unwrap_err().to_string();
        assert!(error("[[fault]]\ngpus = 1").starts_with(
            "it.toml:2: fault[0].gpus: there is no such key\n  help: [[fault]] takes gpu, kind, at_ms"
        ));
        assert_eq!(
            error("fault = 3"),
            "it.toml:1: fault: is `3`; it has to be a list\n  help: write one [[fault]] table for each"
        );
        assert_eq!(
            error(""),
            "it.toml:1: (top level): `fault` is missing\n  help: a scenario needs a [[fault]] table for each fault"
        );
        assert!(error("[[fault]\n").starts_with("it.toml:1: [[fault]: is not TOML"));
    }

    #[test]
    fn faults_are_bounded() {
        let one = "[[fault]]\ngpu = 0\nkind = \"removal\"\nat_ms = 1\n";
        assert!(Scenario::read("it.toml", &one.repeat(MAX_FAULTS)).is_ok());
        let error = Scenario::read("it.toml", &one.repeat(MAX_FAULTS + 1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "it.toml:16385: fault[4096]: is one of 4097 faults\n  help: the most is 4096"
        );
    }

    #[test]
    fn the_schema_has_every_kind_and_key() {
        let schema: Value = serde_json::from_str(&schema_text().unwrap()).unwrap();
        let entry = schema.pointer("/$defs/Fault").unwrap();
        let kinds = entry
            .pointer("/properties/kind/enum")
            .and_then(Value::as_array);
        assert_eq!(kinds.map(Vec::len), Some(Fault::EXAMPLES.len()));
        let keys = entry
            .pointer("/properties")
            .and_then(Value::as_object)
            .unwrap();
        assert_eq!(keys.len(), 1 + NO_PARAMETERS.len() + NAMES.len());
        assert!(keys.values().all(|key| key.get("description").is_some()));
        assert_eq!(entry.get("additionalProperties"), Some(&json!(false)));
    }
}
