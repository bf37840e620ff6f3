//! Whether this build works on this host, without QEMU and without Linux: a vfio-user client in this process, and where
//! the host has KVM, a guest of one's own ([`crate::kvm`]).
//!
//! Both do what a driver does: find the GPU, boot it, claim its HBM, copy into it, take the interrupt, give it back. What
//! they did is then looked at from the other side.

mod client;
mod guest;

use std::path::PathBuf;

use numagpu_topology::{MachineError, Plan};

/// What came of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it has to be; what was seen, or nothing.
    Ok(String),
    /// It is not, and why.
    Failed(String),
    /// It was not looked at, and why.
    Skipped(String),
}

/// A check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// Which part it belongs to.
    pub part: &'static str,
    /// What it is about.
    pub name: &'static str,
    /// What came of it.
    pub verdict: Verdict,
}

/// What to test with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The KVM device.
    pub kvm: PathBuf,
    /// Whether it is a failure that there is none.
    pub require_kvm: bool,
}

/// Result of a step, with what went wrong for people.
type Outcome<T> = Result<T, String>;

/// Tells of each check, in order.
struct Journal<'a> {
    part: &'static str,
    tell: &'a mut dyn FnMut(Check),
    /// The check that failed, after which the rest of the part makes no sense.
    broken: Option<&'static str>,
}

impl<'a> Journal<'a> {
    fn new(part: &'static str, tell: &'a mut dyn FnMut(Check)) -> Journal<'a> {
        Journal {
            part,
            tell,
            broken: None,
        }
    }

    /// Makes a check, unless one before it failed. What it gives, if it went well.
    fn check<T>(
        &mut self,
        name: &'static str,
        f: impl FnOnce() -> Outcome<(T, String)>,
    ) -> Option<T> {
        if let Some(broken) = self.broken {
            self.note(name, Verdict::Skipped(format!("`{broken}` failed")));
            return None;
        }
        match f() {
            Ok((value, seen)) => {
                self.note(name, Verdict::Ok(seen));
                Some(value)
            }
            Err(error) => {
                self.broken = Some(name);
                self.note(name, Verdict::Failed(error));
                None
            }
        }
    }

    fn note(&mut self, name: &'static str, verdict: Verdict) {
        (self.tell)(Check {
            part: self.part,
            name,
            verdict,
        });
    }
}

/// The machine that is tested with: one CPU node, one GPU.
const MACHINE: &str = "\
name = \"selftest\"
[[cpu]]
cpus = 1
memory = \"1GiB\"
[[gpu]]
hbm = \"256MiB\"
cpu = 0
";

fn machine() -> Result<Plan, MachineError> {
    numagpu_topology::plan(&numagpu_topology::parse("selftest", MACHINE)?)
}

/// Makes all checks and tells of each when it is done.
pub fn run(options: &Options, tell: &mut dyn FnMut(Check)) {
    let plan = match machine() {
        Ok(plan) => plan,
        Err(error) => {
            let verdict = Verdict::Failed(error.to_string());
            return tell(Check {
                part: "plan",
                name: "machine",
                verdict,
            });
        }
    };
    client::run(&plan, &mut Journal::new("vfio-user", tell));
    guest::run(&plan, options, &mut Journal::new("kvm", tell));
}

/// Bytes that differ everywhere, the same for every run.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let step = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let [.., byte] = state.to_le_bytes();
        byte
    };
    std::iter::repeat_with(step).take(len).collect()
}

/// `value`, or what was there instead of what had to be.
fn expect<T: PartialEq + std::fmt::Debug>(what: &str, value: T, wanted: T) -> Outcome<()> {
    if value == wanted {
        return Ok(());
    }
    Err(format!("{what} is {value:x?} instead of {wanted:x?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_after_a_failure_is_skipped_and_says_after_which() {
        let mut told = Vec::new();
        let mut tell = |check: Check| told.push((check.name, check.verdict));
        let mut journal = Journal::new("part", &mut tell);
        assert_eq!(journal.check("one", || Ok((1, "seen".to_owned()))), Some(1));
        assert_eq!(journal.check::<()>("two", || Err("bad".to_owned())), None);
        assert_eq!(journal.check("three", || Ok((3, String::new()))), None);
        let wanted = [
            ("one", Verdict::Ok("seen".to_owned())),
            ("two", Verdict::Failed("bad".to_owned())),
            ("three", Verdict::Skipped("`two` failed".to_owned())),
        ];
        assert_eq!(told, wanted);
    }
}
