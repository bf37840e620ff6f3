//! Claim, release and loss, as drivers see them.

use numagpu_spec::regs::{Coherence, OwnerEvent, irq, partition};
use numagpu_spec::sdma::const_fill;

use super::*;
use crate::bus::ResetKind;
use crate::ownership::OnDisconnect;
use crate::test_support::Mapping;

#[test]
fn a_claim_waits_for_the_boot() {
    let machine = Machine::new();
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::NotReady);
    assert_eq!(machine.claim(0, 0, 0), OwnerResult::BadToken);
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
    assert_eq!(machine.partition(0, 0, &partition::GENERATION), 1);
}

#[test]
fn a_second_claim_is_refused() {
    let machine = Machine::ready();
    assert_eq!(machine.claim(0, 0, 99), OwnerResult::Busy);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Busy);
    assert_eq!(machine.release(0, 0, 99), OwnerResult::NotOwner);
    assert_eq!(machine.owner_state(0, 0), OwnerState::Claimed);
}

#[test]
fn a_release_scrubs() {
    let machine = Machine::ready();
    machine.run(&const_fill(hbm(0, 0), 0xdead_beef, 4 << 20));
    assert_eq!(bytes(&machine.stores[0][0], 0, 1), [0xef]);
    assert_eq!(machine.release(0, 0, TOKEN), OwnerResult::Ok);
    machine.wait_free(0, 0);
    let all = bytes(&machine.stores[0][0], 0, HBM_SIZE as usize);
    assert!(all.iter().all(|byte| *byte == 0));
    assert_eq!(machine.partition(0, 0, &partition::GENERATION), 2);
    assert_eq!(machine.claim(0, 0, 99), OwnerResult::Ok);
}

#[test]
fn a_transfer_keeps_the_contents() {
    let machine = Machine::ready();
    machine.run(&const_fill(hbm(0, 0), 0x0102_0304, 4096));
    machine.write(0, &partition::BLOCK, 0, &partition::NEW_TOKEN, 42);
    assert_eq!(machine.command(0, 0, 3, TOKEN), OwnerResult::Ok);
    assert_eq!(machine.release(0, 0, TOKEN), OwnerResult::NotOwner);
    assert_eq!(bytes(&machine.stores[0][0], 0, 4), [4, 3, 2, 1]);
    // The queue still acts for the old owner.
    machine.run(&const_fill(hbm(0, 0), 0, 4096));
    assert_eq!(machine.fault(0, 0), (QueueFault::NotOwned, hbm(0, 0), 1));
    assert_eq!(machine.release(0, 0, 42), OwnerResult::Ok);
}

#[test]
fn tokens_are_neither_read_nor_left_lying_about() {
    let machine = Machine::ready();
    machine.write(0, &partition::BLOCK, 0, &partition::TOKEN, TOKEN);
    machine.write(0, &partition::BLOCK, 0, &partition::NEW_TOKEN, TOKEN);
    let mut all = vec![0; 0x1_0000];
    machine.gpus[0].bar_read(0, 0, &mut all);
    let token = TOKEN.to_le_bytes();
    assert!(!all.windows(8).any(|window| window == token));
    assert!(!all.windows(4).any(|window| window == &token[..4]));
    // A command uses the token up: the next one has none.
    machine.write(0, &partition::BLOCK, 0, &partition::COMMAND, 9);
    machine.write(0, &partition::BLOCK, 0, &partition::COMMAND, 2);
    let result = machine.partition(0, 0, &partition::RESULT);
    assert_eq!(result, u64::from(OwnerResult::NotOwner.code()));
}

#[test]
fn a_reset_takes_everything_and_tells() {
    let machine = Machine::ready();
    machine.run(&const_fill(hbm(0, 1), 0xdead_beef, 4096));
    machine.gpus[0].config_write(0x58, &0x8000u16.to_le_bytes());
    machine.wait_free(0, 0);
    machine.wait_free(0, 1);
    assert_eq!(bytes(&machine.stores[0][1], 0, 4096), [0; 4096]);
    assert_eq!(machine.partition(0, 0, &partition::GENERATION), 2);
    assert_eq!(machine.partition(0, 0, &partition::RESULT), 0);
    wait(|| machine.read(0, &irq::BLOCK, 0, &irq::STATUS) == 2);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::NotReady);
    assert_eq!(machine.owner_state(1, 0), OwnerState::Claimed);
}

