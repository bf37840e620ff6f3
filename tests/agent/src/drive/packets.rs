//! Every packet of the copy queue, by what it leaves in memory.

use std::time::Duration;

use numagpu_spec::regs::{QueueFault, QueueState, TimingMode, clock, queue as q};
use numagpu_spec::sdma::{self, AtomicOp, PollFunction, Surface};

use super::{COPY, Drive, FOREIGN, QUEUE, SOURCE, TOKEN, WORDS};
use crate::device::{Outcome, wait};

/// Bytes that are looked at for stores beside those wanted.
const AREA: usize = 0x4000;
/// Columns, rows and slices of the box that is copied, and the surfaces that it is copied between.
const EXTENT: [u32; 3] = [16, 8, 2];
const FROM: ([u32; 3], u32, u32) = ([3, 2, 1], 64, 1024);
const TO: ([u32; 3], u32, u32) = ([1, 5, 0], 32, 640);
/// The size of their elements, 4 bytes.
const WORD: u32 = 2;

/// Word of a surface that has column, row and slice of the box.
fn word(place: &([u32; 3], u32, u32), [x, y, z]: [u32; 3]) -> u32 {
    let ([x0, y0, z0], pitch, slice) = place;
    (x0 + x) + (y0 + y) * pitch + (z0 + z) * slice
}

impl Drive {
    /// Lets queue 0 do packets, and waits for their end.
    fn run(&self, index: usize, packets: &[&[u32]]) -> Outcome {
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        packets.iter().for_each(|packet| queue.push(packet));
        queue.push_fence(2, 0xd0e);
        queue.go();
        queue.wait_fence(2, 0xd0e)?;
        queue.check_drained()
    }

    /// A box of words, and nothing beside it.
    pub(super) fn sub_window(&self, index: usize) -> Outcome<String> {
        let scratch = self.scratch(index)?;
        let value = |word: u32| 0xb0c5_0000 | word;
        for number in 0..4096 {
            self.buffer
                .write32(SOURCE + number as usize * 4, value(number));
        }
        scratch.memory().fill(scratch.at, AREA, 0);
        let surface = |address: u64, (origin, pitch, slice_pitch): ([u32; 3], u32, u32)| Surface {
            address,
            origin,
            pitch,
            slice_pitch,
        };
        let packet = sdma::copy_sub_window(
            WORD,
            surface(self.physical + SOURCE as u64, FROM),
            surface(scratch.address, TO),
            EXTENT,
        );
        let before: Vec<u32> = (0..AREA)
            .step_by(4)
            .map(|at| scratch.memory().read32(scratch.at + at))
            .collect();
        let mut wanted = before;
        let [columns, rows, slices] = EXTENT;
        for z in 0..slices {
            for (y, x) in (0..rows).flat_map(|y| (0..columns).map(move |x| (y, x))) {
                let slot = wanted.get_mut(word(&TO, [x, y, z]) as usize);
                *slot.ok_or("a box beyond the area")? = value(word(&FROM, [x, y, z]));
            }
        }
        self.run(index, &[&packet])?;
        for (number, wanted) in wanted.iter().enumerate() {
            let seen = scratch.memory().read32(scratch.at + number * 4);
            if seen != *wanted {
                return Err(format!("word {number} is {seen:#x} instead of {wanted:#x}"));
            }
        }
        Ok(format!("works: {columns} x {rows} x {slices} words"))
    }

