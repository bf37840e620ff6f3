//! Seeds of the target `packets`: every opcode, and every fault that a packet can make.

use crate::input::{self, Near};
use crate::packets::Action as A;

/// Names and bytes.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    // Indices of spots in `Play::new`.
    const RAM_START: u8 = 1;
    const RAM_END: u8 = 2;
    const OWN: u8 = 5;
    const PEER: u8 = 9;
    const PEER_FOREIGN: u8 = 10;
    let near = |spot| Near { spot, by: 0 };
    let by = |spot, by| Near { spot, by };
    let copy = |queue, from, to, bytes| A::Copy {
        queue,
        from,
        to,
        bytes,
    };
    let ring = |queue| [A::Ring { queue }, A::Settle { queue }];
    let poll = |queue, reference, retries| A::Poll {
        queue,
        at: near(RAM_START),
        function: 3,
        reference,
        mask: u32::MAX,
        retries,
        interval: 1,
    };
    let with = |mut actions: Vec<A>, queue: u8| {
        actions.extend(ring(queue));
        actions
    };
    let atomics = (0..13).flat_map(|op| {
        (0..2).map(move |flags| A::Atomic {
            queue: 1,
            at: by(OWN, 8 * i16::from(op)),
            op,
            flags,
            operand: 5,
            comparand: 0,
        })
    });
    let all = vec![
        (
            "copies",
            with(
                vec![
                    A::Fill {
                        queue: 0,
                        to: near(RAM_START),
                        value: 0x0102_0304,
                        bytes: 8192,
                        by_bytes: false,
                    },
                    copy(0, near(RAM_START), near(OWN), 8191),
                    copy(0, near(OWN), near(PEER), 65536),
                    copy(0, near(PEER), by(PEER, 3), 4096),
                    copy(0, by(RAM_START, 4096), near(RAM_START), 600_000),
                    A::Fence {
                        queue: 0,
                        at: by(RAM_END, -4),
                        value: 9,
                    },
                    A::Trap { queue: 0 },
                ],
                0,
            ),
        ),
        (
            "foreign",
            with(vec![copy(2, near(PEER), near(PEER_FOREIGN), 64)], 2),
        ),
        (
            "across_the_border",
            with(
                vec![copy(2, near(RAM_START), by(PEER_FOREIGN, -64), 4096)],
                2,
            ),
        ),
        (
            "free",
            with(
                vec![A::Fill {
                    queue: 0,
                    to: by(OWN + 1, -8),
                    value: 1,
                    bytes: 16,
                    by_bytes: true,
                }],
                0,
            ),
        ),
        (
            "end_of_ram",
            with(vec![copy(0, by(RAM_END, -64), near(RAM_START), 65)], 0),
        ),
        (
            "end_of_addresses",
            with(vec![copy(0, near(13), near(15), 4096)], 0),
        ),
        (
            "link_down",
            with(
                vec![A::Link { up: false }, copy(0, near(OWN), near(PEER), 64)],
                0,
            ),
        ),
        (
            "bus_master_off",
            with(
                vec![
                    A::BusMaster { gpu: 0, on: false },
                    A::Nop { queue: 0, skip: 3 },
                ],
                0,
            ),
        ),
        ("atomics", with(atomics.collect(), 1)),
        (
            "looping_atomic",
            with(
                vec![A::Atomic {
                    queue: 0,
                    at: near(OWN),
                    op: 1,
                    flags: 0x12,
                    operand: 1,
                    comparand: 7,
                }],
                0,
            ),
        ),
        ("poll_without_end", with(vec![poll(0, 1, 0xfff)], 0)),
        ("poll_timeout", with(vec![poll(3, 1, 2)], 3)),
        (
            "poll_and_fence",
            [
                with(vec![poll(0, 7, 0xfff)], 0),
                with(
                    vec![A::Fence {
                        queue: 3,
                        at: near(RAM_START),
                        value: 7,
                    }],
                    3,
                ),
                vec![A::Settle { queue: 0 }],
            ]
            .concat(),
        ),
        (
            "times",
            with(
                (0..3)
                    .map(|sub| A::Timestamp {
                        queue: 1,
                        sub,
                        at: near(OWN),
                        ns: 77,
                    })
                    .collect(),
                1,
            ),
        ),
        (
            "write_and_wrap",
            (0..20)
                .flat_map(|n| {
                    with(
                        vec![A::Write {
                            queue: 1,
                            to: by(OWN, 4 * n),
                            words: 63,
                            value: 1,
                        }],
                        1,
                    )
                })
                .collect(),
        ),
        (
            "release_at_work",
            [
                vec![
                    copy(0, near(OWN), near(PEER), 65536),
                    A::Ring { queue: 0 },
                    A::Own {
                        gpu: 1,
                        claim: false,
                    },
                ],
                vec![
                    A::Own {
                        gpu: 1,
                        claim: true,
                    },
                    A::Restart {
                        queue: 0,
                        writeback: near(PEER),
                    },
                ],
                with(vec![copy(0, near(OWN), near(PEER), 65536)], 0),
                vec![
                    A::Reset { gpu: 0 },
                    A::Own {
                        gpu: 0,
                        claim: true,
                    },
                    A::Disable { queue: 1 },
                ],
            ]
            .concat(),
        ),
        (
            "unmapped",
            with(
                vec![
                    A::Map {
                        gpu: 0,
                        partition: 0,
                        how: 1,
                    },
                    copy(0, near(OWN), near(RAM_START), 64),
                ],
                0,
            ),
        ),
        (
            "bad_doorbell",
            vec![
                A::Nop { queue: 0, skip: 1 },
                A::Doorbell { queue: 0, wptr: 3 },
                A::Settle { queue: 0 },
            ],
        ),
        (
            "ring_in_hbm",
            vec![
                A::Elsewhere {
                    queue: 0,
                    ring: near(OWN),
                },
                A::Doorbell { queue: 0, wptr: 64 },
                A::Settle { queue: 0 },
            ],
        ),
        (
            "raw",
            with(
                vec![A::Raw {
                    queue: 0,
                    header: 0x8000_000b,
                    a: 0x10_0000,
                    b: 0,
                    c: 1,
                    d: 3,
                    e: 0,
                    f: 0,
                    words: 4,
                }],
                0,
            ),
        ),
    ];
    all.into_iter()
        .map(|(name, actions)| (name, input::encode(&actions)))
        .collect()
}
