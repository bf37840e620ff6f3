//! GPUs: names, sizes, exposures, buses.

use std::collections::BTreeMap;

use toml::Spanned;

use super::{Check, HBM_UNIT, check_cpu_index, would_fit, wrong};
use crate::machine::{Exposure, Gpu, MAX_DOMAINS, Machine, PciNode};
use crate::size::{Size, TIB};

/// Largest HBM aperture: the 64-bit window of OVMF ends at 2^46 or before, and has to hold one aligned to its size.
const MAX_APERTURE: u64 = 8 * TIB;
/// Nodes of a Linux host (`NODES_SHIFT=10`).
const MAX_HOST_NODES: u32 = 1024;

pub(super) fn check_gpus(machine: &Machine) -> Check<Vec<String>> {
    let mut ids: Vec<String> = Vec::new();
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    let mut buses: BTreeMap<u32, usize> = BTreeMap::new();
    for (index, spanned) in machine.gpu.iter().enumerate() {
        let gpu = spanned.get_ref();
        let key = |name: &str| format!("gpu[{index}].{name}");
        let id = gpu
            .id
            .as_ref()
            .map_or_else(|| format!("gpu{index}"), |id| id.get_ref().clone());
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if let Some(at) = &gpu.id
            && (!id.starts_with(|c: char| c.is_ascii_alphabetic())
                || !id.chars().all(plain)
                || id.len() > 32)
        {
            let message = format!("`{id}` is not a name that can be used for files and objects");
            let help = "1 to 32 letters, digits, - and _, a letter first".to_owned();
            return Err(wrong(machine, at, key("id"), message, Some(help)));
        }
        let at = gpu
            .id
            .as_ref()
            .map_or(spanned.span().start, |id| id.span().start);
        if let Some(other) = known.insert(id.clone(), index) {
            let (message, help) = if gpu.id.is_some() {
                (format!("gpu[{other}] is named `{id}` already"), None)
            } else {
                let message = format!("is `{id}` by default, but gpu[{other}] is named so");
                (message, Some("give this GPU an id".to_owned()))
            };
            return Err(machine.text.error(at, key("id"), message, help));
        }
        let number = id.strip_prefix("cpu").unwrap_or_default();
        if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) {
            let message = format!("`{id}` would be mistaken for a CPU node in links");
            let help = "any name but cpu and a number".to_owned();
            return Err(machine.text.error(at, key("id"), message, Some(help)));
        }
        ids.push(id);
        let partitions = *gpu.partitions.get_ref();
        if !(1..=8).contains(&partitions) {
            let message = format!("{partitions} partitions; a GPU has 1 to 8");
            return Err(wrong(
                machine,
                &gpu.partitions,
                key("partitions"),
                message,
                None,
            ));
        }
        let unit = HBM_UNIT * u64::from(partitions);
        let hbm = *gpu.hbm.get_ref();
        if hbm.0 == 0 || !hbm.0.is_multiple_of(unit) {
            return Err(wrong(
                machine,
                &gpu.hbm,
                key("hbm"),
                match partitions {
                    1 => format!("{} bytes is not a positive multiple of 2 MiB", hbm.0),
                    _ => format!(
                        "{} bytes cannot be {partitions} partitions that are positive multiples of 2 MiB",
                        hbm.0
                    ),
                },
                would_fit(hbm.0, unit),
            ));
        }
        check_cpu_index(machine, &gpu.cpu, key("cpu"))?;
        check_exposure(machine, index, gpu)?;
        if *gpu.pci_node.get_ref() == PciNode::Hbm && gpu.domain_count() == 0 {
            let exposure = gpu.exposure.get_ref();
            return Err(wrong(
                machine,
                &gpu.pci_node,
                key("pci_node"),
                format!("is `hbm`, but HBM with exposure `{exposure}` has no node of its own"),
                Some("pci_node = \"cpu\"".to_owned()),
            ));
        }
        if *gpu.pci_node.get_ref() == PciNode::Hbm && !gpu.is_initiator() {
            return Err(wrong(
                machine,
                &gpu.pci_node,
                key("pci_node"),
                "is `hbm`, but without a Generic Initiator that node is not online when Linux boots",
                Some("set generic_initiator = true, or pci_node = \"cpu\"".to_owned()),
            ));
        }
        if let Some(bus) = &gpu.bus {
            let number = *bus.get_ref();
            if !(2..=255).contains(&number) {
                let message = format!("bus {number} is not in 2 to 255");
                let help = "0 is the root bus, and the GPU's expander bridge takes the bus before"
                    .to_owned();
                return Err(wrong(machine, bus, key("bus"), message, Some(help)));
            }
            // The expander bridge takes the number before.
            for taken in [number - 1, number] {
                if let Some(other) = buses.insert(taken, index) {
                    let message =
                        format!("{number:#x} needs bus {taken:#x}, which is gpu[{other}]'s");
                    let help = Some(
                        "each GPU takes its bus and the one before, for its expander bridge"
                            .to_owned(),
                    );
                    return Err(wrong(machine, bus, key("bus"), message, help));
                }
            }
        }
    }
    Ok(ids)
}

