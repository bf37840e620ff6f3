//! A PCI function of one's own: a table of registers and a [`Device`] that acts on them become a [`Function`] that any
//! transport serves.
//!
//! | BAR | what |
//! |---|---|
//! | 0 | the registers of the table, 32-bit |
//! | 1 | MSI-X table and pending bits, 32-bit; only with vectors |
//! | 2, 4 | memory, 64-bit and prefetchable, as many as there are stores |
//!
//! The function does configuration space, function-level reset, MSI-X, attach and detach, and accesses of any length
//! and alignment. The device gets whole registers, and a [`Context`] that reaches guest memory and sends interrupts.
//!
//! # Locks
//!
//! `lifecycle` > `attachment`. A device is called with `lifecycle` held in [`Device::attached`], [`Device::reset`] and
//! [`Device::detached`], with nothing held in the others. A DMA holds `attachment` for reading: a detach waits for it.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use numagpu_spec::pci::msix;
use numagpu_spec::table::{Block, Reg};
use thiserror::Error;
use vm_memory::{Bytes as _, VolatileSlice};

use crate::bus::{
    Area, Attachment, Bar, DmaAccess, DmaError, DmaPort, FunctionLayout, HbmStore, PciFunction,
    ResetKind,
};
use crate::config::PciIds;
use crate::config_space::{CONFIG_SIZE, Capabilities, ConfigSpace, MsixPlace};
use crate::registers::{
    RegisterAt, RegisterDevice, RegisterFile, RegisterMap, TableError, address,
};

/// BAR of the registers.
pub const BAR_REGISTERS: u8 = 0;
/// BAR of the MSI-X table.
pub const BAR_MSIX: u8 = 1;
/// BARs of memory, in the order of [`FunctionConfig::memory`].
pub const BARS_MEMORY: [u8; 2] = [2, 4];
/// Most MSI-X vectors (PCI Local Bus 3.0 section 6.8.2.3).
pub const MAX_VECTORS: u16 = 2048;

const PAGE: u64 = 4096;
/// Largest BAR of registers: its map takes half as much memory.
const MAX_REGISTERS: u64 = 16 << 20;

/// What a function is made of.
#[derive(Clone)]
pub struct FunctionConfig {
    /// PCI identity.
    pub ids: PciIds,
    /// The registers of BAR 0, ascending; its size is the power of two that holds them, at least 4096.
    pub blocks: &'static [Block],
    /// MSI-X vectors, at most [`MAX_VECTORS`]; 0 = none.
    pub vectors: u16,
    /// Memory behind BARs 2 and 4: a power of two of bytes, at least 4096. Where a store has a file, clients map it.
    pub memory: Vec<Arc<dyn HbmStore>>,
}

/// Why a function cannot be made.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FunctionError {
    /// The registers are no table.
    #[error("the register table is malformed")]
    Table(#[from] TableError),
    /// The registers need too large a BAR.
    #[error("the registers end at {end:#x}, but BAR 0 has at most {max:#x} bytes")]
    Registers {
        /// End of the last block.
        end: u64,
        /// Most bytes.
        max: u64,
    },
    /// Too many vectors.
    #[error("{vectors} MSI-X vectors, but there can be at most {max}")]
    Vectors {
        /// How many.
        vectors: u16,
        /// At most.
        max: u16,
    },
    /// More stores than BARs.
    #[error("{have} memories, but there are {max} BARs for them")]
    Memories {
        /// How many.
        have: usize,
        /// At most.
        max: usize,
    },
    /// A store of a size that no BAR has.
    #[error("memory {index} has {size:#x} bytes: no power of two from 4096 up")]
    MemorySize {
        /// Which.
        index: usize,
        /// Its bytes.
        size: u64,
    },
    /// A store that does not start where its file starts: clients map a BAR's file from offset 0.
    #[error("memory {index} starts at {offset:#x} of its file, not at 0")]
    MemoryOffset {
        /// Which.
        index: usize,
        /// Where it starts.
        offset: u64,
    },
}

