//! What the PCI functions of a machine's GPUs are: identity, queues, time.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use toml::Spanned;

/// Most copy queues of a GPU, what its register map has room for.
pub const MAX_QUEUES: u32 = 8;
/// Copy queues of a GPU whose description does not say.
pub const DEFAULT_QUEUES: u32 = 2;
/// Class code of a GPU whose description does not say: a processing accelerator.
pub const DEFAULT_CLASS: u32 = 0x12_0000;
/// Highest class code: three bytes.
pub const MAX_CLASS: u32 = 0xff_ffff;

/// What time stamps of the GPUs mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Timing {
    /// The host's time; work goes as fast as the host does it.
    #[default]
    Off,
    /// What the machine's bandwidths and latencies give; work goes as fast as the host does it.
    Modelled,
    /// The same, and work takes that long.
    Paced,
}

/// The PCI functions of the GPUs, all alike. What is not given is the device model's default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Device {
    /// PCI vendor id, so that a given driver binds: 0 to 0xfffe, by default 0x1234.
    #[schemars(with = "u16", range(max = 0xfffe))]
    pub vendor: Option<Spanned<u16>>,
    /// PCI device id, by default 0x6770.
    #[schemars(with = "u16")]
    pub device: Option<u16>,
    /// PCI subsystem vendor id, by default the vendor's.
    #[schemars(with = "u16")]
    pub subsystem_vendor: Option<u16>,
    /// PCI subsystem id, by default the device's.
    #[schemars(with = "u16")]
    pub subsystem: Option<u16>,
    /// PCI class code: base class, sub-class and programming interface in one number, up to 0xffffff; by default
    /// 0x120000, a processing accelerator.
    #[schemars(with = "u32", range(max = 0xff_ffff))]
    pub class: Option<Spanned<u32>>,
    /// PCI revision, by default 1.
    #[schemars(with = "u8")]
    pub revision: Option<u8>,
    /// Copy queues of each GPU, 1 to 8, by default 2.
    #[schemars(with = "u32", range(min = 1, max = 8))]
    pub queues: Option<Spanned<u32>>,
    /// Modelled boot time in microseconds, by default 1000.
    #[schemars(with = "u32", extend("x-unit" = "microseconds"))]
    pub boot_us: Option<u32>,
    /// What time stamps mean, and how long work takes.
    pub timing: Timing,
}

impl Device {
    /// Copy queues of each GPU.
    pub fn queues(&self) -> u32 {
        let queues = self.queues.as_ref();
        queues.map_or(DEFAULT_QUEUES, |queues| *queues.get_ref())
    }

    /// Class code.
    pub fn class(&self) -> u32 {
        let class = self.class.as_ref();
        class.map_or(DEFAULT_CLASS, |class| *class.get_ref())
    }
}
