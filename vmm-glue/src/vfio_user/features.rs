//! Device features: what a client asks of them (specification, `VFIO_USER_DEVICE_FEATURE`).

use super::refusal::Refusal;
use super::wire::{u32_at, u64_at};

/// Bits of the flags: the feature's index, and what to do with it.
const INDEX: u32 = 0xffff;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// `VFIO_DEVICE_FEATURE_MIGRATION`.
const MIGRATION: u32 = 1;
/// `VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE`.
const DEVICE_STATE: u32 = 2;
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`.
const LOGGING_START: u32 = 6;
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP`.
const LOGGING_STOP: u32 = 7;
/// `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`.
const LOGGING_REPORT: u32 = 8;

/// Bytes before the feature's own data.
pub const HEAD: u32 = 8;

/// Most bytes of a feature's data in a request: those of the most ranges, and room for a few fields.
const MAX_DATA: usize = 16 * super::dma::dirty::MAX_RANGES + 4096;

/// What is asked of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask<'a> {
    /// Whether it is there, and with it what the flags name.
    Probe,
    /// What of migration is offered.
    Migration,
    /// The state of the migration.
    GetState,
    /// Another state of the migration.
    SetState(u32),
    /// Log writes.
    Start {
        /// Hint for the page size.
        page_size: u64,
        /// The ranges' bytes, 16 each.
        ranges: &'a [u8],
    },
    /// Log no more.
    Stop,
    /// Which pages were written.
    Report {
        /// First address.
        address: u64,
        /// Bytes.
        length: u64,
        /// Bytes that a bit stands for.
        page_size: u64,
    },
}

/// Whether the body of a feature's request asks for another state of the migration: that may wait for the function,
/// which may wait for the client.
#[must_use]
pub fn sets_state(body: &[u8]) -> bool {
    u32_at(body, 4).is_some_and(|flags| flags & (INDEX | SET | PROBE) == DEVICE_STATE | SET)
}

/// What is asked for, of a function that can be migrated or cannot.
///
/// # Errors
/// [`Refusal::Feature`] for a feature that is not there, [`Refusal::FeatureFlags`] for what it cannot do,
/// [`Refusal::FeatureData`] for data that is too short, and [`Refusal::Argsz`].
pub fn decode(argsz: u32, flags: u32, data: &[u8], can_migrate: bool) -> Result<Ask<'_>, Refusal> {
    let index = flags & INDEX;
    let methods = match index {
        MIGRATION if can_migrate => GET,
        DEVICE_STATE if can_migrate => GET | SET,
        LOGGING_START | LOGGING_STOP => SET,
        LOGGING_REPORT => GET,
        _ => return Err(Refusal::Feature { index }),
    };
    let (asked, probed) = (flags & (GET | SET), flags & PROBE != 0);
    let one = asked == GET || asked == SET;
    if flags & !(INDEX | GET | SET | PROBE) != 0 || asked & !methods != 0 || !(one || probed) {
        return Err(Refusal::FeatureFlags { flags });
    }
    let size = Refusal::FeatureData {
        index,
        got: data.len(),
    };
    if data.len() > MAX_DATA {
        return Err(size);
    }
    let ask = match (index, asked) {
        _ if probed => Some(Ask::Probe),
        (MIGRATION, _) => Some(Ask::Migration),
        (DEVICE_STATE, GET) => Some(Ask::GetState),
        // The number behind the state is of no use here.
        (DEVICE_STATE, _) => u32_at(data, 0)
            .filter(|_| data.len() >= 8)
            .map(Ask::SetState),
        (LOGGING_START, _) => start(data),
        (LOGGING_STOP, _) => Some(Ask::Stop),
        _ => report(data),
    };
    let ask = ask.ok_or(size)?;
    let want = ask.reply_bytes(data);
    if argsz < want {
        return Err(Refusal::Argsz {
            command: super::wire::command::DEVICE_FEATURE,
            argsz,
            want,
        });
    }
    Ok(ask)
}

fn start(data: &[u8]) -> Option<Ask<'_>> {
    let ranges = usize::try_from(u32_at(data, 8)?).ok()?.checked_mul(16)?;
    Some(Ask::Start {
        page_size: u64_at(data, 0)?,
        ranges: data.get(16..)?.get(..ranges)?,
    })
}

fn report(data: &[u8]) -> Option<Ask<'_>> {
    Some(Ask::Report {
        address: u64_at(data, 0)?,
        length: u64_at(data, 8)?,
        page_size: u64_at(data, 16)?,
    })
}

impl Ask<'_> {
    /// Bytes of the reply's body, but for a report's bitmap. That to a probe or a set is the request's.
    fn reply_bytes(&self, data: &[u8]) -> u32 {
        let data = match self {
            Self::Probe | Self::SetState(_) | Self::Start { .. } | Self::Stop => data.len(),
            Self::Migration | Self::GetState => 8,
            Self::Report { .. } => 24,
        };
        HEAD + u32::try_from(data).unwrap_or(u32::MAX - HEAD)
    }
}

/// The ranges of [`Ask::Start`]: first address and bytes.
pub fn ranges(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let entries = bytes.chunks_exact(16);
    entries.filter_map(|entry| Some((u64_at(entry, 0)?, u64_at(entry, 8)?)))
}
