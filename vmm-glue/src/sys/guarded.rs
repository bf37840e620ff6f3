//! Mapped files whose pages may go away.
//!
//! A file that others can write can be cut short under a mapping, and a sparse one can lack room for a page. An access
//! to a page that is not there raises SIGBUS, which ends the process and with it the devices of every client. So
//! mappings are entered in a table. A handler looks the address up and puts anonymous memory, zeros, over the whole
//! mapping: the access goes on, and the mapping is lost. Whoever made the access asks for that afterwards
//! ([`Guarded::is_lost`]).
//!
//! The whole mapping and not a page of it: it has the boundaries that its pages want, whatever their size; it costs one
//! fault and one entry in the kernel's list of mappings, which is short; and half a map is of no use to anybody.
//!
//! The handler is installed with the first mapping, once. Faults elsewhere, signals from other processes and memory that
//! the hardware reports as broken go to the action that was there before. A program that sets one of its own later
//! has to pass SIGBUS on to the one that it finds. The crate `signal-hook` cannot be used: it calls the action that was
//! there before in any case, and that of Rust's runtime gives the signal its default action back.
#![allow(unsafe_code)]

mod table;

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, OnceLock};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vm_memory::MmapRegion;
use vm_memory::bitmap::Bitmap;

use table::{Entry, Table};

static TABLE: Table = Table::new();

/// Whose the signal was before; the error if it could not be taken.
static BEFORE: OnceLock<Result<libc::sigaction, io::ErrorKind>> = OnceLock::new();

/// What can own a mapping: the region, or a share in it.
pub trait Owner: sealed::Owner {}

impl<R: sealed::Owner> Owner for R {}

mod sealed {
    use super::{Arc, Bitmap, MmapRegion, Range};

    pub trait Owner {
        /// The mapping's addresses: the same at each call, mapped as long as `self` exists.
        fn range(&self) -> Range<usize>;

        /// How it is mapped (`PROT_*`).
        fn protection(&self) -> i32;
    }

    impl<B: Bitmap> Owner for MmapRegion<B> {
        fn range(&self) -> Range<usize> {
            let start = self.as_ptr().addr();
            start..start.saturating_add(self.size())
        }

        fn protection(&self) -> i32 {
            self.prot()
        }
    }

    impl<R: Owner> Owner for Arc<R> {
        fn range(&self) -> Range<usize> {
            (**self).range()
        }

        fn protection(&self) -> i32 {
            (**self).protection()
        }
    }
}

/// A mapping that may lose its pages and stays accessible.
#[derive(Debug)]
pub struct Guarded<R: Owner> {
    /// Dropped before the region; none if the host does not let us guard it.
    entry: Option<Entry>,
    region: R,
}

impl<R: Owner> Guarded<R> {
    /// Guards a mapping, which is in no other `Guarded`.
    #[must_use]
    pub fn new(region: R) -> Guarded<R> {
        let entry = match take_signal() {
            Ok(_) => TABLE.enter(region.range(), region.protection()),
            Err(error) => {
                tracing::warn!("SIGBUS cannot be handled: {error}; memory is not guarded");
                None
            }
        };
        Guarded { entry, region }
    }

    /// What owns the mapping. A share that is kept longer than this value is not guarded any more.
    pub fn owner(&self) -> &R {
        &self.region
    }

    /// Whether the mapping was lost: then nobody else has what is written there, and what is read may be zeros. True
    /// for every access that has met such memory, as soon as it has.
    pub fn is_lost(&self) -> bool {
        self.entry.as_ref().is_some_and(Entry::is_lost)
    }

    /// Whether it was lost and this was not yet asked since.
    pub fn is_news(&self) -> bool {
        self.entry.as_ref().is_some_and(Entry::is_news)
    }
}

/// Mappings that are guarded now, in this process.
#[must_use]
pub fn count() -> usize {
    TABLE.len()
}

/// Takes SIGBUS over, if that was not done before. What it was before.
fn take_signal() -> Result<&'static libc::sigaction, io::ErrorKind> {
    let taken = BEFORE.get_or_init(|| {
        // SAFETY: a `sigaction` is numbers, a pointer that may be null and a set of signals, all of which may be zero.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: nothing is changed; `before` is written.
        if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } == 0 {
            Ok(before)
        } else {
            Err(io::Error::last_os_error().kind())
        }
    });
    // The handler may need at once what was before.
    let before = taken.as_ref().map_err(|error| *error)?;
    static INSTALLED: OnceLock<Result<(), io::ErrorKind>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void) = on_bus_error;
        // SAFETY: as above.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        ours.sa_sigaction = handler as libc::sighandler_t;
        // On the thread's own signal stack, as Rust's runtime has it.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `handler` has the form that SA_SIGINFO asks for, and does only what a handler may: it loads and stores
        // atomics, makes system calls, and takes no lock.
        match unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().kind()),
        }
    });
    (*installed)?;
    Ok(before)
}

