//! The JSON Schema and the parser say the same of a description.
//!
//! The validator here knows the keywords that the schema has and fails on any other, so that none goes unchecked.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test fails by a panic"
)]

use numagpu_topology::{parse, plan, preset, schema};
use serde_json::{Map, Value, json};

/// A description with every key, for readers of `docs/config.md` too.
const EXAMPLE: &str = include_str!("../examples/commented.toml");

fn resolved<'a>(root: &'a Value, schema: &'a Value) -> &'a Map<String, Value> {
    let schema = schema.as_object().unwrap();
    match schema.get("$ref").and_then(Value::as_str) {
        Some(at) => root
            .pointer(at.strip_prefix('#').unwrap())
            .and_then(Value::as_object)
            .unwrap(),
        None => schema,
    }
}

/// Whether a text of letters, digits, blanks, `-` and `,` is of the pattern; only those of the schema are known.
fn matches(pattern: &str, text: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if pattern.contains("KiB") {
        let text = text.trim();
        let units = ["KiB", "MiB", "GiB", "TiB", "B"];
        let unit = units.iter().find_map(|unit| text.strip_suffix(unit));
        number(unit.unwrap_or(text).trim_end())
    } else if pattern.contains(",") {
        let range =
            |part: &str| part.split('-').count() <= 2 && part.split('-').all(|n| number(n.trim()));
        text.split(',').all(range)
    } else {
        assert_eq!(pattern, "^[A-Za-z][A-Za-z0-9_-]*$");
        text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
    }
}

/// What the schema has against the value: the place and the keyword.
fn wrong(root: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    let schema = resolved(root, schema);
    let fails = |(keyword, rule): (&String, &Value)| -> Option<String> {
        let number = |rule: &Value| (value.as_i64().unwrap_or(i64::MAX), rule.as_i64().unwrap());
        let fine = match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "default" | "x-unit" | "x-type" => true,
            "type" => match rule.as_str().unwrap() {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "integer" => value.is_i64() || value.is_u64(),
                "boolean" => value.is_boolean(),
                other => panic!("type {other}"),
            },
            "const" => value == rule,
            "minimum" => !value.is_number() || number(rule).0 >= number(rule).1,
            "maximum" => !value.is_number() || number(rule).0 <= number(rule).1,
            "minItems" => value
                .as_array()
                .is_none_or(|list| list.len() as u64 >= rule.as_u64().unwrap()),
            "maxLength" => value
                .as_str()
                .is_none_or(|text| text.len() as u64 <= rule.as_u64().unwrap()),
            "pattern" => value
                .as_str()
                .is_none_or(|text| matches(rule.as_str().unwrap(), text)),
            "oneOf" => {
                let fits = |rule: &&Value| wrong(root, rule, value, at).is_none();
                rule.as_array().unwrap().iter().filter(fits).count() == 1
            }
            "items" => {
                let mut elements = value.as_array().into_iter().flatten().enumerate();
                return elements
                    .find_map(|(i, element)| wrong(root, rule, element, &format!("{at}[{i}]")));
            }
            "properties" => {
                let mut given = value.as_object().into_iter().flatten();
                return given.find_map(|(key, value)| {
                    wrong(root, rule.get(key)?, value, &format!("{at}.{key}"))
                });
            }
            "required" => {
                let missing = |key: &&Value| value.get(key.as_str().unwrap()).is_none();
                rule.as_array().unwrap().iter().find(missing).is_none()
            }
            "additionalProperties" => {
                assert_eq!(rule, false);
                let known = &schema["properties"];
                value
                    .as_object()
                    .is_none_or(|given| given.keys().all(|key| known.get(key).is_some()))
            }
            other => panic!("{at}: the validator does not know {other}"),
        };
        (!fine).then(|| format!("{at}: {keyword}"))
    };
    schema.iter().find_map(fails)
}

fn refused(text: &str) -> Option<String> {
    let value: Value = toml::from_str(text).unwrap();
    let schema = schema::schema();
    wrong(&schema, &schema, &value, "machine")
}

#[test]
fn good_machines_fit() {
    for preset in preset::ALL {
        assert_eq!(refused(preset.source), None, "{}", preset.name);
    }
    assert_eq!(refused(EXAMPLE), None);
    plan(&parse("commented.toml", EXAMPLE).unwrap()).unwrap();
}

