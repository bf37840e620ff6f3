//! Writes that come as events (specification, `VFIO_USER_DEVICE_GET_REGION_IO_FDS`).

use rustix::event::{EventfdFlags, eventfd};

use crate::device::{Served, serve_with};
use crate::raw::*;

const EINVAL: u32 = 22;

/// So many parts of 8 bytes; every third shares the event of the one before, and has a value.
fn serve(parts: u64) -> Served {
    serve_with(|probe| {
        for part in 0..parts {
            if part % 3 != 2 {
                let event = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC);
                probe.events.push(event.unwrap());
            }
            let value = (part % 3 == 2).then_some(part);
            probe.io.push((part * 8, 8, value, probe.events.len() - 1));
        }
    })
}

#[test]
fn parts_are_named_with_their_descriptors() {
    let served = serve(3);
    let mut raw = Raw::ready(&served.path());
    let (answer, fds) = raw.ask_for_fds(IO_FDS, &words(&[16 + 3 * 40, 0, 0, 0]));
    let entry = |offset, place, flags, value| {
        [
            longs(&[offset, 8]),
            words(&[place, 0, flags, 0]),
            longs(&[value]),
        ]
        .concat()
    };
    let want = [
        words(&[16 + 3 * 40, 0, 0, 3]),
        entry(0, 0, 0, 0),
        entry(8, 1, 0, 0),
        entry(16, 1, 1, 2),
    ];
    assert_eq!(answer.body, want.concat());
    assert_eq!(fds.len(), 2);
    // They are the device's own.
    rustix::io::write(&fds[1], &5_u64.to_ne_bytes()).unwrap();
    let mut count = [0; 8];
    rustix::io::read(&served.probe.events[1], &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 5);
}

/// "In that case, the full payload is not included in the reply, but the argsz field in the reply indicates the needed
/// size" ("Message sizes").
#[test]
fn too_little_room_is_answered_with_how_much_it_takes() {
    let served = serve(3);
    let mut raw = Raw::ready(&served.path());
    for room in [16, 56, 135] {
        let (answer, fds) = raw.ask_for_fds(IO_FDS, &words(&[room, 0, 0, 0]));
        assert_eq!(answer.body, words(&[136, 0, 0, 0]));
        assert!(fds.is_empty());
    }
    assert_eq!(raw.errno(IO_FDS, &words(&[15, 0, 0, 0]), &[]), EINVAL);
}

/// `max_msg_fds` ("Version"): 1 if the client does not say.
#[test]
fn no_more_descriptors_go_out_than_the_client_takes() {
    for (proposal, most) in [
        ("{}\0", 1),
        ("{\"capabilities\":{\"max_msg_fds\":3}}\0", 3),
        ("{\"capabilities\":{\"max_msg_fds\":8}}\0", 8),
    ] {
        let served = serve(30);
        let mut raw = Raw::proposing(&served.path(), proposal);
        let (answer, fds) = raw.ask_for_fds(IO_FDS, &words(&[4000, 0, 0, 0]));
        assert_eq!(fds.len(), most);
        let count = u32::from_ne_bytes(answer.body[12..16].try_into().unwrap());
        assert_eq!(answer.body.len(), 16 + 40 * count as usize);
        // Parts whose descriptor does not fit are left to messages.
        for entry in answer.body[16..].chunks(40) {
            let place = u32::from_ne_bytes(entry[16..20].try_into().unwrap());
            assert!((place as usize) < most);
        }
    }
}

/// "All other fields must be zero"; a region that is not there has none.
#[test]
fn what_is_not_asked_for_rightly_is_refused() {
    let served = serve(1);
    let mut raw = Raw::ready(&served.path());
    for body in [
        [200, 1, 0, 0],
        [200, 0, 0, 1],
        [200, 0, 1, 0],
        [200, 0, 8, 0],
        [200, 0, 9, 0],
        [200, 0, u32::MAX, 0],
    ] {
        assert_eq!(raw.errno(IO_FDS, &words(&body), &[]), EINVAL, "{body:?}");
    }
    let config = raw.ask(IO_FDS, &words(&[200, 0, 7, 0]), &[]);
    assert_eq!(config.body, words(&[16, 0, 7, 0]));
}
