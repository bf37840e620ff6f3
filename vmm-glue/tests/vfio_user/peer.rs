//! Every command that the `vfio_user` crate's client has, which is Cloud Hypervisor's.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::mpsc::channel;
use std::time::Duration;

use numagpu_devices::bus::{DmaAccess, InterruptSink, Mapped};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl};
use vfio_user::Client;
use vm_memory::Bytes as _;

use crate::device::{BAR0, VECTORS, serve};
use crate::raw::{Raw, SET_IRQS, irqs_body, memfd};

#[test]
fn regions_and_interrupts_are_as_the_layout_says() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    for index in 0..9 {
        let region = client.region(index).unwrap();
        let size = match index {
            0 => BAR0,
            7 => 4096,
            _ => 0,
        };
        assert_eq!((region.index, region.size), (index, size));
        assert_eq!(region.flags, if size == 0 { 0 } else { 3 });
        assert!(region.file_offset.is_none());
    }
    assert!(client.region(9).is_none());
    for index in 0..3 {
        let info = client.get_irq_info(index).unwrap();
        let count = if index == 2 { VECTORS.into() } else { 0 };
        assert_eq!((info.index, info.count), (index, count));
    }
    // The crate's flag has the opposite sense of its name.
    assert!(!client.resettable());
    client.reset().unwrap();
    assert_eq!(served.probe.state().events, ["attach", "reset"]);
}

#[test]
fn what_is_written_is_read_back_at_any_length() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    for len in [1, 2, 3, 4, 8, 13, 4096, 200_000, 1 << 20] {
        let data: Vec<u8> = (0..=250).cycle().take(len).collect();
        client.region_write(0, 17, &data).unwrap();
        let mut seen = vec![0xee; len];
        client.region_read(0, 17, &mut seen).unwrap();
        assert!(seen == data, "{len} bytes");
    }
    client.region_write(7, 0x40, &[1, 2, 3, 4]).unwrap();
    let mut seen = [0; 4096];
    client.region_read(7, 0, &mut seen).unwrap();
    assert_eq!(seen[0x40..0x44], [1, 2, 3, 4]);
}

#[test]
fn memory_is_reached_until_it_is_unmapped() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    let ram = memfd(0x4000);
    client
        .dma_map(0x1000, 0x10_0000, 0x2000, ram.as_raw_fd())
        .unwrap();
    let dma = served.probe.attachment().dma;
    let mapped = dma.mapped(0x10_0800, 8);
    assert!(
        matches!(
            mapped,
            Mapped::File {
                offset: 0x1800,
                writable: true,
                ..
            }
        ),
        "{mapped:?}"
    );
    dma.access(0x10_0010, 4, DmaAccess::Write, &mut |slice| {
        slice.write_slice(b"numa", 0).unwrap();
    })
    .unwrap();
    let mut seen = [0; 4];
    assert_eq!(rustix::io::pread(&ram, &mut seen, 0x1010), Ok(4));
    assert_eq!(&seen, b"numa");
    client.dma_unmap(0x10_0000, 0x2000).unwrap();
    let gone = dma.access(0x10_0010, 4, DmaAccess::Read, &mut |_| panic!("called"));
    assert!(gone.is_err());
    assert_eq!(served.probe.state().events, ["attach", "dma", "dma"]);
}

#[test]
fn interrupts_reach_the_client() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    let events: Vec<_> = (0..16)
        .map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap())
        .collect();
    let numbers: Vec<_> = events.iter().map(|event| event.as_raw_fd()).collect();
    client.set_irqs(2, 0x24, 3, 16, &numbers).unwrap();
    let irq = served.probe.attachment().irq;
    assert!(!irq.trigger(2));
    assert!(irq.trigger(5));
    assert!(irq.trigger(5));
    for (n, event) in events.iter().enumerate() {
        let mut count = [0; 8];
        let read = rustix::io::read(event, &mut count);
        assert_eq!(read.is_ok(), n == 2);
        assert_eq!(u64::from_ne_bytes(count), if n == 2 { 2 } else { 0 });
    }
    client.set_irqs(2, 0x24, 5, 1, &[]).unwrap();
    assert!(!irq.trigger(5));
    assert!(irq.trigger(6));
    client.set_irqs(2, 0x21, 7, 1, &[]).unwrap();
    assert_eq!(rustix::io::read(&events[4], &mut [0; 8]), Ok(8));
    client.set_irqs(2, 0x21, 0, 0, &[]).unwrap();
    assert!((0..VECTORS).all(|vector| !irq.trigger(vector)));
}

/// "A count (and start) of 0, with data flags of VFIO_IRQ_SET_DATA_NONE disables all interrupts of the index"
/// (`VFIO_USER_DEVICE_SET_IRQS`), and of no other one.
#[test]
fn an_index_that_is_disabled_leaves_the_vectors_of_others() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    client
        .set_irqs(2, 0x24, 3, 1, &[event.as_raw_fd()])
        .unwrap();
    let irq = served.probe.attachment().irq;
    for index in [0, 1] {
        client.set_irqs(index, 0x21, 0, 0, &[]).unwrap();
        assert!(irq.trigger(3), "{index}");
    }
    client.set_irqs(2, 0x21, 0, 0, &[]).unwrap();
    assert!(!irq.trigger(3));
}

const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;

