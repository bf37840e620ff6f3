//! Who owns HBM: refusals, transfers, leases, and what the next owner finds.

use std::time::{Duration, Instant};

use numagpu_spec::pci;
use numagpu_spec::regs::{
    self, IrqBits, OwnerCommand as C, OwnerEvent, OwnerLoss, OwnerResult as R, OwnerState,
    partition,
};

use super::{COPY, COPY_IN, Drive, FOREIGN, HELD, OTHER, SOURCE, TOKEN};
use crate::device::{Device, Outcome};
use crate::hbm::WINDOW;

/// Lease that a claim begins, longer than any hold-up between two commands, and the one that is left to end.
const LEASE_MS: u32 = 10_000;
const SHORT_LEASE_MS: u32 = 100;
/// A command that does not exist.
const NO_COMMAND: u32 = 99;

impl Drive {
    pub(super) fn scrubbed(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        gpu.each_partition(|gpu, partition| gpu.device.expect(partition, C::Claim, OTHER, R::Ok))?;
        for partition in &gpu.partitions {
            let peers = (0..self.gpus.len()).map(Drive::peer_offset);
            for offset in partition
                .places()
                .into_iter()
                .chain([COPY_IN, HELD])
                .chain(peers)
            {
                if offset + WINDOW as u64 <= partition.range.size {
                    partition.map(offset)?.check_zero(0, WINDOW)?;
                }
            }
        }
        gpu.each_partition(|gpu, partition| gpu.release(partition, OTHER))
    }

    /// Commands that the device has to refuse, of the first partition.
    pub(super) fn refusals(&self, index: usize) -> Outcome<String> {
        let device = &self.gpu(index)?.device;
        let mut refused = 0;
        let mut refuse = |commands: &[(C, u64, u64, R)]| -> Outcome {
            for (command, token, next, result) in commands {
                device.write(Device::partition(0), partition::NEW_TOKEN, *next);
                device.expect(0, *command, *token, *result)?;
                refused += 1;
            }
            Ok(())
        };
        refuse(&[
            (C::Claim, 0, 0, R::BadToken),
            (C::Release, TOKEN, 0, R::NotOwner),
            (C::Transfer, TOKEN, OTHER, R::NotOwner),
            (C::Renew, TOKEN, 0, R::NotOwner),
        ])?;
        device.expect(0, C::Claim, TOKEN, R::Ok)?;
        refuse(&[
            (C::Claim, TOKEN, 0, R::Busy),
            (C::Claim, OTHER, 0, R::Busy),
            (C::Claim, 0, 0, R::BadToken),
            (C::Release, OTHER, 0, R::NotOwner),
            (C::Renew, OTHER, 0, R::NotOwner),
            (C::Transfer, OTHER, OTHER, R::NotOwner),
            (C::Transfer, TOKEN, 0, R::BadToken),
        ])?;
        // No state is left behind: a token serves for one command.
        let base = Device::partition(0);
        device.write(base, partition::TOKEN, TOKEN);
        device.write(base, partition::COMMAND, NO_COMMAND.into());
        let unknown = device.read32(base, partition::RESULT);
        device.write(base, partition::COMMAND, C::Release.code().into());
        let bare = device.read32(base, partition::RESULT);
        if (unknown, bare) != (R::BadCommand.code(), R::NotOwner.code()) {
            return Err(format!(
                "results {unknown} and {bare} without command and token"
            ));
        }
        self.gpu(index)?.release(0, TOKEN)?;
        Ok(format!("works: {} refused", refused + 2))
    }

    /// A transfer keeps the contents and changes the owner.
    pub(super) fn transfer(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let device = &gpu.device;
        device.expect(0, C::Claim, TOKEN, R::Ok)?;
        let seed = 0x7a00_0000 | (index as u64) << 32;
        let hbm = gpu.first()?;
        hbm.map(COPY_IN)?.fill(0, COPY, seed);
        device.write(Device::partition(0), partition::NEW_TOKEN, OTHER);
        device.expect(0, C::Transfer, TOKEN, R::Ok)?;
        device.expect(0, C::Release, TOKEN, R::NotOwner)?;
        // The next owner's queue reads it.
        self.buffer.fill(SOURCE, COPY, 0xdead);
        let mut queue = self.queue(index, self.second(index)?, FOREIGN, OTHER)?;
        queue.push_copy(
            hbm.range.base + COPY_IN,
            self.physical + SOURCE as u64,
            COPY as u64,
        );
        queue.push_fence(0, 1);
        queue.go();
        queue.wait_fence(0, 1)?;
        queue.reset();
        self.buffer.check(SOURCE, COPY, seed)?;
        gpu.release(0, OTHER)?;
        Ok("works: contents kept, read by the next owner".to_owned())
    }

