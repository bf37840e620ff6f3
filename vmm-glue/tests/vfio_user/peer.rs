//! Every command that the `vfio_user` crate's client has, which is Cloud Hypervisor's.

use std::os::fd::AsRawFd as _;
use std::sync::mpsc::channel;
use std::time::Duration;

use numagpu_devices::bus::{DmaAccess, Mapped};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl};
use vfio_user::Client;
use vm_memory::Bytes as _;

use crate::device::{BAR0, VECTORS, serve};
use crate::raw::memfd;

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
