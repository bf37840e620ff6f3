//! Where the fuzzer begins: what clients really send.

use numagpu_devices::spec::{pci, regs, sdma};
use numagpu_vmm_glue::vfio_user::wire::{command, flag};

use crate::session::{HBM, SIZE};

/// Where guest RAM is.
const RAM: u64 = 0x10_0000;
const TOKEN: u64 = 0x7_0c3a;

/// A stream that grows.
#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    id: u16,
}

impl Stream {
    /// After a version was agreed on, as QEMU asks for it.
    fn new() -> Stream {
        let mut stream = Stream::default();
        let json: &[u8] = b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":1048576,\"write_multiple\":true,\"migration\":{\"pgsize\":4096}}}\0";
        stream.send(command::VERSION, [&[0; 4], json].concat());
        stream
    }

    /// The same with a second socket, which is waited for.
    fn with_twin() -> Stream {
        let mut stream = Stream::default();
        let json: &[u8] =
            b"{\"capabilities\":{\"max_msg_fds\":8,\"twin_socket\":{\"supported\":true}}}\0";
        let body = [&[0; 4], json].concat();
        stream.message(command::VERSION, 0, [0, 0, 0, 200], &body);
        stream
    }

    /// Maps memory without a descriptor, has a GPU read its ring there, and answers that.
    fn work_in_asked_memory(&mut self) -> &mut Stream {
        self.map(0, RAM, SIZE).start();
        let packet = sdma::fence(RAM + 0x2000, 7);
        let bytes = u64::try_from(4 * packet.len()).unwrap_or(0);
        let count = [longs(&[0]), words(&[pci::BAR_DOORBELLS.into(), 8])].concat();
        let doorbell = [count, longs(&[bytes])].concat();
        self.message(
            command::REGION_WRITE,
            flag::NO_REPLY,
            [0, 0, 0, 255],
            &doorbell,
        );
        // What the worker asks for first.
        let data = [longs(&[RAM, bytes]), words(&packet)].concat();
        self.message(command::DMA_READ, flag::REPLY, [0; 4], &data);
        self
    }

