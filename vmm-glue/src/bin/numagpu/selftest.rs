//! `numagpu selftest`.

use std::process::ExitCode;

use numagpu_vmm_glue::selftest::{self, Check, Options, Verdict};

use crate::args::SelftestArgs;
use crate::{Failure, print};

/// Makes all checks, a line for each, and one for all.
pub fn selftest(args: &SelftestArgs) -> Result<ExitCode, Failure> {
    let options = Options {
        kvm: args.kvm.clone(),
        require_kvm: args.require_kvm,
    };
    let (mut ok, mut failed, mut skipped) = (0_u32, 0_u32, 0_u32);
    let mut printed = Ok(());
    selftest::run(&options, &mut |check| {
        let count = match check.verdict {
            Verdict::Ok(_) => &mut ok,
            Verdict::Failed(_) => &mut failed,
            Verdict::Skipped(_) => &mut skipped,
        };
        *count = count.saturating_add(1);
        if printed.is_ok() {
            printed = print(line(&check).as_bytes());
        }
    });
    printed?;
    print(format!("{ok} ok, {failed} failed, {skipped} skipped\n").as_bytes())?;
    Ok(match failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn line(check: &Check) -> String {
    let Check {
        part,
        name,
        verdict,
    } = check;
    match verdict {
        Verdict::Ok(seen) if seen.is_empty() => format!("{part}: {name}: ok\n"),
        Verdict::Ok(seen) => format!("{part}: {name}: ok, {seen}\n"),
        Verdict::Failed(why) => format!("{part}: {name}: FAILED: {why}\n"),
        Verdict::Skipped(why) => format!("{part}: {name}: skipped: {why}\n"),
    }
}
