//! Saving and restoring configuration space: its values, since what they mean is the table's.

use super::{AER_CONTROL, BAR0, CONFIG_SIZE, ConfigSpace, PM_CONTROL, PM_D0, PM_D3HOT, PM_STATE};
use super::{REBAR_CONTROL, REBAR_LEAST};
use crate::state::RestoreError;

/// Number of the first error, which the function sets itself.
const FIRST_ERROR: u8 = 0x1f;

impl ConfigSpace {
    /// All bytes.
    pub(crate) fn values(&self) -> Vec<u8> {
        self.values.to_vec()
    }

    /// The space with other values.
    ///
    /// # Errors
    /// [`RestoreError::Bad`] if they are not those of such a space.
    pub(crate) fn with_values(&self, values: &[u8]) -> Result<ConfigSpace, RestoreError> {
        let bad = |what, index, value| RestoreError::Bad { what, index, value };
        if values.len() != CONFIG_SIZE {
            let len = values.len() as u64;
            return Err(bad("length of configuration space", 0, len));
        }
        let mut space = self.clone();
        space.values.copy_from_slice(&space.reset.clone()[..]);
        if let Some(bar) = self.resizable {
            let control = values.get(usize::from(REBAR_CONTROL) + 1);
            let control = control.copied().unwrap_or(0);
            let log = u32::from(control).saturating_add(REBAR_LEAST);
            if !(bar.least..=bar.full).contains(&log) {
                return Err(bad("size of resizable BAR", bar.number(), control.into()));
            }
            // The mask of the BAR's address follows its size.
            let size = 1_u64.checked_shl(log).unwrap_or(0);
            space.define_bar(bar.offset, bar.kind, true, size);
        }
        let masks = space.writable.iter().zip(space.w1c.iter());
        let places = space.reset.iter().zip(masks).zip(values).enumerate();
        for (index, ((reset, (writable, w1c)), value)) in places {
            let mut free = writable | w1c;
            if index == usize::from(AER_CONTROL) {
                free |= FIRST_ERROR;
            }
            if (value ^ reset) & !free != 0 {
                let value = u64::from(*value);
                return Err(bad("byte of configuration space", index, value));
            }
        }
        space.put(0, values);
        match space.byte(PM_CONTROL) & PM_STATE {
            PM_D0 | PM_D3HOT => Ok(space),
            state => Err(bad("power state", 0, state.into())),
        }
    }
}

impl super::Resizable {
    /// Number of the BAR.
    fn number(&self) -> usize {
        usize::from((self.offset - BAR0) / 4)
    }
}
