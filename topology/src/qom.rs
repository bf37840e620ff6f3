//! The order in which QEMU walks its objects.
//!
//! QEMU keeps the children of `/objects` in a GLib hash table and writes one Generic Initiator entry into the SRAT
//! for each as it walks that table, so the entries' order, and with it Linux's node numbers, depends on the hashes of
//! the objects' names. This module computes the order from GLib's published behaviour (`glib/ghash.c`: open
//! addressing with triangular probing, a prime modulus per size, growth by evicting in place). `numagpu run` asks
//! the real QEMU before the guest starts whether it agrees.

use std::collections::BTreeSet;

/// Largest prime below each power of two from 2^3 on, as GLib's `prime_mod` has them.
const PRIMES: [u32; 29] = [
    7,
    13,
    31,
    61,
    127,
    251,
    509,
    1021,
    2039,
    4093,
    8191,
    16381,
    32749,
    65521,
    131_071,
    262_139,
    524_287,
    1_048_573,
    2_097_143,
    4_194_301,
    8_388_593,
    16_777_213,
    33_554_393,
    67_108_859,
    134_217_689,
    268_435_399,
    536_870_909,
    1_073_741_789,
    2_147_483_647,
];
const MIN_SHIFT: usize = 3;

#[derive(Clone, Copy)]
struct Slot {
    hash: u32,
    /// Position in the order of creation.
    created: usize,
}

/// A GLib hash table of strings, as far as its order of iteration goes.
struct Table {
    slots: Vec<Option<Slot>>,
    modulus: u32,
    used: usize,
}

/// GLib's `g_str_hash`: 5381, then times 33 plus each byte as a signed char.
fn hash(name: &str) -> u32 {
    usable(extended(5381, name))
}

/// The hash of a text that goes on with `more`.
fn extended(hash: u32, more: &str) -> u32 {
    more.bytes().fold(hash, |hash, byte| {
        hash.wrapping_mul(33)
            .wrapping_add_signed(i32::from(byte.cast_signed()))
    })
}

/// 0 and 1 mark unused slots and tombstones.
fn usable(hash: u32) -> u32 {
    if hash < 2 { 2 } else { hash }
}

impl Table {
    fn new() -> Table {
        Table {
            slots: vec![None; 1 << MIN_SHIFT],
            modulus: PRIMES[0],
            used: 0,
        }
    }

    fn home(&self, hash: u32) -> usize {
        (hash.wrapping_mul(11) % self.modulus) as usize
    }

    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    fn insert(&mut self, hash: u32) {
        let mut index = self.home(hash);
        let mut step = 0;
        while let Some(Some(_)) = self.slots.get(index) {
            step += 1;
            index = (index + step) & self.mask();
        }
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = Some(Slot {
                hash,
                created: self.used,
            });
        }
        self.used += 1;
        if self.slots.len() <= self.used + self.used / 16 {
            self.grow();
        }
    }

    /// Doubles the table in place: each entry goes to its new home, throwing out the not yet moved entry it meets
    /// there, which then moves next.
    fn grow(&mut self) {
        let old = self.slots.len();
        // The size for 1.333 times the entries, as the number of bits that it takes to write it.
        let wanted = self.used * 1333 / 1000;
        let shift = (usize::BITS - wanted.leading_zeros()) as usize;
        let shift = shift.clamp(MIN_SHIFT, MIN_SHIFT + PRIMES.len() - 1);
        self.slots.resize((1 << shift).max(old), None);
        self.modulus = PRIMES.get(shift - MIN_SHIFT).copied().unwrap_or(PRIMES[0]);
        let mut moved = vec![false; self.slots.len()];
        for start in 0..old {
            if moved.get(start) == Some(&true) {
                continue;
            }
            let mut carried = self.slots.get_mut(start).and_then(Option::take);
            while let Some(slot) = carried {
                let mut index = self.home(slot.hash);
                let mut step = 0;
                while moved.get(index) == Some(&true) {
                    step += 1;
                    index = (index + step) & self.mask();
                }
                if let Some(flag) = moved.get_mut(index) {
                    *flag = true;
                }
                carried = self
                    .slots
                    .get_mut(index)
                    .and_then(|place| place.replace(slot));
            }
        }
    }
}

/// Positions of objects in the order in which QEMU walks them.
fn walk<S: AsRef<str>>(created: impl IntoIterator<Item = S>) -> Vec<usize> {
    let mut table = Table::new();
    for name in created {
        table.insert(hash(name.as_ref()));
    }
    let slots = table.slots.into_iter().flatten();
    slots.map(|slot| slot.created).collect()
}

/// The order in which QEMU walks objects that were created in the order given.
pub fn walk_order<S: AsRef<str>>(created: &[S]) -> Vec<String> {
    walk(created)
        .into_iter()
        .filter_map(|position| created.get(position))
        .map(|name| name.as_ref().to_owned())
        .collect()
}