    /// A write of words, a fill and a packet to skip, and nothing beside them.
    pub(super) fn writes(&self, index: usize) -> Outcome<String> {
        const FILL_AT: usize = 0x400;
        const FILL: usize = 0x1004;
        const WRITE: [u32; 3] = [0x0102_0304, 0x0506_0708, 0x090a_0b0c];
        let scratch = self.scratch(index)?;
        scratch.memory().fill(scratch.at, AREA, 1 << 40);
        let fill_at = scratch.address + FILL_AT as u64;
        let [lo, hi] = [scratch.address, scratch.address >> 32].map(|half| half & 0xffff_ffff);
        let half = |half: u64| u32::try_from(half).unwrap_or(0);
        let mut write = vec![sdma::OP_WRITE.into(), half(lo), half(hi), 2];
        write.extend(WRITE);
        // A packet that is skipped with its two words, which are no packets.
        let nop = [u32::from(sdma::OP_NOP) | 2 << 16, u32::MAX, u32::MAX];
        let fill = sdma::const_fill(fill_at, 0xf111_f111, FILL as u64);
        self.run(index, &[&nop, &write, &fill])?;
        for at in (0..AREA).step_by(4) {
            let old = match at % 8 {
                0 => u32::try_from(at / 8).unwrap_or(0),
                _ => 1 << 8,
            };
            let filled = (FILL_AT..FILL_AT + FILL).contains(&at);
            let wanted = match WRITE.get(at / 4) {
                Some(word) => *word,
                None if filled => 0xf111_f111,
                None => old,
            };
            let seen = scratch.memory().read32(scratch.at + at);
            if seen != wanted {
                return Err(format!(
                    "{seen:#x} instead of {wanted:#x} at offset {at:#x}"
                ));
            }
        }
        Ok(format!("works: {} words, {FILL} bytes", WRITE.len()))
    }

    /// A poll that waits for the CPU, and one that gives up.
    pub(super) fn polls(&self, index: usize) -> Outcome<String> {
        let address = self.physical + WORDS as u64;
        self.buffer.write32(WORDS, 0);
        let equal = |retries: u32, interval: u16| {
            sdma::poll_memory(address, PollFunction::Equal, 0x50, 0xf0, retries, interval)
        };
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        queue.push(&sdma::poll_memory(
            address,
            PollFunction::Less,
            1,
            u32::MAX,
            0,
            0,
        ));
        queue.push(&equal(sdma::POLL_RETRIES_MASK, 50));
        queue.push_fence(4, 1);
        queue.go();
        wait("the poll to begin", || {
            (queue.read(q::PACKETS) == 1 && queue.state() == Some(QueueState::Running))
                .then_some(())
        })?;
        self.buffer.write32(WORDS, 0x40);
        std::thread::sleep(Duration::from_millis(1));
        if queue.fence(4) != 0 || queue.state() != Some(QueueState::Running) {
            return Err(format!("{:?} before its word is there", queue.state()));
        }
        self.buffer.write32(WORDS, 0x5a);
        queue.wait_fence(4, 1)?;
        self.buffer.write32(WORDS, 0);
        queue.push(&equal(3, 10));
        queue.push_fence(4, 2);
        queue.go();
        queue.wait_stopped(QueueFault::PollTimeout)?;
        let (seen, fence) = (queue.read(q::FAULT_ADDR), queue.fence(4));
        if seen != address || fence != 0 {
            return Err(format!("fault {}, fence {fence}", queue.fault()));
        }
        queue.reset();
        Ok("works: one waited for the CPU, one gave up".to_owned())
    }

    /// Every operation that memory can show, in 32 and 64 bits.
    pub(super) fn atomics(&self, index: usize) -> Outcome<String> {
        use AtomicOp as A;
        const WIDE: u64 = 1 << 40;
        let low = 0xffff_ffff_u64;
        // Operation, whether wide, memory before, operand, comparand, memory after.
        let cases: [(A, bool, u64, u64, u64, u64); 14] = [
            (A::Add, false, low, 2, 0, 1),
            (A::Add, true, low, 2, 0, low + 2),
            (A::CompareSwap, false, 5, 9, 5, 9),
            (A::CompareSwap, true, WIDE, 9, WIDE + 1, WIDE),
            (A::Swap, true, 1, WIDE, 0, WIDE),
            (A::Sub, true, 0, 1, 0, u64::MAX),
            (A::MinSigned, false, 1, low, 0, low),
            (A::MinUnsigned, false, 1, low, 0, 1),
            (A::MaxSigned, true, 1, u64::MAX, 0, 1),
            (A::MaxUnsigned, true, 1, u64::MAX, 0, u64::MAX),
            (A::And, false, 0xff, 0x3c, 0, 0x3c),
            (A::Or, true, WIDE, 1, 0, WIDE | 1),
            (A::Increment, false, 7, 7, 0, 0),
            (A::Decrement, false, 0, 7, 0, 7),
        ];
        let scratch = self.scratch(index)?;
        let memory = scratch.memory();
        let mut packets = Vec::new();
        for (slot, (op, wide, before, operand, comparand, _)) in cases.iter().enumerate() {
            memory.write64(scratch.at + slot * 8, *before);
            let address = scratch.address + slot as u64 * 8;
            packets.push(sdma::atomic(address, *op, *wide, *operand, *comparand));
        }
        let packets: Vec<&[u32]> = packets.iter().map(<[u32; 8]>::as_slice).collect();
        self.run(index, &packets)?;
        for (slot, (op, wide, before, _, _, after)) in cases.iter().enumerate() {
            let seen = memory.read64(scratch.at + slot * 8);
            if seen != *after {
                return Err(format!(
                    "{op:?} (wide: {wide}) makes {seen:#x} of {before:#x}, not {after:#x}"
                ));
            }
        }
        Ok(format!("works: {} results", cases.len()))
    }