/// Why a device could not reach guest memory.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum AccessError {
    /// Bus master is off, or the function is in D3hot.
    #[error("the function may not do DMA: bus master is off, or it is in D3hot")]
    NotAllowed,
    /// The memory is not there.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// What makes a function of one's own act. Calls come from the transport's thread, and the guest waits for those of
/// registers: work that takes longer belongs to a thread of the device's own, which keeps a clone of the context.
pub trait Device: Send + Sync {
    /// Value that a read of `at` shows; `stored` is what the register holds. Has no side effects.
    fn read(&self, _context: &Context, _at: RegisterAt, stored: u64) -> u64 {
        stored
    }

    /// A write to a register with the `effect` flag; `value` is what it holds now.
    fn written(&self, context: &Arc<Context>, at: RegisterAt, value: u64);

    /// A VMM connected; no register was accessed yet.
    fn attached(&self, _context: &Arc<Context>) {}

    /// Registers and configuration space are as after power-on again. Whatever the device keeps itself has to be, too.
    /// DMA is refused from here on until a driver turns it on.
    fn reset(&self, _context: &Context, _kind: ResetKind) {}

    /// The VMM is gone; what comes next is [`Device::reset`].
    fn detached(&self, _context: &Context) {}
}

/// What a device can do to its registers and to the machine.
pub struct Context {
    registers: RegisterFile<'static>,
    /// Held for reading during each DMA.
    attachment: RwLock<Option<Attachment>>,
    dma_allowed: AtomicBool,
    sent: AtomicU64,
}

impl Context {
    /// What a register holds; 0 if the table does not have it.
    pub fn get(&self, block: &Block, instance: u32, reg: &Reg) -> u64 {
        self.registers.get(block, instance, reg)
    }

    /// Sets what a register holds, past all masks.
    pub fn set(&self, block: &Block, instance: u32, reg: &Reg, value: u64) {
        self.registers.set(block, instance, reg, value);
    }

    /// Sets bits of a register, such as a status that the driver clears by writing ones: no write of it is lost.
    pub fn set_bits(&self, block: &Block, instance: u32, reg: &Reg, bits: u64) {
        let cell = address(block, instance, reg).and_then(|offset| self.registers.cell(offset));
        if let Some(cell) = cell {
            cell.fetch_or(bits & reg.width.mask(), Ordering::AcqRel);
        }
    }

    /// Reads guest memory.
    ///
    /// # Errors
    /// [`AccessError`]; `data` is then unchanged, unless the VMM was asked and failed ([`DmaError::Failed`]).
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<(), AccessError> {
        let mut done = 0;
        self.access(address, data.len() as u64, DmaAccess::Read, &mut |piece| {
            let place = data.get_mut(done..).unwrap_or_default();
            done += piece.read(place, 0).unwrap_or(0);
        })
    }

