//! Why a message is not carried out, and what the client is told.

use rustix::io::Errno;
use thiserror::Error;

use super::MAX_MESSAGE;
use super::dma::MapError;
use super::dma::dirty::DirtyError;
use super::migration::MigrationError;
use super::wire::HEADER_SIZE;

/// Why a request is refused. [`errno`](Self::errno) is what the client is told.
#[derive(Debug, Error)]
pub enum Refusal {
    /// The size field is below the header's or above [`MAX_MESSAGE`]; where the next message starts is not known.
    #[error("message of {size} bytes; {HEADER_SIZE} to {MAX_MESSAGE} are possible")]
    FrameSize {
        /// The size field.
        size: u32,
    },
    /// The type bits are reserved.
    #[error("message type {0} is neither command nor reply")]
    Kind(u32),
    /// No such command in this protocol.
    #[error("command {0} does not exist")]
    UnknownCommand(u16),
    /// A command of the protocol that this server does not serve.
    #[error("command {0} is not supported")]
    Unsupported(u16),
    /// A command on the socket that is for the server's own.
    #[error("command {0} came over the second socket, which is for the server's commands")]
    SecondSocket(u16),
    /// The body is too short, or not as long as its fields say.
    #[error("command {command} with a body of {got} bytes; {want} are needed")]
    BodySize {
        /// Command number.
        command: u16,
        /// Bytes after the header.
        got: usize,
        /// Bytes there should be, at least.
        want: usize,
    },
    /// `argsz` leaves no room for the reply, or for the request where the reply has no body.
    #[error("command {command} with argsz {argsz}; at least {want} bytes are needed")]
    Argsz {
        /// Command number.
        command: u16,
        /// What the client has room for.
        argsz: u32,
        /// What it takes.
        want: u32,
    },
    /// Something else than `VERSION` came first.
    #[error("command {0} before VERSION")]
    BeforeVersion(u16),
    /// A second `VERSION`.
    #[error("VERSION was negotiated already")]
    VersionAgain,
    /// A protocol that this server does not speak.
    #[error("protocol {major}.{minor}; this server speaks 0.0")]
    Version {
        /// Major version proposed.
        major: u16,
        /// Minor version proposed.
        minor: u16,
    },
    /// Version data that is not terminated or not the JSON it should be.
    #[error("version data of {len} bytes: {why}")]
    VersionData {
        /// Bytes of version data.
        len: usize,
        /// What is wrong.
        why: String,
    },
    /// More file descriptors than can be taken, or some that the kernel dropped.
    #[error("{got} file descriptors came or some were lost; at most {max} are taken")]
    Fds {
        /// How many arrived.
        got: usize,
        /// How many this command takes.
        max: usize,
    },
    /// No such region.
    #[error("region {index} does not exist")]
    Region {
        /// Region index.
        index: u32,
    },
    /// An access that is not inside its region.
    #[error("{count} bytes at {offset:#x} are not inside region {index} of {size:#x} bytes")]
    Range {
        /// Region index.
        index: u32,
        /// First byte.
        offset: u64,
        /// Bytes.
        count: u64,
        /// Bytes of the region.
        size: u64,
    },
    /// More data than one access may have.
    #[error("an access of {count} bytes; {max} are possible")]
    Transfer {
        /// Bytes asked for.
        count: u64,
        /// Most that are possible.
        max: usize,
    },
    /// No such interrupt index, or vectors beyond its count.
    #[error("interrupts {start}..+{count} of index {index}, which has {have}")]
    Irq {
        /// Interrupt index.
        index: u32,
        /// First vector.
        start: u32,
        /// Vectors.
        count: u32,
        /// Vectors of that index.
        have: u32,
    },
    /// A combination of `SET_IRQS` flags and data that means nothing.
    #[error("SET_IRQS with flags {flags:#x}, count {count} and {fds} file descriptors")]
    IrqFlags {
        /// The flags field.
        flags: u32,
        /// The count field.
        count: u32,
        /// File descriptors that came along.
        fds: usize,
    },
    /// A field that has to be zero is not.
    #[error("command {command} with {value:#x} where zero has to be")]
    NotZero {
        /// Command number.
        command: u16,
        /// What is there.
        value: u32,
    },
    /// No such device feature, or one that this function does not have.
    #[error("device feature {index} is not there")]
    Feature {
        /// Feature index.
        index: u32,
    },
    /// What a device feature cannot do, or not both or none of it.
    #[error("device feature with flags {flags:#x}")]
    FeatureFlags {
        /// The flags field.
        flags: u32,
    },
    /// Data of a device feature that is too short or too long.
    #[error("device feature {index} with data of {got} bytes")]
    FeatureData {
        /// Feature index.
        index: u32,
        /// Bytes there are.
        got: usize,
    },
    /// A DMA map or unmap that cannot be done.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Written pages cannot be logged or reported.
    #[error(transparent)]
    Dirty(#[from] DirtyError),
    /// A migration that does not go on.
    #[error(transparent)]
    Migration(#[from] MigrationError),
}

impl Refusal {
    /// The error number of the reply; never zero.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::SecondSocket(_) => Errno::NOTSUP,
            // Linux's answer (`vfio_ioctl_device_feature`).
            Self::Feature { .. } => Errno::NOTTY,
            Self::Map(error) => error.errno(),
            Self::Dirty(error) => error.errno(),
            Self::Migration(error) => error.errno(),
            _ => Errno::INVAL,
        }
    }
}
