//! `docs/cli.md`: the command line, in its own words.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Columns of a help text; clap takes them from the environment where there is no terminal.
const COLUMNS: &str = "100";

/// The page.
pub fn page(numagpu: &Path) -> Result<String> {
    let top = help(numagpu, None)?;
    let mut page = String::from(
        "# The `numagpu` command\n\n\
         <!-- Made by `cargo xtask docs` from what the command says of itself: change it there. -->\n\n\
         Exit status: 0 if all went well, 1 if something failed or the guest differs from its plan, \
         2 if the command line, the machine description or the scenario is wrong, or a fault is for what the machine \
         does not have.\n\n\
         Logging goes to standard error; `NUMAGPU_LOG` filters it (`warn` unless set), such as \
         `NUMAGPU_LOG=info`. `NUMAGPU_GUEST_DIR` names the directory of QEMU, firmware and kernels \
         that `cargo xtask guest` made; unless set, `run` looks for `target/guest` upwards from the \
         current directory.\n",
    );
    page += &section("numagpu", &top);
    for command in commands(&top) {
        let text = help(numagpu, Some(command))?;
        page += &section(&format!("numagpu {command}"), &text);
    }
    Ok(page)
}

/// One command's help.
fn section(name: &str, text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    format!(
        "\n## `{name}`\n\n```text\n{}\n```\n",
        lines.join("\n").trim_end()
    )
}

/// What a command prints for `--help`.
fn help(numagpu: &Path, command: Option<&str>) -> Result<String> {
    // Without a terminal on any of the three streams, whose width would count.
    let done = Command::new(numagpu)
        .args(command)
        .arg("--help")
        .env("COLUMNS", COLUMNS)
        .stdin(std::process::Stdio::null())
        .output()
        .context("the numagpu command cannot be started")?;
    if !done.status.success() {
        bail!("numagpu --help: {}", done.status);
    }
    String::from_utf8(done.stdout).context("the help is not UTF-8")
}

/// The commands in a help text.
fn commands(help: &str) -> Vec<&str> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        // Deeper lines go on with the text of the command above.
        .filter_map(|line| {
            line.strip_prefix("  ")
                .filter(|rest| !rest.starts_with(' '))
        })
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_those_of_the_list() {
        let help = "Words.\n\nUsage: x\n\nCommands:\n  plan  Show\n        more\n  run\n  help  Print\n\nOptions:\n  -h\n";
        assert_eq!(commands(help), ["plan", "run"]);
    }
}
