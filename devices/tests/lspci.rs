//! What lspci makes of configuration space: everything is named, and nothing is complained of.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use numagpu_devices::PciIds;
use numagpu_devices::bus::Bar;
use numagpu_devices::config_space::{
    CONFIG_SIZE, Capabilities, ConfigSpace, MsixPlace, ResizableBar,
};

/// The BARs of a GPU: number, size, 64-bit, prefetchable.
const BARS: [(u8, u64, bool, bool); 3] = [
    (0, 0x1_0000, false, false),
    (1, 0x2000, false, false),
    (2, 0x1000, true, false),
];
const APERTURE: (u8, u64, bool, bool) = (4, 128 << 30, true, true);

/// A space as firmware leaves it: addresses in the BARs, memory and bus master on.
fn space(bars: &[(u8, u64, bool, bool)], capabilities: &Capabilities) -> ConfigSpace {
    let described: Vec<Bar> = bars
        .iter()
        .map(|&(index, size, is_64bit, prefetchable)| Bar {
            index,
            size,
            is_64bit,
            prefetchable,
            mappable: Vec::new(),
        })
        .collect();
    let mut space = ConfigSpace::new(&PciIds::default(), &described, capabilities);
    for (index, _, is_64bit, _) in bars {
        let address: u64 = match is_64bit {
            true if *index == 4 => 0x40_0000_0000,
            _ => 0xc000_0000 + (u64::from(*index) << 20),
        };
        let bytes = address.to_le_bytes();
        let len = if *is_64bit { 8 } else { 4 };
        space.write(0x10 + 4 * u32::from(*index), bytes.get(..len).unwrap());
    }
    space.write(4, &[6, 0]);
    space
}

/// The space as `lspci -xxxx` prints it.
fn dump(space: &ConfigSpace) -> String {
    let mut bytes = [0; CONFIG_SIZE];
    space.read(0, &mut bytes);
    let mut text = String::from("11:00.0 Processing accelerators: numagpu\n");
    for (row, line) in bytes.chunks(16).enumerate() {
        write!(text, "{:02x}:", row * 16).unwrap();
        for byte in line {
            write!(text, " {byte:02x}").unwrap();
        }
        text.push('\n');
    }
    text
}

/// What lspci says of a space, without names of vendors, which change from one list to the next.
#[track_caller]
fn lspci(name: &str, space: &ConfigSpace) -> String {
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&file, dump(space)).unwrap();
    let output = Command::new("lspci")
        .args(["-n", "-vvv", "-F"])
        .arg(&file)
        .env("LC_ALL", "C")
        .output()
        .unwrap_or_else(|error| panic!("lspci: {error}; install pciutils; cargo xtask test does"));
    let errors = String::from_utf8(output.stderr).unwrap();
    // It looks for the drivers of this machine's kernel, which a container has none of.
    let errors: Vec<&str> = errors
        .lines()
        .filter(|it| !it.contains("libkmod"))
        .collect();
    assert!(output.status.success() && errors.is_empty(), "{errors:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn check(name: &str, golden: &str, space: &ConfigSpace) {
    let text = lspci(name, space);
    for complaint in [
        "unknown", "Unknown", "<?>", "<chain", "!!!", "broken", "invalid",
    ] {
        assert!(!text.contains(complaint), "{complaint}:\n{text}");
    }
    // Versions of lspci say the same in other words and spaces; which facts there are is ours.
    let missing: Vec<&str> = golden
        .lines()
        .filter(|fact| !text.contains(fact.trim()))
        .collect();
    assert_eq!(missing, Vec::<&str>::new(), "{text}");
}

#[test]
fn lspci_names_all_that_a_gpu_has() {
    let capabilities = Capabilities {
        msix: Some(MsixPlace::GPU),
        ..Capabilities::default()
    };
    let space = space(&BARS, &capabilities);
    check("spm", include_str!("golden/lspci-spm.txt"), &space);
    assert!(!lspci("spm", &space).contains("Resizable"));
}

#[test]
fn lspci_names_all_that_a_gpu_with_an_aperture_has() {
    let capabilities = Capabilities {
        msix: Some(MsixPlace::GPU),
        resizable: Some(ResizableBar {
            bar: 4,
            least: 32 << 30,
        }),
        ats: true,
    };
    let bars: Vec<_> = BARS.into_iter().chain([APERTURE]).collect();
    let space = space(&bars, &capabilities);
    check(
        "aperture",
        include_str!("golden/lspci-aperture.txt"),
        &space,
    );
}
