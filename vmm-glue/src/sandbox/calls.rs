//! Seccomp: which system calls a server makes once it runs.
//!
//! The list is what `strace` shows of servers, clients, scrubs, the control socket, panics and the end, and what the C
//! library may do instead on other hosts. Nothing on it opens, makes or starts anything but threads, maps of files that
//! are open, event descriptors, and pairs of sockets that are connected to each other and to nothing else.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter,
};
use thiserror::Error;

use super::Mode;

/// Why seccomp cannot be applied.
#[derive(Debug, Error)]
pub enum CallsError {
    /// The filter cannot be written.
    #[error("cannot write a seccomp filter: {0}")]
    Filter(#[from] BackendError),
    /// The kernel refused it.
    #[error("cannot apply a seccomp filter: {0}; --sandbox off serves without")]
    Kernel(#[from] seccompiler::Error),
}

/// Calls that are allowed with any arguments.
const ANY: &[i64] = &[
    // Sockets and pipes that are open, and clients of those that listen.
    libc::SYS_accept4,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_ppoll,
    libc::SYS_close,
    libc::SYS_eventfd2,
    // Memory files: what they are, zeros in them.
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fallocate,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    // Names at the end.
    libc::SYS_unlinkat,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads, signals, waiting.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    // They cannot fail, and libraries count on that.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The same, where the architecture still has them.
#[cfg(target_arch = "x86_64")]
const ANY_OLD: &[i64] = &[
    libc::SYS_poll,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_unlink,
    libc::SYS_rmdir,
];
#[cfg(not(target_arch = "x86_64"))]
const ANY_OLD: &[i64] = &[];

/// Argument, bits of it that count, and what they have to be.
type Condition = (u8, u64, u64);

/// Conditions that are met together.
type Rule = Vec<Condition>;

/// What `socketpair` has beside the type of its sockets in the argument for it.
const SOCKET_FLAGS: i32 = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;

/// Calls that are allowed only with arguments that follow one of the rules.
fn with_arguments() -> [(i64, Vec<Rule>); 8] {
    let low = |value: i32| u64::from(value.cast_unsigned());
    let thread = low(libc::CLONE_THREAD);
    let executable = low(libc::PROT_EXEC);
    let all = u64::from(u32::MAX);
    let looks = [
        libc::F_GETFD,
        libc::F_GETFL,
        libc::F_GET_SEALS,
        libc::F_DUPFD_CLOEXEC,
    ];
    [
        // Threads of this process, no processes.
        (libc::SYS_clone, vec![vec![(0, thread, thread)]]),
        // Nothing that could be executed. The handler of SIGBUS maps too (`sys::guarded`).
        (libc::SYS_mmap, vec![vec![(2, executable, 0)]]),
        (libc::SYS_mprotect, vec![vec![(2, executable, 0)]]),
        // Looking at descriptors, and copies of them. Not `F_SETOWN`, which can have signals sent to others.
        (
            libc::SYS_fcntl,
            looks.map(|look| vec![(1, all, low(look))]).to_vec(),
        ),
        // Streams to itself, one end of which a client may get. Not datagrams, which can be sent to others.
        (
            libc::SYS_socketpair,
            vec![vec![
                (0, all, low(libc::AF_UNIX)),
                (1, all & !low(SOCKET_FLAGS), low(libc::SOCK_STREAM)),
            ]],
        ),
        // Names of threads.
        (
            libc::SYS_prctl,
            vec![vec![(0, all, low(libc::PR_SET_NAME))]],
        ),
        // Signals to this process, which is how it aborts.
        (
            libc::SYS_tgkill,
            vec![vec![(0, all, u64::from(std::process::id()))]],
        ),
        // Its limits: read, not set.
        (libc::SYS_prlimit64, vec![vec![(2, u64::MAX, 0)]]),
    ]
}

/// How many calls are allowed.
pub fn count() -> usize {
    ANY.len() + ANY_OLD.len() + with_arguments().len()
}

/// Allows this thread, and those that it starts, no other calls; or with [`Mode::Log`], has the kernel log them.
pub fn restrict(mode: Mode) -> Result<(), CallsError> {
    let others = match mode {
        Mode::On => SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        Mode::Log => SeccompAction::Log,
        Mode::Off => return Ok(()),
    };
    // Its flags are in memory, where a filter does not see them. As on kernels that do not have it, the C library
    // takes `clone` instead, whose flags are seen.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let missing = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    let first = program(clone3, SeccompAction::Allow, missing)?;
    let second = program(allowed()?, others, SeccompAction::Allow)?;
    apply_filter(&first)?;
    apply_filter(&second)?;
    Ok(())
}

/// The calls of both lists, and `clone3`, which the first filter answers.
fn allowed() -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let any = ANY.iter().chain(ANY_OLD).chain([&libc::SYS_clone3]);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = any.map(|call| (*call, Vec::new())).collect();
    for (call, alternatives) in with_arguments() {
        let rule = |conditions: Rule| {
            let conditions = conditions.into_iter().map(condition);
            SeccompRule::new(conditions.collect::<Result<_, _>>()?)
        };
        let alternatives = alternatives.into_iter().map(rule);
        rules.insert(call, alternatives.collect::<Result<_, _>>()?);
    }
    Ok(rules)
}

fn condition((argument, mask, value): Condition) -> Result<SeccompCondition, BackendError> {
    let size = match mask > u64::from(u32::MAX) {
        true => SeccompCmpArgLen::Qword,
        false => SeccompCmpArgLen::Dword,
    };
    SeccompCondition::new(argument, size, SeccompCmpOp::MaskedEq(mask), value)
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matches: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, mismatch, matches, architecture)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lists_name_each_call_once_and_none_that_opens_or_starts_anything() {
        let rules = allowed().unwrap();
        // And clone3.
        assert_eq!(rules.len(), count() + 1);
        for call in [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_creat,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_kill,
            libc::SYS_ioctl,
            libc::SYS_mount,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_memfd_create,
            libc::SYS_setuid,
            libc::SYS_unshare,
            libc::SYS_seccomp,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
    }

    #[test]
    fn the_filters_are_small_enough_for_the_kernel() {
        let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
        let filter = program(allowed().unwrap(), denied, SeccompAction::Allow).unwrap();
        // BPF_MAXINSNS.
        assert!(filter.len() < 4096, "{}", filter.len());
    }
}
