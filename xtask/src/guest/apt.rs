//! Debian packages of any suite, resolved and fetched by the machine's apt in a private root.
//!
//! Nothing of the system is read but apt's own configuration (proxies and the like) and keyrings,
//! nothing of it is written, and no root is needed: the private root says that no package is
//! installed, so apt resolves the whole closure.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::archive::Archive;
use super::host;
use super::progress::Progress;

/// apt's program for fetching single files; it is not in `PATH`.
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// A package of one version.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version, with epoch.
    pub version: String,
}

/// A package file to fetch, as apt's `--print-uris` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deb {
    /// What it holds.
    pub package: Package,
    uri: String,
    file: String,
    size: u64,
    hash: String,
}

/// A private apt root for some suites.
pub struct Apt {
    conf: PathBuf,
    dir: PathBuf,
    debs: PathBuf,
    lock: File,
}

impl Apt {
    /// A root in `dir` for `suites` of `archive`, its package lists fetched; files go to `debs`,
    /// which whoever holds `lock` may write to.
    pub fn open(
        archive: &Archive,
        suites: &[&str],
        dir: &Path,
        debs: &Path,
        lock: File,
    ) -> Result<Self> {
        host::need(&["apt-get", "apt-cache", "dpkg-deb"])?;
        let dir = std::path::absolute(dir)?;
        std::fs::create_dir_all(dir.join("lists/partial"))?;
        std::fs::create_dir_all(dir.join("archives/partial"))?;
        std::fs::create_dir_all(debs)?;
        std::fs::write(dir.join("status"), "")?;
        std::fs::write(dir.join("sources.list"), archive.sources(suites)?)?;
        let conf = dir.join("apt.conf");
        std::fs::write(&conf, configuration(&dir.display().to_string()))?;
        let apt = Self {
            conf,
            dir,
            debs: debs.to_owned(),
            lock,
        };
        apt.update(&suites.join(", "))?;
        Ok(apt)
    }

    /// Fetches the package lists.
    fn update(&self, suites: &str) -> Result<()> {
        host::say(format!("fetching the package lists of {suites}"));
        let update = |options: &[&str]| {
            host::output(
                self.command("apt-get")
                    .args(["-qq", "update"])
                    .args(options),
            )
        };
        let result = host::retry("apt-get update", || match update(&[]) {
            Err(error) if is_expired(&format!("{error:#}")) => {
                host::say(format!(
                    "the archive's Release file is past its date ({error:#}); it is taken all the \
                     same, its signature is still checked"
                ));
                update(&["-oAcquire::Check-Valid-Until=false"])
            }
            other => other,
        });
        result
            .map(drop)
            .with_context(|| format!("no package lists of {suites}"))
    }

