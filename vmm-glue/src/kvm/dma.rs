//! Guest memory as an in-process device reaches it.

use std::any::TypeId;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use numagpu_devices::bus::{BackingId, DmaAccess, DmaError, DmaPort, Mapped};
use rustix::fs::fstat;
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice};
use vm_memory::{
    Address as _, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap, VolatileSlice,
};

use crate::sys::unmarked::unmarked;

/// A [`DmaPort`] over the memory of a VMM that is built on `vm-memory`: the guest's RAM and, with it, HBM
/// ([`super::hbm_region`]). Bus addresses are guest-physical ones: there is no IOMMU before the device.
///
/// What is shown to the guest is the VMM's word: the regions here are to be those in the memory slots. After the VMM has
/// replaced the memory in the [`GuestMemoryAtomic`], it calls [`numagpu_devices::bus::PciFunction::dma_changed`].
///
/// What the device wrote is marked in the bitmap of the region, if the memory has bitmaps (`GuestMemoryMmap<AtomicBitmap>`), once
/// it is written: by an address, at that address; as HBM, wherever a region shows that part of the HBM's file
/// ([`super::tracked_hbm_region`]). What the guest's processors write is in KVM's log.
pub struct GuestDma<B: Bitmap = ()> {
    memory: GuestMemoryAtomic<GuestMemoryMmap<B>>,
    shown: RwLock<Shown<B>>,
}

impl<B: Bitmap> GuestDma<B> {
    /// The port to `memory`.
    #[must_use]
    pub fn new(memory: GuestMemoryAtomic<GuestMemoryMmap<B>>) -> Arc<GuestDma<B>> {
        let shown = RwLock::new(Shown {
            memory: Weak::new(),
            files: Vec::new(),
        });
        Arc::new(GuestDma { memory, shown })
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryAtomic<GuestMemoryMmap<B>> {
        &self.memory
    }
}

/// The files that a memory shows. The memory is not kept alive by it, but its place is not another one's.
struct Shown<B: Bitmap> {
    memory: Weak<GuestMemoryMmap<B>>,
    files: Vec<ShownFile>,
}

/// A part of a file that a region shows.
struct ShownFile {
    id: BackingId,
    /// First and last byte in the file.
    first: u64,
    last: u64,
    /// Where the region is.
    base: u64,
}

impl<B: Bitmap> Shown<B> {
    fn of(memory: &Arc<GuestMemoryMmap<B>>) -> Shown<B> {
        let files = memory.iter().filter_map(|region| {
            let Mapped::File { id, offset, .. } = file_of(region, 0)? else {
                return None;
            };
            Some(ShownFile {
                id,
                first: offset,
                last: offset.checked_add(region.len().checked_sub(1)?)?,
                base: region.start_addr().raw_value(),
            })
        });
        Shown {
            files: files.collect(),
            memory: Arc::downgrade(memory),
        }
    }

    fn is_of(&self, memory: &Arc<GuestMemoryMmap<B>>) -> bool {
        self.memory.as_ptr() == Arc::as_ptr(memory)
    }

    /// Marks bytes of a file wherever `memory`, of which this is, shows them.
    fn mark(&self, memory: &GuestMemoryMmap<B>, id: BackingId, first: u64, last: u64) {
        let touched = |it: &&ShownFile| it.id == id && it.first <= last && first <= it.last;
        for file in self.files.iter().filter(touched) {
            let (from, to) = (first.max(file.first), last.min(file.last));
            let Some(region) = region_at(memory, file.base) else {
                continue;
            };
            let offset = usize::try_from(from - file.first);
            let len = usize::try_from((to - from).saturating_add(1));
            if let (Ok(offset), Ok(len)) = (offset, len) {
                region.bitmap().mark_dirty(offset, len);
            }
        }
    }
}

/// The region that has an address.
fn region_at<B: Bitmap>(memory: &GuestMemoryMmap<B>, address: u64) -> Option<&GuestRegionMmap<B>> {
    memory.find_region(GuestAddress(address))
}

fn may<B: Bitmap>(region: &GuestRegionMmap<B>, access: DmaAccess) -> bool {
    let wanted = match access {
        DmaAccess::Read => libc::PROT_READ,
        DmaAccess::Write => libc::PROT_WRITE,
        DmaAccess::Change => libc::PROT_READ | libc::PROT_WRITE,
    };
    region.prot() & wanted == wanted
}

/// The pieces of `len` bytes from `address`, in order.
fn pieces<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    address: u64,
    len: u64,
    access: DmaAccess,
) -> Result<Vec<VolatileSlice<'_, BS<'_, B>>>, DmaError> {
    let unmapped = DmaError::Unmapped { address, len };
    let mut pieces = Vec::with_capacity(1);
    let mut done = 0;
    while done < len {
        let at = address.checked_add(done).ok_or(unmapped)?;
        let region = region_at(memory, at).ok_or(unmapped)?;
        if !may(region, access) {
            return Err(match access {
                // What cannot be written can be read.
                DmaAccess::Write | DmaAccess::Change if may(region, DmaAccess::Read) => {
                    DmaError::ReadOnly { address }
                }
                _ => unmapped,
            });
        }
        let offset = at - region.start_addr().raw_value();
        let part = (len - done).min(region.len() - offset);
        let narrow = |n: u64| usize::try_from(n).map_err(|_| unmapped);
        let slice = region.as_volatile_slice().map_err(|_| unmapped)?;
        let slice = slice.subslice(narrow(offset)?, narrow(part)?);
        pieces.push(slice.map_err(|_| unmapped)?);
        done += part;
    }
    Ok(pieces)
}

