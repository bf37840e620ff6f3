//! The JSON Schema of a machine description, for editors and for programs that write descriptions.
//!
//! It is derived from the types of [`crate::machine`], with their doc comments as descriptions. It says what a key may
//! be by itself; what keys have to be together (which CPU node a GPU names, whether all of it fits) only
//! [`crate::plan()`] can say. Sizes and bandwidths have their unit as `x-unit`.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::Value;

use crate::machine::{Cpus, MAX_CPUS, Machine};
use crate::size::Size;

/// The schema, in JSON Schema 2020-12.
pub fn schema() -> Value {
    of::<Machine>()
}

/// The schema of any description, in JSON Schema 2020-12.
pub fn of<T: JsonSchema>() -> Value {
    let mut schema = schemars::schema_for!(T).to_value();
    tidy(&mut schema);
    schema
}

/// The schema as text, indented.
///
/// # Errors
/// None that the schema can cause; `serde_json`'s type is passed through.
pub fn text() -> Result<String, serde_json::Error> {
    let mut text = serde_json::to_string_pretty(&schema())?;
    text.push('\n');
    Ok(text)
}

/// Takes out what only Rust needs to know: formats such as `uint32`, and defaults that say that nothing is there.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            let integer = object.get("type").is_some_and(|kind| kind == "integer");
            if integer && object.get("format").is_some_and(Value::is_string) {
                object.remove("format");
            }
            let nothing = object.get("default").is_some_and(|default| {
                default.is_null() || default == "" || default.as_array().is_some_and(Vec::is_empty)
            });
            if nothing {
                object.remove("default");
            }
            object.values_mut().for_each(tidy);
        }
        Value::Array(elements) => elements.iter_mut().for_each(tidy),
        _ => {}
    }
}

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "oneOf": [
                { "type": "string", "pattern": r"^\s*[0-9]+\s*(B|KiB|MiB|GiB|TiB)?\s*$" },
                { "type": "integer", "minimum": 0 },
            ],
            "x-type": "size",
            "x-unit": "bytes",
        })
    }
}

impl JsonSchema for Cpus {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Cpus".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "oneOf": [
                { "type": "integer", "minimum": 1, "maximum": MAX_CPUS },
                {
                    "type": "string",
                    "pattern": r"^\s*[0-9]+\s*(-\s*[0-9]+\s*)?(,\s*[0-9]+\s*(-\s*[0-9]+\s*)?)*$",
                },
            ],
            "x-type": "count or list",
        })
    }
}
