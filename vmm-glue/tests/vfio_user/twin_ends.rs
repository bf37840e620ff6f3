//! Second sockets that end, or that a client does not serve.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use numagpu_devices::bus::DmaError;

use crate::asked::{RAM, pattern, read, write};
use crate::device::{Served, is_alone, serve};
use crate::raw::*;
use crate::twin::{FAILED, INFO, Mover, is_quiet, twins};

#[test]
fn a_client_that_closes_the_second_socket_is_asked_no_more_and_served_on() {
    let served = serve();
    let (mut main, mut twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(&*dma, RAM, 4));
        twin.answer();
        let since = Instant::now();
        drop(twin);
        assert_eq!(waits.join().unwrap(), Err(FAILED));
        assert!(since.elapsed() < Duration::from_secs(1));
    });
    let since = Instant::now();
    assert_eq!(write(&*dma, RAM, &[1; 4]), Err(FAILED));
    // Also for memory that is mapped later.
    let body = map_body(3, 0, 0x1000, 0x1000);
    assert_eq!(main.errno(DMA_MAP, &body, &[]), 0);
    let failed = DmaError::Failed { address: 0x1000 };
    assert_eq!(read(&*dma, 0x1000, 4), Err(failed));
    assert!(since.elapsed() < Duration::from_secs(1));
    assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
    assert!(is_quiet(&main));
}

#[test]
fn a_client_that_never_answers_there_is_given_up_and_served_meanwhile() {
    let served = serve();
    let (mut main, mut twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    let since = Instant::now();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| read(&*dma, RAM, 4));
        let mut requests = 0;
        while !waits.is_finished() {
            let asked = Instant::now();
            assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
            assert!(asked.elapsed() < Duration::from_secs(1));
            requests += 1;
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(waits.join().unwrap(), Err(FAILED));
        assert!(requests > 10, "{requests}");
    });
    let waited = since.elapsed();
    assert!(waited >= Duration::from_secs(4) && waited < Duration::from_secs(8));
    twin.answer();
    // Nor is it asked for this memory again, until it is mapped anew.
    let since = Instant::now();
    assert_eq!(write(&*dma, RAM, &[0; 4]), Err(FAILED));
    assert!(since.elapsed() < Duration::from_secs(1));
    assert!(is_quiet(&twin));
}

/// A client that reads nothing there: the socket fills, and neither its own requests nor those who ask wait for ever.
#[test]
fn a_client_that_does_not_read_there_is_given_up_and_served_meanwhile() {
    let served = serve();
    let (mut main, _twin) = twins(&served);
    let dma = served.probe.attachment().dma;
    let since = Instant::now();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..8)
            .map(|n| {
                let dma = &dma;
                scope.spawn(move || write(&**dma, RAM + n * 0x1_0000, &pattern(0x1_0000)))
            })
            .collect();
        while !all.iter().all(|it| it.is_finished()) {
            let asked = Instant::now();
            assert_eq!(main.errno(GET_INFO, &words(&INFO), &[]), 0);
            assert!(asked.elapsed() < Duration::from_secs(1));
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(all.into_iter().all(|it| it.join().unwrap().is_err()));
    });
    assert!(since.elapsed() < Duration::from_secs(30));
}

/// Has the serving thread ask a client that does not answer, and waits until it does.
fn serving_thread_waits(
    served: &Served,
    main: &Raw,
    twin: &mut Raw,
) -> Arc<Mutex<Option<DmaError>>> {
    let seen = Arc::new(Mutex::new(None));
    let result = Arc::clone(&seen);
    served.probe.state().on_write = Some(Arc::new(move |attachment| {
        *result.lock().unwrap() = read(&*attachment.dma, RAM, 4).err();
    }));
    main.send(&message(WRITE, &region_body(0, 0, 1, &[1])), &[]);
    assert_eq!(twin.answer().command, DMA_READ);
    seen
}

#[test]
fn a_server_that_stops_wakes_who_waits_for_the_second_socket() {
    let served = serve();
    let (main, mut twin) = twins(&served);
    let seen = serving_thread_waits(&served, &main, &mut twin);
    let since = Instant::now();
    let Served { probe, server, .. } = served;
    server.shutdown();
    assert!(since.elapsed() < Duration::from_secs(1));
    assert_eq!(*seen.lock().unwrap(), Some(DmaError::Disconnected));
    assert!(probe.state().attachment.is_none());
    assert!(twin.is_closed());
}

