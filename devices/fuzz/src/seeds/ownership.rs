//! Seeds of the target `ownership`: lives of partitions, with refusals, losses and failures.

use crate::input;
use crate::ownership::Action as A;

/// Names and bytes.
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let up = |gpu| {
        vec![
            A::BusMaster { gpu, on: true },
            A::Boot { gpu },
            A::Tick { tenths: 10 },
        ]
    };
    let command = |gpu, partition, command, token, new_token| A::Command {
        gpu,
        partition,
        command,
        token,
        new_token,
        stale: false,
    };
    let claim = |gpu, token| command(gpu, 0, 1, token, 0);
    let release = |gpu, token| command(gpu, 0, 2, token, 0);
    let fill = |gpu, target, token, value| A::Fill {
        gpu,
        target,
        partition: 0,
        token,
        value,
    };
    let script = |start: Vec<A>, rest: Vec<A>| [start, rest].concat();
    let all = vec![
        (
            "a_life",
            script(
                up(0),
                vec![
                    claim(0, 1),
                    fill(0, 0, 1, 0x11),
                    fill(0, 0, 2, 0x22),
                    claim(0, 2),
                    release(0, 2),
                    release(0, 1),
                    claim(0, 2),
                    fill(0, 0, 2, 0x22),
                ],
            ),
        ),
        (
            "transfer",
            script(
                up(0),
                vec![
                    claim(0, 3),
                    A::Scribble {
                        gpu: 0,
                        partition: 0,
                        value: 0x33,
                    },
                    command(0, 0, 3, 3, 0),
                    command(0, 0, 3, 3, 4),
                    release(0, 3),
                    fill(0, 0, 4, 0x44),
                    command(0, 0, 5, 4, 0),
                    A::Command {
                        gpu: 0,
                        partition: 0,
                        command: 2,
                        token: 4,
                        new_token: 0,
                        stale: true,
                    },
                    release(0, 4),
                ],
            ),
        ),
        (
            "refusals",
            vec![
                claim(0, 1),
                claim(0, 0),
                A::Boot { gpu: 0 },
                A::Tick { tenths: 9 },
                claim(0, 1),
                A::Tick { tenths: 1 },
                A::Map {
                    gpu: 0,
                    partition: 0,
                    how: 2,
                },
                claim(0, 1),
                A::Map {
                    gpu: 0,
                    partition: 0,
                    how: 0,
                },
                command(0, 0, 5, 1, 1),
                claim(0, 1),
                A::Detach { gpu: 0 },
                claim(0, 1),
            ],
        ),
        (
            "peers",
            script(
                [up(0), up(1)].concat(),
                vec![
                    claim(0, 1),
                    claim(1, 1),
                    fill(0, 1, 1, 0x55),
                    fill(1, 0, 1, 0x66),
                    A::Reset {
                        gpu: 1,
                        disconnect: false,
                    },
                    fill(0, 1, 1, 0x77),
                    A::BusMaster { gpu: 0, on: false },
                    fill(0, 0, 1, 0x12),
                ],
            ),
        ),
        (
            "lost_by_reset",
            script(
                up(0),
                vec![
                    claim(0, 1),
                    A::Scribble {
                        gpu: 0,
                        partition: 0,
                        value: 1,
                    },
                    A::Flr { gpu: 0 },
                    A::BusMaster { gpu: 0, on: true },
                    A::Boot { gpu: 0 },
                    A::Tick { tenths: 20 },
                    claim(0, 2),
                    A::Attach { gpu: 0 },
                ],
            ),
        ),
        (
            "held_scrub",
            script(
                up(0),
                vec![
                    claim(0, 1),
                    A::Hold { gpu: 0 },
                    release(0, 1),
                    claim(0, 1),
                    A::Reset {
                        gpu: 0,
                        disconnect: true,
                    },
                    claim(0, 2),
                    A::LetGo {
                        gpu: 0,
                        fail: false,
                    },
                    claim(0, 2),
                ],
            ),
        ),
        (
            "failed_scrub",
            script(
                up(0),
                vec![
                    claim(0, 1),
                    A::Hold { gpu: 0 },
                    A::Flr { gpu: 0 },
                    A::LetGo { gpu: 0, fail: true },
                    claim(0, 1),
                    release(0, 1),
                    A::Reset {
                        gpu: 0,
                        disconnect: false,
                    },
                    A::Boot { gpu: 0 },
                    A::Tick { tenths: 10 },
                    claim(0, 1),
                ],
            ),
        ),
    ];
    all.into_iter()
        .map(|(name, actions)| (name, input::encode(&actions)))
        .collect()
}
