//! Sockets that `numagpu serve` was started with, by a service manager or with `--fd`, and whose they are.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, anyhow};
use numagpu_topology::Plan;
use numagpu_vmm_glue::service;
use numagpu_vmm_glue::sys::inherited;
use numagpu_vmm_glue::vfio_user::Listener;

use crate::Failure;
use crate::args::Handed;

/// Takes them over; the keys are the GPUs' indices. Called before this process opens anything that stays open.
/// `has_directory`: whether the other GPUs can have sockets of their own.
pub fn take(
    given: &[Handed],
    plan: &Plan,
    has_directory: bool,
) -> Result<BTreeMap<usize, Listener>, Failure> {
    let managed = service::sockets().context("sockets of the service manager");
    let managed = managed.map_err(Failure::Input)?;
    let ids: Vec<&str> = plan.gpus.iter().map(|gpu| gpu.id.as_str()).collect();
    let numbers = whose(given, &managed, &ids, has_directory).map_err(Failure::Input)?;
    let mut sockets = BTreeMap::new();
    for (index, number) in numbers {
        let id = ids.get(index).copied().unwrap_or_default();
        let taken = inherited::take(number);
        let taken = taken.with_context(|| format!("{id}: descriptor {number}"));
        let listener = taken.and_then(|socket| Listener::handed(socket).context(id.to_owned()));
        sockets.insert(index, listener.map_err(Failure::Input)?);
    }
    Ok(sockets)
}

/// Index of a GPU and number of its descriptor, for each descriptor.
fn whose(
    given: &[Handed],
    managed: &[(i32, String)],
    ids: &[&str],
    has_directory: bool,
) -> anyhow::Result<BTreeMap<usize, i32>> {
    let find = |id: &str| {
        ids.iter().position(|it| *it == id).ok_or_else(|| {
            anyhow!(
                "a socket is for {id:?}, but the machine's GPUs are {}",
                ids.join(", ")
            )
        })
    };
    if !given.is_empty() && !managed.is_empty() {
        return Err(anyhow!(
            "{} socket(s) of a service manager and {} of --fd: only one of both can be",
            managed.len(),
            given.len()
        ));
    }
    let mut pairs: Vec<(usize, i32)> = Vec::new();
    for handed in given {
        let index = match &handed.gpu {
            Some(id) => find(id)?,
            None if ids.len() == 1 => 0,
            None => {
                let (fd, count) = (handed.fd, ids.len());
                return Err(anyhow!(
                    "--fd {fd} names no GPU, and the machine has {count}: give --fd GPU={fd}"
                ));
            }
        };
        pairs.push((index, handed.fd));
    }
    let by_name = managed.iter().any(|(_, name)| ids.contains(&name.as_str()));
    if by_name {
        for (fd, name) in managed {
            pairs.push((find(name)?, *fd));
        }
    } else if !managed.is_empty() {
        if managed.len() != ids.len() {
            return Err(anyhow!(
                "{} socket(s) of a service manager for {} GPU(s), and no name of theirs is a GPU's: give one for \
                 each GPU, in their order, or names (FileDescriptorName=)",
                managed.len(),
                ids.len()
            ));
        }
        pairs.extend(managed.iter().map(|(fd, _)| *fd).enumerate());
    }
    let mut numbers = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (index, fd) in pairs {
        let id = ids.get(index).copied().unwrap_or_default();
        if let Some(other) = numbers.insert(index, fd) {
            return Err(anyhow!(
                "{id} has two sockets: descriptors {other} and {fd}"
            ));
        }
        if !seen.insert(fd) {
            return Err(anyhow!("descriptor {fd} is given to two GPUs, {id} is one"));
        }
    }
    let without: Vec<&str> = ids
        .iter()
        .enumerate()
        .filter(|(index, _)| !numbers.contains_key(index))
        .map(|(_, id)| *id)
        .collect();
    if !has_directory && !without.is_empty() {
        return Err(anyhow!(
            "{} of {} GPU(s) without a socket: {}; give --socket-dir DIR, or hand over their sockets",
            without.len(),
            ids.len(),
            without.join(", ")
        ));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDS: &[&str] = &["gpu0", "gpu1"];

    fn given(texts: &[&str]) -> Vec<Handed> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn managed(names: &[&str]) -> Vec<(i32, String)> {
        (3..).zip(names.iter().map(|it| (*it).to_owned())).collect()
    }

    fn error(given: &[Handed], managed: &[(i32, String)], has_directory: bool) -> String {
        whose(given, managed, IDS, has_directory)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn names_and_order_say_whose_a_socket_is() {
        let named = whose(&[], &managed(&["gpu1", "gpu0"]), IDS, false).unwrap();
        assert_eq!(named, BTreeMap::from([(0, 4), (1, 3)]));
        let ordered = whose(&[], &managed(&["x.socket", "x.socket"]), IDS, false).unwrap();
        assert_eq!(ordered, BTreeMap::from([(0, 3), (1, 4)]));
        let by_option = whose(&given(&["gpu1=7"]), &[], IDS, true).unwrap();
        assert_eq!(by_option, BTreeMap::from([(1, 7)]));
        let only = whose(&given(&["9"]), &[], &["only"], false).unwrap();
        assert_eq!(only, BTreeMap::from([(0, 9)]));
        assert!(whose(&[], &[], IDS, true).unwrap().is_empty());
    }

    #[test]
    fn what_clashes_is_said_with_numbers() {
        let one = managed(&["x"]);
        assert!(
            error(&[], &one, true).starts_with("1 socket(s) of a service manager for 2 GPU(s)")
        );
        let three = managed(&["x", "x", "x"]);
        assert!(error(&[], &three, true).starts_with("3 socket(s) of a service manager for 2"));
        let twice = managed(&["gpu0", "gpu0"]);
        assert_eq!(
            error(&[], &twice, true),
            "gpu0 has two sockets: descriptors 3 and 4"
        );
        let stranger = managed(&["gpu0", "gpu7"]);
        assert!(
            error(&[], &stranger, true).contains("\"gpu7\", but the machine's GPUs are gpu0, gpu1")
        );
        let both = error(&given(&["gpu0=9"]), &one, true);
        assert!(
            both.starts_with("1 socket(s) of a service manager and 1 of --fd"),
            "{both}"
        );
        assert!(error(&given(&["9"]), &[], true).contains("the machine has 2: give --fd GPU=9"));
        let same = error(&given(&["gpu0=9", "gpu1=9"]), &[], true);
        assert!(
            same.starts_with("descriptor 9 is given to two GPUs"),
            "{same}"
        );
        let missing = error(&given(&["gpu0=9"]), &[], false);
        assert!(
            missing.starts_with("1 of 2 GPU(s) without a socket: gpu1"),
            "{missing}"
        );
    }

    #[test]
    fn a_number_is_one_that_can_be_handed_over() {
        let error = |text: &str| text.parse::<Handed>().err().unwrap();
        assert!(error("gpu0=2").contains("below 3"));
        assert!(error("gpu0=-1").contains("below 3"));
        assert!(error("gpu0=").contains("no number"));
        assert!(error("99999999999").contains("no number"));
    }
}