/// QEMU's names of monitors that are no `-object`: objects beside the others from QEMU 11.1 on (measured).
const MONITORS: [&str; 2] = ["compat_monitor0", "compat_monitor1"];

/// The order in which QEMU creates the objects of a command line with one monitor: memory backends after the rest
/// (`system/vl.c`, `object_create_early`), then the monitor.
pub fn creation_order(initiators: &[String], backends: &[String]) -> Vec<String> {
    let monitor = MONITORS.iter().take(1).map(|name| (*name).to_owned());
    initiators
        .iter()
        .chain(backends)
        .cloned()
        .chain(monitor)
        .collect()
}

/// Positions of the initiators in the order in which QEMU, with one monitor, walks them.
pub(crate) fn initiators_walked(initiators: &[String], backends: &[String]) -> Vec<usize> {
    let mut order = walk(creation_order(initiators, backends));
    // They are created first.
    order.retain(|position| *position < initiators.len());
    order
}

/// Names for `count` Generic Initiators such that QEMU, which also has `backends` and one monitor or two, walks them in
/// ascending order: `gi0`, `gi1` and so on, with letters behind the number where the plain names come in another order.
/// Always the same for the same input.
pub fn initiator_names(count: usize, backends: &[String]) -> Vec<String> {
    let others = |monitors: usize| -> Vec<String> {
        let monitors = MONITORS
            .iter()
            .take(monitors)
            .map(|name| (*name).to_owned());
        backends.iter().cloned().chain(monitors).collect()
    };
    let (one, two) = (others(1), others(2));
    // The initiators are created first.
    let ascending = |names: &[String], others: &[String]| {
        let order = walk(names.iter().chain(others));
        order.into_iter().filter(|i| *i < count).is_sorted()
    };
    let plain: Vec<String> = (0..count).map(|i| format!("gi{i}")).collect();
    // One in count! orders is the right one, so trying around is for few names only.
    let attempts = if count <= 7 { 20_000 } else { 0 };
    let candidates = || {
        std::iter::once(plain.clone())
            .chain(apart(count, &two))
            .chain(apart(count, &one))
            .chain((0..attempts).map(|attempt| varied(count, attempt)))
    };
    // The first that is right with one monitor and with two, else the first that is with one.
    let mut right_with_one = None;
    for names in candidates().filter(|names| ascending(names, &one)) {
        if ascending(&names, &two) {
            return names;
        }
        right_with_one.get_or_insert(names);
    }
    right_with_one.unwrap_or(plain)
}

/// Names whose home slots ascend and differ from each other's and from the backends': they mostly stay at home through
/// all growth, so their order is that of their homes. Several choices of slots, where the table has room enough.
fn apart(count: usize, backends: &[String]) -> impl Iterator<Item = Vec<String>> {
    // The table's size depends on the number of names only.
    let mut table = Table::new();
    (0..count + backends.len()).for_each(|i| table.insert(hash(&i.to_string())));
    let taken: BTreeSet<usize> = backends.iter().map(|name| table.home(hash(name))).collect();
    let free: Vec<usize> = (0..table.modulus as usize)
        .filter(|slot| !taken.contains(slot))
        .collect();
    let mut homes: Vec<Homes> = Vec::new();
    let mut name_at = move |i: usize, slot: usize| {
        let name = format!("gi{i}");
        if homes.len() <= i {
            homes.push(Homes::new(&table, &name));
        }
        let suffix = homes.get_mut(i)?.suffix(&table, slot)?;
        Some(name + &suffix)
    };
    let choices = if free.len() < count { 0 } else { count };
    (0..choices).filter_map(move |shift| -> Option<Vec<String>> {
        let slot = |i: usize| free.get((i * free.len() + shift) / count);
        (0..count).map(|i| name_at(i, *slot(i)?)).collect()
    })
}

/// Which letters behind a name give it which home slot. Every choice of slots asks for others of the same names, so what
/// has been tried is kept.
struct Homes {
    /// Hash of the name without letters.
    start: u32,
    /// Suffixes tried, in order.
    tried: usize,
    /// The first suffix for every slot.
    first: Vec<Option<u16>>,
}

impl Homes {
    fn new(table: &Table, name: &str) -> Homes {
        Homes {
            start: extended(5381, name),
            tried: 0,
            first: vec![None; table.modulus as usize],
        }
    }

    /// The first suffix with which the name is at home in `slot`.
    fn suffix(&mut self, table: &Table, slot: usize) -> Option<String> {
        while self.first.get(slot) == Some(&None) {
            let hash = |hash: u32, letter: char| extended(hash, letter.encode_utf8(&mut [0; 4]));
            let home = table.home(usable(suffix(self.tried)?.fold(self.start, hash)));
            let tried = u16::try_from(self.tried).ok();
            if let Some(first) = self.first.get_mut(home) {
                *first = first.or(tried);
            }
            self.tried += 1;
        }
        let found = (*self.first.get(slot)?)?;
        Some(suffix(usize::from(found))?.collect())
    }
}

