//! Doorbells in memory that a VMM maps: what a driver stores there is heard, whatever else comes between.

use std::sync::atomic::Ordering;

use numagpu_spec::regs::{QueueFault, queue};
use numagpu_spec::sdma::{fence, trap};

use super::*;
use crate::bus::ResetKind;
use crate::config::GpuError;
use crate::inject::Injection;

const NOP: u32 = 0;
const PAGE: u64 = pci::BAR_DOORBELLS_SIZE;

/// A machine whose first GPU has its doorbells in `page`.
struct Mapped {
    machine: Machine,
    page: Arc<AnonymousStore>,
}

impl Mapped {
    fn ready() -> Mapped {
        let page = Arc::new(AnonymousStore::new(PAGE as usize).unwrap());
        let machine = Machine::of(|config| {
            if config.index == 0 {
                config.doorbells = Some(Arc::clone(&page) as _);
            }
        });
        machine.boot(0);
        machine.enable(0, 0, TOKEN);
        Mapped { machine, page }
    }

    fn store(&self, queue: u64, value: u64) {
        let slot = self.page.slice(queue * pci::DOORBELL_STRIDE, 8).unwrap();
        slot.store(value, 0, Ordering::Release).unwrap();
    }

    /// As `mov` of 32 bits does.
    fn store_half(&self, offset: u64, value: u32) {
        let slot = self.page.slice(offset, 4).unwrap();
        slot.store(value, 0, Ordering::Release).unwrap();
    }

    fn slot(&self, queue: u64) -> u64 {
        let slot = self.page.slice(queue * pci::DOORBELL_STRIDE, 8).unwrap();
        slot.load(0, Ordering::Acquire).unwrap()
    }

    /// Appends words to the ring of queue 0, and stores what `submit` would send.
    fn submit(&self, words: &[u32]) {
        let mut wptr = self.machine.queue(0, 0, &queue::WPTR);
        for word in words {
            let offset = wptr % u64::from(RING_SIZE);
            self.machine.poke(ring(0, 0) + offset, &word.to_le_bytes());
            wptr += 4;
        }
        self.store(0, wptr);
    }

    fn wait_packets(&self, count: u64) {
        wait(|| self.machine.queue(0, 0, &queue::PACKETS) == count);
    }
}

#[test]
fn what_is_stored_rings_and_leaves_zero() {
    let mapped = Mapped::ready();
    mapped.submit(&fence(DATA, 7));
    wait(|| mapped.machine.peek32(DATA) == 7);
    assert_eq!(mapped.slot(0), 0);
    // The thread rests by now, and a store wakes nobody.
    std::thread::sleep(Duration::from_millis(20));
    mapped.submit(&fence(DATA, 8));
    wait(|| mapped.machine.peek32(DATA) == 8);
    // Writes that come as writes go on working, and read as zero as before.
    mapped.machine.run(&[NOP]);
    mapped.wait_packets(3);
    let mut data = [0xee; 8];
    mapped.machine.gpus[0].bar_read(pci::BAR_DOORBELLS, 0, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn an_interrupt_comes_for_work_that_was_rung_by_a_store() {
    let mapped = Mapped::ready();
    mapped.submit(&trap(3));
    wait(|| mapped.machine.vmms[0].irq.count(pci::VECTOR_QUEUE0) == 1);
}

#[test]
fn a_lost_doorbell_is_rung_again_with_the_same_value() {
    let mapped = Mapped::ready();
    let lost = Injection::LostDoorbell { queue: 0, count: 1 };
    mapped.machine.gpus[0].inject(lost).unwrap();
    mapped.submit(&[NOP]);
    wait(|| mapped.slot(0) == 0);
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(mapped.machine.queue(0, 0, &queue::WPTR), 0);
    mapped.submit(&[NOP]);
    mapped.wait_packets(1);
}

#[test]
fn halves_ring_as_they_do_when_they_are_sent() {
    let mapped = Mapped::ready();
    mapped.machine.poke(ring(0, 0), &NOP.to_le_bytes());
    // High half first, of a pointer below 4 GiB.
    mapped.store_half(4, 0);
    mapped.store_half(0, 4);
    mapped.wait_packets(1);
    // A high half alone that is far ahead is a doorbell that is no good, at once or with its low half.
    mapped.store_half(4, 1);
    wait(|| mapped.machine.queue_state(0, 0) == QueueState::Fault);
    let (code, address, _) = mapped.machine.fault(0, 0);
    assert_eq!((code, address), (QueueFault::BadDoorbell, 1 << 32));
}

#[test]
fn nothing_of_before_a_reset_rings_after_it() {
    let mapped = Mapped::ready();
    mapped.machine.reset_queue(0, 0);
    // To a disabled queue.
    mapped.store(0, 64);
    mapped.machine.enable(0, 0, TOKEN);
    mapped.submit(&[NOP]);
    mapped.wait_packets(1);
    assert_eq!(mapped.machine.queue(0, 0, &queue::WPTR), 4);
    mapped.store(1, 64);
    mapped.machine.gpus[0].reset(ResetKind::Function);
    assert_eq!((mapped.slot(0), mapped.slot(1)), (0, 0));
}

#[test]
fn what_was_stored_before_a_pause_is_in_the_state() {
    let mapped = Mapped::ready();
    for round in 0..20 {
        mapped.submit(&[NOP]);
        let wptr = 4 * (round + 1);
        let pause = mapped.machine.gpus[0].pause().unwrap();
        let state = pause.state();
        assert_eq!(state.queues[0].wptr, wptr);
        drop(pause);
        mapped.wait_packets(round + 1);
    }
}

#[test]
fn a_page_of_another_size_is_refused() {
    let fabric = Fabric::new();
    let page = Arc::new(AnonymousStore::new(2 * PAGE as usize).unwrap());
    let config = GpuConfig {
        doorbells: Some(page as _),
        ..GpuConfig::new(0, Vec::new())
    };
    let refused = Gpu::new(config, fabric).err().unwrap();
    assert_eq!(refused, GpuError::DoorbellPage { size: 2 * PAGE });
    assert_eq!(
        refused.to_string(),
        "a doorbell page of 0x2000 bytes; the BAR has 0x1000"
    );
}
