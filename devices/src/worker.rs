//! The worker of a queue: takes packets from the ring and does them, in order.
//!
//! Every packet is a [`Permit`] from the moment it is decoded: it is completed or given up, with a fault or
//! because the queue was stopped.

use std::cell::Cell;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use numagpu_spec::regs::QueueFault;
use numagpu_spec::sdma;

use crate::atomic::{Outcome, holds};
use crate::engine::{Engine, Fault, Gate, Stop};
use crate::packet::{Operation, Packet, decode};
use crate::patience::Patience;
use crate::priority::{Busy, LOOK, SHARE};
use crate::queue::{Done, Run, Shared};
use crate::ring::Ring;
use crate::timing::{QueueTime, Stamp};

/// Packets after which a busy queue writes its read pointer back.
const WRITEBACK_PACKETS: u64 = 64;
/// Longest part of a paced packet's time that passes between two looks at the device's clock.
const PACE_LOOK: Duration = Duration::from_millis(10);

/// The obligation to finish a packet that was taken from the ring. Dropping it otherwise is a bug: debug builds
/// panic, release builds fault the queue.
#[must_use]
struct Permit<'q> {
    shared: &'q Shared,
    run: &'q Run,
    packet: Packet,
    moved: u64,
    /// When it moved data, if it did.
    stamp: Option<Stamp>,
    settled: bool,
}

impl<'q> Permit<'q> {
    fn new(shared: &'q Shared, run: &'q Run, packet: Packet) -> Permit<'q> {
        Permit {
            shared,
            run,
            packet,
            moved: 0,
            stamp: None,
            settled: false,
        }
    }

    /// The packet is done: the read pointer passes it.
    fn complete(mut self) -> Result<(), Stop> {
        self.settled = true;
        let done = Done {
            ring_bytes: self.packet.bytes,
            moved: self.moved,
            stamp: self.stamp,
        };
        self.shared.advance(self.run, &done)
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

/// What a queue passes between chunks: whether it was stopped, and queues that go first.
struct Turn<'q> {
    shared: &'q Shared,
    run: &'q Run,
    busy: Busy<'q>,
    /// When it last went on past a queue of higher priority.
    last: Cell<Option<Instant>>,
}

impl Gate for Turn<'_> {
    fn pass(&self) -> Result<(), Stop> {
        self.run.leave(self.shared).check()?;
        if !self.busy.is_outranked() {
            return Ok(());
        }
        let since = self.last.get().unwrap_or_else(Instant::now);
        while self.busy.is_outranked() && since.elapsed() < SHARE {
            match self.shared.pause(self.run, LOOK) {
                // A packet that has begun is finished, so that it is done once.
                Err(Stop::Held) => break,
                waited => waited?,
            }
        }
        self.last.set(Some(Instant::now()));
        Ok(())
    }
}

/// A worker in a run, from a kick until the ring is empty.
struct Session<'q> {
    shared: &'q Shared,
    run: &'q Run,
    turn: Turn<'q>,
    engine: Engine<'q>,
    time: QueueTime<'q>,
}

