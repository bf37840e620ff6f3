//! Machines that come with the crate.

/// A machine description that comes with the crate.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Name, as on the command line.
    pub name: &'static str,
    /// The description.
    pub source: &'static str,
}

/// All presets.
pub const ALL: &[Preset] = &[
    Preset {
        name: "two-gpu",
        source: include_str!("../presets/two-gpu.toml"),
    },
    Preset {
        name: "frontier-node",
        source: include_str!("../presets/frontier-node.toml"),
    },
];

/// The preset of this name.
pub fn find(name: &str) -> Option<&'static Preset> {
    ALL.iter().find(|preset| preset.name == name)
}
