//! Machines that come with the crate.

/// A machine description that comes with the crate.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Name, as on the command line.
    pub name: &'static str,
    /// The description.
    pub source: &'static str,
}

/// Presets by file name.
macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(Preset {
            name: $name,
            source: include_str!(concat!("../presets/", $name, ".toml")),
        }),*]
    };
}

/// All presets.
pub const ALL: &[Preset] = presets![
    "two-gpu",
    "frontier-node",
    "frontier",
    "mi300a-x4",
    "mi300x-x8",
    "mi325x-x8",
    "mi355x-x8",
    "gh200-480",
    "gh200-480-slit11",
    "gh200-x4",
    "gb200-nvl4",
    "gb300-nvl4",
    "xeon-max-flat",
];

/// The preset of this name.
pub fn find(name: &str) -> Option<&'static Preset> {
    ALL.iter().find(|preset| preset.name == name)
}
