//! Writes that come as events (specification, `VFIO_USER_DEVICE_GET_REGION_IO_FDS`).

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use numagpu_devices::spec::regs::{BootState, QUEUE_ENABLE, boot, queue};
use numagpu_devices::spec::table::Reg;
use numagpu_devices::spec::{pci, sdma};
use numagpu_devices::{Fabric, Gpu, GpuConfig};
use numagpu_vmm_glue::vfio_user::Server;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{pread, pwrite, write};

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

/// Guest RAM: the ring, the write pointer, and where a fence goes.
const RAM: u64 = 0x10_0000;
const POINTER: u64 = 0x1000;
const FENCE: u64 = 0x2000;

#[test]
fn a_gpus_kicks_are_events_and_work_without_a_message() {
    let config = GpuConfig {
        boot_delay: Duration::ZERO,
        ..GpuConfig::new(0, Vec::new())
    };
    let gpu = Gpu::new(config, Fabric::new()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let server = Server::bind(dir.path().join("gpu0"), gpu).unwrap();
    for _client in 0..2 {
        let mut raw = Raw::ready(server.path());
        let ram = memfd(0x1_0000);
        let map = map_body(3, 0, RAM, 0x1_0000);
        assert_eq!(raw.errno(DMA_MAP, &map, &[ram.as_fd()]), 0);
        let doorbells = u32::from(pci::BAR_DOORBELLS);
        let ask = words(&[16 + 2 * 40, 0, doorbells, 0]);
        let (answer, events) = raw.ask_for_fds(IO_FDS, &ask);
        // Any size, any value: one event for each queue.
        let kick = |place: u32| {
            let offset = 0x800 + 8 * u64::from(place);
            [longs(&[offset, 0]), words(&[place, 0, 0, 0]), longs(&[0])].concat()
        };
        let head = words(&[16 + 2 * 40, 0, doorbells, 2]);
        assert_eq!(answer.body, [head, kick(0), kick(1)].concat());
        assert_eq!(events.len(), 2);

        let mut send = |region, offset, data: &[u8]| {
            let count = u32::try_from(data.len()).unwrap();
            let body = region_body(offset, region, count, data);
            assert_eq!(raw.errno(WRITE, &body, &[]), 0);
        };
        let mut set = |base: u32, reg: &Reg, value: u64| {
            let data = value.to_le_bytes();
            let data = data.get(..reg.width.bytes() as usize).unwrap();
            send(pci::BAR_REGISTERS.into(), (base + reg.offset).into(), data);
        };
        set(boot::BASE, &boot::CONTROL, 1);
        set(queue::BASE, &queue::RING_BASE, RAM);
        set(queue::BASE, &queue::RING_SIZE, 4096);
        set(queue::BASE, &queue::WPTR_POLL, RAM + POINTER);
        send(7, 4, &[6, 0]);
        let status = region_body((boot::BASE + boot::STATUS.offset).into(), 0, 4, &[]);
        let status = raw.ask(READ, &status, &[]).body;
        assert_eq!(
            status.get(16),
            Some(&u8::try_from(BootState::Ready.code()).unwrap())
        );
        let control = (queue::BASE + queue::CONTROL.offset).into();
        let enable = region_body(control, 0, 4, &QUEUE_ENABLE.to_le_bytes());
        assert_eq!(raw.errno(WRITE, &enable, &[]), 0);

        for round in 1..=3_u32 {
            let packet = words(&sdma::fence(RAM + FENCE, round));
            let at = u64::from(round - 1) * packet.len() as u64;
            pwrite(&ram, &packet, at).unwrap();
            let end = at + packet.len() as u64;
            pwrite(&ram, &end.to_le_bytes(), POINTER).unwrap();
            write(&events[0], &1_u64.to_ne_bytes()).unwrap();
            let since = Instant::now();
            let mut word = [0; 4];
            while u32::from_le_bytes(word) != round {
                assert!(since.elapsed() < Duration::from_secs(10), "round {round}");
                pread(&ram, &mut word, FENCE).unwrap();
            }
        }
    }
}
