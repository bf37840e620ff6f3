//! MSI-X of a function whose table the VMM keeps (PCI Local Bus 3.0 section 6.8).

use std::sync::{Mutex, MutexGuard, PoisonError};

use numagpu_devices::bus::InterruptSink;

use super::msi::{Message, MessageLine};

/// Bytes of an entry of the table.
const ENTRY: usize = 16;
/// Capability id.
pub(super) const CAPABILITY: u8 = 0x11;
/// Bit of an entry's last word that masks its vector.
const MASKED: u32 = 1;
/// Bits of the upper half of message control.
const ENABLE: u8 = 1 << 7;
const FUNCTION_MASK: u8 = 1 << 6;

/// Where a function says that its MSI-X is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixCapability {
    /// Offset in configuration space.
    pub offset: u32,
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR and offset of the table.
    pub table: (u8, u64),
    /// BAR and offset of the pending bits.
    pub pending: (u8, u64),
}

impl MsixCapability {
    /// Reads the capability at `offset` of a configuration space that `read` reads.
    pub(super) fn read(offset: u32, read: impl Fn(u32, &mut [u8])) -> Option<MsixCapability> {
        let mut bytes = [0; 12];
        read(offset, &mut bytes);
        let [id, _, control @ ..] = bytes;
        let [low, high, t0, t1, t2, t3, p0, p1, p2, p3] = control;
        let place = |bytes| {
            let word = u32::from_le_bytes(bytes);
            let bar = u8::try_from(word & 7).unwrap_or(0);
            (bar, u64::from(word & !7))
        };
        (id == CAPABILITY).then(|| MsixCapability {
            offset,
            vectors: (u16::from_le_bytes([low, high]) & 0x7ff) + 1,
            table: place([t0, t1, t2, t3]),
            pending: place([p0, p1, p2, p3]),
        })
    }

    /// Offset of the upper half of message control.
    pub(super) fn control(&self) -> u32 {
        self.offset.saturating_add(3)
    }
}

/// A vector.
struct Vector {
    /// As the guest sees it: address, data, control.
    entry: [u8; ENTRY],
    pending: bool,
    line: Box<dyn MessageLine>,
    /// What the line sends.
    routed: Option<Message>,
}

/// An entry after reset: masked.
const RESET: [u8; ENTRY] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];

impl Vector {
    fn message(&self) -> Message {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, ..] = self.entry;
        Message {
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        }
    }

    fn is_masked(&self) -> bool {
        let [.., c0, c1, c2, c3] = self.entry;
        u32::from_le_bytes([c0, c1, c2, c3]) & MASKED != 0
    }

    /// The vector may be sent now: its line gets its message, and what is pending goes out.
    fn open(&mut self) {
        let message = self.message();
        if self.routed != Some(message) {
            self.routed = match self.line.route(message) {
                Ok(()) => Some(message),
                Err(error) => {
                    tracing::warn!(%error, ?message, "MSI-X message cannot be routed");
                    None
                }
            };
        }
        if self.pending {
            self.pending = false;
            self.send();
        }
    }

    fn send(&self) -> bool {
        self.routed.is_some() && self.line.send()
    }
}

struct State {
    enabled: bool,
    function_masked: bool,
    vectors: Vec<Vector>,
}

impl State {
    fn is_open(&self) -> bool {
        self.enabled && !self.function_masked
    }
}

/// Table, pending bits and masks of one function, and the [`InterruptSink`] that the function gets.
pub struct Msix {
    state: Mutex<State>,
}

