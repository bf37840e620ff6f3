//! Writes the seeds of every target to `vmm-glue/fuzz/corpus`, over those that are there.

use std::io;
use std::path::Path;

use numagpu_vmm_glue_fuzz::{TARGETS, seeds};

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in &TARGETS {
        let dir = corpus.join(target.name);
        std::fs::create_dir_all(&dir)?;
        for (name, bytes) in seeds::seeds() {
            std::fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}