/// Copies pieces to as many bytes of other pieces, as if all were read before any is written; `backward` where the
/// destination lies behind the source. Marks what it writes.
fn copy_pieces<B: BitmapSlice>(
    from: &[VolatileSlice<'_, B>],
    to: &[VolatileSlice<'_, B>],
    backward: bool,
) -> Result<(), vm_memory::VolatileMemoryError> {
    let mut parts = Vec::with_capacity(1);
    let (mut sources, mut destinations) = (from.iter(), to.iter());
    let (mut source, mut destination) = (sources.next().cloned(), destinations.next().cloned());
    while let (Some(read), Some(write)) = (source.take(), destination.take()) {
        let len = read.len().min(write.len());
        parts.push((read.subslice(0, len)?, write.subslice(0, len)?));
        source = match read.offset(len)? {
            rest if rest.is_empty() => sources.next().cloned(),
            rest => Some(rest),
        };
        destination = match write.offset(len)? {
            rest if rest.is_empty() => destinations.next().cloned(),
            rest => Some(rest),
        };
    }
    // A part that lies in the other range is read before it is written.
    if backward {
        parts.reverse();
    }
    for (read, write) in parts {
        read.copy_to_volatile_slice(write);
    }
    Ok(())
}

impl<B: Bitmap + Send + Sync + 'static> DmaPort for GuestDma<B> {
    fn access(
        &self,
        address: u64,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), DmaError> {
        // Holds the memory while it is used, whatever the VMM puts in its place.
        let memory = self.memory.memory();
        let pieces = pieces(&memory, address, len, access)?;
        for piece in pieces {
            f(unmarked(&piece));
            if access.writes() {
                piece.bitmap().mark_dirty(0, piece.len());
            }
        }
        Ok(())
    }

    fn copy(&self, source: u64, destination: u64, len: u64) -> Result<(), DmaError> {
        let memory = self.memory.memory();
        let from = pieces(&memory, source, len, DmaAccess::Read)?;
        let to = pieces(&memory, destination, len, DmaAccess::Write)?;
        copy_pieces(&from, &to, source < destination).map_err(|_| DmaError::Unmapped {
            address: source,
            len,
        })
    }

    fn mapped(&self, address: u64, len: u64) -> Mapped {
        let Some(last) = len
            .checked_sub(1)
            .and_then(|more| address.checked_add(more))
        else {
            return Mapped::Nothing;
        };
        let memory = self.memory.memory();
        let touched = memory.iter().find(|region| {
            region.start_addr().raw_value() <= last && address <= region.last_addr().raw_value()
        });
        let Some(region) = touched else {
            return Mapped::Nothing;
        };
        let base = region.start_addr().raw_value();
        if address < base || last > region.last_addr().raw_value() {
            return Mapped::Partial;
        }
        file_of(region, address - base).unwrap_or(Mapped::NoFd)
    }

    fn wrote(&self, file: BackingId, offset: u64, len: u64) {
        // This one keeps no record.
        if TypeId::of::<B>() == TypeId::of::<()>() {
            return;
        }
        let last = len.checked_sub(1).and_then(|more| offset.checked_add(more));
        let Some(last) = last else { return };
        let memory = self.memory.memory().into_inner();
        let shown = self.shown.read().unwrap_or_else(PoisonError::into_inner);
        if shown.is_of(&memory) {
            return shown.mark(&memory, file, offset, last);
        }
        drop(shown);
        let now = Shown::of(&memory);
        now.mark(&memory, file, offset, last);
        *self.shown.write().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

/// The file behind the byte at `offset` of a region; none where a private mapping shows bytes of its own.
fn file_of<B: Bitmap>(region: &GuestRegionMmap<B>, offset: u64) -> Option<Mapped> {
    if region.flags() & libc::MAP_SHARED == 0 {
        return None;
    }
    let file = region.file_offset()?;
    let stat = fstat(file.file()).ok()?;
    Some(Mapped::File {
        id: BackingId {
            device: stat.st_dev,
            inode: stat.st_ino,
        },
        offset: file.start().checked_add(offset)?,
        writable: may(region, DmaAccess::Write),
    })
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes as _, FileOffset, MmapRegion};

    use super::*;
    use crate::hbm::HbmBacking;
    use crate::kvm::{hbm_region, tracked_hbm_region};

    const PAGE: u64 = 0x1000;
    /// Two regions of RAM without a file that touch, a hole, HBM.
    const RAM: u64 = 0x1_0000;
    const HBM: u64 = 0x10_0000;
    /// Where [`marking`] shows it too.
    const COPY: u64 = 0x4_0000;
    const HALF: u64 = 0x8_0000;

    fn memory(hbm: &HbmBacking) -> GuestMemoryMmap {
        let ram = |base| GuestRegionMmap::from_range(GuestAddress(base), 0x1000, None).unwrap();
        let regions = vec![ram(RAM), ram(RAM + PAGE), hbm_region(HBM, hbm).unwrap()];
        GuestMemoryMmap::from_regions(regions).unwrap()
    }

    fn port(hbm: &HbmBacking) -> Arc<GuestDma> {
        GuestDma::new(GuestMemoryAtomic::new(memory(hbm)))
    }

    fn hbm() -> HbmBacking {
        HbmBacking::memfd("dma-test", 4 * PAGE).unwrap()
    }

    fn read(port: &GuestDma, address: u64, len: u64) -> Result<Vec<u8>, DmaError> {
        let mut all = Vec::new();
        port.access(address, len, DmaAccess::Read, &mut |piece| {
            let mut bytes = vec![0; piece.len()];
            piece.read_slice(&mut bytes, 0).unwrap();
            all.extend(bytes);
        })?;
        Ok(all)
    }

    fn write(port: &GuestDma, address: u64, data: &[u8]) {
        let mut done = 0;
        port.access(address, data.len() as u64, DmaAccess::Write, &mut |piece| {
            piece
                .write_slice(&data[done..done + piece.len()], 0)
                .unwrap();
            done += piece.len();
        })
        .unwrap();
        assert_eq!(done, data.len());
    }

    #[test]
    fn an_access_goes_through_regions_that_touch_and_not_into_holes() {
        let hbm = hbm();
        let port = port(&hbm);
        let data: Vec<u8> = (0..200).collect();
        let address = RAM + PAGE - 100;
        write(&port, address, &data);
        assert_eq!(read(&port, address, 200), Ok(data));
        let last = RAM + 2 * PAGE - 8;
        let unmapped = |address, len| Err(DmaError::Unmapped { address, len });
        assert_eq!(read(&port, last, 8).map(|it| it.len()), Ok(8));
        assert_eq!(read(&port, last, 9), unmapped(last, 9));
        assert_eq!(read(&port, RAM - 1, 2), unmapped(RAM - 1, 2));
        assert_eq!(read(&port, u64::MAX, 2), unmapped(u64::MAX, 2));
        assert_eq!(read(&port, 0, 0), Ok(vec![]));
        let copied = port.copy(last, RAM, 9);
        assert_eq!(copied, unmapped(last, 9).map(|_: Vec<u8>| ()));
    }

    #[test]
    fn overlapping_copies_are_as_if_all_was_read_before() {
        for (source, destination) in [(0, 300), (300, 0), (0, 0), (10, 4000), (3900, 77)] {
            let hbm = hbm();
            let port = port(&hbm);
            let mut wanted: Vec<u8> = (0..=250).cycle().take(0x2000).collect();
            write(&port, RAM, &wanted);
            let len = 4100;
            wanted.copy_within(source..source + len, destination);
            port.copy(RAM + source as u64, RAM + destination as u64, len as u64)
                .unwrap();
            assert!(
                read(&port, RAM, 0x2000).unwrap() == wanted,
                "{source} to {destination}"
            );
        }
    }

    #[test]
    fn what_is_mapped_is_told_by_the_file_that_is_there() {
        use numagpu_devices::bus::HbmStore as _;
        let hbm = hbm();
        let port = port(&hbm);
        let file = |offset| Mapped::File {
            id: hbm.backing().0,
            offset,
            writable: true,
        };
        assert_eq!(port.mapped(HBM, 4 * PAGE), file(0));
        assert_eq!(port.mapped(HBM + PAGE, PAGE), file(PAGE));
        assert_eq!(port.mapped(HBM - 1, 2), Mapped::Partial);
        assert_eq!(port.mapped(HBM, 4 * PAGE + 1), Mapped::Partial);
        assert_eq!(port.mapped(RAM, PAGE), Mapped::NoFd);
        assert_eq!(port.mapped(RAM, 2 * PAGE), Mapped::Partial);
        assert_eq!(port.mapped(RAM + 2 * PAGE, PAGE), Mapped::Nothing);
        assert_eq!(port.mapped(HBM, 0), Mapped::Nothing);
        assert_eq!(port.mapped(u64::MAX, 2), Mapped::Nothing);
        // The same file, but bytes of one's own.
        let mapping = hbm.mapping();
        let private = vm_memory::mmap::MmapRegionBuilder::<()>::new(4096)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .with_file_offset(mapping.file_offset().unwrap().clone())
            .build()
            .unwrap();
        let read_only = vm_memory::mmap::MmapRegionBuilder::new(4096)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_file_offset(mapping.file_offset().unwrap().clone())
            .build()
            .unwrap();
        let at = |region, base| GuestRegionMmap::new(region, GuestAddress(base)).unwrap();
        let regions = vec![at(private, 0), at(read_only, PAGE)];
        let others = GuestMemoryMmap::from_regions(regions).unwrap();
        let port = GuestDma::new(GuestMemoryAtomic::new(others));
        assert_eq!(port.mapped(0, PAGE), Mapped::NoFd);
        let seen = port.mapped(PAGE, PAGE);
        assert!(matches!(
            seen,
            Mapped::File {
                writable: false,
                ..
            }
        ));
        let mut ignore = |_: VolatileSlice<'_>| {};
        let refused = port.access(PAGE, 1, DmaAccess::Write, &mut ignore);
        assert_eq!(refused, Err(DmaError::ReadOnly { address: PAGE }));
        assert_eq!(port.access(PAGE, 1, DmaAccess::Read, &mut ignore), Ok(()));
    }

    type Bitmapped = GuestRegionMmap<AtomicBitmap>;

    /// As [`memory`], but HBM three times: a private copy, its second half alone for reading, all of it.
    fn marking(hbm: &HbmBacking) -> Arc<GuestDma<AtomicBitmap>> {
        let ram = |base| Bitmapped::from_range(GuestAddress(base), 0x1000, None).unwrap();
        let file = |start| {
            FileOffset::from_arc(
                Arc::clone(hbm.mapping().file_offset().unwrap().arc()),
                start,
            )
        };
        let mapped = |base, start, len, prot, flags| {
            let region = MmapRegion::build(Some(file(start)), len, prot, flags);
            Bitmapped::new(region.unwrap(), GuestAddress(base)).unwrap()
        };
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let regions = vec![
            ram(RAM),
            ram(RAM + PAGE),
            mapped(COPY, 0, 0x4000, write, libc::MAP_PRIVATE),
            mapped(HALF, 2 * PAGE, 0x2000, libc::PROT_READ, libc::MAP_SHARED),
            tracked_hbm_region(HBM, hbm).unwrap(),
        ];
        let memory = GuestMemoryMmap::from_regions(regions).unwrap();
        GuestDma::new(GuestMemoryAtomic::new(memory))
    }

    /// Addresses of the pages that are marked; they are not any more then.
    fn marked(port: &GuestDma<AtomicBitmap>) -> Vec<u64> {
        let memory = port.memory().memory();
        let mut all = Vec::new();
        for region in memory.iter() {
            let pages = (0..region.len() / PAGE).map(|page| page * PAGE);
            let dirty = pages.filter(|at| region.bitmap().dirty_at(usize::try_from(*at).unwrap()));
            all.extend(dirty.map(|at| region.start_addr().raw_value() + at));
            (**region).bitmap().reset();
        }
        all
    }

    #[test]
    fn what_the_device_writes_by_an_address_is_marked_there_and_nowhere_else() {
        let hbm = hbm();
        let port = marking(&hbm);
        let nothing: [u64; 0] = [];
        let mut fill =
            |piece: VolatileSlice<'_>| piece.write_slice(&vec![7; piece.len()], 0).unwrap();
        port.access(RAM + PAGE - 1, 2, DmaAccess::Write, &mut fill)
            .unwrap();
        assert_eq!(marked(&port), [RAM, RAM + PAGE]);
        port.access(HBM + 2 * PAGE - 4, 4, DmaAccess::Change, &mut fill)
            .unwrap();
        assert_eq!(marked(&port), [HBM + PAGE]);
        port.access(RAM, 2 * PAGE, DmaAccess::Read, &mut |_| {})
            .unwrap();
        assert_eq!(marked(&port), nothing);
        // From both regions into the middle of the HBM, and back over their border.
        port.copy(RAM, HBM + PAGE, 2 * PAGE).unwrap();
        assert_eq!(marked(&port), [HBM + PAGE, HBM + 2 * PAGE]);
        port.copy(HBM, RAM + PAGE - 8, 16).unwrap();
        assert_eq!(marked(&port), [RAM, RAM + PAGE]);
        port.copy(RAM + 1, RAM, PAGE).unwrap();
        assert_eq!(marked(&port), [RAM]);
        // What is refused wrote nothing.
        assert!(port.access(HALF, 1, DmaAccess::Write, &mut fill).is_err());
        assert!(port.copy(RAM + PAGE, RAM, PAGE + 1).is_err());
        assert!(port.copy(RAM, RAM + PAGE, PAGE + 1).is_err());
        assert_eq!(marked(&port), nothing);
        let mut seen = [0; 2];
        port.memory()
            .memory()
            .read_slice(&mut seen, GuestAddress(HBM + 2 * PAGE - 1))
            .unwrap();
        assert_eq!(seen, [7, 7]);
    }

    #[test]
    fn what_the_device_writes_as_hbm_is_marked_wherever_it_is_shown() {
        use numagpu_devices::bus::HbmStore as _;
        let hbm = hbm();
        let port = marking(&hbm);
        let (file, _) = hbm.backing();
        let nothing: [u64; 0] = [];
        port.wrote(file, PAGE + 5, 1);
        assert_eq!(marked(&port), [HBM + PAGE]);
        port.wrote(file, 2 * PAGE - 1, PAGE + 2);
        let all = [
            HALF,
            HALF + PAGE,
            HBM + PAGE,
            HBM + 2 * PAGE,
            HBM + 3 * PAGE,
        ];
        assert_eq!(marked(&port), all);
        port.wrote(file, 3 * PAGE, u64::MAX - 3 * PAGE);
        assert_eq!(marked(&port), [HALF + PAGE, HBM + 3 * PAGE]);
        let other = HbmBacking::memfd("dma-test", PAGE).unwrap();
        for (file, offset, len) in [
            (other.backing().0, 0, PAGE),
            (file, 4 * PAGE, PAGE),
            (file, 0, 0),
            (file, u64::MAX, 2),
        ] {
            port.wrote(file, offset, len);
            assert_eq!(marked(&port), nothing);
        }
        // What the VMM puts in the place of the old is what is marked.
        let moved = tracked_hbm_region(2 * HBM, &hbm).unwrap();
        let memory = GuestMemoryMmap::from_regions(vec![moved]).unwrap();
        let old = port.memory().memory().into_inner();
        port.memory().lock().unwrap().replace(memory);
        let gone = Arc::downgrade(&old);
        drop(old);
        assert!(gone.upgrade().is_none(), "it is not kept");
        port.wrote(file, 0, 1);
        assert_eq!(marked(&port), [2 * HBM]);
    }

    #[test]
    fn memory_that_the_vmm_puts_in_the_place_of_the_old_is_what_is_reached() {
        let hbm = hbm();
        let port = port(&hbm);
        assert!(read(&port, HBM, 1).is_ok());
        let ram = GuestRegionMmap::from_range(GuestAddress(RAM), 0x1000, None).unwrap();
        let without = GuestMemoryMmap::from_regions(vec![ram]).unwrap();
        port.memory().lock().unwrap().replace(without);
        assert!(read(&port, HBM, 1).is_err());
        assert_eq!(port.mapped(HBM, PAGE), Mapped::Nothing);
    }
}
