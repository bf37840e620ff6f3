//! Rust files: where unsafe code is, how long files are, what they are called, what is left undone.

use std::path::Path;
use std::str::FromStr;

use proc_macro2::{TokenStream, TokenTree};

use super::Finding;

/// The room of the host's system calls.
const UNSAFE_ROOM: &str = "vmm-glue/src/sys/";

/// How a file of a test harness says that it holds unsafe code.
const UNSAFE_LICENCE: &str = "#![allow(unsafe_code";

/// Lines that a file may have before its tests.
const MAX_LINES: usize = 600;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 5] = ["util", "utils", "common", "helper", "helpers"];

/// Macros that stand for code to be written.
const UNDONE: [&str; 2] = ["todo", "unimplemented"];

/// Checks one file of Rust.
pub fn check(file: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(name(file));
    findings.extend(length(file, text));
    match TokenStream::from_str(text) {
        Ok(tokens) => {
            let mut code = Code {
                file,
                may_be_unsafe: may_be_unsafe(file, text),
                findings: &mut findings,
            };
            code.look(tokens);
        }
        Err(error) => findings.push(Finding::new(
            file,
            error.span().start().line,
            format!("cannot be read as Rust: {error}"),
        )),
    }
    findings
}

/// Whether unsafe code may be in a file.
fn may_be_unsafe(file: &str, text: &str) -> bool {
    let in_tests = Path::new(file)
        .parent()
        .is_some_and(|dir| dir.iter().any(|part| part == "tests"));
    let licensed = text
        .lines()
        .any(|line| line.trim_start().starts_with(UNSAFE_LICENCE));
    file.starts_with(UNSAFE_ROOM) || (in_tests && licensed)
}

/// A name of the file or of a directory on the way to it that says nothing.
fn name(file: &str) -> Option<Finding> {
    let path = Path::new(file);
    let stem = path.file_stem().into_iter();
    let dirs = path.parent().into_iter().flat_map(Path::iter);
    let found = stem
        .chain(dirs)
        .filter_map(|part| part.to_str())
        .find(|part| EMPTY_NAMES.contains(part))?;
    Some(Finding::new(file, 1, empty_name(found)))
}

fn empty_name(name: &str) -> String {
    format!("`{name}` says nothing: name it by what is inside")
}

/// A file that is too long. Files of integration tests, which are tests from the first line on, are not looked at.
fn length(file: &str, text: &str) -> Option<Finding> {
    if file.split('/').rev().nth(1) == Some("tests") {
        return None;
    }
    let lines: Vec<&str> = text.lines().collect();
    // A module of tests that is in another file does not end this one.
    let tests = lines.windows(2).position(|pair| {
        matches!(pair, [attribute, module]
            if *attribute == "#[cfg(test)]" && module.contains("mod ") && module.ends_with('{'))
    });
    let length = tests.unwrap_or(lines.len());
    (length > MAX_LINES).then(|| {
        let what = format!("{length} lines before the tests, at most {MAX_LINES}: divide it");
        Finding::new(file, MAX_LINES + 1, what)
    })
}

/// A walk over the tokens of a file, in which comments and strings are not mistaken for code.
struct Code<'a> {
    file: &'a str,
    may_be_unsafe: bool,
    findings: &'a mut Vec<Finding>,
}

impl Code<'_> {
    fn look(&mut self, tokens: TokenStream) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        for (index, token) in tokens.iter().enumerate() {
            let next = tokens.get(index + 1);
            match token {
                TokenTree::Group(group) => self.look(group.stream()),
                TokenTree::Ident(word) => {
                    let line = word.span().start().line;
                    if let Some(what) = self.judge(&word.to_string(), next) {
                        self.findings.push(Finding::new(self.file, line, what));
                    }
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {}
            }
        }
    }

    /// What is wrong with a word before `next`.
    fn judge(&self, word: &str, next: Option<&TokenTree>) -> Option<String> {
        match next {
            _ if word == "unsafe" && !self.may_be_unsafe => Some(format!(
                "unsafe code outside its room: put it into {UNSAFE_ROOM}, or, in a test harness, \
                 into a file that says `{UNSAFE_LICENCE}, reason = ..)]`"
            )),
            Some(TokenTree::Punct(mark)) if mark.as_char() == '!' && UNDONE.contains(&word) => {
                Some(format!("`{word}!` is left: write the code"))
            }
            Some(TokenTree::Ident(name)) if word == "mod" => {
                let name = name.to_string();
                EMPTY_NAMES
                    .contains(&name.as_str())
                    .then(|| empty_name(&name))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: [usize; 0] = [];

    /// Lines of the findings in a file.
    fn lines(file: &str, text: &str) -> Vec<usize> {
        check(file, text)
            .iter()
            .map(|finding| finding.line)
            .collect()
    }

    #[test]
    fn unsafe_code_is_found_outside_its_room() {
        let text = "// unsafe\nfn f() {\n    let s = \"unsafe\";\n    unsafe { g() }\n}\n";
        assert_eq!(lines("devices/src/gpu.rs", text), [4]);
        assert_eq!(lines("vmm-glue/src/sys/child.rs", text), NONE);
        assert_eq!(lines("tests/agent/src/sys.rs", text), [4]);
        let licensed = format!("#![allow(unsafe_code, reason = \"mmap\")]\n{text}");
        assert_eq!(lines("tests/agent/src/sys.rs", &licensed), NONE);
        assert_eq!(lines("vmm-glue/tests/vfio_user/raw.rs", &licensed), NONE);
        assert_eq!(lines("vmm-glue/src/hbm.rs", &licensed), [5]);
    }

    #[test]
    fn a_file_is_too_long_by_what_comes_before_its_tests() {
        let long = "// line\n".repeat(MAX_LINES);
        assert_eq!(lines("a.rs", &long), NONE);
        assert_eq!(lines("a.rs", &format!("{long}//\n")), [MAX_LINES + 1]);
        let tests = format!("{long}#[cfg(test)]\nmod tests {{\n}}\n{long}");
        assert_eq!(lines("a.rs", &tests), NONE);
        let elsewhere = format!("#[cfg(test)]\nmod tests;\n{long}");
        assert_eq!(lines("a.rs", &elsewhere), [MAX_LINES + 1]);
    }

    #[test]
    fn names_that_say_nothing_are_found() {
        assert_eq!(lines("devices/src/util.rs", ""), [1]);
        assert_eq!(lines("tests/common/mod.rs", ""), [1]);
        assert_eq!(lines("a.rs", "mod gpu;\nmod helpers {}\n"), [2]);
        assert_eq!(lines("devices/src/utility_meter.rs", ""), NONE);
    }

    #[test]
    fn what_is_left_undone_is_found() {
        let text = "fn f() {\n    todo!()\n}\nfn g() { unimplemented!(\"x\") }\n// todo!()\n";
        assert_eq!(lines("a.rs", text), [2, 4]);
    }

    #[test]
    fn what_is_no_rust_is_found() {
        assert_eq!(lines("a.rs", "fn f() {\n"), [1]);
    }
}
