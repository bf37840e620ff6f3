//! Memory errors, of which there are none, and pages that are taken out of use.

use numagpu_spec::regs::{
    self, OwnerCommand, OwnerResult, QueueFault, RAS_PAGE, RasCommand, RasKind, RasResult, ras,
};

use super::{Drive, QUEUE, TOKEN};
use crate::device::{Device, Outcome};

/// A command that does not exist.
const NO_COMMAND: u32 = 99;

/// Sends a command about an address and gives its result.
fn command(device: &Device, command: u32, address: u64) -> Option<RasResult> {
    device.write(ras::BASE, ras::ADDRESS, address);
    device.write(ras::BASE, ras::COMMAND, command.into());
    RasResult::from_code(device.read32(ras::BASE, ras::RESULT))
}

impl Drive {
    /// Nobody put errors in, so there are none.
    pub(super) fn health(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let read = |reg| device.read32(ras::BASE, reg);
        let (correctable, uncorrectable) = (read(ras::CORRECTABLE), read(ras::UNCORRECTABLE));
        let (poisoned, last) = (read(ras::POISONED), read(ras::LAST_KIND));
        let seen = format!(
            "{correctable} correctable, {uncorrectable} uncorrectable, {poisoned} poisoned"
        );
        if (correctable, uncorrectable, poisoned) != (0, 0, 0) || last != RasKind::None.code() {
            return Err(format!("{seen}, last kind {last}"));
        }
        Ok(format!("works: {seen}"))
    }

    /// A page that is taken out of use is closed to engines, and its neighbours are not. That lasts as long as the
    /// device does: the page is one that nothing else uses, and it may have been retired for a guest before.
    pub(super) fn retire(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let device = &gpu.device;
        let hbm = gpu.first()?;
        let [_, _, last] = hbm.places();
        let page = hbm.range.base + last - 2 * RAS_PAGE;
        let retire = RasCommand::Retire.code();
        let outside = gpu
            .partitions
            .iter()
            .map(|partition| partition.range.end())
            .max();
        let refused = [
            (command(device, retire, 0), RasResult::OutOfRange),
            (
                command(device, retire, outside.unwrap_or(u64::MAX)),
                RasResult::OutOfRange,
            ),
            (command(device, NO_COMMAND, page), RasResult::BadCommand),
        ];
        if let Some((seen, wanted)) = refused.iter().find(|(seen, it)| *seen != Some(*it)) {
            return Err(format!("{seen:?} instead of {wanted:?}"));
        }
        let result = command(device, retire, page + 8);
        if result != Some(RasResult::Ok) {
            return Err(format!("retirement of {page:#x}: {result:?}"));
        }
        let count = device.read32(ras::BASE, ras::RETIRED);
        let entry = |number: u32| {
            device.write(ras::BASE, ras::INDEX, number.into());
            device.read(ras::BASE, ras::ENTRY)
        };
        let listed: Vec<u64> = (0..count.min(regs::MAX_RETIRED)).map(entry).collect();
        if !listed.contains(&page) || entry(count) != regs::NO_ENTRY {
            return Err(format!("{page:#x} is not the last of {listed:x?}"));
        }
        device.expect(0, OwnerCommand::Claim, TOKEN, OwnerResult::Ok)?;
        let fill = |address: u64| -> Outcome<_> {
            let mut queue = self.queue(index, 0, QUEUE, TOKEN)?;
            queue.push(&numagpu_spec::sdma::const_fill(address, 1, RAS_PAGE));
            queue.push_fence(7, 1);
            queue.go();
            Ok(queue)
        };
        let reached = (|| {
            for neighbour in [page - RAS_PAGE, page + RAS_PAGE] {
                fill(neighbour)?.wait_fence(7, 1)?;
            }
            let queue = fill(page)?;
            queue.wait_stopped(QueueFault::Retired)?;
            let address = queue.read(regs::queue::FAULT_ADDR);
            queue.reset();
            if address != page {
                return Err(format!("fault at {address:#x} instead of {page:#x}"));
            }
            Ok(())
        })();
        gpu.release(0, TOKEN)?;
        reached?;
        Ok(format!("works: {page:#x} faults, {count} retired"))
    }
}
