//! The server of `examples/vfio_user_server.rs`, made from command lines and driven by a vfio-user client.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[allow(dead_code, reason = "the example's own main")]
#[path = "../examples/vfio_user_server.rs"]
mod vfio_user_server;

use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use clap::Parser as _;
use numagpu_vmm_glue::vfio_user::Server;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use tempfile::TempDir;
use vfio_user::Client;
use vfio_user_server::{Arguments, Scratch, start};

fn started(options: &str) -> (Server, Arc<Scratch>, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let words = ["server", "--socket-path", path.to_str().unwrap()];
    let words = words.into_iter().chain(options.split_whitespace());
    let (server, scratch) = start(&Arguments::try_parse_from(words).unwrap()).unwrap();
    (server, scratch, dir)
}

#[test]
fn regions_and_vectors_are_those_of_the_command_line() {
    let (server, _, _dir) = started("--region 0:0x100 --region 2:65536:map --vectors 9");
    let mut client = Client::new(server.path()).unwrap();
    for (index, size) in [(0, 0x100), (1, 0), (2, 65536), (7, 4096)] {
        let region = client.region(index).unwrap();
        assert_eq!(region.size, size);
        assert_eq!(region.file_offset.is_some(), index == 2);
    }
    assert_eq!(client.get_irq_info(2).unwrap().count, 9);
    for (region, offset) in [(0, 0xf8), (2, 0), (7, 4088)] {
        client.region_write(region, offset, b"scratch!").unwrap();
        let mut seen = [0; 8];
        client.region_read(region, offset, &mut seen).unwrap();
        assert_eq!(&seen, b"scratch!");
    }
    client.reset().unwrap();
    let mut seen = [1; 8];
    client.region_read(2, 0, &mut seen).unwrap();
    assert_eq!(seen, [0; 8]);
}

#[test]
fn lines_make_it_reach_memory_and_interrupt() {
    let (server, scratch, _dir) = started("--max-dma-maps 1");
    assert_eq!(scratch.command("irq 0"), "error: no client");
    let mut client = Client::new(server.path()).unwrap();
    let ram = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&ram, 0x2000).unwrap();
    client.dma_map(0, 0x1000, 0x1000, ram.as_raw_fd()).unwrap();
    assert_eq!(scratch.command("write 0x1004 c0ffee"), "ok");
    assert_eq!(scratch.command("copy 0x1004 0x1100 3"), "ok");
    assert_eq!(scratch.command("read 0x10ff 5"), "00c0ffee00");
    let mut seen = [0; 3];
    assert_eq!(rustix::io::pread(&ram, &mut seen, 0x100), Ok(3));
    assert_eq!(seen, [0xc0, 0xff, 0xee]);
    for wrong in [
        "read 0x2000 1",
        "write 0x1000 c0f",
        "write 0x1000 xy",
        "read",
        "",
        "irq x",
    ] {
        assert!(scratch.command(wrong).starts_with("error: "), "{wrong}");
    }
    assert_eq!(scratch.command("irq 0"), "nobody listens");
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    client
        .set_irqs(2, 0x24, 0, 1, &[event.as_raw_fd()])
        .unwrap();
    assert_eq!(scratch.command("irq 0"), "ok");
    assert_eq!(rustix::io::read(&event, &mut [0; 8]), Ok(8));
}

/// Parts of a region that can be mapped ("Sparse Regions"), and interrupts of every index.
#[test]
fn parts_to_map_and_other_interrupts_are_those_of_the_command_line() {
    let (server, scratch, _dir) =
        started("--region 2:0x8000:map=0x2000+0x1000,0x4000+0x2000 --irq 0:1 --irq 1:8 --irq 4:1");
    let mut client = Client::new(server.path()).unwrap();
    let region = client.region(2).unwrap();
    assert_eq!((region.flags, region.file_offset.is_some()), (0b1111, true));
    let areas = region.sparse_areas.iter().map(|it| (it.offset, it.size));
    let areas: Vec<_> = areas.collect();
    assert_eq!(areas, [(0x2000, 0x1000), (0x4000, 0x2000)]);
    for (index, count) in [(0, 1), (1, 8), (2, 1), (3, 0), (4, 1)] {
        let info = client.get_irq_info(index).unwrap();
        assert_eq!(
            (info.count, info.flags),
            (count, if count > 0 { 3 } else { 0 }),
            "{index}"
        );
        if count == 0 {
            continue;
        }
        let last = count - 1;
        let line = format!("irq {index} {last}");
        assert_eq!(scratch.command(&line), "nobody listens");
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let fds = [event.as_raw_fd()];
        client.set_irqs(index, 0x24, last, 1, &fds).unwrap();
        assert_eq!(scratch.command(&line), "ok");
        // And as the client asks for it.
        client.set_irqs(index, 0x21, last, 1, &[]).unwrap();
        let mut times = [0; 8];
        rustix::io::read(&event, &mut times).unwrap();
        assert_eq!(u64::from_ne_bytes(times), 2);
    }
    // Each is disabled by itself.
    client.set_irqs(1, 0x21, 0, 0, &[]).unwrap();
    assert_eq!(scratch.command("irq 1 7"), "nobody listens");
    assert_eq!(scratch.command("irq 0 0"), "ok");
    assert_eq!(scratch.command("irq 4 0"), "ok");
    assert!(scratch.command("irq 5 0").starts_with("error: "));
}

/// "--fd=FDNUM" ("Backend Program Conventions").
#[test]
fn a_socket_may_be_handed_over() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let number = OwnedFd::from(server).into_raw_fd();
    let words = ["server".to_owned(), format!("--fd={number}")];
    let (_server, _scratch) = start(&Arguments::try_parse_from(words).unwrap()).unwrap();
    // VERSION 0.0: id and command come back.
    let mut request = [7_u16, 1].map(u16::to_ne_bytes).concat();
    request.extend(20_u32.to_ne_bytes());
    request.extend([0; 12]);
    client.write_all(&request).unwrap();
    let mut reply = [0; 20];
    client.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..8], request[..8]);
    assert_eq!(reply[8..12], 1_u32.to_ne_bytes());
    let both = ["server", "--fd=3", "--socket-path", "s"];
    assert!(Arguments::try_parse_from(both).is_err());
    assert!(Arguments::try_parse_from(["server"]).is_err());
}

#[test]
fn command_lines_that_make_no_function_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let refused = |options: &str| {
        let words = ["server", "--socket-path", path.to_str().unwrap()];
        let words = words.into_iter().chain(options.split_whitespace());
        let parsed = Arguments::try_parse_from(words);
        parsed.map_or(true, |arguments| start(&arguments).is_err())
    };
    assert!(!refused(""));
    for options in [
        "--region 6:4096",
        "--region 0:0",
        "--region 0",
        "--region 0:100:map",
        "--region 0:4096:rom",
        "--region 0:4096:map:map",
        "--region 0:0x3000:map=0x1000",
        "--region 0:0x3000:map=0x1000+0",
        "--region 0:0x3000:map=0x800+0x1000",
        "--region 0:0x3000:map=0x1000+0x3000",
        "--region 0:0x3000:map=0xfffffffffffff000+0x1000",
        "--region 0:0x3000:map=0x1000+0x1000,0+0x1000",
        "--region 0:0x4000000 --migration",
        "--irq 2:1",
        "--irq 5:1",
        "--irq 0:2",
        "--irq 1:33",
        "--irq 1",
        "--region 0:4096 --region 0:4096",
        "--config-size 100",
    ] {
        assert!(refused(options), "{options}");
    }
}
