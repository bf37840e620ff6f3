//! A PCI device of one's own: it copies guest memory, adds up the bytes on the way, and says when it is done.
//!
//! `cargo run -p numagpu-vmm-glue --example checksum -- SOCKET` serves it; `docs/guide.md` builds it step by step.

use std::process::ExitCode;
use std::sync::Arc;

use numagpu_devices::PciIds;
use numagpu_devices::bus::DmaAccess;
use numagpu_devices::kit::{AccessError, Context, Device, Function, FunctionConfig, FunctionError};
use numagpu_devices::registers::RegisterAt;
use numagpu_devices::spec::table::Width::{W4, W8};
use numagpu_devices::spec::table::{Block, Reg, check};
use numagpu_vmm_glue::vfio_user::Server;

/// Address of the bytes.
pub const SOURCE: Reg = Reg::rw("SOURCE", 0x00, W8, "address of the bytes");
/// Address that they are copied to.
pub const DESTINATION: Reg = Reg::rw("DESTINATION", 0x08, W8, "address they are copied to");
/// How many.
pub const LENGTH: Reg = Reg::rw("LENGTH", 0x10, W4, "bytes, at most 1 MiB").writable(0x1f_ffff);
/// The doorbell.
pub const DOORBELL: Reg = Reg::rw("DOORBELL", 0x14, W4, "any write starts a job")
    .effect()
    .hidden();
/// How the last jobs ended: bits [`DONE`] and [`FAILED`].
pub const STATUS: Reg = Reg::ro("STATUS", 0x18, W4, "bit 0: done, 1: failed").w1c(3);
/// Sum of the bytes of the last job that was done.
pub const SUM: Reg = Reg::ro("SUM", 0x20, W8, "sum of the bytes");

/// Everything that BAR 0 holds.
pub const ENGINE: Block = Block {
    name: "ENGINE",
    base: 0,
    stride: 0x28,
    count: 1,
    regs: &[SOURCE, DESTINATION, LENGTH, DOORBELL, STATUS, SUM],
    doc: "copies and adds up",
};
const _: () = check(&[ENGINE], 0x1000);

/// Bit of [`STATUS`]: a job is done.
pub const DONE: u64 = 1;
/// Bit of [`STATUS`]: a job was refused, and nothing was copied.
pub const FAILED: u64 = 2;
/// Most bytes of a job, so that the driver's write to [`DOORBELL`] does not take long.
pub const MAX_LENGTH: u64 = 1 << 20;
/// MSI-X vector that tells of the end of a job.
pub const VECTOR: u16 = 0;

/// The device. It keeps nothing: all its state is in its registers.
pub struct Checksum;

impl Checksum {
    /// Does the job that the registers describe, and gives the sum.
    fn job(context: &Context) -> Result<u64, AccessError> {
        let get = |reg| context.get(&ENGINE, 0, reg);
        let (source, destination) = (get(&SOURCE), get(&DESTINATION));
        let length = get(&LENGTH).min(MAX_LENGTH);
        context.copy(source, destination, length)?;
        let mut sum = 0_u64;
        context.access(destination, length, DmaAccess::Read, &mut |piece| {
            let mut bytes = vec![0_u8; piece.len()];
            piece.copy_to(&mut bytes);
            sum += bytes.into_iter().map(u64::from).sum::<u64>();
        })?;
        Ok(sum)
    }
}

impl Device for Checksum {
    fn written(&self, context: &Arc<Context>, at: RegisterAt, _value: u64) {
        if !at.is(&ENGINE, &DOORBELL) {
            return;
        }
        let bit = match Checksum::job(context) {
            Ok(sum) => {
                context.set(&ENGINE, 0, &SUM, sum);
                println!("done: sum {sum:#x}");
                DONE
            }
            Err(error) => {
                println!("refused: {error}");
                FAILED
            }
        };
        context.set_bits(&ENGINE, 0, &STATUS, bit);
        // Nobody listening is no fault: the status stays until the driver clears it.
        let _heard = context.interrupt(VECTOR);
    }
}

/// The PCI function around it.
pub fn function() -> Result<Arc<Function<Checksum>>, FunctionError> {
    let config = FunctionConfig {
        ids: PciIds {
            device: 0x6771,
            subsystem: 0x6771,
            class: 0x08_8000, // system peripheral, other
            ..PciIds::default()
        },
        blocks: &[ENGINE],
        vectors: 1,
        memory: Vec::new(),
    };
    Function::new(config, Checksum)
}

/// Serves the function until the process is ended.
fn main() -> ExitCode {
    let Some(socket) = std::env::args_os().nth(1) else {
        eprintln!("usage: checksum SOCKET");
        return ExitCode::from(2);
    };
    let served = function().map_err(|error| error.to_string());
    let served = served.and_then(|it| Server::bind(&socket, it).map_err(|error| error.to_string()));
    let server = match served {
        Ok(server) => server,
        Err(error) => {
            eprintln!("checksum: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("serving {}", server.path().display());
    // The server's threads do the rest.
    loop {
        std::thread::park();
    }
}
