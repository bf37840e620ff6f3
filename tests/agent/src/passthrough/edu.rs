//! QEMU's `edu` device (QEMU `docs/specs/edu.rst`): a DMA engine with a buffer of 4 KiB and addresses of 28 bits.

use std::time::Duration;

use numagpu_topology::seen::DaxSeen;
use numagpu_vmm_glue::vfio::{DmaMap, Memory, VfioError};
use std::sync::Arc;
use vm_memory::Bytes as _;

use super::{Done, Passed, hbm, iommu_fault, names_of, note, words};
use crate::device::{Outcome, wait};

/// Vendor and device id.
const IDS: (u16, u16) = (0x1234, 0x11e8);
/// Registers.
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
/// Bits of `COMMAND`.
const START: u32 = 1;
const TO_MEMORY: u32 = 2;
/// Its buffer.
const BUFFER: u32 = 0x4_0000;
const BYTES: usize = 4096;

/// Where the device has the HBM that it reads and that it writes.
const FROM: u32 = 0x100_0000;
const TO: u32 = 0x200_0000;
/// Bytes of each, and where in the partition they are.
const SIZE: u64 = 2 << 20;
const OFFSET: u64 = 4 << 20;
/// Where in them the bytes are.
const AT: u32 = 0x3000;

/// HBM that is read and HBM that is written, with the maps of both.
struct Work {
    edu: Passed,
    memory: [Arc<Memory>; 2],
    maps: [DmaMap; 2],
}

/// What every run of the engine moves.
fn pattern(seed: u8) -> Vec<u8> {
    (0..BYTES)
        .map(|at| seed.wrapping_add(at.to_le_bytes()[0].wrapping_mul(7)))
        .collect()
}

impl Work {
    fn start(dax: &[DaxSeen]) -> Outcome<(Work, String)> {
        let edu = Passed::open(IDS)?;
        let id = edu.read32(0, 0);
        if id & 0xff != 0xed {
            return Err(format!("{id:#x} is not an edu device's identification"));
        }
        // From one GPU's HBM to another's where there are two.
        let (first, last) = (dax.first(), dax.last());
        let (first, last) = first.zip(last).ok_or("no dax device")?;
        let end = OFFSET + 2 * SIZE;
        let memory = [hbm(first, end)?, hbm(last, end)?];
        let [from, to] = &memory;
        let container = &edu.container;
        let maps = [
            container
                .map(FROM.into(), from, OFFSET, SIZE)
                .map_err(words)?,
            container
                .map(TO.into(), to, OFFSET + SIZE, SIZE)
                .map_err(words)?,
        ];
        let text = format!(
            "works: group {}, {} and {} pinned and mapped",
            edu.group(),
            first.name,
            last.name
        );
        Ok((Work { edu, memory, maps }, text))
    }

    /// One run of the engine.
    fn transfer(&self, from: u32, to: u32, direction: u32) -> Outcome {
        let edu = &self.edu;
        edu.write32(0, SOURCE, from);
        edu.write32(0, DESTINATION, to);
        edu.write32(0, COUNT, u32::try_from(BYTES).unwrap_or(0));
        edu.write32(0, COMMAND, START | direction);
        wait("the end of edu's DMA", || {
            (edu.read32(0, COMMAND) & START == 0).then_some(())
        })
    }

    /// Reads HBM into the device's buffer.
    fn load(&self) -> Outcome {
        self.transfer(FROM + AT, BUFFER, 0)
    }

    /// Writes the buffer to HBM.
    fn store(&self) -> Outcome {
        self.transfer(BUFFER, TO + AT, TO_MEMORY)
    }

    /// Puts bytes where the device reads (0) or writes (1).
    fn put(&self, place: usize, bytes: &[u8]) -> Outcome {
        let (memory, at) = self.place(place)?;
        memory.slice().write_slice(bytes, at).map_err(words)
    }

