//! The client's files. Each is mapped once, whole, and its maps are views into that: with an IOMMU in front of the device
//! a client maps and unmaps single pages, and to change the host's mappings for each of them takes as long as all else.

use std::collections::HashMap;
use std::fs::File;
use std::hash::Hash;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};

use numagpu_devices::bus::BackingId;
use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::io::Errno;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use super::super::PAGE_SIZES;
use super::super::wire::DmaMap;
use super::WRITABLE;
use super::map::MapError;
use super::room::{Place, Room};
use crate::sys::guarded::Guarded;

/// Memory of a file, mapped.
#[derive(Debug)]
struct Region {
    memory: Guarded<MmapRegion>,
    /// Given back behind it.
    _place: Place,
}

impl Region {
    fn size(&self) -> u64 {
        self.memory.owner().size() as u64
    }
}

/// A part of a file, mapped.
#[derive(Clone, Debug)]
pub(super) struct View {
    region: Arc<Region>,
    /// Where it begins in the region.
    start: usize,
}

impl View {
    /// `len` bytes, `offset` bytes from its start. The caller knows how long the view is.
    pub(super) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let at = self.start.checked_add(offset)?;
        self.region.memory.owner().get_slice(at, len).ok()
    }

    /// As [`Guarded::is_lost`], of the file as it was mapped.
    pub(super) fn is_lost(&self) -> bool {
        self.region.memory.is_lost()
    }

    /// As [`Guarded::is_news`].
    pub(super) fn is_news(&self) -> bool {
        self.region.memory.is_news()
    }
}

/// One file may back many maps: it is kept once per way it was opened.
type Key = (BackingId, OFlags);

/// A file that a client gave, as it was then.
#[derive(Debug)]
pub(super) struct Opened {
    file: File,
    key: Key,
    /// Bytes.
    len: u64,
    /// Bytes that are mapped, unmapped and replaced only together.
    page: u64,
}

impl Opened {
    /// Whose file it is.
    pub(super) fn id(&self) -> BackingId {
        self.key.0
    }
}

/// Checks that a map begins with a page and does not reach past the end of `fd`'s file as it is now.
///
/// # Errors
/// [`MapError`] if it does not so, if it is no regular file, or if the host does not tell.
pub(super) fn open(request: &DmaMap, fd: OwnedFd) -> Result<Opened, MapError> {
    if !request.offset.is_multiple_of(PAGE_SIZES) {
        return Err(MapError::Offset(request.offset));
    }
    let stat = fstat(fd.as_fd()).map_err(|errno| host(request, errno))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MapError::NotAFile);
    }
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    if request.offset.saturating_add(request.size) > len {
        return Err(MapError::ShortFile {
            len,
            offset: request.offset,
            size: request.size,
        });
    }
    let flags = fcntl_getfl(fd.as_fd()).map_err(|errno| host(request, errno))?;
    let id = BackingId {
        device: stat.st_dev,
        inode: stat.st_ino,
    };
    Ok(Opened {
        file: File::from(fd),
        key: (id, flags & OFlags::RWMODE),
        len,
        page: u64::try_from(stat.st_blksize).unwrap_or(1).max(1),
    })
}

/// What somebody uses, to be found again.
#[derive(Debug)]
struct InUse<K, V> {
    entries: HashMap<K, Weak<V>>,
    /// At so many entries those that nobody uses any more are taken out.
    most: usize,
}

impl<K, V> Default for InUse<K, V> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            most: 0,
        }
    }
}

impl<K: Eq + Hash, V> InUse<K, V> {
    fn get(&self, key: &K) -> Option<Arc<V>> {
        self.entries.get(key)?.upgrade()
    }

    fn add(&mut self, key: K, value: V) -> Arc<V> {
        if self.entries.len() >= self.most {
            self.entries.retain(|_, it| it.strong_count() > 0);
            self.most = self.entries.len().saturating_mul(2).max(16);
        }
        let value = Arc::new(value);
        self.entries.insert(key, Arc::downgrade(&value));
        value
    }
}

/// What is mapped of a client's files.
#[derive(Debug, Default)]
pub(super) struct Files {
    open: InUse<Key, File>,
    /// Also by whether it may be written: the host enforces that.
    whole: InUse<(Key, bool), Region>,
    room: Arc<Room>,
}

