//! A vfio-user server whose function is made on the command line, for suites that test the protocol:
//!
//! `cargo run -p numagpu-vmm-glue --example vfio_user_server -- --socket-path SOCKET --region 0:0x10000
//! --region 2:0x200000:map --vectors 8 --migration`
//!
//! The function keeps what is written to it and does nothing by itself. Lines on standard input make it work, and each
//! is answered with one line: `read ADDRESS LENGTH` and `write ADDRESS HEX` access the client's memory, `copy FROM TO
//! LENGTH` copies there, `irq VECTOR` sends an MSI-X interrupt, `irq INDEX VECTOR` one of any index. Memory that the client mapped without a descriptor is asked for, over
//! a second socket if the client wants one (`twin_socket`).

use std::io::{BufRead as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use numagpu_devices::bus::{
    Area, Attachment, Bar, DmaAccess, FunctionLayout, HbmStore as _, IoFd, Migrate, MigrateError,
    OtherInterrupt, PciFunction, ResetKind,
};
use numagpu_vmm_glue::hbm::HbmBacking;
use numagpu_vmm_glue::sys::inherited;
use numagpu_vmm_glue::vfio_user::migration::MAX_STATE;
use numagpu_vmm_glue::vfio_user::{Limits, Listener, MAX_DMA_MAPS, MAX_TRANSFER, Server};
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::VolatileSlice;

/// What goes before a saved state.
const KNOWN: &[u8; 16] = b"scratch function";

/// Longest access that a line may ask for.
const MAX_ACCESS: usize = 16 << 20;

/// Most bytes of BARs whose contents are carried: with configuration space it is a state that a server takes.
const MAX_MIGRATED: u64 = MAX_STATE as u64 - (1 << 20);

/// Serves a function made of memory on a vfio-user socket.
#[derive(Debug, Parser)]
pub struct Arguments {
    /// Where the socket is made.
    #[arg(long, value_name = "PATH", required_unless_present = "fd")]
    socket_path: Option<PathBuf>,
    /// A socket that was handed over: one that listens, or that is connected to the only client.
    #[arg(long, value_name = "FDNUM", conflicts_with = "socket_path")]
    fd: Option<RawFd>,
    /// A BAR: its number, its bytes, and `:map` if a client may map it, whole or these parts.
    #[arg(long = "region", value_name = "BAR:BYTES[:map[=OFFSET+BYTES,...]]", value_parser = region)]
    regions: Vec<Region>,
    /// Bytes of configuration space.
    #[arg(long, default_value = "4096", value_name = "BYTES", value_parser = ["256", "4096"])]
    config_size: String,
    /// MSI-X vectors.
    #[arg(long, default_value_t = 1, value_name = "COUNT")]
    vectors: u16,
    /// Other interrupts: 0 is INTx, 1 MSI, 3 ERR, 4 REQ.
    #[arg(long = "irq", value_name = "INDEX:COUNT", value_parser = other_interrupt)]
    others: Vec<(OtherInterrupt, u16)>,
    /// Parts of BAR 0, of 8 bytes each from its start, whose writes may come as events.
    #[arg(long, default_value_t = 0, value_name = "COUNT")]
    events: u16,
    /// Most data bytes of one access.
    #[arg(long, default_value_t = MAX_TRANSFER, value_name = "BYTES")]
    max_transfer: usize,
    /// Most DMA maps at a time.
    #[arg(long, default_value_t = MAX_DMA_MAPS, value_name = "COUNT")]
    max_dma_maps: usize,
    /// Offers migration, of a function whose state is not too large.
    #[arg(long)]
    migration: bool,
}

/// A BAR as the command line has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Region {
    bar: u8,
    size: u64,
    mappable: Vec<Area>,
}

/// A number, in hexadecimal after `0x`.
fn number(text: &str) -> anyhow::Result<u64> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("`{text}` is no number"))
}

