//! Reads a machine description, and says what is wrong with it in the words of the description.
//!
//! `serde` and `toml` speak of Rust's types and of bytes. Here their messages are put in terms of tables and keys:
//! which table it is (`gpu[1]`, counted from 0), which keys it takes, what a value has to be.

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use crate::error::MachineError;
use crate::machine::{Machine, SourceText};

/// Reads a machine description. `file` is its name in errors.
///
/// # Errors
/// [`MachineError`] with line and key where the text is not TOML, has an unknown key, or a value of the wrong type.
/// Whether the values make a machine is [`crate::plan()`]'s to say.
pub fn parse(file: &str, text: &str) -> Result<Machine, MachineError> {
    let source = SourceText {
        file: file.to_owned(),
        text: text.to_owned(),
    };
    let machine: Machine = read(&source, required)?;
    Ok(Machine {
        text: source,
        ..machine
    })
}

/// Reads any description that is a TOML file. `required` says what a table with this name, without its brackets, cannot
/// do without; the top level's name is empty.
///
/// # Errors
/// [`MachineError`] as [`parse`] gives it.
pub fn read<T: DeserializeOwned>(
    source: &SourceText,
    required: fn(&str) -> &'static str,
) -> Result<T, MachineError> {
    let text = source.text.as_str();
    toml::from_str::<T>(text).map_err(|error| {
        let span = error.span().unwrap_or(0..0);
        let path = path_at(text, span.start);
        let at = text.get(span.clone()).unwrap_or_default();
        let message = error.message().trim_end().replace('\n', "; ");
        if DeTable::parse(text).is_ok() {
            let (message, help) = value_wording(message, at, &path, required);
            return source.error(span.start, path.to_string(), message, help);
        }
        let (message, help) = toml_wording(&message, at);
        let line = text.lines().nth(source.line(span.start) - 1);
        // A table's head that is not TOML is no table to name.
        let key = line
            .map(str::trim)
            .filter(|line| line.starts_with('[') && message.contains("table"))
            .map_or_else(|| path.to_string(), str::to_owned);
        source.error(span.start, key, message, help)
    })
}

/// Byte at which the key or table that is called so, such as `gpu[1].hbm`, starts in a text that is TOML; that of the
/// table around it if there is no such key.
pub fn offset_of(text: &str, path: &str) -> usize {
    let Ok(table) = DeTable::parse(text) else {
        return 0;
    };
    let mut all = Vec::new();
    entries(table.get_ref(), &Path::default(), &mut all);
    let around = |name: &str| {
        path.strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let named = all
        .iter()
        .map(|entry| (entry.path.to_string(), entry.start));
    let found = named.filter(|(name, _)| around(name));
    found
        .max_by_key(|(name, _)| name.len())
        .map_or(0, |(_, start)| start)
}

/// Where in a description a byte is: tables and, last, a key; `gpu[1]`, `hbm`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Path(Vec<String>);

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("(top level)");
        }
        f.write_str(&self.0.join("."))
    }
}

impl Path {
    fn join(&self, name: String) -> Path {
        let mut parts = self.0.clone();
        parts.push(name);
        Path(parts)
    }

    fn parent(&self) -> Path {
        let mut parts = self.0.clone();
        parts.pop();
        Path(parts)
    }

    /// Name of the table, without a number; empty at the top level.
    fn table(&self) -> &str {
        let name = self.0.first().map_or("", String::as_str);
        name.split('[').next().unwrap_or_default()
    }

    /// The table as one writes it: `[[gpu]]` for `gpu[1]`, `[limits]` for `limits`.
    fn written(&self) -> Option<String> {
        let name = self.0.first()?;
        Some(match name.split_once('[') {
            Some((name, _)) => format!("[[{name}]]"),
            None => format!("[{name}]"),
        })
    }
}

/// A key or a table's head: where it starts and where its value ends.
struct Entry {
    start: usize,
    end: usize,
    path: Path,
}

