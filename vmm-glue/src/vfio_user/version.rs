//! Negotiation of version and capabilities (specification, `VFIO_USER_VERSION`).

use std::fmt::Write as _;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Number;

use super::refusal::Refusal;
use super::{Limits, MAX_FDS, PAGE_SIZES};

/// Major version spoken.
pub const MAJOR: u16 = 0;

/// Highest minor version spoken.
pub const MINOR: u16 = 0;

/// `max_data_xfer_size` and `max_msg_fds` of a client that does not name them.
const DEFAULT_TRANSFER: u64 = 1 << 20;
const DEFAULT_FDS: usize = 1;

/// Most characters that are said of what is wrong with a client's version data, which may be long.
const MAX_WHY: usize = 200;

/// What the answer to `twin_socket` has more than the question: the index of its descriptor, which is the only one.
const FD_INDEX: &str = ",\"fd_index\":0";

/// The version data of a client. Keys that are not listed are ignored.
#[derive(Default, Deserialize)]
struct Proposal {
    #[serde(default, deserialize_with = "object")]
    capabilities: Capabilities,
}

/// The capabilities that are looked at.
#[derive(Default, Deserialize)]
struct Capabilities {
    #[serde(default, deserialize_with = "number")]
    max_msg_fds: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    max_data_xfer_size: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    pgsizes: Option<u64>,
    #[serde(default, deserialize_with = "number")]
    max_dma_maps: Option<u64>,
    #[serde(default)]
    write_multiple: bool,
    #[serde(default, deserialize_with = "object")]
    twin_socket: TwinSocket,
    /// Of older revisions; not answered.
    #[serde(default, deserialize_with = "object", rename = "migration")]
    _migration: Migration,
}

#[derive(Default, Deserialize)]
struct TwinSocket {
    #[serde(default)]
    supported: bool,
}

#[derive(Default, Deserialize)]
struct Migration {
    #[serde(default, deserialize_with = "page_size", rename = "pgsize")]
    _pgsize: Option<u64>,
}

/// An object, where serde would take an array too.
fn object<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    struct Object<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = T;

        fn expecting(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            to.write_str("an object")
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }
    from.deserialize_map(Object(PhantomData))
}

/// A whole number from 0. One that is larger than 64 bits hold is more than is ever used.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let number = Number::deserialize(from)?;
    let whole = || {
        let value = number.as_f64().filter(|it| *it >= 0.0 && it.fract() == 0.0);
        value.map(|it| format!("{it:.0}").parse().unwrap_or(u64::MAX))
    };
    let value = number.as_u64().or_else(whole);
    let refused = || D::Error::custom(format_args!("{number} where a count should be"));
    value.ok_or_else(refused).map(Some)
}

fn page_size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let size = number(from)?;
    match size.is_none_or(u64::is_power_of_two) {
        true => Ok(size),
        false => Err(D::Error::custom("a page size that is no power of two")),
    }
}

/// What was agreed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// Minor version.
    pub minor: u16,
    /// Version data of the reply with its terminating NUL.
    pub data: String,
    /// Most bytes of a `DMA_READ` or `DMA_WRITE` that the client takes.
    pub max_transfer: u64,
    /// Most file descriptors that the client takes with one message.
    pub max_fds: usize,
}

/// Agrees to a proposal.
///
/// The reply names only capabilities that the client named, and its data is never longer than the client's,
/// which QEMU has no room for; what does not fit is left out, most important first in. Only where the client asks for a
/// second socket is it longer by that one's index: QEMU does not ask.
///
/// `open_twin` is called if the client asks for a second socket and takes descriptors. It says whether there is one, which is
/// then the first descriptor of the reply.
///
/// # Errors
/// [`Refusal::Version`] if the major version differs, [`Refusal::VersionData`] if `data` is neither empty nor
/// NUL-terminated JSON in which every capability has its type. `open_twin` was not called then.
pub fn negotiate(
    major: u16,
    minor: u16,
    data: &[u8],
    limits: &Limits,
    open_twin: impl FnOnce() -> bool,
) -> Result<Agreement, Refusal> {
    if major != MAJOR {
        return Err(Refusal::Version { major, minor });
    }
    let theirs = parse(data)?.capabilities;
    let max_fds = theirs.max_msg_fds.map_or(DEFAULT_FDS, |fds| {
        usize::try_from(fds).unwrap_or(usize::MAX)
    });
    let twin = theirs.twin_socket.supported && max_fds > 0 && open_twin();
    // The lower of the two minor versions, and ours is the lowest there is.
    const { assert!(MINOR == 0) };
    Ok(Agreement {
        minor: MINOR,
        data: answer(&theirs, twin, data.len(), limits),
        // What a client that names no number takes is the specification's.
        max_transfer: theirs.max_data_xfer_size.unwrap_or(DEFAULT_TRANSFER),
        max_fds,
    })
}