fn region(text: &str) -> anyhow::Result<Region> {
    let mut parts = text.splitn(3, ':');
    let bar = number(parts.next().unwrap_or_default())?;
    let size = number(parts.next().context("no size")?)?;
    let mappable = match parts.next() {
        None => Vec::new(),
        Some("map") => vec![Area { offset: 0, size }],
        Some(map) => {
            let areas = map.strip_prefix("map=").context("no `map`")?;
            areas.split(',').map(area).collect::<Result<_, _>>()?
        }
    };
    ensure!(bar < 6, "BAR {bar}; there are 0 to 5");
    ensure!((1..=1 << 40).contains(&size), "a BAR of {size} bytes");
    let mut end = 0;
    for Area { offset, size: len } in &mappable {
        ensure!((offset | len) % 4096 == 0, "what is mapped has whole pages");
        let inside = *offset >= end && *len > 0 && *len <= size && *offset <= size - len;
        ensure!(inside, "parts are one behind the other in the BAR");
        end = offset + len;
    }
    Ok(Region {
        bar: u8::try_from(bar)?,
        size,
        mappable,
    })
}

fn area(text: &str) -> anyhow::Result<Area> {
    let (offset, size) = text.split_once('+').context("no `+`")?;
    Ok(Area {
        offset: number(offset)?,
        size: number(size)?,
    })
}

fn other_interrupt(text: &str) -> anyhow::Result<(OtherInterrupt, u16)> {
    let (index, count) = text.split_once(':').context("no count")?;
    let kind = kind(number(index)?)?;
    let count = u16::try_from(number(count)?)?;
    let most = if kind == OtherInterrupt::Msi { 32 } else { 1 };
    ensure!(count <= most, "{count} of {kind:?}; at most {most}");
    Ok((kind, count))
}

fn kind(index: u64) -> anyhow::Result<OtherInterrupt> {
    Ok(match index {
        0 => OtherInterrupt::Intx,
        1 => OtherInterrupt::Msi,
        3 => OtherInterrupt::Error,
        4 => OtherInterrupt::Request,
        _ => bail!("index {index} is none of INTx 0, MSI 1, ERR 3, REQ 4"),
    })
}

