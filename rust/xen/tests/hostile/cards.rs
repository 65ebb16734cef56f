//! A card's rings full of anything, and a link that brings anything.

use crate::guest::{changed, eventfd, rounds, Guest, Random, NEVER_GRANTED, PORTS, RINGS};
use nonroot_xen::{Card, BACKEND, PATH};
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SLOTS: u64 = 256;

struct Attached {
    guest: Guest,
    card: Arc<Card>,
    peer: OwnedFd,
}

impl Attached {
    fn new() -> Attached {
        let guest = Guest::new();
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors, which are nobody else's.
        let [near, peer] = unsafe {
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            assert_eq!(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()), 0);
            ends.map(|end| OwnedFd::from_raw_fd(end))
        };
        let (tx, rx, turn) = (Guest::ring(0), Guest::ring(1), guest.turn(PATH));
        let card = Card::new(&guest.memory, tx, rx, PORTS, turn, guest.grants(), near, eventfd()).unwrap();
        let card = Arc::new(card);
        for port in PORTS {
            assert!(guest.path.attach(port, card.clone()));
        }
        Attached { guest, card, peer }
    }

    /// The next message of the guest's.
    fn take(&self) -> Option<Vec<u8>> {
        let mut data = vec![0u8; 70_000];
        // SAFETY: as many bytes as the buffer has.
        let got = unsafe { libc::recv(self.peer.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), 0) };
        data.truncate(usize::try_from(got).ok()?);
        Some(data)
    }

    fn give(&self, data: &[u8]) {
        // SAFETY: the message's own bytes.
        unsafe { libc::send(self.peer.as_raw_fd(), data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL) };
    }

    /// Requests for one packet; their number.
    fn packet(&self, random: &mut Random, from: u32) -> u32 {
        let extra = random.once_in(5);
        let pieces = if random.once_in(16) { random.below(22) + 1 } else { random.below(4) + 1 };
        let sizes: Vec<u16> = (0..pieces).map(|_| random.below(2000) as u16).collect();
        let total = sizes.iter().map(|&size| u32::from(size)).sum::<u32>() as u16;
        let mut slots = Vec::new();
        for (number, &size) in sizes.iter().enumerate() {
            let mut flags = [0, 1, 2, 3][random.below(4) as usize];
            flags |= if number + 1 < sizes.len() { 4 } else { 0 } | if extra && number == 0 { 8 } else { 0 };
            let size = if number == 0 { total } else { size };
            let end = if random.once_in(12) { 65536 } else { 2096 };
            let offset = random.below(end) as u16;
            let id = random.next() as u16;
            let mut slot = Guest::reference(random).to_le_bytes().to_vec();
            for field in [offset, flags, id, if random.once_in(24) { random.next() as u16 } else { size }] {
                slot.extend(field.to_le_bytes());
            }
            slots.push(slot);
            if extra && number == 0 {
                let kind = if random.once_in(6) { random.next() as u8 } else { 1 };
                slots.push(vec![
                    kind,
                    0,
                    random.below(9) as u8 / 8,
                    5,
                    [1, 2, 1, 7][random.below(4) as usize],
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                    0,
                ]);
            }
        }
        for (number, slot) in slots.iter().enumerate() {
            let at = 64 + u64::from(from.wrapping_add(number as u32)) % SLOTS * 12;
            self.guest.write_ring(0, at, slot);
        }
        slots.len() as u32
    }

    /// A frame of the link, which is often good.
    fn frame(random: &mut Random) -> Vec<u8> {
        let size = [10, 14, 60, 1514, 4096, 9000, 65_535, 65_549, 65_550][random.below(9) as usize];
        let mut data = vec![0xa5; size + 4];
        let kind = if random.once_in(3) { random.below(4) as u8 } else { 0 };
        data[..4].copy_from_slice(&[random.below(5) as u8, kind, if kind == 0 { 0 } else { 9 }, 5]);
        if kind == 0 && !random.once_in(9) {
            data[3] = 0;
        }
        data
    }

    fn check_messages(&self, context: &str) -> u64 {
        let mut number = 0;
        while let Some(data) = self.take() {
            assert!((18..=4 + 65_549).contains(&data.len()), "{context}");
            let size = u16::from_le_bytes([data[2], data[3]]);
            assert!(data[0] & !3 == 0 && data[1] <= 2 && (data[1] == 0) == (size == 0), "{context}");
            // Frame n is filled with n + 1: nothing comes from one that is never granted, or from the rings.
            let secret: BTreeSet<u8> = NEVER_GRANTED.map(|gfn| gfn as u8 + 1).collect();
            assert!(!data[4..].iter().any(|byte| secret.contains(byte)), "{context}");
            number += 1;
        }
        number
    }
}

