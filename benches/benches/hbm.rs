//! HBM that a client maps out of a GPU's BAR, beside ordinary memory: an anonymous mapping of the same size in the same
//! process, both touched before. Blocks of both in turns; medians and ratios are printed.
#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot be set up has nothing to report"
)]

use std::cell::RefCell;

use numagpu_benches::figures::{alternating, is_bench, nanos, ratio, thousandths};
use numagpu_devices::spec::pci;
use numagpu_topology::{parse, plan};
use numagpu_vmm_glue::instance::Instance;
use vfio_user::Client;
use vm_memory::{MmapRegion, VolatileMemory, VolatileSlice};

/// A GPU whose HBM is in BAR 4.
const MACHINE: &str = r#"
name = "mapped"

[[cpu]]
cpus = 1
memory = "1GiB"

[[gpu]]
hbm = "4GiB"
cpu = 0
exposure = "bar"
"#;

/// Bytes that are mapped of each.
const WINDOW: usize = 256 << 20;
/// Bytes of a read or a write at once, to or from a buffer that stays in cache.
const PIECE: usize = 16 << 10;

/// What is done with memory.
type Work = fn(&VolatileSlice<'_>, &mut [u8]);

fn read(memory: &VolatileSlice<'_>, buffer: &mut [u8]) {
    for at in (0..memory.len()).step_by(PIECE) {
        memory.subslice(at, PIECE).unwrap().copy_to(buffer);
    }
}

fn write(memory: &VolatileSlice<'_>, buffer: &mut [u8]) {
    for at in (0..memory.len()).step_by(PIECE) {
        memory.subslice(at, PIECE).unwrap().copy_from(buffer);
    }
}

/// Half of it to the other half, and back.
fn memmove(memory: &VolatileSlice<'_>, _: &mut [u8]) {
    let half = memory.len() / 2;
    let [low, high] = [0, half].map(|at| memory.subslice(at, half).unwrap());
    low.copy_to_volatile_slice(high);
    high.copy_to_volatile_slice(low);
}

fn main() {
    if !is_bench() {
        return;
    }
    let plan = plan(&parse("mapped.toml", MACHINE).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let instance = Instance::start(&plan, dir.path(), None, None).unwrap();
    let client = Client::new(instance.sockets().next().unwrap()).unwrap();
    let region = client.region(pci::BAR_APERTURE.into()).unwrap();
    let file = region.file_offset.clone().unwrap();
    let hbm = MmapRegion::<()>::from_file(file, WINDOW).unwrap();
    let ordinary = MmapRegion::<()>::new(WINDOW).unwrap();

    let buffer = RefCell::new(vec![1; PIECE]);
    for memory in [&hbm, &ordinary] {
        write(
            &memory.get_slice(0, WINDOW).unwrap(),
            &mut buffer.borrow_mut(),
        );
    }
    let works: [(&str, Work); 3] = [("read", read), ("write", write), ("memmove", memmove)];
    for (what, work) in works {
        for size in [64 << 10, 4 << 20, WINDOW] {
            let times = WINDOW / size;
            let run = |memory: &MmapRegion| {
                let slice = memory.get_slice(0, size).unwrap();
                nanos(|| (0..times).for_each(|_| work(&slice, &mut buffer.borrow_mut())))
            };
            let [mapped, bare] = alternating(21, || run(&hbm), || run(&ordinary));
            let bytes = WINDOW as u64 * 1000;
            println!(
                "{what} of {:>6} KiB: HBM {} GB/s, ordinary memory {} GB/s, {}",
                size >> 10,
                thousandths(bytes / mapped),
                thousandths(bytes / bare),
                ratio(bare, mapped)
            );
        }
    }
}