fn entries(table: &DeTable<'_>, path: &Path, all: &mut Vec<Entry>) {
    for (key, value) in table {
        let name = key.get_ref();
        let elements = value.get_ref().as_array().filter(|array| {
            !array.is_empty() && array.iter().all(|element| element.get_ref().is_table())
        });
        if let Some(elements) = elements {
            for (index, element) in elements.iter().enumerate() {
                let path = path.join(format!("{name}[{index}]"));
                all.push(Entry {
                    start: element.span().start,
                    end: element.span().end,
                    path: path.clone(),
                });
                if let Some(table) = element.get_ref().as_table() {
                    entries(table, &path, all);
                }
            }
            continue;
        }
        let path = path.join(name.to_string());
        all.push(Entry {
            // A table's head starts before its name, the value of a key after it.
            start: key.span().start.min(value.span().start),
            end: value.span().end,
            path: path.clone(),
        });
        if let DeValue::Table(table) = value.get_ref() {
            entries(table, &path, all);
        }
    }
}

/// The key or table in which the byte at `offset` is: the last one that starts there or before. A text that is not
/// TOML is read as far as it goes.
fn path_at(text: &str, offset: usize) -> Path {
    let (table, _) = DeTable::parse_recoverable(text);
    let mut all = Vec::new();
    entries(table.get_ref(), &Path::default(), &mut all);
    let Some(last) = all
        .into_iter()
        .filter(|entry| entry.start <= offset)
        .max_by_key(|entry| (entry.start, entry.path.0.len()))
    else {
        return Path::default();
    };
    let between = text.get(last.end.min(offset)..offset).unwrap_or_default();
    let is_key = !text
        .get(last.start..)
        .is_some_and(|rest| rest.starts_with('['));
    let no_key = last.path.0.last().is_some_and(String::is_empty);
    if no_key || is_key && between.contains('\n') {
        last.path.parent()
    } else {
        last.path
    }
}

/// Keys that a machine's table cannot do without.
fn required(table: &str) -> &'static str {
    match table {
        "" => "a machine needs a name, such as name = \"two-gpu\"",
        "cpu" => "a [[cpu]] table needs cpus",
        "memory" => "a [[memory]] table needs memory and cpu",
        "gpu" => "a [[gpu]] table needs hbm and cpu",
        "link" => "a [[link]] table needs from and to",
        _ => "a [[source]] table needs value, mark and from",
    }
}

/// What `serde` calls the type, in words.
fn type_words(expected: &str) -> String {
    match expected {
        "u16" | "u32" | "usize" | "u64" => "a whole number from 0 up".to_owned(),
        "a sequence" => "a list".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "text in quotation marks".to_owned(),
        struct_name if struct_name.starts_with("struct ") => "a table".to_owned(),
        other => other.to_owned(),
    }
}

/// A value as `serde` shows it, in words.
fn value_words(value: &str) -> String {
    match value {
        "map" => "a table".to_owned(),
        "sequence" => "a list".to_owned(),
        other => {
            let value = other
                .trim_end_matches(" as i128")
                .trim_end_matches(" as u128");
            match value.split_once(' ') {
                Some(("integer" | "boolean", rest)) => rest.to_owned(),
                Some(("string", rest)) => format!("the text {rest}"),
                Some(("floating", rest)) => rest.trim_start_matches("point ").to_owned(),
                _ => value.to_owned(),
            }
        }
    }
}

/// Names in back quotes of a list such as "one of `a`, `b`" or "`a` or `b`".
fn quoted(list: &str) -> String {
    let names: Vec<&str> = list.split('`').skip(1).step_by(2).collect();
    names.join(", ")
}

/// The message and the help for a text that is not TOML, wrong at `at`.
fn toml_wording(message: &str, at: &str) -> (String, Option<String>) {
    match message {
        "duplicate key" => (format!("`{at}` is given twice"), None),
        text if at.is_empty() && text.starts_with("string values must be quoted") => {
            ("has no value".to_owned(), None)
        }
        text if text.starts_with("string values must be quoted") => (
            format!("{at} is not TOML: text has to be in quotation marks"),
            Some(format!("write \"{at}\"")),
        ),
        text => (format!("is not TOML: {text}"), None),
    }
}

