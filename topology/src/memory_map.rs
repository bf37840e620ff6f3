//! The memory map in the forms in which a guest is given it.
//!
//! | form | who takes it |
//! |---|---|
//! | [`fw_cfg_e820`] | firmware under QEMU: the file `etc/e820` |
//! | [`boot_params`] | Linux by its 64-bit boot protocol: 128 entries in the zero page, the rest in a list behind it |
//! | [`pvh_memory_map`] | Linux and others by the PVH entry point |
//! | [`efi_memory_map`] | whoever builds an EFI environment: HBM carries EFI_MEMORY_SP |

use thiserror::Error;

use crate::plan::{E820Entry, Plan};
use crate::platform;
use crate::size::KIB;
use crate::{E820_RAM, E820_RESERVED, E820_SOFT_RESERVED};

/// Entries that the zero page holds (`E820_MAX_ENTRIES_ZEROPAGE`, Linux `arch/x86/include/uapi/asm/setup_data.h`).
pub const ZERO_PAGE_ENTRIES: usize = 128;
/// Offset of the number of entries in the zero page (Linux `Documentation/arch/x86/zero-page.rst`).
pub const ZERO_PAGE_COUNT_OFFSET: usize = 0x1e8;
/// Offset of the entries in the zero page.
pub const ZERO_PAGE_TABLE_OFFSET: usize = 0x2d0;
/// Type of the `setup_data` entry that holds further entries (`SETUP_E820_EXT`).
pub const SETUP_E820_EXT: u32 = 1;
/// Bytes of an entry in fw_cfg, zero page and `setup_data`.
pub const ENTRY_BYTES: usize = 20;

fn entry_bytes(entry: &E820Entry) -> [u8; ENTRY_BYTES] {
    let mut bytes = [0; ENTRY_BYTES];
    let fields = entry
        .base
        .to_le_bytes()
        .into_iter()
        .chain(entry.size.to_le_bytes())
        .chain(entry.kind.to_le_bytes());
    for (to, from) in bytes.iter_mut().zip(fields) {
        *to = from;
    }
    bytes
}

/// Fewest address bits with which QEMU says that [`platform::AMD_HT`] is reserved (`pc_memory_init`).
const HT_BITS: u32 = 40;

/// The contents of fw_cfg's `etc/e820`: 20 bytes an entry, byte for byte and in the order of QEMU 11.1 with an AMD CPU,
/// which is what its own emulation presents. RAM is whole there: what is legacy video and BIOS memory is for firmware to
/// carve out. The range that HyperTransport keeps for itself comes first, if the guest's addresses reach it; no plan has
/// anything there. HBM is in the order of GPUs and partitions.
pub fn fw_cfg_e820(plan: &Plan) -> Vec<u8> {
    let kept = (plan.holes.amd && plan.phys_bits >= HT_BITS).then_some(E820Entry {
        base: platform::AMD_HT.base,
        size: platform::AMD_HT.size,
        kind: E820_RESERVED,
    });
    let ram = plan.ram_whole().into_iter().map(|range| E820Entry {
        base: range.base,
        size: range.size,
        kind: E820_RAM,
    });
    let rest = plan.hbm().map(|hbm| E820Entry {
        base: hbm.base,
        size: hbm.size,
        kind: E820_SOFT_RESERVED,
    });
    kept.into_iter()
        .chain(ram)
        .chain(rest)
        .flat_map(|entry| entry_bytes(&entry))
        .collect()
}

/// The memory map as Linux's boot protocol has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootParams {
    /// Number of entries in the zero page.
    pub count: u8,
    /// The entries for the zero page, at [`ZERO_PAGE_TABLE_OFFSET`].
    pub table: Vec<u8>,
    /// Further entries: the data of a `setup_data` of type [`SETUP_E820_EXT`]; empty if all fit.
    pub overflow: Vec<u8>,
}