/// `VFIO_IRQ_SET_ACTION_MASK` and `VFIO_IRQ_SET_ACTION_UNMASK` with each kind of data (`VFIO_USER_DEVICE_SET_IRQS`).
#[test]
fn a_masked_vector_keeps_one_interrupt_back_until_it_is_unmasked() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    assert_eq!(
        client.get_irq_info(2).unwrap().flags,
        3,
        "EVENTFD, MASKABLE"
    );
    let events: Vec<_> = (0..4)
        .map(|_| eventfd(0, EventfdFlags::NONBLOCK).unwrap())
        .collect();
    let [one, two, masked, unmasked] = [0, 1, 2, 3].map(|n: usize| events[n].as_raw_fd());
    let counts = || {
        [0, 1, 2, 3].map(|n: usize| {
            let mut count = [0; 8];
            let _ = rustix::io::read(&events[n], &mut count);
            u64::from_ne_bytes(count)
        })
    };
    let mut set = |flags, count, fds: &[i32]| client.set_irqs(2, flags, 3, count, fds).unwrap();
    set(TRIGGER | 4, 2, &[one, two]);
    set(MASK | 4, 2, &[masked, masked]);
    set(UNMASK | 4, 2, &[unmasked, unmasked]);
    let irq = served.probe.attachment().irq;
    set(MASK | 1, 1, &[]);
    set(MASK | 1, 1, &[]);
    assert!(irq.trigger(3) && irq.trigger(3) && irq.trigger(4));
    set(TRIGGER | 1, 1, &[]);
    assert_eq!(counts(), [0, 1, 1, 0]);
    set(UNMASK | 1, 2, &[]);
    assert_eq!(counts(), [1, 0, 0, 1]);
    set(UNMASK | 1, 2, &[]);
    assert!(irq.trigger(3));
    assert_eq!(counts(), [1, 0, 0, 0]);
    // Without descriptors nobody is told, and a vector that nobody listens to keeps nothing back.
    set(MASK | 4, 2, &[]);
    set(TRIGGER | 4, 1, &[]);
    set(MASK | 1, 2, &[]);
    assert!(!irq.trigger(3) && irq.trigger(4));
    set(TRIGGER | 4, 1, &[one]);
    set(UNMASK | 1, 2, &[]);
    assert_eq!(counts(), [0, 1, 0, 2]);
    // Who disables the interrupts begins anew.
    set(MASK | 1, 2, &[]);
    assert!(irq.trigger(3));
    client.set_irqs(2, TRIGGER | 1, 0, 0, &[]).unwrap();
    client.set_irqs(2, UNMASK | 1, 3, 2, &[]).unwrap();
    client.set_irqs(2, TRIGGER | 4, 3, 1, &[one]).unwrap();
    assert!(irq.trigger(3));
    assert_eq!(counts(), [1, 0, 0, 0]);
}

#[test]
fn vectors_are_masked_one_by_one() {
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let ask = |raw: &mut Raw, flags, data: &[u8], fds: &[_]| {
        let mut body = irqs_body(flags, 2, 0, 4);
        body.extend(data);
        body[0] += u8::try_from(data.len()).unwrap();
        assert_eq!(raw.errno(SET_IRQS, &body, fds), 0);
    };
    ask(&mut raw, 0x24, &[], &[event.as_fd(); 4]);
    ask(&mut raw, 0x0a, &[0, 1, 0, 255], &[]);
    let irq = served.probe.attachment().irq;
    let heard = |irq: &dyn InterruptSink| {
        (0..4)
            .filter(|vector| {
                assert!(irq.trigger(*vector));
                rustix::io::read(&event, &mut [0; 8]).is_ok()
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(heard(&*irq), [0, 2]);
    ask(&mut raw, 0x12, &[1, 0, 1, 1], &[]);
    assert_eq!(rustix::io::read(&event, &mut [0; 8]), Ok(8), "vector 3's");
    assert_eq!(heard(&*irq), [0, 2, 3]);
}

/// "The server may trigger the IRQ by writing 1 to the eventfd" (`VFIO_USER_DEVICE_SET_IRQS`): a client may wait for that
/// in a read, so its descriptor's mode stays, and nobody waits for a client whose counter is full.
#[test]
fn a_descriptor_that_blocks_stays_so_and_stops_nobody_when_it_is_full() {
    let served = serve();
    let mut client = Client::new(&served.path()).unwrap();
    let event = eventfd(0, EventfdFlags::empty()).unwrap();
    let count = || {
        let mut count = [0; 8];
        rustix::io::read(&event, &mut count).unwrap();
        u64::from_ne_bytes(count)
    };
    client
        .set_irqs(2, 0x24, 3, 1, &[event.as_raw_fd()])
        .unwrap();
    let flags = fcntl_getfl(&event).unwrap();
    assert!(!flags.contains(OFlags::NONBLOCK));
    let irq = served.probe.attachment().irq;
    let full = u64::MAX - 1;
    rustix::io::write(&event, &full.to_ne_bytes()).unwrap();
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        scope.spawn(move || done.send(irq.trigger(3)));
        let heard = is_done.recv_timeout(Duration::from_secs(5));
        // Which also frees one that waits.
        assert_eq!(count(), full);
        assert_eq!(heard, Ok(true));
    });
    std::thread::scope(|scope| {
        let waiting = scope.spawn(count);
        client.set_irqs(2, 0x21, 3, 1, &[]).unwrap();
        assert_eq!(waiting.join().unwrap(), 1);
    });
}
