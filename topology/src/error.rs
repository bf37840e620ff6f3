//! What can be wrong with a machine description.

use thiserror::Error;

/// A machine description that no plan can be made of: where it is wrong, what is wrong, and what would fit.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{file}:{line}: {key}: {message}{}", fit(.help))]
pub struct MachineError {
    /// Name of the file, or of the preset.
    pub file: String,
    /// Line in the file, from 1.
    pub line: usize,
    /// Key that is wrong, such as `gpu[1].hbm`.
    pub key: String,
    /// What is wrong, with the numbers that clash.
    pub message: String,
    /// What would fit, if that can be said.
    pub help: Option<String>,
}

fn fit(help: &Option<String>) -> String {
    help.as_ref()
        .map(|help| format!("\n  help: {help}"))
        .unwrap_or_default()
}
