//! The vfio-user server from outside: the `vfio_user` crate's client, and sockets driven by hand.

#[cfg(test)]
mod aperture;
#[cfg(test)]
mod asked;
#[cfg(test)]
mod cuts;
#[cfg(test)]
mod device;
#[cfg(test)]
mod dirty;
#[cfg(test)]
mod dirty_hbm;
#[cfg(test)]
mod endurance;
#[cfg(test)]
mod io_fds;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod listeners;
#[cfg(test)]
mod malformed;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod migration;
#[cfg(test)]
mod peer;
#[cfg(test)]
mod raw;
#[cfg(test)]
mod room;
#[cfg(test)]
mod truncated;
#[cfg(test)]
mod twin;
#[cfg(test)]
mod twin_ends;