#[test]
fn bad_machines_do_not() {
    for (from, to, message) in [
        ("name = \"commented\"", "", "machine: required"),
        ("name = \"commented\"", "name = 1", "machine.name: type"),
        (
            "name = \"commented\"",
            "name = \"x\"\nnam = 1",
            "machine: additionalProperties",
        ),
        (
            "cpu_cpu = 21",
            "cpu_cpu = 10",
            "machine.distances.cpu_cpu: minimum",
        ),
        (
            "phys_bits = 40",
            "phys_bits = 53",
            "machine.limits.phys_bits: maximum",
        ),
        (
            "phys_bits = 40",
            "physbits = 40",
            "machine.limits: additionalProperties",
        ),
        (
            "\"1GiB\"\n\n[guest]",
            "\"1GB\"\n\n[guest]",
            "machine.placement.gap: oneOf",
        ),
        (
            "\"1GiB\"\n\n[guest]",
            "-1\n\n[guest]",
            "machine.placement.gap: oneOf",
        ),
        ("id = \"b\"", "id = \"1b\"", "machine.gpu[1].id: pattern"),
        (
            "partitions = 2",
            "partitions = 9",
            "machine.gpu[2].partitions: maximum",
        ),
        (
            "partitions = 2",
            "partitions = \"2\"",
            "machine.gpu[2].partitions: type",
        ),
        ("bus = 0x41", "bus = 1", "machine.gpu[1].bus: minimum"),
        (
            "cpus = \"2-3\"",
            "cpus = \"2-3-4\"",
            "machine.cpu[1].cpus: oneOf",
        ),
        ("cpus = \"2-3\"", "cpus = 0", "machine.cpu[1].cpus: oneOf"),
        (
            "pci_node = \"hbm\"",
            "pci_node = \"gpu\"",
            "machine.gpu[0].pci_node: oneOf",
        ),
        (
            "driver = \"user\"",
            "driver = true",
            "machine.guest.driver: oneOf",
        ),
        (
            "count = 4 ",
            "count = 65 ",
            "machine.link[0].count: maximum",
        ),
        (
            "latency_ns = 500",
            "latency_ns = -1",
            "machine.link[0].latency_ns: minimum",
        ),
        (
            "mark = \"hypothetical\"",
            "mark = \"guess\"",
            "machine.source[0].mark: oneOf",
        ),
        (
            "cpu_cpu = 21",
            "matrix = [[9]]",
            "machine.distances.matrix[0][0]: minimum",
        ),
    ] {
        assert!(EXAMPLE.contains(from), "{from}");
        let text = EXAMPLE.replacen(from, to, 1);
        assert_eq!(refused(&text).as_deref(), Some(message), "{to}");
        // What the schema refuses, the parser or the planner refuses too.
        let planned = parse("bad.toml", &text).and_then(|machine| plan(&machine));
        assert!(planned.is_err(), "{to}");
    }
    assert_eq!(refused("name = \"x\""), Some("machine: required".into()));
    assert_eq!(
        refused("name = \"x\"\ncpu = []"),
        Some("machine.cpu: minItems".into())
    );
}

/// Keys that the parser takes in a table, out of what it says to one that it does not know.
fn parsed_keys(table: &str) -> Vec<String> {
    let text = match table {
        "" => "nonsense = 1".to_owned(),
        table => format!("name = \"x\"\n{table}\nnonsense = 1"),
    };
    let error = parse("m", &text).err().unwrap();
    let help = error.help.unwrap();
    let (_, keys) = help.split_once(" takes ").unwrap();
    let mut keys: Vec<String> = keys.split(", ").map(str::to_owned).collect();
    keys.sort();
    keys
}

#[test]
fn every_key_of_the_parser_is_in_the_schema_and_no_other() {
    let schema = schema::schema();
    let keys = |schema: &Value| -> Vec<String> {
        let mut keys: Vec<String> = schema["properties"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&schema), parsed_keys(""));
    let mut tables = 0;
    for (name, property) in schema["properties"].as_object().unwrap() {
        let (table, written) = match property.get("items") {
            Some(items) => (resolved(&schema, items), format!("[[{name}]]")),
            None if property.get("type").is_some() => continue,
            None => (resolved(&schema, property), format!("[{name}]")),
        };
        let table = Value::Object(table.clone());
        assert_eq!(keys(&table), parsed_keys(&written), "{written}");
        assert_eq!(table["additionalProperties"], false, "{written}");
        tables += 1;
    }
    assert_eq!(tables, 11);
}

#[test]
fn every_key_has_a_description_and_defaults_are_the_parsers() {
    let schema = schema::schema();
    let mut tables = vec![&schema];
    tables.extend(schema["$defs"].as_object().unwrap().values());
    for table in tables {
        assert!(table["description"].is_string(), "{table}");
        for (key, property) in table["properties"].as_object().into_iter().flatten() {
            assert!(property["description"].is_string(), "{key}");
        }
    }
    let default = |at: &str| schema.pointer(&format!("/$defs/{at}/default")).unwrap();
    assert_eq!(default("Placement/properties/gap"), &json!("2GiB"));
    assert_eq!(default("Limits/properties/phys_bits"), &json!(40));
    assert_eq!(default("Gpu/properties/exposure"), &json!("spm"));
    assert_eq!(default("Gpu/properties/partitions"), &json!(1));
    assert_eq!(default("Distances/properties/cpu_hbm_local"), &json!(15));
}