impl<'q> Session<'q> {
    fn new(shared: &'q Shared, run: &'q Run) -> Session<'q> {
        let reach = &run.setup.reach;
        let reached = run.reached_ns.load(Ordering::Relaxed);
        Session {
            shared,
            run,
            turn: Turn {
                shared,
                run,
                busy: shared.priorities().enter(run.setup.priority),
                last: Cell::new(None),
            },
            engine: Engine::new(reach),
            time: QueueTime::new(&*reach.clock, reach.timing.mode, reached),
        }
    }

    /// Waits between two tries at what others have to change.
    fn wait(&mut self, interval: u32) -> Result<(), Stop> {
        let interval = Duration::from_micros(u64::from(interval).max(1));
        let (shared, run) = (self.shared, self.run);
        let waited = self.turn.busy.idle(|| shared.pause(run, interval));
        self.time.catch_up();
        waited
    }

    /// Notes when a packet that moved data began and ended, and waits for its end if the queue is paced.
    fn stamp(&mut self) -> Result<Stamp, Stop> {
        let stamp = self.time.pass(&self.engine.take_cost());
        self.run
            .reached_ns
            .store(self.time.reached(), Ordering::Relaxed);
        match self.pace() {
            // The data has moved: the packet is done. The rest of its time passes before the next one.
            Err(Stop::Held) => Ok(stamp),
            waited => waited.map(|()| stamp),
        }
    }

    /// Waits for the end of the last packet if the queue is paced.
    fn pace(&self) -> Result<(), Stop> {
        loop {
            match self.time.ahead_ns() {
                0 => return Ok(()),
                ns => {
                    let part = Duration::from_nanos(ns).min(PACE_LOOK);
                    self.shared.pause(self.run, part)?;
                }
            }
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
        let mut session = Session::new(shared, &run);
        let stop = drain(&mut session, &mut ring);
        let reached = session.time.reached();
        run.reached_ns.store(reached, Ordering::Relaxed);
        if let Err(Stop::Fault(fault)) = stop {
            // Where even this fails, the fault that is reported says more.
            let _second = write_back(&mut session);
            shared.fail(&run, fault);
        }
    }
}

/// Works off the ring until it is empty.
fn drain(session: &mut Session<'_>, ring: &mut Ring) -> Result<(), Stop> {
    let (shared, run) = (session.shared, session.run);
    let mut unwritten = 0;
    session.pace()?;
    loop {
        shared.go_on(run)?;
        shared.stand_still(run)?;
        // Taken first: a kick that comes while the pointer is read is followed again.
        if run.kicked.swap(false, Ordering::SeqCst) {
            let wptr = session.engine.load64(run.setup.wptr_poll)?;
            shared.follow(run, wptr)?;
        }
        let (rptr, wptr) = shared.pointers();
        let available = wptr.saturating_sub(rptr);
        if available == 0 {
            write_back(session)?;
            if shared.rest(run, rptr)? {
                return Ok(());
            }
            continue;
        }
        if run.seen_wptr.swap(wptr, Ordering::Relaxed) != wptr {
            session.time.catch_up();
        }
        let words = ring.words(run, &mut session.engine, rptr, available)?;
        let packet = decode(words, available).map_err(|bad| {
            let address = bad.address.unwrap_or_else(|| run.ring_address(rptr));
            Fault {
                code: bad.code,
                address,
            }
        })?;
        let permit = Permit::new(shared, run, packet);
        let permit = execute(permit, session, rptr)?;
        permit.complete()?;
        unwritten += 1;
        if let Operation::Trap { context } = packet.operation {
            // The handler finds the read pointer behind the trap.
            write_back(session)?;
            unwritten = 0;
            shared.trap(run, context)?;
        } else if unwritten >= WRITEBACK_PACKETS {
            write_back(session)?;
            unwritten = 0;
        }
    }
}

/// Does what a packet asks for, except for raising a trap's interrupt.
fn execute<'q>(
    mut permit: Permit<'q>,
    session: &mut Session<'_>,
    rptr: u64,
) -> Result<Permit<'q>, Stop> {
    match perform(&permit.packet.operation, session, rptr) {
        Ok((moved, stamp)) => {
            permit.moved = moved;
            permit.stamp = stamp;
            Ok(permit)
        }
        Err(stop) => Err(permit.give_up(stop)),
    }
}

