//! The first part: a client of the `vfio_user` crate drives a GPU that our server serves, in this process.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use numagpu_devices::bus::HbmStore as _;
use numagpu_devices::spec::regs::{
    self, BootState, Coherence, IrqBits, OwnerCommand, OwnerResult, OwnerState, QueueState,
};
use numagpu_devices::spec::table::{Reg, Width};
use numagpu_devices::spec::{pci, sdma};
use numagpu_topology::Plan;
use vfio_user::Client;
use vm_memory::{Bytes as _, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use super::{Journal, Outcome, expect, noise};
use crate::hbm::HbmBacking;
use crate::instance::Instance;

/// Region of configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`).
const CONFIG: u32 = 7;
/// Interrupt index of MSI-X, and the flags with which its eventfds are given (`VFIO_IRQ_SET_*`).
const MSIX: u32 = 2;
const SET_EVENTFD: u32 = 1 << 2 | 1 << 5;
/// Guest RAM: where it is, and what is where in it.
const RAM_SIZE: u64 = 1 << 20;
const RING: u64 = 0;
const RING_SIZE: u32 = 4096;
const FENCE: u64 = 0x2000;
const SOURCE: u64 = 0x1_0000;
const BACK: u64 = 0x4_0000;
const LEN: u64 = 0x1_0000;
/// Where in the HBM the copy goes.
const TARGET: u64 = 0x20_1000;
const TOKEN: u64 = 0x5e1f_7e57;
const FENCE_VALUE: u32 = 0x600d_f00d;
const CONTEXT: u32 = 0x77;
/// The longest that anything may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until `done` gives something.
fn wait<T>(what: &str, mut done: impl FnMut() -> Outcome<Option<T>>) -> Outcome<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = done()? {
            return Ok(value);
        }
        if start.elapsed() > PATIENCE {
            return Err(format!("{what}: not after {} s", PATIENCE.as_secs()));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn in_words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A driver on the other side of a socket.
struct Driver {
    client: Client,
    /// Its RAM, from address `ram_at` on.
    ram: HbmBacking,
    ram_at: u64,
    event: EventFd,
}

impl Driver {
    fn read(&mut self, base: u32, reg: &Reg) -> Outcome<u64> {
        let mut data = [0; 8];
        let bytes = width(reg);
        let part = data.get_mut(..bytes).unwrap_or_default();
        let offset = u64::from(base) + u64::from(reg.offset);
        let read = self
            .client
            .region_read(pci::BAR_REGISTERS.into(), offset, part);
        read.map_err(|error| format!("{}: {error}", reg.name))?;
        Ok(u64::from_le_bytes(data))
    }

    fn write(&mut self, base: u32, reg: &Reg, value: u64) -> Outcome<()> {
        let offset = u64::from(base) + u64::from(reg.offset);
        let data = value.to_le_bytes();
        let part = data.get(..width(reg)).unwrap_or_default();
        let written = self
            .client
            .region_write(pci::BAR_REGISTERS.into(), offset, part);
        written.map_err(|error| format!("{}: {error}", reg.name))
    }

    fn ram(&self, offset: u64, len: u64) -> Outcome<VolatileSlice<'_>> {
        self.ram.slice(offset, len).map_err(in_words)
    }

    fn peek(&self, offset: u64, len: u64) -> Outcome<Vec<u8>> {
        bytes(&self.ram(offset, len)?)
    }

    fn poke(&self, offset: u64, data: &[u8]) -> Outcome<()> {
        let to = self.ram(offset, data.len() as u64)?;
        to.write_slice(data, 0).map_err(in_words)
    }

    /// Puts packets behind the first `produced` bytes of the ring and rings. The bytes in it then.
    fn submit(&mut self, produced: u64, packets: &[&[u32]]) -> Outcome<u64> {
        let words = packets.iter().flat_map(|packet| packet.iter());
        let data: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        self.poke(RING + produced, &data)?;
        let produced = produced + data.len() as u64;
        let doorbell = u32::from(pci::BAR_DOORBELLS);
        let rung = self
            .client
            .region_write(doorbell, 0, &produced.to_le_bytes());
        rung.map_err(in_words)?;
        Ok(produced)
    }

    fn wait_fence(&mut self, value: u32) -> Outcome<()> {
        wait("fence", || {
            if self.read(regs::queue::BASE, &regs::queue::STATUS)?
                == u64::from(QueueState::Fault.code())
            {
                let code = self.read(regs::queue::BASE, &regs::queue::FAULT_CODE)?;
                return Err(format!("the queue stopped with code {code}"));
            }
            Ok((self.peek(FENCE, 4)? == value.to_le_bytes()).then_some(()))
        })
    }

    fn command(&mut self, command: OwnerCommand) -> Outcome<()> {
        use regs::partition::{BASE, COMMAND, RESULT, TOKEN as REGISTER};
        self.write(BASE, &REGISTER, TOKEN)?;
        self.write(BASE, &COMMAND, command.code().into())?;
        let result = self.read(BASE, &RESULT)?;
        expect(command.name(), result, OwnerResult::Ok.code().into())
    }
}

/// Bytes of a register.
fn width(reg: &Reg) -> usize {
    match reg.width {
        Width::W4 => 4,
        Width::W8 => 8,
    }
}

fn bytes(slice: &VolatileSlice<'_>) -> Outcome<Vec<u8>> {
    let mut data = vec![0; slice.len()];
    slice.read_slice(&mut data, 0).map_err(in_words)?;
    Ok(data)
}

/// Connects, maps RAM and HBM and takes vector 1.
fn connect(plan: &Plan, instance: &Instance) -> Outcome<(Driver, String)> {
    let socket = instance.sockets().next().ok_or("no socket")?;
    let client = Client::new(socket).map_err(in_words)?;
    let ram_at = plan.ram.first().ok_or("no RAM")?.base;
    let mut driver = Driver {
        client,
        ram: HbmBacking::memfd("selftest-ram", RAM_SIZE).map_err(in_words)?,
        ram_at,
        event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(in_words)?,
    };
    let mut map = |address, memory: &HbmBacking| {
        let fd = memory.as_fd().as_raw_fd();
        let mapped = driver.client.dma_map(0, address, memory.size(), fd);
        mapped.map_err(in_words)
    };
    map(ram_at, &driver.ram)?;
    for (base, memory) in instance.gpus().memory() {
        map(base, memory)?;
    }
    let mut command = [0; 2];
    let read = driver.client.region_read(CONFIG, 4, &mut command);
    read.map_err(in_words)?;
    let command = u16::from_le_bytes(command) | 0b110;
    let written = driver
        .client
        .region_write(CONFIG, 4, &command.to_le_bytes());
    written.map_err(in_words)?;
    let vector = pci::VECTOR_QUEUE0.into();
    let fds = [driver.event.as_raw_fd()];
    let set = driver.client.set_irqs(MSIX, SET_EVENTFD, vector, 1, &fds);
    set.map_err(in_words)?;
    Ok((driver, String::new()))
}

fn boot(driver: &mut Driver) -> Outcome<String> {
    use regs::{boot, identity};
    let magic = driver.read(identity::BASE, &identity::MAGIC)?;
    expect("MAGIC", magic, regs::MAGIC.into())?;
    driver.write(boot::BASE, &boot::CONTROL, regs::BOOT_START.into())?;
    wait("READY", || {
        let state = driver.read(boot::BASE, &boot::STATUS)?;
        Ok((state == u64::from(BootState::Ready.code())).then_some(()))
    })?;
    let version = driver.read(identity::BASE, &identity::VERSION)?;
    Ok(format!(
        "register map {}.{}",
        version >> 16,
        version & 0xffff
    ))
}

fn coherence(driver: &mut Driver, plan: &Plan) -> Outcome<(u64, String)> {
    use regs::partition::{BASE, COHERENCE, HBM_BASE, HBM_SIZE};
    let planned = plan.gpus.first().and_then(|gpu| gpu.hbm.first());
    let planned = planned.ok_or("no HBM in the plan")?;
    let (base, size) = (driver.read(BASE, &HBM_BASE)?, driver.read(BASE, &HBM_SIZE)?);
    expect("HBM", (base, size), (planned.base, planned.size))?;
    let code = driver.read(BASE, &COHERENCE)?;
    expect("COHERENCE", code, Coherence::Coherent.code().into())?;
    Ok((base, format!("{size:#x} bytes at {base:#x}")))
}

/// A copy into the HBM and back, and the interrupt for it.
fn copy(driver: &mut Driver, hbm: u64) -> Outcome<String> {
    use regs::queue::{BASE, CONTROL, RING_BASE, RING_SIZE as SIZE, TOKEN as REGISTER};
    driver.poke(SOURCE, &noise(usize::try_from(LEN).map_err(in_words)?))?;
    let at = driver.ram_at;
    driver.write(
        regs::irq::BASE,
        &regs::irq::ENABLE,
        IrqBits::QUEUE0.bits().into(),
    )?;
    driver.write(BASE, &RING_BASE, at + RING)?;
    driver.write(BASE, &SIZE, RING_SIZE.into())?;
    driver.write(BASE, &REGISTER, TOKEN)?;
    driver.write(BASE, &CONTROL, regs::QUEUE_ENABLE.into())?;
    let start = Instant::now();
    driver.submit(
        0,
        &[
            &sdma::copy_linear(at + SOURCE, hbm + TARGET, LEN),
            &sdma::copy_linear(hbm + TARGET, at + BACK, LEN),
            &sdma::fence(at + FENCE, FENCE_VALUE),
            &sdma::trap(CONTEXT),
        ],
    )?;
    driver.wait_fence(FENCE_VALUE)?;
    let took = start.elapsed();
    let (source, back) = (driver.peek(SOURCE, LEN)?, driver.peek(BACK, LEN)?);
    if source != back {
        return Err("what came back differs from what was sent".to_owned());
    }
    Ok(format!(
        "{LEN:#x} bytes there and back in {} us",
        took.as_micros()
    ))
}

fn interrupt(driver: &mut Driver) -> Outcome<String> {
    use regs::irq::{BASE, RAISED, STATUS};
    let count = wait("the eventfd", || Ok(driver.event.read().ok()))?;
    let bit = u64::from(IrqBits::QUEUE0.bits());
    let status = driver.read(BASE, &STATUS)?;
    expect("IRQ.STATUS", status & bit, bit)?;
    let context = driver.read(regs::queue::BASE, &regs::queue::TRAP_CONTEXT)?;
    expect("TRAP_CONTEXT", context, CONTEXT.into())?;
    expect("IRQ.RAISED", driver.read(BASE, &RAISED)?, 1)?;
    expect("the eventfd's counter", count, 1)?;
    Ok(format!("vector {}", pci::VECTOR_QUEUE0))
}

fn release(driver: &mut Driver) -> Outcome<String> {
    driver.write(regs::queue::BASE, &regs::queue::CONTROL, 0)?;
    driver.command(OwnerCommand::Release)?;
    wait("FREE", || {
        let state = driver.read(regs::partition::BASE, &regs::partition::STATE)?;
        Ok((state == u64::from(OwnerState::Free.code())).then_some(()))
    })?;
    Ok(String::new())
}

/// What the copy left in the HBM's own file, on the server's side.
fn held(instance: &Instance) -> Outcome<Vec<u8>> {
    let (_, memory) = instance.gpus().memory().next().ok_or("no HBM")?;
    bytes(&memory.slice(TARGET, LEN).map_err(in_words)?)
}

/// Makes the checks of this part.
pub(super) fn run(plan: &Plan, journal: &mut Journal<'_>) {
    let without = |seen| ((), seen);
    let directory = tempfile::tempdir();
    let instance = journal.check("serve", || {
        let directory = directory.as_ref().map_err(in_words)?;
        let started = Instance::start(plan, directory.path(), None, None);
        let instance = started.map_err(in_words)?;
        Ok((instance, format!("{} GPU", plan.gpus.len())))
    });
    let Some(instance) = instance else {
        return;
    };
    let Some(mut driver) = journal.check("connect", || connect(plan, &instance)) else {
        return;
    };
    journal.check("boot", || boot(&mut driver).map(without));
    let hbm = journal.check("coherent HBM", || coherence(&mut driver, plan));
    let hbm = hbm.unwrap_or_default();
    journal.check("claim", || {
        driver.command(OwnerCommand::Claim)?;
        Ok(((), String::new()))
    });
    journal.check("copy and fence", || copy(&mut driver, hbm).map(without));
    journal.check("interrupt", || interrupt(&mut driver).map(without));
    journal.check("bytes in the HBM", || {
        let sent = driver.peek(SOURCE, LEN)?;
        if held(&instance)? != sent {
            return Err("the file behind the HBM has other bytes".to_owned());
        }
        Ok(((), format!("{LEN:#x} in the file behind it")))
    });
    journal.check("release", || release(&mut driver).map(without));
    journal.check("scrub", || {
        if held(&instance)?.iter().any(|byte| *byte != 0) {
            return Err("bytes of its last owner are left".to_owned());
        }
        Ok(((), "nothing of its last owner is left".to_owned()))
    });
}
