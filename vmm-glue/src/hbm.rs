//! Host memory behind HBM: an anonymous file, or a file in a directory of the user's choice. There is one for each
//! partition, or where a client maps a BAR, one for all partitions of a GPU.
//!
//! Both are sparse: a page costs memory or disk once it is written. The VMM maps the very same file, so what a
//! guest's CPU writes is what the device reads, with no copy between.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use numagpu_devices::bus::{BackingId, HbmStore};
use numagpu_topology::size::GIB;
use rustix::fs::{
    FallocateFlags, FileType, FlockOperation, MemfdFlags, Mode, OFlags, fallocate, fchmod, flock,
    fstat, ftruncate, lstat, memfd_create, open, statvfs, unlink,
};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;
use vm_memory::bitmap::{Bitmap, NewBitmap};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileMemoryError, VolatileSlice};

use crate::sys::guarded::Guarded;

/// Why there is no backing memory.
#[derive(Debug, Error)]
pub enum HbmError {
    /// Of size 0, or larger than a file or this process's address space can be.
    #[error("HBM {name} of {size} bytes: 1 to {max} are possible", max = i64::MAX)]
    Size {
        /// Name of the partition.
        name: String,
        /// Bytes asked for.
        size: u64,
    },
    /// Parts that are not just all of the memory.
    #[error("parts of {parts:?} bytes are not just the {size} bytes of the memory")]
    Parts {
        /// Bytes of each part.
        parts: Vec<u64>,
        /// Bytes of the memory.
        size: u64,
    },
    /// The name is no file name.
    #[error("HBM name {name:?} is no file name")]
    Name {
        /// Name of the partition.
        name: String,
    },
    /// Another process uses the file.
    #[error("HBM file {path} is in use by a running instance; choose another directory")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Something that is not a file of this user's is where the file should be.
    #[error("HBM file {path} exists and is no regular file of this user; it is left alone")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The host cannot make the file.
    #[error("directory {dir} cannot hold HBM {name}: {errno}; {size} bytes are needed{}; give another --hbm-dir, or none for memory without a file", in_words(*.free))]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// Name of the partition.
        name: String,
        /// Bytes needed.
        size: u64,
        /// Bytes free there, if that is known.
        free: Option<u64>,
        /// The host's error.
        errno: Errno,
    },
    /// The host's pool has too few huge pages.
    #[error(
        "HBM {name} needs {pages} huge page(s) of {kib} KiB and the host does not give them: {errno}; free some, or write their number to /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
    )]
    HugePages {
        /// Name of the partition.
        name: String,
        /// Pages needed.
        pages: u64,
        /// KiB of a page.
        kib: u64,
        /// The host's error.
        errno: Errno,
    },
    /// The host cannot make or map the memory.
    #[error("cannot {doing} {size} bytes for HBM {name}: {source}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// Name of the partition.
        name: String,
        /// Bytes.
        size: u64,
        /// The host's error.
        source: io::Error,
    },
}

/// Free bytes in words, if there are any to speak of.
fn in_words(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |free| format!(" and {free} are free"))
}

/// Memory of HBM, mapped into this process, all zeros at first.
#[derive(Debug)]
pub struct HbmBacking {
    file: Arc<File>,
    region: Guarded<Arc<MmapRegion>>,
    tracked: OnceLock<Box<Tracked>>,
    size: u64,
    id: BackingId,
    /// Where the file is, if it has a name; it is removed at the end.
    path: Option<PathBuf>,
    /// Whether the name is gone already; what is there now would be another's.
    removed: AtomicBool,
    /// Whether it is made of huge pages, which have to be there before they are touched.
    huge: bool,
}

/// A further mapping of the same memory, and the next one.
#[derive(Debug)]
struct Tracked {
    mapping: Box<dyn Mapping>,
    next: OnceLock<Box<Tracked>>,
}

/// A guarded mapping, whatever it tracks.
trait Mapping: fmt::Debug + Send + Sync {
    fn is_lost(&self) -> bool;
    fn is_news(&self) -> bool;
}

impl<B: fmt::Debug + Bitmap + Send + Sync> Mapping for Guarded<Arc<MmapRegion<B>>> {
    fn is_lost(&self) -> bool {
        Guarded::is_lost(self)
    }

    fn is_news(&self) -> bool {
        Guarded::is_news(self)
    }
}

