//! The doc comments of a file, by the path of what they stand on.
//!
//! Numbers of a page come from compiled tables; what an enum's variant or a flag means stands only
//! in its doc comment.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Words before the name of what a comment stands on.
const KEYWORDS: [&str; 7] = ["pub", "const", "enum", "struct", "mod", "fn", "static"];

/// Doc comments by path, such as `BootState::Ready`.
pub struct Comments(BTreeMap<String, String>);

impl Comments {
    /// Finds those of a file, within macros too.
    pub fn read(text: &str) -> Result<Self> {
        let tokens = TokenStream::from_str(text).map_err(|error| anyhow!("{error}"))?;
        let mut found = BTreeMap::new();
        collect(tokens, "", &mut found);
        Ok(Self(found))
    }

    /// What stands on `path`, as one line.
    pub fn on(&self, path: &str) -> Result<&str> {
        let text = self.0.get(path).map(String::as_str);
        text.with_context(|| format!("no doc comment on {path}"))
    }
}

/// Adds the comments in `tokens`, which are within `outer`.
fn collect(tokens: TokenStream, outer: &str, found: &mut BTreeMap<String, String>) {
    let mut tokens = tokens.into_iter().peekable();
    // The comment read last, and the item that is being read.
    let (mut comment, mut item) = (String::new(), None::<String>);
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(mark) if mark.as_char() == '#' => {
                if let Some(TokenTree::Group(group)) = tokens.peek()
                    && group.delimiter() == Delimiter::Bracket
                {
                    comment += &doc_line(group.stream()).unwrap_or_default();
                    tokens.next();
                }
            }
            TokenTree::Punct(mark) if ";,".contains(mark.as_char()) => item = None,
            TokenTree::Ident(word) if item.is_none() => {
                let word = word.to_string();
                if !KEYWORDS.contains(&word.as_str()) {
                    let path = match outer {
                        "" => word,
                        outer => format!("{outer}::{word}"),
                    };
                    if !comment.is_empty() {
                        let text = std::mem::take(&mut comment);
                        found.insert(path.clone(), plain(text.trim()));
                        item = Some(path);
                    }
                }
            }
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                collect(group.stream(), item.as_deref().unwrap_or(outer), found);
                item = None;
            }
            _ => {}
        }
    }
}

/// The text of `doc = "text"`.
fn doc_line(attribute: TokenStream) -> Option<String> {
    let mut tokens = attribute.into_iter();
    let name = tokens.next()?;
    let text = tokens.nth(1)?;
    (name.to_string() == "doc").then(|| {
        let text = text.to_string();
        let text = text.trim_start_matches('r').trim_matches(['#', '"']);
        text.replace("\\\"", "\"").replace("\\'", "'")
    })
}

/// A comment outside of rustdoc: links within the code become the names they show.
fn plain(comment: &str) -> String {
    let mut text = String::new();
    let mut rest = comment;
    while let Some((before, after)) = rest.split_once("[`") {
        let Some((name, after)) = after.split_once("`]") else {
            break;
        };
        let name = name.rsplit("::").next().unwrap_or(name);
        text += &format!("{before}`{name}`");
        rest = after;
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_found_in_macros_and_modules() {
        let text = "
            //! File.
            /// Some number.
            pub const N: u32 = 1;
            codes! {
                /// The states.
                #[derive(Clone)]
                State {
                    /// Does \"nothing\"; see [`crate::regs::N`],
                    /// and wait.
                    Idle = 0,
                    Bare = 1,
                }
            }
            bitflags! { /// Bits.
                pub struct Bits: u32 { /// One bit.
                const ONE = 1 << 0; } }
            /// A block.
            pub mod block { use super::*; /// A register.
                pub const REG: u32 = 4; }";
        let comments = Comments::read(text).unwrap();
        assert_eq!(comments.on("N").unwrap(), "Some number.");
        assert_eq!(comments.on("State").unwrap(), "The states.");
        assert_eq!(
            comments.on("State::Idle").unwrap(),
            "Does \"nothing\"; see `N`, and wait."
        );
        assert_eq!(comments.on("block::REG").unwrap(), "A register.");
        assert!(comments.on("State::Bare").is_err());
        assert_eq!(comments.on("Bits::ONE").unwrap(), "One bit.");
    }
}
