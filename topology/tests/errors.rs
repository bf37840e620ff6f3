//! Bad machines, each with the whole message that a user reads.
//!
//! A row says how a good machine is spoilt: by replacing a text in it, or by adding one to its end. The message has to
//! say where it is wrong, what is wrong, and, where it can be said, what would be right.

#![allow(clippy::panic, reason = "a test fails by a panic")]

use numagpu_topology::{parse, plan};

/// A good machine. `machine.toml` has to keep its line numbers: the rows name them.
const GOOD: &str = r#"name = "m"

[[cpu]]
cpus = 2
memory = "1GiB"

[[cpu]]
cpus = 2
memory = "1GiB"

[[gpu]]
hbm = "4GiB"
cpu = 0

[[gpu]]
id = "b"
hbm = "8GiB"
partitions = 2
cpu = 1

[[link]]
from = "gpu0"
to = "b"
count = 2

[distances]
cpu_cpu = 20

[limits]
phys_bits = 40

[placement]
align = "2GiB"
gap = "2GiB"
"#;

enum Spoil {
    /// The first text becomes the second; the last place counts where there are several.
    Replace(&'static str, &'static str),
    /// Several at once.
    ReplaceAll(&'static [(&'static str, &'static str)]),
    /// The text stands at the end.
    Add(&'static str),
    /// The text is all there is.
    Whole(String),
}
use Spoil::{Add, Replace, ReplaceAll, Whole};

impl Spoil {
    fn apply(&self) -> String {
        let replace = |text: String, (from, to): &(&str, &str)| {
            let at = text
                .rfind(from)
                .unwrap_or_else(|| panic!("{from} is not there"));
            format!("{}{to}{}", &text[..at], &text[at + from.len()..])
        };
        match self {
            Replace(from, to) => replace(GOOD.to_owned(), &(from, to)),
            ReplaceAll(changes) => changes.iter().fold(GOOD.to_owned(), replace),
            Add(text) => format!("{GOOD}{text}"),
            Whole(text) => text.clone(),
        }
    }
}

fn error(text: &str) -> Option<String> {
    parse("machine.toml", text)
        .and_then(|machine| plan(&machine))
        .err()
        .map(|error| error.to_string())
}

/// GPU 0 and 1, each at an address of its own.
const fn bases(first: &'static str, second: &'static str) -> [(&'static str, &'static str); 2] {
    [("cpu = 0", first), ("cpu = 1", second)]
}

#[test]
fn the_good_machine_is_good() {
    assert_eq!(error(GOOD), None);
}

#[test]
fn every_bad_machine_is_told_where_and_what_and_what_would_fit() {
    let mut report = String::new();
    for (name, spoil, error_text, help) in rows().into_iter().chain(exposure_rows()) {
        let expected = match help {
            "" => error_text.to_owned(),
            help => format!("{error_text}\n  help: {help}"),
        };
        let seen = error(&spoil.apply()).unwrap_or_else(|| "(no error)".to_owned());
        if seen != expected {
            report += &format!("{name}:\n  expected: {expected}\n  seen:     {seen}\n");
        }
    }
    assert!(report.is_empty(), "{report}");
}

/// Name, how the machine is spoilt, the message, its help.
#[allow(clippy::too_many_lines, reason = "a table")]
fn rows() -> Vec<(&'static str, Spoil, &'static str, &'static str)> {
    const OVERLAP: [(&str, &str); 2] =
        bases("cpu = 0\nbase = \"8GiB\"", "cpu = 1\nbase = \"10GiB\"");
    const CLOSE: [(&str, &str); 2] = bases("cpu = 0\nbase = \"8GiB\"", "cpu = 1\nbase = \"13GiB\"");
    const BUSES: [(&str, &str); 2] = bases("cpu = 0\nbus = 16", "cpu = 1\nbus = 0x11");
    let gpus = |count: usize| {
        let gpu = "[[gpu]]\nhbm = \"2MiB\"\npartitions = 1\ncpu = 0\n";
        let cpu = "name = \"m\"\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n";
        Whole(format!("{cpu}{}", gpu.repeat(count)))
    };
    let cpus = |count: usize| {
        let cpu = "[[cpu]]\ncpus = 1\nmemory = \"2MiB\"\n";
        Whole(format!("name = \"m\"\n{}", cpu.repeat(count)))
    };
    let many_links = {
        let gpu = "[[gpu]]\nhbm = \"2MiB\"\ncpu = 0\n".repeat(34);
        let links: String = (1..34)
            .map(|i| format!("[[link]]\nfrom = \"gpu0\"\nto = \"gpu{i}\"\n"))
            .collect();
        Whole(format!(
            "name = \"m\"\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n{gpu}{links}"
        ))
    };
    vec![
        // Text that is no description.
        (
            "empty file",
            Whole(String::new()),
            "machine.toml:1: (top level): `name` is missing",
            r#"a machine needs a name, such as name = "two-gpu""#,
        ),
        (
            "unclosed table",
            Replace("[limits]", "[limits"),
            "machine.toml:29: [limits: is not TOML: unclosed table, expected `]`",
            "",
        ),
        (
            "unclosed text",
            Replace("\"8GiB\"", "\"8GiB"),
            r#"machine.toml:17: gpu[1].hbm: is not TOML: invalid basic string, expected `"`"#,
            "",
        ),
        (
            "unclosed list",
            Add("x = [1\n"),
            "machine.toml:35: placement.x: is not TOML: unclosed array, expected `]`",
            "",
        ),
        (
            "no quotation marks",
            Replace("\"8GiB\"", "8GiB"),
            "machine.toml:17: gpu[1].hbm: 8GiB is not TOML: text has to be in quotation marks",
            r#"write "8GiB""#,
        ),
        (
            "no value",
            Replace("cpu = 1", "cpu ="),
            "machine.toml:19: gpu[1].cpu: has no value",
            "",
        ),
        (
            "no key",
            Replace("cpu = 1", "= 1"),
            "machine.toml:19: gpu[1]: is not TOML: unquoted keys cannot be empty, expected letters, numbers, `-`, `_`",
            "",
        ),
        (
            "a key twice",
            Replace("cpu = 1", "cpu = 1\ncpu = 1"),
            "machine.toml:20: gpu[1]: `cpu` is given twice",
            "",
        ),
        (
            "a table twice",
            Add("[limits]\n"),
            "machine.toml:35: limits: `limits` is given twice",
            "",
        ),
        (
            "single brackets",
            Replace("[[link]]", "[link]"),
            "machine.toml:21: link: is a table; it has to be a list",
            "write [[link]] with two brackets",
        ),
        (
            "a number for a list of tables",
            Whole("name = \"m\"\ncpu = 2\n".to_owned()),
            "machine.toml:2: cpu: is `2`; it has to be a list",
            "write one [[cpu]] table for each",
        ),
        (
            "a number for a table",
            Whole("name = \"m\"\nlimits = 2\n".to_owned()),
            "machine.toml:2: limits: is `2`; it has to be a table",
            "",
        ),
        // Keys.
        (
            "unknown key at the top",
            Replace("name = \"m\"", "name = \"m\"\nhosts = 1"),
            "machine.toml:2: hosts: there is no such key",
            "the top level takes name, description, matches, cpu, memory, gpu, link, distances, limits, placement, backing, device, guest, source",
        ),
        (
            "unknown table",
            Add("[timing]\nmode = \"off\"\n"),
            "machine.toml:35: timing: there is no such key",
            "the top level takes name, description, matches, cpu, memory, gpu, link, distances, limits, placement, backing, device, guest, source",
        ),
        (
            "unknown key in the second gpu",
            Replace("partitions = 2", "partition = 2"),
            "machine.toml:18: gpu[1].partition: there is no such key",
            "[[gpu]] takes id, hbm, partitions, domains, aperture, hbm_latency_ns, hbm_bandwidth_mbs, cpu, exposure, pci_node, generic_initiator, base, bus, host_node",
        ),
        (
            "unknown key in a table",
            Replace("gap =", "gaps ="),
            "machine.toml:34: placement.gaps: there is no such key",
            "[placement] takes align, gap",
        ),
        (
            "missing key in the second cpu",
            Replace("memory = \"1GiB\"", ""),
            "machine.toml:7: cpu[1].memory: is not given, and no GPU with exposure `ram` brings the node's memory",
            r#"memory = "1GiB", or a GPU with exposure = "ram" and cpu = 1"#,
        ),
        (
            "missing key in a gpu",
            Replace("hbm = \"4GiB\"", ""),
            "machine.toml:11: gpu[0]: `hbm` is missing",
            "a [[gpu]] table needs hbm and cpu",
        ),
        (
            "missing end of a link",
            Replace("to = \"b\"", ""),
            "machine.toml:21: link[0]: `to` is missing",
            "a [[link]] table needs from and to",
        ),
        (
            "missing name",
            Replace("name = \"m\"", ""),
            "machine.toml:1: (top level): `name` is missing",
            r#"a machine needs a name, such as name = "two-gpu""#,
        ),
        (
            "empty name",
            Replace("name = \"m\"", "name = \" \""),
            "machine.toml:1: name: is empty",
            r#"a word such as "two-gpu""#,
        ),
        // Types and sizes.
        (
            "truth for a size",
            Replace("\"8GiB\"", "true"),
            r#"machine.toml:17: gpu[1].hbm: is `true`; it has to be a size such as "4GiB", or a number of bytes"#,
            "",
        ),
        (
            "list for a size",
            Replace("\"8GiB\"", "[8]"),
            r#"machine.toml:17: gpu[1].hbm: is a list; it has to be a size such as "4GiB", or a number of bytes"#,
            "",
        ),
        (
            "text for a number",
            Replace("cpu = 1", "cpu = \"1\""),
            r#"machine.toml:19: gpu[1].cpu: is the text "1"; it has to be a whole number from 0 up"#,
            "",
        ),
        (
            "number for text",
            Replace("\"gpu0\"", "0"),
            "machine.toml:22: link[0].from: is `0`; it has to be text in quotation marks",
            "",
        ),
        (
            "number for truth",
            Replace("cpu = 1", "cpu = 1\ngeneric_initiator = 1"),
            "machine.toml:20: gpu[1].generic_initiator: is `1`; it has to be true or false",
            "",
        ),
        (
            "fraction",
            Replace("phys_bits = 40", "phys_bits = 40.5"),
            "machine.toml:30: limits.phys_bits: is `40.5`; it has to be a whole number from 0 up",
            "",
        ),
        (
            "negative number",
            Replace("cpu = 1", "cpu = -1"),
            "machine.toml:19: gpu[1].cpu: is `-1`; it has to be a whole number from 0 up",
            "",
        ),
        (
            "number that is too large",
            Replace("partitions = 2", "partitions = 5000000000"),
            "machine.toml:18: gpu[1].partitions: is `5000000000`; it has to be a whole number from 0 up",
            "the largest is 4294967295",
        ),
        (
            "number beyond 64 bits",
            Replace("\"8GiB\"", "99999999999999999999"),
            r#"machine.toml:17: gpu[1].hbm: is `99999999999999999999`; it has to be a size such as "4GiB", or a number of bytes"#,
            "",
        ),
        (
            "negative size",
            Replace("\"8GiB\"", "-8"),
            "machine.toml:17: gpu[1].hbm: a size cannot be negative: -8",
            "",
        ),
        (
            "decimal unit",
            Replace("\"8GiB\"", "\"8GB\""),
            "machine.toml:17: gpu[1].hbm: `8GB` is not a size: write 4GiB, 512MiB, 64KiB or a number of bytes",
            "",
        ),
        (
            "size beyond 64 bits",
            Replace("\"8GiB\"", "\"16777216TiB\""),
            "machine.toml:17: gpu[1].hbm: `16777216TiB` is more than 64 bits of bytes",
            "",
        ),
        (
            "text in a matrix",
            Replace("cpu_cpu = 20", "matrix = [\n [10, \"a\"],\n]"),
            r#"machine.toml:28: distances.matrix: is the text "a"; it has to be a whole number from 0 up"#,
            "",
        ),
        // CPU nodes.
        (
            "no cpu node",
            Whole("name = \"m\"\n[[gpu]]\nhbm = \"4GiB\"\ncpu = 0\n".to_owned()),
            "machine.toml:1: cpu: the machine has no CPU node",
            "add a table [[cpu]] with cpus and memory",
        ),
        (
            "cpu in two nodes",
            Replace("cpus = 2", "cpus = \"1-2\""),
            "machine.toml:8: cpu[1].cpus: CPU 1 is in cpu[0] already",
            "the first number that no node before has is 2",
        ),
        (
            "cpu twice in a list",
            Replace("cpus = 2", "cpus = \"2-5,4\""),
            "machine.toml:8: cpu[1].cpus: CPU 4 is twice in `2-5,4`",
            "",
        ),
        (
            "cpu missing",
            Replace("cpus = 2", "cpus = \"3-4\""),
            "machine.toml:8: cpu[1].cpus: has CPU 3, but no node has CPU 2",
            "CPUs are numbered from 0 without holes, over all nodes",
        ),
        (
            "bad cpu list",
            Replace("cpus = 2", "cpus = \"2-\""),
            r#"machine.toml:8: cpu[1].cpus: `2-` is not a CPU list: write "0-15,64-79" or a count"#,
            "",
        ),
        (
            "empty cpu list",
            Replace("cpus = 2", "cpus = \"\""),
            r#"machine.toml:8: cpu[1].cpus: `` is not a CPU list: write "0-15,64-79" or a count"#,
            "",
        ),
        (
            "cpu range backwards",
            Replace("cpus = 2", "cpus = \"5-2\""),
            "machine.toml:8: cpu[1].cpus: CPUs 5-2 are not a range within 0-4095",
            "",
        ),
        (
            "cpu number too high",
            Replace("cpus = 2", "cpus = \"4000-5000\""),
            "machine.toml:8: cpu[1].cpus: CPUs 4000-5000 are not a range within 0-4095",
            "",
        ),
        (
            "no cpus",
            Replace("cpus = 2", "cpus = 0"),
            "machine.toml:8: cpu[1].cpus: a node has 1 to 4096 CPUs, not 0",
            "",
        ),
        (
            "too many cpus in all",
            Replace("cpus = 2", "cpus = 4096"),
            "machine.toml:8: cpu[1].cpus: makes 4098 CPUs; q35 has at most 4096",
            "",
        ),
        (
            "zero memory",
            Replace("memory = \"1GiB\"", "memory = 0"),
            "machine.toml:9: cpu[1].memory: 0 bytes is not a positive multiple of 2 MiB",
            "2 MiB would fit",
        ),
        (
            "odd memory",
            Replace("memory = \"1GiB\"", "memory = \"1025KiB\""),
            "machine.toml:9: cpu[1].memory: 1049600 bytes is not a positive multiple of 2 MiB",
            "2 MiB would fit",
        ),
        (
            "memory of all 64 bits",
            Replace("memory = \"1GiB\"", "memory = \"18446744073709551615\""),
            "machine.toml:9: cpu[1].memory: 18446744073709551615 bytes is not a positive multiple of 2 MiB",
            "",
        ),
        (
            "too much memory",
            Replace("memory = \"1GiB\"", "memory = \"64TiB\""),
            "machine.toml:9: cpu[1].memory: brings the machine's RAM to 65537 GiB; at most 64 TiB can be planned",
            "",
        ),
        // GPUs.
        (
            "bad id",
            Replace("id = \"b\"", "id = \"b/c\""),
            "machine.toml:16: gpu[1].id: `b/c` is not a name that can be used for files and objects",
            "1 to 32 letters, digits, - and _, a letter first",
        ),
        (
            "id of digits",
            Replace("id = \"b\"", "id = \"1\""),
            "machine.toml:16: gpu[1].id: `1` is not a name that can be used for files and objects",
            "1 to 32 letters, digits, - and _, a letter first",
        ),
        (
            "id of a cpu",
            Replace("id = \"b\"", "id = \"cpu7\""),
            "machine.toml:16: gpu[1].id: `cpu7` would be mistaken for a CPU node in links",
            "any name but cpu and a number",
        ),
        (
            "id twice",
            Replace("cpu = 0", "cpu = 0\nid = \"b\""),
            "machine.toml:17: gpu[1].id: gpu[0] is named `b` already",
            "",
        ),
        (
            "id is another's default",
            ReplaceAll(&[("cpu = 0", "cpu = 0\nid = \"gpu1\""), ("id = \"b\"", "")]),
            "machine.toml:16: gpu[1].id: is `gpu1` by default, but gpu[0] is named so",
            "give this GPU an id",
        ),
        (
            "zero hbm",
            Replace("\"8GiB\"", "0"),
            "machine.toml:17: gpu[1].hbm: 0 bytes cannot be 2 partitions that are positive multiples of 2 MiB",
            "4 MiB would fit",
        ),
        (
            "odd hbm",
            Replace("\"4GiB\"", "\"4097KiB\""),
            "machine.toml:12: gpu[0].hbm: 4195328 bytes is not a positive multiple of 2 MiB",
            "6 MiB would fit",
        ),
        (
            "hbm does not divide",
            Replace("partitions = 2", "partitions = 3"),
            "machine.toml:17: gpu[1].hbm: 8589934592 bytes cannot be 3 partitions that are positive multiples of 2 MiB",
            "8196 MiB would fit",
        ),
        (
            "hbm of nearly 64 bits",
            Replace("\"4GiB\"", "\"18446744073709551615\""),
            "machine.toml:12: gpu[0].hbm: 18446744073709551615 bytes is not a positive multiple of 2 MiB",
            "",
        ),
        (
            "no partition",
            Replace("partitions = 2", "partitions = 0"),
            "machine.toml:18: gpu[1].partitions: 0 partitions; a GPU has 1 to 8",
            "",
        ),
        (
            "nine partitions",
            Replace("partitions = 2", "partitions = 9"),
            "machine.toml:18: gpu[1].partitions: 9 partitions; a GPU has 1 to 8",
            "",
        ),
        (
            "no such cpu node",
            Replace("cpu = 1", "cpu = 2"),
            "machine.toml:19: gpu[1].cpu: there is no CPU node 2; the machine has 2",
            "they are numbered 0 to 1, in the order of the [[cpu]] tables",
        ),
        (
            "unknown exposure",
            Replace("cpu = 1", "cpu = 1\nexposure = \"hbm\""),
            "machine.toml:20: gpu[1].exposure: `hbm` is not known",
            "it is one of spm, ram, bar, private",
        ),
        (
            "exposure is no text",
            Replace("cpu = 1", "cpu = 1\nexposure = 1"),
            "machine.toml:20: gpu[1].exposure: is 1; it has to be a name in quotation marks",
            "",
        ),
        (
            "pci node offline",
            Replace("cpu = 1", "cpu = 1\npci_node = \"hbm\""),
            "machine.toml:20: gpu[1].pci_node: is `hbm`, but without a Generic Initiator that node is not online when Linux boots",
            r#"set generic_initiator = true, or pci_node = "cpu""#,
        ),
        (
            "bus of the root",
            Replace("cpu = 1", "cpu = 1\nbus = 1"),
            "machine.toml:20: gpu[1].bus: bus 1 is not in 2 to 255",
            "0 is the root bus, and the GPU's expander bridge takes the bus before",
        ),
        (
            "bus too high",
            Replace("cpu = 1", "cpu = 1\nbus = 256"),
            "machine.toml:20: gpu[1].bus: bus 256 is not in 2 to 255",
            "0 is the root bus, and the GPU's expander bridge takes the bus before",
        ),
        (
            "bus of another's bridge",
            ReplaceAll(&BUSES),
            "machine.toml:21: gpu[1].bus: 0x11 needs bus 0x10, which is gpu[0]'s",
            "each GPU takes its bus and the one before, for its expander bridge",
        ),
        (
            "too many gpus",
            gpus(1024),
            "machine.toml:4097: gpu[1023]: is proximity domain 1025, and Linux has at most 1024 nodes (NODES_SHIFT=10)",
            "each CPU node, memory node and HBM partition is one",
        ),
        (
            "too many cpu nodes",
            cpus(1025),
            "machine.toml:3074: cpu[1024]: is proximity domain 1025, and Linux has at most 1024 nodes (NODES_SHIFT=10)",
            "each CPU node, memory node and HBM partition is one",
        ),
        // Links.
        (
            "link to nowhere",
            Replace("to = \"b\"", "to = \"gpu1\""),
            "machine.toml:23: link[0].to: there is no `gpu1`",
            "an end is one of gpu0, b, cpu0 to cpu1",
        ),
        (
            "link to a cpu that is not there",
            Replace("to = \"b\"", "to = \"cpu2\""),
            "machine.toml:23: link[0].to: there is no `cpu2`",
            "an end is one of gpu0, b, cpu0 to cpu1",
        ),
        (
            "link to itself",
            Replace("to = \"b\"", "to = \"gpu0\""),
            "machine.toml:23: link[0].to: joins `gpu0` with itself",
            "",
        ),
        (
            "link of cpus",
            ReplaceAll(&[("to = \"b\"", "to = \"cpu0\""), ("\"gpu0\"", "\"cpu1\"")]),
            "machine.toml:23: link[0].to: joins two CPU nodes; one end has to be a GPU",
            "distances.cpu_cpu says how far CPU nodes are from each other",
        ),
        (
            "link twice",
            Add("[[link]]\nfrom = \"b\"\nto = \"gpu0\"\n"),
            "machine.toml:35: link[1]: link[0] joins `b` and `gpu0` already",
            "links in parallel are one entry with `count`",
        ),
        (
            "no links in parallel",
            Replace("count = 2", "count = 0"),
            "machine.toml:24: link[0].count: 0 links in parallel; 1 to 64 can be",
            "",
        ),
        (
            "too many links in parallel",
            Replace("count = 2", "count = 65"),
            "machine.toml:24: link[0].count: 65 links in parallel; 1 to 64 can be",
            "",
        ),
        (
            "too many links of a gpu",
            many_links,
            "machine.toml:203: link[32]: is one more than the 32 links that `gpu0` can have",
            "",
        ),
        // Distances.
        (
            "distance of a node to itself",
            Replace("cpu_cpu = 20", "cpu_cpu = 10"),
            "machine.toml:27: distances.cpu_cpu: 10 is not a distance between nodes",
            "11 to 254, or 255 for what cannot be reached; Linux ignores a table with others",
        ),
        (
            "distance too large",
            Replace("cpu_cpu = 20", "hbm_hbm = 256"),
            "machine.toml:27: distances.hbm_hbm: 256 is not a distance between nodes",
            "11 to 254, or 255 for what cannot be reached; Linux ignores a table with others",
        ),
        (
            "matrix with too few rows",
            Replace("cpu_cpu = 20", "matrix = [[10]]"),
            "machine.toml:27: distances.matrix: has 1 row(s) for 5 nodes",
            "5 rows of 5: one for each CPU node, memory node and HBM domain, in this order",
        ),
        (
            "matrix with a short row",
            Replace("cpu_cpu = 20", "matrix = [[10, 20], [], [], [], []]"),
            "machine.toml:27: distances.matrix: row 0 has 2 value(s) for 5 nodes",
            "5 rows of 5: one for each CPU node, memory node and HBM domain, in this order",
        ),
        (
            "matrix with a wrong diagonal",
            Replace(
                "cpu_cpu = 20",
                "matrix = [\n [10,20,20,20,20],\n [20,11,20,20,20],\n [20,20,10,20,20],\n [20,20,20,10,20],\n [20,20,20,20,10],\n]",
            ),
            "machine.toml:27: distances.matrix: row 1, column 1 is 11; it has to be 10, a node's distance to itself",
            "",
        ),
        (
            "matrix with 10 beside the diagonal",
            Replace(
                "cpu_cpu = 20",
                "matrix = [[10,20,20,20,10],[20,10,20,20,20],[20,20,10,20,20],[20,20,20,10,20],[20,20,20,20,10]]",
            ),
            "machine.toml:27: distances.matrix: row 0, column 4 is 10; it has to be 11 to 255",
            "",
        ),
        // Addresses.
        (
            "bases overlap",
            ReplaceAll(&OVERLAP),
            "machine.toml:21: gpu[1].base: 0x280000000..0x380000000 overlaps gpu[0]'s 0x200000000..0x300000000",
            "0x380000000 is the first address behind it and placement.gap",
        ),
        (
            "bases too close",
            ReplaceAll(&CLOSE),
            "machine.toml:21: gpu[1].base: 0x340000000..0x440000000 is less than 2 GiB away from gpu[0]'s 0x200000000..0x300000000",
            "0x380000000 is the first address behind it and placement.gap",
        ),
        (
            "base in RAM",
            Replace("cpu = 1", "cpu = 1\nbase = \"2GiB\""),
            "machine.toml:20: gpu[1].base: 0x80000000..0x180000000 is below 0x100000000, where device memory starts",
            r#"RAM and the PCI hole below 4 GiB end there; base = "4GiB" is the lowest that fits"#,
        ),
        (
            "base in the HyperTransport range",
            Replace("cpu = 1", "cpu = 1\nbase = \"1010GiB\""),
            "machine.toml:20: gpu[1].base: 0xfc80000000..0xfd80000000 reaches into the range that AMD's HyperTransport reserves",
            "0xfd00000000..0x10000000000 is not memory; 0x10000000000 is the first address behind it",
        ),
        (
            "machine that moves leaves a base behind",
            ReplaceAll(&[("cpu = 1", "cpu = 1\nbase = \"8GiB\""), ("hbm = \"4GiB\"", "hbm = \"2TiB\"")]),
            "machine.toml:20: gpu[1].base: 0x200000000..0x300000000 is below 0x10000000000, where device memory starts",
            r#"the machine reaches AMD's HyperTransport range, so that RAM above 4 GiB and all HBM go behind it; base = "1TiB" is the lowest that fits"#,
        ),
        (
            "base not aligned",
            Replace("cpu = 1", "cpu = 1\nbase = \"8193KiB\""),
            "machine.toml:20: gpu[1].base: 0x800400 is not a multiple of 2 MiB",
            "10 MiB would fit",
        ),
        (
            "base beyond all addresses",
            Replace("cpu = 1", "cpu = 1\nbase = \"4096TiB\""),
            "machine.toml:20: gpu[1].base: 0x10000000000000..0x10000100000000 is beyond the 52 address bits of x86-64",
            "the last address is 0xfffffffffffff",
        ),
        (
            "base of nearly 64 bits",
            Replace("cpu = 1", "cpu = 1\nbase = \"18446744073707454464\""),
            "machine.toml:20: gpu[1].base: 0xffffffffffe00000..0xffffffffffffffff is beyond the 52 address bits of x86-64",
            "the last address is 0xfffffffffffff",
        ),
        (
            "second partition beyond all addresses",
            Replace("cpu = 1", "cpu = 1\nbase = \"4503595332403200\""),
            "machine.toml:20: gpu[1].base: partition 1 at 0x10000080000000..0x10000180000000 is beyond the 52 address bits of x86-64",
            "the last address is 0xfffffffffffff",
        ),
        (
            "base beyond the address bits",
            Replace("cpu = 1", "cpu = 1\nbase = \"2TiB\""),
            "machine.toml:20: gpu[1].base: RAM, 12 GiB of HBM in 3 range(s) and the PCI window of 32 GiB behind them end at 0x20a80000000, but 40 address bits end at 0x10000000000",
            "limits.phys_bits = 42 would fit",
        ),
        (
            "hbm beyond the address bits",
            Replace("hbm = \"8GiB\"", "hbm = \"1TiB\""),
            "machine.toml:12: gpu[0].hbm: RAM, 1028 GiB of HBM in 3 range(s) and the PCI window of 32 GiB behind them end at 0x20a00000000, but 40 address bits end at 0x10000000000",
            "limits.phys_bits = 42 would fit",
        ),
        (
            "hbm beyond all addresses",
            Replace("hbm = \"4GiB\"", "hbm = \"8192TiB\""),
            "machine.toml:12: gpu[0].hbm: 0x20000000000000 bytes aligned to 0x80000000 do not fit between 0x100000000 and 0x10000000000000; the largest free range there has 0xfff0000000000",
            "less HBM, or a smaller placement.align or placement.gap",
        ),
        (
            "RAM beyond the address bits",
            Replace("memory = \"1GiB\"", "memory = \"2TiB\""),
            "machine.toml:30: limits.phys_bits: RAM, 12 GiB of HBM in 3 range(s) and the PCI window of 32 GiB behind them end at 0x30c00000000, but 40 address bits end at 0x10000000000",
            "limits.phys_bits = 42 would fit",
        ),
        (
            "hbm that no address bits hold",
            Whole("name = \"m\"\n[[cpu]]\ncpus = 1\nmemory = \"1GiB\"\n[[gpu]]\nhbm = \"4193270GiB\"\ncpu = 0\n".to_owned()),
            "machine.toml:6: gpu[0].hbm: RAM, 4193270 GiB of HBM in 1 range(s) and the PCI window of 32 GiB behind them end at 0x10000580000000, but 40 address bits end at 0x10000000000",
            "no x86-64 machine has that many address bits",
        ),
        (
            "too few address bits",
            Replace("phys_bits = 40", "phys_bits = 35"),
            "machine.toml:30: limits.phys_bits: 35 physical address bits; x86-64 has 36 to 52",
            "",
        ),
        (
            "too many address bits",
            Replace("phys_bits = 40", "phys_bits = 53"),
            "machine.toml:30: limits.phys_bits: 53 physical address bits; x86-64 has 36 to 52",
            "",
        ),
        (
            "odd gap",
            Replace("gap = \"2GiB\"", "gap = \"3MiB\""),
            "machine.toml:34: placement.gap: 3 MiB is not a multiple of 2 MiB up to 64 TiB",
            "2GiB is the default; 0 puts ranges side by side, which OVMF merges",
        ),
        (
            "huge gap",
            Replace("gap = \"2GiB\"", "gap = \"65TiB\""),
            "machine.toml:34: placement.gap: 65 TiB is not a multiple of 2 MiB up to 64 TiB",
            "2GiB is the default; 0 puts ranges side by side, which OVMF merges",
        ),
        (
            "align is no power of two",
            Replace("align = \"2GiB\"", "align = \"3GiB\""),
            "machine.toml:33: placement.align: 3 GiB is not a power of two from 2 MiB up",
            "2GiB is the default, and satisfies every rule of Linux",
        ),
        (
            "align too small",
            Replace("align = \"2GiB\"", "align = \"1MiB\""),
            "machine.toml:33: placement.align: 1 MiB is not a power of two from 2 MiB up",
            "2GiB is the default, and satisfies every rule of Linux",
        ),
        (
            "align too large",
            Replace("align = \"2GiB\"", "align = \"8388608TiB\""),
            "machine.toml:17: gpu[1].hbm: 0x100000000 bytes aligned to 0x8000000000000000 do not fit between 0x200000000 and 0x10000000000000; the largest free range there has 0xfff0000000000",
            "less HBM, or a smaller placement.align or placement.gap",
        ),
    ]
}

/// Rows of what exposures, memory nodes, holes and backing add.
#[allow(clippy::too_many_lines, reason = "a table")]
fn exposure_rows() -> Vec<(&'static str, Spoil, &'static str, &'static str)> {
    let with = |text: &'static str| Replace("cpu = 1", text);
    vec![
        (
            "a CPU node without memory",
            Replace("cpus = 2\nmemory = \"1GiB\"", "cpus = 2"),
            "machine.toml:7: cpu[1].memory: is not given, and no GPU with exposure `ram` brings the node's memory",
            r#"memory = "1GiB", or a GPU with exposure = "ram" and cpu = 1"#,
        ),
        (
            "base of HBM in a BAR",
            with("cpu = 1\nexposure = \"bar\"\nbase = \"64GiB\""),
            "machine.toml:21: gpu[1].base: is for exposure `spm`, and this is `bar`",
            "leave base out, or change gpu[1].exposure",
        ),
        (
            "base of HBM that is RAM",
            with("cpu = 1\nexposure = \"ram\"\nbase = \"64GiB\""),
            "machine.toml:21: gpu[1].base: is for exposure `spm`, and this is `ram`",
            "leave base out, or change gpu[1].exposure",
        ),
        (
            "partitions of HBM that is RAM",
            with("cpu = 1\nexposure = \"ram\""),
            "machine.toml:18: gpu[1].partitions: 2 partitions of HBM that is a CPU node's RAM",
            "describe each partition as a CPU node with a GPU of its own",
        ),
        (
            "domains of soft-reserved HBM",
            with("cpu = 1\ndomains = 8"),
            "machine.toml:20: gpu[1].domains: is for exposure `bar`, and this is `spm`",
            "leave domains out, or change gpu[1].exposure",
        ),
        (
            "fewer domains than partitions",
            with("cpu = 1\nexposure = \"bar\"\ndomains = 1"),
            "machine.toml:21: gpu[1].domains: 1 domain(s); a GPU with 2 partition(s) has 2 to 8",
            "",
        ),
        (
            "more domains than there can be",
            with("cpu = 1\nexposure = \"bar\"\ndomains = 9"),
            "machine.toml:21: gpu[1].domains: 9 domain(s); a GPU with 2 partition(s) has 2 to 8",
            "",
        ),
        (
            "domains that nobody names",
            with("cpu = 1\nexposure = \"bar\"\ngeneric_initiator = false"),
            "machine.toml:21: gpu[1].generic_initiator: is false, but domains without memory are in no table then, and Linux has no node for them",
            "leave generic_initiator out",
        ),
        (
            "initiator of no domain",
            with("cpu = 1\nexposure = \"private\"\ngeneric_initiator = true"),
            "machine.toml:21: gpu[1].generic_initiator: is for exposure `spm` and `bar`, and this is `private`",
            "leave generic_initiator out, or change gpu[1].exposure",
        ),
        (
            "function on the node of HBM that has none",
            with("cpu = 1\nexposure = \"private\"\npci_node = \"hbm\""),
            "machine.toml:21: gpu[1].pci_node: is `hbm`, but HBM with exposure `private` has no node of its own",
            r#"pci_node = "cpu""#,
        ),
        (
            "aperture of soft-reserved HBM",
            with("cpu = 1\naperture = \"8GiB\""),
            "machine.toml:20: gpu[1].aperture: is for exposure `bar` and `private`, and this is `spm`",
            "leave aperture out, or change gpu[1].exposure",
        ),
        (
            "aperture smaller than the HBM",
            with("cpu = 1\nexposure = \"bar\"\naperture = \"4GiB\""),
            "machine.toml:21: gpu[1].aperture: 4 GiB is not a power of two from 8 GiB, the HBM, to 8 TiB",
            "8 GiB would fit",
        ),
        (
            "aperture that is no power of two",
            with("cpu = 1\nexposure = \"private\"\naperture = \"12GiB\""),
            "machine.toml:21: gpu[1].aperture: 12 GiB is not a power of two from 8 GiB, the HBM, to 8 TiB",
            "8 GiB would fit",
        ),
        (
            "HBM that no BAR holds",
            ReplaceAll(&[
                ("cpu = 1", "cpu = 1\nexposure = \"private\""),
                ("8GiB", "10TiB"),
            ]),
            "machine.toml:17: gpu[1].hbm: needs an aperture of 16 TiB; a BAR of at most 8 TiB can be planned",
            "",
        ),
        (
            "host node of HBM in a BAR",
            with("cpu = 1\nexposure = \"bar\"\nhost_node = 0"),
            "machine.toml:21: gpu[1].host_node: is for exposure `spm`, and this is `bar`",
            "leave host_node out, or change gpu[1].exposure",
        ),
        (
            "host node that cannot be",
            with("cpu = 1\nhost_node = 1024"),
            "machine.toml:20: gpu[1].host_node: there is no host node 1024; Linux has at most 1024",
            "",
        ),
        (
            "memory node next to nothing",
            Add("[[memory]]\nmemory = \"1GiB\"\ncpu = 2\n"),
            "machine.toml:37: memory[0].cpu: there is no CPU node 2; the machine has 2",
            "they are numbered 0 to 1, in the order of the [[cpu]] tables",
        ),
        (
            "memory node without memory",
            Add("[[memory]]\nmemory = 0\ncpu = 1\n"),
            "machine.toml:36: memory[0].memory: 0 bytes is not a positive multiple of 2 MiB",
            "2 MiB would fit",
        ),
        (
            "memory node without a CPU node",
            Add("[[memory]]\nmemory = \"1GiB\"\n"),
            "machine.toml:35: memory[0]: `cpu` is missing",
            "a [[memory]] table needs memory and cpu",
        ),
        (
            "more RAM than can be, with HBM",
            ReplaceAll(&[
                ("cpu = 0", "cpu = 0\nexposure = \"ram\""),
                ("4GiB", "64TiB"),
            ]),
            "machine.toml:12: gpu[0].hbm: brings the machine's RAM to 65538 GiB; at most 64 TiB can be planned",
            "",
        ),
        (
            "PCI hole that leaves no RAM",
            Replace("phys_bits = 40", "phys_bits = 40\npci_hole = \"128MiB\""),
            "machine.toml:31: limits.pci_hole: 128 MiB is not a multiple of 2 MiB from 256 MiB to 2816 MiB",
            "the hole ends at 4 GiB; RAM that it displaces goes above that",
        ),
        (
            "PCI hole that is none",
            Replace("phys_bits = 40", "phys_bits = 40\npci_hole = \"4GiB\""),
            "machine.toml:31: limits.pci_hole: 4 GiB is not a multiple of 2 MiB from 256 MiB to 2816 MiB",
            "the hole ends at 4 GiB; RAM that it displaces goes above that",
        ),
        (
            "64-bit PCI hole of odd size",
            Replace("phys_bits = 40", "phys_bits = 40\npci_hole64 = \"512MiB\""),
            "machine.toml:31: limits.pci_hole64: 512 MiB is not a multiple of 1 GiB up to 512 TiB",
            "",
        ),
        (
            "64-bit PCI hole that does not hold the apertures",
            ReplaceAll(&[
                ("cpu = 1", "cpu = 1\nexposure = \"bar\""),
                ("phys_bits = 40", "phys_bits = 40\npci_hole64 = \"16GiB\""),
            ]),
            "machine.toml:32: limits.pci_hole64: 16 GiB does not hold 1 HBM aperture(s), each aligned to its size",
            "48 GiB would fit",
        ),
        (
            "apertures beyond the address bits",
            ReplaceAll(&[
                ("cpu = 1", "cpu = 1\nexposure = \"private\""),
                ("8GiB", "600GiB"),
            ]),
            "machine.toml:31: limits.phys_bits: RAM, 4 GiB of HBM in 1 range(s) and the PCI window of 2080 GiB behind them end at 0x30900000000, but 40 address bits end at 0x10000000000",
            "limits.phys_bits = 42 would fit",
        ),
        (
            "vendor id of an empty slot",
            Add("[device]\nvendor = 0xffff\n"),
            "machine.toml:36: device.vendor: 0xffff is what a slot without a device answers",
            "",
        ),
        (
            "class code of four bytes",
            Add("[device]\nclass = 0x1200_0000\n"),
            "machine.toml:36: device.class: 0x12000000 has more than three bytes",
            "0x120000 is a processing accelerator",
        ),
        (
            "more queues than registers",
            Add("[device]\nqueues = 9\n"),
            "machine.toml:36: device.queues: 9 copy queues; a GPU has 1 to 8",
            "",
        ),
        (
            "mode of timing",
            Add("[device]\ntiming = \"slow\"\n"),
            "machine.toml:36: device.timing: `slow` is not known",
            "it is one of off, modelled, paced",
        ),
        (
            "kind of backing",
            Add("[backing]\nkind = \"disk\"\n"),
            "machine.toml:36: backing.kind: `disk` is not known",
            "it is one of memfd, hugetlb, file",
        ),
        (
            "directory of memory files",
            Add("[backing]\ndirectory = \"/dev/shm\"\n"),
            "machine.toml:36: backing.directory: is for kind `file` only",
            r#"kind = "file", or leave directory out"#,
        ),
        (
            "empty directory",
            Add("[backing]\nkind = \"file\"\ndirectory = \"\"\n"),
            "machine.toml:37: backing.directory: is empty",
            r#"a directory such as "/dev/shm""#,
        ),
        (
            "page of memory files",
            Add("[backing]\npage = \"2MiB\"\n"),
            "machine.toml:36: backing.page: is for kind `hugetlb` only",
            r#"kind = "hugetlb", or leave page out"#,
        ),
        (
            "page that no processor has",
            Add("[backing]\nkind = \"hugetlb\"\npage = \"4MiB\"\n"),
            "machine.toml:37: backing.page: 4 MiB is not a huge page of x86-64",
            "2MiB or 1GiB",
        ),
        (
            "HBM that is not whole huge pages",
            ReplaceAll(&[
                (
                    "gap = \"2GiB\"",
                    "gap = \"2GiB\"\n[backing]\nkind = \"hugetlb\"\npage = \"1GiB\"",
                ),
                ("8GiB", "3GiB"),
            ]),
            "machine.toml:17: gpu[1].hbm: partitions of 1536 MiB are not made of huge pages of 1 GiB",
            "4 GiB would fit",
        ),
    ]
}
