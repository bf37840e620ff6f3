//! ACPI tables as bytes, for a VMM that hands tables to its guest itself.
//!
//! The tables say what the plan says: SRAT and SLIT always, HMAT where the machine gives latencies or bandwidths, and an
//! SSDT that gives each GPU its `_PXM`, and those with a coherent BAR the `_DSD` by which drivers for NVIDIA Grace find
//! HBM. Memory entries of the SRAT are in the order of Linux's node numbers, so a guest that gets these tables numbers its
//! nodes as the plan does; QEMU writes its own tables, see [`crate::linux`].
//!
//! `acpi_tables` makes headers, checksums and AML. Its SRAT has no processor entries and its HMAT is of revision 1, whose
//! units Linux reads differently, so their bodies are made here.

mod hmat;
mod slit;
mod srat;
mod ssdt;

use acpi_tables::sdt::Sdt;

use crate::plan::Plan;

/// OEM id of the tables.
const OEM_ID: [u8; 6] = *b"NUMAGP";
/// OEM table id.
const OEM_TABLE: [u8; 8] = *b"NUMAGPU ";
/// OEM revision.
const OEM_REVISION: u32 = 1;
/// Bytes of a table's header (ACPI 6.5, table 5.4).
const HEADER: u32 = 36;
/// Offset of the table's length in it.
const LENGTH_OFFSET: usize = 4;
/// Offset of the checksum in it.
const CHECKSUM_OFFSET: usize = 9;

/// An ACPI table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its signature, such as `SRAT`.
    pub signature: &'static str,
    /// All of it, header and checksum included.
    pub bytes: Vec<u8>,
}

/// Room for a header, behind which a table's body is written in place: of 1,024 nodes SLIT and HMAT have megabytes, and
/// touching memory for the first time costs more than filling it. `body` is the bytes to come.
fn begun(body: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER as usize + body);
    bytes.resize(HEADER as usize, 0);
    bytes
}

/// A table of what was [`begun`] and its body, with its header.
fn table(signature: &'static str, revision: u8, mut bytes: Vec<u8>) -> Table {
    let mut id = [b' '; 4];
    for (to, from) in id.iter_mut().zip(signature.bytes()) {
        *to = from;
    }
    let mut header = Sdt::new(id, HEADER, revision, OEM_ID, OEM_TABLE, OEM_REVISION);
    header.write_u32(
        LENGTH_OFFSET,
        u32::try_from(bytes.len()).unwrap_or(u32::MAX),
    );
    // The header's own sum is 0 by now, so what is left is to take off that of the body.
    let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    let body = sum(&bytes);
    for (to, from) in bytes.iter_mut().zip(header.as_slice()) {
        *to = *from;
    }
    if let Some(checksum) = bytes.get_mut(CHECKSUM_OFFSET) {
        *checksum = checksum.wrapping_sub(body);
    }
    Table { signature, bytes }
}

/// The plan's tables: SRAT, SLIT, HMAT if the machine has latencies or bandwidths, SSDT if it has GPUs.
pub fn tables(plan: &Plan) -> Vec<Table> {
    let mut tables = vec![srat::srat(plan), slit::slit(plan)];
    tables.extend(hmat::hmat(plan));
    tables.extend(ssdt::ssdt(plan));
    tables
}

/// Tables as text in the format of `acpidump`, which `acpixtract` and `iasl` read.
pub fn dump(tables: &[Table]) -> String {
    let mut text = String::new();
    for table in tables {
        text.push_str(&format!("{} @ 0x0000000000000000\n", table.signature));
        for (row, bytes) in table.bytes.chunks(16).enumerate() {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02X} ")).collect();
            let printable = |byte: &u8| {
                if byte.is_ascii_graphic() || *byte == b' ' {
                    char::from(*byte)
                } else {
                    '.'
                }
            };
            let ascii: String = bytes.iter().map(printable).collect();
            text.push_str(&format!("    {:04X}: {hex:<48} {ascii}\n", row * 16));
        }
        text.push('\n');
    }
    text
}
