//! The fabric as one GPU sees it: whose HBM is where, and over which links it is reached.
//!
//! Engines keep such a view while they work and ask for a new one when the fabric's generation has passed: looking
//! an address up takes no lock, and a route is searched for when a link changes, not for each chunk.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use crate::fabric::{Member, Place};
use crate::link::LinkEnd;
use crate::partition::Partition;

/// A link of a route, from both its ends.
#[derive(Clone)]
struct Hop {
    near: Arc<Member>,
    near_link: usize,
    far: Arc<Member>,
    /// `None` if the other GPU does not list the link.
    far_link: Option<usize>,
}

impl Hop {
    fn near_end(&self) -> Option<&LinkEnd> {
        self.near.links.get(self.near_link)
    }

    fn far_end(&self) -> Option<&LinkEnd> {
        self.far.links.get(self.far_link?)
    }
}

/// The shortest way over links that are up; empty for a GPU's own HBM.
#[derive(Clone, Default)]
pub(crate) struct Route {
    hops: Vec<Hop>,
    /// MB/s of its slowest link; 0 = no link's is known.
    pub(crate) bandwidth_mbs: u32,
    /// All links' together.
    pub(crate) latency_ns: u64,
}

impl Route {
    /// Links on the way.
    pub(crate) fn len(&self) -> usize {
        self.hops.len()
    }

    /// `bytes` went from the GPU to the other end.
    pub(crate) fn count_out(&self, bytes: u64) {
        for hop in &self.hops {
            let (near, far) = (hop.near_end(), hop.far_end());
            near.into_iter().for_each(|end| end.count_out(bytes));
            far.into_iter().for_each(|end| end.count_in(bytes));
        }
    }

    /// `bytes` came from the other end to the GPU.
    pub(crate) fn count_in(&self, bytes: u64) {
        for hop in &self.hops {
            let (near, far) = (hop.near_end(), hop.far_end());
            near.into_iter().for_each(|end| end.count_in(bytes));
            far.into_iter().for_each(|end| end.count_out(bytes));
        }
    }

    /// This way and one link more.
    fn and(&self, hop: Hop) -> Route {
        let mut route = self.clone();
        if let Some(end) = hop.near_end() {
            let bandwidths = [self.bandwidth_mbs, end.bandwidth_now_mbs()];
            let known = bandwidths.into_iter().filter(|mbs| *mbs > 0).min();
            route.bandwidth_mbs = known.unwrap_or(0);
            route.latency_ns += u64::from(end.latency_ns());
        }
        route.hops.push(hop);
        route
    }
}

/// The routes from one GPU to itself and to every other that can be reached.
pub(crate) fn routes(
    members: &BTreeMap<Place, Arc<Member>>,
    from: Place,
) -> BTreeMap<Place, Arc<Route>> {
    let mut routes = BTreeMap::from([(from, Arc::new(Route::default()))]);
    let mut frontier = vec![from];
    // GPUs of hive 0 are on their own, whatever links they list.
    while !frontier.is_empty() && from.hive != 0 {
        let mut next = Vec::new();
        for place in frontier {
            let (Some(near), Some(route)) = (members.get(&place), routes.get(&place).cloned())
            else {
                continue;
            };
            for (near_link, link) in near.links.iter().enumerate() {
                let Some(node) = link.peer.filter(|_| link.is_up()) else {
                    continue;
                };
                let peer = Place { node, ..place };
                if let (Some(far), Entry::Vacant(slot)) = (members.get(&peer), routes.entry(peer)) {
                    let hop = Hop {
                        near: Arc::clone(near),
                        near_link,
                        far: Arc::clone(far),
                        far_link: far.links.iter().position(|l| l.peer == Some(place.node)),
                    };
                    slot.insert(Arc::new(route.and(hop)));
                    next.push(peer);
                }
            }
        }
        frontier = next;
    }
    routes
}

/// HBM somewhere in the fabric.
pub(crate) struct Seen {
    pub(crate) partition: Arc<Partition>,
    /// The way there; `None` if there is none now.
    pub(crate) route: Option<Arc<Route>>,
}

/// The fabric at one moment, as one GPU sees it.
pub(crate) struct View {
    /// The fabric's when the view was made.
    pub(crate) generation: u64,
    /// By address.
    pub(crate) windows: Vec<Seen>,
    /// The GPU, while it is in the fabric.
    pub(crate) home: Option<Arc<Member>>,
}

impl View {
    /// The HBM that covers `address`, or else the first address of the next HBM above it.
    pub(crate) fn find(&self, address: u64) -> Result<&Seen, Option<u64>> {
        let above = self
            .windows
            .partition_point(|seen| seen.partition.base() <= address);
        let below = above.checked_sub(1).and_then(|at| self.windows.get(at));
        match below {
            Some(seen) if address < seen.partition.end() => Ok(seen),
            _ => Err(self.windows.get(above).map(|seen| seen.partition.base())),
        }
    }

    /// The GPU's link to its CPU.
    pub(crate) fn cpu_link(&self) -> Option<&LinkEnd> {
        let mut links = self.home.as_ref()?.links.iter();
        links.find(|link| link.peer.is_none())
    }
}
