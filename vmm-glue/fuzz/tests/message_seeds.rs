//! The seeds: committed as the code has them, passing, and each reaching what its name says.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::path::Path;

use numagpu_vmm_glue_fuzz::{TARGETS, Tally, seeds, session, wire};

fn seed(name: &str) -> Vec<u8> {
    let mut all = seeds::seeds().into_iter();
    all.find(|(own, _)| *own == name).unwrap().1
}

#[test]
fn the_corpus_is_what_the_code_says() {
    for target in &TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        let why =
            "write the corpus anew: cargo run -p numagpu-vmm-glue-fuzz --example message_seeds";
        let files = std::fs::read_dir(&dir).expect(why);
        let files: BTreeSet<String> = files
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        let names = seeds::seeds().into_iter().map(|(name, _)| name.to_owned());
        assert_eq!(files, names.collect(), "{why}");
        for (name, bytes) in seeds::seeds() {
            let file = std::fs::read(dir.join(name)).unwrap();
            assert!(file == bytes, "{}/{name}: {why}", target.name);
        }
    }
}

#[test]
fn seeds_are_decoded_or_refused() {
    let tally = wire::run(&seed("questions"));
    assert_eq!((tally.messages, tally.good), (20, 20));
    assert!(wire::run(&seed("refusals")).refused >= 3);
}

/// Twice in a row on the same GPU: an input leaves nothing behind for the next.
#[test]
fn sessions_answer_each_command_once() {
    let run = |name| session::run(&seed(name));
    for _ in 0..2 {
        let tally = run("questions");
        assert_eq!((tally.messages, tally.good, tally.refused), (20, 17, 3));
        let tally = run("maps");
        assert_eq!((tally.good, tally.refused), (6, 3));
        assert_eq!(run("interrupts").refused, 0);
        assert_eq!(run("work").refused, 0);
        assert_eq!(run("many_writes").refused, 0);
        // The client does not wait for long; on a busy host the GPU may be later.
        assert!((0..50).any(|_| run("memory_that_is_asked_for").asked > 0));
        let (mut asked, mut refused) = (false, false);
        for _ in 0..50 {
            let tally = run("a_second_socket");
            asked |= tally.asked > 0;
            refused |= tally.refused == 1;
        }
        assert!(asked && refused);
        assert_eq!(run("refusals").good, 1);
        let tally = run("a_size_that_cannot_be");
        assert_eq!((tally.messages, tally.good, tally.refused), (1, 1, 1));
        let tally = run("a_size_that_cannot_be_of_no_kind");
        assert_eq!((tally.messages, tally.good, tally.refused), (1, 1, 1));
        let tally = run("cut");
        assert_eq!((tally.messages, tally.good), (2, 2));
        run("migration");
    }
    assert_eq!(session::run(&[]), Tally::default());
}
