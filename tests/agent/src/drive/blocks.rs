//! What the device says that it has: blocks, packets, capabilities, a clock.

use std::time::{Duration, Instant};

use numagpu_spec::regs::{self, BlockId, IrqBits, clock, discovery, identity, topology};
use numagpu_spec::{pci, sdma};

use super::Drive;
use crate::device::{Device, Outcome};

/// How long the clock is watched.
const WATCH: Duration = Duration::from_millis(10);

/// Entries of `DISCOVERY` up to its end: code of the block, offset, stride, instances.
fn entries(device: &Device) -> Vec<[u32; 4]> {
    let entry = |index: u32| {
        let base = discovery::BASE + index * discovery::STRIDE;
        [
            discovery::BLOCK_ID,
            discovery::OFFSET,
            discovery::INSTANCE_STRIDE,
            discovery::COUNT,
        ]
        .map(|reg| device.read32(base, reg))
    };
    (0..discovery::BLOCK.count)
        .map(entry)
        .take_while(|[block, ..]| *block != BlockId::End.code())
        .collect()
}

/// Name and instances of every block that the device lists.
pub(super) fn list(device: &Device) -> Vec<(String, u32)> {
    let name = |code: u32| BlockId::from_code(code).map_or("unknown", BlockId::name);
    let entries = entries(device).into_iter();
    entries
        .map(|[block, _, _, count]| (name(block).to_owned(), count))
        .collect()
}

impl Drive {
    /// The list of blocks is the register map's, and has the counts that other registers give.
    pub(super) fn blocks(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let version = device.read32(identity::BASE, identity::VERSION);
        if version >> 16 != regs::VERSION >> 16 {
            return Err(format!("register map {version:#x}"));
        }
        let count = |block: &str| match block {
            "DISCOVERY" => u32::try_from(regs::BLOCKS.len()).unwrap_or(0),
            "LINK" => device.read32(topology::BASE, topology::LINK_COUNT),
            "PARTITION" => device.read32(identity::BASE, identity::PARTITION_COUNT),
            "QUEUE" => device.read32(identity::BASE, identity::QUEUE_COUNT),
            _ => 1,
        };
        let listed = entries(device);
        for block in regs::BLOCKS {
            let is_it = |[code, ..]: &&[u32; 4]| {
                BlockId::from_code(*code)
                    .is_some_and(|id| id.name().eq_ignore_ascii_case(block.name))
            };
            let wanted = [block.base, block.stride, count(block.name)];
            match listed.iter().find(is_it) {
                Some([_, rest @ ..]) if *rest == wanted => {}
                other => return Err(format!("{}: {other:x?}, not {wanted:x?}", block.name)),
            }
        }
        if listed.len() != regs::BLOCKS.len() {
            return Err(format!("{} blocks: {listed:x?}", listed.len()));
        }
        let packets = device.read(identity::BASE, identity::PACKETS);
        if let Some(lacking) = sdma::PACKETS
            .iter()
            .find(|packet| packets >> packet.op & 1 == 0)
        {
            return Err(format!("PACKETS {packets:#x} lacks {}", lacking.name));
        }
        let mode = device.read32(topology::BASE, topology::PARTITION_MODE);
        if mode != count("PARTITION") {
            return Err(format!("PARTITION_MODE {mode}"));
        }
        for value in [0x5555_aaaa, 0] {
            device.write(identity::BASE, identity::SCRATCH, value);
            if device.read(identity::BASE, identity::SCRATCH) != value {
                return Err(format!("SCRATCH does not hold {value:#x}"));
            }
        }
        Ok(format!(
            "works: {} blocks, {} opcodes",
            listed.len(),
            packets.count_ones()
        ))
    }

    /// The function's capabilities as the guest sees them. MSI-X has to be the documented one; the others are a VMM's as
    /// much as the device's.
    pub(super) fn capabilities(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let vectors = device.vectors().ok_or("no MSI-X capability")?;
        let said = device.read32(identity::BASE, identity::VECTOR_COUNT);
        if vectors != pci::VECTOR_COUNT || said != u32::from(vectors) {
            return Err(format!("{vectors} vectors in MSI-X, {said} in IDENTITY"));
        }
        let methods = device.attribute("reset_method");
        if !methods.split(' ').any(|method| method == "flr") {
            return Err(format!("reset methods {methods:?}"));
        }
        let (plain, extended) = device.capabilities();
        let hex = |ids: &[u16]| {
            let ids: Vec<String> = ids.iter().map(|id| format!("{id:02x}")).collect();
            ids.join(" ")
        };
        let has = |id: u16, name: &str| match extended.contains(&id) {
            true => name.to_owned(),
            false => format!("no {name}"),
        };
        // PCI Code and ID Assignment 1.11, sections 2 and 3: 1 is AER, 15h resizable BAR.
        Ok(format!(
            "works: capabilities {}, {}, {}",
            hex(&plain),
            has(0x01, "AER"),
            has(0x15, "resizable BAR")
        ))
    }

    /// The clock runs, about as fast as the guest's.
    pub(super) fn clock(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let now = || device.read(clock::BASE, clock::NS);
        let (start, first) = (Instant::now(), now());
        std::thread::sleep(WATCH);
        let ran = Duration::from_nanos(now().wrapping_sub(first));
        let passed = start.elapsed();
        // It is the host's clock, so a guest that was held up sees it go on.
        if ran < WATCH / 2 {
            return Err(format!("{ran:?} of {passed:?}"));
        }
        // Causes of interrupts have begun with none.
        let status = device.read32(regs::irq::BASE, regs::irq::STATUS);
        if IrqBits::from_bits_retain(status).intersects(IrqBits::FAULT | IrqBits::RAS) {
            return Err(format!("IRQ.STATUS {status:#x} before any work"));
        }
        let tenths = |time: Duration| time.as_micros() / 100;
        let text = |time: Duration| format!("{}.{} ms", tenths(time) / 10, tenths(time) % 10);
        Ok(format!(
            "works: {} while {} passed",
            text(ran),
            text(passed)
        ))
    }
}
