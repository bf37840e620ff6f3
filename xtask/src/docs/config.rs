//! `docs/config.md`: the machine description, from its JSON Schema.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::markdown::table;

/// A description with comments; the tests of `numagpu-topology` plan it.
const EXAMPLE: &str = "topology/examples/commented.toml";

const INTRODUCTION: &str = "# The machine description\n\n\
    <!-- Made by `cargo xtask docs` from the schema that `numagpu schema` prints: change the doc comments of \
    topology/src/machine.rs. -->\n\n\
    A machine is a TOML file. `[[cpu]]`, `[[memory]]`, `[[gpu]]`, `[[link]]` and `[[source]]` are given once for each; any other \
    table at most once. A key that is not listed here is an error, with the line it is on. `numagpu plan FILE` says \
    whether a machine can be built, and `numagpu schema > machine.schema.json` writes the JSON Schema of this page \
    for editors that complete and check TOML.\n\n\
    A *size* is text with a unit (`\"4GiB\"`, `\"512MiB\"`, `\"64KiB\"`, `\"2TiB\"`) or a number of bytes, hexadecimal \
    if you like (`0x1_0000_0000`). A *count or list* of CPUs is a number (`2`), or text that names them \
    (`\"0-15,64-79\"`).\n";

/// The page.
pub fn page(root: &Path, numagpu: &Path) -> Result<String> {
    let printed = Command::new(numagpu)
        .arg("schema")
        .stdin(Stdio::null())
        .output()
        .context("the numagpu command cannot be started")?;
    if !printed.status.success() {
        bail!("numagpu schema: {}", printed.status);
    }
    let schema: Value = serde_json::from_slice(&printed.stdout).context("numagpu schema")?;
    let example = std::fs::read_to_string(root.join(EXAMPLE))
        .with_context(|| format!("cannot read {EXAMPLE}"))?;
    let mut page = INTRODUCTION.to_owned();
    page += &format!("\n## An example\n\n```toml\n{}\n```\n", example.trim_end());
    page += &reference(&schema)?;
    Ok(page)
}

/// One section for the top level, and one for every table.
fn reference(schema: &Value) -> Result<String> {
    let mut text = section(schema, "Top level", schema)?;
    for (name, property) in properties(schema) {
        let (heading, table) = match property.get("items") {
            Some(items) => (format!("`[[{name}]]`"), resolved(schema, items)?),
            None => (format!("`[{name}]`"), resolved(schema, property)?),
        };
        if table.get("properties").is_some() {
            text += &section(schema, &heading, table)?;
        }
    }
    Ok(text)
}

/// The keys of an object, what it cannot do without first.
fn properties(object: &Value) -> Vec<(&str, &Value)> {
    let mut all: Vec<(&str, &Value)> = object
        .get("properties")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
        .map(|(key, property)| (key.as_str(), property))
        .collect();
    all.sort_by_key(|(key, _)| (!is_required(object, key), *key));
    all
}

fn is_required(object: &Value, key: &str) -> bool {
    let required = object.get("required").and_then(Value::as_array);
    required.is_some_and(|keys| keys.iter().any(|required| required == key))
}

/// What a `$ref` stands for, anything else itself.
fn resolved<'a>(schema: &'a Value, value: &'a Value) -> Result<&'a Value> {
    let Some(reference) = value.get("$ref").and_then(Value::as_str) else {
        return Ok(value);
    };
    let path = reference.strip_prefix('#').unwrap_or(reference);
    schema
        .pointer(path)
        .with_context(|| format!("the schema has no {reference}"))
}

fn words<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A table of the description: its keys, then the values of those that have names.
fn section(schema: &Value, heading: &str, object: &Value) -> Result<String> {
    let mut rows = Vec::new();
    let mut named = String::new();
    for (key, property) in properties(object) {
        let kind = resolved(schema, property)?;
        let values = named_values(kind);
        if !values.is_empty() {
            let rows: Vec<_> = values
                .iter()
                .map(|value| {
                    [
                        format!("`\"{}\"`", words(value, "const")),
                        words(value, "description").to_owned(),
                    ]
                })
                .collect();
            named += &format!("\n`{key}` is one of:\n\n");
            named += &table(["value", "what"], &rows);
        }
        let default = match property.get("default") {
            _ if is_required(object, key) => "(required)".to_owned(),
            Some(value) => format!("`{value}`"),
            None => String::new(),
        };
        rows.push([
            format!("`{key}`"),
            type_words(schema, kind)?,
            words(property, "x-unit").to_owned(),
            default,
            range(kind),
            words(property, "description").replace('\n', " "),
        ]);
    }
    let description = words(object, "description").replace('\n', " ");
    let head = ["key", "type", "unit", "default", "range", "what"];
    Ok(format!(
        "\n## {heading}\n\n{description}\n\n{}{named}",
        table(head, &rows)
    ))
}

