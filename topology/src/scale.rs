//! A machine made small enough for a guest on an ordinary host.

use toml::Spanned;

use crate::machine::{Cpus, Exposure, Machine, Mark, Source};
use crate::size::{GIB, MIB, Size};

/// RAM of a node in a small machine of several nodes.
const NODE_MEMORY: u64 = 512 * MIB;
/// RAM of the only node of a small machine.
const ONLY_NODE_MEMORY: u64 = GIB;

impl Machine {
    /// The machine with one CPU for each CPU node, and at most 512 MiB of RAM for each node (1 GiB if there is only one).
    /// HBM that is RAM shrinks as RAM does. Nodes, distances, links and all other HBM, which costs the host nothing until
    /// it is written, stay; [`Machine::source`] says what was scaled.
    #[must_use]
    pub fn small(mut self) -> Machine {
        let nodes = self.cpu.len() + self.memory.len();
        let most = if nodes > 1 {
            NODE_MEMORY
        } else {
            ONLY_NODE_MEMORY
        };
        let shrink = |size: &mut Spanned<Size>, most: u64| {
            let small = Size(size.get_ref().0.min(most));
            *size.get_mut() = small;
        };
        for node in self.cpu.iter_mut().map(Spanned::get_mut) {
            *node.cpus.get_mut() = Cpus::Count(1);
            if let Some(memory) = &mut node.memory {
                shrink(memory, most);
            }
        }
        for node in self.memory.iter_mut().map(Spanned::get_mut) {
            shrink(&mut node.memory, most);
        }
        for gpu in self.gpu.iter_mut().map(Spanned::get_mut) {
            if *gpu.exposure.get_ref() == Exposure::Ram {
                shrink(&mut gpu.hbm, most);
            }
        }
        self.description = match self.description.as_str() {
            "" => "small".to_owned(),
            text => format!("{text}; small"),
        };
        let scaled = |value: &str, from: String| Source {
            value: value.to_owned(),
            mark: Mark::Scaled,
            from,
        };
        self.source.extend([
            scaled("cpu.cpus", "1 CPU for each CPU node".to_owned()),
            scaled(
                "RAM",
                format!("at most {} for each node, HBM that is RAM too", Size(most)),
            ),
        ]);
        self
    }
}

#[cfg(test)]
mod tests {
    use crate::preset;

    #[test]
    fn every_preset_is_small_and_keeps_its_shape() {
        for preset in preset::ALL {
            let machine = crate::parse(preset.name, preset.source).unwrap();
            let large = crate::plan(&machine).unwrap();
            let small = crate::plan(&machine.small()).unwrap();
            assert!(small.ram_bytes() <= 2 << 30, "{}", preset.name);
            assert!(small.cpu_count() <= 4, "{}", preset.name);
            assert_eq!(small.slit, large.slit, "{}", preset.name);
            let shape = |plan: &crate::Plan| {
                let nodes = plan.nodes.iter();
                let nodes: Vec<_> = nodes
                    .map(|n| (n.pxm, n.linux_node, n.kind, n.online))
                    .collect();
                let hbm: Vec<u64> = plan.hbm().map(|hbm| hbm.size).collect();
                (nodes, hbm)
            };
            assert_eq!(shape(&small), shape(&large), "{}", preset.name);
        }
    }
}