impl Msix {
    /// MSI-X after reset, with a vector for each line.
    #[must_use]
    pub fn new(lines: Vec<Box<dyn MessageLine>>) -> Msix {
        let vector = |line| Vector {
            entry: RESET,
            pending: false,
            line,
            routed: None,
        };
        Msix {
            state: Mutex::new(State {
                enabled: false,
                function_masked: false,
                vectors: lines.into_iter().map(vector).collect(),
            }),
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let bytes = state.vectors.iter().flat_map(|vector| vector.entry);
        fill(data, bytes, offset);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let bytes = state.vectors.chunks(8).map(|eight| {
            let bits = eight
                .iter()
                .zip(0..)
                .map(|(it, n)| u8::from(it.pending) << n);
            bits.fold(0, |all, bit| all | bit)
        });
        fill(data, bytes, offset);
    }

    /// Writes the table. A vector that is unmasked by it sends what is pending.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let open = state.is_open();
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        let end = offset.saturating_add(data.len());
        for (number, vector) in state.vectors.iter_mut().enumerate() {
            let start = number * ENTRY;
            if end <= start || start + ENTRY <= offset {
                continue;
            }
            for (at, byte) in vector.entry.iter_mut().enumerate() {
                let given = (start + at).checked_sub(offset);
                if let Some(new) = given.and_then(|at| data.get(at)) {
                    *byte = *new & writable(at);
                }
            }
            if open && !vector.is_masked() {
                vector.open();
            }
        }
    }

    /// The upper half of message control has this value now.
    pub fn set_control(&self, value: u8) {
        let mut state = self.lock();
        let enabled = value & ENABLE != 0;
        let function_masked = value & FUNCTION_MASK != 0;
        if (state.enabled, state.function_masked) == (enabled, function_masked) {
            return;
        }
        (state.enabled, state.function_masked) = (enabled, function_masked);
        if state.is_open() {
            let open = state.vectors.iter_mut().filter(|it| !it.is_masked());
            open.for_each(Vector::open);
        }
    }