impl Files {
    /// The part of a file that a request asks for, which [`open`] has checked.
    ///
    /// # Errors
    /// [`MapError::Host`] if the host refuses to map it, as it does if the file was not opened for it;
    /// [`MapError::Full`].
    pub(super) fn view(&mut self, request: &DmaMap, opened: Opened) -> Result<View, MapError> {
        let key = (opened.key, request.flags & WRITABLE != 0);
        let end = request.offset.saturating_add(request.size);
        let page = opened.page;
        let whole = DmaMap {
            offset: 0,
            size: opened.len,
            ..*request
        };
        let kept = self.whole.get(&key);
        if let Some(region) = &kept
            && !region.memory.is_lost()
            && end <= region.size()
        {
            return view(Arc::clone(region), request.offset, request);
        }
        let file = self.share(opened);
        // One that is kept and of no use is of a file that has grown, or was cut off and is whole again. At most one
        // mapping is longer than what was asked for.
        if kept.is_none()
            && let Ok(region) = self.mapped(&whole, page, Arc::clone(&file))
        {
            return view(self.whole.add(key, region), request.offset, request);
        }
        view(Arc::new(self.mapped(request, page, file)?), 0, request)
    }

    /// The file kept for this one; itself if there is none yet.
    fn share(&mut self, opened: Opened) -> Arc<File> {
        let kept = self.open.get(&opened.key);
        kept.unwrap_or_else(|| self.open.add(opened.key, opened.file))
    }

    /// Maps a range of a file that was checked to be long enough. The client may still cut it short.
    fn mapped(&self, range: &DmaMap, page: u64, file: Arc<File>) -> Result<Region, MapError> {
        // Nothing is accessed behind `range.size`.
        let size = range.size.checked_next_multiple_of(page);
        let size = size.and_then(|size| usize::try_from(size).ok());
        let size = size.ok_or_else(|| host(range, Errno::NOMEM))?;
        let prot = match range.flags & WRITABLE {
            0 => libc::PROT_READ,
            _ => libc::PROT_READ | libc::PROT_WRITE,
        };
        let place = Place::take(&self.room, size as u64)?;
        MmapRegionBuilder::new(size)
            .with_mmap_prot(prot)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::from_arc(file, range.offset))
            .build()
            .map(|region| Region {
                memory: Guarded::new(region),
                _place: place,
            })
            .map_err(|error| match error {
                vm_memory::mmap::MmapRegionError::Mmap(error) => {
                    host(range, Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))
                }
                _ => host(range, Errno::INVAL),
            })
    }
}

fn host(request: &DmaMap, errno: Errno) -> MapError {
    MapError::Host {
        offset: request.offset,
        size: request.size,
        errno,
    }
}