    /// Compares the bytes there.
    fn check(&self, place: usize, bytes: &[u8]) -> Outcome {
        let (memory, at) = self.place(place)?;
        let mut seen = vec![0; bytes.len()];
        memory.slice().read_slice(&mut seen, at).map_err(words)?;
        match seen.iter().zip(bytes).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(wrong) => Err(format!(
                "{:#x} instead of {:#x} at {wrong:#x}",
                seen.get(wrong).unwrap_or(&0),
                bytes.get(wrong).unwrap_or(&0)
            )),
        }
    }

    fn place(&self, place: usize) -> Outcome<(&Memory, usize)> {
        let memory = self.memory.get(place).ok_or("no such place")?;
        let offset = match place {
            0 => OFFSET,
            _ => OFFSET + SIZE,
        };
        let at = usize::try_from(offset + u64::from(AT)).map_err(words)?;
        Ok((memory, at))
    }

    /// From HBM to HBM by the device.
    fn moves(&self) -> Outcome<String> {
        self.put(0, &pattern(1))?;
        self.put(1, &[0; BYTES])?;
        self.load()?;
        self.check(1, &[0; BYTES])?;
        self.store()?;
        self.check(1, &pattern(1))?;
        Ok(format!("works: {BYTES} bytes"))
    }

    /// Addresses that are taken are refused, with the kernel's word.
    fn taken(&self) -> Outcome<String> {
        let [memory, _] = &self.memory;
        let again = self.edu.container.map(TO.into(), memory, OFFSET, SIZE);
        match again {
            Err(error @ VfioError::Map { .. }) => Ok(format!("works: {error}")),
            other => Err(format!("{other:?}")),
        }
    }

    /// What is unmapped is out of reach, and what is mapped is not.
    fn unmapped(self) -> Outcome<(Work, String)> {
        let Work { edu, memory, maps } = self;
        let [from, to] = maps;
        to.unmap().map_err(words)?;
        // A map that is dropped is gone as well: this one would be in the way of the next.
        let container = edu.container.clone();
        let other = (TO + 0x100_0000).into();
        let memory_of = |place: usize| memory.get(place).ok_or("no such place");
        drop(
            container
                .map(other, memory_of(0)?, OFFSET, SIZE)
                .map_err(words)?,
        );
        let again = container
            .map(other, memory_of(0)?, OFFSET, SIZE)
            .map_err(words)?;
        let work = Work {
            edu,
            maps: [from, again],
            memory,
        };
        work.put(0, &pattern(2))?;
        work.put(1, &pattern(3))?;
        work.load()?;
        work.store()?;
        // Whatever is still under way has arrived by then.
        std::thread::sleep(Duration::from_millis(200));
        work.check(1, &pattern(3))?;
        let fault = iommu_fault(u64::from(TO + AT)).ok_or("the kernel reports no IOMMU fault")?;
        Ok((work, format!("works: {fault}")))
    }

    /// What is mapped again is in reach again.
    fn mapped_again(mut self) -> Outcome<String> {
        let [_, to] = &self.memory;
        let map = self.edu.container.map(TO.into(), to, OFFSET + SIZE, SIZE);
        let [_, last] = &mut self.maps;
        *last = map.map_err(words)?;
        self.store()?;
        self.check(1, &pattern(2))?;
        Ok(String::new())
    }
}

/// HBM to HBM by a device that is passed through.
pub(super) fn run(dax: &[DaxSeen], done: &mut Vec<Done>) {
    let work = match Work::start(dax) {
        Ok((work, text)) => {
            note(done, names_of::EDU_MAP, Ok(text));
            work
        }
        Err(error) => {
            note(done, names_of::EDU_MAP, Err(error));
            return;
        }
    };
    if !note(done, names_of::EDU_DMA, work.moves())
        || !note(done, names_of::EDU_TAKEN, work.taken())
    {
        return;
    }
    match work.unmapped() {
        Ok((work, text)) => {
            note(done, names_of::EDU_UNMAPPED, Ok(text));
            note(done, names_of::EDU_AGAIN, work.mapped_again());
        }
        Err(error) => {
            note(done, names_of::EDU_UNMAPPED, Err(error));
        }
    }
}