    fn message(&mut self, command: u16, flags: u32, manner: [u8; 4], body: &[u8]) {
        self.id += 1;
        let size = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
        self.bytes.extend(self.id.to_ne_bytes());
        self.bytes.extend(command.to_ne_bytes());
        self.bytes.extend(size.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(manner);
        self.bytes.extend(body);
    }

    fn send(&mut self, command: u16, body: impl AsRef<[u8]>) -> &mut Stream {
        self.message(command, 0, [0; 4], body.as_ref());
        self
    }

    /// With descriptors: how many, and of what the first is.
    fn with(&mut self, fds: u8, kind: u8, command: u16, body: impl AsRef<[u8]>) -> &mut Stream {
        self.message(command, 0, [fds, kind, 0, 0], body.as_ref());
        self
    }

    fn write(&mut self, region: u8, offset: u64, data: &[u8]) -> &mut Stream {
        let count = u32::try_from(data.len()).unwrap_or(0);
        let head = [words(&[u32::from(region), count]), data.to_vec()].concat();
        let body = [offset.to_ne_bytes().to_vec(), head].concat();
        self.message(command::REGION_WRITE, flag::NO_REPLY, [0; 4], &body);
        self
    }

    fn set(&mut self, offset: u32, value: u64) -> &mut Stream {
        self.write(pci::BAR_REGISTERS, offset.into(), &value.to_ne_bytes())
    }

    fn set32(&mut self, offset: u32, value: u32) -> &mut Stream {
        self.write(pci::BAR_REGISTERS, offset.into(), &value.to_ne_bytes())
    }

    fn read(&mut self, region: u8, offset: u64, count: u32) -> &mut Stream {
        let body = [
            offset.to_ne_bytes().to_vec(),
            words(&[region.into(), count]),
        ]
        .concat();
        self.send(command::REGION_READ, body)
    }

    fn map(&mut self, fds: u8, address: u64, size: u64) -> &mut Stream {
        let body = [words(&[32, 3]), longs(&[0, address, size])].concat();
        self.with(fds, 0, command::DMA_MAP, body)
    }

    fn unmap(&mut self, flags: u32, address: u64, size: u64) -> &mut Stream {
        let body = [words(&[24, flags]), longs(&[address, size])].concat();
        self.send(command::DMA_UNMAP, body)
    }

    /// Boots, and enables a queue whose ring is in RAM.
    fn start(&mut self) -> &mut Stream {
        use regs::{boot, irq, partition, queue};
        self.write(7, 4, &[6, 0]);
        self.set32(boot::BASE + boot::CONTROL.offset, 1);
        self.set32(irq::BASE + irq::ENABLE.offset, u32::MAX);
        self.set(partition::BASE + partition::TOKEN.offset, TOKEN);
        self.set32(partition::BASE + partition::COMMAND.offset, 1);
        self.set(queue::BASE + queue::RING_BASE.offset, RAM);
        self.set32(queue::BASE + queue::RING_SIZE.offset, 4096);
        self.set(queue::BASE + queue::TOKEN.offset, TOKEN);
        self.set32(queue::BASE + queue::CONTROL.offset, 1)
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

/// Names and bytes of the seeds.
#[must_use]
pub fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let mut all = Vec::new();
    let mut seed = |name, fill: &dyn Fn(&mut Stream)| {
        let mut stream = Stream::new();
        fill(&mut stream);
        all.push((name, stream.bytes));
    };
    seed("questions", &|it| {
        it.send(command::GET_INFO, words(&[16, 0, 0, 0]));
        for index in 0..10 {
            it.send(
                command::GET_REGION_INFO,
                words(&[64, 0, index, 0, 0, 0, 0, 0]),
            );
        }
        for index in 0..5 {
            it.send(command::GET_IRQ_INFO, words(&[16, 0, index, 0]));
        }
        it.send(command::GET_REGION_IO_FDS, words(&[32, 0, 2, 0]));
        it.read(7, 0, 256).send(command::RESET, []);
    });
    seed("maps", &|it| {
        it.map(1, RAM, SIZE).map(1, RAM, SIZE).map(0, HBM, SIZE);
        it.map(1, RAM + 4096, 4096).map(2, 0x9000_0000, 4096);
        it.unmap(0, RAM, SIZE).unmap(0, RAM, SIZE).unmap(2, 0, 0);
    });
    seed("interrupts", &|it| {
        it.with(1, 1, command::SET_IRQS, words(&[20, 0x24, 2, 0, 1]));
        it.with(3, 1, command::SET_IRQS, words(&[20, 0x24, 2, 4, 3]));
        it.send(command::SET_IRQS, words(&[20, 0x24, 2, 0, 1]));
        it.send(
            command::SET_IRQS,
            [words(&[20, 0x22, 2, 0, 2]), vec![1, 0]].concat(),
        );
        it.send(command::SET_IRQS, words(&[20, 0x21, 2, 0, 0]));
    });
    seed("work", &|it| {
        it.map(1, RAM, SIZE).start();
        it.write(pci::BAR_DOORBELLS, 0, &8_u64.to_ne_bytes());
        let status = regs::queue::BASE + regs::queue::STATUS.offset;
        it.read(pci::BAR_REGISTERS, status.into(), 4);
    });
    seed("memory_that_is_asked_for", &|it| {
        it.work_in_asked_memory().read(pci::BAR_REGISTERS, 0, 4);
    });
    seed("many_writes", &|it| {
        let entry =
            |offset: u64, value: u64| [longs(&[offset]), words(&[0, 4]), longs(&[value])].concat();
        let entries = [longs(&[2]), entry(0x40, 1), entry(0x44, 2)].concat();
        it.send(command::REGION_WRITE_MULTI, entries);
    });
    seed("migration", &|it| {
        for (flags, data) in [(1_u32 << 16, 0_u64), (2 | 1 << 16, 0), (2 | 2 << 16, 3)] {
            let body = [words(&[24, flags]), longs(&[data, 0])].concat();
            it.send(command::DEVICE_FEATURE, body);
        }
        it.send(command::MIG_DATA_READ, words(&[4096, 4096]));
        it.send(
            command::MIG_DATA_WRITE,
            [words(&[16, 4]), b"{}..".to_vec()].concat(),
        );
    });
    seed("refusals", &|it| {
        it.read(11, 0, 4).read(0, u64::MAX, 4).read(0, 0, u32::MAX);
        it.map(1, u64::MAX, 4096)
            .map(1, RAM, 0)
            .map(1, RAM, 2 * SIZE);
        it.send(99, []).send(command::DIRTY_PAGES, [0; 16]);
        it.send(command::VERSION, [0; 4]);
        it.message(command::GET_INFO, 3, [0; 4], &[]);
    });
    seed("a_size_that_cannot_be", &|it| {
        it.bytes
            .extend([9, 0, 4, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        it.send(command::GET_INFO, words(&[16, 0, 0, 0]));
    });
    seed("a_size_that_cannot_be_of_no_kind", &|it| {
        it.bytes
            .extend([9, 0, 4, 0, 3, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    });
    seed("cut", &|it| {
        let body = words(&[0, 0, 0, 4]);
        it.message(command::REGION_READ, 0, [0, 0, 7, 0], &body);
        it.message(command::REGION_READ, 0, [0, 0, 20, 0], &body);
        it.bytes.truncate(it.bytes.len() - 3);
    });
    let mut stream = Stream::with_twin();
    stream.work_in_asked_memory();
    // A command that belongs on the other socket, with a descriptor.
    let info = words(&[16, 0, 0, 0]);
    stream.message(command::GET_INFO, 0, [1, 0x80, 0, 0], &info);
    stream.read(pci::BAR_REGISTERS, 0, 4);
    all.push(("a_second_socket", stream.bytes));
    all
}
