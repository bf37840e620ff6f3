//! Landlock: which names a server can still touch. What is open stays open.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, PathFdError, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr,
    RulesetError, Scope,
};
use thiserror::Error;

use super::Leavings;

/// Newest landlock whose rights are all known here; of an older kernel's, what it has is taken.
const NEWEST: ABI = ABI::V7;

/// Why landlock cannot be applied.
#[derive(Debug, Error)]
pub enum FilesError {
    /// The kernel refused.
    #[error("cannot apply landlock: {0}")]
    Ruleset(#[from] RulesetError),
    /// A directory cannot be named to the kernel.
    #[error("cannot apply landlock: {0}")]
    Directory(#[from] PathFdError),
}

/// Forbids all that landlock can, but removing names in directories. ABI of the kernel's landlock, 0 if it has none.
pub fn restrict(leavings: &Leavings) -> Result<u32, FilesError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for directory in &leavings.files_in {
        rules = allow(rules, directory, AccessFs::RemoveFile.into())?;
    }
    for directory in &leavings.directories_in {
        rules = allow(rules, directory, AccessFs::RemoveDir.into())?;
    }
    let status = rules.restrict_self()?;
    Ok(match status.landlock {
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } => kernel_abi
            .and_then(|abi| u32::try_from(abi).ok())
            .unwrap_or(effective_abi as u32),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    })
}

fn allow(
    rules: RulesetCreated,
    directory: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, FilesError> {
    Ok(rules.add_rule(PathBeneath::new(PathFd::new(directory)?, access))?)
}