impl BootParams {
    /// Writes count and table into a zero page.
    ///
    /// # Errors
    /// [`ZeroPageError`] if the page is not one of 4096 bytes.
    pub fn write(&self, zero_page: &mut [u8]) -> Result<(), ZeroPageError> {
        let len = zero_page.len();
        let wrong = ZeroPageError { len };
        let count = zero_page.get_mut(ZERO_PAGE_COUNT_OFFSET).ok_or(wrong)?;
        *count = self.count;
        let end = ZERO_PAGE_TABLE_OFFSET + self.table.len();
        let table = zero_page
            .get_mut(ZERO_PAGE_TABLE_OFFSET..end)
            .ok_or(wrong)?;
        table.copy_from_slice(&self.table);
        Ok(())
    }

    /// Count, table and overflow as text: offset in the zero page, then bytes.
    pub fn dump(&self) -> String {
        let mut text = format!("{ZERO_PAGE_COUNT_OFFSET:#05x}: {:02x}\n", self.count);
        let rows = |title: &str, start: usize, bytes: &[u8]| -> String {
            let hex = |row: &[u8]| {
                row.iter()
                    .map(|byte| format!(" {byte:02x}"))
                    .collect::<String>()
            };
            let line = |(i, row): (usize, &[u8])| {
                format!("{title}{:#05x}:{}\n", start + i * ENTRY_BYTES, hex(row))
            };
            bytes.chunks(ENTRY_BYTES).enumerate().map(line).collect()
        };
        text.push_str(&rows("", ZERO_PAGE_TABLE_OFFSET, &self.table));
        text.push_str(&rows("setup_data ", 0, &self.overflow));
        text
    }

    /// The `setup_data` for the entries that did not fit, linked to the next one at address `next` (0 = none); none if all
    /// fit. Its address goes into `setup_header.setup_data` or the entry before.
    pub fn setup_data(&self, next: u64) -> Option<Vec<u8>> {
        let len = u32::try_from(self.overflow.len())
            .ok()
            .filter(|len| *len > 0)?;
        let head = next
            .to_le_bytes()
            .into_iter()
            .chain(SETUP_E820_EXT.to_le_bytes())
            .chain(len.to_le_bytes());
        Some(head.chain(self.overflow.iter().copied()).collect())
    }
}

/// A zero page that is too short.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a zero page has 4096 bytes, not {len}")]
pub struct ZeroPageError {
    /// Its length.
    pub len: usize,
}

/// The memory map for Linux's boot protocol. A kernel reads the overflow list since 2.6.35; one that is loaded by kexec gets
/// the first 128 entries only.
pub fn boot_params(plan: &Plan) -> BootParams {
    let (first, rest) = plan.e820.split_at(plan.e820.len().min(ZERO_PAGE_ENTRIES));
    let bytes = |entries: &[E820Entry]| entries.iter().flat_map(entry_bytes).collect();
    BootParams {
        count: u8::try_from(first.len()).unwrap_or(u8::MAX),
        table: bytes(first),
        overflow: bytes(rest),
    }
}

/// The memory map of the PVH entry point: `hvm_memmap_table_entry`, 24 bytes each (Xen `public/arch-x86/hvm/start_info.h`).
pub fn pvh_memory_map(plan: &Plan) -> Vec<u8> {
    plan.e820
        .iter()
        .flat_map(|entry| entry_bytes(entry).into_iter().chain([0; 4]))
        .collect()
}

/// `EfiReservedMemoryType` (UEFI 2.10, table 7.6).
const EFI_RESERVED: u32 = 0;
/// `EfiConventionalMemory`.
const EFI_CONVENTIONAL: u32 = 7;
/// `EFI_MEMORY_WB`.
const EFI_MEMORY_WB: u64 = 0x8;
/// `EFI_MEMORY_SP`, specific-purpose memory.
pub const EFI_MEMORY_SP: u64 = 0x4_0000;
/// Bytes of an EFI page.
const EFI_PAGE: u64 = 4 * KIB;

