//! The doorbell page and the MSI-X page.

use numagpu_spec::pci;

use super::Gpu;
use crate::registers::{RegisterAt, RegisterDevice};

/// The doorbell page: writes that touch the low half of a doorbell ring it, and any that touch a kick.
pub(super) struct DoorbellPage<'g>(pub(super) &'g Gpu);

impl RegisterDevice for DoorbellPage<'_> {
    fn read(&self, _at: RegisterAt, _stored: u64) -> u64 {
        0
    }

    fn written(&self, at: RegisterAt, value: u64, lanes: u64) {
        let Some(target) = self.0.queues.get(at.instance as usize) else {
            return;
        };
        if at.is(&pci::kick::BLOCK, &pci::kick::KICK) {
            target.doorbell_in_memory();
        } else if lanes & 0xffff_ffff != 0 {
            target.doorbell(value);
        }
    }
}

/// The MSI-X table: plain storage, for VMMs that keep theirs here.
pub(super) struct MsixPage;

impl RegisterDevice for MsixPage {
    fn read(&self, _at: RegisterAt, stored: u64) -> u64 {
        stored
    }

    fn written(&self, _at: RegisterAt, _value: u64, _lanes: u64) {}
}
