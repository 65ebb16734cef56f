//! Any sequence of notifications, masks and timers, against a model of Xen's event_2l.c.

use crate::guest::{count, eventfd, memfd, rounds, Random};
use nonroot_memory::{Memory, PAGE_SIZE};
use nonroot_xen::{Action, Layout, Path, Place, Port};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

const VECTOR: u8 = 0xf3;

/// Pending and mask bits, the selector, the upcall, and how often the vCPU and the backend were told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Model {
    pending: Vec<bool>,
    masked: Vec<bool>,
    selector: u64,
    upcall: bool,
    told: u64,
    rung: u64,
}

impl Model {
    fn raise(&mut self, port: usize, bits: usize) {
        if !std::mem::replace(&mut self.pending[port], true) && !self.masked[port] {
            self.select(port, bits);
        }
    }

    fn select(&mut self, port: usize, bits: usize) {
        let before = self.selector;
        self.selector |= 1 << (port / bits);
        if before != self.selector && !std::mem::replace(&mut self.upcall, true) {
            self.told += 1;
        }
    }
}

/// What a port is: closed, Python's, nobody's, a loopback to a port, a backend's.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Closed,
    Python,
    Nobody,
    Loop(usize),
    Bell,
}

fn run(seed: u64, bits: usize) {
    let random = &mut Random(seed);
    let size = bits * bits;
    let (mask, selector) = if bits == 64 { (2560, 8) } else { (2176, 4) };
    let memory = Arc::new(Memory::new());
    let page = memfd(PAGE_SIZE);
    memory.add_backing(page.as_raw_fd(), PAGE_SIZE).unwrap();
    let told = Arc::new(AtomicU64::new(0));
    let counter = told.clone();
    let signal = move |vcpu: usize, vector: u8| {
        assert_eq!((vcpu, vector), (0, VECTOR));
        counter.fetch_add(1, Ordering::SeqCst);
    };
    let path = Path::new(memory.clone(), Place { backing: 0, offset: 0 }, 1, Box::new(signal));
    path.set_layout(Some(Layout { bits: bits as u32, pending: 2048, mask, selector }));
    assert!(path.set_vector(0, VECTOR) && path.set_info(0, Some(Place { backing: 0, offset: 0 })));
    let bell = Arc::new(eventfd());
    let mut kinds = vec![Kind::Closed; size];
    let mut model = Model {
        pending: vec![false; size],
        masked: vec![false; size],
        selector: 0,
        upcall: false,
        told: 0,
        rung: 0,
    };
    let word = |at: usize| memory.word(0, at as u64).unwrap();
    let some = [0, 1, 31, 32, 33, 63, 64, size / 2, size - 1];
    let (mut timer, mut rung) = (0usize, 0);
    for _ in 0..300 {
        let port = some[random.below(some.len() as u64) as usize] % size;
        let bit = 1u32 << (port % 32);
        match random.below(12) {
            0 | 1 => {
                let target = some[random.below(some.len() as u64) as usize] % size;
                let (kind, action) = match random.below(5) {
                    0 => (Kind::Closed, None),
                    1 => (Kind::Python, Some(Action::Python)),
                    2 => (Kind::Nobody, Some(Action::Nothing)),
                    3 => (Kind::Loop(target), Some(Action::Raise(target as u32))),
                    _ => (Kind::Bell, Some(Action::Bell(bell.clone()))),
                };
                kinds[port] = kind;
                path.set_port(port as u32, action.map(|action| Port { vcpu: 0, action }));
            }
            2 => {
                model.masked[port] = true;
                word(mask as usize + port / 32 * 4).fetch_or(bit, Ordering::SeqCst);
            }
            3 => {
                model.pending[port] = false;
                word(2048 + port / 32 * 4).fetch_and(!bit, Ordering::SeqCst);
            }
            4 => {
                (model.selector, model.upcall) = (0, false);
                [0, selector as usize, selector as usize + 4][..if bits == 64 { 3 } else { 2 }]
                    .iter()
                    .for_each(|&at| word(at).store(0, Ordering::SeqCst));
            }
            5 => {
                let done = path.unmask(port as u32);
                assert_eq!(done, !matches!(kinds[port], Kind::Closed));
                if done && std::mem::replace(&mut model.masked[port], false) && model.pending[port] {
                    model.select(port, bits);
                }
            }
            6 => {
                timer = port;
                path.set_timer(0, port as u32);
            }
            7 => {
                let now = random.below(1 << 40);
                path.set_shot(Some(now + random.below(2)), now);
                path.advance(now + 1);
                path.advance(u64::MAX - 1);
                assert_eq!(path.deadline(), None);
                if !matches!(kinds[timer], Kind::Closed) {
                    model.raise(timer, bits);
                }
            }
            8 => assert!(!path.send(random.below(u64::from(u32::MAX)) as u32 | 1 << 20)),
            _ => {
                let done = path.send(port as u32);
                assert_eq!(done, !matches!(kinds[port], Kind::Closed | Kind::Python));
                match kinds[port] {
                    Kind::Loop(other) if !matches!(kinds[other], Kind::Closed) => model.raise(other, bits),
                    Kind::Bell => model.rung += 1,
                    _ => {}
                }
            }
        }
        let read = |area: usize| -> Vec<bool> {
            (0..size)
                .map(|port| word(area + port / 32 * 4).load(Ordering::SeqCst) >> (port % 32) & 1 != 0)
                .collect()
        };
        rung += count(&bell);
        let mut found = u64::from(word(selector as usize).load(Ordering::SeqCst));
        if bits == 64 {
            found |= u64::from(word(selector as usize + 4).load(Ordering::SeqCst)) << 32;
        }
        let state = Model {
            pending: read(2048),
            masked: read(mask as usize),
            selector: found,
            upcall: word(0).load(Ordering::SeqCst) & 0xff != 0,
            told: told.load(Ordering::SeqCst),
            rung,
        };
        assert!(state == model, "seed {seed}, words of {bits} bits, port {port}");
    }
}

#[test]
fn every_sequence_ends_as_in_the_model() {
    let (rounds, seed) = rounds(6);
    for round in 0..rounds {
        run(seed << 32 | round, 64);
        run(seed << 32 | round, 32);
    }
}

#[test]
fn closed_ports_and_vcpus_that_are_told_otherwise_are_left_alone() {
    let guest = crate::guest::Guest::new();
    assert!(guest.path.set_vector(0, 0));
    assert!(!guest.path.send(5) && !guest.path.unmask(5) && !guest.path.raise(5));
    // A timer that was set before must not reach a vCPU without a vector.
    assert!(guest.path.set_timer(0, 5));
    guest.path.set_shot(Some(1), 2);
}
