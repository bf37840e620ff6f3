//! Bytes of the fuzzer in, actions out; and back, so that seeds are written as actions.
//!
//! An input is a sequence of records: one byte for the kind of action, then its fields, little-endian, without
//! padding. So a mutation of a byte changes one field, and a cut between records is a shorter sequence.

use arbitrary::{Arbitrary, Result, Unstructured};

/// Actions of one input that are looked at; what follows is ignored, so that no input takes long.
pub const MAX_ACTIONS: usize = 128;

/// The way back of [`Arbitrary`].
pub trait Encode {
    /// Appends the bytes that decode to this.
    fn encode(&self, bytes: &mut Vec<u8>);
}

macro_rules! integers {
    ($($name:ty),*) => {
        $(impl Encode for $name {
            fn encode(&self, bytes: &mut Vec<u8>) {
                bytes.extend(self.to_le_bytes());
            }
        })*
    };
}

integers!(u8, u16, u32, u64, i16);

impl Encode for bool {
    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.push(u8::from(*self));
    }
}

/// A place near an interesting one: `spot` picks from the target's list, `by` is added.
#[derive(Clone, Copy, Debug, Arbitrary, PartialEq, Eq)]
pub struct Near {
    /// Index in the list, modulo its length.
    pub spot: u8,
    /// Bytes after it, or before.
    pub by: i16,
}

impl Near {
    /// The place, wrapped around the end of the address space.
    pub fn among(self, spots: &[u64]) -> u64 {
        spots[usize::from(self.spot) % spots.len()].wrapping_add_signed(self.by.into())
    }
}

impl Encode for Near {
    fn encode(&self, bytes: &mut Vec<u8>) {
        self.spot.encode(bytes);
        self.by.encode(bytes);
    }
}

/// Declares the actions of a target with both ways of their encoding.
macro_rules! actions {
    ($(#[$doc:meta])* pub enum $name:ident {
        $($(#[$kind_doc:meta])* $kind:ident { $($field:ident: $type:ty),* $(,)? },)*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "fields are named as what they are")]
        pub enum $name { $($(#[$kind_doc])* $kind { $($field: $type),* },)* }

        const _: () = {
            use $crate::input::Encode;
            use arbitrary::{Arbitrary, Result, Unstructured};

            #[derive(Clone, Copy)]
            enum Kind { $($kind),* }
            const KINDS: &[Kind] = &[$(Kind::$kind),*];

            impl<'a> Arbitrary<'a> for $name {
                fn arbitrary(from: &mut Unstructured<'a>) -> Result<$name> {
                    let number = usize::from(u8::arbitrary(from)?);
                    Ok(match KINDS[number % KINDS.len()] {
                        $(Kind::$kind => $name::$kind { $($field: Arbitrary::arbitrary(from)?),* },)*
                    })
                }
            }

            impl Encode for $name {
                fn encode(&self, bytes: &mut Vec<u8>) {
                    match self {
                        $($name::$kind { $($field),* } => {
                            bytes.push(Kind::$kind as u8);
                            $($field.encode(bytes);)*
                        })*
                    }
                }
            }
        };
    };
}
pub(crate) use actions;

/// The actions of an input, at most [`MAX_ACTIONS`].
pub fn decode<'a, A: Arbitrary<'a>>(bytes: &'a [u8]) -> Vec<A> {
    let mut from = Unstructured::new(bytes);
    let rest = std::iter::from_fn(|| next(&mut from).ok().flatten());
    rest.take(MAX_ACTIONS).collect()
}

/// The next action; none where the bytes end.
fn next<'a, A: Arbitrary<'a>>(from: &mut Unstructured<'a>) -> Result<Option<A>> {
    if from.is_empty() {
        return Ok(None);
    }
    A::arbitrary(from).map(Some)
}

/// The input that decodes to these actions.
pub fn encode<A: Encode>(actions: &[A]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for action in actions {
        action.encode(&mut bytes);
    }
    bytes
}

/// `len` bytes that repeat those of `value`.
pub fn bytes_of(value: u64, len: u8) -> Vec<u8> {
    let pattern = value.to_le_bytes();
    pattern
        .into_iter()
        .cycle()
        .take(usize::from(len % 65))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    actions! {
        /// Of every type of field.
        pub enum Action {
            /// Empty.
            Stop {},
            /// Full.
            Go { at: Near, byte: u8, half: u16, word: u32, wide: u64, flag: bool },
        }
    }

    fn go(flag: bool) -> Action {
        Action::Go {
            at: Near { spot: 3, by: -2 },
            byte: 1,
            half: 0x0203,
            word: 0x0405_0607,
            wide: u64::MAX - 7,
            flag,
        }
    }

    #[test]
    fn what_is_encoded_decodes() {
        let actions = [go(true), Action::Stop {}, go(false), Action::Stop {}];
        let bytes = encode(&actions);
        assert_eq!(bytes.len(), 2 * 20 + 2);
        assert_eq!(decode::<Action>(&bytes), actions);
    }

    #[test]
    fn a_cut_input_keeps_what_came_before() {
        let bytes = encode(&[Action::Stop {}, go(true)]);
        for end in 1..bytes.len() {
            assert_eq!(decode::<Action>(&bytes[..end])[0], Action::Stop {});
        }
        assert_eq!(decode::<Action>(&[0; 1000]).len(), MAX_ACTIONS);
    }
}