    /// Writes guest memory.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was written then, unless the VMM was asked and failed ([`DmaError::Failed`]).
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), AccessError> {
        let mut done = 0;
        self.access(address, data.len() as u64, DmaAccess::Write, &mut |piece| {
            let rest = data.get(done..).unwrap_or_default();
            done += piece.write(rest, 0).unwrap_or(0);
        })
    }

    /// Calls `f` with each piece of `len` bytes of guest memory, in order.
    ///
    /// # Errors
    /// [`AccessError`]; then `f` was not called, unless the VMM was asked and failed ([`DmaError::Failed`]).
    pub fn access(
        &self,
        address: u64,
        len: u64,
        access: DmaAccess,
        f: &mut dyn FnMut(VolatileSlice<'_>),
    ) -> Result<(), AccessError> {
        self.dma(|dma| dma.access(address, len, access, f))
    }

    /// Copies `len` bytes of guest memory; ranges may overlap.
    ///
    /// # Errors
    /// [`AccessError`]; nothing was copied then, unless the VMM was asked and failed ([`DmaError::Failed`]).
    pub fn copy(&self, source: u64, destination: u64, len: u64) -> Result<(), AccessError> {
        self.dma(|dma| dma.copy(source, destination, len))
    }

    /// Sends the message of an MSI-X vector. A message is a write to memory, so it needs the bus master bit as DMA
    /// does. False if it may not go out or nobody listens: the VMM keeps the vector table, so masks and the enable bit
    /// are its business.
    pub fn interrupt(&self, vector: u16) -> bool {
        let attachment = self
            .attachment
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let allowed = self.dma_allowed.load(Ordering::SeqCst);
        let sink = attachment.as_ref().filter(|_| allowed);
        let heard = sink.is_some_and(|it| it.irq.trigger(vector));
        self.sent.fetch_add(u64::from(heard), Ordering::Relaxed);
        heard
    }

    /// Messages sent so far.
    pub fn interrupts(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn dma<T>(
        &self,
        f: impl FnOnce(&dyn DmaPort) -> Result<T, DmaError>,
    ) -> Result<T, AccessError> {
        let attachment = self
            .attachment
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let port = attachment.as_ref().ok_or(DmaError::Disconnected)?;
        // Looked at with the lock held, so that none begins once a reset has passed.
        if !self.dma_allowed.load(Ordering::SeqCst) {
            return Err(AccessError::NotAllowed);
        }
        Ok(f(&*port.dma)?)
    }

    /// Allows or forbids DMA. When it is forbidden, none is under way when this returns.
    fn allow(&self, allowed: bool) {
        if self.dma_allowed.swap(allowed, Ordering::SeqCst) && !allowed {
            drop(
                self.attachment
                    .write()
                    .unwrap_or_else(PoisonError::into_inner),
            );
        }
    }

    fn attach(&self, attachment: Option<Attachment>) -> Option<Attachment> {
        let mut now = self
            .attachment
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut now, attachment)
    }
}

/// A PCI function made of a [`Device`].
pub struct Function<D> {
    // Static configuration.
    device: D,
    layout: FunctionLayout,
    memory: Vec<Arc<dyn HbmStore>>,
    // Volatile state.
    context: Arc<Context>,
    lifecycle: Mutex<()>,
    config_space: Mutex<ConfigSpace>,
    msix: Option<RegisterFile<'static>>,
}

