//! The workspace as cargo sees it, and the programs that are run in it.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// Where the workspace is.
#[derive(Deserialize)]
pub struct Workspace {
    /// The directory of the workspace's manifest.
    #[serde(rename = "workspace_root")]
    pub root: PathBuf,
    /// cargo's target directory.
    #[serde(rename = "target_directory")]
    pub target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    pub fn open() -> Result<Self> {
        metadata()
    }

    /// Builds the `numagpu` command in the dev profile and returns where it is.
    ///
    /// `packages` selects the features of its dependencies: with `--workspace` they are as in tests,
    /// with its own package they are, but for a few, as in this program, which is there already.
    pub fn numagpu(&self, packages: &[&str]) -> Result<PathBuf> {
        let mut command = self.cargo();
        command
            .arg("build")
            .args(packages)
            .args(["--bin", "numagpu"]);
        say(&command);
        command.arg("--message-format=json-render-diagnostics");
        let mut program = None;
        stream(&mut command, |line| {
            if let Ok(Artifact {
                executable: Some(path),
            }) = serde_json::from_str(line)
            {
                program = Some(path);
            }
            false
        })?;
        program.context("cargo did not say where it put the numagpu command")
    }

    /// cargo, working in the workspace's directory.
    pub fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root);
        command
    }
}

/// What is of use in a message of cargo.
#[derive(Deserialize)]
struct Artifact {
    executable: Option<PathBuf>,
}

/// The cargo that runs this, or the one in `PATH`.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// What `cargo metadata` says of the workspace, in as much detail as `T` has. Needs no network.
pub fn metadata<T: serde::de::DeserializeOwned>() -> Result<T> {
    let done = cargo()
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cargo cannot be started")?;
    if !done.status.success() {
        bail!("cargo metadata: {}", done.status);
    }
    serde_json::from_slice(&done.stdout).context("cargo metadata is not understood")
}

/// Prints a command as one would type it.
pub fn say(command: &Command) {
    let program = PathBuf::from(command.get_program());
    let mut line = program.file_name().unwrap_or_default().to_owned();
    for argument in command.get_args() {
        line.push(" ");
        line.push(argument);
    }
    println!("$ {}", line.display());
}

/// Runs a command that speaks to the user itself; an error if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    say(command);
    let program = name(command);
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("{program} cannot be started"))?;
    if !status.success() {
        bail!("{program}: {status}");
    }
    Ok(())
}

/// Runs a command and gives each line of its output to `look`, which says whether to print it.
pub fn stream(command: &mut Command, mut look: impl FnMut(&str) -> bool) -> Result<()> {
    let program = name(command);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program} cannot be started"))?;
    if let Some(output) = child.stdout.take() {
        let mut lines = BufReader::new(output);
        let mut line = Vec::new();
        // Bytes, not text: a guest's console may print anything.
        while lines.read_until(b'\n', &mut line)? > 0 {
            if look(String::from_utf8_lossy(&line).trim_end()) {
                let mut terminal = std::io::stdout().lock();
                terminal.write_all(&line)?;
                terminal.flush()?;
            }
            line.clear();
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("{program}: {status}");
    }
    Ok(())
}

/// What to call a command in a message.
fn name(command: &Command) -> String {
    let path = PathBuf::from(command.get_program());
    let file = path.file_name().unwrap_or_default();
    file.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_looked_at_and_a_failure_is_an_error() {
        let mut seen = Vec::new();
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo one; printf two; exit 3"]);
        let error = stream(&mut shell, |line| {
            seen.push(line.to_owned());
            false
        })
        .unwrap_err();
        assert_eq!(seen, ["one", "two"]);
        assert!(error.to_string().contains('3'), "{error}");
    }
}
