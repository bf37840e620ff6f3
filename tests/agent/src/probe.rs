//! What Linux found: memory map, ACPI tables, nodes, dax devices.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use numagpu_topology::ranges::Range;
use numagpu_topology::seen::{AccessSeen, DaxSeen, NodeSeen, Report, SratMemory};
use numagpu_topology::size::GIB;
use rustix::fs::{Mode, OFlags};

/// A file's contents without the white space around them, empty if it cannot be read.
pub fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path)
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// A number in decimal or, behind `0x`, hexadecimal.
pub fn number(text: &str) -> Option<u64> {
    match text.trim().strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.trim().parse().ok(),
    }
}

/// A list such as `0-3,7`.
pub fn list(text: &str) -> Vec<u32> {
    let run = |run: &str| {
        let (first, last) = run.split_once('-').unwrap_or((run, run));
        Some(first.parse::<u32>().ok()?..=last.parse::<u32>().ok()?)
    };
    text.split(',').filter_map(run).flatten().collect()
}

/// The kernel's log so far.
pub fn kernel_log() -> String {
    let mut log = String::new();
    let Ok(fd) = rustix::fs::open(
        "/dev/kmsg",
        OFlags::RDONLY | OFlags::NONBLOCK,
        Mode::empty(),
    ) else {
        return log;
    };
    let mut file = fs::File::from(fd);
    let mut record = [0; 8192];
    // Each read gives one record; EPIPE says that records were lost, any other error that there are no more.
    loop {
        match file.read(&mut record) {
            Ok(len) => {
                log.push_str(&String::from_utf8_lossy(
                    record.get(..len).unwrap_or_default(),
                ));
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::PIPE.raw_os_error()) => {}
            Err(_) => return log,
        }
    }
}

/// The memory map that the kernel works with: what the command line made of it, else what firmware gave. The words
/// differ between kernels (6.12 `soft reserved`, `usable`; 7.3 `System RAM`).
pub fn memory_map(log: &str) -> (Vec<Range>, Vec<Range>) {
    let entries = |prefix: &str| -> Vec<(Range, String)> {
        log.lines()
            .filter_map(|line| entry(line.split_once(';')?.1, prefix))
            .collect()
    };
    let user = entries("user: ");
    let map = if user.is_empty() {
        entries("BIOS-e820: ")
    } else {
        user
    };
    let of = |words: &[&str]| {
        map.iter()
            .filter(|(_, kind)| words.iter().any(|word| kind.contains(word)))
            .map(|(range, _)| *range)
            .collect()
    };
    (of(&["soft reserved"]), of(&["usable", "system ram"]))
}

fn entry(line: &str, prefix: &str) -> Option<(Range, String)> {
    let (_, rest) = line.strip_prefix(prefix)?.split_once("[mem ")?;
    let (bounds, kind) = rest.split_once(']')?;
    let (first, last) = bounds.split_once('-')?;
    let (first, last) = (number(first)?, number(last)?);
    Some((
        Range {
            base: first,
            size: last.checked_sub(first)?.checked_add(1)?,
        },
        kind.trim().to_lowercase(),
    ))
}

fn le<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    le(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    le(bytes, at).map(u64::from_le_bytes)
}

/// Memory entries and Generic Initiators of an SRAT (ACPI 6.5, section 5.2.16).
pub fn srat(table: &[u8]) -> (Vec<SratMemory>, Vec<u32>) {
    let (mut memory, mut initiators) = (Vec::new(), Vec::new());
    let mut at = 48;
    while let Some([kind, len]) = le::<2>(table, at) {
        let end = at + usize::from(len).max(2);
        let body = table.get(at..end).unwrap_or_default();
        let flags = |at| u32_at(body, at).unwrap_or(0);
        if kind == 1 && flags(28) & 1 == 1 {
            let fields = (u32_at(body, 2), u64_at(body, 8), u64_at(body, 16));
            if let (Some(pxm), Some(base), Some(size @ 1..)) = fields {
                memory.push(SratMemory {
                    pxm,
                    range: Range { base, size },
                    hotplug: flags(28) & 2 != 0,
                });
            }
        }
        if kind == 5 && flags(24) & 1 == 1 {
            initiators.extend(u32_at(body, 4));
        }
        at = end;
    }
    (memory, initiators)
}

/// The matrix of a SLIT (ACPI 6.5, section 5.2.17).
pub fn slit(table: &[u8]) -> Vec<Vec<u8>> {
    let count = u64_at(table, 36)
        .and_then(|count| usize::try_from(count).ok())
        .unwrap_or(0);
    let matrix = table.get(44..).unwrap_or_default();
    if count == 0 {
        return Vec::new();
    }
    matrix
        .chunks_exact(count)
        .take(count)
        .map(<[u8]>::to_vec)
        .collect()
}

