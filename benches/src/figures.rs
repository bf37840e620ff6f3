//! Times, medians and ratios.

use std::time::Instant;

/// Nanoseconds that the work takes.
pub fn nanos(work: impl FnOnce()) -> u64 {
    let since = Instant::now();
    work();
    u64::try_from(since.elapsed().as_nanos()).unwrap()
}

/// The quantile of samples.
pub fn quantile(samples: &mut [u64], per_mille: usize) -> u64 {
    samples.sort_unstable();
    let at = samples.len().saturating_sub(1) * per_mille / 1000;
    samples.get(at).copied().unwrap_or(0)
}

/// Medians of both in alternating blocks, the first of which warms up.
pub fn alternating(
    blocks: usize,
    mut ours: impl FnMut() -> u64,
    mut floor: impl FnMut() -> u64,
) -> [u64; 2] {
    let mut samples = [Vec::new(), Vec::new()];
    for block in 0..=blocks {
        let pair = [ours(), floor()];
        if block > 0 {
            samples
                .iter_mut()
                .zip(pair)
                .for_each(|(to, it)| to.push(it));
        }
    }
    samples.map(|mut samples| quantile(&mut samples, 500))
}

/// Per mille of two figures.
pub fn ratio(of: u64, to: u64) -> String {
    format!("{} x", thousandths(of * 1000 / to.max(1)))
}

/// Thousandths of a unit.
pub fn thousandths(value: u64) -> String {
    format!("{}.{:03}", value / 1000, value % 1000)
}

/// Whether the command line asks for this: it does if it has no word, or its first is in `what`.
pub fn is_asked_for(what: &str) -> bool {
    let mut words = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'));
    let first = words.next();
    first.is_none_or(|word| what.contains(&word))
}

/// Whether this is a run of `cargo bench`; test runners start benchmarks too, to see that they start.
pub fn is_bench() -> bool {
    std::env::args().any(|word| word == "--bench")
}
