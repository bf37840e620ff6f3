//! Clients that want to map more than the process has addresses, mappings and descriptors for.

use std::os::fd::AsFd as _;

use numagpu_devices::bus::DmaAccess;
use numagpu_vmm_glue::service::take_descriptors;
use numagpu_vmm_glue::vfio_user::dma::room::OF_CLIENT;

use crate::device::{is_alone, serve};
use crate::raw::*;

const ENOMEM: u32 = 12;
const TIB: u64 = 1 << 40;

/// As many clients as would fill all addresses, and then one with an ordinary wish.
#[test]
fn clients_with_sparse_files_leave_addresses_for_others() {
    if !is_alone("room::clients_with_sparse_files_leave_addresses_for_others") {
        return;
    }
    let greedy: Vec<_> = (0..9).map(|_| serve()).collect();
    let mut raws: Vec<_> = greedy.iter().map(|it| Raw::ready(&it.path())).collect();
    let mut granted = 0;
    for raw in &mut raws {
        let before = granted;
        // Ever smaller ones, until not a page more is had.
        for size in (12..=46).rev().map(|bits| 1 << bits).chain([4096; 8]) {
            let body = map_body(3, 0, granted, size);
            match raw.errno(DMA_MAP, &body, &[memfd(size).as_fd()]) {
                0 => granted += size,
                errno => assert_eq!(errno, ENOMEM),
            }
        }
        assert!(granted - before <= OF_CLIENT.bytes);
    }
    assert_eq!(granted, 96 * TIB);
    // Whoever gives something back has it for another.
    assert_eq!(
        raws[0].errno(DMA_UNMAP, &unmap_body(0, 0, 16 * TIB), &[]),
        0
    );
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    let (size, body) = (TIB, map_body(3, 0, 0, TIB));
    assert_eq!(raw.errno(DMA_MAP, &body, &[memfd(size).as_fd()]), 0);
    let dma = served.probe.attachment().dma;
    let mut seen = 0;
    dma.access(TIB - 8, 8, DmaAccess::Read, &mut |slice| {
        seen += slice.len()
    })
    .unwrap();
    assert_eq!(seen, 8);
    // Not without it, but threads and allocations are to be had.
    drop(raws);
    for it in &greedy {
        it.probe.wait_detached();
    }
    let mut raw = Raw::ready(&greedy[8].path());
    let body = map_body(3, 0, 0, 16 * TIB);
    assert_eq!(raw.errno(DMA_MAP, &body, &[memfd(16 * TIB).as_fd()]), 0);
}

#[test]
fn a_client_with_many_files_is_refused_one_day_and_keeps_those_it_has() {
    if !is_alone("room::a_client_with_many_files_is_refused_one_day_and_keeps_those_it_has") {
        return;
    }
    take_descriptors();
    let served = serve();
    let mut raw = Raw::ready(&served.path());
    for index in 0..OF_CLIENT.mappings + 3 {
        let body = map_body(3, 0, index * 4096, 4096);
        let errno = raw.errno(DMA_MAP, &body, &[memfd(4096).as_fd()]);
        let want = if index < OF_CLIENT.mappings {
            0
        } else {
            ENOMEM
        };
        assert_eq!(errno, want, "file {index}");
    }
    assert_eq!(raw.errno(DMA_UNMAP, &unmap_body(0, 0, 4096), &[]), 0);
    let ram = memfd(1 << 20);
    for page in 0..256 {
        let body = map_body(3, page * 4096, (1 << 32) + page * 4096, 4096);
        assert_eq!(raw.errno(DMA_MAP, &body, &[ram.as_fd()]), 0, "of one file");
    }
}
