//! QEMU's monitor protocol (QEMU `docs/interop/qmp-spec.rst`): as much as starting and stopping a guest needs.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use thiserror::Error;

/// Why QEMU did not do what it was asked.
#[derive(Debug, Error)]
pub enum QmpError {
    /// The connection broke or said nothing in time.
    #[error("QMP: {doing}: {source}")]
    Host {
        /// What was being done.
        doing: String,
        /// The host's error.
        source: io::Error,
    },
    /// QEMU refused a command.
    #[error("QMP: QEMU refuses {command}: {message}")]
    Refused {
        /// Command.
        command: String,
        /// What QEMU said.
        message: String,
    },
}

/// A connection to a QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

/// Longest line that is read; QEMU's answers to our commands are a few KiB.
const MAX_LINE: u64 = 1 << 20;

impl Qmp {
    /// Connects as soon as QEMU listens, which it has to do before `deadline`. `alive` says whether it still runs.
    ///
    /// # Errors
    /// [`QmpError::Host`].
    pub fn connect(
        path: &Path,
        deadline: Instant,
        mut alive: impl FnMut() -> bool,
    ) -> Result<Qmp, QmpError> {
        let failed = |source| QmpError::Host {
            doing: "connect".to_owned(),
            source,
        };
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline || !alive() => return Err(failed(error)),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .map_err(failed)?;
        let mut qmp = Qmp {
            reader: BufReader::new(stream),
        };
        qmp.line("greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self, doing: &str) -> Result<Value, QmpError> {
        let failed = |source| QmpError::Host {
            doing: doing.to_owned(),
            source,
        };
        let mut line = String::new();
        let read = io::Read::take(&mut self.reader, MAX_LINE)
            .read_line(&mut line)
            .map_err(failed)?;
        if read == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_str(&line).map_err(|error| failed(error.into()))
    }

    /// Runs a command and gives what it returns. Events that come before the answer are dropped.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let request = format!(
            "{}\n",
            json!({ "execute": command, "arguments": arguments })
        );
        self.reader
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(|source| QmpError::Host {
                doing: command.to_owned(),
                source,
            })?;
        loop {
            let mut answer = self.line(command)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let message = error
                    .get("desc")
                    .and_then(Value::as_str)
                    .unwrap_or("no reason given");
                return Err(QmpError::Refused {
                    command: command.to_owned(),
                    message: message.to_owned(),
                });
            }
        }
    }

    /// The objects of the command line, in the order in which QEMU walks them.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn objects(&mut self) -> Result<Vec<String>, QmpError> {
        let list = self.execute("qom-list", json!({ "path": "/objects" }))?;
        let name = |item: &Value| item.get("name").and_then(Value::as_str).map(str::to_owned);
        // `qom-list` puts each property it meets before those it has met (QEMU `qom/qom-qmp-cmds.c`).
        Ok(list
            .as_array()
            .into_iter()
            .flatten()
            .rev()
            .filter_map(name)
            .collect())
    }
}
