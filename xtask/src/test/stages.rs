//! Stages, one after the other, with their times.

use std::fmt::Write;
use std::time::Instant;

use anyhow::{Context, Result};

/// How a stage ended that did not fail.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it is for.
    Passed,
    /// It could not, and why.
    Skipped(String),
}

/// A stage that is over.
struct Done {
    name: &'static str,
    seconds: f32,
    /// `None` if it failed.
    outcome: Option<Outcome>,
}

/// The stages so far.
#[derive(Default)]
pub struct Stages {
    done: Vec<Done>,
}

impl Stages {
    /// Runs one stage; its error names it.
    pub fn run(
        &mut self,
        name: &'static str,
        stage: impl FnOnce() -> Result<Outcome>,
    ) -> Result<()> {
        println!("\n== {name}");
        let begun = Instant::now();
        let result = stage();
        let seconds = begun.elapsed().as_secs_f32();
        let (outcome, result) = match result {
            Ok(outcome) => (Some(outcome), Ok(())),
            Err(error) => (
                None,
                Err(error).with_context(|| format!("stage `{name}` failed")),
            ),
        };
        let done = Done {
            name,
            seconds,
            outcome,
        };
        println!("== {}", done.line(0));
        self.done.push(done);
        result
    }

    /// One line for each stage and one for all.
    pub fn table(&self) -> String {
        let width = self.done.iter().map(|done| done.name.len()).max();
        let width = width.unwrap_or(0).max("all stages".len());
        let mut table = format!("{:width$}  seconds  result\n", "stage");
        let mut seconds = 0.0;
        for done in &self.done {
            seconds += done.seconds;
            table += &done.line(width);
            table.push('\n');
        }
        let failed = self.done.iter().any(|done| done.outcome.is_none());
        let result = if failed { "FAILED" } else { "passed" };
        // Writing to a string cannot fail.
        let _ = write!(table, "{:width$}  {seconds:7.1}  {result}", "all stages");
        table
    }
}

impl Done {
    /// The stage in one line, its name padded to `width`.
    fn line(&self, width: usize) -> String {
        let result = match &self.outcome {
            None => "FAILED",
            Some(Outcome::Passed) => "passed",
            Some(Outcome::Skipped(why)) => &format!("skipped: {why}"),
        };
        format!("{:width$}  {:7.1}  {result}", self.name, self.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_named_and_in_the_table() {
        let mut stages = Stages::default();
        stages.run("format", || Ok(Outcome::Passed)).unwrap();
        stages
            .run("kvm", || Ok(Outcome::Skipped("no device".into())))
            .unwrap();
        let error = stages
            .run("tests", || anyhow::bail!("exit 100"))
            .unwrap_err();
        assert_eq!(format!("{error:#}"), "stage `tests` failed: exit 100");
        let table = stages.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[1].starts_with("format ") && lines[1].ends_with("passed"));
        assert!(lines[2].ends_with("skipped: no device"));
        assert!(lines[3].starts_with("tests ") && lines[3].ends_with("FAILED"));
        assert!(lines[4].starts_with("all stages ") && lines[4].ends_with("FAILED"));
    }
}
