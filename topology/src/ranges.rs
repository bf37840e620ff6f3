//! A range allocator that knows no policy.
//!
//! It holds free address space. What is reserved or placed is taken out of it, lowest address first. It never moves
//! what it has placed, so the same calls give the same addresses.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A range of guest physical addresses.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Range {
    /// First address.
    pub base: u64,
    /// Bytes, never 0 in a plan.
    pub size: u64,
}

impl Range {
    /// First address behind the range.
    pub const fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// Whether the two share an address.
    pub const fn overlaps(&self, other: &Range) -> bool {
        self.base < other.end() && other.base < self.end()
    }

    /// Whether every address of `other` is in this range.
    pub const fn contains(&self, other: &Range) -> bool {
        self.base <= other.base && other.end() <= self.end()
    }
}

/// A request that does not fit.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{size:#x} bytes aligned to {align:#x} do not fit between {from:#x} and {to:#x}; the largest free range there has {largest:#x}"
)]
pub struct NoRoom {
    /// Bytes asked for.
    pub size: u64,
    /// Alignment asked for.
    pub align: u64,
    /// Lowest address asked for.
    pub from: u64,
    /// End of the address space.
    pub to: u64,
    /// Bytes of the largest free range at or above `from`.
    pub largest: u64,
}

/// Free address space.
#[derive(Clone, Debug)]
pub struct Space {
    free: Vec<Range>,
    end: u64,
}

impl Space {
    /// Address space from 0 to `end`, all free.
    pub fn new(end: u64) -> Space {
        Space {
            free: vec![Range { base: 0, size: end }],
            end,
        }
    }

    /// Whether all of `range` is free.
    pub fn is_free(&self, range: Range) -> bool {
        let piece = self.free.get(self.first_behind(range.base));
        piece.is_some_and(|piece| piece.contains(&range))
    }

    /// Index of the first free piece that ends behind `address`; pieces ascend.
    fn first_behind(&self, address: u64) -> usize {
        self.free.partition_point(|piece| piece.end() <= address)
    }

    /// Takes `range` out of the free space, free or not.
    pub fn reserve(&mut self, range: Range) {
        let first = self.first_behind(range.base);
        let touched = self.free.iter().skip(first);
        let touched = touched.take_while(|piece| piece.base < range.end()).count();
        let mut left = Vec::new();
        for piece in self.free.iter().skip(first).take(touched) {
            let below = Range {
                base: piece.base,
                size: range.base.clamp(piece.base, piece.end()) - piece.base,
            };
            let above_base = range.end().clamp(piece.base, piece.end());
            let above = Range {
                base: above_base,
                size: piece.end() - above_base,
            };
            left.extend([below, above].into_iter().filter(|part| part.size > 0));
        }
        self.free.splice(first..first + touched, left);
    }

    /// Places `size` bytes at the lowest free address that is a multiple of `align` and not under `from`.
    ///
    /// # Errors
    /// [`NoRoom`] with the numbers.
    pub fn place(&mut self, size: u64, align: u64, from: u64) -> Result<Range, NoRoom> {
        let align = align.max(1);
        let mut largest = 0;
        for piece in self.free.iter().skip(self.first_behind(from)) {
            let lowest = piece.base.max(from);
            largest = largest.max(piece.end().saturating_sub(lowest));
            let Some(base) = lowest.checked_next_multiple_of(align) else {
                continue;
            };
            if base.checked_add(size).is_some_and(|end| end <= piece.end()) {
                let range = Range { base, size };
                self.reserve(range);
                return Ok(range);
            }
        }
        Err(NoRoom {
            size,
            align,
            from,
            to: self.end,
            largest,
        })
    }

    /// Places `size` bytes in as many pieces as holes make necessary, lowest addresses first, none under `from`.
    ///
    /// # Errors
    /// [`NoRoom`] if the free space is smaller.
    pub fn fill(&mut self, size: u64, from: u64) -> Result<Vec<Range>, NoRoom> {
        let mut left = size;
        let mut pieces = Vec::new();
        for piece in &self.free {
            let base = piece.base.max(from);
            let take = piece.end().saturating_sub(base).min(left);
            if take > 0 {
                pieces.push(Range { base, size: take });
                left -= take;
            }
        }
        if left > 0 {
            let largest = pieces.iter().map(|piece| piece.size).max().unwrap_or(0);
            return Err(NoRoom {
                size,
                align: 1,
                from,
                to: self.end,
                largest,
            });
        }
        for piece in &pieces {
            self.reserve(*piece);
        }
        Ok(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_at_the_lowest_aligned_address() {
        let mut space = Space::new(0x10000);
        space.reserve(Range {
            base: 0,
            size: 0x1001,
        });
        assert_eq!(
            space.place(0x100, 0x1000, 0),
            Ok(Range {
                base: 0x2000,
                size: 0x100
            })
        );
        assert_eq!(
            space.place(0x100, 0x100, 0),
            Ok(Range {
                base: 0x1100,
                size: 0x100
            })
        );
        assert_eq!(
            space.place(0x100, 0x1000, 0x2001),
            Ok(Range {
                base: 0x3000,
                size: 0x100
            })
        );
    }

    #[test]
    fn fill_lays_memory_around_holes() {
        let mut space = Space::new(0x10000);
        space.reserve(Range {
            base: 0x1000,
            size: 0x1000,
        });
        assert_eq!(
            space.fill(0x2000, 0),
            Ok(vec![
                Range {
                    base: 0,
                    size: 0x1000
                },
                Range {
                    base: 0x2000,
                    size: 0x1000
                }
            ])
        );
        assert_eq!(
            space.place(0x1000, 1, 0),
            Ok(Range {
                base: 0x3000,
                size: 0x1000
            })
        );
    }

    #[test]
    fn no_room_says_the_largest_free_range() {
        let mut space = Space::new(0x3000);
        space.reserve(Range {
            base: 0x1000,
            size: 0x1000,
        });
        let refused = space.place(0x2000, 0x1000, 0).unwrap_err();
        assert_eq!((refused.largest, refused.to), (0x1000, 0x3000));
        assert!(space.fill(0x2001, 0).is_err());
    }

    #[test]
    fn the_end_of_the_address_space_does_not_wrap() {
        let mut space = Space::new(u64::MAX);
        assert!(space.place(u64::MAX, 2, 1).is_err());
        space.reserve(Range {
            base: u64::MAX - 1,
            size: u64::MAX,
        });
        assert!(space.place(2, 1, u64::MAX - 1).is_err());
    }
}
