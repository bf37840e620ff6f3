//! Requests and replies: one JSON object a line.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::VERSION;
use super::fault::Fault;
use super::status::Status;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What the whole instance is doing.
    Status {},
    /// A fault.
    Inject {
        /// Index of the GPU in its machine.
        gpu: u32,
        /// Which fault.
        fault: Fault,
    },
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Snapshot of the instance.
    Status(Box<Status>),
    /// The fault has happened, or will when its time comes.
    Injected {
        /// Index of the GPU.
        gpu: u32,
        /// Which fault.
        fault: Fault,
    },
    /// Nothing happened.
    Error(Refusal),
}

/// Why nothing happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people, with the numbers.
    pub message: String,
}

/// What kind of reason it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The line is no request.
    Malformed,
    /// The request is of another version.
    Version,
    /// The request names what this instance does not have.
    Invalid,
    /// It could be done, but not now.
    Failed,
    /// Too many clients.
    Busy,
}

impl Reply {
    /// A reply that says why nothing happened.
    pub fn refused(kind: RefusalKind, message: impl Into<String>) -> Reply {
        let message = message.into();
        Reply::Error(Refusal { kind, message })
    }
}

/// A request or a reply as it is sent.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    #[serde(flatten)]
    content: T,
}

/// A request or a reply as a line.
///
/// # Errors
/// None that these types can cause; `serde_json`'s type is passed through.
pub fn line<T: Serialize>(content: T) -> Result<Vec<u8>, serde_json::Error> {
    let version = VERSION;
    let mut line = serde_json::to_vec(&Versioned { version, content })?;
    line.push(b'\n');
    Ok(line)
}

/// The request in a line without its end.
///
/// # Errors
/// The reply that says what is wrong.
pub fn request(line: &[u8]) -> Result<Request, Reply> {
    let malformed = |message: String| Reply::refused(RefusalKind::Malformed, message);
    let value: Value = serde_json::from_slice(line)
        .map_err(|error| malformed(format!("the request is not JSON: {error}")))?;
    let Value::Object(mut object) = value else {
        return Err(malformed("the request is no JSON object".to_owned()));
    };
    match object.remove("version") {
        Some(version) if version.as_u64() == Some(VERSION.into()) => {}
        Some(version) => {
            let message = format!("the request has version {version}; this is version {VERSION}");
            return Err(Reply::refused(RefusalKind::Version, message));
        }
        None => {
            let message = format!("the request has no \"version\"; this is version {VERSION}");
            return Err(malformed(message));
        }
    }
    serde_json::from_value(Value::Object(object))
        .map_err(|error| malformed(format!("the request is not understood: {error}")))
}

/// The reply in a line.
///
/// # Errors
/// What is wrong with it.
pub fn reply(line: &[u8]) -> Result<Reply, String> {
    let reply: Versioned<Reply> =
        serde_json::from_slice(line).map_err(|error| format!("it is not understood: {error}"))?;
    match reply.version {
        VERSION => Ok(reply.content),
        other => Err(format!("it has version {other}; this is version {VERSION}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &[u8]) -> (RefusalKind, String) {
        match request(line) {
            Err(Reply::Error(refusal)) => (refusal.kind, refusal.message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_is_a_line_and_back() {
        let hang = Fault::EngineHang { queue: 1 };
        for (one, text) in [
            (Request::Status {}, r#"{"version":1,"request":"status"}"#),
            (
                Request::Inject {
                    gpu: 0,
                    fault: hang,
                },
                r#"{"version":1,"request":"inject","gpu":0,"fault":{"kind":"engine-hang","queue":1}}"#,
            ),
        ] {
            let mut wanted = text.as_bytes().to_vec();
            assert_eq!(request(&wanted), Ok(one.clone()));
            wanted.push(b'\n');
            assert_eq!(line(&one).unwrap(), wanted);
        }
    }

    #[test]
    fn a_reply_is_a_line_and_back() {
        let fault = Fault::CorrectableError { address: u64::MAX };
        let error = Reply::refused(RefusalKind::Busy, "8 clients\nare served");
        for one in [Reply::Injected { gpu: 3, fault }, error] {
            let line = line(&one).unwrap();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(reply(&line), Ok(one));
        }
        let newer = br#"{"version":2,"injected":{"gpu":0,"fault":{"kind":"removal"}}}"#;
        let error = reply(newer).unwrap_err();
        assert_eq!(error, "it has version 2; this is version 1");
        assert!(reply(b"").is_err() && reply(b"{}").is_err());
    }

    #[test]
    fn what_is_no_request_is_told_where_it_goes_wrong() {
        use RefusalKind::{Malformed, Version};
        for (line, kind, message) in [
            (&b""[..], Malformed, "the request is not JSON: EOF while parsing a value at line 1 column 0"),
            (b"\xff\xfe", Malformed, "the request is not JSON: expected value at line 1 column 1"),
            (b"\"\xff\"", Malformed, "the request is not JSON: invalid unicode code point at line 1 column 2"),
            (b"{\"version\":1", Malformed, "the request is not JSON: EOF while parsing an object at line 1 column 12"),
            (b"{} {}", Malformed, "the request is not JSON: trailing characters at line 1 column 4"),
            (b"[1]", Malformed, "the request is no JSON object"),
            (b"{\"request\":\"status\"}", Malformed, "the request has no \"version\"; this is version 1"),
            (b"{\"version\":7}", Version, "the request has version 7; this is version 1"),
            (b"{\"version\":\"1\"}", Version, "the request has version \"1\"; this is version 1"),
            (b"{\"version\":1}", Malformed, "the request is not understood: missing field `request`"),
            (
                b"{\"version\":1,\"request\":\"stop\"}",
                Malformed,
                "the request is not understood: unknown variant `stop`, expected `status` or `inject`",
            ),
            (
                b"{\"version\":1,\"request\":\"status\",\"gpu\":1}",
                Malformed,
                "the request is not understood: unknown field `gpu`, there are no fields",
            ),
            (
                b"{\"version\":1,\"request\":\"inject\",\"gpu\":4294967296,\"fault\":{\"kind\":\"removal\"}}",
                Malformed,
                "the request is not understood: invalid value: integer `4294967296`, expected u32",
            ),
        ] {
            let text = String::from_utf8_lossy(line);
            assert_eq!(refused(line), (kind, message.to_owned()), "{text}");
        }
        // serde_json's depth has an end.
        let deep = vec![b'['; 4000];
        assert!(refused(&deep).1.contains("recursion limit exceeded"));
    }
}
