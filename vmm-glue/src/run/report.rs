//! The line from the guest's agent: a JSON text sequence (RFC 7464) over its second serial port.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Sender;

use numagpu_topology::seen::{Message, Pattern, SEPARATOR};

/// Longest message that is read from a guest. A machine of 128 nodes reports in under 200 KiB.
const MAX_MESSAGE: u64 = 4 << 20;
/// Messages that a guest may send before it is no longer listened to.
const MAX_MESSAGES: usize = 10_000;

/// What the listening thread hears.
pub enum Heard {
    /// A message, and where an answer goes.
    Message(Message, Answer),
    /// Something that is no message.
    Nonsense(String),
}

/// Sends an answer to the guest.
pub struct Answer(io::Result<UnixStream>);

impl Answer {
    /// Sends patterns that the guest shall look for.
    pub fn patterns(self, patterns: &[Pattern]) -> io::Result<()> {
        let mut line = serde_json::to_string(patterns)?;
        line.push('\n');
        self.0?.write_all(line.as_bytes())
    }
}

/// Listens for QEMU's connection and passes on what the guest says. Ends when QEMU does, or when nobody wants to hear.
pub fn listen(path: &Path, heard: Sender<Heard>) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    std::thread::Builder::new()
        .name("report".to_owned())
        .spawn(move || {
            let Ok((stream, _)) = listener.accept() else {
                return;
            };
            let mut reader = BufReader::new(&stream);
            for _ in 0..MAX_MESSAGES {
                let mut line = Vec::new();
                match reader
                    .by_ref()
                    .take(MAX_MESSAGE)
                    .read_until(b'\n', &mut line)
                {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
                // Firmware writes its console to every serial port it finds; messages are what
                // follows a separator.
                let Some(start) = line.iter().rposition(|byte| *byte == SEPARATOR) else {
                    continue;
                };
                let text = String::from_utf8_lossy(line.get(start + 1..).unwrap_or_default());
                let message = match serde_json::from_str(text.trim()) {
                    Ok(message) => Heard::Message(message, Answer(stream.try_clone())),
                    Err(error) => {
                        let start: String = text.chars().take(80).collect();
                        Heard::Nonsense(format!("{error} in {start:?}"))
                    }
                };
                if heard.send(message).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}
