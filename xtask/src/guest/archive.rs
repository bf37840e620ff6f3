//! Where Debian packages come from: the archive that this machine's own apt uses.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::host;

/// Keyrings that know every suite of the archive, newest naming first.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// A Debian archive and how its signatures are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    /// Address, without the trailing slash.
    pub uri: String,
    /// Keyring file; without one apt uses the machine's trusted keys.
    pub signed_by: Option<String>,
}

/// One stanza of `apt-get indextargets`.
type Target = BTreeMap<String, String>;

/// Finds the archive: the one given, else the machine's.
///
/// `scratch` is for the case that the machine's package lists were never fetched and may not be
/// (no root): apt then fetches them there.
pub fn find(given: Option<&str>, scratch: &Path) -> Result<Archive> {
    let signed_by = keyring();
    if let Some(uri) = given {
        return Ok(Archive {
            uri: uri.trim_end_matches('/').to_owned(),
            signed_by,
        });
    }
    host::need(&["apt-get"])?;
    let system = parse(&host::output(Command::new("apt-get").arg("indextargets"))?);
    if let Some(archive) = choose(&system, signed_by.as_deref()) {
        return Ok(archive);
    }
    let (targets, complaint) = fetched_targets(scratch)?;
    choose(&targets, signed_by.as_deref()).with_context(|| {
        format!(
            "no Debian archive in this machine's apt configuration (on another distribution, give \
             one with --archive URL and install its keys, package debian-archive-keyring){complaint}"
        )
    })
}

/// What the machine's sources offer, its package lists fetched to `dir`; and what went wrong: a
/// source of no concern here may fail without harm.
fn fetched_targets(dir: &Path) -> Result<(Vec<Target>, String)> {
    host::say("apt has no package lists yet: fetching the machine's own into a private place");
    std::fs::create_dir_all(dir.join("lists/partial"))?;
    let conf = dir.join("apt.conf");
    let place = dir.display();
    std::fs::write(
        &conf,
        format!(
            "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\nAPT::Sandbox::User \"root\";\n\
             Dir::State::lists \"{place}/lists\";\nDir::Cache \"{place}\";\n"
        ),
    )?;
    let apt = || {
        let mut command = Command::new("apt-get");
        command.arg("-c").arg(&conf);
        command
    };
    let updated = host::retry("apt-get update", || {
        host::output(apt().args(["-qq", "update"]))
    });
    let complaint = updated
        .err()
        .map(|error| format!("; {error:#}"))
        .unwrap_or_default();
    Ok((parse(&host::output(apt().arg("indextargets"))?), complaint))
}

/// The archive keyring of the machine.
fn keyring() -> Option<String> {
    KEYRINGS
        .iter()
        .find(|path| Path::new(path).exists())
        .map(|path| (*path).to_owned())
}

/// Stanzas of `Key: value` lines, separated by empty lines.
fn parse(text: &str) -> Vec<Target> {
    text.split("\n\n")
        .map(|stanza| {
            let fields = stanza.lines().filter_map(|line| line.split_once(':'));
            fields
                .map(|(key, value)| (key.to_owned(), value.trim().to_owned()))
                .collect()
        })
        .filter(|target: &Target| !target.is_empty())
        .collect()
}

/// The main archive among the targets: Debian's by origin and label (the security archive and
/// backports of third parties have other labels), with the component main.
fn choose(targets: &[Target], keyring: Option<&str>) -> Option<Archive> {
    let has = |target: &Target, key: &str, value: &str| {
        target
            .get(key)
            .is_some_and(|found| found.eq_ignore_ascii_case(value))
    };
    let target = targets.iter().find(|target| {
        has(target, "Origin", "Debian")
            && has(target, "Label", "Debian")
            && has(target, "Component", "main")
            && target.contains_key("Repo-URI")
    })?;
    let named = target
        .get("Signed-By")
        .filter(|name| Path::new(name).is_absolute());
    Some(Archive {
        uri: target.get("Repo-URI")?.trim_end_matches('/').to_owned(),
        signed_by: keyring.or(named.map(String::as_str)).map(str::to_owned),
    })
}

impl Archive {
    /// Lines of a sources list for `suites`.
    pub fn sources(&self, suites: &[&str]) -> Result<String> {
        let options = match &self.signed_by {
            Some(keyring) if keyring.contains(char::is_whitespace) => {
                bail!("the keyring's path has a space, which apt cannot take: {keyring}")
            }
            Some(keyring) => format!("[signed-by={keyring}] "),
            None => String::new(),
        };
        let line = |suite: &&str| format!("deb {options}{} {suite} main\n", self.uri);
        Ok(suites.iter().map(line).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGETS: &str = "\
MetaKey: main/binary-amd64/Packages
Label: Node Source
Origin: . nodistro
Component: main
Repo-URI: https://packages.example/node/

MetaKey: main/binary-amd64/Packages
Label: Debian-Security
Origin: Debian
Component: main
Repo-URI: http://security.example/debian-security/

MetaKey: main/binary-amd64/Packages
Label: Debian
Origin: Debian
Component: main
Repo-URI: http://archive.example/debian/
";

    #[test]
    fn the_main_archive_is_chosen_by_origin_and_label() {
        let archive = choose(&parse(TARGETS), Some("/k.gpg")).unwrap();
        assert_eq!(archive.uri, "http://archive.example/debian");
        assert_eq!(archive.signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn a_machine_without_debian_has_no_archive() {
        let only_others = TARGETS.replace("Origin: Debian", "Origin: Ubuntu");
        assert_eq!(choose(&parse(&only_others), None), None);
        assert_eq!(choose(&parse(""), None), None);
    }

    #[test]
    fn sources_name_each_suite_and_the_keyring() {
        let archive = choose(&parse(TARGETS), Some("/k.gpg")).unwrap();
        assert_eq!(
            archive.sources(&["a", "a-backports"]).unwrap(),
            "deb [signed-by=/k.gpg] http://archive.example/debian a main\n\
             deb [signed-by=/k.gpg] http://archive.example/debian a-backports main\n"
        );
    }
}