/// Bytes that an operation moved, and when it did, if it is one that takes time.
fn perform(
    operation: &Operation,
    session: &mut Session<'_>,
    rptr: u64,
) -> Result<(u64, Option<Stamp>), Stop> {
    let run = session.run;
    let (engine, turn) = (&mut session.engine, &session.turn);
    let moved = match *operation {
        Operation::Copy {
            source,
            destination,
            bytes,
        } => {
            engine.copy(turn, source, destination, bytes)?;
            bytes
        }
        Operation::CopyWindow(ref window) => {
            engine.copy_window(turn, window)?;
            window.bytes()
        }
        Operation::Write { destination, bytes } => {
            let start = rptr.saturating_add(4 * sdma::WRITE_LINEAR_HEADER_WORDS as u64);
            let mut done = 0;
            // At most two pieces: the ring wraps once.
            while done < bytes {
                let position = start.saturating_add(done);
                let size = u64::from(run.setup.ring_size).max(1);
                let piece = (size - position % size).min(bytes - done);
                let to = destination.checked_add(done).ok_or(Fault {
                    code: QueueFault::BadField,
                    address: destination,
                })?;
                engine.copy(turn, run.ring_address(position), to, piece)?;
                done += piece;
            }
            bytes
        }
        Operation::Fill {
            destination,
            pattern,
            bytes,
        } => {
            engine.fill(turn, destination, pattern, bytes)?;
            bytes
        }
        ref other => {
            turn.pass()?;
            return Ok((at_once(other, session)?, None));
        }
    };
    Ok((moved, Some(session.stamp()?)))
}

/// Does an operation whose own time does not count; bytes that it stored.
fn at_once(operation: &Operation, session: &mut Session<'_>) -> Result<u64, Stop> {
    let run = session.run;
    match *operation {
        Operation::Fence { address, value } => {
            session.engine.store32(address, value)?;
            Ok(4)
        }
        Operation::Poll { .. } => poll(operation, session).map(|()| 0),
        Operation::Atomic { atomic, .. } => change(operation, session).map(|()| atomic.bytes()),
        Operation::SetTime { ns } => {
            let offset = ns.wrapping_sub(session.time.shown());
            run.time_offset.store(offset, Ordering::Relaxed);
            Ok(0)
        }
        Operation::GetTime { address, global } => {
            let offset = match global {
                true => 0,
                false => run.time_offset.load(Ordering::Relaxed),
            };
            let shown = session.time.shown().wrapping_add(offset);
            session.engine.store64(address, shown)?;
            Ok(8)
        }
        _ => Ok(0),
    }
}

/// Tries until a poll's comparison holds; gives the core up between tries.
fn poll(operation: &Operation, session: &mut Session<'_>) -> Result<(), Stop> {
    let Operation::Poll {
        address,
        function,
        reference,
        mask,
        retries,
        interval,
    } = *operation
    else {
        return Ok(());
    };
    let mut tries = 0;
    while !holds(function, session.engine.load32(address)? & mask, reference) {
        if retries.is_some_and(|retries| tries >= retries) {
            let code = QueueFault::PollTimeout;
            return Err(Stop::Fault(Fault { code, address }));
        }
        if tries == 0 {
            // Who is to change the word may wait for what came before.
            write_back(session)?;
        }
        tries = tries.saturating_add(1);
        session.wait(interval)?;
    }
    Ok(())
}

/// Does an atomic operation, again until its comparison holds if it is so asked.
fn change(operation: &Operation, session: &mut Session<'_>) -> Result<(), Stop> {
    let Operation::Atomic {
        address,
        atomic,
        until,
    } = *operation
    else {
        return Ok(());
    };
    let mut waited = false;
    loop {
        session.run.leave(session.shared).check()?;
        let outcome = session.engine.atomic(address, &atomic)?;
        match (outcome, until) {
            (Outcome::Lost, _) => std::thread::yield_now(),
            (Outcome::Differs, Some(interval)) => {
                if !waited {
                    write_back(session)?;
                    waited = true;
                }
                session.wait(interval)?;
            }
            (Outcome::Done, _) | (Outcome::Differs, None) => return Ok(()),
        }
    }
}

/// Writes the read pointer where the driver asked for it.
fn write_back(session: &mut Session<'_>) -> Result<(), Stop> {
    let (shared, run) = (session.shared, session.run);
    if run.setup.writeback == 0 {
        return Ok(());
    }
    run.leave(shared).check()?;
    let (rptr, _) = shared.pointers();
    session.engine.store64(run.setup.writeback, rptr)?;
    Ok(())
}
