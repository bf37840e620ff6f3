//! Memory that came without a descriptor, which the server asks its client for.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use numagpu_devices::bus::{DmaAccess, DmaPort};
use numagpu_vmm_glue::vfio_user::Polling;

use crate::line::{Served, message};
use crate::place::Place;
use crate::{nanos, quantile, ratio};

/// Bytes of an access.
const DATA: usize = 64;
/// Bytes of a `DMA_READ`, and of its reply.
const ASKED: usize = 32;
const ANSWER: usize = ASKED + DATA;

/// Answers each `DMA_READ` with zeros, until nobody asks any more.
fn answer(mut stream: UnixStream) {
    let mut answer = [0; ANSWER];
    while stream.read_exact(&mut answer[..ASKED]).is_ok() {
        // A reply of its size; what it repeats is where it was.
        answer[4..8].copy_from_slice(&u32::try_from(ANSWER).unwrap().to_ne_bytes());
        answer[8] = 1;
        if stream.write_all(&answer).is_err() {
            break;
        }
    }
}

/// A client that answers in a thread of its own, and the way of the device to its memory.
struct Asked {
    memory: Arc<dyn DmaPort>,
    _served: Served,
    _main: Option<UnixStream>,
}

impl Asked {
    fn new(twin: bool) -> Asked {
        let (served, function) = Served::with_function(Polling::Off);
        let (mut main, second) = match twin {
            true => {
                let (main, second) = served.connect_twice();
                (main, Some(second))
            }
            false => (served.connect(), None),
        };
        let head = [32_u32, 3].map(u32::to_ne_bytes).concat();
        let place = [0, 0, 0x1000_u64].map(u64::to_ne_bytes).concat();
        main.write_all(&message(2, 0, &[&head, &place])).unwrap();
        main.read_exact(&mut [0; 16]).unwrap();
        let (asked, kept) = match second {
            Some(second) => (second, Some(main)),
            None => (main, None),
        };
        std::thread::spawn(move || answer(asked));
        Asked {
            memory: function.memory(),
            _served: served,
            _main: kept,
        }
    }

    fn access(&self) {
        let done = self
            .memory
            .access(0x40, DATA as u64, DmaAccess::Read, &mut |_| {});
        done.unwrap();
    }
}

/// Reads of the client's memory over its one socket and over a second one, and the floor, a bare socket over which as
/// many bytes go.
pub fn compare(place: Place) {
    let (mut bare, asked) = place.serve(|| {
        let (bare, other) = UnixStream::pair().unwrap();
        std::thread::spawn(move || answer(other));
        (bare, [Asked::new(false), Asked::new(true)])
    });
    let mut times = [const { Vec::new() }; 3];
    for _ in 0..20 {
        let [floor, own @ ..] = &mut times;
        floor.extend((0..200).map(|_| {
            nanos(|| {
                bare.write_all(&[0; ASKED]).unwrap();
                bare.read_exact(&mut [0; ANSWER]).unwrap();
            })
        }));
        for (times, asked) in own.iter_mut().zip(&asked) {
            times.extend((0..200).map(|_| nanos(|| asked.access())));
        }
    }
    let [floor, one, two] = times.map(|mut times| quantile(&mut times, 500));
    for (own, over) in [(one, "the one socket"), (two, "a second socket")] {
        println!(
            "{}, DMA_READ of {DATA} bytes p50, over {over}: {own} ns, floor {floor} ns, {}",
            place.name,
            ratio(own, floor)
        );
    }
}