#[test]
fn a_disconnect_scrubs_what_is_free_too() {
    let machine = Machine::new();
    let slice = machine.stores[0][0].slice(0, 4096).unwrap();
    slice.write_obj(0x55u8, 17).unwrap();
    machine.gpus[0].reset(ResetKind::Function);
    assert_eq!(bytes(&machine.stores[0][0], 17, 1), [0x55]);
    machine.gpus[0].detach();
    machine.wait_free(0, 0);
    assert_eq!(bytes(&machine.stores[0][0], 17, 1), [0]);
}

#[test]
fn a_disconnect_keeps_contents_where_that_is_wanted_but_never_an_owner() {
    let machine = Machine::of(|config| config.on_disconnect = OnDisconnect::Keep);
    machine.boot(0);
    for (partition, claimed) in [(0, true), (1, false)] {
        let slice = machine.stores[0][partition as usize]
            .slice(0, 4096)
            .unwrap();
        slice.write_obj(0x55u8, 17).unwrap();
        if claimed {
            assert_eq!(machine.claim(0, partition, TOKEN), OwnerResult::Ok);
        }
    }
    machine.gpus[0].detach();
    for partition in [0, 1] {
        machine.wait_free(0, partition);
        let index = partition as usize;
        assert_eq!(bytes(&machine.stores[0][index], 17, 1), [0x55]);
        let status = machine.gpus[0].status();
        let last = status.partitions[index].history.last().copied().unwrap();
        assert_eq!((last.event, last.to), (OwnerEvent::Kept, OwnerState::Free));
    }
    // A release and a reset clear all the same.
    machine.gpus[0].attach(machine.vmms[0].attachment());
    machine.boot(0);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
    machine.gpus[0].reset(ResetKind::Function);
    machine.wait_free(0, 0);
    assert_eq!(bytes(&machine.stores[0][0], 17, 1), [0]);
}

#[test]
fn coherence_follows_the_vmms_map() {
    let machine = Machine::new();
    machine.boot(0);
    let code = || {
        machine.gpus[0].dma_changed();
        let code = machine.partition(0, 0, &partition::COHERENCE) as u32;
        Coherence::from_code(code).unwrap()
    };
    let (dma, base) = (&machine.vmms[0].dma, hbm(0, 0));
    let right = Mapping {
        address: base,
        size: HBM_SIZE,
        store: Arc::clone(&machine.stores[0][0]) as _,
        offset: 0,
        writable: true,
        has_fd: true,
    };
    assert_eq!(code(), Coherence::Coherent);
    dma.unmap(base);
    assert_eq!(code(), Coherence::NotMapped);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::NotCoherent);
    let variants = [
        (
            Coherence::NoFd,
            Mapping {
                has_fd: false,
                ..right.clone()
            },
        ),
        (
            Coherence::OtherFile,
            Mapping {
                store: Arc::clone(&machine.stores[1][0]) as _,
                ..right.clone()
            },
        ),
        (
            Coherence::OtherOffset,
            Mapping {
                offset: 4096,
                ..right.clone()
            },
        ),
        (
            Coherence::Partial,
            Mapping {
                size: HBM_SIZE - 4096,
                ..right.clone()
            },
        ),
        (
            Coherence::ReadOnly,
            Mapping {
                writable: false,
                ..right.clone()
            },
        ),
    ];
    for (expected, mapping) in variants {
        dma.add(mapping);
        assert_eq!(code(), expected);
        dma.unmap(base);
    }
    dma.add(right);
    assert_eq!(code(), Coherence::Coherent);
    assert_eq!(machine.claim(0, 0, TOKEN), OwnerResult::Ok);
}