/// Keys that belong to one exposure only, and what each exposure needs.
fn check_exposure(machine: &Machine, index: usize, gpu: &Gpu) -> Check<()> {
    let exposure = *gpu.exposure.get_ref();
    let key = |name: &str| format!("gpu[{index}].{name}");
    let only = |name: &str, at: Option<usize>, of: &[Exposure]| match at {
        Some(at) if !of.contains(&exposure) => {
            let names: Vec<String> = of.iter().map(|e| format!("`{e}`")).collect();
            let message = format!(
                "is for exposure {}, and this is `{exposure}`",
                names.join(" and ")
            );
            let help = format!("leave {name} out, or change gpu[{index}].exposure");
            Err(machine.text.error(at, key(name), message, Some(help)))
        }
        _ => Ok(()),
    };
    let at = |size: &Option<Spanned<Size>>| size.as_ref().map(|size| size.span().start);
    only("base", at(&gpu.base), &[Exposure::Spm])?;
    only(
        "aperture",
        at(&gpu.aperture),
        &[Exposure::Bar, Exposure::Private],
    )?;
    let domains = gpu.domains.as_ref();
    only("domains", domains.map(|d| d.span().start), &[Exposure::Bar])?;
    let initiator = gpu.generic_initiator.as_ref().filter(|is| *is.get_ref());
    only(
        "generic_initiator",
        initiator.map(|is| is.span().start),
        &[Exposure::Spm, Exposure::Bar],
    )?;
    let host_node = gpu.host_node.as_ref();
    only(
        "host_node",
        host_node.map(|node| node.span().start),
        &[Exposure::Spm],
    )?;
    if let Some(node) = host_node.filter(|node| *node.get_ref() >= MAX_HOST_NODES) {
        let message = format!(
            "there is no host node {}; Linux has at most {MAX_HOST_NODES}",
            node.get_ref()
        );
        return Err(wrong(machine, node, key("host_node"), message, None));
    }
    let partitions = *gpu.partitions.get_ref();
    match exposure {
        Exposure::Spm => {}
        Exposure::Ram if partitions > 1 => {
            let message = format!("{partitions} partitions of HBM that is a CPU node's RAM");
            let help = "describe each partition as a CPU node with a GPU of its own".to_owned();
            return Err(wrong(
                machine,
                &gpu.partitions,
                key("partitions"),
                message,
                Some(help),
            ));
        }
        Exposure::Ram | Exposure::Private => {}
        Exposure::Bar => {
            if let Some(domains) = &gpu.domains
                && !(partitions..=MAX_DOMAINS).contains(domains.get_ref())
            {
                let message = format!(
                    "{} domain(s); a GPU with {partitions} partition(s) has {partitions} to {MAX_DOMAINS}",
                    domains.get_ref()
                );
                return Err(wrong(machine, domains, key("domains"), message, None));
            }
            if let Some(no) = gpu.generic_initiator.as_ref().filter(|is| !*is.get_ref()) {
                let message = "is false, but domains without memory are in no table then, and Linux has no node for them";
                let help = "leave generic_initiator out".to_owned();
                return Err(wrong(
                    machine,
                    no,
                    key("generic_initiator"),
                    message,
                    Some(help),
                ));
            }
        }
    }
    if let Some(aperture) = &gpu.aperture {
        let (size, hbm) = (aperture.get_ref().0, gpu.hbm.get_ref().0);
        if !size.is_power_of_two() || size < hbm || size > MAX_APERTURE {
            let message = format!(
                "{} is not a power of two from {}, the HBM, to {}",
                Size(size),
                Size(hbm),
                Size(MAX_APERTURE)
            );
            let fits = hbm
                .checked_next_power_of_two()
                .filter(|fits| *fits <= MAX_APERTURE);
            let help = fits.map(|fits| format!("{} would fit", Size(fits)));
            return Err(wrong(machine, aperture, key("aperture"), message, help));
        }
    }
    if let Some(size) = gpu.aperture_bytes().filter(|size| *size > MAX_APERTURE) {
        let message = format!(
            "needs an aperture of {}; a BAR of at most {} can be planned",
            Size(size),
            Size(MAX_APERTURE)
        );
        return Err(wrong(machine, &gpu.hbm, key("hbm"), message, None));
    }
    Ok(())
}