    /// A lease that is not renewed takes the partition from its owner, and tells by message.
    pub(super) fn lease(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let device = &gpu.device;
        let base = Device::partition(0);
        let left = || device.read32(base, partition::LEASE_LEFT_MS);
        let lease = |ms: u32| device.write(base, partition::LEASE_MS, ms.into());
        let listener = self.listen(index, pci::VECTOR_EVENTS, IrqBits::OWNERSHIP)?;
        lease(LEASE_MS);
        device.expect(0, C::Claim, TOKEN, R::Ok)?;
        let first = left();
        if first <= SHORT_LEASE_MS || first > LEASE_MS {
            return Err(format!("{first} ms left of {LEASE_MS}"));
        }
        gpu.first()?.map(COPY_IN)?.fill(0, COPY, 0x1ea5e);
        lease(SHORT_LEASE_MS);
        let start = Instant::now();
        device.expect(0, C::Renew, TOKEN, R::Ok)?;
        let second = left();
        if second > SHORT_LEASE_MS {
            return Err(format!("{second} ms left of {SHORT_LEASE_MS}"));
        }
        let heard = listener.heard()?;
        let lasted = start.elapsed();
        lease(0);
        // The device's clock and the guest's are not one.
        if lasted < Duration::from_millis(u64::from(SHORT_LEASE_MS) / 2) {
            return Err(format!("lost after {} ms", lasted.as_millis()));
        }
        let (state, loss) = (
            device.read32(base, partition::STATE),
            device.read32(base, partition::LOSS),
        );
        if state != OwnerState::Free.code() || loss != OwnerLoss::LeaseExpired.code() {
            return Err(format!("state {state}, loss {loss}"));
        }
        let expected = [
            OwnerEvent::Scrubbed,
            OwnerEvent::LeaseExpired,
            OwnerEvent::Renew,
            OwnerEvent::Claim,
        ];
        self.check_history(index, &expected)?;
        device.expect(0, C::Renew, TOKEN, R::NotOwner)?;
        device.expect(0, C::Claim, OTHER, R::Ok)?;
        gpu.first()?.map(COPY_IN)?.check_zero(0, COPY)?;
        gpu.release(0, OTHER)?;
        let ms = lasted.as_millis();
        Ok(format!(
            "works: lost {ms} ms after the last renewal, {heard}"
        ))
    }

    /// Checks the last steps of the first partition, the newest first, and that time goes one way.
    fn check_history(&self, index: usize, expected: &[OwnerEvent]) -> Outcome {
        let device = &self.gpu(index)?.device;
        let base = Device::partition(0);
        let mut newer = u64::MAX;
        for (number, event) in expected.iter().enumerate() {
            device.write(base, partition::HISTORY_INDEX, number as u64);
            let step = device.read32(base, partition::HISTORY_STEP);
            let seen = OwnerEvent::from_code(step >> regs::HISTORY_EVENT_SHIFT & 0xff);
            let ns = device.read(base, partition::HISTORY_NS);
            if seen != Some(*event) || ns > newer {
                return Err(format!(
                    "step {number} before the last is {seen:?} at {ns} ns instead of {event:?}"
                ));
            }
            newer = ns;
        }
        Ok(())
    }

    /// A reset takes the partitions from their owners, and gives a device that works.
    pub(super) fn reset(&self, index: usize) -> Outcome<String> {
        let gpu = self.gpu(index)?;
        let device = &gpu.device;
        let owned = !gpu.partitions.is_empty();
        if owned {
            device.expect(0, C::Claim, TOKEN, R::Ok)?;
        }
        device.reset().map_err(|error| format!("reset: {error}"))?;
        device.boot()?;
        if !owned {
            // That it works again shows in what it did before.
            return self.copy_ram(index);
        }
        device.wait_free(0)?;
        let loss = device.read32(Device::partition(0), partition::LOSS);
        // Linux turns bus mastering off before it resets a function, which is enough.
        let loss = match OwnerLoss::from_code(loss) {
            Some(loss @ (OwnerLoss::FunctionReset | OwnerLoss::BusMasterOff)) => loss.name(),
            _ => return Err(format!("loss {loss} after a reset")),
        };
        gpu.each_partition(|gpu, partition| {
            gpu.device.expect(partition, C::Claim, TOKEN, R::Ok)?;
            gpu.release(partition, TOKEN)
        })?;
        Ok(format!("works: the owner lost its HBM by {loss}"))
    }
}