/// The message and the help for a value `at` that a description cannot have there.
fn value_wording(
    message: String,
    at: &str,
    path: &Path,
    required: fn(&str) -> &'static str,
) -> (String, Option<String>) {
    if let Some(rest) = message.strip_prefix("unknown field ") {
        let allowed = rest.split_once("expected ").map_or("", |(_, list)| list);
        let table = path.parent().written();
        return (
            "there is no such key".to_owned(),
            Some(match table {
                Some(table) => format!("{table} takes {}", quoted(allowed)),
                None => format!("the top level takes {}", quoted(allowed)),
            }),
        );
    }
    if let Some(field) = message.strip_prefix("missing field ") {
        let message = format!("{field} is missing");
        return (message, Some(required(path.table()).to_owned()));
    }
    if let Some(rest) = message.strip_prefix("unknown variant ") {
        let (name, allowed) = rest.split_once(", expected ").unwrap_or((rest, ""));
        let help = format!("it is one of {}", quoted(allowed));
        return (format!("{name} is not known"), Some(help));
    }
    let type_error = message
        .strip_prefix("invalid type: ")
        .or_else(|| message.strip_prefix("invalid value: "));
    if let Some(rest) = type_error {
        let (value, expected) = rest.split_once(", expected ").unwrap_or((rest, ""));
        let help = match (value, expected) {
            ("map", "a sequence") => Some(format!("write [[{path}]] with two brackets")),
            (_, "a sequence")
                if ["cpu", "gpu", "link", "source", "fault"].contains(&&*path.to_string()) =>
            {
                Some(format!("write one [[{path}]] table for each"))
            }
            (_, "u32" | "u16") if value.starts_with("integer") && !value.contains("`-") => {
                let largest = match expected {
                    "u16" => u16::MAX.into(),
                    _ => u32::MAX,
                };
                Some(format!("the largest is {largest}"))
            }
            _ => None,
        };
        let (value, expected) = (value_words(value), type_words(expected));
        return (format!("is {value}; it has to be {expected}"), help);
    }
    if message == "wanted string or table" {
        return (
            format!("is {at}; it has to be a name in quotation marks"),
            None,
        );
    }
    // Words of this crate: sizes, CPU lists.
    (message, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"name = "x"
limits.phys_bits = 40
[[gpu]]
hbm = "4GiB" # [[gpu]]
[[gpu]]
# hbm = 5
hbm = "4GiB"
[distances]
matrix = [
  [10, 20],
  [20, 10],
]
source = [{ value = "a" }, { value = "b" }]
"#;

    fn path_of(needle: &str, nth: usize) -> String {
        let (offset, _) = TEXT.match_indices(needle).nth(nth).unwrap();
        path_at(TEXT, offset).to_string()
    }

    #[test]
    fn a_byte_belongs_to_the_key_or_table_around_it() {
        assert_eq!(path_of("name", 0), "name");
        assert_eq!(path_of("40", 0), "limits.phys_bits");
        assert_eq!(path_of("\"4GiB\"", 0), "gpu[0].hbm");
        assert_eq!(path_of("[[gpu]]", 2), "gpu[1]");
        assert_eq!(path_of("\"4GiB\"", 1), "gpu[1].hbm");
        assert_eq!(path_of("20, 10", 0), "distances.matrix");
        assert_eq!(path_of("\"b\"", 0), "distances.source[1].value");
    }

    #[test]
    fn a_key_or_the_table_around_it_is_found_by_its_path() {
        let line = |path| 1 + TEXT[..offset_of(TEXT, path)].matches('\n').count();
        assert_eq!(line("name"), 1);
        assert_eq!(line("gpu[0]"), 3);
        assert_eq!(line("gpu[1].hbm"), 7);
        assert_eq!(line("gpu[1].cpu"), 5, "there is no such key");
        assert_eq!(line("distances.source[1].value"), 13);
        assert_eq!(line("memory"), 1);
        assert_eq!(offset_of("a = ", "a"), 0);
    }

    #[test]
    fn a_byte_behind_a_key_belongs_to_its_table() {
        let path = |text: &str| path_at(text, text.len()).to_string();
        assert_eq!(path("a = 1\n"), "(top level)");
        assert_eq!(path("[b]\na = 1\n"), "b");
        assert_eq!(path("[b]\na = \"un"), "b.a");
        assert_eq!(path(""), "(top level)");
    }
}