/// The function.
pub struct Scratch {
    layout: FunctionLayout,
    bars: [Option<HbmBacking>; 6],
    config: Mutex<Vec<u8>>,
    attachment: Mutex<Option<Attachment>>,
    events: Vec<OwnedFd>,
    others: Vec<(OtherInterrupt, u16)>,
    migration: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scratch {
    fn new(arguments: &Arguments) -> anyhow::Result<Scratch> {
        let mut bars: [Option<HbmBacking>; 6] = Default::default();
        let mut layout = FunctionLayout {
            bars: Vec::new(),
            config_size: arguments.config_size.parse()?,
            msix_vectors: arguments.vectors,
        };
        let mut regions = arguments.regions.clone();
        regions.sort_by_key(|region| region.bar);
        for Region {
            bar,
            size,
            mappable,
        } in regions
        {
            let place = bars.get_mut(usize::from(bar)).context("no such BAR")?;
            ensure!(place.is_none(), "BAR {bar} is there twice");
            // Files have whole pages.
            let bytes = size.next_multiple_of(4096);
            *place = Some(HbmBacking::memfd(&format!("bar{bar}"), bytes)?);
            layout.bars.push(Bar {
                index: bar,
                size,
                is_64bit: false,
                prefetchable: true,
                mappable,
            });
        }
        let state: u64 = layout.bars.iter().map(|bar| bar.size).sum();
        ensure!(
            !arguments.migration || state <= MAX_MIGRATED,
            "BARs of {state} bytes; at most {MAX_MIGRATED} are carried"
        );
        let events = (0..arguments.events).map(|_| eventfd(0, EventfdFlags::CLOEXEC));
        Ok(Scratch {
            config: Mutex::new(vec![0; usize::try_from(layout.config_size)?]),
            layout,
            bars,
            attachment: Mutex::new(None),
            events: events.collect::<Result<_, _>>()?,
            others: arguments.others.clone(),
            migration: arguments.migration,
        })
    }

    /// Calls `f` with a part of a BAR that the server has checked.
    fn part(&self, bar: u8, offset: u64, len: usize, f: impl FnOnce(VolatileSlice<'_>)) {
        let store = self.bars.get(usize::from(bar)).and_then(Option::as_ref);
        let slice = store.and_then(|store| store.slice(offset, len as u64).ok());
        if let Some(slice) = slice {
            f(slice);
        }
    }

    /// Does what a line asks for, and says what came of it.
    pub fn command(&self, line: &str) -> String {
        let done = self.obey(line);
        done.unwrap_or_else(|error| format!("error: {error:#}"))
    }

    fn obey(&self, line: &str) -> anyhow::Result<String> {
        let words: Vec<_> = line.split_whitespace().collect();
        let attachment = lock(&self.attachment).clone();
        let Attachment { dma, irq } = attachment.context("no client")?;
        match *words.as_slice() {
            ["read", address, len] => {
                let len = usize::try_from(number(len)?)?;
                ensure!(len <= MAX_ACCESS, "{len} bytes; at most {MAX_ACCESS}");
                let mut hex = String::new();
                dma.access(
                    number(address)?,
                    len as u64,
                    DmaAccess::Read,
                    &mut |piece| {
                        let mut bytes = vec![0_u8; piece.len()];
                        piece.copy_to(&mut bytes);
                        hex.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
                    },
                )?;
                Ok(hex)
            }
            ["write", address, hex] => {
                ensure!(
                    hex.len() % 2 == 0 && hex.is_ascii(),
                    "pairs of hexadecimal digits"
                );
                let pairs = (0..hex.len())
                    .step_by(2)
                    .filter_map(|at| hex.get(at..at + 2));
                let bytes = pairs.map(|pair| u8::from_str_radix(pair, 16));
                let bytes: Vec<u8> = bytes.collect::<Result<_, _>>()?;
                let mut rest = bytes.as_slice();
                let (address, len) = (number(address)?, bytes.len() as u64);
                dma.access(address, len, DmaAccess::Write, &mut |piece| {
                    let (now, later) = rest.split_at_checked(piece.len()).unwrap_or_default();
                    piece.copy_from(now);
                    rest = later;
                })?;
                Ok("ok".to_owned())
            }
            ["copy", from, to, len] => {
                dma.copy(number(from)?, number(to)?, number(len)?)?;
                Ok("ok".to_owned())
            }
            ["irq", vector] => {
                let heard = irq.trigger(u16::try_from(number(vector)?)?);
                Ok(if heard { "ok" } else { "nobody listens" }.to_owned())
            }
            ["irq", index, vector] => {
                let vector = u16::try_from(number(vector)?)?;
                let heard = match number(index)? {
                    2 => irq.trigger(vector),
                    index => irq.trigger_other(kind(index)?, vector),
                };
                Ok(if heard { "ok" } else { "nobody listens" }.to_owned())
            }
            _ => bail!("`{line}` is none of read, write, copy, irq"),
        }
    }
}

impl PciFunction for Scratch {
    fn layout(&self) -> &FunctionLayout {
        &self.layout
    }

    fn attach(&self, attachment: Attachment) {
        *lock(&self.attachment) = Some(attachment);
    }

    fn detach(&self) {
        *lock(&self.attachment) = None;
    }

    fn dma_changed(&self) {}

    fn config_read(&self, offset: u32, data: &mut [u8]) {
        let config = lock(&self.config);
        let bytes = config.iter().skip(offset as usize);
        data.iter_mut()
            .zip(bytes)
            .for_each(|(to, from)| *to = *from);
    }

    fn config_write(&self, offset: u32, data: &[u8]) {
        let mut config = lock(&self.config);
        let bytes = config.iter_mut().skip(offset as usize);
        bytes.zip(data).for_each(|(to, from)| *to = *from);
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.part(bar, offset, data.len(), |part| {
            part.copy_to(data);
        });
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.part(bar, offset, data.len(), |part| part.copy_from(data));
    }

    fn bar_file(&self, bar: u8) -> Option<BorrowedFd<'_>> {
        let mut bars = self.layout.bars.iter();
        let bar = bars.find(|it| it.index == bar && !it.mappable.is_empty())?;
        Some(self.bars.get(usize::from(bar.index))?.as_ref()?.as_fd())
    }

    fn io_fds(&self, bar: u8) -> Vec<IoFd<'_>> {
        let events = self.events.iter().filter(|_| bar == 0);
        (0..)
            .zip(events)
            .map(|(index, event)| IoFd {
                offset: 8 * index,
                size: 8,
                datamatch: None,
                event: event.as_fd(),
            })
            .collect()
    }

