//! The only crate that touches the host.
//!
//! | module | what it is for |
//! |---|---|
//! | [`vfio_user`] | serves any PCI function to a VMM over a UNIX socket |
//! | [`hbm`] | the memory that backs HBM, shared by device and VMM |
//! | [`assets`] | the QEMU, firmware and kernels that `cargo xtask guest` provides |
//! | [`instance`] | a machine's GPUs and their sockets |
//! | [`control`] | driving a running instance from outside: status, faults on demand |
//! | [`scenario`] | faults that come by themselves, from a file |
//! | [`mod@run`] | boots a guest with a planned machine and hears what it saw |
//! | [`emulator`], [`qmp`] | what a QEMU can do, and talking to one that runs |
//! | [`run_dir`] | a private directory for a run's sockets, swept after a run that was killed |
//! | [`vfio`] | HBM for devices that are passed through |
//! | [`sys`] | the system calls that need `unsafe` |

pub mod assets;
pub mod control;
pub mod emulator;
pub mod hbm;
pub mod instance;
pub mod qmp;
pub mod run;
pub mod run_dir;
pub mod scenario;
pub mod sys;
pub mod vfio;
pub mod vfio_user;
