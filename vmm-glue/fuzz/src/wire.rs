//! Decoding by itself: what is accepted is as long as it says.

use numagpu_vmm_glue::vfio_user::version::negotiate;
use numagpu_vmm_glue::vfio_user::wire::{HEADER_SIZE, Kind, Request, decode};
use numagpu_vmm_glue::vfio_user::{Limits, MAX_TRANSFER};

use crate::Tally;
use crate::messages::{Piece, pieces};

/// Decodes each message of a stream.
pub fn run(stream: &[u8]) -> Tally {
    let mut tally = Tally::default();
    for piece in pieces(stream) {
        let Piece::Message(header, message) = piece else {
            break;
        };
        tally.messages += 1;
        if header.kind() == Kind::Reply {
            continue;
        }
        let body = message.get(HEADER_SIZE..).expect("a message has a header");
        match decode(&header, body) {
            Ok(request) => {
                tally.good += 1;
                check(&request, body);
            }
            Err(refusal) => {
                tally.refused += 1;
                assert_ne!(refusal.errno().raw_os_error(), 0, "{refusal}");
                assert!(!refusal.to_string().is_empty());
            }
        }
    }
    tally
}

fn check(request: &Request<'_>, body: &[u8]) {
    match request {
        Request::Version { major, minor, data } => {
            let mut twin = false;
            let open_twin = || {
                twin = true;
                true
            };
            if let Ok(agreed) = negotiate(*major, *minor, data, &Limits::default(), open_twin) {
                // QEMU refuses a reply that is longer than its request, and does not ask for a second socket.
                let more = if twin { ",\"fd_index\":0".len() } else { 0 };
                assert!(agreed.data.len() <= data.len() + more || data.is_empty());
                assert_eq!(agreed.data.contains("fd_index"), twin);
                assert_eq!(*major, 0);
            }
        }
        Request::RegionRead(access) => assert!(access.count as usize <= MAX_TRANSFER),
        Request::RegionWrite(access, data) => assert_eq!(access.count as usize, data.len()),
        Request::RegionWriteMulti(writes) => {
            assert!(writes.count() <= body.len() as u64 / 24);
            for (access, data) in writes.iter().flatten() {
                assert_eq!(access.count as usize, data.len());
            }
        }
        _ => {}
    }
}
