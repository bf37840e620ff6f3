//! What atomic operations make of a value, and doing them on memory.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use numagpu_spec::sdma::{AtomicOp, PollFunction};
use vm_memory::{VolatileMemory, VolatileSlice};

/// Most tries against others that write the same word, before the worker looks whether it has to stop.
const TRIES: usize = 64;

/// An atomic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Atomic {
    /// Which.
    pub op: AtomicOp,
    /// 64 bits, not 32. Operations on 32 bits leave the upper halves of operand and comparand unused.
    pub wide: bool,
    /// First operand.
    pub operand: u64,
    /// What a compare-and-swap compares with.
    pub comparand: u64,
}

/// How a try ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// The comparison does not hold; nothing is stored.
    Differs,
    /// Others were faster each time; nothing is stored.
    Lost,
}

impl Atomic {
    /// Bytes of memory that it works on.
    pub fn bytes(&self) -> u64 {
        if self.wide { 8 } else { 4 }
    }

    /// What memory that has `old` has afterwards; `None` if the comparison does not hold.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "narrow operations use the low halves"
    )]
    fn result(&self, old: u64) -> Option<u64> {
        if self.wide {
            return result64(self.op, old, self.operand, self.comparand);
        }
        let (operand, comparand) = (self.operand as u32, self.comparand as u32);
        result32(self.op, old as u32, operand, comparand).map(u64::from)
    }

    /// Does it at the start of `piece`; `None` if the piece is too short, or not aligned in the host.
    #[allow(
        clippy::cast_possible_truncation,
        reason = "a narrow result has 32 bits"
    )]
    pub(crate) fn apply(&self, piece: &VolatileSlice<'_>) -> Option<Outcome> {
        if self.wide {
            let word = piece.get_atomic_ref::<AtomicU64>(0).ok()?;
            let load = || u64::from_le(word.load(Ordering::SeqCst));
            return Some(self.attempt(load, |old, new| {
                let (old, new) = (old.to_le(), new.to_le());
                let swapped = word.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed);
                swapped.is_ok()
            }));
        }
        let word = piece.get_atomic_ref::<AtomicU32>(0).ok()?;
        let load = || u64::from(u32::from_le(word.load(Ordering::SeqCst)));
        Some(self.attempt(load, |old, new| {
            let (old, new) = ((old as u32).to_le(), (new as u32).to_le());
            let swapped = word.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed);
            swapped.is_ok()
        }))
    }

    fn attempt(&self, load: impl Fn() -> u64, swap: impl Fn(u64, u64) -> bool) -> Outcome {
        for _ in 0..TRIES {
            let old = load();
            let Some(new) = self.result(old) else {
                return Outcome::Differs;
            };
            if swap(old, new) {
                return Outcome::Done;
            }
        }
        Outcome::Lost
    }
}

macro_rules! results {
    ($name:ident $unsigned:ty) => {
        fn $name(
            op: AtomicOp,
            old: $unsigned,
            operand: $unsigned,
            comparand: $unsigned,
        ) -> Option<$unsigned> {
            let signed = (old.cast_signed(), operand.cast_signed());
            Some(match op {
                AtomicOp::Swap => operand,
                AtomicOp::CompareSwap if old == comparand => operand,
                AtomicOp::CompareSwap => return None,
                AtomicOp::Add => old.wrapping_add(operand),
                AtomicOp::Sub => old.wrapping_sub(operand),
                AtomicOp::MinSigned => signed.0.min(signed.1).cast_unsigned(),
                AtomicOp::MinUnsigned => old.min(operand),
                AtomicOp::MaxSigned => signed.0.max(signed.1).cast_unsigned(),
                AtomicOp::MaxUnsigned => old.max(operand),
                AtomicOp::And => old & operand,
                AtomicOp::Or => old | operand,
                AtomicOp::Xor => old ^ operand,
                AtomicOp::Increment if old >= operand => 0,
                AtomicOp::Increment => old.wrapping_add(1),
                AtomicOp::Decrement if old == 0 || old > operand => operand,
                AtomicOp::Decrement => old.wrapping_sub(1),
            })
        }
    };
}

results!(result32 u32);
results!(result64 u64);

/// Whether a polled value compares with the reference as asked.
pub(crate) fn holds(function: PollFunction, value: u32, reference: u32) -> bool {
    match function {
        PollFunction::Always => true,
        PollFunction::Less => value < reference,
        PollFunction::LessEqual => value <= reference,
        PollFunction::Equal => value == reference,
        PollFunction::NotEqual => value != reference,
        PollFunction::GreaterEqual => value >= reference,
        PollFunction::Greater => value > reference,
    }
}
