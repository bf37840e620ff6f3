//! Whether the VMM really shows a partition's memory at its planned address. HBM behind an aperture has none to judge.

use numagpu_spec::regs::Coherence;

use crate::bus::{BackingId, Mapped};

/// The code for a VMM that maps `mapped` over a partition that `backing` (file, offset of its first byte) backs.
pub fn judge(mapped: Mapped, backing: (BackingId, u64)) -> Coherence {
    match mapped {
        Mapped::Nothing => Coherence::NotMapped,
        Mapped::Partial => Coherence::Partial,
        Mapped::NoFd => Coherence::NoFd,
        Mapped::File { id, .. } if id != backing.0 => Coherence::OtherFile,
        Mapped::File { offset, .. } if offset != backing.1 => Coherence::OtherOffset,
        Mapped::File {
            writable: false, ..
        } => Coherence::ReadOnly,
        Mapped::File { .. } => Coherence::Coherent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_map_has_its_code() {
        let id = BackingId {
            device: 1,
            inode: 2,
        };
        let other = BackingId {
            device: 1,
            inode: 3,
        };
        let file = |id, offset, writable| Mapped::File {
            id,
            offset,
            writable,
        };
        for (mapped, code) in [
            (Mapped::Nothing, Coherence::NotMapped),
            (Mapped::Partial, Coherence::Partial),
            (Mapped::NoFd, Coherence::NoFd),
            (file(other, 64, true), Coherence::OtherFile),
            (file(id, 0, true), Coherence::OtherOffset),
            (file(id, 64, false), Coherence::ReadOnly),
            (file(id, 64, true), Coherence::Coherent),
        ] {
            assert_eq!(judge(mapped, (id, 64)), code, "{mapped:?}");
        }
    }
}
