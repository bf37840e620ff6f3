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
            if let Ok((stream, _)) = listener.accept() {
                hear(&stream, &heard);
            }
        })?;
    Ok(())
}

/// Passes on what comes, until the stream ends, nobody wants to hear, or too much came.
fn hear(stream: &UnixStream, heard: &Sender<Heard>) {
    let mut reader = BufReader::new(stream);
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
        let Some(message) = message(&line) else {
            continue;
        };
        let message = match message {
            Ok(message) => Heard::Message(message, Answer(stream.try_clone())),
            Err(what) => Heard::Nonsense(what),
        };
        if heard.send(message).is_err() {
            return;
        }
    }
}

/// The message in a line, or why it is none. Firmware writes its console to every serial port it finds, so what has
/// no separator is nothing, and a message is what follows the last one.
fn message(line: &[u8]) -> Option<Result<Message, String>> {
    let start = line.iter().rposition(|byte| *byte == SEPARATOR)?;
    let text = String::from_utf8_lossy(line.get(start + 1..).unwrap_or_default());
    Some(serde_json::from_str(text.trim()).map_err(|error| {
        let start: String = text.chars().take(80).collect();
        format!("{error} in {start:?}")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use numagpu_topology::seen::Report;
    use std::sync::mpsc::{Receiver, channel};

    fn progress(text: &str) -> Vec<u8> {
        let message = Message::Progress {
            text: text.to_owned(),
        };
        let mut line = vec![SEPARATOR];
        line.extend(serde_json::to_vec(&message).unwrap());
        line.push(b'\n');
        line
    }

    /// What is heard of a guest that says this and is gone.
    fn hear_all(said: Vec<u8>) -> Vec<String> {
        let (guest, host) = UnixStream::pair().unwrap();
        let (sender, heard) = channel();
        let guest = std::thread::spawn(move || (&guest).write_all(&said));
        hear(&host, &sender);
        // A guest that still talks is cut off.
        drop((host, sender));
        let _ = guest.join().unwrap();
        words(&heard)
    }

    fn words(heard: &Receiver<Heard>) -> Vec<String> {
        let word = |heard| match heard {
            Heard::Message(Message::Progress { text }, _) => text,
            Heard::Message(other, _) => format!("{other:?}"),
            Heard::Nonsense(what) => format!("nonsense: {what}"),
        };
        heard.try_iter().map(word).collect()
    }

    #[test]
    fn garbage_before_the_separator_is_skipped() {
        let mut said = b"\x1b[2J\x1b[001;001HBdsDxe: starting\r\n\xff\xfe\0".to_vec();
        said.extend(progress("one"));
        said.extend(b"\n\n{\"message\":\"progress\",\"text\":\"no separator\"}\n");
        said.extend(b"\x1e half a mess\x1b[2J");
        said.extend(progress("two"));
        assert_eq!(hear_all(said), ["one", "two"]);
    }

    #[test]
    fn a_line_longer_than_any_report_is_nonsense_and_the_next_is_heard() {
        let mut said = vec![SEPARATOR];
        said.resize(usize::try_from(MAX_MESSAGE).unwrap() + 1000, b'x');
        said.push(b'\n');
        said.extend(progress("after"));
        let heard = hear_all(said);
        assert_eq!(heard.len(), 2);
        assert!(
            heard[0].starts_with("nonsense: expected value"),
            "{heard:?}"
        );
        assert!(heard[0].len() < 200, "{heard:?}");
        assert_eq!(heard[1], "after");
    }

    #[test]
    fn firmware_that_never_ends_a_line_costs_bounded_memory() {
        let mut said = vec![b'x'; 3 * usize::try_from(MAX_MESSAGE).unwrap()];
        said.extend(progress("after"));
        assert_eq!(hear_all(said), ["after"]);
    }

    #[test]
    fn nonsense_is_named() {
        for (said, what) in [
            (&b"\x1e\n"[..], "EOF while parsing"),
            (b"\x1e\xff\xff\n", "expected value"),
            (b"\x1e{\"message\":\"dance\"}\n", "unknown variant `dance`"),
            (b"\x1e{\"message\":\"progress\"}\n", "missing field `text`"),
            (
                b"\x1e{\"message\":\"report\",\"cpus\":1}\n",
                "unknown field `cpus`",
            ),
            (
                b"\x1e{\"message\":\"held\",\"patterns\":[{}]}\n",
                "missing field `gpu`",
            ),
            (
                b"\x1e{\"message\":\"progress\",\"text\":\"cut",
                "EOF while parsing",
            ),
        ] {
            let heard = hear_all(said.to_vec());
            assert!(
                heard.len() == 1 && heard[0].starts_with("nonsense") && heard[0].contains(what),
                "{heard:?} for {what}"
            );
        }
        let deep = [&b"\x1e"[..], &[b'['; 100_000], b"\n"].concat();
        let heard = hear_all(deep);
        assert!(heard[0].contains("nonsense"), "{heard:?}");
    }

    #[test]
    fn a_guest_that_talks_without_end_is_no_longer_heard() {
        let said = progress("again").repeat(MAX_MESSAGES + 50);
        assert_eq!(hear_all(said).len(), MAX_MESSAGES);
    }

    #[test]
    fn a_report_comes_through_and_an_answer_goes_back() {
        let (guest, host) = UnixStream::pair().unwrap();
        let (sender, heard) = channel();
        let report = Message::Report(Box::new(Report {
            kernel: "6.12".to_owned(),
            ..Report::default()
        }));
        let mut line = vec![SEPARATOR];
        line.extend(serde_json::to_vec(&report).unwrap());
        line.push(b'\n');
        (&guest).write_all(&line).unwrap();
        guest.shutdown(std::net::Shutdown::Write).unwrap();
        hear(&host, &sender);
        let Heard::Message(Message::Report(seen), answer) = heard.recv().unwrap() else {
            panic!("no report");
        };
        assert_eq!(seen.kernel, "6.12");
        let pattern = Pattern {
            gpu: 1,
            partition: 0,
            offset: 2,
            len: 8,
            seed: u64::MAX,
        };
        answer.patterns(std::slice::from_ref(&pattern)).unwrap();
        let mut line = String::new();
        BufReader::new(&guest).read_line(&mut line).unwrap();
        let back: Vec<Pattern> = serde_json::from_str(&line).unwrap();
        assert_eq!(back, [pattern]);
    }
}
