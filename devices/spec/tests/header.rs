//! The C header: compilers take it, and its macros have the values of the tables.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use numagpu_spec::table::Block;
use numagpu_spec::{pci, regs, sdma};

const HERE: &str = env!("CARGO_MANIFEST_DIR");

/// A directory of this test's own, empty.
fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

/// Compiles `source` as strictly as the compiler can, to the program `output`.
#[track_caller]
fn compile(compiler: &str, language: &[&str], source: &Path, output: &Path) {
    let done = Command::new(compiler)
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-I"])
        .arg(Path::new(HERE).join("include"))
        .args(language)
        .arg(source)
        .arg("-o")
        .arg(output)
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}; a C compiler is needed: install gcc"));
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{errors}");
}

/// Whether this machine has a C++ compiler; C is needed in any case.
fn has_cpp() -> bool {
    Command::new("g++").arg("--version").output().is_ok()
}

#[test]
fn a_driver_in_c_compiles_and_builds_a_packet() {
    let source = Path::new(HERE).join("tests/driver.c");
    let program = scratch("header-c").join("driver");
    compile("gcc", &["-std=c11"], &source, &program);
    assert!(Command::new(&program).status().unwrap().success());
    if has_cpp() {
        compile("g++", &["-std=c++11", "-x", "c++"], &source, &program);
        assert!(Command::new(&program).status().unwrap().success());
    }
}

/// Adds an assertion that a macro has a value.
fn equal(program: &mut String, name: &str, value: u64) {
    writeln!(
        program,
        "static_assert(NUMAGPU_{name} == {value:#x}ull, \"{name}\");"
    )
    .unwrap();
}

fn block(program: &mut String, bar: u8, block: &Block) {
    let name = block.name;
    equal(program, &format!("BLOCK_{name}_BAR"), bar.into());
    equal(program, &format!("BLOCK_{name}_COUNT"), block.count.into());
    equal(
        program,
        &format!("BLOCK_{name}_STRIDE"),
        block.stride.into(),
    );
    for reg in block.regs {
        let full = format!("{name}_{}", reg.name);
        for instance in 0..block.count {
            let offset = block.base + block.stride * instance + reg.offset;
            match block.count {
                1 => equal(program, &full, offset.into()),
                _ => equal(program, &format!("{full}({instance})"), offset.into()),
            }
        }
        equal(program, &format!("{full}_BYTES"), reg.width.bytes().into());
        for (suffix, value) in [
            ("WRITABLE", reg.writable),
            ("W1C", reg.w1c),
            ("RESET", reg.reset),
        ] {
            if value != 0 {
                equal(program, &format!("{full}_{suffix}"), value);
            }
        }
    }
}

#[test]
fn every_macro_has_the_value_of_its_table() {
    let mut program = String::from("#include \"numagpu.h\"\n#include <assert.h>\n");
    for one in regs::BLOCKS {
        block(&mut program, pci::BAR_REGISTERS, one);
    }
    for one in pci::DOORBELL_BLOCKS {
        block(&mut program, pci::BAR_DOORBELLS, one);
    }
    block(&mut program, pci::BAR_MSIX, &pci::msix::BLOCK);
    for packet in sdma::PACKETS {
        let first = u64::from(packet.op) | u64::from(packet.sub_op) << 8;
        equal(&mut program, &format!("SDMA_{}_FIRST", packet.name), first);
        for (word, index) in packet.words.iter().zip(0..) {
            let name = format!("SDMA_{}_WORD_{word}", packet.name);
            equal(&mut program, &name, index);
        }
    }
    for code in regs::QueueFault::ALL {
        let mut name = String::from("QUEUE_FAULT");
        for letter in code.name().chars() {
            if letter.is_ascii_uppercase() {
                name.push('_');
            }
            name.push(letter.to_ascii_uppercase());
        }
        equal(&mut program, &name, code.code().into());
    }
    program += "int main(void) { return 0; }\n";
    let dir = scratch("header-values");
    let source = dir.join("values.c");
    std::fs::write(&source, &program).unwrap();
    compile("gcc", &["-std=c11"], &source, &dir.join("values"));
    // The compiler does look: one wrong value does not pass.
    assert!(program.matches("static_assert").count() > 500);
}
