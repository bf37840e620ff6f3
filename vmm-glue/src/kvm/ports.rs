//! Configuration space through I/O ports (PCI Local Bus 3.0 section 3.2.2.3.2, configuration mechanism #1): one register
//! says of which function and where, the other one is the data there.

use std::sync::atomic::{AtomicU32, Ordering};

use super::bridge::Bdf;

/// `CONFIG_ADDRESS`, 4 bytes. The bytes of it are ports of their own, such as CF9h, which resets PCs.
pub const CONFIG_ADDRESS: u16 = 0xcf8;
/// `CONFIG_DATA`, 4 bytes, of which any part may be accessed.
pub const CONFIG_DATA: u16 = 0xcfc;
const BYTES: u16 = 4;

/// Bit 31 of the address: accesses to the data are to configuration space.
const ENABLE: u32 = 1 << 31;
/// What the address keeps: enable, bus, device, function, and a multiple of 4 below 256. The other bits read as zero.
const KEPT: u32 = ENABLE | 0x00ff_fffc;

/// What an access to a port is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    /// The address itself.
    Address,
    /// Configuration space from an offset on.
    Config(Bdf, u32),
    /// Data, but more than 4 bytes or past the last one.
    Nobody,
}

/// The address, which all processors share. Who uses the pair holds a lock in the guest.
#[derive(Debug, Default)]
pub(super) struct ConfigAddress(AtomicU32);

impl ConfigAddress {
    pub(super) fn get(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, value: u32) {
        self.0.store(value & KEPT, Ordering::Release);
    }

    /// What an access of `len` bytes is for; none if it is an ordinary access to I/O space.
    pub(super) fn port(&self, port: u16, len: usize) -> Option<Port> {
        if port == CONFIG_ADDRESS && len == usize::from(BYTES) {
            return Some(Port::Address);
        }
        let byte = port.checked_sub(CONFIG_DATA).filter(|it| *it < BYTES)?;
        let address = self.get();
        if address & ENABLE == 0 || len == 0 {
            return None;
        }
        if len > usize::from(BYTES - byte) {
            return Some(Port::Nobody);
        }
        let [register, function, bus, _] = address.to_le_bytes();
        let bdf = Bdf {
            bus,
            device: function >> 3,
            function: function & 7,
        };
        Some(Port::Config(bdf, u32::from(register) + u32::from(byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BDF: Bdf = Bdf {
        bus: 0xa5,
        device: 0x1e,
        function: 3,
    };
    const ADDRESS: u32 = 0x80a5_f3d8;

    #[test]
    fn an_address_names_a_function_and_every_part_of_a_register() {
        let address = ConfigAddress::default();
        address.set(ADDRESS);
        for byte in 0..4_u16 {
            for len in 1..=4 {
                let wanted = match usize::from(byte) + len {
                    ..=4 => Port::Config(BDF, 0xd8 + u32::from(byte)),
                    _ => Port::Nobody,
                };
                assert_eq!(address.port(CONFIG_DATA + byte, len), Some(wanted));
            }
        }
        assert_eq!(address.port(CONFIG_DATA, 8), Some(Port::Nobody));
        assert_eq!(address.port(CONFIG_DATA, 0), None);
        assert_eq!(address.port(CONFIG_DATA + 4, 1), None);
    }

    #[test]
    fn the_address_is_a_register_of_four_bytes_and_no_less() {
        let address = ConfigAddress::default();
        assert_eq!(address.port(CONFIG_ADDRESS, 4), Some(Port::Address));
        for (port, len) in [(0, 1), (0, 2), (0, 8), (1, 1), (2, 2), (3, 1), (3, 4)] {
            assert_eq!(address.port(CONFIG_ADDRESS + port, len), None);
        }
        assert_eq!(address.port(CONFIG_ADDRESS - 4, 4), None);
        assert_eq!(address.port(0, 4), None);
        assert_eq!(address.port(u16::MAX, 4), None);
    }

    #[test]
    fn reserved_bits_read_as_zero_and_without_the_enable_bit_data_are_ordinary_ports() {
        let address = ConfigAddress::default();
        assert_eq!((address.get(), address.port(CONFIG_DATA, 4)), (0, None));
        address.set(u32::MAX);
        assert_eq!(address.get(), 0x80ff_fffc);
        address.set(ADDRESS & !ENABLE);
        assert_eq!(address.port(CONFIG_DATA, 4), None);
    }
}