/// The handler. It leaves `errno` as it is: no call in it fails, unless the process ends.
extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO what it tells of the signal, until the handler returns.
    let code = unsafe { (*info).si_code };
    // Not BUS_MCEERR_AR, of memory that the hardware has lost: that is no client's doing.
    if code == libc::BUS_ADRERR {
        // SAFETY: as above; with this code it is a fault's, which has an address.
        let address = unsafe { (*info).si_addr() }.addr();
        if TABLE.rescue(address, replace) {
            return;
        }
    }
    pass_on(signal, info, context, code);
}

/// Puts zeros over a mapping that is in the table.
fn replace(range: Range<usize>, protection: i32) -> bool {
    let protection = ProtFlags::from_bits_retain(protection.cast_unsigned());
    // Pages come when they are touched; none is promised.
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let start = ptr::without_provenance_mut(range.start);
    // SAFETY: the range is all of a mapping that a `Guarded` owns. It stays mapped meanwhile: a `Guarded` leaves the table
    // before it unmaps, and it is borrowed by the very access that has met the fault. Nothing but volatile and atomic
    // accesses leads there, which a change of the contents cannot harm; protection and extent stay as they are.
    unsafe { mmap_anonymous(start, range.len(), protection, flags) }.is_ok()
}

/// Does what would have been done with the signal if it were not ours.
fn pass_on(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
    code: libc::c_int,
) {
    let Some(Ok(before)) = BEFORE.get() else {
        return;
    };
    // Codes of signals that a process sent are not positive. Such a signal does not come again by itself.
    let is_fault = code > 0;
    match before.sa_sigaction {
        libc::SIG_IGN if !is_fault => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the action is the one that was in force before.
            unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
            if !is_fault {
                // SAFETY: it takes a number. The signal is blocked until the handler returns.
                unsafe { libc::raise(signal) };
            }
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void);
            // SAFETY: whoever set it as the action for this signal, with SA_SIGINFO, said that it is such a function.
            let handler = unsafe { std::mem::transmute::<libc::sighandler_t, Handler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            type Handler = extern "C" fn(libc::c_int);
            // SAFETY: whoever set it as the action for this signal, without SA_SIGINFO, said that it is such a function.
            let handler = unsafe { std::mem::transmute::<libc::sighandler_t, Handler>(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, ExitStatus};
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::process::{Resource, Rlimit, Signal, setrlimit};
    use vm_memory::{Bytes as _, FileOffset, VolatileMemory as _};

    use super::*;

    const PAGE: usize = 4096;

    fn file(pages: u64) -> File {
        let fd = memfd_create("cut", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, pages * PAGE as u64).unwrap();
        fd.into()
    }

    fn mapping(file: &File, pages: usize) -> MmapRegion {
        let file = FileOffset::new(file.try_clone().unwrap(), 0);
        MmapRegion::from_file(file, pages * PAGE).unwrap()
    }

    /// Whether this is a process for one test alone, and what it is to do.
    fn alone() -> Option<String> {
        let what = std::env::var("GUARDED_ALONE").ok()?;
        // It may end by a signal that leaves a file otherwise.
        let none = Rlimit {
            current: Some(0),
            maximum: Some(0),
        };
        setrlimit(Resource::Core, none).unwrap();
        Some(what)
    }

    /// Runs a test in a process of its own, and tells it what to do; how it ended.
    fn ended(name: &str, what: &str) -> ExitStatus {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("sys::guarded::tests::{name}")])
            .env("GUARDED_ALONE", what)
            .status();
        status.unwrap()
    }

    #[test]
    fn what_its_file_lost_reads_as_zeros_and_counts_as_lost() {
        let (cut, whole) = (file(4), file(4));
        let (other, guarded) = (
            Guarded::new(mapping(&whole, 4)),
            Guarded::new(mapping(&cut, 4)),
        );
        let memory = guarded.owner().as_volatile_slice();
        memory.write_slice(&[7; 4 * PAGE], 0).unwrap();
        cut.set_len(2 * PAGE as u64).unwrap();
        assert!(!guarded.is_lost() && !guarded.is_news());
        // What the file has yet is no fault.
        assert_eq!(memory.read_obj::<u8>(2 * PAGE - 1).unwrap(), 7);
        assert!(!guarded.is_lost());
        assert_eq!(memory.read_obj::<u64>(4 * PAGE - 8).unwrap(), 0);
        assert!(guarded.is_lost());
        assert!(guarded.is_news() && !guarded.is_news());
        // All of it is gone from here, and stays accessible.
        assert_eq!(memory.read_obj::<u8>(0).unwrap(), 0);
        memory.write_slice(&[9; 4 * PAGE], 0).unwrap();
        cut.set_len(4 * PAGE as u64).unwrap();
        assert_eq!(memory.read_obj::<u8>(3 * PAGE).unwrap(), 9);
        let again = mapping(&cut, 4);
        assert_eq!(again.as_volatile_slice().read_obj::<u8>(0).unwrap(), 7);
        assert!(!other.is_lost());
        other
            .owner()
            .as_volatile_slice()
            .write_obj(1_u8, 0)
            .unwrap();
    }

    #[test]
    fn a_mapping_for_reading_alone_stays_so() {
        let cut = file(1);
        let region = MmapRegion::<()>::build(
            Some(FileOffset::new(cut.try_clone().unwrap(), 0)),
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
        );
        let guarded = Guarded::new(Arc::new(region.unwrap()));
        cut.set_len(0).unwrap();
        let memory = guarded.owner().as_volatile_slice();
        assert_eq!(memory.read_obj::<u64>(8).unwrap(), 0);
        let start = format!("{:x}-", guarded.owner().as_ptr().addr());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.contains(" r--p "), "{line}");
    }

    /// A file of huge pages has none until the first access, and the host may have none then.
    #[test]
    fn huge_pages_that_the_host_does_not_have_are_lost() {
        const GIB: usize = 1 << 30;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB;
        let Ok(fd) = memfd_create("huge", flags) else {
            println!("skipped: this host has no pages of 1 GiB");
            return;
        };
        ftruncate(&fd, GIB as u64).unwrap();
        let region = MmapRegion::<()>::from_file(FileOffset::new(fd.into(), 0), GIB);
        let guarded = Guarded::new(region.unwrap());
        let memory = guarded.owner().as_volatile_slice();
        memory.write_obj(5_u8, GIB - 1).unwrap();
        let pool = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
        if std::fs::read_to_string(pool).is_ok_and(|pages| pages.trim() == "0") {
            assert!(guarded.is_lost());
        }
        assert_eq!(memory.read_obj::<u8>(GIB - 1).unwrap(), 5);
    }

    #[test]
    fn threads_that_lose_the_same_mapping_go_on_together() {
        for _ in 0..200 {
            let cut = file(64);
            let guarded = Guarded::new(mapping(&cut, 64));
            cut.set_len(0).unwrap();
            let (told, together) = (AtomicUsize::new(0), std::sync::Barrier::new(4));
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (guarded, told, together) = (&guarded, &told, &together);
                    scope.spawn(move || {
                        together.wait();
                        let memory = guarded.owner().as_volatile_slice();
                        let at = thread * 16 * PAGE;
                        memory.write_obj(u64::MAX, at).unwrap();
                        assert!(guarded.is_lost());
                        // Nobody's second fault puts new zeros there.
                        assert_eq!(memory.read_obj::<u64>(at).unwrap(), u64::MAX);
                        told.fetch_add(usize::from(guarded.is_news()), Ordering::SeqCst);
                    });
                }
            });
            assert_eq!(told.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn mappings_that_come_go_and_are_lost_in_many_threads_leave_none_behind() {
        let name = "mappings_that_come_go_and_are_lost_in_many_threads_leave_none_behind";
        if alone().is_none() {
            let status = ended(name, "");
            assert!(status.success(), "{status}");
            return;
        }
        let kept = Guarded::new(mapping(&file(1), 1));
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                scope.spawn(move || {
                    for round in 0..500_u64 {
                        let cut = file(4);
                        let guarded = Guarded::new(mapping(&cut, 4));
                        let lose = (thread + round).is_multiple_of(3);
                        if lose {
                            cut.set_len(PAGE as u64).unwrap();
                        }
                        let memory = guarded.owner().as_volatile_slice();
                        let word = (round << 8) | thread;
                        memory.write_obj(word, 3 * PAGE).unwrap();
                        assert_eq!(guarded.is_lost(), lose);
                        assert_eq!(memory.read_obj::<u64>(3 * PAGE).unwrap(), word);
                    }
                });
            }
        });
        assert!(!kept.is_lost());
        assert_eq!(count(), 1);
        drop(kept);
        assert_eq!(count(), 0);
    }

    /// Touches memory that its file lost and that nobody guards, while other memory is guarded.
    fn touch_unguarded() {
        let guarded = Guarded::new(mapping(&file(1), 1));
        let cut = file(2);
        let region = mapping(&cut, 2);
        // Not any more, too.
        drop(Guarded::new(Arc::new(mapping(&cut, 2))));
        cut.set_len(0).unwrap();
        let _seen: u8 = region.as_volatile_slice().read_obj(PAGE).unwrap();
        drop(guarded);
    }

    #[test]
    fn a_fault_elsewhere_ends_the_process_as_before() {
        if alone().is_some() {
            // With the action of Rust's runtime before ours.
            touch_unguarded();
            return;
        }
        let status = ended("a_fault_elsewhere_ends_the_process_as_before", "");
        assert_eq!(status.signal(), Some(Signal::BUS.as_raw()), "{status}");
    }

    /// What the signal's action is to be before ours.
    fn set_before(handler: libc::sighandler_t, flags: libc::c_int) {
        // SAFETY: all of a `sigaction` may be zero.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        // SAFETY: `handler` is none, or one of those below, of the form that `flags` says.
        let set = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
        assert_eq!(set, 0);
    }

    #[test]
    fn with_the_default_action_before_faults_elsewhere_and_sent_signals_end_the_process() {
        let name =
            "with_the_default_action_before_faults_elsewhere_and_sent_signals_end_the_process";
        let Some(what) = alone() else {
            for what in ["sent", "fault"] {
                let status = ended(name, what);
                assert_eq!(status.signal(), Some(Signal::BUS.as_raw()), "{what}");
            }
            return;
        };
        set_before(libc::SIG_DFL, 0);
        let _guarded = Guarded::new(mapping(&file(1), 1));
        if what == "sent" {
            // SAFETY: it takes a number.
            unsafe { libc::raise(libc::SIGBUS) };
        } else {
            touch_unguarded();
        }
    }

    #[test]
    fn a_sent_signal_that_was_ignored_before_is_ignored() {
        if alone().is_none() {
            let status = ended("a_sent_signal_that_was_ignored_before_is_ignored", "");
            assert!(status.success(), "{status}");
            return;
        }
        set_before(libc::SIG_IGN, 0);
        let cut = file(1);
        let guarded = Guarded::new(mapping(&cut, 1));
        // SAFETY: it takes a number.
        unsafe { libc::raise(libc::SIGBUS) };
        // And the signal is still ours.
        cut.set_len(0).unwrap();
        let memory = guarded.owner().as_volatile_slice();
        memory.write_obj(1_u8, 0).unwrap();
        assert!(guarded.is_lost());
    }

    extern "C" fn end_plain(signal: libc::c_int) {
        // SAFETY: `_exit` may be called in a handler.
        unsafe { libc::_exit(40 + signal) }
    }

    extern "C" fn end_told(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel's `info`, handed on.
        let code = unsafe { (*info).si_code };
        // SAFETY: `_exit` may be called in a handler.
        unsafe { libc::_exit(60 + signal + code) }
    }

    #[test]
    fn a_handler_that_was_there_before_gets_the_faults_elsewhere() {
        let name = "a_handler_that_was_there_before_gets_the_faults_elsewhere";
        let Some(form) = alone() else {
            let plain = ended(name, "plain");
            assert_eq!(plain.code(), Some(40 + libc::SIGBUS), "{plain}");
            let told = ended(name, "told");
            let code = 60 + libc::SIGBUS + libc::BUS_ADRERR;
            assert_eq!(told.code(), Some(code), "{told}");
            return;
        };
        let told: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut c_void) = end_told;
        let plain: extern "C" fn(libc::c_int) = end_plain;
        match form.as_str() {
            "plain" => set_before(plain as libc::sighandler_t, 0),
            _ => set_before(told as libc::sighandler_t, libc::SA_SIGINFO),
        }
        touch_unguarded();
    }
}