fn view(region: Arc<Region>, start: u64, request: &DmaMap) -> Result<View, MapError> {
    let start = usize::try_from(start).map_err(|_| host(request, Errno::NOMEM))?;
    Ok(View { region, start })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use vm_memory::Bytes as _;

    use super::super::room::OF_CLIENT;
    use super::*;

    const PAGE: u64 = 4096;

    fn file(pages: u64) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("files", flags).unwrap());
        file.set_len(pages * PAGE).unwrap();
        file
    }

    fn request(page: u64, flags: u32) -> DmaMap {
        DmaMap {
            flags,
            offset: page * PAGE,
            address: 0,
            size: PAGE,
        }
    }

    impl View {
        /// For tests that look at no memory.
        pub(in super::super) fn nowhere() -> View {
            View {
                region: Arc::new(Region {
                    memory: Guarded::new(MmapRegion::new(1).unwrap()),
                    _place: Place::take(&Arc::default(), 1).unwrap(),
                }),
                start: 0,
            }
        }
    }

    impl Files {
        fn ask(&mut self, file: &File, page: u64, flags: u32) -> Result<View, MapError> {
            let request = request(page, flags);
            let opened = open(&request, file.try_clone().unwrap().into())?;
            self.view(&request, opened)
        }
    }

    /// Whether a view shows that page of the file, both ways.
    #[track_caller]
    fn check(view: &View, file: &File, page: u64) {
        let slice = view.slice(0, 4096).unwrap();
        let value = 0xa5a5_0000 + page;
        file.write_all_at(&value.to_ne_bytes(), page * PAGE + 8)
            .unwrap();
        assert_eq!(slice.read_obj::<u64>(8).unwrap(), value);
        slice.write_obj(!value, 4088).unwrap();
        let mut seen = [0; 8];
        file.read_exact_at(&mut seen, page * PAGE + 4088).unwrap();
        assert_eq!(u64::from_ne_bytes(seen), !value);
        assert!(!view.is_lost());
    }

    fn is_same(one: &View, other: &View) -> bool {
        Arc::ptr_eq(&one.region, &other.region)
    }

    #[test]
    fn a_file_is_mapped_once_for_all_its_views_and_not_after_the_last() {
        let (mut files, file) = (Files::default(), file(8));
        let views: Vec<View> = (0..8)
            .rev()
            .map(|page| files.ask(&file, page, 3).unwrap())
            .collect();
        for (page, view) in (0..8).rev().zip(&views) {
            check(view, &file, page);
            assert!(is_same(view, &views[0]));
        }
        let region = Arc::downgrade(&views[0].region);
        drop(views);
        assert!(region.upgrade().is_none());
        let again = files.ask(&file, 3, 3).unwrap();
        check(&again, &file, 3);
    }

    #[test]
    fn files_that_are_gone_are_forgotten() {
        let mut files = Files::default();
        let kept: Vec<View> = (0..40)
            .map(|_| files.ask(&file(1), 0, 3).unwrap())
            .collect();
        for _ in 0..1000 {
            files.ask(&file(1), 0, 3).unwrap();
        }
        for (entries, most) in [
            (files.open.entries.len(), files.open.most),
            (files.whole.entries.len(), files.whole.most),
        ] {
            assert!(
                (40..=160).contains(&entries) && entries <= most,
                "{entries}"
            );
        }
        drop(kept);
    }

    #[test]
    fn what_may_only_be_read_is_not_mapped_to_be_written() {
        let (mut files, file) = (Files::default(), file(2));
        let write = files.ask(&file, 0, 3).unwrap();
        let read = files.ask(&file, 0, 1).unwrap();
        assert!(!is_same(&write, &read));
        assert_eq!(read.region.memory.owner().prot(), libc::PROT_READ);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let opened = File::open(path).unwrap();
        // Although the client had another descriptor for it.
        let refused = files.ask(&opened, 1, 3).unwrap_err();
        assert_eq!(refused.errno(), Errno::ACCESS);
        files.ask(&opened, 1, 1).unwrap();
        // Nobody may write it in a new way; those that write it already may.
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        assert!(is_same(&files.ask(&file, 1, 3).unwrap(), &write));
        drop(write);
        let refused = files.ask(&file, 1, 3).unwrap_err();
        assert_eq!(refused.errno(), Errno::PERM);
    }

    #[test]
    fn a_view_begins_with_a_page_and_may_begin_inside_a_huge_one() {
        let mut files = Files::default();
        let inside = DmaMap {
            offset: 8,
            ..request(0, 3)
        };
        let refused = open(&inside, file(2).into()).unwrap_err();
        assert!(matches!(refused, MapError::Offset(8)) && refused.errno() == Errno::INVAL);
        let Ok(huge) = memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) else {
            println!("skipped: this host has no pages of 2 MiB");
            return;
        };
        let huge = File::from(huge);
        huge.set_len(4 << 20).unwrap();
        let (one, other) = (
            files.ask(&huge, 3, 3).unwrap(),
            files.ask(&huge, 1023, 3).unwrap(),
        );
        assert!(is_same(&one, &other));
        assert!(one.slice(0, 4096).is_some() && other.slice(0, 4096).is_some());
    }

    #[test]
    fn a_file_that_grew_or_was_cut_off_is_mapped_in_parts_until_nobody_uses_the_whole() {
        let (mut files, file) = (Files::default(), file(2));
        let first = files.ask(&file, 1, 3).unwrap();
        file.set_len(4 * PAGE).unwrap();
        let (third, fourth) = (
            files.ask(&file, 2, 3).unwrap(),
            files.ask(&file, 3, 3).unwrap(),
        );
        assert!(!is_same(&third, &fourth) && third.region.size() == 4096);
        check(&third, &file, 2);
        check(&fourth, &file, 3);
        assert!(is_same(&first, &files.ask(&file, 0, 3).unwrap()));
        // Parts are lost by themselves, the whole with all its views.
        file.set_len(PAGE).unwrap();
        assert_eq!(first.slice(0, 8).unwrap().read_obj::<u64>(0).unwrap(), 0);
        assert!(first.is_lost() && first.is_news() && !third.is_lost());
        let short = files.ask(&file, 1, 3).unwrap_err();
        assert!(matches!(short, MapError::ShortFile { len: PAGE, .. }));
        let part = files.ask(&file, 0, 3).unwrap();
        check(&part, &file, 0);
        assert_eq!(part.region.size(), 4096);
        drop(first);
        file.set_len(4 * PAGE).unwrap();
        let whole = files.ask(&file, 0, 3).unwrap();
        assert_eq!(whole.region.size(), 4 * 4096);
        check(&whole, &file, 0);
        check(&part, &file, 0);
    }

    #[test]
    fn of_a_file_too_long_to_be_mapped_what_is_asked_for_is() {
        for len in [OF_CLIENT.bytes + PAGE, 1 << 62] {
            let (mut files, file) = (Files::default(), file(1));
            file.set_len(len).unwrap();
            let pages = [0, 7, len / PAGE - 1];
            let views = pages.map(|page| files.ask(&file, page, 3).unwrap());
            for (page, view) in pages.into_iter().zip(&views) {
                check(view, &file, page);
                assert_eq!(view.region.size(), 4096);
            }
        }
    }
}