/// The same for one who waits for room in it.
#[test]
fn a_server_that_stops_wakes_who_sends_over_the_second_socket() {
    let served = serve();
    let (main, twin) = twins(&served);
    let seen = Arc::new(Mutex::new(None));
    let result = Arc::clone(&seen);
    let dma = served.probe.attachment().dma;
    // As much as the socket takes is sent by others, who wait for their replies.
    let others: Vec<_> = (1..8_u64)
        .map(|n| {
            let dma = Arc::clone(&dma);
            std::thread::spawn(move || write(&*dma, RAM + n * 0x1_0000, &pattern(0x1_0000)))
        })
        .collect();
    served.probe.state().on_write = Some(Arc::new(move |attachment| {
        *result.lock().unwrap() = Some(write(&*attachment.dma, RAM, &pattern(0x1_0000)));
    }));
    main.send(&message(WRITE, &region_body(0, 0, 1, &[1])), &[]);
    std::thread::sleep(Duration::from_millis(200));
    assert!(seen.lock().unwrap().is_none());
    let since = Instant::now();
    served.server.shutdown();
    assert!(since.elapsed() < Duration::from_secs(1));
    let gone = Some(Err(DmaError::Disconnected));
    assert_eq!(*seen.lock().unwrap(), gone);
    for other in others {
        assert_eq!(other.join().unwrap(), Err(DmaError::Disconnected));
    }
    drop(twin);
}

/// "Socket Disconnection Behavior": also of one that keeps its end of the second socket.
#[test]
fn a_client_that_goes_away_ends_the_waits_of_both_sockets() {
    for inside in [false, true] {
        let served = serve();
        let (main, mut twin) = twins(&served);
        let dma = served.probe.attachment().dma;
        std::thread::scope(|scope| {
            let (waits, seen) = if inside {
                (None, Some(serving_thread_waits(&served, &main, &mut twin)))
            } else {
                let waits = scope.spawn(|| read(&*dma, RAM, 4));
                assert_eq!(twin.answer().command, DMA_READ);
                (Some(waits), None)
            };
            let since = Instant::now();
            drop(main);
            served.probe.wait_detached();
            assert!(since.elapsed() < Duration::from_secs(1));
            if let Some(waits) = waits {
                assert_eq!(waits.join().unwrap(), Err(DmaError::Disconnected));
            }
            if let Some(seen) = seen {
                assert_eq!(*seen.lock().unwrap(), Some(DmaError::Disconnected));
            }
        });
        assert!(twin.is_closed());
        assert_eq!(read(&*dma, RAM, 4), Err(DmaError::Disconnected));
        served.probe.state().on_write = None;
        // And the next one is served, with a second socket of its own.
        let (_main, twin) = twins(&served);
        let mover = Mover::new(twin, Duration::ZERO);
        assert!(read(&*served.probe.attachment().dma, RAM, 4).is_ok());
        assert_eq!(mover.asked(), 1);
    }
}

#[test]
fn a_hundred_clients_with_second_sockets_leave_no_descriptor_and_no_thread_behind() {
    if !is_alone(
        "twin_ends::a_hundred_clients_with_second_sockets_leave_no_descriptor_and_no_thread_behind",
    ) {
        return;
    }
    let count = |of: &str| {
        std::fs::read_dir(format!("/proc/self/{of}"))
            .unwrap()
            .count()
    };
    let served = serve();
    let cycle = |n: usize| {
        let (main, mut twin) = twins(&served);
        let dma = served.probe.attachment().dma;
        let asks = std::thread::spawn(move || read(&*dma, RAM, 4));
        twin.answer();
        match n % 3 {
            0 => drop((main, twin)),
            1 => drop((twin, main)),
            _ => {
                drop(main);
                served.probe.wait_detached();
            }
        }
        assert!(asks.join().unwrap().is_err());
        served.probe.wait_detached();
    };
    cycle(0);
    std::thread::sleep(Duration::from_millis(20));
    let before = (count("fd"), count("task"));
    (0..100).for_each(cycle);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((count("fd"), count("task")), before);
}
