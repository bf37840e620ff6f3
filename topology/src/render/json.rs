//! The plan as JSON.

use std::io::{self, Write};

use serde::Serialize;
use serde::ser::Error;
use serde_json::Serializer;
use serde_json::ser::Formatter;

use crate::plan::Plan;

/// Bytes of a distance in the text: its line of 8 spaces, 2 or 3 digits and a comma.
const CELL: usize = 13;

/// The plan as one JSON object, indented.
///
/// # Errors
/// None that a plan can cause; `serde_json`'s type is passed through.
pub fn json(plan: &Plan) -> Result<String, serde_json::Error> {
    // Distances are most of a large machine's text; so much memory is not moved as the text grows.
    let cells: usize = plan.slit.iter().map(Vec::len).sum();
    let mut text = Vec::with_capacity(cells * CELL + (1 << 10));
    plan.serialize(&mut Serializer::with_formatter(
        &mut text,
        Pretty::default(),
    ))?;
    text.push(b'\n');
    String::from_utf8(text).map_err(Error::custom)
}

/// A line's end and what most lines begin with: 16 times two spaces.
const LINE: &[u8] = b",\n                                ";

/// The same bytes as `serde_json`'s own `PrettyFormatter`, but comma, line end and indentation are written in one go: it is
/// a distance's line that a large machine's plan has a million of.
#[derive(Default)]
struct Pretty {
    depth: usize,
    /// Whether the innermost array or object that has been left or added to has something in it.
    has_value: bool,
}

impl Pretty {
    fn line<W: ?Sized + Write>(&self, writer: &mut W, comma: bool) -> io::Result<()> {
        let from = usize::from(!comma);
        let to = 2 + 2 * self.depth;
        if let Some(line) = LINE.get(from..to) {
            return writer.write_all(line);
        }
        writer.write_all(LINE.get(from..2).unwrap_or_default())?;
        (0..self.depth).try_for_each(|_| writer.write_all(b"  "))
    }

    fn open<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: u8) -> io::Result<()> {
        self.depth += 1;
        self.has_value = false;
        writer.write_all(&[bracket])
    }

    fn close<W: ?Sized + Write>(&mut self, writer: &mut W, bracket: u8) -> io::Result<()> {
        self.depth = self.depth.saturating_sub(1);
        if self.has_value {
            self.line(writer, false)?;
        }
        writer.write_all(&[bracket])
    }
}

impl Formatter for Pretty {
    fn begin_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b'[')
    }

    fn end_array<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b']')
    }

    fn begin_array_value<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.line(writer, !first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, b'{')
    }

    fn end_object<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, b'}')
    }

    fn begin_object_key<W: ?Sized + Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> io::Result<()> {
        self.line(writer, !first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, _writer: &mut W) -> io::Result<()> {
        self.has_value = true;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by a panic")]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_serde_json() {
        for preset in crate::preset::ALL {
            let machine = crate::parse(preset.name, preset.source).unwrap();
            let plan = crate::plan(&machine).unwrap();
            let expected = serde_json::to_string_pretty(&plan).unwrap() + "\n";
            assert_eq!(json(&plan).unwrap(), expected);
        }
    }

    #[test]
    fn deep_and_empty_values_are_written_as_serde_json_writes_them() {
        let mut value = serde_json::json!([{}, [], {"a": [1, [], {"b": null}]}, [[]]]);
        for _ in 0..20 {
            value = serde_json::json!({ "a": [value], "b": 1 });
        }
        let mut text = Vec::new();
        let mut to = Serializer::with_formatter(&mut text, Pretty::default());
        value.serialize(&mut to).unwrap();
        let expected = serde_json::to_string_pretty(&value).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), expected);
    }
}
