//! The copy engine: moves bytes between guest memory, own HBM and peers' HBM for one queue.
//!
//! Work goes in chunks of at most [`CHUNK`] bytes. For each chunk the engine finds out anew whose the addresses
//! are and whether it may touch them, and passes its queue's `Gate`; so a reset waits for one chunk at most,
//! and what a driver loses it loses between two chunks. A fault in the middle of a packet leaves what the
//! chunks before it did.
//!
//! Two ranges of guest memory are the [`DmaPort`]'s to copy: a call into it inside another one could wait for ever
//! behind a change of the map.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use numagpu_spec::regs::QueueFault;
use vm_memory::{Bytes, VolatileSlice};

use crate::atomic::{Atomic, Outcome};
use crate::bus::{DmaAccess, DmaPort};
use crate::clock::Clock;
use crate::fabric::{Fabric, Place};
use crate::packet::{Plane, Window};
use crate::route::View;
use crate::span::{Owner, Span, dma_fault, fault};
use crate::timing::{Cost, Part, Timing};

/// Most bytes moved between two looks at whether to stop: some 50 us of work.
pub const CHUNK: u64 = 256 << 10;

/// Why a queue stops, with the address that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Code for the driver.
    pub code: QueueFault,
    /// Address.
    pub address: u64,
}

/// Why an operation did not finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It cannot be done.
    Fault(Fault),
    /// The queue was reset, disabled or detached.
    Halted,
    /// The queue pauses: what was not finished begins anew when it goes on. Only waits and packet boundaries give it.
    Held,
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Stop {
        Stop::Fault(fault)
    }
}

/// Tells a worker to stop: true as long as the queue's epoch is the one it began with.
#[derive(Clone, Copy, Debug)]
pub struct Leave<'q> {
    /// Epoch now.
    pub epoch: &'q AtomicU64,
    /// Epoch of the work.
    pub mine: u64,
}

impl Leave<'_> {
    /// # Errors
    /// [`Stop::Halted`] if the epoch passed.
    pub fn check(&self) -> Result<(), Stop> {
        if self.epoch.load(Ordering::SeqCst) == self.mine {
            Ok(())
        } else {
            Err(Stop::Halted)
        }
    }
}

/// What a queue's work passes before each chunk. It may wait there for other queues, but not for long.
pub(crate) trait Gate {
    /// # Errors
    /// [`Stop::Halted`] if the work is to stop.
    fn pass(&self) -> Result<(), Stop>;
}

/// What the queue of one driver can reach.
#[derive(Clone)]
pub struct Reach {
    /// Where the GPU is.
    pub place: Place,
    /// Whose partitions the queue may touch.
    pub token: u64,
    /// Own HBM and that of peers.
    pub fabric: Arc<Fabric>,
    /// Guest memory, while a VMM is there.
    pub dma: Option<Arc<dyn DmaPort>>,
    /// Bus master on and function in D0.
    pub dma_allowed: Arc<AtomicBool>,
    /// The device's clock.
    pub clock: Arc<dyn Clock>,
    /// How it counts time.
    pub timing: Timing,
}

/// The engine of a queue at work.
pub(crate) struct Engine<'r> {
    reach: &'r Reach,
    view: Arc<View>,
    cost: Cost,
}

/// What is done to a word.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Touch {
    Load,
    Store,
    /// Load and store in one.
    Change,
}

impl Touch {
    fn access(self) -> DmaAccess {
        match self {
            Touch::Load => DmaAccess::Read,
            Touch::Store => DmaAccess::Write,
            Touch::Change => DmaAccess::Change,
        }
    }
}

impl<'r> Engine<'r> {
    /// The engine of a queue that begins to work.
    pub(crate) fn new(reach: &'r Reach) -> Engine<'r> {
        Engine {
            reach,
            view: reach.fabric.view(reach.place),
            cost: Cost::default(),
        }
    }

    /// What the packets since the last call cost.
    pub(crate) fn take_cost(&mut self) -> Cost {
        std::mem::take(&mut self.cost)
    }

    /// Sees what has changed in the fabric. To be called before each chunk.
    fn refresh(&mut self) {
        if self.reach.fabric.generation() != self.view.generation {
            self.view = self.reach.fabric.view(self.reach.place);
        }
    }

    /// The part of `address..address + len` that lies in one place, from `address` on; not empty.
    fn span(&self, address: u64, len: u64) -> Result<Span<'_>, Fault> {
        let reach = self.reach;
        let port = reach.dma.as_deref();
        match self.view.find(address) {
            Ok(seen) => {
                if seen.route.is_none() {
                    return Err(fault(QueueFault::LinkDown, address));
                }
                let offset = address.saturating_sub(seen.partition.base());
                Ok(Span {
                    owner: Owner::Hbm(seen, offset),
                    address,
                    len: len.min(seen.partition.size().saturating_sub(offset)),
                    port,
                })
            }
            Err(next) => {
                if !reach.dma_allowed.load(Ordering::SeqCst) {
                    return Err(fault(QueueFault::BusMasterOff, address));
                }
                let dma = port.ok_or_else(|| fault(QueueFault::Unmapped, address))?;
                let room = next.map_or(u64::MAX, |next| next.saturating_sub(address));
                Ok(Span {
                    owner: Owner::Ram(dma),
                    address,
                    len: len.min(room),
                    port,
                })
            }
        }
    }

