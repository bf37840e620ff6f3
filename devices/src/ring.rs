//! Reading ahead from a ring, across its wrap.

use crate::engine::{Engine, Stop};
use crate::packet::HEADER_WORDS;
use crate::queue::Run;

/// Words of the ring read at once.
const FETCH_WORDS: usize = 1024;

/// Words read ahead from the ring.
pub(crate) struct Ring {
    words: Box<[u32]>,
    bytes: Box<[u8]>,
    /// Position of the first word, unwrapped.
    start: u64,
    /// Words that are valid.
    len: usize,
}

impl Default for Ring {
    fn default() -> Ring {
        Ring {
            words: vec![0; FETCH_WORDS].into(),
            bytes: vec![0; 4 * FETCH_WORDS].into(),
            start: 0,
            len: 0,
        }
    }
}

impl Ring {
    /// Words from `position` on: all of the `available` bytes, or at least [`HEADER_WORDS`] words.
    pub(crate) fn words(
        &mut self,
        run: &Run,
        engine: &mut Engine<'_>,
        position: u64,
        available: u64,
    ) -> Result<&[u32], Stop> {
        let wanted = usize::try_from(available / 4).unwrap_or(usize::MAX);
        let skip = position
            .checked_sub(self.start)
            .and_then(|bytes| usize::try_from(bytes / 4).ok());
        let have = skip.map_or(0, |skip| self.len.saturating_sub(skip));
        let first = match skip {
            Some(skip) if have >= wanted.min(HEADER_WORDS) && have > 0 => skip,
            _ => {
                self.fetch(run, engine, position, wanted.min(FETCH_WORDS))?;
                0
            }
        };
        Ok(self.words.get(first..self.len).unwrap_or_default())
    }

    /// Forgets what was read: another run may have another ring.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    fn fetch(
        &mut self,
        run: &Run,
        engine: &mut Engine<'_>,
        position: u64,
        words: usize,
    ) -> Result<(), Stop> {
        self.len = 0;
        let size = u64::from(run.setup.ring_size).max(1);
        let to_end = usize::try_from(size - position % size).unwrap_or(usize::MAX);
        let bytes = self.bytes.get_mut(..4 * words).unwrap_or_default();
        let first = to_end.min(bytes.len());
        if let Some((head, tail)) = bytes.split_at_mut_checked(first) {
            engine.read(run.ring_address(position), head)?;
            engine.read(run.setup.ring_base, tail)?;
        }
        for (word, bytes) in self.words.iter_mut().zip(bytes.chunks_exact(4)) {
            *word = bytes.try_into().map_or(0, u32::from_le_bytes);
        }
        self.start = position;
        self.len = words;
        Ok(())
    }
}