impl<D: Device> Function<D> {
    /// A function after power-on.
    ///
    /// # Errors
    /// [`FunctionError`] if a number of the configuration is out of its range.
    pub fn new(config: FunctionConfig, device: D) -> Result<Arc<Function<D>>, FunctionError> {
        let ends = config.blocks.iter().map(|block| {
            let size = u64::from(block.stride).saturating_mul(block.count.into());
            size.saturating_add(block.base.into())
        });
        let end = ends.max().unwrap_or(0);
        let size = end.max(PAGE).checked_next_power_of_two();
        let size = size.filter(|size| *size <= MAX_REGISTERS);
        let size = size.ok_or(FunctionError::Registers {
            end,
            max: MAX_REGISTERS,
        })?;
        let registers = RegisterMap::new(config.blocks, size)?;
        let mut bars = vec![bar(BAR_REGISTERS, size)];
        let (mut msix, mut place) = (None, None);
        if config.vectors > 0 {
            let (file, found, size) = vector_table(config.vectors)?;
            bars.push(bar(BAR_MSIX, size));
            (msix, place) = (Some(file), Some(found));
        }
        bars.extend(memory_bars(&config.memory)?);
        let capabilities = Capabilities {
            msix: place,
            ..Capabilities::default()
        };
        Ok(Arc::new(Function {
            device,
            config_space: Mutex::new(ConfigSpace::new(&config.ids, &bars, &capabilities)),
            layout: FunctionLayout {
                bars,
                config_size: u32::try_from(CONFIG_SIZE).unwrap_or(4096),
                msix_vectors: config.vectors,
            },
            memory: config.memory,
            context: Arc::new(Context {
                registers: RegisterFile::owning(registers),
                attachment: RwLock::new(None),
                dma_allowed: AtomicBool::new(false),
                sent: AtomicU64::new(0),
            }),
            lifecycle: Mutex::new(()),
            msix,
        }))
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// What the device can do.
    pub fn context(&self) -> &Arc<Context> {
        &self.context
    }

    fn store(&self, bar: u8) -> Option<&Arc<dyn HbmStore>> {
        let index = BARS_MEMORY.iter().position(|it| *it == bar)?;
        self.memory.get(index)
    }

    /// The body of a reset, under `lifecycle`.
    fn reset_function(&self, kind: ResetKind) {
        {
            let mut space = lock(&self.config_space);
            space.reset(kind);
            self.context.allow(space.dma_allowed());
        }
        self.context.registers.reset();
        if let Some(msix) = &self.msix {
            msix.reset();
        }
        self.device.reset(&self.context, kind);
    }
}

/// A 32-bit BAR.
fn bar(index: u8, size: u64) -> Bar {
    Bar {
        index,
        size,
        is_64bit: false,
        prefetchable: false,
        mappable: Vec::new(),
    }
}

/// The MSI-X table of so many vectors, where it is, and the bytes of its BAR: table and pending bits, on pages of
/// their own.
fn vector_table(vectors: u16) -> Result<(RegisterFile<'static>, MsixPlace, u64), FunctionError> {
    if vectors > MAX_VECTORS {
        let max = MAX_VECTORS;
        return Err(FunctionError::Vectors { vectors, max });
    }
    let block = Block {
        count: vectors.into(),
        ..msix::BLOCK
    };
    let pending = u64::from(vectors)
        .saturating_mul(block.stride.into())
        .next_multiple_of(PAGE);
    let size = pending.saturating_add(PAGE).next_power_of_two();
    let place = MsixPlace {
        bar: BAR_MSIX,
        vectors,
        table: block.base,
        pending: u32::try_from(pending).unwrap_or(0),
    };
    Ok((
        RegisterFile::owning(RegisterMap::new(&[block], size)?),
        place,
        size,
    ))
}

/// The BARs of memory.
fn memory_bars(memory: &[Arc<dyn HbmStore>]) -> Result<Vec<Bar>, FunctionError> {
    let (have, max) = (memory.len(), BARS_MEMORY.len());
    if have > max {
        return Err(FunctionError::Memories { have, max });
    }
    let mut bars = Vec::new();
    for (index, (store, number)) in memory.iter().zip(BARS_MEMORY).enumerate() {
        let size = store.size();
        if size < PAGE || !size.is_power_of_two() {
            return Err(FunctionError::MemorySize { index, size });
        }
        let mut mappable = Vec::new();
        if store.file().is_some() {
            let (_, offset) = store.backing();
            if offset != 0 {
                return Err(FunctionError::MemoryOffset { index, offset });
            }
            mappable.push(Area { offset, size });
        }
        bars.push(Bar {
            is_64bit: true,
            prefetchable: true,
            mappable,
            ..bar(number, size)
        });
    }
    Ok(bars)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The registers of BAR 0 with the device behind them.
struct Registers<'f, D>(&'f D, &'f Arc<Context>);

impl<D: Device> RegisterDevice for Registers<'_, D> {
    fn read(&self, at: RegisterAt, stored: u64) -> u64 {
        self.0.read(self.1, at, stored)
    }

    fn written(&self, at: RegisterAt, value: u64, _lanes: u64) {
        self.0.written(self.1, at, value);
    }
}

/// The MSI-X table: plain storage, for VMMs that keep theirs here.
struct Plain;

impl RegisterDevice for Plain {
    fn read(&self, _at: RegisterAt, stored: u64) -> u64 {
        stored
    }

    fn written(&self, _at: RegisterAt, _value: u64, _lanes: u64) {}
}

impl<D: Device> PciFunction for Function<D> {
    fn layout(&self) -> &FunctionLayout {
        &self.layout
    }

    fn attach(&self, attachment: Attachment) {
        let _one = lock(&self.lifecycle);
        if self.context.attach(None).is_some() {
            // A transport that did not say goodbye; the new VMM must find nothing of the old one.
            self.device.detached(&self.context);
            self.reset_function(ResetKind::Disconnect);
        }
        self.context.attach(Some(attachment));
        self.device.attached(&self.context);
    }