/// Removes a named file unless it is kept until a backing owns it.
struct Named(Option<PathBuf>);

impl Drop for Named {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = unlink(path);
        }
    }
}

impl HbmBacking {
    /// `size` bytes of anonymous memory; `name` shows in `/proc`.
    ///
    /// # Errors
    /// [`HbmError::Size`], [`HbmError::Host`].
    pub fn memfd(name: &str, size: u64) -> Result<Self, HbmError> {
        check(name, size)?;
        let host = |doing| {
            move |errno: Errno| HbmError::Host {
                doing,
                name: name.to_owned(),
                size,
                source: errno.into(),
            }
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create(name, flags).map_err(host("create a memory file of"))?;
        ftruncate(&fd, size).map_err(host("size a memory file to"))?;
        // Whoever is given the descriptor cannot cut the memory off under the device, which would lose it.
        let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&fd, seals).map_err(host("seal a memory file of"))?;
        Self::map(name, size, fd, Named(None))
    }

    /// `size` bytes of huge pages of `page` bytes (2 MiB or 1 GiB), a multiple of that, taken from the host's pool now: a
    /// page that is not there when it is touched would lose all of it.
    ///
    /// # Errors
    /// [`HbmError::Size`], [`HbmError::Host`], [`HbmError::HugePages`] if the pool has too few.
    pub fn hugetlb(name: &str, size: u64, page: u64) -> Result<Self, HbmError> {
        check(name, size)?;
        let host = |doing| {
            move |errno: Errno| HbmError::Host {
                doing,
                name: name.to_owned(),
                size,
                source: errno.into(),
            }
        };
        let page_flag = match page {
            GIB => MemfdFlags::HUGE_1GB,
            _ => MemfdFlags::HUGE_2MB,
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | page_flag;
        let fd = memfd_create(name, flags).map_err(host("create a file of huge pages of"))?;
        ftruncate(&fd, size).map_err(host("size a file of huge pages to"))?;
        fallocate(&fd, FallocateFlags::empty(), 0, size).map_err(|errno| HbmError::HugePages {
            name: name.to_owned(),
            pages: size.div_ceil(page.max(1)),
            kib: page / 1024,
            errno,
        })?;
        let mut backing = Self::map(name, size, fd, Named(None))?;
        backing.huge = true;
        Ok(backing)
    }

    /// `size` bytes in the file `name` in the existing directory `dir`, created with mode 0600, locked, and
    /// removed when this is dropped. A file that a killed process left is taken over and emptied.
    ///
    /// # Errors
    /// [`HbmError`]; nothing is left behind then.
    pub fn in_dir(dir: &Path, name: &str, size: u64) -> Result<Self, HbmError> {
        check(name, size)?;
        let directory = |errno| HbmError::Directory {
            dir: dir.to_owned(),
            name: name.to_owned(),
            size,
            free: free_in(dir),
            errno,
        };
        let path = dir.join(name);
        let (fd, named) = claim(&path, directory)?;
        ftruncate(&fd, 0).map_err(directory)?;
        ftruncate(&fd, size).map_err(directory)?;
        Self::map(name, size, fd, named)
    }

    /// The file's name, if it has one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The mapping, to show it to a guest of this process. It lasts as long as somebody holds it; as long as this value
    /// exists, a process that cuts a named file short does not end this one.
    #[must_use]
    pub fn mapping(&self) -> Arc<MmapRegion> {
        Arc::clone(self.region.owner())
    }

    /// A mapping of its own of all of the memory, with a bitmap of what is written through it. It stays as long as this value
    /// exists, and longer if somebody holds it.
    ///
    /// # Errors
    /// [`HbmError::Host`].
    pub fn map_tracked<B>(&self) -> Result<Arc<MmapRegion<B>>, HbmError>
    where
        B: NewBitmap + fmt::Debug + Send + Sync + 'static,
    {
        let file = FileOffset::from_arc(Arc::clone(&self.file), 0);
        let region = MmapRegion::<B>::from_file(file, self.region.owner().size());
        let region = region.map_err(|error| HbmError::Host {
            doing: "map",
            name: self.name(),
            size: self.size,
            source: io::Error::other(error),
        })?;
        let region = Arc::new(region);
        let mut tracked = Box::new(Tracked {
            mapping: Box::new(Guarded::new(Arc::clone(&region))),
            next: OnceLock::new(),
        });
        let mut end = &self.tracked;
        while let Err(back) = end.set(tracked) {
            tracked = back;
            end = end.get().map_or(end, |it| &it.next);
        }
        Ok(region)
    }

    /// Removes the file's name now, if it has one. The memory stays until the last owner lets go of it.
    pub fn remove_name(&self) {
        if let Some(path) = &self.path
            && !self.removed.swap(true, Ordering::AcqRel)
        {
            // The lock is held, so the name is this very file's.
            let _ = unlink(path);
        }
    }

    fn map(name: &str, size: u64, fd: OwnedFd, mut named: Named) -> Result<Self, HbmError> {
        let host = |source| HbmError::Host {
            doing: "map",
            name: name.to_owned(),
            size,
            source,
        };
        let stat = fstat(&fd).map_err(|errno| host(errno.into()))?;
        let id = BackingId {
            device: stat.st_dev,
            inode: stat.st_ino,
        };
        let len = usize::try_from(size).map_err(|_| host(Errno::NOMEM.into()))?;
        let file = Arc::new(File::from(fd));
        // Shared, readable, writable, and nothing reserved.
        let region = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), 0), len)
            .map_err(|error| host(io::Error::other(error)))?;
        Ok(Self {
            file,
            region: Guarded::new(Arc::new(region)),
            tracked: OnceLock::new(),
            size,
            id,
            path: named.0.take(),
            removed: AtomicBool::new(false),
            huge: false,
        })
    }

    /// Whether the memory is that of the file still. Once it is not, nobody gets any of it: what the device has in its
    /// place is not what CPUs see, and would not be scrubbed.
    fn check(&self) -> io::Result<()> {
        let first: &dyn Mapping = &self.region;
        let tracked = std::iter::successors(self.tracked.get(), |it| it.next.get());
        let tracked = tracked.map(|it| &*it.mapping);
        let Some(lost) = std::iter::once(first)
            .chain(tracked)
            .find(|it| it.is_lost())
        else {
            return Ok(());
        };
        if lost.is_news() {
            self.tell_lost();
        }
        Err(io::Error::other("its file was cut short or has no room"))
    }

    #[cold]
    fn tell_lost(&self) {
        let (name, size) = (self.name(), self.size);
        tracing::error!(
            "HBM {name} of {size:#x} bytes is lost: its file was cut short or has no room; accesses fail"
        );
    }

    /// For messages.
    fn name(&self) -> String {
        self.path.as_deref().map_or_else(
            || "without a name".to_owned(),
            |path| path.display().to_string(),
        )
    }

    /// Makes bytes inside the memory zero and gives their pages back.
    fn scrub_range(&self, offset: u64, size: u64) -> io::Result<()> {
        self.check()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&*self.file, flags, offset, size) {
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return self.write_zeros(offset, size),
                // Huge pages went back to the host's pool, where others may take them.
                Ok(()) if self.huge => {
                    return Ok(fallocate(
                        &*self.file,
                        FallocateFlags::KEEP_SIZE,
                        offset,
                        size,
                    )?);
                }
                other => return Ok(other?),
            }
        }
    }

    /// Overwrites with zeros, for file systems that cannot punch holes.
    fn write_zeros(&self, offset: u64, size: u64) -> io::Result<()> {
        let zeros = vec![0; 1 << 20];
        let mut at = 0;
        while at < size {
            let left = usize::try_from(size - at).unwrap_or(usize::MAX);
            let piece = zeros.get(..left).unwrap_or(&zeros);
            self.file.write_all_at(piece, offset.saturating_add(at))?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Divides the memory into parts of so many bytes, one behind the other: partitions that a client maps as one.
    ///
    /// # Errors
    /// [`HbmError::Parts`] if the parts are not just all of the memory, [`HbmError::Host`] if the host gives no
    /// descriptor for clients.
    pub fn split(self: &Arc<Self>, parts: &[u64]) -> Result<Vec<HbmPart>, HbmError> {
        let all = parts
            .iter()
            .try_fold(0_u64, |all, size| all.checked_add(*size));
        if all != Some(self.size) || parts.contains(&0) {
            return Err(HbmError::Parts {
                parts: parts.to_vec(),
                size: self.size,
            });
        }
        let lent = self.lend().map_err(|errno| HbmError::Host {
            doing: "open a second time",
            name: self.name(),
            size: self.size,
            source: errno.into(),
        })?;
        let lent = Arc::new(lent);
        let mut next = 0;
        let part = |size: &u64| {
            let offset = next;
            next += size;
            HbmPart {
                whole: Arc::clone(self),
                lent: Arc::clone(&lent),
                offset,
                size: *size,
            }
        };
        Ok(parts.iter().map(part).collect())
    }

    /// A descriptor for a client. It does not share the lock of a named file: a client that outlives this process
    /// would keep the next one out.
    fn lend(&self) -> Result<OwnedFd, Errno> {
        if self.path.is_none() {
            return rustix::io::fcntl_dupfd_cloexec(&*self.file, 3);
        }
        let again = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        open(again, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
    }
}

fn check(name: &str, size: u64) -> Result<(), HbmError> {
    let mut parts = Path::new(name).components();
    let plain = matches!(parts.next(), Some(std::path::Component::Normal(part)) if part == name);
    if !plain || name.contains('\0') {
        return Err(HbmError::Name {
            name: name.to_owned(),
        });
    }
    match i64::try_from(size) {
        Ok(1..) => Ok(()),
        _ => Err(HbmError::Size {
            name: name.to_owned(),
            size,
        }),
    }
}

/// Opens or creates the file and locks it, so that no other process takes it over.
fn claim(path: &Path, directory: impl Fn(Errno) -> HbmError) -> Result<(OwnedFd, Named), HbmError> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let foreign = || HbmError::Foreign {
        path: path.to_owned(),
    };
    loop {
        let fd = match open(path, flags, Mode::RUSR | Mode::WUSR) {
            Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => return Err(foreign()),
            other => other.map_err(&directory)?,
        };
        let stat = fstat(&fd).map_err(&directory)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile
            || stat.st_uid != geteuid().as_raw()
        {
            return Err(foreign());
        }
        match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                return Err(HbmError::InUse {
                    path: path.to_owned(),
                });
            }
            other => other.map_err(&directory)?,
        }
        // The last owner may have removed the name between the opening and the lock.
        let same =
            lstat(path).is_ok_and(|now| (now.st_dev, now.st_ino) == (stat.st_dev, stat.st_ino));
        if same {
            let named = Named(Some(path.to_owned()));
            fchmod(&fd, Mode::RUSR | Mode::WUSR).map_err(&directory)?;
            return Ok((fd, named));
        }
    }
}

