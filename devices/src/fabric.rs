//! The fabric: what the GPUs of a machine know of each other's HBM, and the links between them.
//!
//! Every GPU joins when it is created and leaves when it is dropped. Engines ask the fabric whose an address
//! is, and whether a route of links that are up leads there; several hops are allowed, as over XGMI. The lock
//! is a leaf: it is held to look something up or to change a link, never while memory moves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;

use crate::modes::Modes;
use crate::partition::Partition;

/// Why a GPU cannot join, or a link cannot change.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum FabricError {
    /// Two GPUs with one position.
    #[error("hive {hive:#x} has a GPU at position {node} already")]
    DuplicateNode {
        /// Hive.
        hive: u64,
        /// Position.
        node: u32,
    },
    /// HBM of two GPUs at one address.
    #[error("HBM {base:#x}..{end:#x} overlaps HBM {other_base:#x}..{other_end:#x} of another GPU")]
    Overlap {
        /// First address.
        base: u64,
        /// First address after it.
        end: u64,
        /// First address of the other.
        other_base: u64,
        /// First address after the other.
        other_end: u64,
    },
    /// No link between two GPUs.
    #[error("no link joins GPUs {from} and {to} of hive {hive:#x}")]
    NoLink {
        /// Hive.
        hive: u64,
        /// Position of one end.
        from: u32,
        /// Position of the other.
        to: u32,
    },
}

/// One end of a link, at the GPU whose `LINK` block shows it.
#[derive(Debug)]
pub struct LinkEnd {
    /// Hive position of the other end; `None` is the CPU.
    pub peer: Option<u32>,
    up: AtomicBool,
    errors: AtomicU32,
}

impl LinkEnd {
    /// A link that is up.
    pub(crate) fn new(peer: Option<u32>) -> LinkEnd {
        LinkEnd {
            peer,
            up: AtomicBool::new(true),
            errors: AtomicU32::new(0),
        }
    }

    /// Whether it carries traffic.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Errors since reset.
    pub fn errors(&self) -> u32 {
        self.errors.load(Ordering::Acquire)
    }

    pub(crate) fn clear_errors(&self) {
        self.errors.store(0, Ordering::Release);
    }
}

/// Place of a GPU in the fabric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Hive; GPUs of hive 0 have no peers.
    pub hive: u64,
    /// Position in the hive; in hive 0 the index of the GPU in its machine.
    pub node: u32,
}

/// What a GPU shares with the others.
pub(crate) struct Member {
    pub(crate) place: Place,
    pub(crate) modes: Modes,
    pub(crate) links: Vec<LinkEnd>,
}

/// Whose an address is.
#[derive(Clone)]
pub(crate) struct Window {
    pub(crate) place: Place,
    pub(crate) partition: Arc<Partition>,
}

#[derive(Default)]
struct Inner {
    members: BTreeMap<Place, Arc<Member>>,
    /// By first address.
    windows: BTreeMap<u64, Window>,
}

impl Inner {
    /// Lets engines find the partitions of a GPU.
    fn show(&mut self, place: Place, partitions: &[Arc<Partition>]) {
        for partition in partitions {
            let window = Window {
                place,
                partition: Arc::clone(partition),
            };
            self.windows.insert(partition.base(), window);
        }
    }
}

/// The GPUs of one machine and the links between them.
#[derive(Default)]
pub struct Fabric {
    inner: RwLock<Inner>,
}

impl Fabric {
    /// A fabric without GPUs.
    pub fn new() -> Arc<Fabric> {
        Arc::new(Fabric::default())
    }

    /// Sets the state of every link between two GPUs of a hive, on both ends. A link that goes down counts an
    /// error on both.
    ///
    /// # Errors
    /// [`FabricError::NoLink`].
    pub fn set_link(&self, hive: u64, from: u32, to: u32, up: bool) -> Result<(), FabricError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let ends = |near: u32, far: u32| {
            let member = inner.members.get(&Place { hive, node: near });
            let links = member.into_iter().flat_map(|member| &member.links);
            links.filter(move |link| link.peer == Some(far))
        };
        let mut found = false;
        for link in ends(from, to).chain(ends(to, from)) {
            found = true;
            if link.up.swap(up, Ordering::AcqRel) && !up {
                link.errors.fetch_add(1, Ordering::AcqRel);
            }
        }
        if found {
            Ok(())
        } else {
            Err(FabricError::NoLink { hive, from, to })
        }
    }

    /// Number of links on the shortest route of links that are up from one GPU to another; `None` if there is no route.
    pub fn hops(&self, from: Place, to: Place) -> Option<u32> {
        if from == to {
            return Some(0);
        }
        if from.hive != to.hive || from.hive == 0 {
            return None;
        }
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let mut reached = vec![from];
        let mut frontier = vec![from];
        let mut hops = 0;
        while !frontier.is_empty() {
            hops += 1;
            let mut next = Vec::new();
            for place in frontier {
                let Some(member) = inner.members.get(&place) else {
                    continue;
                };
                for link in member.links.iter().filter(|link| link.is_up()) {
                    let Some(node) = link.peer else { continue };
                    let peer = Place { node, ..place };
                    if peer == to {
                        return inner.members.contains_key(&to).then_some(hops);
                    }
                    if !reached.contains(&peer) {
                        reached.push(peer);
                        next.push(peer);
                    }
                }
            }
            frontier = next;
        }
        None
    }

    /// The HBM that covers `address`, or else the first address of the next HBM above it.
    pub(crate) fn find(&self, address: u64) -> Result<Window, Option<u64>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let below = inner.windows.range(..=address).next_back();
        if let Some((_, window)) = below.filter(|(_, w)| address < w.partition.end()) {
            return Ok(window.clone());
        }
        let above = address.checked_add(1);
        let above = above.and_then(|from| inner.windows.range(from..).next());
        Err(above.map(|(base, _)| *base))
    }

    pub(crate) fn join(&self, member: Arc<Member>) -> Result<(), FabricError> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let place = member.place;
        if inner.members.contains_key(&place) {
            return Err(FabricError::DuplicateNode {
                hive: place.hive,
                node: place.node,
            });
        }
        for partition in member.modes.planned() {
            let clash = inner.windows.values().find(|other| {
                partition.base() < other.partition.end() && other.partition.base() < partition.end()
            });
            if let Some(other) = clash {
                return Err(FabricError::Overlap {
                    base: partition.base(),
                    end: partition.end(),
                    other_base: other.partition.base(),
                    other_end: other.partition.end(),
                });
            }
        }
        inner.show(place, member.modes.active());
        inner.members.insert(place, member);
        Ok(())
    }

    /// Puts another mode of a member in force.
    pub(crate) fn divide(&self, member: &Member, count: usize) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner
            .windows
            .retain(|_, window| window.place != member.place);
        member.modes.activate(count);
        inner.show(member.place, member.modes.active());
    }

    pub(crate) fn leave(&self, place: Place) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.members.remove(&place);
        inner.windows.retain(|_, window| window.place != place);
    }
}