fn run(seed: u64) -> (u64, bool) {
    let random = &mut Random(seed);
    let it = Attached::new();
    let guest = &it.guest;
    let device = guest.device_contents();
    let (mut produced, mut offered, mut sent, mut gone) = (0u32, 0u32, 0, false);
    // At first what is mostly good.
    for step in 0..24 {
        let context = format!("seed {seed}, step {step}");
        if step % 6 == 0 {
            guest.shuffle_grants(random);
        }
        if step < 8 {
            (0..24).for_each(|reference| guest.grant(reference, 1, 3 + u64::from(reference)));
        }
        for _ in 0..random.below(3) {
            produced = produced.wrapping_add(it.packet(random, produced));
        }
        for _ in 0..random.below(24) {
            let mut slot = (offered as u16).to_le_bytes().to_vec();
            slot.extend([0, 0]);
            slot.extend(Guest::reference(random).to_le_bytes());
            guest.write_ring(1, 64 + u64::from(offered) % SLOTS * 8, &slot);
            offered = offered.wrapping_add(u32::from(offered.wrapping_sub(guest.produced(1)) < 250));
        }
        (0..random.below(4)).for_each(|_| it.give(&Attached::frame(random)));
        let wrong = step > 12 && random.once_in(8);
        guest.head(0, 0).store(if wrong { random.next() as u32 } else { produced }, Ordering::SeqCst);
        guest.head(1, 0).store(if wrong { random.next() as u32 } else { offered }, Ordering::SeqCst);
        guest.head(1, 3).store(random.next() as u32, Ordering::SeqCst);
        let (before, table) = (guest.contents(), guest.table());
        assert!(guest.path.send(PORTS[step % 2]));
        sent += it.check_messages(&context);
        let after = guest.contents();
        let able: BTreeSet<u64> = guest.writable().into_iter().chain(RINGS).collect();
        let differ = changed(&before, &after);
        assert!(differ.is_subset(&able), "{context}: {differ:?}");
        assert!(!gone || differ.is_empty(), "{context}");
        assert_eq!(table, guest.table(), "{context}: a mark is left");
        assert_eq!(device, guest.device_contents(), "{context}");
        gone = !guest.has_engine();
        assert!(!gone || guest.whose_turn() == BACKEND, "{context}");
    }
    (sent, gone)
}

#[test]
fn any_packets_and_frames_keep_to_what_is_granted() {
    let (rounds, seed) = rounds(30);
    let (mut sent, mut gone) = (0, 0);
    for round in 0..rounds {
        let (packets, left) = run(seed << 32 | round);
        sent += packets;
        gone += u64::from(left);
    }
    assert!(sent > 0 && gone > 0, "{sent} packets, {gone} cards left to the backend");
}

#[test]
fn a_card_stops_while_everything_changes() {
    let (rounds, seed) = rounds(6);
    for round in 0..rounds.min(4000) {
        let it = Attached::new();
        let guest = &it.guest;
        let quiet = guest.contents();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let runner = scope.spawn(|| it.card.run(&Arc::downgrade(&guest.path)));
            scope.spawn(|| {
                let random = &mut Random(seed << 32 | round);
                let mut produced = 0u32;
                while !stop.load(Ordering::Relaxed) {
                    guest.shuffle_grants(random);
                    produced = produced.wrapping_add(it.packet(random, produced));
                    // The index comes and goes, as no frontend's does.
                    guest.head(0, 0).store(produced, Ordering::SeqCst);
                    guest.head(0, 0).store(guest.produced(0), Ordering::SeqCst);
                    guest.head(1, 0).store(guest.produced(1).wrapping_add(200), Ordering::SeqCst);
                    it.give(&Attached::frame(random));
                    guest.path.send(PORTS[0]);
                    while it.take().is_some() {}
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            it.card.stop();
            // Nothing is moved any more: what is in the rings now stays so.
            let rings = [guest.produced(0), guest.produced(1)];
            let begin = Instant::now();
            runner.join().unwrap();
            assert!(begin.elapsed() < Duration::from_secs(20));
            assert_eq!(rings, [guest.produced(0), guest.produced(1)]);
            stop.store(true, Ordering::Relaxed);
        });
        let able: BTreeSet<u64> = (3..NEVER_GRANTED.start).chain(RINGS).collect();
        assert!(changed(&quiet, &guest.contents()).is_subset(&able));
    }
}