    fn detach(&self) {
        let _one = lock(&self.lifecycle);
        self.context.attach(None);
        self.device.detached(&self.context);
        self.reset_function(ResetKind::Disconnect);
    }

    fn dma_changed(&self) {}

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        lock(&self.config_space).read(offset, data);
    }

    fn config_write(&self, offset: u32, data: &[u8]) {
        let effects = {
            let mut space = lock(&self.config_space);
            let effects = space.write(offset, data);
            self.context.allow(space.dma_allowed());
            effects
        };
        if effects.function_reset {
            self.reset(ResetKind::Function);
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match (bar, &self.msix, self.store(bar)) {
            (BAR_REGISTERS, _, _) => {
                let device = Registers(&self.device, &self.context);
                self.context.registers.read(&device, offset, data);
            }
            (BAR_MSIX, Some(msix), _) => msix.read(&Plain, offset, data),
            (_, _, Some(store)) => {
                data.fill(0);
                if let Ok(memory) = store.slice(offset, data.len() as u64) {
                    // Both are as long: there is nothing that could fail.
                    let _done = memory.read_slice(data, 0);
                }
            }
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match (bar, &self.msix, self.store(bar)) {
            (BAR_REGISTERS, _, _) => {
                let device = Registers(&self.device, &self.context);
                self.context.registers.write(&device, offset, data);
            }
            (BAR_MSIX, Some(msix), _) => msix.write(&Plain, offset, data),
            (_, _, Some(store)) => {
                if let Ok(memory) = store.slice(offset, data.len() as u64) {
                    let _done = memory.write_slice(data, 0);
                }
            }
            _ => {}
        }
    }

    fn bar_file(&self, bar: u8) -> Option<BorrowedFd<'_>> {
        self.store(bar)?.file()
    }

    fn reset(&self, kind: ResetKind) {
        let _one = lock(&self.lifecycle);
        self.reset_function(kind);
    }
}

#[cfg(test)]
mod tests {
    use numagpu_spec::table::Width::{W4, W8};

    use super::*;
    use crate::memory::AnonymousStore;
    use crate::test_support::TestVmm;

    /// Writing `GO` copies the 8 bytes at `ADDRESS` to the next 8, and sets `DONE` or `REFUSED`.
    const ADDRESS: Reg = Reg::rw("ADDRESS", 0x00, W8, "where");
    const GO: Reg = Reg::rw("GO", 0x08, W4, "starts").effect().hidden();
    const STATUS: Reg = Reg::ro("STATUS", 0x0c, W4, "1 done, 2 refused").w1c(3);
    const COUNT: Reg = Reg::ro("COUNT", 0x10, W4, "resets so far");
    const UNIT: Block = Block {
        name: "UNIT",
        base: 0x1000,
        stride: 0x20,
        count: 3,
        regs: &[ADDRESS, GO, STATUS, COUNT],
        doc: "copies",
    };

    #[derive(Default)]
    struct Copier {
        calls: Mutex<Vec<&'static str>>,
    }

    impl Copier {
        fn call(&self, name: &'static str) {
            lock(&self.calls).push(name);
        }
    }

    impl Device for Copier {
        fn read(&self, _context: &Context, at: RegisterAt, stored: u64) -> u64 {
            if at.is(&UNIT, &COUNT) {
                return lock(&self.calls).len() as u64;
            }
            stored
        }

        fn written(&self, context: &Arc<Context>, at: RegisterAt, value: u64) {
            assert!(at.is(&UNIT, &GO) && value == 7);
            let from = context.get(&UNIT, at.instance, &ADDRESS);
            let mut data = [0; 8];
            let moved = context.read(from, &mut data);
            let moved = moved.and_then(|()| context.write(from + 8, &data));
            let bit = if moved.is_ok() { 1 } else { 2 };
            context.set_bits(&UNIT, at.instance, &STATUS, bit);
            context.interrupt(2);
        }

        fn attached(&self, _context: &Arc<Context>) {
            self.call("attached");
        }

        fn detached(&self, context: &Context) {
            self.call("detached");
            assert!(!context.interrupt(0), "the sink is gone");
        }