    /// Counts `len` bytes on the links to a span.
    fn count(&self, span: &Span<'_>, len: u64, access: DmaAccess) {
        match (&span.owner, access) {
            (Owner::Hbm(seen, _), _) => {
                let route = seen.route.as_deref();
                route.into_iter().for_each(|route| match access {
                    DmaAccess::Read => route.count_in(len),
                    DmaAccess::Write | DmaAccess::Change => route.count_out(len),
                });
            }
            (Owner::Ram(_), access) => {
                let link = self.view.cpu_link();
                link.into_iter().for_each(|link| match access {
                    DmaAccess::Read => link.count_in(len),
                    DmaAccess::Write | DmaAccess::Change => link.count_out(len),
                });
            }
        }
    }

    /// What limits accesses to a span.
    fn part(&self, span: &Span<'_>) -> Part {
        let timing = &self.reach.timing;
        match &span.owner {
            Owner::Hbm(seen, _) => match seen.route.as_deref() {
                Some(route) if route.len() > 0 => Part {
                    bandwidth_mbs: route.bandwidth_mbs,
                    latency_ns: route.latency_ns,
                },
                _ => Part {
                    bandwidth_mbs: timing.hbm_bandwidth_mbs,
                    latency_ns: timing.hbm_latency_ns.into(),
                },
            },
            Owner::Ram(_) => self.view.cpu_link().map_or(Part::default(), |link| Part {
                bandwidth_mbs: link.bandwidth_now_mbs(),
                latency_ns: link.latency_ns().into(),
            }),
        }
    }

    /// Checks that the queue may touch all of a range, as far as that can be known without touching it.
    fn check(&self, address: u64, len: u64) -> Result<(), Fault> {
        let mut done = 0;
        while done < len {
            let span = self.span(address.saturating_add(done), len - done)?;
            let _entry = span.enter(self.reach.token)?;
            done += span.len.max(1);
        }
        Ok(())
    }

    /// Reads `data.len()` bytes.
    ///
    /// # Errors
    /// The fault, if not all of them can be read.
    pub(crate) fn read(&mut self, address: u64, data: &mut [u8]) -> Result<(), Fault> {
        let mut done = 0;
        while done < data.len() {
            let position = end(address, done as u64)?;
            self.refresh();
            let span = self.span(position, (data.len() - done) as u64)?;
            let _entry = span.enter(self.reach.token)?;
            span.readable(span.len)?;
            let mut failed = false;
            span.pieces(span.len, DmaAccess::Read, &mut |at, piece| {
                let to = data.get_mut(done + at..);
                let to = to.and_then(|to| to.get_mut(..piece.len()));
                failed |= to.is_none_or(|to| piece.read_slice(to, 0).is_err());
            })?;
            if failed {
                return Err(span.unmapped());
            }
            self.count(&span, span.len, DmaAccess::Read);
            done += usize::try_from(span.len).unwrap_or(usize::MAX).max(1);
        }
        Ok(())
    }

    /// Stores a word with one atomic access, after everything that was written before is visible.
    ///
    /// # Errors
    /// The fault; `address` must be a multiple of 4.
    pub(crate) fn store32(&mut self, address: u64, value: u32) -> Result<(), Fault> {
        self.store(address, 4, &|piece| {
            piece.store(value.to_le(), 0, Ordering::Release).is_ok()
        })
    }

    /// As [`Engine::store32`] with 8 bytes; `address` must be a multiple of 8.
    ///
    /// # Errors
    /// The fault.
    pub(crate) fn store64(&mut self, address: u64, value: u64) -> Result<(), Fault> {
        self.store(address, 8, &|piece| {
            piece.store(value.to_le(), 0, Ordering::Release).is_ok()
        })
    }

