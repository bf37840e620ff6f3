//! Sizes in bytes, written as `4GiB` or as an integer.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, Visitor};
use serde::{Serialize, Serializer};

/// A size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Size(pub u64);

/// 1 KiB.
pub const KIB: u64 = 1 << 10;
/// 1 MiB.
pub const MIB: u64 = 1 << 20;
/// 1 GiB.
pub const GIB: u64 = 1 << 30;
/// 1 TiB.
pub const TIB: u64 = 1 << 40;

const UNITS: [(&str, u64); 5] = [
    ("TiB", TIB),
    ("GiB", GIB),
    ("MiB", MIB),
    ("KiB", KIB),
    ("B", 1),
];

impl Size {
    /// Parses `4GiB`, `512 MiB`, `65536` or `65536B`.
    ///
    /// # Errors
    /// A sentence that says what is not understood.
    pub fn parse(text: &str) -> Result<Size, String> {
        let text = text.trim();
        let (digits, unit) = UNITS
            .iter()
            .find_map(|(name, unit)| {
                text.strip_suffix(name)
                    .map(|digits| (digits.trim_end(), *unit))
            })
            .unwrap_or((text, 1));
        let count: u64 = digits.parse().map_err(|_| {
            format!("`{text}` is not a size: write 4GiB, 512MiB, 64KiB or a number of bytes")
        })?;
        count
            .checked_mul(unit)
            .map(Size)
            .ok_or_else(|| format!("`{text}` is more than 64 bits of bytes"))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, unit) in UNITS {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{} {name}", self.0 / unit);
            }
        }
        write!(f, "{} B", self.0)
    }
}

impl Serialize for Size {
    /// As a description has it: `2GiB`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_string().replace(' ', ""))
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as \"4GiB\", or a number of bytes")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Size, E> {
                Size::parse(text).map_err(E::custom)
            }
            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<Size, E> {
                Ok(Size(bytes))
            }
            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<Size, E> {
                u64::try_from(bytes)
                    .map(Size)
                    .map_err(|_| E::custom(format!("a size cannot be negative: {bytes}")))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print_alike() {
        for (text, bytes) in [
            ("4GiB", 4 * GIB),
            ("512 MiB", 512 * MIB),
            ("65535", 65535),
            ("2TiB", 2 * TIB),
        ] {
            assert_eq!(Size::parse(text), Ok(Size(bytes)));
        }
        assert_eq!(Size(3 * GIB / 2).to_string(), "1536 MiB");
        assert_eq!(Size(0).to_string(), "0 B");
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "4GB", "-1", "1.5GiB", "99999999TiB", "GiB"] {
            assert!(Size::parse(text).is_err(), "{text}");
        }
    }
}