/// The alternatives of an enumeration.
fn named_values(kind: &Value) -> Vec<&Value> {
    let alternatives = kind.get("oneOf").and_then(Value::as_array);
    alternatives
        .into_iter()
        .flatten()
        .filter(|value| value.get("const").is_some())
        .collect()
}

fn type_words(schema: &Value, kind: &Value) -> Result<String> {
    if let Some(words) = kind.get("x-type").and_then(Value::as_str) {
        return Ok(words.to_owned());
    }
    if !named_values(kind).is_empty() {
        return Ok("name, see below".to_owned());
    }
    Ok(match words(kind, "type") {
        "string" => "text".to_owned(),
        "boolean" => "true or false".to_owned(),
        "object" => "table".to_owned(),
        "array" => {
            let items = kind.get("items").context("a list without items")?;
            let items = resolved(schema, items)?;
            match words(items, "type") {
                "array" => "list of lists".to_owned(),
                _ => format!("list of {}s", type_words(schema, items)?),
            }
        }
        "integer" => "integer".to_owned(),
        other => bail!("the page has no words for the type `{other}`"),
    })
}

/// What a value may be, where the schema says it: numbers, or numbers within lists.
fn range(kind: &Value) -> String {
    let number = |key: &str| kind.get(key).and_then(Value::as_u64);
    if let Some(items) = kind
        .get("items")
        .filter(|items| items.get("$ref").is_none())
    {
        return range(items);
    }
    let numbers = match (number("minimum"), number("maximum")) {
        (Some(low), Some(high)) => format!("{low} to {high}"),
        (Some(low), None) => format!("{low} up"),
        (None, Some(high)) => format!("up to {high}"),
        (None, None) => String::new(),
    };
    if !numbers.is_empty() {
        return numbers;
    }
    match (number("minItems"), number("maxLength")) {
        (Some(least), _) => format!("{least} or more"),
        (None, Some(most)) => format!("`{}`, at most {most} characters", words(kind, "pattern")),
        (None, None) => kind
            .get("oneOf")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter(|one| one.get("maximum").is_some())
            .map(range)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Value {
        json!({
            "description": "A thing.",
            "properties": {
                "a": { "type": "integer", "minimum": 1, "maximum": 8, "default": 2, "x-unit": "ns", "description": "How\nlong." },
                "part": { "type": "array", "items": { "$ref": "#/$defs/Part" }, "description": "Parts." },
            },
            "required": ["part"],
            "$defs": {
                "Part": {
                    "type": "object",
                    "description": "A part.",
                    "properties": { "kind": { "$ref": "#/$defs/Kind", "default": "x", "description": "Which." } },
                },
                "Kind": { "oneOf": [{ "const": "x", "description": "The first." }] },
            },
        })
    }

    #[test]
    fn every_table_has_a_section_with_required_keys_first() {
        let text = reference(&schema()).unwrap();
        let expected = "
## Top level

A thing.

| key    | type           | unit | default    | range  | what      |
| ------ | -------------- | ---- | ---------- | ------ | --------- |
| `part` | list of tables |      | (required) |        | Parts.    |
| `a`    | integer        | ns   | `2`        | 1 to 8 | How long. |

## `[[part]]`

A part.

| key    | type            | unit | default | range | what   |
| ------ | --------------- | ---- | ------- | ----- | ------ |
| `kind` | name, see below |      | `\"x\"`   |       | Which. |

`kind` is one of:

| value | what       |
| ----- | ---------- |
| `\"x\"` | The first. |
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_type_without_words_and_a_reference_to_nothing_are_errors() {
        assert!(type_words(&json!({}), &json!({ "type": "number" })).is_err());
        assert!(resolved(&json!({}), &json!({ "$ref": "#/$defs/Gone" })).is_err());
    }

    #[test]
    fn ranges_are_those_of_numbers_also_within_lists() {
        assert_eq!(range(&json!({ "minimum": 0 })), "0 up");
        assert_eq!(
            range(&json!({ "items": { "items": { "maximum": 9 } } })),
            "up to 9"
        );
        assert_eq!(
            range(&json!({ "minItems": 1, "items": { "$ref": "#" } })),
            "1 or more"
        );
        let either = json!({ "oneOf": [{ "minimum": 1, "maximum": 4 }, { "pattern": "x" }] });
        assert_eq!(range(&either), "1 to 4");
    }
}
