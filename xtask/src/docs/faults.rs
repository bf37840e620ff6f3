//! `docs/faults.md`: faults on demand, from the table in the device's own documentation and one example of each.

use std::path::Path;

use anyhow::{Context, Result, bail};
use numagpu_vmm_glue::control::Fault;

/// What the socket, the commands and scenarios are.
const INTRODUCTION: &str = include_str!("faults_introduction.md");

/// Where the table is.
const TABLE: &str = "devices/src/inject.rs";

/// Start of a fault's name in the table.
const LINK: &str = "[`Injection::";

/// One row of the table.
struct Row {
    /// Faults, by the names of their type.
    faults: Vec<String>,
    /// What a driver sees.
    seen: String,
    /// How it recovers.
    recovery: String,
}

/// The page.
pub fn page(root: &Path) -> Result<String> {
    let text = std::fs::read_to_string(root.join(TABLE))
        .with_context(|| format!("cannot read {TABLE}"))?;
    let rows = rows(&text);
    let mut page = INTRODUCTION.trim_end().to_owned();
    page += "\n\n## The faults\n";
    let mut left: Vec<&Fault> = Fault::EXAMPLES.iter().collect();
    for row in &rows {
        let mut examples = Vec::new();
        left.retain(|fault| {
            let wanted = row.faults.contains(&fault.kind());
            if wanted {
                examples.push(**fault);
            }
            !wanted
        });
        // One that the table knows and that has no name yet is none that an instance takes.
        if !examples.is_empty() {
            page += &section(row, &examples);
        }
    }
    page += "\n## The way back\n\nWhat undoes a fault that does not end by itself.\n";
    for fault in left {
        let kind = fault.kind();
        if !kind.ends_with("return") {
            bail!("{TABLE} has no row for {kind}");
        }
        page += &format!("\n### `{kind}`\n{}", example(fault));
    }
    Ok(page)
}

/// The rows of the table.
fn rows(text: &str) -> Vec<Row> {
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("//! | [`Injection::"));
    let cells = lines.filter_map(|line| {
        let mut cells = line.trim_end_matches(" |").split(" | ");
        Some((cells.next()?, cells.next()?, cells.next()?))
    });
    let rows = cells.map(|(names, seen, recovery)| {
        let names = format!("{LINK}{names}");
        Row {
            faults: names.split(LINK).skip(1).map(name).collect(),
            seen: linked(seen),
            recovery: linked(recovery),
        }
    });
    rows.collect()
}

/// The name in ``LinkLoss`]...``, in kebab case.
fn name(text: &str) -> String {
    let camel = text.split('`').next().unwrap_or_default();
    let mut kebab = String::new();
    for (index, letter) in camel.char_indices() {
        if letter.is_ascii_uppercase() && index > 0 {
            kebab.push('-');
        }
        kebab.push(letter.to_ascii_lowercase());
    }
    kebab
}

/// A cell with links to types turned into names.
fn linked(cell: &str) -> String {
    let mut parts = cell.split(LINK);
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.split_once("`]").map_or("", |(_, rest)| rest);
        text += &format!("`{}`{rest}", name(part));
    }
    text
}

fn section(row: &Row, examples: &[Fault]) -> String {
    let names: Vec<String> = row.faults.iter().map(|name| format!("`{name}`")).collect();
    let mut text = format!(
        "\n### {}\n\nA driver sees: {}.\n\nIt recovers: {}.\n",
        names.join(", "),
        row.seen,
        row.recovery
    );
    for fault in examples {
        text += &example(fault);
    }
    text
}

/// A fault's command line and its entry in a scenario.
fn example(fault: &Fault) -> String {
    let parameters = fault.parameters().into_iter();
    let parameters: String = parameters
        .map(|(name, value)| format!("{name} = {value}\n"))
        .collect();
    format!(
        "\n```sh\nnumagpu inject 0 {fault}\n```\n\n```toml\n[[fault]]\ngpu = 0\nkind = \"{}\"\n{parameters}at_ms = 500\n```\n",
        fault.kind()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_becomes_a_section() {
        let text = "//! | injection | sees | recovers |\n//! |---|---|---|\n\
                    //! | [`Injection::LinkLoss`], [`Injection::LinkFlap`] | `LINK.STATE` Down; bits | wait for [`Injection::Return`], then go on |\n";
        let rows = rows(text);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].faults, ["link-loss", "link-flap"]);
        let fault = Fault::LinkLoss { peer: 1 };
        assert_eq!(
            section(&rows[0], &[fault]),
            "\n### `link-loss`, `link-flap`\n\nA driver sees: `LINK.STATE` Down; bits.\n\n\
             It recovers: wait for `return`, then go on.\n\n\
             ```sh\nnumagpu inject 0 link-loss --peer 1\n```\n\n\
             ```toml\n[[fault]]\ngpu = 0\nkind = \"link-loss\"\npeer = 1\nat_ms = 500\n```\n"
        );
    }
}
