//! The only crate that touches the host.
//!
//! | module | what it is for |
//! |---|---|
//! | [`vfio_user`] | serves any PCI function to a VMM over a UNIX socket |
//! | [`hbm`] | the memory that backs HBM, shared by device and VMM |
//! | [`assets`] | the QEMU, firmware and kernels that `cargo xtask guest` provides |
//! | [`instance`] | a machine's GPUs and their sockets |
//! | [`kicks`] | doorbells that ring by events |
//! | [`kvm`] | the same GPUs in a VMM of one's own: memory slots, memory exits, irqfd, ioeventfd |
//! | [`control`] | driving a running instance from outside: status, faults on demand |
//! | [`scenario`] | faults that come by themselves, from a file |
//! | [`mod@run`] | boots a guest with a planned machine and hears what it saw |
//! | [`selftest`] | whether this build works on this host, without QEMU |
//! | [`emulator`], [`qmp`] | what a QEMU can do, and talking to one that runs |
//! | [`run_dir`] | a private directory for a run's sockets, swept after a run that was killed |
//! | [`sandbox`] | what a serving process gives up once all is open |
//! | [`service`] | sockets from a service manager, and telling it that all is ready |
//! | [`vfio`] | HBM for devices that are passed through |
//! | [`sys`] | the system calls that need `unsafe` |

pub mod assets;
pub mod control;
pub mod emulator;
pub mod hbm;
pub mod instance;
pub mod kicks;
pub mod kvm;
pub mod qmp;
pub mod run;
pub mod run_dir;
pub mod sandbox;
pub mod scenario;
pub mod selftest;
pub mod service;
pub mod sys;
pub mod vfio;
pub mod vfio_user;
