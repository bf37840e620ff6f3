//! Faults by name: one type for the control socket, the command line and scenario files.
//!
//! To add one: a variant, its line in [`From`], an example; and, if it has a parameter of a new name, a key in
//! [`crate::scenario`].

use std::fmt;

use numagpu_devices::inject::Injection;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A fault. In JSON and TOML `kind` names it, and its parameters have the names that they have here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::Subcommand)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// A memory error that was corrected.
    CorrectableError {
        /// Address in the GPU's HBM, as packets name it.
        #[arg(long, value_parser = number)]
        address: u64,
    },
    /// A memory error that was not; it spoils the line of 64 bytes around the address.
    UncorrectableError {
        /// Address in the GPU's HBM, as packets name it.
        #[arg(long, value_parser = number)]
        address: u64,
    },
    /// A queue stops in the middle of its work, without a word.
    EngineHang {
        /// Queue.
        #[arg(long)]
        queue: u32,
    },
    /// The next doorbells of a queue get lost.
    LostDoorbell {
        /// Queue.
        #[arg(long)]
        queue: u32,
        /// How many, 1 unless given.
        #[arg(long, default_value_t = 1, hide_default_value = true)]
        #[serde(default = "one")]
        count: u32,
    },
    /// The next messages get lost; the bits in IRQ.STATUS do not.
    LostInterrupt {
        /// How many, 1 unless given.
        #[arg(long, default_value_t = 1, hide_default_value = true)]
        #[serde(default = "one")]
        count: u32,
    },
    /// A message for no cause.
    SpuriousInterrupt {
        /// MSI-X vector.
        #[arg(long)]
        vector: u16,
    },
    /// Every link to a peer goes down, on both ends.
    LinkLoss {
        /// Hive position of the peer.
        #[arg(long)]
        peer: u32,
    },
    /// Every link to a peer comes up with all its lanes.
    LinkReturn {
        /// Hive position of the peer.
        #[arg(long)]
        peer: u32,
    },
    /// Every link to a peer goes down, and comes up again by itself.
    LinkFlap {
        /// Hive position of the peer.
        #[arg(long)]
        peer: u32,
        /// Time in between, in milliseconds.
        #[arg(long, value_name = "MS")]
        down_ms: u32,
    },
    /// Only some lanes of the links to a peer stay up, on both ends.
    LinkWidth {
        /// Hive position of the peer.
        #[arg(long)]
        peer: u32,
        /// Lanes that are up, at most the link's; 0 is a loss.
        #[arg(long)]
        lanes: u32,
    },
    /// The next boot fails.
    BootFailure {
        /// What BOOT.FAULT shows, not 0.
        #[arg(long, value_parser = short_number)]
        code: u32,
    },
    /// The next boot never ends.
    BootTimeout {},
    /// After the next function-level or hot reset the function does not answer for some time.
    StuckReset {
        /// How long, in milliseconds; 0 = until `return`.
        #[arg(long)]
        ms: u32,
    },
    /// The next scrub of a partition fails.
    ScrubFailure {
        /// Partition.
        #[arg(long)]
        partition: u32,
    },
    /// The GPU is pulled out.
    Removal {},
    /// A GPU that does not answer is plugged in again, as after power-on.
    Return {},
}

const fn one() -> u32 {
    1
}

/// A number as people write it, decimal or hexadecimal.
fn number(text: &str) -> Result<u64, String> {
    let digits = text.replace('_', "");
    let parsed = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    parsed.map_err(|error| format!("{error}; write it as 4294967296 or 0x1_0000_0000"))
}

fn short_number(text: &str) -> Result<u32, String> {
    let value = number(text)?;
    u32::try_from(value).map_err(|_| format!("{value:#x} is more than {:#x}", u32::MAX))
}

impl Fault {
    /// One of each, in the order of the type, with parameters that fit the first GPU of the preset `two-gpu`.
    pub const EXAMPLES: &[Fault] = &[
        Fault::CorrectableError {
            address: 0x1_0000_0000,
        },
        Fault::UncorrectableError {
            address: 0x1_0000_0040,
        },
        Fault::EngineHang { queue: 0 },
        Fault::LostDoorbell { queue: 0, count: 2 },
        Fault::LostInterrupt { count: 1 },
        Fault::SpuriousInterrupt { vector: 3 },
        Fault::LinkLoss { peer: 1 },
        Fault::LinkReturn { peer: 1 },
        Fault::LinkFlap {
            peer: 1,
            down_ms: 100,
        },
        Fault::LinkWidth { peer: 1, lanes: 1 },
        Fault::BootFailure { code: 0x42 },
        Fault::BootTimeout {},
        Fault::StuckReset { ms: 1000 },
        Fault::ScrubFailure { partition: 0 },
        Fault::Removal {},
        Fault::Return {},
    ];

    /// Its name.
    #[must_use]
    pub fn kind(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        let kind = value.get("kind").and_then(Value::as_str);
        kind.unwrap_or_default().to_owned()
    }