/// `MemTotal` of the machine or of a node, in KiB.
pub fn mem_total(path: &str) -> u64 {
    let text = text(path);
    let line = text.lines().find(|line| line.contains("MemTotal:"));
    line.and_then(|line| line.split_whitespace().rev().nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// Fills in all that needs no driver.
pub fn machine(report: &mut Report) {
    report.kernel = text("/proc/sys/kernel/osrelease");
    report.command_line = text("/proc/cmdline");
    (report.soft_reserved, report.usable) = memory_map(&kernel_log());
    let tables = Path::new("/sys/firmware/acpi/tables");
    (report.srat_memory, report.srat_initiators) =
        srat(&fs::read(tables.join("SRAT")).unwrap_or_default());
    report.slit = slit(&fs::read(tables.join("SLIT")).unwrap_or_default());
    report.acpi_tables = names(tables)
        .into_iter()
        .filter(|name| name.len() >= 4)
        .collect();
    let nodes = Path::new("/sys/devices/system/node");
    report.nodes_possible = list(&text(nodes.join("possible")));
    report.nodes_online = list(&text(nodes.join("online")));
    report.nodes_initiator = list(&text(nodes.join("has_generic_initiator")));
    report.nodes = report
        .nodes_online
        .iter()
        .map(|node| {
            let path = nodes.join(format!("node{node}"));
            NodeSeen {
                node: *node,
                cpus: list(&text(path.join("cpulist"))),
                distances: text(path.join("distance"))
                    .split_whitespace()
                    .filter_map(|d| d.parse().ok())
                    .collect(),
                mem_total_kib: mem_total(&path.join("meminfo").to_string_lossy()),
                access: accesses(&path),
            }
        })
        .collect();
}

/// The access classes of a node, by number (Linux `Documentation/admin-guide/mm/numaperf.rst`).
pub fn accesses(node: &Path) -> Vec<AccessSeen> {
    let mut seen: Vec<AccessSeen> = names(node)
        .iter()
        .filter_map(|name| {
            let class = name.strip_prefix("access")?.parse().ok()?;
            let path = node.join(name).join("initiators");
            let value = |name: &str| {
                let value = number(&text(path.join(name)))?;
                u32::try_from(value).ok()
            };
            let both = |what: &str| {
                let value = |way: &str| value(&format!("{way}_{what}")).unwrap_or(0);
                (value("read"), value("write"))
            };
            let initiators = names(&path);
            let initiators = initiators
                .iter()
                .filter_map(|name| name.strip_prefix("node")?.parse().ok());
            let mut initiators: Vec<u32> = initiators.collect();
            initiators.sort_unstable();
            Some(AccessSeen {
                class,
                initiators,
                latency_ns: both("latency"),
                bandwidth_mbs: both("bandwidth"),
            })
        })
        .collect();
    seen.sort_by_key(|access| access.class);
    seen
}

/// What lspci prints of a function; what it complains of is a problem.
pub fn lspci(bdf: &str, problems: &mut Vec<String>) -> String {
    // The libraries are the host's, and its loader finds them in their directory only.
    let mut command = Command::new("/lspci/loader");
    command.args(["--library-path", "/lspci", "/lspci/lspci"]);
    let output = match command.args(["-n", "-vvv", "-s", bdf]).output() {
        Ok(output) => output,
        Err(error) => {
            problems.push(format!("lspci of {bdf}: {error}"));
            return String::new();
        }
    };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    let complaint = text(&output.stderr);
    if !complaint.is_empty() || !output.status.success() {
        problems.push(format!("lspci of {bdf}: {}: {complaint}", output.status));
    }
    text(&output.stdout)
}

/// Names in a directory, sorted.
pub fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory)
        .map(|entries| entries.flatten().collect::<Vec<_>>())
        .unwrap_or_default();
    let mut names: Vec<String> = entries
        .into_iter()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Gives every dax device the whole of its region and the driver that programs map it through. Kernels before 6.3 do
/// so themselves; later ones do it for `kmem`, and with `dax_hmem.region_idle=1` leave it to us.
pub fn dax(problems: &mut Vec<String>) -> Vec<DaxSeen> {
    let devices = Path::new("/sys/bus/dax/devices");
    let mut seen: Vec<DaxSeen> = names(devices)
        .into_iter()
        .map(|name| dax_device(devices, name, problems))
        .collect();
    seen.sort_by_key(|dax| dax.region.base);
    seen
}

fn dax_device(devices: &Path, name: String, problems: &mut Vec<String>) -> DaxSeen {
    let path = devices.join(&name);
    let attribute = |attribute: &str| text(path.join(attribute));
    let region = fs::canonicalize(&path)
        .ok()
        .and_then(|path| Some(path.parent()?.join("dax_region")));
    let region_size = region
        .and_then(|region| number(&text(region.join("size"))))
        .unwrap_or(0);
    let driver = || {
        let link = fs::read_link(path.join("driver")).ok();
        link.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()))
            .unwrap_or_default()
    };
    if attribute("size") == "0" {
        // Linux keeps a struct page for every page of a dax device, 1 GiB of RAM for 64 GiB of HBM, unless the device is
        // aligned to 1 GiB: then they share theirs (Documentation/mm/vmemmap_dedup.rst).
        let large = region_size.is_multiple_of(GIB)
            && fs::write(path.join("align"), GIB.to_string()).is_ok();
        if let Err(error) = fs::write(path.join("size"), region_size.to_string()) {
            problems.push(format!("{name}: size {region_size}: {error}"));
        }
        let base = number(&attribute("resource")).unwrap_or(0);
        if large && !base.is_multiple_of(GIB) {
            let _ = fs::write(path.join("align"), (2 << 20).to_string());
        }
    }
    if driver().is_empty()
        && let Err(error) = fs::write("/sys/bus/dax/drivers/device_dax/bind", &name)
    {
        problems.push(format!("{name}: bind to device_dax: {error}"));
    }
    let signed = |name: &str| attribute(name).parse().unwrap_or(-1);
    DaxSeen {
        region: Range {
            base: number(&attribute("resource")).unwrap_or(0),
            size: region_size,
        },
        size: number(&attribute("size")).unwrap_or(0),
        align: number(&attribute("align")).unwrap_or(0),
        target_node: signed("target_node"),
        numa_node: signed("numa_node"),
        driver: driver(),
        name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "6,1,0,-;BIOS-e820: [mem 0x0000000000000000-0x000000000009fbff] usable\n\
        6,2,0,-;BIOS-e820: [mem 0x0000000100000000-0x00000001ffffffff] soft reserved\n";

    #[test]
    fn the_firmwares_map_counts_without_a_user_map() {
        let (soft, usable) = memory_map(LOG);
        assert_eq!(
            soft,
            [Range {
                base: 1 << 32,
                size: 1 << 32
            }]
        );
        assert_eq!(
            usable,
            [Range {
                base: 0,
                size: 0x9fc00
            }]
        );
    }

    #[test]
    fn a_user_map_replaces_the_firmwares() {
        let log = format!(
            "{LOG}6,3,0,-;user: [mem 0x0000000200000000-0x00000002ffffffff] soft reserved\n"
        );
        assert_eq!(
            memory_map(&log),
            (
                vec![Range {
                    base: 2 << 32,
                    size: 1 << 32
                }],
                vec![]
            )
        );
    }

    #[test]
    fn tables_cut_short_give_what_is_whole() {
        let mut table = vec![0; 48];
        table.extend([1, 40]);
        table.extend([3, 0, 0, 0, 0, 0]);
        table.extend((4u64 << 32).to_le_bytes());
        table.extend((1u64 << 32).to_le_bytes());
        table.extend([0; 4]);
        table.extend([1, 0, 0, 0]);
        table.extend([0; 8]);
        table.extend([5, 32, 0]);
        let (memory, initiators) = srat(&table);
        assert_eq!(
            memory,
            [SratMemory {
                pxm: 3,
                range: Range {
                    base: 4 << 32,
                    size: 1 << 32
                },
                hotplug: false
            }]
        );
        assert!(initiators.is_empty() && slit(&table[..40]).is_empty());
    }

    #[test]
    fn access_classes_are_read_as_linux_shows_them() {
        let node = std::env::temp_dir().join(format!("numagpu-node-{}", std::process::id()));
        let class = node.join("access1/initiators");
        fs::create_dir_all(class.join("power")).unwrap();
        for name in ["node10", "node2"] {
            fs::create_dir(class.join(name)).unwrap();
        }
        fs::create_dir_all(node.join("access0/initiators")).unwrap();
        fs::create_dir_all(node.join("accessory")).unwrap();
        for (name, value) in [("read_latency", "600\n"), ("write_bandwidth", "36000\n")] {
            fs::write(class.join(name), value).unwrap();
        }
        let seen = accesses(&node);
        fs::remove_dir_all(&node).unwrap();
        let second = AccessSeen {
            class: 1,
            initiators: vec![2, 10],
            latency_ns: (600, 0),
            bandwidth_mbs: (0, 36_000),
        };
        assert_eq!(seen, [AccessSeen::default(), second]);
    }

    #[test]
    fn lists_read() {
        assert_eq!(list("0-2,7"), [0, 1, 2, 7]);
        assert!(list("").is_empty());
    }
}
