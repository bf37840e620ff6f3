//! The worker of a queue: takes packets from the ring and does them, in order.
//!
//! Every packet is a [`Permit`] from the moment it is decoded: it is completed or given up, with a fault or
//! because the queue was stopped.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use numagpu_spec::regs::QueueFault;
use numagpu_spec::sdma;

use crate::atomic::{Outcome, holds};
use crate::engine::{Fault, Stop};
use crate::packet::{Operation, Packet, decode};
use crate::patience::Patience;
use crate::queue::{Run, Shared};
use crate::ring::Ring;

/// Packets after which a busy queue writes its read pointer back.
const WRITEBACK_PACKETS: u64 = 64;

/// The obligation to finish a packet that was taken from the ring. Dropping it otherwise is a bug: debug builds
/// panic, release builds fault the queue.
#[must_use]
struct Permit<'q> {
    shared: &'q Shared,
    run: &'q Run,
    packet: Packet,
    moved: u64,
    settled: bool,
}

impl<'q> Permit<'q> {
    fn new(shared: &'q Shared, run: &'q Run, packet: Packet) -> Permit<'q> {
        Permit {
            shared,
            run,
            packet,
            moved: 0,
            settled: false,
        }
    }

    /// The packet is done: the read pointer passes it.
    fn complete(mut self) -> Result<(), Stop> {
        self.settled = true;
        self.shared.advance(self.run, self.packet.bytes, self.moved)
    }

    /// The packet cannot be done: the queue stops, or has been stopped.
    fn give_up(mut self, stop: Stop) -> Stop {
        self.settled = true;
        stop
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if !self.settled {
            let address = self.run.ring_address(0);
            let code = QueueFault::BadOpcode;
            self.shared.fail(self.run, Fault { code, address });
            debug_assert!(
                std::thread::panicking(),
                "a packet was neither completed nor given up"
            );
        }
    }
}

/// The worker: waits for kicks until the queue is dropped.
pub(crate) fn work(shared: &Shared, kicks: &Receiver<Instant>) {
    let mut ring = Ring::default();
    let mut patience = Patience::default();
    while patience.wait(kicks) {
        // Dropped in reverse order: nothing of the run is held when the worker says that it has left.
        let Some((_active, run)) = shared.enter() else {
            continue;
        };
        ring.clear();
        let stop = drain(shared, &run, &mut ring);
        if let Err(Stop::Fault(fault)) = stop {
            // Where even this fails, the fault that is reported says more.
            let _second = write_back(shared, &run);
            shared.fail(&run, fault);
        }
    }
}

/// Works off the ring until it is empty.
fn drain(shared: &Shared, run: &Run, ring: &mut Ring) -> Result<(), Stop> {
    let mut unwritten = 0;
    loop {
        run.leave(shared).check()?;
        let (rptr, wptr) = shared.pointers();
        let available = wptr.saturating_sub(rptr);
        if available == 0 {
            write_back(shared, run)?;
            if shared.rest(run, rptr)? {
                return Ok(());
            }
            continue;
        }
        let words = ring.words(run, rptr, available)?;
        let packet = decode(words, available).map_err(|bad| {
            let address = bad.address.unwrap_or_else(|| run.ring_address(rptr));
            Fault {
                code: bad.code,
                address,
            }
        })?;
        let permit = Permit::new(shared, run, packet);
        let permit = execute(permit, rptr)?;
        permit.complete()?;
        unwritten += 1;
        if packet.operation == Operation::Trap {
            // The handler finds the read pointer behind the trap.
            write_back(shared, run)?;
            unwritten = 0;
            run.leave(shared).check()?;
            shared.trap();
        } else if unwritten >= WRITEBACK_PACKETS {
            write_back(shared, run)?;
            unwritten = 0;
        }
    }
}

