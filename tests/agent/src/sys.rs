//! The system calls that the agent needs and Rust's standard library has not: the only file with `unsafe` in it.

#![allow(unsafe_code, reason = "mmap and MMIO; see the SAFETY notes")]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags};

/// Memory shared with a device or another process, accessed in whole words only.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// Where offset 0 is, in bytes from `base`.
    start: usize,
}

// SAFETY: the mapping is owned, and every access is a volatile or atomic one of a whole word.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` bytes of a file from `offset`, shared.
    pub fn file(file: &File, offset: u64, len: usize) -> io::Result<Mapping> {
        // SAFETY: a fresh mapping at an address that the kernel chooses aliases no Rust object.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file.as_fd(),
                offset,
            )?
        };
        NonNull::new(base.cast())
            .map(|base| Mapping {
                base,
                len,
                start: 0,
            })
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))
    }

    /// The same mapping with offset 0 moved up by `start` bytes.
    pub fn from(mut self, start: usize) -> Mapping {
        self.start += start;
        self
    }

    /// One huge page of 2 MiB, populated and locked. It has one physical address, which does not change.
    pub fn huge_page() -> io::Result<Mapping> {
        let len = 2 << 20;
        // SAFETY: a fresh anonymous mapping at an address that the kernel chooses aliases no Rust object.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::POPULATE | MapFlags::LOCKED,
            )?
        };
        let base = NonNull::new(base.cast())
            .ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Mapping {
            base,
            len,
            start: 0,
        })
    }

    /// Physical address of the first byte, from `/proc/self/pagemap` (Linux `Documentation/admin-guide/mm/pagemap.rst`).
    pub fn physical(&self) -> io::Result<u64> {
        let mut pagemap = File::open("/proc/self/pagemap")?;
        let page = (self.base.as_ptr().expose_provenance() + self.start) as u64 / 4096;
        pagemap.seek(SeekFrom::Start(page * 8))?;
        let mut entry = [0; 8];
        pagemap.read_exact(&mut entry)?;
        let entry = u64::from_le_bytes(entry);
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 || frame == 0 {
            return Err(io::Error::other(format!(
                "no frame in the pagemap entry {entry:#x}"
            )));
        }
        Ok(frame * 4096)
    }

    /// Bytes from offset 0 on.
    pub fn len(&self) -> usize {
        self.len.saturating_sub(self.start)
    }

    fn word<T>(&self, offset: usize) -> *mut T {
        let size = size_of::<T>();
        let offset = self.start.saturating_add(offset);
        assert!(
            offset.is_multiple_of(size)
                && offset.checked_add(size).is_some_and(|end| end <= self.len),
            "offset {offset:#x} is outside the mapping of {:#x} bytes",
            self.len
        );
        // SAFETY: the offset was just checked to lie in the mapping.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }

    /// Reads 4 bytes, little-endian, with one access.
    pub fn read32(&self, offset: usize) -> u32 {
        // SAFETY: `word` checked bounds and alignment; the memory stays mapped as long as `self` lives.
        unsafe { AtomicU32::from_ptr(self.word(offset)) }.load(Ordering::Acquire)
    }

    /// Writes 4 bytes, little-endian, with one access.
    pub fn write32(&self, offset: usize, value: u32) {
        // SAFETY: as in `read32`.
        unsafe { AtomicU32::from_ptr(self.word(offset)) }.store(value, Ordering::Release);
    }

    /// Reads 8 bytes, little-endian, with one access.
    pub fn read64(&self, offset: usize) -> u64 {
        // SAFETY: as in `read32`.
        unsafe { AtomicU64::from_ptr(self.word(offset)) }.load(Ordering::Acquire)
    }

    /// Writes 8 bytes, little-endian, with one access.
    pub fn write64(&self, offset: usize, value: u64) {
        // SAFETY: as in `read32`.
        unsafe { AtomicU64::from_ptr(self.word(offset)) }.store(value, Ordering::Release);
    }

    /// Writes the words `seed`, `seed + 1` and so on.
    pub fn fill(&self, offset: usize, len: usize, seed: u64) {
        for (word, at) in (offset..offset + len).step_by(8).enumerate() {
            self.write64(at, seed.wrapping_add(word as u64));
        }
        fence(Ordering::SeqCst);
    }

    /// Checks for the words `seed`, `seed + 1` and so on; the error names the first that is not there.
    pub fn check(&self, offset: usize, len: usize, seed: u64) -> Result<(), String> {
        self.check_words(offset, len, |word| seed.wrapping_add(word))
    }

    /// Checks for zeros.
    pub fn check_zero(&self, offset: usize, len: usize) -> Result<(), String> {
        self.check_words(offset, len, |_| 0)
    }

    fn check_words(
        &self,
        offset: usize,
        len: usize,
        expected: impl Fn(u64) -> u64,
    ) -> Result<(), String> {
        for (word, at) in (offset..offset + len).step_by(8).enumerate() {
            let (seen, expected) = (self.read64(at), expected(word as u64));
            if seen != expected {
                return Err(format!(
                    "{seen:#x} instead of {expected:#x} at offset {at:#x}"
                ));
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that mmap gave, and no reference to it outlives `self`. A failure leaks it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Loads a kernel module.
pub fn load_module(module: &File, parameters: &str) -> io::Result<()> {
    let parameters = std::ffi::CString::new(parameters)?;
    Ok(rustix::system::finit_module(
        module.as_fd(),
        &parameters,
        0,
    )?)
}

/// Whether the hypervisor says that it is KVM (CPUID leaf 4000_0000h).
pub fn on_kvm() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    leaf.ebx.to_le_bytes() == *b"KVMK"
}

/// Turns a terminal into a plain byte stream.
pub fn raw_terminal(terminal: &File) -> io::Result<()> {
    let mut attributes = rustix::termios::tcgetattr(terminal)?;
    attributes.make_raw();
    Ok(rustix::termios::tcsetattr(
        terminal,
        rustix::termios::OptionalActions::Now,
        &attributes,
    )?)
}
