//! A private directory for the sockets and files of one run.
//!
//! It is a sub directory of `$XDG_RUNTIME_DIR/numagpu`, or of `/tmp/numagpu-UID` where there is no such variable,
//! held by a lock on a file in it. What a killed run left is known by its free lock, and swept by the next run.

use std::ffi::OsString;
use std::fs::{DirBuilder, DirEntry};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;
use rustix::process::geteuid;
use thiserror::Error;

/// Start of the sub directories' names.
const PREFIX: &str = "run-";

/// Name of the lock file in a sub directory.
const LOCK: &str = "lock";

/// Why there is no run directory.
#[derive(Debug, Error)]
pub enum RunDirError {
    /// The parent belongs to somebody else or lets others in.
    #[error(
        "{path} must be a directory of user {uid} with mode 0700; it has owner {owner} and mode {mode:04o}"
    )]
    NotPrivate {
        /// The parent directory.
        path: PathBuf,
        /// The user it should belong to.
        uid: u32,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// The host refused.
    #[error("cannot {doing} {path}: {source}")]
    Host {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// A private directory that is removed, with all in it, when this is dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held until the directory is gone; the kernel lets go of it if the process dies.
    _lock: OwnedFd,
}

impl RunDir {
    /// Sweeps what killed runs left, then makes a directory for this one.
    ///
    /// # Errors
    /// [`RunDirError`].
    pub fn create() -> Result<Self, RunDirError> {
        Self::create_in(&parent(std::env::var_os("XDG_RUNTIME_DIR")))
    }

    /// The same in a parent directory of one's own, which is made if it is not there.
    ///
    /// # Errors
    /// [`RunDirError`].
    pub fn create_in(parent: &Path) -> Result<Self, RunDirError> {
        let host = |doing, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| RunDirError::Host {
                doing,
                path,
                source,
            }
        };
        match make(parent) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other.map_err(host("create", parent))?,
        }
        // Nobody sweeps while a new directory has no lock yet.
        let gate = open_private(parent)?;
        retry(|| flock(&gate, FlockOperation::LockExclusive))
            .map_err(|errno| host("lock", parent)(errno.into()))?;
        sweep(parent);
        let pid = std::process::id();
        for n in 0_u32.. {
            let path = parent.join(format!("{PREFIX}{pid}-{n}"));
            match make(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                other => other.map_err(host("create", &path))?,
            }
            let lock = lock_file(&path.join(LOCK), OFlags::CREATE);
            let lock = lock.map_err(|errno| host("lock", &path)(errno.into()))?;
            return Ok(Self { path, _lock: lock });
        }
        Err(host("find a free name in", parent)(Errno::EXIST.into()))
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What has nothing more in it goes without being opened, which a sandbox forbids.
        let _ = std::fs::remove_file(self.path.join(LOCK));
        if std::fs::remove_dir(&self.path).is_ok() {
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// The directories of all runs of this user that are alive, in no order.
///
/// # Errors
/// [`RunDirError`] if others could have put something there.
pub fn running() -> Result<Vec<PathBuf>, RunDirError> {
    running_in(&parent(std::env::var_os("XDG_RUNTIME_DIR")))
}

/// The same in a parent directory of one's own.
///
/// # Errors
/// As those of [`running`].
pub fn running_in(parent: &Path) -> Result<Vec<PathBuf>, RunDirError> {
    if !parent.exists() {
        return Ok(Vec::new());
    }
    // While one looks at the locks, nobody takes them for those of runs.
    let gate = open_private(parent)?;
    retry(|| flock(&gate, FlockOperation::LockExclusive)).map_err(|errno| RunDirError::Host {
        doing: "lock",
        path: parent.to_owned(),
        source: errno.into(),
    })?;
    let entries = std::fs::read_dir(parent).map_err(|source| RunDirError::Host {
        doing: "read",
        path: parent.to_owned(),
        source,
    })?;
    let runs = entries.flatten().filter(is_run).map(|entry| entry.path());
    Ok(runs.filter(|path| is_held(path)).collect())
}

/// Whether a name is that of a run directory.
fn is_run(entry: &DirEntry) -> bool {
    entry.file_name().to_string_lossy().starts_with(PREFIX)
}

/// Whether the run with this directory is alive.
fn is_held(path: &Path) -> bool {
    !matches!(
        lock_file(&path.join(LOCK), OFlags::empty()),
        Ok(_) | Err(Errno::NOENT)
    )
}

/// Where run directories are made, by the value of `XDG_RUNTIME_DIR`.
fn parent(runtime: Option<OsString>) -> PathBuf {
    match runtime.map(PathBuf::from) {
        Some(dir) if dir.is_absolute() && dir.is_dir() => dir.join("numagpu"),
        _ => PathBuf::from(format!("/tmp/numagpu-{}", geteuid().as_raw())),
    }
}

fn make(path: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(path)
}

/// Opens the parent directory if it is this user's alone.
fn open_private(path: &Path) -> Result<OwnedFd, RunDirError> {
    let host = |errno: Errno| RunDirError::Host {
        doing: "open",
        path: path.to_owned(),
        source: errno.into(),
    };
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = open(path, flags, Mode::empty()).map_err(host)?;
    let stat = fstat(&dir).map_err(host)?;
    let (uid, mode) = (geteuid().as_raw(), stat.st_mode & 0o7777);
    if stat.st_uid != uid || mode & 0o077 != 0 {
        return Err(RunDirError::NotPrivate {
            path: path.to_owned(),
            uid,
            owner: stat.st_uid,
            mode,
        });
    }
    Ok(dir)
}

/// Removes the sub directories whose lock nobody holds. What cannot be removed is left.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        if is_run(&entry) && !is_held(&entry.path()) {
            tracing::info!(
                "removing what a killed run left: {}",
                entry.path().display()
            );
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Opens and locks a lock file, which must be a regular file.
fn lock_file(path: &Path, create: OFlags) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | create;
    let file = open(path, flags, Mode::RUSR | Mode::WUSR)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Errno::INVAL);
    }
    retry(|| flock(&file, FlockOperation::NonBlockingLockExclusive))?;
    Ok(file)
}

fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn it_is_private_and_goes_away() {
        let base = tempfile::tempdir().unwrap();
        let parent = base.path().join("numagpu");
        let run = RunDir::create_in(&parent).unwrap();
        for dir in [&parent, run.path()] {
            let mode = dir.metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
        }
        std::fs::write(run.path().join("gpu0.sock"), b"").unwrap();
        let path = run.path().to_owned();
        drop(run);
        assert!(!path.exists());
        assert!(parent.exists());
    }

    #[test]
    fn only_what_killed_runs_left_is_swept() {
        let base = tempfile::tempdir().unwrap();
        let parent = base.path().join("numagpu");
        let live = RunDir::create_in(&parent).unwrap();
        for (dir, lock) in [("run-1-0", true), ("run-2-0", false), ("other", true)] {
            std::fs::create_dir(parent.join(dir)).unwrap();
            if lock {
                File::create(parent.join(dir).join(LOCK)).unwrap();
            }
        }
        let second = RunDir::create_in(&parent).unwrap();
        assert_ne!(live.path(), second.path());
        assert!(live.path().exists());
        assert!(parent.join("other").exists());
        assert!(!parent.join("run-1-0").exists());
        assert!(!parent.join("run-2-0").exists());
    }

    #[test]
    fn only_runs_that_are_alive_are_listed() {
        let base = tempfile::tempdir().unwrap();
        let parent = base.path().join("numagpu");
        assert_eq!(running_in(&parent).unwrap(), Vec::<PathBuf>::new());
        let live = RunDir::create_in(&parent).unwrap();
        std::fs::create_dir(parent.join("run-1-0")).unwrap();
        File::create(parent.join("run-1-0").join(LOCK)).unwrap();
        assert_eq!(running_in(&parent).unwrap(), [live.path()]);
        drop(live);
        assert_eq!(running_in(&parent).unwrap(), Vec::<PathBuf>::new());
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&parent, open).unwrap();
        assert!(running_in(&parent).is_err());
    }

    #[test]
    fn a_parent_that_others_can_enter_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(base.path(), open).unwrap();
        let error = RunDir::create_in(base.path()).unwrap_err();
        assert!(error.to_string().contains("mode 0755"), "{error}");
        std::os::unix::fs::symlink("/tmp", base.path().join("link")).unwrap();
        assert!(RunDir::create_in(&base.path().join("link")).is_err());
    }

    #[test]
    fn the_parent_follows_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = Some(dir.path().as_os_str().to_owned());
        assert_eq!(parent(runtime), dir.path().join("numagpu"));
        let uid = geteuid().as_raw();
        let fallback = PathBuf::from(format!("/tmp/numagpu-{uid}"));
        assert_eq!(parent(None), fallback);
        assert_eq!(parent(Some("relative".into())), fallback);
    }
}
