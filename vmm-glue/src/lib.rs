//! Touches the host.
pub mod hbm;
pub mod run_dir;
pub mod sys;
pub mod vfio_user;
