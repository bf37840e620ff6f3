//! Writes the seeds of every target to `devices/fuzz/corpus`, over those that are there.

use std::io;
use std::path::Path;

use numagpu_devices_fuzz::TARGETS;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in &TARGETS {
        let dir = corpus.join(target.name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        std::fs::create_dir_all(&dir)?;
        for (name, bytes) in (target.seeds)() {
            std::fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}