/// Bytes that this user can still write in a directory.
fn free_in(dir: &Path) -> Option<u64> {
    let stat = statvfs(dir).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

impl Drop for HbmBacking {
    fn drop(&mut self) {
        self.remove_name();
    }
}

impl AsFd for HbmBacking {
    /// The file, to hand to a VMM.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl HbmStore for HbmBacking {
    fn size(&self) -> u64 {
        self.size
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        let narrow = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        self.check()
            .map_err(VolatileMemoryError::IOError)
            .and_then(|()| self.region.owner().get_slice(narrow(offset), narrow(len)))
    }

    fn backing(&self) -> (BackingId, u64) {
        (self.id, 0)
    }

    fn scrub(&self, offset: u64, len: u64) -> io::Result<()> {
        if inside(offset, len, self.size) {
            return self.scrub_range(offset, len);
        }
        Err(io::ErrorKind::InvalidInput.into())
    }
}

/// Whether `len` bytes from `offset` lie in memory of `size` bytes.
fn inside(offset: u64, len: u64, size: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= size)
}

/// A part of a memory, as one partition that a client maps together with others. Made by [`HbmBacking::split`].
#[derive(Debug)]
pub struct HbmPart {
    whole: Arc<HbmBacking>,
    lent: Arc<OwnedFd>,
    offset: u64,
    size: u64,
}