    /// All vectors are masked, with nothing pending, and MSI-X is off: after a reset of the function.
    pub fn reset(&self) {
        let mut state = self.lock();
        (state.enabled, state.function_masked) = (false, false);
        for vector in &mut state.vectors {
            vector.entry = RESET;
            vector.pending = false;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writable bits of a byte of an entry: messages go to whole words, and of control only the mask bit is there.
fn writable(at: usize) -> u8 {
    match at {
        0 => 0xfc,
        1..12 => 0xff,
        12 => 1,
        _ => 0,
    }
}

/// Fills `data` with bytes from `offset` on, and zeros behind their end.
fn fill(data: &mut [u8], bytes: impl Iterator<Item = u8>, offset: u64) {
    data.fill(0);
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    for (to, from) in data.iter_mut().zip(bytes.skip(offset)) {
        *to = from;
    }
}

impl InterruptSink for Msix {
    fn trigger(&self, vector: u16) -> bool {
        let mut state = self.lock();
        if !state.enabled {
            return false;
        }
        let open = state.is_open();
        let Some(vector) = state.vectors.get_mut(usize::from(vector)) else {
            return false;
        };
        if !open || vector.is_masked() {
            vector.pending = true;
            return true;
        }
        vector.send()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kvm::MsiError;

    /// What was sent, by vector.
    type Sent = Arc<Mutex<Vec<(usize, Message)>>>;

    struct Line(usize, Option<Message>, Sent);

    impl MessageLine for Line {
        fn route(&mut self, message: Message) -> Result<(), MsiError> {
            self.1 = Some(message);
            Ok(())
        }

        fn send(&self) -> bool {
            self.2.lock().unwrap().push((self.0, self.1.unwrap()));
            true
        }
    }

    fn three() -> (Msix, Sent) {
        let sent = Sent::default();
        let line = |number| Box::new(Line(number, None, Arc::clone(&sent))) as Box<dyn MessageLine>;
        (Msix::new((0..3).map(line).collect()), sent)
    }

    fn message(data: u32) -> Message {
        Message {
            address: 0xfee0_1000,
            data,
        }
    }

    /// Writes an entry in the way Linux does.
    fn set(msix: &Msix, vector: u64, message: Message, control: u32) {
        let at = vector * 16;
        msix.write_table(at, &message.address.to_le_bytes()[..4]);
        msix.write_table(at + 4, &message.address.to_le_bytes()[4..]);
        msix.write_table(at + 8, &message.data.to_le_bytes());
        msix.write_table(at + 12, &control.to_le_bytes());
    }

    fn pending(msix: &Msix) -> u8 {
        let mut bits = [0xff; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits[1..], [0; 7]);
        bits[0]
    }

    fn taken(sent: &Sent) -> Vec<(usize, Message)> {
        std::mem::take(&mut sent.lock().unwrap())
    }

    #[test]
    fn a_message_goes_out_only_where_everything_is_open() {
        let (msix, sent) = three();
        set(&msix, 1, message(0x41), 0);
        assert!(!msix.trigger(1), "nobody listens while MSI-X is off");
        assert_eq!((pending(&msix), taken(&sent)), (0, vec![]));
        msix.set_control(ENABLE);
        assert!(msix.trigger(1));
        assert_eq!(taken(&sent), [(1, message(0x41))]);
        assert!(msix.trigger(0), "masked after reset, so it waits");
        assert_eq!((pending(&msix), taken(&sent)), (0b001, vec![]));
        assert!(!msix.trigger(3), "there is no such vector");
    }

    #[test]
    fn what_waits_goes_out_once_with_the_message_of_then() {
        let (msix, sent) = three();
        msix.set_control(ENABLE);
        set(&msix, 2, message(0x50), 1);
        msix.trigger(2);
        msix.trigger(2);
        assert_eq!(pending(&msix), 0b100);
        set(&msix, 2, message(0x51), 1);
        assert_eq!(taken(&sent), []);
        set(&msix, 2, message(0x51), 0);
        assert_eq!(
            (pending(&msix), taken(&sent)),
            (0, vec![(2, message(0x51))])
        );
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let (msix, sent) = three();
        set(&msix, 0, message(0x60), 0);
        set(&msix, 1, message(0x61), 0);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.trigger(1);
        msix.trigger(0);
        assert_eq!((pending(&msix), taken(&sent)), (0b011, vec![]));
        msix.set_control(ENABLE);
        assert_eq!(taken(&sent), [(0, message(0x60)), (1, message(0x61))]);
        assert_eq!(pending(&msix), 0);
    }

    #[test]
    fn a_message_changed_in_place_is_the_one_sent_next() {
        let (msix, sent) = three();
        msix.set_control(ENABLE);
        set(&msix, 0, message(1), 0);
        msix.write_table(8, &2_u32.to_le_bytes());
        msix.trigger(0);
        assert_eq!(taken(&sent), [(0, message(2))]);
    }

    #[test]
    fn a_reset_masks_everything_and_forgets_what_waits() {
        let (msix, sent) = three();
        msix.set_control(ENABLE | FUNCTION_MASK);
        set(&msix, 0, message(1), 0);
        msix.trigger(0);
        msix.reset();
        assert!(!msix.trigger(0));
        msix.set_control(ENABLE);
        assert_eq!((pending(&msix), taken(&sent)), (0, vec![]));
        let mut entry = [0xff; 16];
        msix.read_table(0, &mut entry);
        assert_eq!(entry, RESET);
    }

    #[test]
    fn only_the_bits_that_exist_are_kept_and_any_access_is_taken() {
        let (msix, _) = three();
        msix.write_table(0, &[0xff; 20]);
        let mut table = [0; 40];
        msix.read_table(0, &mut table);
        assert_eq!(
            table[..16],
            [&[0xfc][..], &[0xff; 11], &[1, 0, 0, 0]].concat()
        );
        assert_eq!(table[16..20], [0xfc, 0xff, 0xff, 0xff]);
        assert_eq!(table[20..32], RESET[4..]);
        msix.write_table(47, &[0xff; 9]);
        msix.write_table(u64::MAX, &[0xff; 9]);
        let mut behind = [0xaa; 4];
        msix.read_table(46, &mut behind);
        assert_eq!(behind, [0; 4]);
        msix.read_pending(u64::MAX, &mut behind);
        assert_eq!(behind, [0; 4]);
    }
}
