//! What the HBM is made of on the host.

use crate::machine::{BackingKind, Machine};
use crate::size::MIB;

/// What the HBM is made of on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Kind of memory.
    pub kind: BackingKind,
    /// Directory of the files, if the description names one.
    pub directory: Option<String>,
    /// Bytes of a huge page, for [`BackingKind::Hugetlb`].
    pub page: u64,
}

impl Backing {
    /// What a machine that passed the checks describes.
    pub(crate) fn of(machine: &Machine) -> Backing {
        let described = &machine.backing;
        let directory = described.directory.as_ref();
        let page = described.page.as_ref();
        Backing {
            kind: *described.kind.get_ref(),
            directory: directory.map(|directory| directory.get_ref().clone()),
            page: page.map_or(2 * MIB, |page| page.get_ref().0),
        }
    }
}
