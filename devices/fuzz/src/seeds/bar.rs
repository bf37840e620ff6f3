//! Seeds of the target `bar`: work, faults, the aperture, odd offsets.

use crate::bar::Action as A;
use crate::input::{self, Near};

/// Names and bytes.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let at = |spot, by| Near { spot, by };
    let claim = |gpu| A::Command {
        gpu,
        partition: 0,
        command: 1,
        token: 7,
        new_token: 0,
    };
    let work = |gpu, end: Vec<A>| {
        let mut actions = vec![
            A::Boot { gpu },
            claim(gpu),
            A::Enable {
                gpu,
                queue: 0,
                token: 7,
            },
            A::Submit {
                gpu,
                queue: 0,
                partition: 0,
                value: 0x5a,
            },
            // Time for the worker.
            A::Read {
                gpu,
                bar: 0,
                at: at(11, 0x20),
                len: 48,
            },
        ];
        actions.extend(end);
        actions
    };
    let foreign = A::Submit {
        gpu: 0,
        queue: 0,
        partition: 1,
        value: 1,
    };
    let aperture = vec![
        A::Write {
            gpu: 1,
            bar: 4,
            at: at(0, 0),
            value: 0x1122_3344_5566_7788,
            len: 64,
        },
        A::Write {
            gpu: 1,
            bar: 4,
            at: at(14, 0xffc),
            value: 1,
            len: 8,
        },
        A::Read {
            gpu: 1,
            bar: 4,
            at: at(15, -8),
            len: 16,
        },
        A::Read {
            gpu: 1,
            bar: 4,
            at: at(19, -1),
            len: 16,
        },
    ];
    let registers = (0..8).flat_map(|block| {
        (0..12).map(move |register| A::Register {
            gpu: 0,
            block,
            instance: 1,
            register,
            value: u64::MAX,
        })
    });
    let all = vec![
        ("boot_claim_fill", work(0, vec![])),
        (
            "aperture_work",
            work(1, vec![A::Detach { gpu: 1 }, A::Attach { gpu: 1 }]),
        ),
        (
            "fault",
            work(
                0,
                vec![
                    foreign,
                    A::Doorbell {
                        gpu: 0,
                        queue: 0,
                        value: 3,
                    },
                ],
            ),
        ),
        (
            "release",
            work(
                0,
                vec![
                    A::Command {
                        gpu: 0,
                        partition: 0,
                        command: 3,
                        token: 7,
                        new_token: 8,
                    },
                    A::Command {
                        gpu: 0,
                        partition: 0,
                        command: 2,
                        token: 7,
                        new_token: 0,
                    },
                    A::Command {
                        gpu: 0,
                        partition: 0,
                        command: 2,
                        token: 8,
                        new_token: 0,
                    },
                ],
            ),
        ),
        (
            "reset_at_work",
            work(
                0,
                vec![
                    foreign,
                    A::Reset {
                        gpu: 0,
                        disconnect: false,
                    },
                    A::Boot { gpu: 0 },
                    claim(0),
                ],
            ),
        ),
        (
            "map",
            vec![
                A::Boot { gpu: 0 },
                A::Map {
                    gpu: 0,
                    partition: 0,
                    how: 1,
                },
                claim(0),
                A::Map {
                    gpu: 0,
                    partition: 0,
                    how: 0,
                },
                claim(0),
                A::Tick { us: 9 },
                A::Link { up: false },
                A::BusMaster { gpu: 0, on: false },
            ],
        ),
        ("aperture_access", aperture),
        ("all_registers", registers.collect()),
        (
            "odd_offsets",
            vec![
                A::Write {
                    gpu: 0,
                    bar: 1,
                    at: at(0, 3),
                    value: u64::MAX,
                    len: 33,
                },
                A::Read {
                    gpu: 0,
                    bar: 1,
                    at: at(0, 1),
                    len: 64,
                },
                A::ReadFar {
                    gpu: 0,
                    bar: 1,
                    offset: u64::MAX - 3,
                    len: 16,
                },
                A::WriteFar {
                    gpu: 1,
                    bar: 4,
                    offset: u64::MAX - 3,
                    value: 0,
                    len: 16,
                },
                A::Read {
                    gpu: 0,
                    bar: 0,
                    at: at(8, 0x1e),
                    len: 40,
                },
                A::Read {
                    gpu: 0,
                    bar: 3,
                    at: at(0, 0),
                    len: 40,
                },
            ],
        ),
    ];
    all.into_iter()
        .map(|(name, actions)| (name, input::encode(&actions)))
        .collect()
}