    fn other_interrupts(&self) -> &[(OtherInterrupt, u16)] {
        &self.others
    }

    fn migrate(&self) -> Option<&dyn Migrate> {
        self.migration.then_some(self)
    }

    fn reset(&self, _kind: ResetKind) {
        lock(&self.config).fill(0);
        for bar in self.bars.iter().flatten() {
            if let Err(error) = bar.scrub(0, bar.size()) {
                eprintln!("vfio_user_server: {error}");
            }
        }
    }
}

impl Migrate for Scratch {
    /// It never works by itself.
    fn stop(&self) -> Result<(), MigrateError> {
        Ok(())
    }

    fn run(&self) {}

    fn save(&self) -> Result<Vec<u8>, MigrateError> {
        let mut state = KNOWN.to_vec();
        state.extend_from_slice(&lock(&self.config));
        for bar in &self.layout.bars {
            let bytes = usize::try_from(bar.size).map_err(|_| bad(0))?;
            let start = state.len();
            state.resize(start + bytes, 0);
            self.bar_read(bar.index, 0, state.get_mut(start..).unwrap_or_default());
        }
        Ok(state)
    }

    fn load(&self, state: &[u8]) -> Result<(), MigrateError> {
        let bars: u64 = self.layout.bars.iter().map(|bar| bar.size).sum();
        let want = bars + u64::from(self.layout.config_size);
        let data = state.strip_prefix(KNOWN);
        let data = data.filter(|data| data.len() as u64 == want);
        let data = data.ok_or_else(|| bad(state.len()))?;
        let (config, mut rest) = data
            .split_at_checked(self.layout.config_size as usize)
            .ok_or_else(|| bad(state.len()))?;
        self.config_write(0, config);
        for bar in &self.layout.bars {
            let bytes = usize::try_from(bar.size).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_checked(bytes).unwrap_or_default();
            self.bar_write(bar.index, 0, now);
            rest = later;
        }
        Ok(())
    }

    /// Number and bytes of each region, configuration space as number 7.
    fn outline(&self) -> Result<Vec<u8>, MigrateError> {
        let bars = self.layout.bars.iter();
        let bars = bars.map(|bar| format!("{}:{:#x} ", bar.index, bar.size));
        let config_size = self.layout.config_size;
        Ok(format!("{}7:{config_size:#x}", bars.collect::<String>()).into_bytes())
    }

    fn fits(&self, outline: &[u8]) -> Result<(), MigrateError> {
        match outline == self.outline()? {
            true => Ok(()),
            false => Err(MigrateError::Bad("other regions".to_owned())),
        }
    }
}

fn bad(bytes: usize) -> MigrateError {
    MigrateError::Bad(format!("{bytes} bytes"))
}

/// Starts what the command line describes.
pub fn start(arguments: &Arguments) -> anyhow::Result<(Server, Arc<Scratch>)> {
    // Before anything of our own is open.
    let handed = arguments.fd.map(inherited::take).transpose()?;
    let scratch = Arc::new(Scratch::new(arguments)?);
    let limits = Limits {
        max_transfer: arguments.max_transfer,
        max_dma_maps: arguments.max_dma_maps,
    };
    let listener = match (handed, &arguments.socket_path) {
        (Some(socket), _) => Listener::handed(socket)?,
        (None, Some(path)) => Listener::bind(path)?,
        (None, None) => bail!("no socket"),
    };
    let server = Server::start(listener, Arc::clone(&scratch) as _, limits)?;
    Ok((server, scratch))
}

/// Serves until the process is ended.
fn main() -> ExitCode {
    let (server, scratch) = match start(&Arguments::parse()) {
        Ok(started) => started,
        Err(error) => {
            eprintln!("vfio_user_server: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    println!("serving {}", server.path().display());
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        println!("{}", scratch.command(&line));
        let _ = std::io::stdout().flush();
    }
    loop {
        std::thread::park();
    }
}
