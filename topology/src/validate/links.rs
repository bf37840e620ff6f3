//! Links: their ends, how many there are.

use std::collections::BTreeMap;

use toml::Spanned;

use super::{Check, End, MAX_LINKS, first_to_last, wrong};
use crate::machine::Machine;

pub(super) fn check_links(machine: &Machine, ids: &[String]) -> Check<Vec<(End, End)>> {
    let by_id: BTreeMap<&str, usize> = ids.iter().map(String::as_str).zip(0..).collect();
    let mut seen: BTreeMap<(End, End), usize> = BTreeMap::new();
    let mut degree: BTreeMap<End, usize> = BTreeMap::new();
    let mut ends = Vec::new();
    for (index, spanned) in machine.link.iter().enumerate() {
        let link = spanned.get_ref();
        let end = |name: &Spanned<String>, which: &str| {
            let text = name.get_ref();
            if let Some(gpu) = by_id.get(text.as_str()) {
                return Ok(End::Gpu(*gpu));
            }
            let cpu = text
                .strip_prefix("cpu")
                .and_then(|number| number.parse::<usize>().ok());
            cpu.filter(|cpu| *cpu < machine.cpu.len())
                .map(End::Cpu)
                .ok_or_else(|| {
                    let message = format!("there is no `{text}`");
                    let mut ends: Vec<&str> = ids.iter().map(String::as_str).collect();
                    if ends.len() > 16 {
                        ends.truncate(16);
                        ends.push("...");
                    }
                    let cpus = first_to_last("cpu", machine.cpu.len());
                    ends.push(&cpus);
                    let help = Some(format!("an end is one of {}", ends.join(", ")));
                    wrong(
                        machine,
                        name,
                        format!("link[{index}].{which}"),
                        message,
                        help,
                    )
                })
        };
        let (from, to) = (end(&link.from, "from")?, end(&link.to, "to")?);
        let key = format!("link[{index}]");
        if from == to {
            let message = format!("joins `{}` with itself", link.from.get_ref());
            return Err(wrong(machine, &link.to, format!("{key}.to"), message, None));
        }
        if matches!((from, to), (End::Cpu(_), End::Cpu(_))) {
            let message = "joins two CPU nodes; one end has to be a GPU".to_owned();
            let help = "distances.cpu_cpu says how far CPU nodes are from each other".to_owned();
            return Err(wrong(
                machine,
                &link.to,
                format!("{key}.to"),
                message,
                Some(help),
            ));
        }
        if !(1..=64).contains(link.count.get_ref()) {
            let message = format!("{} links in parallel; 1 to 64 can be", link.count.get_ref());
            return Err(wrong(
                machine,
                &link.count,
                format!("{key}.count"),
                message,
                None,
            ));
        }
        if let Some(other) = seen.insert((from.min(to), from.max(to)), index) {
            let message = format!(
                "link[{other}] joins `{}` and `{}` already",
                link.from.get_ref(),
                link.to.get_ref()
            );
            let help = Some("links in parallel are one entry with `count`".to_owned());
            return Err(wrong(machine, spanned, key, message, help));
        }
        for (end, name) in [(from, &link.from), (to, &link.to)] {
            let links = degree.entry(end).or_insert(0usize);
            *links += 1;
            if matches!(end, End::Gpu(_)) && *links > MAX_LINKS {
                let message = format!(
                    "is one more than the {MAX_LINKS} links that `{}` can have",
                    name.get_ref()
                );
                return Err(wrong(machine, spanned, key, message, None));
            }
        }
        ends.push((from, to));
    }
    Ok(ends)
}
