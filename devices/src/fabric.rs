//! The fabric: what the GPUs of a machine know of each other's HBM, and the links between them.
//!
//! Every GPU joins when it is created and leaves when it is dropped. Engines learn from the fabric whose an address
//! is, and whether a route of links that are up leads there; several hops are allowed, as over XGMI. They keep what
//! they learned until the fabric's generation passes, which every change makes it do. The locks are leaves: they are
//! held to look something up or to change a link, never while memory moves.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use numagpu_spec::pci;
use numagpu_spec::regs::IrqBits;
use thiserror::Error;

use crate::irq::Irq;
pub use crate::link::LinkEnd;
use crate::modes::Modes;
use crate::partition::Partition;
use crate::route::{Seen, View, routes};

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
    /// More lanes than a link has.
    #[error("a link between GPUs {from} and {to} of hive {hive:#x} has {width} lanes, not {lanes}")]
    Lanes {
        /// Hive.
        hive: u64,
        /// Position of one end.
        from: u32,
        /// Position of the other.
        to: u32,
        /// Lanes asked for.
        lanes: u32,
        /// Lanes that it has.
        width: u32,
    },
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
    pub(crate) irq: Arc<Irq>,
}

/// Whose an address is.
struct Window {
    place: Place,
    partition: Arc<Partition>,
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
    /// Passes after each change.
    generation: AtomicU64,
    /// What GPUs see, of this generation; made when it is asked for.
    views: RwLock<BTreeMap<Place, Arc<View>>>,
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
        self.set_lanes(hive, from, to, |end| Ok(if up { end.width() } else { 0 }))
    }

    /// Lets `lanes` of the lanes of every link between two GPUs of a hive carry traffic, on both ends; with fewer
    /// than all it is degraded, with none it is down. Each end that loses lanes counts an error.
    ///
    /// # Errors
    /// [`FabricError::NoLink`]; [`FabricError::Lanes`] if a link has fewer; then nothing is changed.
    pub fn set_link_lanes(
        &self,
        hive: u64,
        from: u32,
        to: u32,
        lanes: u32,
    ) -> Result<(), FabricError> {
        self.set_lanes(hive, from, to, |end| match end.width() {
            width if width < lanes => Err(FabricError::Lanes {
                hive,
                from,
                to,
                lanes,
                width,
            }),
            _ => Ok(lanes),
        })
    }

    fn set_lanes(
        &self,
        hive: u64,
        from: u32,
        to: u32,
        lanes: impl Fn(&LinkEnd) -> Result<u32, FabricError>,
    ) -> Result<(), FabricError> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let ends = |near: u32, far: u32| {
            let member = inner.members.get(&Place { hive, node: near });
            let links = member.into_iter().flat_map(|member| &member.links);
            links.filter(move |link| link.peer == Some(far))
        };
        let all = ends(from, to).chain(ends(to, from));
        let changes: Vec<_> = all
            .map(|end| Ok((end, lanes(end)?)))
            .collect::<Result<_, FabricError>>()?;
        if changes.is_empty() {
            return Err(FabricError::NoLink { hive, from, to });
        }
        let mut changed = false;
        for (end, lanes) in changes {
            changed |= end.set_lanes(lanes);
        }
        if !changed {
            return Ok(());
        }
        self.changed();
        let told = [from, to].map(|node| inner.members.get(&Place { hive, node }).cloned());
        drop(inner);
        for member in told.iter().flatten() {
            member.irq.raise(IrqBits::LINK.bits(), pci::VECTOR_EVENTS);
        }
        Ok(())
    }

    /// Number of links on the shortest route of links that are up from one GPU to another; `None` if there is no route.
    pub fn hops(&self, from: Place, to: Place) -> Option<u32> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let routes = routes(&inner.members, from);
        u32::try_from(routes.get(&to)?.len()).ok()
    }

    /// Passes with every change. A view of another generation is out of date.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// What the GPU at `from` sees.
    pub(crate) fn view(&self, from: Place) -> Arc<View> {
        let views = self.views.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = views.get(&from) {
            return Arc::clone(view);
        }
        drop(views);
        // Read first: what changes while the view is made makes it out of date.
        let generation = self.generation();
        let view = Arc::new(self.look(from, generation));
        let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
        if self.generation() == generation {
            views.insert(from, Arc::clone(&view));
        }
        view
    }

    fn look(&self, from: Place, generation: u64) -> View {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        let routes = routes(&inner.members, from);
        let windows = inner.windows.values().map(|window| Seen {
            partition: Arc::clone(&window.partition),
            route: routes.get(&window.place).cloned(),
        });
        View {
            generation,
            windows: windows.collect(),
            home: inner.members.get(&from).cloned(),
        }
    }

    /// To be called after each change: engines look anew before they touch anything more.
    pub(crate) fn changed(&self) {
        let mut views = self.views.write().unwrap_or_else(PoisonError::into_inner);
        self.generation.fetch_add(1, Ordering::SeqCst);
        views.clear();
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
        self.changed();
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
        self.changed();
    }

    pub(crate) fn leave(&self, place: Place) {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        inner.members.remove(&place);
        inner.windows.retain(|_, window| window.place != place);
        self.changed();
    }
}