    /// Loads a word with one atomic access; what is read afterwards is not older.
    ///
    /// # Errors
    /// The fault; `address` must be a multiple of 4.
    pub(crate) fn load32(&mut self, address: u64) -> Result<u32, Fault> {
        self.word(address, 4, Touch::Load, &|piece| {
            piece.load(0, Ordering::Acquire).ok().map(u32::from_le)
        })
    }

    /// As [`Engine::load32`] with 8 bytes; `address` must be a multiple of 8.
    ///
    /// # Errors
    /// The fault.
    pub(crate) fn load64(&mut self, address: u64) -> Result<u64, Fault> {
        self.word(address, 8, Touch::Load, &|piece| {
            piece.load(0, Ordering::Acquire).ok().map(u64::from_le)
        })
    }

    /// One try at an atomic operation, after everything that was written before is visible.
    ///
    /// # Errors
    /// The fault; `address` must be a multiple of the operation's width.
    pub(crate) fn atomic(&mut self, address: u64, atomic: &Atomic) -> Result<Outcome, Fault> {
        self.word(address, atomic.bytes(), Touch::Change, &|piece| {
            atomic.apply(piece)
        })
    }

    fn store(
        &mut self,
        address: u64,
        len: u64,
        f: &dyn Fn(&VolatileSlice<'_>) -> bool,
    ) -> Result<(), Fault> {
        self.word(address, len, Touch::Store, &|piece| f(piece).then_some(()))
    }

    /// Calls `f` with the `len` bytes at `address`, which it answers with `None` if it cannot use them.
    fn word<T>(
        &mut self,
        address: u64,
        len: u64,
        touch: Touch,
        f: &dyn Fn(&VolatileSlice<'_>) -> Option<T>,
    ) -> Result<T, Fault> {
        end(address, len)?;
        self.refresh();
        let span = self.span(address, len)?;
        let _entry = span.enter(self.reach.token)?;
        if touch != Touch::Store {
            span.readable(len)?;
        }
        span.writable(len)?;
        let access = touch.access();
        // Bulk data may have gone past the cache: no store of ours may overtake it.
        fence(Ordering::SeqCst);
        let mut result = None;
        span.pieces(span.len, access, &mut |_, piece| result = f(&piece))?;
        self.count(&span, span.len, access);
        result.ok_or_else(|| span.unmapped())
    }
}

/// `address + len`, which must not wrap.
fn end(address: u64, len: u64) -> Result<u64, Fault> {
    let wrapped = fault(QueueFault::BadField, address);
    address.checked_add(len).ok_or(wrapped)
}

impl Engine<'_> {
    /// Copies `len` bytes as if all were read before any is written.
    ///
    /// # Errors
    /// [`Stop`]; the copy is then incomplete.
    pub(crate) fn copy(
        &mut self,
        gate: &dyn Gate,
        source: u64,
        destination: u64,
        len: u64,
    ) -> Result<(), Stop> {
        let source_end = end(source, len)?;
        end(destination, len)?;
        if len > CHUNK {
            self.refresh();
            self.check(source, len)?;
            self.check(destination, len)?;
        }
        if source < destination && destination < source_end {
            return self.copy_backward(gate, source, destination, len);
        }
        let mut done = 0;
        while done < len {
            gate.pass()?;
            self.refresh();
            let most = CHUNK.min(len - done);
            let from = self.span(source + done, most)?;
            let to = self.span(destination + done, most)?;
            let len = from.len.min(to.len);
            let parts = self.chunk(&from, &to, len)?;
            self.cost.add(len, &parts);
            done += len.max(1);
        }
        self.renew(destination, done)
    }

    /// All of a range has new contents: chunks alone do not make good a line that lies in two of them.
    fn renew(&self, address: u64, len: u64) -> Result<(), Stop> {
        let mut done = 0;
        while len > CHUNK && done < len {
            let span = self.span(address.saturating_add(done), len - done)?;
            span.renewed(span.len);
            done += span.len.max(1);
        }
        Ok(())
    }

    /// The same from the last byte to the first, for a destination that begins inside the source.
    fn copy_backward(
        &mut self,
        gate: &dyn Gate,
        source: u64,
        destination: u64,
        len: u64,
    ) -> Result<(), Stop> {
        let mut rest = len;
        while rest > 0 {
            gate.pass()?;
            self.refresh();
            let mut start = rest - rest.min(CHUNK);
            loop {
                let from = self.span(source + start, rest - start)?;
                let to = self.span(destination + start, rest - start)?;
                let len = from.len.min(to.len);
                if start + len >= rest {
                    let parts = self.chunk(&from, &to, len)?;
                    self.cost.add(len, &parts);
                    break;
                }
                // The piece ends at a border of HBM: the one behind the border comes first.
                start += len.max(1);
            }
            rest = start;
        }
        self.renew(destination, len)
    }

    /// Copies `len` bytes from one place to another; gives what limits that.
    fn chunk(&self, from: &Span<'_>, to: &Span<'_>, len: u64) -> Result<[Part; 2], Fault> {
        let _from_entry = from.enter(self.reach.token)?;
        let _to_entry = to.enter(self.reach.token)?;
        from.readable(len)?;
        to.writable(len)?;
        match (&from.owner, &to.owner) {
            (Owner::Ram(dma), Owner::Ram(_)) => {
                let copied = dma.copy(from.address, to.address, len);
                copied.map_err(|error| dma_fault(error, from.address))?;
            }
            (Owner::Hbm(..), _) => {
                let mut done = Ok(());
                from.pieces(len, DmaAccess::Read, &mut |_, slice| {
                    done = to.pieces(len, DmaAccess::Write, &mut |at, piece| {
                        if let Ok(part) = slice.subslice(at, piece.len()) {
                            part.copy_to_volatile_slice(piece);
                        }
                    });
                })?;
                done?;
            }
            (_, Owner::Hbm(..)) => {
                let mut done = Ok(());
                to.pieces(len, DmaAccess::Write, &mut |_, slice| {
                    done = from.pieces(len, DmaAccess::Read, &mut |at, piece| {
                        if let Ok(part) = slice.subslice(at, piece.len()) {
                            piece.copy_to_volatile_slice(part);
                        }
                    });
                })?;
                done?;
            }
        }
        self.count(from, len, DmaAccess::Read);
        self.count(to, len, DmaAccess::Write);
        to.renewed(len);
        Ok([self.part(from), self.part(to)])
    }

    /// Fills `len` bytes with a pattern that starts at `destination`.
    ///
    /// # Errors
    /// [`Stop`]; the fill is then incomplete.
    pub(crate) fn fill(
        &mut self,
        gate: &dyn Gate,
        destination: u64,
        pattern: [u8; 4],
        len: u64,
    ) -> Result<(), Stop> {
        end(destination, len)?;
        if len > CHUNK {
            self.refresh();
            self.check(destination, len)?;
        }
        let mut block = [0; 4096];
        for (to, from) in block.iter_mut().zip(pattern.iter().cycle()) {
            *to = *from;
        }
        let mut done = 0;
        while done < len {
            gate.pass()?;
            self.refresh();
            let span = self.span(destination + done, CHUNK.min(len - done))?;
            let entry = span.enter(self.reach.token)?;
            span.writable(span.len)?;
            span.pieces(span.len, DmaAccess::Write, &mut |at, piece| {
                let mut filled = 0;
                while filled < piece.len() {
                    // A piece may begin anywhere in the pattern.
                    let phase = (usize::try_from(done % 4).unwrap_or(0) + at + filled) % 4;
                    let part = block.get(phase..).unwrap_or_default();
                    match piece.write(part, filled) {
                        Ok(count) if count > 0 => filled += count,
                        _ => break,
                    }
                }
            })?;
            let (len, part) = (span.len, self.part(&span));
            self.count(&span, len, DmaAccess::Write);
            span.renewed(len);
            drop(entry);
            self.cost.add(len, &[part]);
            done += len.max(1);
        }
        self.renew(destination, done)
    }

    /// Copies a box of elements row by row, the first row first; each row as [`Engine::copy`] does it.
    ///
    /// # Errors
    /// [`Stop`]; the copy is then incomplete.
    pub(crate) fn copy_window(&mut self, gate: &dyn Gate, window: &Window) -> Result<(), Stop> {
        let [columns, rows, slices] = window.extent;
        for z in 0..slices {
            for y in 0..rows {
                let source = window.source.row(window.element, y, z)?;
                let destination = window.destination.row(window.element, y, z)?;
                self.copy(gate, source, destination, columns * window.element)?;
            }
        }
        Ok(())
    }
}

impl Plane {
    /// Address of the first element of the box in row `y` of slice `z` of the box.
    fn row(&self, element: u64, y: u64, z: u64) -> Result<u64, Fault> {
        let [x0, y0, z0] = self.origin;
        // Of 11, 28 and 4 bits, 14, 19 and 4 bits: far below 2^64.
        let elements = (z0 + z) * self.slice_pitch + (y0 + y) * self.pitch + x0;
        end(self.address, elements * element)
    }
}
