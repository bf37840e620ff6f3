//! How far a download is: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::host;

/// Time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The state of one download of several files.
pub struct Progress {
    what: String,
    files: usize,
    total: u64,
    bar: Option<ProgressBar>,
    said: Instant,
}

impl Progress {
    /// Begins with nothing fetched.
    pub fn new(what: &str, files: usize, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total);
            let form = "guest: {msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(form) {
                bar.set_style(style);
            }
            bar
        });
        Self {
            what: what.to_owned(),
            files,
            total,
            bar,
            said: Instant::now(),
        }
    }

    /// `files` are whole, `bytes` are there.
    pub fn at(&mut self, files: usize, bytes: u64) {
        let words = format!("{}: {files}/{} packages", self.what, self.files);
        if let Some(bar) = &self.bar {
            bar.set_message(words);
            bar.set_position(bytes.min(self.total));
        } else if self.said.elapsed() >= LINE_EVERY {
            self.said = Instant::now();
            let (have, all) = (host::megabytes(bytes), host::megabytes(self.total));
            host::say(format!("{words}, {have} of {all}"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