/// Does what a packet asks for, except for raising a trap's interrupt.
fn execute<'q>(mut permit: Permit<'q>, rptr: u64) -> Result<Permit<'q>, Stop> {
    let run = permit.run;
    let reach = &run.setup.reach;
    let leave = run.leave(permit.shared);
    let (done, moved) = match permit.packet.operation {
        Operation::Nop | Operation::Trap => (Ok(()), 0),
        Operation::Copy {
            source,
            destination,
            bytes,
        } => (reach.copy(leave, source, destination, bytes), bytes),
        Operation::Write { destination, bytes } => {
            let start = rptr.saturating_add(4 * sdma::WRITE_LINEAR_HEADER_WORDS as u64);
            let mut done = 0;
            let mut result = Ok(());
            // At most two pieces: the ring wraps once.
            while done < bytes && result.is_ok() {
                let position = start.saturating_add(done);
                let size = u64::from(run.setup.ring_size).max(1);
                let piece = (size - position % size).min(bytes - done);
                result = match destination.checked_add(done) {
                    Some(to) => reach.copy(leave, run.ring_address(position), to, piece),
                    None => Err(Stop::Fault(Fault {
                        code: QueueFault::BadField,
                        address: destination,
                    })),
                };
                done += piece;
            }
            (result, bytes)
        }
        Operation::Fill {
            destination,
            pattern,
            bytes,
        } => (reach.fill(leave, destination, pattern, bytes), bytes),
        Operation::Fence { address, value } => {
            (reach.store32(address, value).map_err(Stop::from), 4)
        }
        Operation::Poll { .. } => (poll(&permit), 0),
        Operation::Atomic { atomic, .. } => (change(&permit), atomic.bytes()),
        Operation::SetTime { ns } => {
            let offset = ns.wrapping_sub(reach.clock.now_ns());
            run.time_offset.store(offset, Ordering::Relaxed);
            (Ok(()), 0)
        }
        Operation::GetTime { address, global } => {
            let offset = match global {
                true => 0,
                false => run.time_offset.load(Ordering::Relaxed),
            };
            let now = reach.clock.now_ns().wrapping_add(offset);
            (reach.store64(address, now).map_err(Stop::from), 8)
        }
    };
    match done {
        Ok(()) => {
            permit.moved = moved;
            Ok(permit)
        }
        Err(stop) => Err(permit.give_up(stop)),
    }
}

/// Tries until a poll's comparison holds; gives the core up between tries.
fn poll(permit: &Permit<'_>) -> Result<(), Stop> {
    let Operation::Poll {
        address,
        function,
        reference,
        mask,
        retries,
        interval,
    } = permit.packet.operation
    else {
        return Ok(());
    };
    let mut tries = 0;
    while !holds(
        function,
        permit.run.setup.reach.load32(address)? & mask,
        reference,
    ) {
        if retries.is_some_and(|retries| tries >= retries) {
            let code = QueueFault::PollTimeout;
            return Err(Stop::Fault(Fault { code, address }));
        }
        if tries == 0 {
            // Who is to change the word may wait for what came before.
            write_back(permit.shared, permit.run)?;
        }
        tries = tries.saturating_add(1);
        let interval = Duration::from_micros(u64::from(interval).max(1));
        permit.shared.pause(permit.run, interval)?;
    }
    Ok(())
}

/// Does an atomic operation, again until its comparison holds if it is so asked.
fn change(permit: &Permit<'_>) -> Result<(), Stop> {
    let Operation::Atomic {
        address,
        atomic,
        until,
    } = permit.packet.operation
    else {
        return Ok(());
    };
    let mut waited = false;
    loop {
        permit.run.leave(permit.shared).check()?;
        let outcome = permit.run.setup.reach.atomic(address, &atomic)?;
        match (outcome, until) {
            (Outcome::Lost, _) => std::thread::yield_now(),
            (Outcome::Differs, Some(interval)) => {
                if !waited {
                    write_back(permit.shared, permit.run)?;
                    waited = true;
                }
                let interval = Duration::from_micros(u64::from(interval).max(1));
                permit.shared.pause(permit.run, interval)?;
            }
            (Outcome::Done, _) | (Outcome::Differs, None) => return Ok(()),
        }
    }
}

/// Writes the read pointer where the driver asked for it.
fn write_back(shared: &Shared, run: &Run) -> Result<(), Stop> {
    if run.setup.writeback == 0 {
        return Ok(());
    }
    run.leave(shared).check()?;
    let (rptr, _) = shared.pointers();
    run.setup.reach.store64(run.setup.writeback, rptr)?;
    Ok(())
}
