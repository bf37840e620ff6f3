//! Numbers for machines that look random and are the same in every run.

/// Knuth's MMIX generator, from a seed.
#[derive(Clone, Debug)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The next number, from 0 to below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    /// Whether an event comes that comes once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of these, each as likely as the others.
    ///
    /// # Panics
    /// If there are none.
    pub fn one_of<T: Copy, const N: usize>(&mut self, all: [T; N]) -> T {
        let position = usize::try_from(self.below(N as u64)).expect("below N");
        *all.get(position).expect("below N")
    }
}