impl HbmStore for HbmPart {
    fn size(&self) -> u64 {
        self.size
    }

    fn slice(&self, offset: u64, len: u64) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        let at = if inside(offset, len, self.size) {
            self.offset + offset
        } else {
            // Outside the whole memory too: it refuses.
            u64::MAX
        };
        self.whole.slice(at, len)
    }

    fn backing(&self) -> (BackingId, u64) {
        (self.whole.id, self.offset)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.lent.as_fd())
    }

    fn scrub(&self, offset: u64, len: u64) -> io::Result<()> {
        if inside(offset, len, self.size) {
            return self.whole.scrub_range(self.offset + offset, len);
        }
        Err(io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use vm_memory::Bytes as _;
    use vm_memory::bitmap::AtomicBitmap;

    /// Huge pages of the host's pool, given back at the end.
    struct Pool(String);

    impl Pool {
        const PAGES: &str = "/proc/sys/vm/nr_hugepages";

        /// A pool of so many pages more; none if this user may not have them.
        fn grow(pages: u64) -> Option<Pool> {
            let before = std::fs::read_to_string(Pool::PAGES).ok()?.trim().to_owned();
            let wanted = before.parse::<u64>().ok()? + pages;
            std::fs::write(Pool::PAGES, wanted.to_string()).ok()?;
            let pool = Pool(before);
            let now = std::fs::read_to_string(Pool::PAGES).ok()?;
            (now.trim() == wanted.to_string()).then_some(pool)
        }
    }

    impl Drop for Pool {
        fn drop(&mut self) {
            let _ = std::fs::write(Pool::PAGES, &self.0);
        }
    }

    #[test]
    fn huge_pages_are_there_or_the_number_is_said() {
        const PAGE: u64 = 2 << 20;
        let error = HbmBacking::hugetlb("gpu0-p0.hbm", 1 << 46, PAGE).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("33554432 huge page(s) of 2048 KiB"), "{text}");
        let Some(_pool) = Pool::grow(4) else {
            println!("skipped: this user cannot reserve huge pages");
            return;
        };
        let hbm = HbmBacking::hugetlb("gpu0-p0.hbm", 4 * PAGE, PAGE).unwrap();
        let last = hbm.slice(4 * PAGE - 8, 8).unwrap();
        last.write_obj(7_u64, 0).unwrap();
        let seen: u64 = last.read_obj(0).unwrap();
        assert_eq!(seen, 7);
        hbm.scrub(0, hbm.size()).unwrap();
        // The pages are this file's still, or this read would kill the test.
        let seen: u64 = last.read_obj(0).unwrap();
        assert_eq!(seen, 0);
        assert!(hbm.file.metadata().unwrap().blocks() * 512 >= 4 * PAGE);
    }

    /// What both kinds of backing have to do.
    fn laws(hbm: &HbmBacking) {
        assert_eq!(hbm.size(), GIB);
        let meta = hbm.file.metadata().unwrap();
        assert_eq!(meta.len(), GIB);
        assert_eq!(meta.blocks(), 0, "nothing is touched yet");
        let id = BackingId {
            device: meta.dev(),
            inode: meta.ino(),
        };
        assert_eq!(hbm.backing(), (id, 0));

        let last = hbm.slice(GIB - 8, 8).unwrap();
        last.write_slice(b"ABCDEFGH", 0).unwrap();
        let mut seen = [0; 8];
        hbm.file.read_exact_at(&mut seen, GIB - 8).unwrap();
        assert_eq!(&seen, b"ABCDEFGH");
        assert!(hbm.slice(GIB - 8, 9).is_err());
        assert!(hbm.slice(u64::MAX, 1).is_err());

        hbm.scrub(0, hbm.size()).unwrap();
        // Before the reads below, which give shared memory its pages again.
        assert_eq!(hbm.file.metadata().unwrap().blocks(), 0);
        last.read_slice(&mut seen, 0).unwrap();
        assert_eq!(seen, [0; 8]);
        hbm.file.read_exact_at(&mut seen, GIB - 8).unwrap();
        assert_eq!(seen, [0; 8]);
        assert_eq!(hbm.file.metadata().unwrap().len(), GIB);
    }

    #[test]
    fn memfd_is_sparse_shared_and_scrubbed() {
        let hbm = HbmBacking::memfd("gpu0.hbm0", GIB).unwrap();
        laws(&hbm);
        assert!(hbm.file.set_len(GIB / 2).is_err(), "sealed");
    }

    #[test]
    fn file_is_sparse_shared_scrubbed_private_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let hbm = HbmBacking::in_dir(dir.path(), "gpu0.hbm0", GIB).unwrap();
        laws(&hbm);
        let path = hbm.path().unwrap().to_owned();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(hbm);
        assert!(!path.exists());
    }

    #[test]
    fn a_name_is_removed_once_and_never_another_files() {
        let dir = tempfile::tempdir().unwrap();
        let hbm = Arc::new(HbmBacking::in_dir(dir.path(), "hbm", 4096).unwrap());
        let held = Arc::clone(&hbm);
        hbm.remove_name();
        drop(hbm);
        assert!(!dir.path().join("hbm").exists());
        let next = HbmBacking::in_dir(dir.path(), "hbm", 4096).unwrap();
        drop(held);
        assert!(dir.path().join("hbm").exists());
        drop(next);
        assert!(!dir.path().join("hbm").exists());
    }

    #[test]
    fn zeros_are_written_where_holes_cannot_be_punched() {
        let hbm = HbmBacking::memfd("x", (3 << 20) + 5).unwrap();
        let all = hbm.slice(0, hbm.size()).unwrap();
        all.write_slice(&vec![7; all.len()], 0).unwrap();
        hbm.write_zeros(0, hbm.size()).unwrap();
        let mut seen = vec![1; all.len()];
        all.read_slice(&mut seen, 0).unwrap();
        assert!(seen.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn parts_are_the_memory_one_behind_the_other_and_scrubbed_alone() {
        let dir = tempfile::tempdir().unwrap();
        for whole in [
            HbmBacking::memfd("x", 0x6000).unwrap(),
            HbmBacking::in_dir(dir.path(), "x", 0x6000).unwrap(),
        ] {
            let whole = Arc::new(whole);
            let parts = whole.split(&[0x1000, 0x3000, 0x2000]).unwrap();
            let (id, _) = whole.backing();
            let places: Vec<_> = parts.iter().map(HbmStore::backing).collect();
            assert_eq!(places, [(id, 0), (id, 0x1000), (id, 0x4000)]);
            let all = whole.slice(0, 0x6000).unwrap();
            all.write_slice(&[7; 0x6000], 0).unwrap();
            let part = &parts[1];
            assert_eq!(part.size(), 0x3000);
            part.slice(0x2ff8, 8).unwrap().write_obj(9_u64, 0).unwrap();
            assert_eq!(all.read_obj::<u64>(0x3ff8).unwrap(), 9);
            assert!(part.slice(0x2ff8, 9).is_err(), "the next partition's");
            assert!(part.slice(0, 0x3001).is_err());
            assert!(part.slice(u64::MAX, 1).is_err());
            assert!(part.slice(1, u64::MAX).is_err());
            part.scrub(0, part.size()).unwrap();
            let seen = |at| all.read_obj::<u8>(at).unwrap();
            assert_eq!([0, 0xfff, 0x1000, 0x3fff].map(seen), [7, 7, 0, 0]);
            assert_eq!([0x4000, 0x5fff].map(seen), [7, 7]);
            let lent = part.file().unwrap();
            let mut byte = [0];
            assert_eq!(rustix::io::pread(lent, &mut byte, 0xfff), Ok(1));
            assert_eq!(byte, [7]);
            for wrong in [&[0x6000, 0][..], &[0x5000], &[], &[u64::MAX, 0x6001]] {
                let error = whole.split(wrong).unwrap_err();
                assert!(error.to_string().contains("24576"), "{error}");
            }
        }
    }

    #[test]
    fn a_client_that_outlives_us_holds_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let hbm = Arc::new(HbmBacking::in_dir(dir.path(), "hbm", 4096).unwrap());
        let parts = hbm.split(&[4096]).unwrap();
        let client = parts[0].file().unwrap().try_clone_to_owned().unwrap();
        // A name of its own for the file, by which the next one finds it.
        let kept = dir.path().join("kept");
        std::fs::hard_link(dir.path().join("hbm"), &kept).unwrap();
        drop((hbm, parts));
        let next = open(&kept, OFlags::RDWR, Mode::empty()).unwrap();
        let lock = flock(&next, FlockOperation::NonBlockingLockExclusive);
        assert!(lock.is_ok(), "{client:?}");
    }

    #[test]
    fn a_live_file_is_refused_and_a_stale_one_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let live = HbmBacking::in_dir(dir.path(), "hbm", 4096).unwrap();
        live.slice(0, 1).unwrap().write_obj(9_u8, 0).unwrap();
        let error = HbmBacking::in_dir(dir.path(), "hbm", 4096).unwrap_err();
        assert!(matches!(error, HbmError::InUse { .. }), "{error}");
        assert!(dir.path().join("hbm").exists());
        drop(live);

        std::fs::write(dir.path().join("hbm"), [1; 10_000]).unwrap();
        let taken = HbmBacking::in_dir(dir.path(), "hbm", 8192).unwrap();
        assert_eq!(taken.file.metadata().unwrap().len(), 8192);
        let byte: u8 = taken.slice(0, 1).unwrap().read_obj(0).unwrap();
        assert_eq!(byte, 0);
    }

    #[test]
    fn memory_whose_file_another_process_cuts_short_is_an_error_from_then_on() {
        let dir = tempfile::tempdir().unwrap();
        let hbm = HbmBacking::in_dir(dir.path(), "hbm", 0x4000).unwrap();
        let whole = HbmBacking::in_dir(dir.path(), "whole", 0x4000).unwrap();
        let all = hbm.slice(0, 0x4000).unwrap();
        all.write_slice(&[7; 0x4000], 0).unwrap();
        let other = File::options()
            .write(true)
            .open(hbm.path().unwrap())
            .unwrap();
        other.set_len(0x1000).unwrap();
        // The access that was under way goes on.
        all.write_obj(9_u64, 0x3000).unwrap();
        for (offset, len) in [(0, 1), (0x3000, 8)] {
            let error = hbm.slice(offset, len).unwrap_err();
            assert!(error.to_string().contains("cut short"), "{error}");
        }
        // What it left is in no file that a scrub could clear, and nobody gets to see it.
        assert!(hbm.scrub(0, 0x4000).is_err());
        other.set_len(0x4000).unwrap();
        assert!(hbm.slice(0, 1).is_err());
        whole.slice(0x3fff, 1).unwrap().write_obj(1_u8, 0).unwrap();
        whole.scrub(0, 0x4000).unwrap();
    }

    #[test]
    fn a_tracked_mapping_is_the_same_memory_and_lost_with_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let hbm = HbmBacking::in_dir(dir.path(), "hbm", 0x4000).unwrap();
        let tracked: Vec<Arc<MmapRegion<AtomicBitmap>>> =
            (0..3).map(|_| hbm.map_tracked().unwrap()).collect();
        for (at, region) in (0..).zip(&tracked) {
            region.as_volatile_slice().write_obj(7_u8, at).unwrap();
            let seen: u8 = hbm.slice(0, 0x4000).unwrap().read_obj(at).unwrap();
            assert_eq!(seen, 7);
            assert!(region.bitmap().dirty_at(0) && !region.bitmap().dirty_at(0x1000));
        }
        let other = File::options().write(true).open(hbm.path().unwrap());
        other.unwrap().set_len(0x1000).unwrap();
        let [_, _, last] = &tracked[..] else {
            panic!("three")
        };
        let seen: u8 = last.as_volatile_slice().read_obj(0x3000).unwrap();
        assert_eq!(seen, 0);
        // What a CPU has there now, the device would not see.
        assert!(hbm.slice(0, 1).is_err());
    }

    #[test]
    fn errors_name_the_directory_the_need_and_what_is_free() {
        let none = Path::new("/nonexistent/hbm");
        let text = HbmBacking::in_dir(none, "gpu0", 77).unwrap_err();
        let text = text.to_string();
        assert!(text.contains("/nonexistent/hbm") && text.contains("77 bytes"));
        assert!(!text.contains('\n'), "{text}");

        let dir = tempfile::tempdir().unwrap();
        let huge = HbmBacking::in_dir(dir.path(), "gpu0", i64::MAX as u64);
        let huge = huge.unwrap_err();
        assert!(huge.to_string().contains("are needed"), "{huge}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

        for name in ["", ".", "..", "a/b", "/a", "a/"] {
            let error = HbmBacking::in_dir(dir.path(), name, 1).unwrap_err();
            assert!(matches!(error, HbmError::Name { .. }), "{name:?}");
        }
        assert!(matches!(
            HbmBacking::memfd("x", 0),
            Err(HbmError::Size { size: 0, .. })
        ));
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        assert!(matches!(
            HbmBacking::in_dir(dir.path(), "link", 1),
            Err(HbmError::Foreign { .. })
        ));
    }
}
