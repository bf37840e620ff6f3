//! Event descriptors in place of writes to parts of a BAR (specification, `VFIO_USER_DEVICE_GET_REGION_IO_FDS`).

use std::os::fd::{AsRawFd as _, BorrowedFd};

use numagpu_devices::bus::{IoFd, PciFunction};

use super::MAX_FDS;
use super::wire::{Files, Reply};
use crate::kicks::Kicks;

/// Bytes of the reply's fixed part, and of each sub-region.
const HEAD: u32 = 16;
const ENTRY: u32 = 40;

/// Most sub-regions that a reply names; accesses to others come as messages.
const MAX_ENTRIES: usize = 1024;

/// `VFIO_USER_IO_FD_TYPE_IOEVENTFD`.
const IOEVENTFD: u32 = 0;

/// `KVM_IOEVENTFD_FLAG_DATAMATCH`.
const DATAMATCH: u32 = 1 << 0;

/// Sub-regions with the place of their descriptor among those that go with the reply.
type Chosen<'f> = (Vec<(u32, IoFd<'f>)>, Vec<BorrowedFd<'f>>);

/// What a client may be told of.
#[derive(Clone, Copy)]
pub struct Source<'f> {
    /// Whose sub-regions.
    pub function: &'f dyn PciFunction,
    /// Its kicks, where they have events.
    pub kicks: Option<&'f Kicks>,
    /// Most descriptors that the client takes with a message.
    pub max_fds: usize,
}

/// What can be told to the client. Sub-regions may share a descriptor.
fn choose(source: Source<'_>, bar: u8) -> Chosen<'_> {
    let Source {
        function,
        kicks,
        max_fds,
    } = source;
    let (mut entries, mut files) = (Vec::new(), Vec::<BorrowedFd<'_>>::new());
    let kicks = kicks.into_iter().flat_map(|kicks| kicks.of(bar));
    let all = function.io_fds(bar).into_iter().chain(kicks);
    for entry in all.take(MAX_ENTRIES) {
        let same = |file: &BorrowedFd<'_>| file.as_raw_fd() == entry.event.as_raw_fd();
        let place = files.iter().position(same);
        let place = place.or_else(|| {
            (files.len() < max_fds.min(MAX_FDS)).then(|| {
                files.push(entry.event);
                files.len() - 1
            })
        });
        if let Some(place) = place.and_then(|place| u32::try_from(place).ok()) {
            entries.push((place, entry));
        }
    }
    (entries, files)
}

/// Puts the body of a reply for a client that has room for `argsz` bytes. Where not all fits, only the fixed part is
/// there, which says how much room is needed.
pub fn describe(source: Source<'_>, index: u32, argsz: u32, reply: &mut Reply) {
    let bar = u8::try_from(index).ok().filter(|bar| *bar < 6);
    let (entries, _) = bar.map_or_else(Default::default, |bar| choose(source, bar));
    let count = u32::try_from(entries.len()).unwrap_or(0);
    let need = HEAD + ENTRY * count;
    let fits = argsz >= need;
    let sent = if fits { count } else { 0 };
    reply.u32(need).u32(0).u32(index).u32(sent);
    if !fits || count == 0 {
        return;
    }
    for (place, entry) in &entries {
        let flags = if entry.datamatch.is_some() {
            DATAMATCH
        } else {
            0
        };
        reply.u64(entry.offset).u64(entry.size);
        reply.u32(*place).u32(IOEVENTFD).u32(flags).u32(0);
        reply.u64(entry.datamatch.unwrap_or(0));
    }
    if let Some(bar) = bar {
        reply.with(Files::Io(bar));
    }
}

/// The descriptors that go with what [`describe`] put.
pub fn files(source: Source<'_>, bar: u8) -> Vec<BorrowedFd<'_>> {
    choose(source, bar).1
}
