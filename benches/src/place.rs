//! Where threads run. A round trip costs what it costs to wake the other thread, which differs twentyfold between a
//! thread on the same core and one on a core that sleeps; so each comparison says which of them it was.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The cores of a client and of its server.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// What it is called in a report.
    pub name: &'static str,
    client: CpuSet,
    server: CpuSet,
}

impl Place {
    /// The places that this process may use: one core for both, and one each where there are two.
    pub fn all() -> Vec<Place> {
        let allowed = sched_getaffinity(None).unwrap();
        let mut cores = (0..CpuSet::MAX_CPU)
            .filter(|core| allowed.is_set(*core))
            .map(only);
        let (client, server) = (cores.next().unwrap(), cores.next());
        let one = Place {
            name: "one core",
            client,
            server: client,
        };
        let two = server.map(|server| Place {
            name: "two cores",
            client,
            server,
        });
        std::iter::once(one).chain(two).collect()
    }

    /// Wherever the kernel likes, as programs run that nobody pins.
    pub fn anywhere() -> Place {
        let allowed = sched_getaffinity(None).unwrap();
        Place {
            name: "not pinned",
            client: allowed,
            server: allowed,
        }
    }

    /// Whether client and server can run at the same time.
    pub fn is_parallel(self) -> bool {
        self.client != self.server || self.client.count() > 1
    }

    /// Makes something whose threads run where servers do: threads inherit the core of the one that starts them
    /// (`sched_setaffinity`(2)). The caller is a client from then on.
    pub fn serve<T>(self, make: impl FnOnce() -> T) -> T {
        stay_on(self.server);
        let made = make();
        stay_on(self.client);
        made
    }
}

fn only(core: usize) -> CpuSet {
    let mut cores = CpuSet::new();
    cores.set(core);
    cores
}

fn stay_on(cores: CpuSet) {
    sched_setaffinity(None, &cores).unwrap();
}

/// Runs work on this thread that may change where it runs, and takes the change back.
pub fn scoped(work: impl FnOnce()) {
    let allowed = sched_getaffinity(None).unwrap();
    work();
    sched_setaffinity(None, &allowed).unwrap();
}