    /// A command of apt's in this root.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.conf);
        command
    }

    /// What `packages` need to run, themselves included, preferring `suite` where it has newer.
    pub fn closure(&self, packages: &[&str], suite: &str) -> Result<Vec<Deb>> {
        let mut command = self.command("apt-get");
        command
            .args(["-qq", "--print-uris", "-t", suite, "install"])
            .args(packages);
        parse_uris(&host::output(&mut command)?)
    }

    /// These packages alone.
    pub fn exactly(&self, packages: &[Package]) -> Result<Vec<Deb>> {
        let names = packages.iter().map(|p| format!("{}={}", p.name, p.version));
        let mut command = self.command("apt-get");
        // The working directory is where apt would put them: it wants to see it.
        command
            .current_dir(&self.dir)
            .args(["-qq", "--print-uris", "download"])
            .args(names);
        parse_uris(&host::output(&mut command)?)
    }

    /// Versions of a package that the suites have.
    pub fn versions(&self, package: &str) -> Result<Vec<String>> {
        let text = self.show(&[package.to_owned()])?;
        Ok(fields(&text, "Version").map(str::to_owned).collect())
    }

    /// The package and what it depends on in exactly its own version, to any depth.
    pub fn same_source(&self, package: Package) -> Result<Vec<Package>> {
        let mut found = BTreeSet::new();
        let mut fresh = vec![package];
        while !fresh.is_empty() {
            let names: Vec<String> = fresh
                .iter()
                .map(|p| format!("{}={}", p.name, p.version))
                .collect();
            found.extend(fresh);
            let text = self.show(&names)?;
            let next: BTreeSet<Package> = fields(&text, "Depends").flat_map(exact).collect();
            fresh = next.difference(&found).cloned().collect();
        }
        Ok(found.into_iter().collect())
    }

    /// The packages' descriptions.
    fn show(&self, names: &[String]) -> Result<String> {
        host::output(self.command("apt-cache").arg("show").args(names))
    }

    /// Fetches the files that are not there yet and returns where each is; continues what an
    /// interrupted run left.
    pub fn fetch(&self, what: &str, debs: &[Deb]) -> Result<Vec<PathBuf>> {
        let path = |deb: &Deb| self.debs.join(&deb.file);
        let missing: Vec<&Deb> = debs.iter().filter(|deb| !path(deb).exists()).collect();
        let total = missing.iter().map(|deb| deb.size).sum();
        if !missing.is_empty() {
            let words = format!("{what}: fetching {} packages", missing.len());
            host::say(format!("{words}, {}", host::megabytes(total)));
            host::retry(&words, || self.fetch_once(what, &missing, total))?;
            for deb in missing {
                std::fs::rename(host::part_name(&path(deb)), path(deb))?;
            }
        }
        Ok(debs.iter().map(path).collect())
    }

    /// One run of apt's fetcher over all files. It checks each file's hash (those came with the
    /// signed lists), goes on where a partial file ends and takes a complete one as it is.
    fn fetch_once(&self, what: &str, debs: &[&Deb], total: u64) -> Result<()> {
        let mut command = self.command(HELPER);
        command.arg("download-file");
        let parts: Vec<PathBuf> = debs
            .iter()
            .map(|deb| host::part_name(&self.debs.join(&deb.file)))
            .collect();
        for (deb, part) in debs.iter().zip(&parts) {
            command.arg(&deb.uri).arg(part).arg(&deb.hash);
        }
        let log = self.dir.join("fetch.log");
        let mut child = command
            .env("LC_ALL", "C.UTF-8")
            // It reads nothing; but if this process is killed, the fetcher lives on and writes, and
            // with the open file it keeps the lock until it ends.
            .stdin(self.lock.try_clone()?)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("{HELPER} cannot be started"))?;
        let mut progress = Progress::new(what, debs.len(), total);
        loop {
            let status = child.try_wait()?;
            let sizes = parts
                .iter()
                .map(|part| std::fs::metadata(part).map_or(0, |m| m.len()));
            let sizes: Vec<u64> = sizes.collect();
            let whole = sizes
                .iter()
                .zip(debs)
                .filter(|(size, deb)| **size >= deb.size)
                .count();
            progress.at(whole, sizes.iter().sum());
            match status {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    bail!("apt: {status}: {}", host::last_lines(&std::fs::read(&log)?))
                }
                None => std::thread::sleep(std::time::Duration::from_millis(100)),
            }
        }
    }
}

/// apt's configuration for a private root in `dir`: where everything is, and no hooks of the
/// machine's (they serve its own package cache). Read after the machine's own, so it wins.
fn configuration(dir: &str) -> String {
    format!(
        r#"#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Architectures;
#clear Dir::Cache::pkgcache;
#clear Dir::Cache::srcpkgcache;
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::GzipIndexes "true";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Dir::State "{dir}";
Dir::State::status "{dir}/status";
Dir::State::lists "{dir}/lists";
Dir::Cache "{dir}";
Dir::Cache::archives "{dir}/archives";
Dir::Etc::sourcelist "{dir}/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
"#
    )
}