    /// Names and values of its parameters, by name; the values as people write them, addresses and codes hexadecimal.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, String)> {
        let Ok(Value::Object(all)) = serde_json::to_value(self) else {
            return Vec::new();
        };
        let parameters = all.into_iter().filter(|(name, _)| name != "kind");
        let written = parameters.map(|(name, value)| {
            let value = match (name.as_str(), value.as_u64()) {
                ("address" | "code", Some(number)) => format!("{number:#x}"),
                _ => value.to_string(),
            };
            (name, value)
        });
        written.collect()
    }
}

impl fmt::Display for Fault {
    /// As the command line has it: `link-flap --down-ms 100 --peer 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind())?;
        for (name, value) in self.parameters() {
            write!(f, " --{} {value}", name.replace('_', "-"))?;
        }
        Ok(())
    }
}

impl From<Fault> for Injection {
    fn from(fault: Fault) -> Injection {
        match fault {
            Fault::CorrectableError { address } => Injection::CorrectableError { address },
            Fault::UncorrectableError { address } => Injection::UncorrectableError { address },
            Fault::EngineHang { queue } => Injection::EngineHang { queue },
            Fault::LostDoorbell { queue, count } => Injection::LostDoorbell { queue, count },
            Fault::LostInterrupt { count } => Injection::LostInterrupt { count },
            Fault::SpuriousInterrupt { vector } => Injection::SpuriousInterrupt { vector },
            Fault::LinkLoss { peer } => Injection::LinkLoss { peer },
            Fault::LinkReturn { peer } => Injection::LinkReturn { peer },
            Fault::LinkFlap { peer, down_ms } => Injection::LinkFlap { peer, down_ms },
            Fault::LinkWidth { peer, lanes } => Injection::LinkWidth { peer, lanes },
            Fault::BootFailure { code } => Injection::BootFailure { code },
            Fault::BootTimeout {} => Injection::BootTimeout,
            Fault::StuckReset { ms } => Injection::StuckReset { ms },
            Fault::ScrubFailure { partition } => Injection::ScrubFailure { partition },
            Fault::Removal {} => Injection::Removal,
            Fault::Return {} => Injection::Return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{Parser, Subcommand as _};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(subcommand)]
        fault: Fault,
    }

    #[test]
    fn there_is_an_example_of_every_fault() {
        let command = Fault::augment_subcommands(clap::Command::new("inject"));
        let commands: BTreeSet<String> = command
            .get_subcommands()
            .map(|it| it.get_name().to_owned())
            .collect();
        let examples: BTreeSet<String> = Fault::EXAMPLES.iter().map(Fault::kind).collect();
        assert_eq!(examples, commands, "one name in JSON and on command lines");
        assert_eq!(Fault::EXAMPLES.len(), commands.len());
    }

    #[test]
    fn a_fault_is_the_same_in_json_and_on_a_command_line() {
        for fault in Fault::EXAMPLES {
            let line = format!("inject {fault}");
            let parsed = Line::try_parse_from(line.split(' ')).map(|line| line.fault);
            assert_eq!(parsed.as_ref().ok(), Some(fault), "{line}");
            let json = serde_json::to_string(fault).unwrap();
            assert_eq!(serde_json::from_str::<Fault>(&json).unwrap(), *fault);
        }
        let flap = Fault::LinkFlap {
            peer: 1,
            down_ms: 100,
        };
        assert_eq!(flap.to_string(), "link-flap --down-ms 100 --peer 1");
    }

    #[test]
    fn how_many_is_one_unless_it_is_said() {
        let lost = Fault::LostInterrupt { count: 1 };
        let json = r#"{"kind":"lost-interrupt"}"#;
        assert_eq!(serde_json::from_str::<Fault>(json).unwrap(), lost);
        let line = Line::try_parse_from(["inject", "lost-interrupt"]).unwrap();
        assert_eq!(line.fault, lost);
    }

    #[test]
    fn what_a_fault_does_not_take_is_refused() {
        for (json, message) in [
            (r#"{"kind":"removal","queue":1}"#, "unknown field `queue`"),
            (r#"{"kind":"engine-hang"}"#, "missing field `queue`"),
            (
                r#"{"kind":"engine-hang","queue":-1}"#,
                "invalid value: integer `-1`",
            ),
            (r#"{"kind":"meteor"}"#, "unknown variant `meteor`"),
            (r"{}", "missing field `kind`"),
        ] {
            let error = serde_json::from_str::<Fault>(json).unwrap_err().to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(number("0x1_0000_0000"), Ok(1 << 32));
        assert_eq!(number("4294967296"), Ok(1 << 32));
        assert!(number("4 GiB").is_err() && number("").is_err() && number("0x").is_err());
        assert!(number("0x1_0000_0000_0000_0000").is_err());
        assert_eq!(short_number("0x42"), Ok(0x42));
        let much = short_number("0x100000000");
        assert_eq!(much, Err("0x100000000 is more than 0xffffffff".to_owned()));
    }
}
