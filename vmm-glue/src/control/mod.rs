//! Driving a running instance from outside: what its GPUs are doing, and faults on demand.
//!
//! An instance listens on [`SOCKET`], a UNIX stream socket with mode 0600 beside those of its GPUs. A request is one
//! line with one JSON object (RFC 8259), its reply another:
//!
//! ```text
//! {"version":1,"request":"status"}
//! {"version":1,"request":"inject","gpu":0,"fault":{"kind":"engine-hang","queue":1}}
//! ```
//!
//! ```text
//! {"version":1,"status":{"machine":"two-gpu",...}}
//! {"version":1,"injected":{"gpu":0,"fault":{"kind":"engine-hang","queue":1}}}
//! {"version":1,"error":{"kind":"invalid","message":"the machine has 2 GPUs, so there is no number 5"}}
//! ```
//!
//! | part | what it is for |
//! |---|---|
//! | [`fault`] | faults by name, for requests, command lines and scenarios |
//! | [`protocol`] | requests and replies |
//! | [`status`] | the reply to `status`; no owner's token is in it |
//! | [`server`] | the socket: one thread, bounded in all that a client can ask for |
//! | [`desk`] | answers requests about one instance |
//! | [`client`] | asks, and finds the instance to ask |

pub mod client;
pub mod desk;
pub mod fault;
pub mod protocol;
pub mod server;
pub mod status;

pub use client::{ClientError, ask, find};
pub use desk::Desk;
pub use fault::Fault;
pub use protocol::{Refusal, RefusalKind, Reply, Request};
pub use server::Control;
pub use status::Status;

/// Name of the socket.
pub const SOCKET: &str = "control.sock";

/// Version of requests and replies. It changes when a program that knows this one would misunderstand.
pub const VERSION: u32 = 1;
