//! How much a client may map. A process has so many addresses, so many mappings (Linux: `vm.max_map_count`, 65,530) and
//! so many descriptors for all that it does; a client with sparse files could take them all, and then the process, with
//! the devices of all other clients, fails at the next allocation.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// Mappings and their bytes, of addresses and not of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// Mappings; each keeps one descriptor at most.
    pub mappings: u64,
    /// Bytes.
    pub bytes: u64,
}

/// Of one client. DMA maps of one file share a mapping, so these are files, but for parts of the very largest.
pub const OF_CLIENT: Extent = Extent {
    mappings: 2048,
    bytes: 16 << 40,
};

/// Of all clients; the process has addresses of 128 TiB.
pub const OF_PROCESS: Extent = Extent {
    mappings: 16_384,
    bytes: 96 << 40,
};

static PROCESS: Room = Room::new(OF_PROCESS);

/// More than may be mapped.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "{bytes:#x} bytes do not fit beside {} mapping(s) of {:#x} bytes; {} of {:#x} may be",
    have.mappings, have.bytes, most.mappings, most.bytes
)]
pub struct Full {
    /// Bytes to be mapped.
    pub bytes: u64,
    /// What is mapped.
    pub have: Extent,
    /// What may be.
    pub most: Extent,
}

/// What is taken of some extent.
#[derive(Debug)]
pub(super) struct Room {
    most: Extent,
    taken: Mutex<Extent>,
}

impl Default for Room {
    /// A client's.
    fn default() -> Self {
        Room::new(OF_CLIENT)
    }
}

impl Room {
    const fn new(most: Extent) -> Room {
        Room {
            most,
            taken: Mutex::new(Extent {
                mappings: 0,
                bytes: 0,
            }),
        }
    }

    fn take(&self, bytes: u64) -> Result<(), Full> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let more = Extent {
            mappings: taken.mappings.saturating_add(1),
            bytes: taken.bytes.saturating_add(bytes),
        };
        if more.mappings > self.most.mappings || more.bytes > self.most.bytes {
            return Err(Full {
                bytes,
                have: *taken,
                most: self.most,
            });
        }
        *taken = more;
        Ok(())
    }

    fn give(&self, bytes: u64) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.mappings = taken.mappings.saturating_sub(1);
        taken.bytes = taken.bytes.saturating_sub(bytes);
    }
}

/// A mapping's place in its client's and the process's room, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    client: Arc<Room>,
    bytes: u64,
}

impl Place {
    /// Takes a place for a mapping of so many bytes.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn take(client: &Arc<Room>, bytes: u64) -> Result<Place, Full> {
        client.take(bytes)?;
        if let Err(full) = PROCESS.take(bytes) {
            client.give(bytes);
            return Err(full);
        }
        let client = Arc::clone(client);
        Ok(Place { client, bytes })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        PROCESS.give(self.bytes);
        self.client.give(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_room_takes_what_fits_and_has_it_again_when_it_is_given_back() {
        let client = Arc::new(Room::new(Extent {
            mappings: 2,
            bytes: 100,
        }));
        let first = Place::take(&client, 60).unwrap();
        let full = Place::take(&client, 41).unwrap_err();
        assert_eq!(
            (full.bytes, full.have.bytes, full.most.bytes),
            (41, 60, 100)
        );
        let text = "0x29 bytes do not fit beside 1 mapping(s) of 0x3c bytes; 2 of 0x64 may be";
        assert_eq!(full.to_string(), text);
        let second = Place::take(&client, 40).unwrap();
        assert_eq!(Place::take(&client, 0).unwrap_err().have.mappings, 2);
        drop(first);
        assert!(Place::take(&client, u64::MAX).is_err());
        let third = Place::take(&client, 60).unwrap();
        drop((second, third));
        assert_eq!(*client.taken.lock().unwrap(), Extent::default());
    }

    #[test]
    fn what_the_process_refuses_is_not_taken_of_the_client() {
        let all = Extent {
            mappings: u64::MAX,
            bytes: u64::MAX,
        };
        let client = Arc::new(Room::new(all));
        let full = Place::take(&client, OF_PROCESS.bytes + 1).unwrap_err();
        assert_eq!(full.most, OF_PROCESS);
        assert_eq!(*client.taken.lock().unwrap(), Extent::default());
    }
}