fn parse(data: &[u8]) -> Result<Proposal, Refusal> {
    let wrong = |why: &dyn std::fmt::Display| Refusal::VersionData {
        len: data.len(),
        why: why.to_string().chars().take(MAX_WHY).collect(),
    };
    let Some((terminator, json)) = data.split_last() else {
        return Ok(Proposal::default());
    };
    if *terminator != 0 {
        return Err(wrong(&"no terminating NUL"));
    }
    if json.is_empty() {
        return Ok(Proposal::default());
    }
    let text = std::str::from_utf8(json).map_err(|error| wrong(&error))?;
    let mut from = serde_json::Deserializer::from_str(text);
    let proposal = object(&mut from).and_then(|it| from.end().map(|()| it));
    proposal.map_err(|error| wrong(&error))
}

fn answer(theirs: &Capabilities, twin: bool, room: usize, limits: &Limits) -> String {
    const OPEN: &str = "{\"capabilities\":{";
    const CLOSE: &str = "}}\0";
    // So the second socket is always in: the client has named it in no less room, and a descriptor goes with it.
    let room = room + if twin { FD_INDEX.len() } else { 0 };
    let mut capabilities = String::new();
    let offers = [
        (theirs.max_msg_fds.is_some(), "max_msg_fds", MAX_FDS as u64),
        (
            theirs.max_data_xfer_size.is_some(),
            "max_data_xfer_size",
            limits.max_transfer as u64,
        ),
        (theirs.pgsizes.is_some(), "pgsizes", PAGE_SIZES),
        (
            theirs.max_dma_maps.is_some(),
            "max_dma_maps",
            limits.max_dma_maps as u64,
        ),
    ];
    let mut offer = |text: String| {
        let comma = usize::from(!capabilities.is_empty());
        let len = OPEN.len() + capabilities.len() + comma + text.len() + CLOSE.len();
        if len <= room {
            // Writing to a string cannot fail.
            let _ = write!(capabilities, "{}{text}", if comma == 1 { "," } else { "" });
        }
    };
    if twin {
        offer(format!("\"twin_socket\":{{\"supported\":true{FD_INDEX}}}"));
    }
    if theirs.write_multiple {
        offer("\"write_multiple\":true".to_owned());
    }
    for (_, key, value) in offers.iter().filter(|(named, _, _)| *named) {
        offer(format!("\"{key}\":{value}"));
    }
    if !capabilities.is_empty() {
        format!("{OPEN}{capabilities}{CLOSE}")
    } else if room >= 3 {
        "{}\0".to_owned()
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn negotiate(major: u16, minor: u16, data: &[u8]) -> Result<Agreement, Refusal> {
        super::negotiate(major, minor, data, &Limits::default(), || {
            panic!("asked for a second socket")
        })
    }

    /// The capabilities of the answer, and whether a second socket was made.
    fn with_twin(capabilities: &str, can: bool) -> (Value, bool) {
        let data = format!("{{\"capabilities\":{{{capabilities}}}}}\0");
        let mut made = false;
        let open = || {
            made = true;
            can
        };
        let limits = Limits::default();
        let agreed = super::negotiate(0, 0, data.as_bytes(), &limits, open).unwrap();
        let room = data.len() + if made { FD_INDEX.len() } else { 0 };
        assert!(agreed.data.len() <= room, "{data} -> {}", agreed.data);
        let json: Value = serde_json::from_str(agreed.data.trim_end_matches('\0')).unwrap();
        (json["capabilities"].clone(), made)
    }

    const QEMU: &str = concat!(
        r#"{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"#,
        r#""max_data_xfer_size":1048576,"migration":{"pgsize":4096},"write_multiple":true}}"#,
        "\0"
    );

    #[test]
    fn everything_named_is_answered_in_no_more_room() {
        let Agreement {
            minor, data: reply, ..
        } = negotiate(0, 3, QEMU.as_bytes()).unwrap();
        assert_eq!(minor, 0);
        assert!(reply.len() <= QEMU.len());
        let json: serde_json::Value = serde_json::from_str(reply.trim_end_matches('\0')).unwrap();
        let caps = &json["capabilities"];
        assert_eq!(caps["max_msg_fds"], 16);
        assert_eq!(caps["max_data_xfer_size"], 1 << 20);
        assert_eq!(caps["pgsizes"], 4096);
        assert_eq!(caps["max_dma_maps"], 65_535);
        assert_eq!(caps["write_multiple"], true);
        assert!(caps.get("migration").is_none());
    }

    #[test]
    fn the_reply_never_outgrows_the_request() {
        let all = [
            "max_msg_fds",
            "max_data_xfer_size",
            "pgsizes",
            "max_dma_maps",
        ];
        for n in 0..16_u32 {
            let named: Vec<_> = (0..4).filter(|bit| n & (1 << bit) != 0).collect();
            let body: Vec<_> = named.iter().map(|i| format!("\"{}\":1", all[*i])).collect();
            let data = format!("{{\"capabilities\":{{{}}}}}\0", body.join(","));
            let reply = negotiate(0, 0, data.as_bytes()).unwrap().data;
            assert!(reply.len() <= data.len(), "{data} -> {reply}");
            assert!(reply.ends_with('\0'));
            let json = reply.trim_end_matches('\0');
            serde_json::from_str::<serde_json::Value>(json).unwrap();
        }
    }

    #[test]
    fn empty_proposals_are_fine() {
        assert_eq!(negotiate(0, 0, b"").unwrap().data, "");
        assert_eq!(negotiate(0, 0, b"\0").unwrap().data, "");
        assert_eq!(negotiate(0, 0, b"{}\0").unwrap().data, "{}\0");
    }

    #[test]
    fn limits_are_the_clients_or_the_specifications() {
        let limits = |data: &str| {
            let agreed = negotiate(0, 0, format!("{data}\0").as_bytes()).unwrap();
            (agreed.max_transfer, agreed.max_fds)
        };
        assert_eq!(limits("{}"), (1 << 20, 1));
        let named = r#"{"capabilities":{"max_data_xfer_size":4096,"max_msg_fds":8}}"#;
        assert_eq!(limits(named), (4096, 8));
        // Larger than any number that is used, and another way to write one.
        let large =
            r#"{"capabilities":{"max_data_xfer_size":18446744073709551616,"max_msg_fds":8.0}}"#;
        assert_eq!(limits(large), (u64::MAX, 8));
    }

    #[test]
    fn a_second_socket_is_named_with_its_descriptor_to_those_who_ask() {
        let asks = r#""twin_socket":{"supported":true}"#;
        let named = serde_json::json!({"supported": true, "fd_index": 0});
        for others in [
            "",
            r#","write_multiple":true"#,
            r#","max_msg_fds":1,"pgsizes":1"#,
        ] {
            let (answer, made) = with_twin(&format!("{asks}{others}"), true);
            assert!(made);
            assert_eq!(answer["twin_socket"], named, "{others}");
        }
        let (answer, _) = with_twin(&format!(r#"{asks},"write_multiple":true"#), true);
        assert_eq!(answer["write_multiple"], true);
        // Its number of a descriptor is of replies only, and what is not known is not looked at.
        let (answer, _) = with_twin(
            r#""twin_socket":{"fd_index":"x","supported":true,"more":[]}"#,
            true,
        );
        assert_eq!(answer["twin_socket"], named);
        // There is none.
        let (answer, made) = with_twin(&format!(r#"{asks},"write_multiple":true"#), false);
        assert!(made && answer.get("twin_socket").is_none());
        assert_eq!(answer["write_multiple"], true);
    }

    #[test]
    fn who_does_not_ask_for_a_second_socket_or_cannot_take_it_gets_none() {
        for capabilities in [
            r#""twin_socket":{}"#,
            r#""twin_socket":{"supported":false}"#,
            r#""twin_socket":{"fd_index":0}"#,
            r#""twin_socket":{"supported":true},"max_msg_fds":0"#,
        ] {
            let (answer, made) = with_twin(capabilities, true);
            assert!(!made && answer.get("twin_socket").is_none(), "{answer}");
        }
    }

    #[test]
    fn a_second_socket_of_another_type_is_refused() {
        for twin in [
            "true",
            "null",
            "1",
            "\"x\"",
            "[true]",
            r#"{"supported":1}"#,
            r#"{"supported":null}"#,
            r#"{"supported":"true"}"#,
            r#"{"supported":{}}"#,
        ] {
            let data = format!("{{\"capabilities\":{{\"twin_socket\":{twin}}}}}\0");
            let refused = negotiate(0, 0, data.as_bytes());
            assert!(
                matches!(refused, Err(Refusal::VersionData { .. })),
                "{twin}"
            );
        }
    }

    /// "Name, Type" of the table of capabilities: `number`, `boolean`, `object`.
    #[test]
    fn capabilities_of_another_type_are_refused() {
        let refused = |capabilities: &str| {
            let data = format!("{{\"capabilities\":{capabilities}}}\0");
            let refused = negotiate(0, 0, data.as_bytes());
            let refused = matches!(refused, Err(Refusal::VersionData { .. }));
            assert!(refused, "{capabilities}");
        };
        for numeric in [
            "max_msg_fds",
            "max_data_xfer_size",
            "pgsizes",
            "max_dma_maps",
        ] {
            for value in [
                "\"4\"", "null", "true", "[4]", "{}", "-1", "0.5", "-1e30", "1e400",
            ] {
                refused(&format!("{{\"{numeric}\":{value}}}"));
            }
        }
        for capabilities in [
            "null",
            "3",
            "\"x\"",
            "[]",
            "[16,4096,4096,1,true,{},{}]",
            r#"{"write_multiple":1}"#,
            r#"{"write_multiple":null}"#,
            r#"{"migration":"23"}"#,
            r#"{"migration":{"pgsize":"x"}}"#,
            r#"{"migration":{"pgsize":4095}}"#,
            r#"{"max_msg_fds":8,"max_msg_fds":9}"#,
        ] {
            refused(capabilities);
        }
    }

    #[test]
    fn what_is_not_known_is_ignored_however_much_and_deep_it_is() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for unknown in [
            deep,
            format!("\"{}\"", "x".repeat(1 << 20)),
            "9".repeat(1 << 19),
        ] {
            let data =
                format!("{{\"x\":{unknown},\"capabilities\":{{\"x\":{unknown}}},\"x\":1}}\0");
            assert_eq!(negotiate(0, 0, data.as_bytes()).unwrap().data, "{}\0");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for data in [
            &b"{}"[..],
            b"x\0",
            b"1\0",
            b"[]\0",
            b"[{}]\0",
            b"{}{}\0",
            b"{}\0\0",
            b"{\"x\":\"\xff\"}\0",
            b"{\"capabilities\":3}\0",
        ] {
            assert!(matches!(
                negotiate(0, 0, data),
                Err(Refusal::VersionData { .. })
            ));
        }
        let long = format!("{{\"capabilities\":\"{}\"}}\0", "x".repeat(1 << 20));
        match negotiate(0, 0, long.as_bytes()) {
            Err(Refusal::VersionData { len, why }) => {
                assert_eq!((len, why.len()), (long.len(), MAX_WHY));
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(
            negotiate(1, 0, b"{}\0"),
            Err(Refusal::Version { major: 1, .. })
        ));
    }
}