/// Names with letters that differ from attempt to attempt.
fn varied(count: usize, attempt: usize) -> Vec<String> {
    let letter = |number: usize| char::from(b'a' + u8::try_from(number % 26).unwrap_or(0));
    let suffix = |i: usize| {
        let number = attempt.wrapping_mul(i * 7 + 31) / 3;
        format!("{}{}", letter(number), letter(number / 26))
    };
    (0..count).map(|i| format!("gi{i}{}", suffix(i))).collect()
}

/// Nothing, `a` to `z`, `aa` to `zz`, by number.
fn suffix(number: usize) -> Option<impl Iterator<Item = char>> {
    let letter = |number: usize| Some(char::from(b'a' + u8::try_from(number % 26).ok()?));
    let (first, second) = match number {
        0 => (None, None),
        1..=26 => (letter(number - 1), None),
        27..=702 => (letter((number - 27) / 26), letter(number - 27)),
        _ => return None,
    };
    Some(first.into_iter().chain(second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_number_of_initiators_is_walked_in_order() {
        for count in 1..=32 {
            for cpus in [1, 2, 4, 8] {
                let ram = (0..cpus).map(|i| format!("ram{i}"));
                let backends: Vec<String> =
                    ram.chain((0..count).map(|i| format!("hbm{i}"))).collect();
                let names = initiator_names(count, &backends);
                let mut order = walk_order(&creation_order(&names, &backends));
                order.retain(|name| names.contains(name));
                assert_eq!(order, names, "{count} initiators, {cpus} CPU nodes");
            }
        }
    }

    #[test]
    fn the_hash_is_glibs() {
        // 5381 * 33 + 'a'
        assert_eq!(hash("a"), 177_670);
        assert_eq!(hash(""), 5381);
    }

    fn order(created: &[&str]) -> Vec<String> {
        walk_order(created)
    }

    #[test]
    fn bytes_count_as_signed() {
        // 5381 * 33 - 61, the byte 0xc3, times 33 - 68, the byte 0xa4.
        assert_eq!(hash("\u{e4}"), (5381 * 33 - 61) * 33 - 92);
    }

    #[test]
    fn a_table_of_eight_slots_is_walked_by_home() {
        // Hashes are 177670 for "a" and one more for each letter on; home = hash * 11 mod 7.
        let home = |name: &str| hash(name) * 11 % 7;
        let mut letters = ["a", "b", "c", "d", "e", "f", "g"];
        let walked = order(&letters);
        letters.sort_by_key(|letter| home(letter));
        assert_eq!(walked, letters);
        assert_eq!(order(&[]), [""; 0]);
    }

    #[test]
    fn who_comes_second_to_a_slot_goes_on() {
        // "a" and "h" share a home, which is not the last slot.
        assert_eq!(hash("a") * 11 % 7, hash("h") * 11 % 7);
        assert_eq!(order(&["a", "h"]), ["a", "h"]);
        assert_eq!(order(&["h", "a"]), ["h", "a"]);
    }

    /// Seen with QEMU 11.1: these objects, created in this order, are walked with gi0 before gi1.
    #[test]
    fn the_initiators_of_two_gpus_are_walked_as_in_qemu() {
        let walked = order(&["gi0", "gi1", "ram0", "hbm0", "hbm1"]);
        let position = |name: &str| walked.iter().position(|walked| walked == name).unwrap();
        assert!(position("gi0") < position("gi1"), "{walked:?}");
    }

    #[test]
    fn up_to_two_names_are_walked_in_order() {
        for count in 0..=2 {
            let backends: Vec<String> = (0..count)
                .map(|i| format!("hbm{i}"))
                .chain(["ram0".to_owned()])
                .collect();
            let names = initiator_names(count, &backends);
            assert_eq!(names, initiator_names(count, &backends));
            let mut walked = walk_order(&creation_order(&names, &backends));
            walked.retain(|name| names.contains(name));
            assert_eq!(walked, names);
        }
    }

    #[test]
    fn every_name_is_walked_once_through_all_growth() {
        let names: Vec<String> = (0..70_000).map(|i| format!("object{i}")).collect();
        let mut walked = walk_order(&names);
        assert_ne!(walked, names);
        walked.sort();
        let mut sorted = names.clone();
        sorted.sort();
        assert_eq!(walked, sorted);
    }

    #[test]
    fn two_initiators_get_names_that_are_walked_in_order() {
        let backends = ["ram0", "hbm0", "hbm1"].map(String::from).to_vec();
        let names = initiator_names(2, &backends);
        let order = walk_order(&creation_order(&names, &backends));
        let position = |name: &String| order.iter().position(|walked| walked == name);
        assert!(position(&names[0]) < position(&names[1]));
    }
}
