//! A guest drives the device of `vmm-glue/examples/checksum.rs` beside the GPUs of its machine.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::process::Command;

use numagpu_tests::corner::{COMMAND, Corner};
use numagpu_tests::guests::check_driver;
use numagpu_tests::process::Process;
use numagpu_tests::programs::{Turn, example};

#[test]
fn guest_drives_a_device_made_of_the_kit() {
    let turn = Turn::wait();
    let corner = Corner::new();
    let socket = corner.file("checksum.sock");
    let socket = socket.to_string_lossy();
    let mut command = Command::new(example("checksum"));
    command.arg(&*socket);
    let mut device = Process::spawn(command);
    device.wait_for("serving ", COMMAND);
    let argument = format!(
        r#"{{"driver":"vfio-user-pci","bus":"pcie.0","socket":{{"type":"unix","path":"{socket}"}}}}"#
    );
    let (report, _) = corner.verified_beside(
        "two-gpu",
        &[
            "--firmware",
            "ovmf",
            "--kernel",
            "6.12",
            "--",
            "-device",
            &argument,
        ],
        &device,
    );
    drop(turn);
    assert_eq!(report.problems, Vec::<String>::new());
    check_driver(&report.gpus);
    // Words 0x0102030405060708 and up: 0x600 of them, whose low bytes carry into the next.
    let sum: u64 = (0x0102_0304_0506_0708_u64..)
        .take(0x600)
        .flat_map(u64::to_le_bytes)
        .map(u64::from)
        .sum();
    let said = device.said();
    let refused = said.find("refused: the function may not do DMA").unwrap();
    let done = said.find(&format!("done: sum {sum:#x}")).unwrap();
    assert!(refused < done, "{said}");
}
