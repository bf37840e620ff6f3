//! A buffer between a device and memory that is moved by messages.

/// Bytes that stand for memory at an address, and lie in the host as that address is aligned to 8.
#[derive(Debug, Default)]
pub struct Bounce {
    space: Vec<u8>,
    start: usize,
    len: usize,
    address: u64,
}

impl Bounce {
    /// `len` zero bytes for the memory at `address`.
    pub fn begin(&mut self, address: u64, len: usize) {
        self.space.clear();
        self.space.resize(len.saturating_add(16), 0);
        let odd = usize::try_from(address % 8).unwrap_or(0);
        self.start = self.space.as_ptr().align_offset(8) + odd;
        self.len = len;
        self.address = address;
    }

    /// First address.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Says that the bytes are for another address.
    pub fn readdress(&mut self, address: u64) {
        self.address = address;
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        let bytes = self.space.get(self.start..).unwrap_or_default();
        bytes.get(..self.len).unwrap_or_default()
    }

    /// The bytes, to be changed.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.space.get_mut(self.start..).unwrap_or_default();
        bytes.get_mut(..self.len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_aligned_as_their_addresses_are() {
        let mut bounce = Bounce::default();
        for address in 0..64_u64 {
            for len in [0, 1, 4, 8, 100, 4096] {
                bounce.begin(address, len);
                bounce.bytes_mut().fill(7);
                assert_eq!(bounce.bytes().len(), len);
                let at = bounce.bytes().as_ptr().addr() as u64;
                assert_eq!((at - address) % 8, 0);
            }
        }
    }
}
