//! Seeds of the target `config`: DMA allowed and not, resets, sizes of BARs.

use crate::config::Action as A;
use crate::input::{self, Near};

/// Names and bytes.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let at = |spot, by| Near { spot, by };
    let write = |spot, by, value, len| A::Write {
        at: at(spot, by),
        value,
        len,
    };
    let all = vec![
        (
            "work",
            vec![
                A::Boot {},
                A::Work {},
                A::BusMaster { on: false },
                A::Work {},
            ],
        ),
        (
            "power",
            vec![
                A::Boot {},
                A::Power { state: 3 },
                A::Work {},
                A::Power { state: 1 },
                A::Power { state: 0 },
                A::Work {},
            ],
        ),
        (
            "function_reset",
            vec![
                A::Boot {},
                A::Work {},
                A::Flr {},
                A::Work {},
                A::Boot {},
                A::Work {},
            ],
        ),
        (
            "size_bars",
            (0..6)
                .flat_map(|bar| {
                    [
                        A::SizeBar { bar },
                        A::Read {
                            at: at(4, 0),
                            len: 24,
                        },
                    ]
                })
                .collect(),
        ),
        (
            "ones_everywhere",
            vec![
                write(0, 0, u64::MAX, 64),
                write(11, 0, u64::MAX, 24),
                write(14, 0, u64::MAX, 64),
                A::Read {
                    at: at(0, 0),
                    len: 64,
                },
                A::Boot {},
                A::Work {},
            ],
        ),
        (
            "straddle",
            vec![
                write(13, -1, 0x8000_0000, 5),
                write(15, 4, u64::MAX, 12),
                A::Read {
                    at: at(15, 4),
                    len: 12,
                },
                A::ReadBeyond {
                    offset: u32::MAX,
                    len: 8,
                },
                A::WriteBeyond {
                    offset: u32::MAX - 3,
                    value: 1,
                    len: 8,
                },
                A::Reset { disconnect: true },
            ],
        ),
    ];
    all.into_iter()
        .map(|(name, actions)| (name, input::encode(&actions)))
        .collect()
}
