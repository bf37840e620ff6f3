//! Debian's order of package versions (deb-version(7)), and versions inside other text.

use std::cmp::Ordering;

/// Compares two package versions as dpkg does: epoch, upstream version, Debian revision.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (a_epoch, a_upstream, a_revision) = split(a);
    let (b_epoch, b_upstream, b_revision) = split(b);
    a_epoch
        .cmp(&b_epoch)
        .then_with(|| compare_part(a_upstream, b_upstream))
        .then_with(|| compare_part(a_revision, b_revision))
}

/// The highest of some versions.
pub fn newest(versions: impl IntoIterator<Item = String>) -> Option<String> {
    versions.into_iter().max_by(|a, b| compare(a, b))
}

/// Whether `version` is `least` or newer, whatever its epoch.
pub fn at_least(version: &str, least: &str) -> bool {
    compare(without_epoch(version), least) != Ordering::Less
}

/// The version without `EPOCH:`.
fn without_epoch(version: &str) -> &str {
    version.split_once(':').map_or(version, |(_, rest)| rest)
}

/// The series of a kernel or program: its first two numbers, `6.12` of `6.12.107-1`.
pub fn series(version: &str) -> String {
    let mut parts = without_epoch(version).split(|c: char| !c.is_ascii_digit());
    match (parts.next(), parts.next()) {
        (Some(major), Some(minor)) if !minor.is_empty() => format!("{major}.{minor}"),
        (major, _) => major.unwrap_or_default().to_owned(),
    }
}

/// The first dotted number that follows `marker`, as in `QEMU emulator version 11.1.3 (Debian`.
pub fn after<'t>(text: &'t str, marker: &str) -> Option<&'t str> {
    let (_, rest) = text.split_once(marker)?;
    let rest = rest.trim_start();
    let end = rest
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(rest.len());
    rest.get(..end)
        .map(|v| v.trim_end_matches('.'))
        .filter(|v| !v.is_empty())
}

/// Epoch, upstream version and revision; a version without a revision has revision "".
fn split(version: &str) -> (u64, &str, &str) {
    let epoch = version
        .split_once(':')
        .and_then(|(e, _)| e.parse().ok())
        .unwrap_or(0);
    let (upstream, revision) = match without_epoch(version).rsplit_once('-') {
        Some(parts) => parts,
        None => (without_epoch(version), ""),
    };
    (epoch, upstream, revision)
}

/// Alternating runs of non-digits (in dpkg's character order) and digits (as numbers).
fn compare_part(mut a: &str, mut b: &str) -> Ordering {
    while !a.is_empty() || !b.is_empty() {
        let (a_text, a_rest) = a.split_at(run(a, |c| !c.is_ascii_digit()));
        let (b_text, b_rest) = b.split_at(run(b, |c| !c.is_ascii_digit()));
        let (a_digits, a_rest) = a_rest.split_at(run(a_rest, |c| c.is_ascii_digit()));
        let (b_digits, b_rest) = b_rest.split_at(run(b_rest, |c| c.is_ascii_digit()));
        let order = compare_text(a_text, b_text).then_with(|| compare_digits(a_digits, b_digits));
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (a_rest, b_rest);
    }
    Ordering::Equal
}

/// Length of the leading run of characters that satisfy `of`.
fn run(text: &str, of: impl Fn(char) -> bool) -> usize {
    text.find(|c| !of(c)).unwrap_or(text.len())
}

/// `~` sorts before the end of the run, the end before letters, letters before the rest.
fn compare_text(a: &str, b: &str) -> Ordering {
    let rank = |c: Option<char>| match c {
        Some('~') => (0, 0),
        None => (1, 0),
        Some(c) if c.is_ascii_alphabetic() => (2, u32::from(c)),
        Some(c) => (3, u32::from(c)),
    };
    let (mut a, mut b) = (a.chars(), b.chars());
    loop {
        let (x, y) = (a.next(), b.next());
        let order = rank(x).cmp(&rank(y));
        if order != Ordering::Equal || (x.is_none() && y.is_none()) {
            return order;
        }
    }
}

/// As numbers of any length.
fn compare_digits(a: &str, b: &str) -> Ordering {
    let (a, b) = (a.trim_start_matches('0'), b.trim_start_matches('0'));
    a.len().cmp(&b.len()).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_as_dpkg_does() {
        let ascending = [
            "0.9",
            "1.0~rc1",
            "1.0~rc1-1",
            "1.0",
            "1.0-1",
            "1.0-1+b1",
            "1.0a",
            "1.0+x",
            "1.0.1",
            "1.10",
            "6.12.107-1",
            "7.3.4-1~bpo13+1",
            "7.3.4-1",
            "7.10.1-1",
            "2026.05",
            "2026.05+ds-1",
            "2026.08+ds-2",
            "1:0.1",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare("1.01", "1.1"), Ordering::Equal);
        assert_eq!(compare("0:1.1", "1.1"), Ordering::Equal);
    }

    #[test]
    fn the_newest_is_by_number_not_by_letter() {
        let versions = ["7.9.1-1", "7.10.2-1", "6.12.107-1"].map(str::to_owned);
        assert_eq!(newest(versions).as_deref(), Some("7.10.2-1"));
        assert_eq!(newest([]), None);
    }

    #[test]
    fn a_threshold_ignores_the_epoch() {
        assert!(at_least("1:11.1.3+ds-1~bpo13+1", "11.1"));
        assert!(!at_least("1:7.2+dfsg-7+deb12u18", "11.1"));
        assert!(at_least("2026.08+ds-2", "2026.05"));
        assert!(!at_least("2025.02-8", "2026.05"));
    }

    #[test]
    fn series_is_the_first_two_numbers() {
        assert_eq!(series("6.12.107+deb13-amd64"), "6.12");
        assert_eq!(series("7.3.4-1~bpo13+1"), "7.3");
        assert_eq!(series("7.3~rc1-1"), "7.3");
        assert_eq!(series("7"), "7");
    }

    #[test]
    fn a_version_is_found_after_its_marker() {
        let text = "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)";
        assert_eq!(after(text, "version"), Some("11.1.3"));
        assert_eq!(after("nothing", "version"), None);
    }
}
