//! System Locality Information Table (ACPI 6.5, section 5.2.17).

use super::{Table, begun, table};
use crate::plan::Plan;

/// The distances by proximity domain.
pub(super) fn slit(plan: &Plan) -> Table {
    let count = plan.slit.len();
    let mut body = begun(8 + count * count);
    body.extend((count as u64).to_le_bytes());
    for row in &plan.slit {
        body.extend(row);
    }
    table("SLIT", 1, body)
}
