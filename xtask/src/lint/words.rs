//! Text of any kind: marks of unfinished work, and places that exist on one machine or network only.

use super::Finding;

/// Marks of unfinished work, in two halves so that they are not found here.
const MARKS: [(&str, &str); 2] = [("FIX", "ME"), ("X", "XX")];

/// First parts of absolute paths that are somebody's own directories.
const OWN_DIRECTORIES: [&str; 5] = ["work", "root", "home", "Users", "workspace"];

/// Hosts that packages are fetched from, with everything below them; which one serves is the
/// business of the machine's own configuration.
const PACKAGE_HOSTS: [&str; 14] = [
    "crates.io",
    "deb.debian.org",
    "ftp.debian.org",
    "security.debian.org",
    "snapshot.debian.org",
    "archive.ubuntu.com",
    "pypi.org",
    "pythonhosted.org",
    "npmjs.org",
    "proxy.golang.org",
    "docker.io",
    "ghcr.io",
    "quay.io",
    "jfrog.io",
];

/// Words in the name of a host that hands on what others publish.
const RELAYS: [&str; 6] = [
    "mirror",
    "mirrors",
    "proxy",
    "registry",
    "artifactory",
    "nexus",
];

/// Last parts of names that exist on one network only.
const PRIVATE: [&str; 6] = ["corp", "home", "internal", "intranet", "lan", "local"];

/// Checks one file.
pub fn check(file: &str, text: &str) -> Vec<Finding> {
    let lines = text.lines().enumerate();
    lines
        .flat_map(|(index, line)| {
            let found = marks(line).chain(own_paths(line)).chain(hosts(line));
            found.map(move |what| Finding::new(file, index + 1, what))
        })
        .collect()
}

/// Marks that stand as words of their own.
fn marks(line: &str) -> impl Iterator<Item = String> {
    MARKS
        .iter()
        .map(|(head, tail)| format!("{head}{tail}"))
        .filter(|mark| {
            line.split(|c: char| !c.is_alphanumeric())
                .any(|word| word == mark)
        })
        .map(|mark| format!("`{mark}` is left: do it, or say what is so and why"))
}

/// Absolute paths of somebody's own directories.
fn own_paths(line: &str) -> impl Iterator<Item = String> {
    OWN_DIRECTORIES
        .iter()
        .map(|name| format!("/{name}/"))
        .filter(|path| {
            line.match_indices(path.as_str()).any(|(at, _)| {
                // Within another path or an address it is no absolute path.
                let before = line.get(..at).and_then(|text| text.chars().next_back());
                !before.is_some_and(|c| c.is_alphanumeric() || "._-/})~*".contains(c))
            })
        })
        .map(|path| format!("`{path}` is a directory of one machine: use a relative path"))
}

/// Addresses on hosts that a checkout must not depend on.
fn hosts(line: &str) -> impl Iterator<Item = String> {
    line.split("://")
        .skip(1)
        .filter_map(host)
        .filter(|host| !is_public(host))
        .map(|host| {
            format!("`{host}` serves packages or is known to one network only: leave it out")
        })
}

/// The host at the start of an address without its scheme; `None` if a program fills it in.
fn host(address: &str) -> Option<&str> {
    let end = address.find(|c: char| "/?#'\"`)>],;".contains(c) || c.is_whitespace());
    let authority = address.get(..end.unwrap_or(address.len()))?;
    let host = authority.rsplit('@').next()?;
    let host = host.split(':').next()?;
    let written = host
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c));
    (written && !host.is_empty()).then_some(host)
}

/// Whether a host is neither a source of packages nor somebody's own.
fn is_public(host: &str) -> bool {
    let of_packages = PACKAGE_HOSTS.iter().any(|packages| {
        host.strip_suffix(packages)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    });
    let relays = host
        .split(['.', '-', '_'])
        .any(|word| RELAYS.contains(&word));
    let last = host.rsplit('.').next().unwrap_or_default();
    let private = PRIVATE.contains(&last) || last.parse::<u8>().is_ok() || !host.contains('.');
    !(of_packages || relays || private)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str) -> usize {
        check("a.md", text).len()
    }

    #[test]
    fn marks_are_found_as_words() {
        let text = format!("fine\n// {}{}: later\n", "FIX", "ME");
        let found = check("a.rs", &text);
        assert_eq!((found.len(), found[0].line), (1, 2));
        assert_eq!(count(&format!("{}{} here", "X", "XX")), 1);
        assert_eq!(count(&format!("file.{}{}X", "X", "XX")), 0);
    }

    #[test]
    fn absolute_paths_of_one_machine_are_found() {
        let path = |before: &str| format!("{before}/{}/me/x", "home");
        for before in ["", "see ", "\"", "PATH=", "(", "file:"] {
            assert_eq!(count(&path(before)), 1, "{before}");
        }
        for before in ["a", "..", "{dir}", "~"] {
            assert_eq!(count(&path(before)), 0, "{before}");
        }
    }

    #[test]
    fn addresses_of_package_hosts_are_found() {
        let address = |host: &str| format!("url = \"https://{host}/x\"");
        for host in [
            "index.crates.io",
            "deb.debian.org",
            "user:word@deb.debian.org:80",
            "cargo-mirror.company.com",
            "10.0.0.1:8080",
            "build.lan",
            "devbox",
        ] {
            assert_eq!(count(&address(host)), 1, "{host}");
        }
        for host in [
            "docs.rs",
            "www.apache.org",
            "www.debian.org",
            "archive.example",
            "{host}",
            "notcrates.io.example",
        ] {
            assert_eq!(count(&address(host)), 0, "{host}");
        }
    }
}
