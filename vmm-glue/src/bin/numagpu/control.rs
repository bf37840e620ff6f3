//! `numagpu status` and `numagpu inject`.

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::anyhow;
use numagpu_topology::size::Size;
use numagpu_vmm_glue::control::status::{Gpu, Link, Partition, Queue, Step};
use numagpu_vmm_glue::control::{self, ClientError, Refusal, RefusalKind, Reply, Request, Status};
use numagpu_vmm_glue::scenario::{Played, PlayedFault};

use crate::args::{InjectArgs, StatusArgs};
use crate::{Failure, print};

/// Last steps of a partition's ownership that are shown.
const STEPS: usize = 3;

/// Shows an instance.
pub fn status(args: &StatusArgs) -> Result<ExitCode, Failure> {
    match ask(args.path.as_deref(), &Request::Status {})? {
        Reply::Status(status) => {
            let text = match args.json {
                true => serde_json::to_string_pretty(&status)? + "\n",
                false => text(&status),
            };
            print(text.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        other => Err(unexpected(&other)),
    }
}

/// Makes a fault happen.
pub fn inject(args: &InjectArgs) -> Result<ExitCode, Failure> {
    let (gpu, fault) = (args.gpu, args.fault);
    match ask(args.control.as_deref(), &Request::Inject { gpu, fault })? {
        Reply::Injected { gpu, fault } => {
            print(format!("GPU {gpu}: {fault}\n").as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
        other => Err(unexpected(&other)),
    }
}

/// The instance's reply, if it is no refusal.
fn ask(path: Option<&Path>, request: &Request) -> Result<Reply, Failure> {
    let reply = control::find(path).and_then(|socket| control::ask(&socket, request));
    match reply {
        Ok(Reply::Error(Refusal { kind, message })) => {
            let error = anyhow!("{}", plain(&message));
            Err(match kind {
                RefusalKind::Invalid => Failure::Input(error),
                _ => Failure::Failed(error),
            })
        }
        Ok(reply) => Ok(reply),
        Err(error @ ClientError::Several(_)) => Err(Failure::Input(error.into())),
        Err(error) => Err(Failure::Failed(error.into())),
    }
}

fn unexpected(reply: &Reply) -> Failure {
    let what = match reply {
        Reply::Status(_) => "a status",
        Reply::Injected { .. } => "an injection",
        Reply::Error(_) => "a refusal",
    };
    Failure::Failed(anyhow!(
        "the instance replied with {what}, which was not asked for"
    ))
}

/// What another program said, without what would move a terminal's cursor.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Rows with columns that are as wide as their widest cell; the first row is the heading.
fn columns(out: &mut String, rows: &[Vec<String>]) {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row: &Vec<String>| row.get(column));
        cells
            .map(|cell: &String| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..count).map(width).collect();
    for row in rows {
        let mut line = String::from("  ");
        for (cell, width) in row.iter().zip(&widths) {
            // Writing into text does not fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// A heading and a row for each item; nothing if there is none.
fn table<T>(
    out: &mut String,
    heading: &[&str],
    items: &[T],
    row: impl Fn(usize, &T) -> Vec<String>,
) {
    if items.is_empty() {
        return;
    }
    let heading = heading.iter().map(|cell| (*cell).to_owned()).collect();
    let mut rows = vec![heading];
    rows.extend(
        items
            .iter()
            .enumerate()
            .map(|(index, item)| row(index, item)),
    );
    columns(out, &rows);
}

/// The instance for people.
fn text(status: &Status) -> String {
    let mut out = format!(
        "{}: {} GPU(s), process {}, up {}\n",
        plain(&status.machine),
        status.gpus.len(),
        status.pid,
        seconds(status.up_ms)
    );
    if !status.sandbox.is_empty() {
        // Writing into text does not fail.
        let _ = writeln!(out, "sandbox {}", plain(&status.sandbox));
    }
    for gpu in &status.gpus {
        out.push('\n');
        gpu_text(&mut out, gpu);
    }
    if let Some(played) = &status.scenario {
        out.push('\n');
        scenario_text(&mut out, played);
    }
    out
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

fn gpu_text(out: &mut String, gpu: &Gpu) {
    let place = match (gpu.present, gpu.attached) {
        (false, _) => "does not answer",
        (true, true) => "VMM connected",
        (true, false) => "no VMM",
    };
    let errors = &gpu.health;
    let _ = write!(
        out,
        "GPU {} {}: {place}, boot {}, {} interrupt(s)\n  memory errors: {} corrected, {} not; pages: {} poisoned, {} retired\n",
        gpu.index,
        plain(&gpu.id),
        gpu.boot,
        gpu.interrupts,
        errors.correctable,
        errors.uncorrectable,
        errors.poisoned,
        errors.retired
    );
    let heading = [
        "partition",
        "address",
        "size",
        "PXM",
        "state",
        "generation",
        "lost by",
        "coherence",
        "last steps",
    ];
    table(out, &heading, &gpu.partitions, partition_row);
    let heading = [
        "queue", "state", "packets", "bytes", "rptr", "wptr", "fault",
    ];
    table(out, &heading, &gpu.queues, queue_row);
    table(
        out,
        &[
            "link to",
            "state",
            "lanes",
            "errors",
            "bytes out",
            "bytes in",
        ],
        &gpu.links,
        link_row,
    );
}

fn partition_row(index: usize, partition: &Partition) -> Vec<String> {
    let Partition {
        base,
        size,
        pxm,
        state,
        generation,
        loss,
        coherence,
        history,
    } = partition;
    let shown = history.len().saturating_sub(STEPS);
    let steps = history.iter().skip(shown);
    let steps: Vec<String> = steps
        .map(|Step { event, to, .. }| format!("{event} -> {to}"))
        .collect();
    vec![
        index.to_string(),
        format!("{base:#x}"),
        Size(*size).to_string(),
        pxm.map_or_else(|| "-".to_owned(), |pxm| pxm.to_string()),
        state.clone(),
        generation.to_string(),
        loss.clone(),
        coherence.clone(),
        steps.join(", "),
    ]
}

fn queue_row(index: usize, queue: &Queue) -> Vec<String> {
    let fault = match queue.fault.as_str() {
        "none" => "-".to_owned(),
        fault => format!(
            "{fault} at {:#x}, packet {}",
            queue.fault_address, queue.fault_packet
        ),
    };
    vec![
        index.to_string(),
        queue.state.clone(),
        queue.packets.to_string(),
        queue.bytes.to_string(),
        queue.rptr.to_string(),
        queue.wptr.to_string(),
        fault,
    ]
}

fn link_row(_: usize, link: &Link) -> Vec<String> {
    let peer = link
        .peer
        .map_or_else(|| "CPU".to_owned(), |peer| format!("peer {peer}"));
    vec![
        peer,
        link.state.clone(),
        link.lanes.to_string(),
        link.errors.to_string(),
        link.bytes_out.to_string(),
        link.bytes_in.to_string(),
    ]
}

fn scenario_text(out: &mut String, played: &Played) {
    let pending = played
        .faults
        .iter()
        .filter(|fault| fault.is_pending())
        .count();
    let since = played.now_ms.map_or_else(
        || "no VMM has connected yet".to_owned(),
        |ms| format!("{} since a VMM connected", seconds(ms)),
    );
    let _ = writeln!(
        out,
        "scenario {}: {} fault(s), {pending} pending, {since}",
        plain(&played.file),
        played.faults.len()
    );
    let heading = ["fault", "GPU", "what", "when", "fired", "first at", "error"];
    table(out, &heading, &played.faults, scenario_row);
}

fn scenario_row(index: usize, fault: &PlayedFault) -> Vec<String> {
    vec![
        index.to_string(),
        fault.gpu.to_string(),
        fault.fault.to_string(),
        fault.trigger.to_string(),
        format!("{} of {}", fault.fired, fault.repeat),
        fault.fired_at_ms.map_or_else(|| "-".to_owned(), seconds),
        fault.error.as_deref().map(plain).unwrap_or_default(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut out = String::new();
        let row = |index: usize, cell: &&str| vec![index.to_string(), (*cell).to_owned()];
        table(&mut out, &["number", "name"], &["a", ""], row);
        assert_eq!(out, "  number  name\n  0       a\n  1\n");
        let none: [&str; 0] = [];
        table(&mut out, &["number"], &none, row);
        assert_eq!(out.lines().count(), 3);
    }

    #[test]
    fn what_would_move_a_cursor_is_left_out() {
        assert_eq!(plain("a\u{1b}[2Jb\nc"), "a[2Jbc");
    }
}