/// Whether apt refuses a Release file only for its age.
fn is_expired(complaint: &str) -> bool {
    complaint.contains("is expired") || complaint.contains("is not valid anymore")
}

/// Values of a field in apt's descriptions.
fn fields<'t>(text: &'t str, name: &str) -> impl Iterator<Item = &'t str> {
    let prefix = format!("{name}: ");
    text.lines()
        .filter_map(move |line| line.strip_prefix(&prefix))
}

/// Dependencies on one exact version, `name (= version)`.
fn exact(depends: &str) -> Vec<Package> {
    let one = |entry: &str| {
        let (name, rest) = entry.trim().split_once(" (= ")?;
        let version = rest.strip_suffix(')')?;
        Some(Package {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    };
    depends
        .split(',')
        .filter(|entry| !entry.contains('|'))
        .filter_map(one)
        .collect()
}

/// Lines of `--print-uris`: `'URI' FILE SIZE HASH`.
fn parse_uris(text: &str) -> Result<Vec<Deb>> {
    let debs: Vec<Deb> = text
        .lines()
        .filter(|line| line.starts_with('\''))
        .map(|line| parse_uri(line).with_context(|| format!("apt names a file oddly: {line}")))
        .collect::<Result<_>>()?;
    if debs.is_empty() {
        bail!("apt names no file to fetch");
    }
    Ok(debs)
}

/// One line of `--print-uris`.
fn parse_uri(line: &str) -> Option<Deb> {
    let (uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let mut words = rest.split_whitespace();
    let (file, size, hash) = (words.next()?, words.next()?, words.next()?);
    let mut parts = file.strip_suffix(".deb")?.split('_');
    let (name, version) = (parts.next()?, parts.next()?);
    Some(Deb {
        package: Package {
            name: name.to_owned(),
            version: version.replace("%3a", ":"),
        },
        uri: uri.to_owned(),
        file: file.to_owned(),
        size: size.parse().ok()?,
        hash: hash.to_owned(),
    })
}

/// Unpacks a package below `tree`.
pub fn unpack(deb: &Path, tree: &Path) -> Result<()> {
    let done = host::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(tree));
    if done.is_err() {
        // A file cut short by a full disk passes no second look: fetch it again next time.
        std::fs::remove_file(deb).ok();
    }
    done.map(drop)
        .with_context(|| format!("cannot unpack {}", deb.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_line_names_package_and_version() {
        let debs = parse_uris(
            "'http://a.example/l/libc6_2.41-12%2bdeb13u4_amd64.deb' \
             libc6_2.41-12+deb13u4_amd64.deb 2846580 SHA256:967a\n\
             'http://a.example/q_11.deb' qemu_1%3a11.1.3+ds-1~bpo13+1_amd64.deb 10 SHA256:00\n",
        )
        .unwrap();
        assert_eq!(debs[0].package.version, "2.41-12+deb13u4");
        assert_eq!(debs[0].size, 2_846_580);
        assert_eq!(debs[1].package.name, "qemu");
        assert_eq!(debs[1].package.version, "1:11.1.3+ds-1~bpo13+1");
    }

    #[test]
    fn no_or_odd_lines_are_refused() {
        assert!(parse_uris("").is_err());
        assert!(parse_uris("'http://a.example/x' x 1 SHA256:0").is_err());
    }

    #[test]
    fn only_exact_dependencies_count() {
        let depends = "dracut | initramfs-tools (>= 0.120), linux-base-7.3 (= 7.3-1), kmod, \
                       linux-base (>= 4)";
        let found = exact(depends);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "linux-base-7.3");
        assert_eq!(found[0].version, "7.3-1");
    }

    #[test]
    fn versions_come_from_their_field() {
        let text = "Package: a\nVersion: 1\n\nPackage: a\nVersion: 2\nDescription: Version: 3\n";
        assert_eq!(fields(text, "Version").collect::<Vec<_>>(), ["1", "2"]);
    }
}