/// `EFI_MEMORY_DESCRIPTOR`s of version 1, 40 bytes each (UEFI 2.10, section 7.2.3). Firmware that merges neighbours of equal
/// type and attributes merges HBM of GPUs that touch; the planner's gaps prevent it.
pub fn efi_memory_map(plan: &Plan) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(plan.e820.len() * 40);
    for entry in &plan.e820 {
        let (kind, attributes) = match entry.kind {
            E820_RESERVED => (EFI_RESERVED, 0),
            E820_SOFT_RESERVED => (EFI_CONVENTIONAL, EFI_MEMORY_WB | EFI_MEMORY_SP),
            _ => (EFI_CONVENTIONAL, EFI_MEMORY_WB),
        };
        bytes.extend(u64::from(kind).to_le_bytes());
        for field in [entry.base, 0, entry.size / EFI_PAGE, attributes] {
            bytes.extend(field.to_le_bytes());
        }
    }
    bytes
}

/// Bytes as lines of 16: offset, then hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let line = |(row, bytes): (usize, &[u8])| {
        let hex: String = bytes.iter().map(|byte| format!(" {byte:02x}")).collect();
        format!("{:06x}:{hex}\n", row * 16)
    };
    bytes.chunks(16).enumerate().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preset;

    fn plan(name: &str) -> Plan {
        let preset = preset::find(name).unwrap();
        crate::plan(&crate::parse(name, preset.source).unwrap()).unwrap()
    }

    fn many(entries: usize) -> Plan {
        let entry = |i: u64| E820Entry {
            base: i << 32,
            size: 1 << 30,
            kind: E820_SOFT_RESERVED,
        };
        Plan {
            e820: (0..entries as u64).map(entry).collect(),
            ..plan("two-gpu")
        }
    }

    #[test]
    fn entries_are_packed() {
        let params = boot_params(&plan("two-gpu"));
        assert_eq!(usize::from(params.count) * ENTRY_BYTES, params.table.len());
        assert_eq!(
            params.table[3 * 20..4 * 20],
            [
                0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 255, 255, 255, 239
            ]
        );
        assert_eq!(params.setup_data(0), None);
        let mut page = vec![0; 4096];
        params.write(&mut page).unwrap();
        assert_eq!(page[0x1e8], params.count);
        assert_eq!(page[0x2d0..0x2d0 + params.table.len()], params.table);
        assert_eq!(params.write(&mut [0; 512]), Err(ZeroPageError { len: 512 }));
    }

    #[test]
    fn what_the_zero_page_does_not_hold_goes_into_the_list() {
        assert_eq!(boot_params(&many(128)).setup_data(0), None);
        let params = boot_params(&many(130));
        assert_eq!((params.count, params.overflow.len()), (128, 40));
        let data = params.setup_data(0x1234).unwrap();
        assert_eq!(
            data[..16],
            [0x34, 0x12, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0]
        );
    }

    #[test]
    fn hbm_is_specific_purpose_for_efi() {
        let plan = plan("frontier-node");
        let map = efi_memory_map(&plan);
        let attribute = |chunk: &[u8]| u64::from_le_bytes(chunk[32..40].try_into().unwrap());
        assert_eq!(
            map.chunks(40)
                .filter(|chunk| attribute(chunk) & EFI_MEMORY_SP != 0)
                .count(),
            8
        );
        assert_eq!(pvh_memory_map(&plan).len(), plan.e820.len() * 24);
    }

    #[test]
    fn fw_cfg_has_ram_whole_and_the_range_of_hypertransport() {
        let two = plan("two-gpu");
        let bytes = fw_cfg_e820(&two);
        assert_eq!(bytes.len(), 4 * ENTRY_BYTES);
        assert_eq!(bytes[..8], 0xfd_0000_0000u64.to_le_bytes());
        assert_eq!(bytes[16], 2);
        assert_eq!(bytes[28..36], (1u64 << 30).to_le_bytes());
        let small = Plan {
            phys_bits: 39,
            ..two
        };
        assert_eq!(fw_cfg_e820(&small), bytes[ENTRY_BYTES..]);
    }
}