    /// Time stamps go one way; a queue's own time is what it was set to, and runs as the device's.
    pub(super) fn timestamps(&self, index: usize) -> Outcome<String> {
        const SET: u64 = 1 << 50;
        let device = &self.gpu(index)?.device;
        let address = |slot: usize| self.physical + (WORDS + slot * 8) as u64;
        for slot in 0..4 {
            self.buffer.write64(WORDS + slot * 8, 0);
        }
        let clock = || device.read(clock::BASE, clock::NS);
        let before = clock();
        let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
        queue.push(&sdma::timestamp_get_global(address(0)));
        queue.push(&sdma::timestamp_get(address(1)));
        let source = self.scratch(index)?.address;
        queue.push_copy(source, self.physical + SOURCE as u64, COPY as u64);
        queue.push(&sdma::timestamp_set(SET));
        queue.push(&sdma::timestamp_get(address(2)));
        queue.push(&sdma::timestamp_get_global(address(3)));
        queue.push_fence(5, 1);
        queue.go();
        queue.wait_fence(5, 1)?;
        let after = clock();
        let [first, own, set, last] = [0, 1, 2, 3].map(|slot| self.buffer.read64(WORDS + slot * 8));
        let stamps = (queue.read(q::STAMP_START_NS), queue.read(q::STAMP_END_NS));
        let seen = || format!("{first} {own} {set} {last}, copy {stamps:?}, {before} to {after}");
        let in_order = first <= own && own <= last && stamps.0 <= stamps.1;
        let as_set = set >= SET && set - SET <= last - first;
        // A model's time may be ahead of the clock.
        let mode = device.read32(clock::BASE, clock::MODE);
        let measured = mode != TimingMode::Off.code()
            || (before <= first && own <= stamps.1 && stamps.1 <= last && last <= after);
        if !in_order || !as_set || !measured {
            return Err(seen());
        }
        let micros = (stamps.1 - stamps.0) / 1000;
        Ok(format!(
            "works: a copy of {} KiB in {micros} us",
            COPY >> 10
        ))
    }

    /// Queues of the lowest and of the highest priority do their work beside each other.
    pub(super) fn priorities(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let second = self.second(index)?;
        let base = |number: u32| q::BASE + number * q::STRIDE;
        let priority = |number: u32, value: u32| {
            device.write(base(number), q::PRIORITY, value.into());
            device.read32(base(number), q::PRIORITY)
        };
        let highest = priority(second, u32::MAX);
        if highest != numagpu_spec::regs::PRIORITY_MAX || priority(0, 0) != 0 && second != 0 {
            return Err(format!("PRIORITY {highest} instead of 3"));
        }
        let mut queues = vec![self.queue(index, second, FOREIGN, TOKEN)?];
        if second != 0 {
            queues.push(self.queue(index, 0, QUEUE, TOKEN)?);
        }
        let address = self.scratch(index)?.address;
        for queue in &mut queues {
            for _ in 0..8 {
                queue.push_copy(address, address + COPY as u64, 4096);
            }
            queue.push_fence(6, 1);
        }
        queues.iter().for_each(|queue| queue.go());
        for queue in &queues {
            queue.wait_fence(6, 1)?;
            queue.check_drained()?;
            queue.reset();
        }
        priority(second, 0);
        Ok(String::new())
    }
}