        fn reset(&self, context: &Context, _kind: ResetKind) {
            self.call("reset");
            let refused = context.copy(0, 0, 8).unwrap_err();
            assert!(matches!(
                refused,
                AccessError::NotAllowed | AccessError::Dma(DmaError::Disconnected)
            ));
        }
    }

    fn config() -> FunctionConfig {
        FunctionConfig {
            ids: PciIds::default(),
            blocks: &[UNIT],
            vectors: 3,
            memory: Vec::new(),
        }
    }

    fn function(config: FunctionConfig) -> Arc<Function<Copier>> {
        Function::new(config, Copier::default()).unwrap()
    }

    fn read32(function: &Function<Copier>, bar: u8, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        function.bar_read(bar, offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// Rings unit 1 for the bytes at 0x5000, and gives its status, which it clears.
    fn go(function: &Function<Copier>) -> u32 {
        function.bar_write(0, 0x1020, &0x5000_u64.to_le_bytes());
        function.bar_write(0, 0x1028, &[7, 0, 0, 0]);
        let status = read32(function, 0, 0x102c);
        function.bar_write(0, 0x102c, &[0xff; 4]);
        assert_eq!(read32(function, 0, 0x102c), 0);
        status
    }

    #[test]
    fn bars_and_vectors_are_as_large_as_what_is_in_them() {
        let none = function(FunctionConfig {
            blocks: &[],
            vectors: 0,
            ..config()
        });
        let sizes = |function: &Function<Copier>| -> Vec<(u8, u64)> {
            let bars = function.layout().bars.iter();
            bars.map(|bar| (bar.index, bar.size)).collect()
        };
        assert_eq!(sizes(&none), [(0, 0x1000)]);
        let memory = || Arc::new(AnonymousStore::new(0x4000).unwrap()) as Arc<dyn HbmStore>;
        let all = function(FunctionConfig {
            vectors: MAX_VECTORS,
            memory: vec![memory(), memory()],
            ..config()
        });
        assert_eq!(
            sizes(&all),
            [(0, 0x2000), (1, 0x1_0000), (2, 0x4000), (4, 0x4000)]
        );
        let mut msix = [0; 12];
        all.config_read(0x40, &mut msix);
        assert_eq!(msix, [0x11, 0x50, 0xff, 7, 1, 0, 0, 0, 1, 0x80, 0, 0]);
        // Every vector has an entry, masked.
        assert_eq!(read32(&all, 1, 0x7ffc), 1);
        assert_eq!(read32(&all, 1, 0x8000), 0);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let error = |config| Function::new(config, Copier::default()).err();
        let store = |size| Arc::new(AnonymousStore::new(size).unwrap()) as Arc<dyn HbmStore>;
        const BEYOND: Block = Block {
            base: 0x0100_0000,
            ..UNIT
        };
        let cases = [
            (
                FunctionConfig {
                    vectors: 2049,
                    ..config()
                },
                FunctionError::Vectors {
                    vectors: 2049,
                    max: 2048,
                },
            ),
            (
                FunctionConfig {
                    blocks: &[BEYOND],
                    ..config()
                },
                FunctionError::Registers {
                    end: 0x0100_0060,
                    max: 0x0100_0000,
                },
            ),
            (
                FunctionConfig {
                    memory: vec![store(0x3000)],
                    ..config()
                },
                FunctionError::MemorySize {
                    index: 0,
                    size: 0x3000,
                },
            ),
            (
                FunctionConfig {
                    memory: vec![store(4096), store(4096), store(4096)],
                    ..config()
                },
                FunctionError::Memories { have: 3, max: 2 },
            ),
        ];
        for (config, expected) in cases {
            assert_eq!(error(config), Some(expected));
        }
        let twice = error(FunctionConfig {
            blocks: &[UNIT, UNIT],
            ..config()
        });
        assert!(matches!(twice, Some(FunctionError::Table(_))));
    }

    #[test]
    fn a_device_reaches_memory_only_while_its_driver_allows_it() {
        let (function, vmm) = (function(config()), TestVmm::default());
        let ram = vmm.dma.map_ram(0x5000, 0x1000).unwrap();
        let ram = ram.slice(0, 16).unwrap();
        ram.write_obj(0x1122_3344_u64, 0).unwrap();
        function.attach(vmm.attachment());
        assert_eq!(go(&function), 2, "bus master is off");
        function.config_write(4, &[6, 0]);
        assert_eq!(go(&function), 1);
        assert_eq!(ram.read_obj::<u64>(8).unwrap(), 0x1122_3344);
        function.config_write(0x94, &[3]);
        assert_eq!(go(&function), 2, "D3hot");
        function.config_write(0x94, &[0]);
        assert_eq!(go(&function), 1);
        vmm.dma.unmap(0x5000);
        assert_eq!(go(&function), 2, "nothing is mapped");
        assert_eq!(vmm.irq.vectors(), [2; 3], "messages go out as DMA does");
        assert_eq!(function.context().interrupts(), 3);
    }

    #[test]
    fn a_reset_leaves_nothing_of_the_driver() {
        let (function, vmm) = (function(config()), TestVmm::default());
        let _ram = vmm.dma.map_ram(0x5000, 0x1000).unwrap();
        function.attach(vmm.attachment());
        function.config_write(4, &[6, 0]);
        function.bar_write(1, 0, &[0x10; 4]);
        assert_eq!(go(&function), 1);
        function.config_write(0x58, &[0, 0x80]);
        assert_eq!(read32(&function, 0, 0x1020), 0);
        assert_eq!(read32(&function, 1, 0), 0);
        assert_eq!(go(&function), 2, "bus master is off again");
        assert_eq!(read32(&function, 0, 0x1010), 2, "the device's own value");
        function.detach();
        assert_eq!(go(&function), 2);
        let calls = lock(&function.device().calls).clone();
        assert_eq!(calls, ["attached", "reset", "detached", "reset"]);
        assert_eq!(vmm.irq.vectors(), [2]);
    }

    #[test]
    fn a_transport_that_attaches_twice_gets_a_fresh_function() {
        let function = function(config());
        function.attach(TestVmm::default().attachment());
        function.bar_write(0, 0x1020, &[0xff; 8]);
        function.attach(TestVmm::default().attachment());
        assert_eq!(read32(&function, 0, 0x1020), 0);
        let calls = lock(&function.device().calls).clone();
        assert_eq!(calls, ["attached", "detached", "reset", "attached"]);
    }

    #[test]
    fn registers_take_any_access() {
        let function = function(config());
        function.attach(TestVmm::default().attachment());
        // The upper half of one register, and what lies behind it and is hidden.
        function.bar_write(0, 0x1004, &[1, 2, 3]);
        let mut data = [0xee; 8];
        function.bar_read(0, 0x1003, &mut data);
        assert_eq!(data, [0, 1, 2, 3, 0, 0, 0, 0]);
        let mut data = [0xee; 8];
        function.bar_read(3, 0, &mut data);
        function.bar_write(3, 0, &data);
        assert_eq!(data, [0; 8], "no such BAR");
    }

    #[test]
    fn memory_is_what_was_written_to_it() {
        let store = Arc::new(AnonymousStore::new(0x4000).unwrap());
        let function = function(FunctionConfig {
            memory: vec![Arc::clone(&store) as _],
            ..config()
        });
        function.bar_write(2, 0x3ffd, &[1, 2, 3]);
        let mut data = [0; 3];
        function.bar_read(2, 0x3ffd, &mut data);
        assert_eq!(data, [1, 2, 3]);
        function.bar_write(2, 0x3ffe, &[9; 3]);
        function.bar_read(2, 0x3ffe, &mut data);
        assert_eq!(data, [0; 3], "not inside");
        assert_eq!(
            store.slice(0x3ffd, 1).unwrap().read_obj::<u8>(0).unwrap(),
            1
        );
        assert!(function.bar_file(2).is_none());
        // It is the device's, not the driver's: a reset leaves it.
        function.reset(ResetKind::Function);
        function.bar_read(2, 0x3ffd, &mut data);
        assert_eq!(data, [1, 2, 3]);
    }
}
