//! Descriptors that this process was started with.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use rustix::io::{Errno, fcntl_getfd};

/// Numbers that were taken.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// Takes over the descriptor that whoever started this process left open under `number`, 3 or above, once.
///
/// Call this before the process opens anything of its own: what it opened later would be taken for inherited.
///
/// # Errors
/// `EBADF` if nothing is open under that number, `EINVAL` if it is below 3, `EBUSY` if it was taken before.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(Errno::INVAL.into());
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if taken.contains(&number) {
        return Err(Errno::BUSY.into());
    }
    // SAFETY: the number is not negative, and is only asked about: a number that is not open gives an error.
    let open = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl_getfd(open)?;
    taken.insert(number);
    // SAFETY: it is open, as the call above has shown. Nobody else owns it: it was there when the process started, and
    // the set makes sure that it is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_there_is_not_taken() {
        let error = |number| take(number).unwrap_err().raw_os_error();
        assert_eq!(error(1 << 20), Some(Errno::BADF.raw_os_error()));
        assert_eq!(error(-1), Some(Errno::INVAL.raw_os_error()));
        assert_eq!(error(2), Some(Errno::INVAL.raw_os_error()));
    }
}
