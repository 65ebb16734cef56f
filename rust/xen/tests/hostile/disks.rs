//! A disk's ring full of anything, against a model of what each request may do.

use crate::guest::{changed, count, memfd, rounds, Guest, Random, PAGE, PORTS, RINGS};
use nonroot_memory::PAGE_SIZE;
use nonroot_xen::{Disk, BACKEND, FREE};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SECTOR: usize = 512;
const SECTORS: u64 = 256;
const SLOTS: u32 = 32;

struct Attached {
    guest: Guest,
    image: File,
    disk: Arc<Disk>,
    long: bool,
    writable: bool,
}

impl Attached {
    fn new(long: bool, writable: bool) -> Attached {
        let guest = Guest::new();
        let image = memfd(SECTORS * SECTOR as u64);
        for sector in 0..SECTORS {
            image.write_all_at(&[sector as u8; SECTOR], sector * SECTOR as u64).unwrap();
        }
        let (place, turn) = ([Guest::ring(0)], guest.turn(FREE));
        let own = OwnedFd::from(image.try_clone().unwrap());
        let end = SECTORS * SECTOR as u64;
        let disk = Disk::new(&guest.memory, PORTS[0], &place, long, turn, guest.grants(), own, end, writable)
            .unwrap();
        let disk = Arc::new(disk);
        assert!(guest.path.attach(PORTS[0], disk.clone()));
        Attached { guest, image, disk, long, writable }
    }

    fn slot(&self) -> usize {
        if self.long {
            112
        } else {
            108
        }
    }

    fn at(&self, index: u32) -> usize {
        64 + (index % SLOTS) as usize * self.slot()
    }

    /// A request that is often good.
    fn request(&self, random: &mut Random) -> Vec<u8> {
        let mut slot: Vec<u8> = (0..self.slot()).map(|_| random.next() as u8).collect();
        if random.once_in(24) {
            return slot;
        }
        let (id, sector, segments) = if self.long { (8, 16, 24) } else { (4, 12, 20) };
        let operation = [0, 0, 0, 1, 1, 1, 3, 5, 6][random.below(9) as usize];
        slot[0] = operation;
        slot[id..id + 8].copy_from_slice(&random.next().to_le_bytes());
        let start = if random.once_in(16) { random.next() } else { random.below(SECTORS) };
        slot[sector..sector + 8].copy_from_slice(&start.to_le_bytes());
        if operation == 6 {
            let count = if random.once_in(8) { random.below(1 << 16) } else { random.below(20) };
            slot[1] = random.below(3) as u8;
            slot[2..4].copy_from_slice(&(count as u16).to_le_bytes());
            let at = segments + 4;
            slot[at..at + 4].copy_from_slice(&Guest::reference(random).to_le_bytes());
        } else {
            slot[1] = random.below(13) as u8;
            for number in 0..11 {
                let at = segments + 8 * number;
                self.segment(random, &mut slot[at..at + 8]);
            }
        }
        slot
    }

    fn segment(&self, random: &mut Random, out: &mut [u8]) {
        out[..4].copy_from_slice(&Guest::reference(random).to_le_bytes());
        let first = random.below(8) as u8;
        out[4] = first;
        out[5] = if random.once_in(16) {
            random.below(256) as u8
        } else {
            first + random.below(8 - u64::from(first)) as u8
        };
    }

    /// What a request does by the rules of blkif.h: false if it is not to be done here.
    fn model(&self, index: u32, ram: &mut [u8], image: &mut [u8]) -> bool {
        let at = RINGS[0] as usize * PAGE + self.at(index);
        let slot = ram[at..at + self.slot()].to_vec();
        let half = |at: usize| u16::from_le_bytes([slot[at], slot[at + 1]]);
        let word = |data: &[u8], at: usize| u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap());
        let (id, sector, inline) = if self.long { (8, 16, 24) } else { (4, 12, 20) };
        let (operation, count, segments) = if slot[0] == 6 {
            let count = usize::from(half(2));
            let Some(gfn) = self.guest.granted(word(&slot, inline + 4), false) else { return false };
            if !(1..=256).contains(&count) {
                return false;
            }
            let from = gfn as usize * PAGE;
            (slot[1], count, ram[from..from + 8 * count].to_vec())
        } else {
            let count = usize::from(slot[1]);
            if !(1..=11).contains(&count) {
                return false;
            }
            (slot[0], count, slot[inline..inline + 8 * count].to_vec())
        };
        let writes = operation == 1;
        if operation > 1 || (writes && !self.writable) {
            return false;
        }
        let mut pieces = Vec::new();
        let mut length = 0;
        for segment in segments.chunks(8).take(count) {
            let Some(gfn) = self.guest.granted(word(segment, 0), !writes) else { return false };
            let (first, last) = (usize::from(segment[4]), usize::from(segment[5]));
            if first > last || last > 7 {
                return false;
            }
            let piece = gfn as usize * PAGE + first * SECTOR..gfn as usize * PAGE + (last + 1) * SECTOR;
            length += piece.len();
            pieces.push(piece);
        }
        let start = long(sector);
        if start > SECTORS || start as usize * SECTOR + length > image.len() {
            return false;
        }
        let mut from = start as usize * SECTOR;
        for piece in pieces {
            let size = piece.len();
            if writes {
                image[from..from + size].copy_from_slice(&ram[piece]);
            } else {
                ram[piece].copy_from_slice(&image[from..from + size]);
            }
            from += size;
        }
        // The response takes the request's place.
        let mut response = [0u8; 16];
        response[..8].copy_from_slice(&slot[id..id + 8]);
        response[8] = operation;
        let size = if self.long { 16 } else { 12 };
        ram[at..at + size].copy_from_slice(&response[..size]);
        true
    }

    fn image(&self) -> Vec<u8> {
        let mut all = vec![0; SECTORS as usize * SECTOR];
        self.image.read_exact_at(&mut all, 0).unwrap();
        all
    }
}

fn run(seed: u64) -> u64 {
    let random = &mut Random(seed);
    let it = Attached::new(random.once_in(2), !random.once_in(4));
    let guest = &it.guest;
    let device = guest.device_contents();
    let mut index = random.next() as u32;
    guest.set_turn(FREE, index);
    guest.head(0, 0).store(index, Ordering::SeqCst);
    guest.head(0, 2).store(index, Ordering::SeqCst);
    let mut done = 0;
    for step in 0..24 {
        guest.shuffle_grants(random);
        if random.once_in(6) {
            // Segments of indirect requests.
            let mut page = vec![0; PAGE];
            page.chunks_mut(8).for_each(|segment| it.segment(random, segment));
            let gfn = 3 + random.below(37);
            guest.ram.write_all_at(&page, gfn * PAGE_SIZE).unwrap();
        }
        let more = random.below(6) as u32;
        for number in 0..more {
            guest.write_ring(0, it.at(index.wrapping_add(number)) as u64, &it.request(random));
        }
        let wrong = random.once_in(8);
        let produced = if wrong { random.next() as u32 } else { index.wrapping_add(more) };
        guest.head(0, 0).store(produced, Ordering::SeqCst);
        guest.head(0, 3).store(random.next() as u32, Ordering::SeqCst);
        let (mut ram, mut image) = (guest.contents(), it.image());
        let (table, before) = (guest.table(), it.disk_counts());
        let busy = random.once_in(10);
        guest.set_turn(if busy { BACKEND } else { FREE }, index);
        assert!(guest.path.send(PORTS[0]));
        let left = count(&guest.bell) != 0;
        assert_eq!(guest.whose_turn(), if busy { BACKEND } else { FREE });
        let served = it.disk_counts() - before;
        assert!(served <= u64::from(SLOTS) && (!busy || served == 0), "seed {seed}");
        let pending = produced.wrapping_sub(index);
        let mut expected = 0;
        while expected < served {
            assert!(
                it.model(index.wrapping_add(expected as u32), &mut ram, &mut image),
                "seed {seed} step {step}"
            );
            expected += 1;
        }
        let context = format!("seed {seed}, step {step}: {served} of {pending}");
        assert!(pending <= SLOTS || served == 0, "{context}");
        assert!(left || served == u64::from(pending), "{context}");
        // Except the ring's head, and what a read that failed has left in frames that are granted.
        let after = guest.contents();
        let head = RINGS[0] as usize * PAGE;
        ram[head..head + 64].copy_from_slice(&after[head..head + 64]);
        assert_eq!(image, it.image(), "{context}");
        let differ = changed(&ram, &after);
        assert!(left && differ.is_subset(&guest.writable()) || differ.is_empty(), "{context}: {differ:?}");
        assert_eq!(table, guest.table(), "{context}");
        assert_eq!(device, guest.device_contents(), "{context}");
        assert_eq!(guest.produced(0), index.wrapping_add(served as u32), "{context}");
        done += served;
        // The backend answers the others, or the guest begins anew.
        index = random.next() as u32;
        guest.head(0, 2).store(index, Ordering::SeqCst);
    }
    done
}

impl Attached {
    fn disk_counts(&self) -> u64 {
        use nonroot_xen::Service;
        self.disk.counts().0
    }
}

#[test]
fn any_requests_do_what_the_model_does_or_nothing() {
    let (rounds, seed) = rounds(10);
    let done: u64 = (0..rounds).map(|round| run(seed << 32 | round)).sum();
    // Writes wait for nothing on any file system.
    assert!(done > 0);
}

#[test]
fn one_notification_moves_a_bounded_number_of_bytes() {
    let it = Attached::new(true, true);
    let guest = &it.guest;
    // 32 indirect writes of 128 KiB each, again and again: the ring's page is where the image's bytes are read to.
    for reference in 0..32 {
        guest.grant(reference, 1, 3 + u64::from(reference));
    }
    let segments: Vec<u8> = (0..512u32).flat_map(|n| [(n % 31 + 1) as u8, 0, 0, 0, 0, 7, 0, 0]).collect();
    guest.ram.write_all_at(&segments, 3 * PAGE_SIZE).unwrap();
    for index in 0..SLOTS {
        let mut slot = [0u8; 112];
        (slot[0], slot[1]) = (6, 1);
        slot[2..4].copy_from_slice(&32u16.to_le_bytes());
        guest.write_ring(0, it.at(index) as u64, &slot);
    }
    guest.head(0, 0).store(SLOTS, Ordering::SeqCst);
    let begin = Instant::now();
    assert!(guest.path.send(PORTS[0]));
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert_eq!(it.disk_counts(), u64::from(SLOTS));
    guest.path.detach(PORTS[0]);
    guest.head(0, 0).store(SLOTS + 1, Ordering::SeqCst);
    count(&guest.bell);
    assert!(guest.path.send(PORTS[0]));
    assert_eq!((count(&guest.bell), it.disk_counts()), (1, u64::from(SLOTS)));
}

#[test]
fn everything_changes_while_requests_are_done_and_the_disk_comes_and_goes() {
    let it = Attached::new(true, true);
    let guest = &it.guest;
    let (rounds, seed) = rounds(1);
    let stop = AtomicBool::new(false);
    let quiet = guest.contents();
    let device = guest.device_contents();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let random = &mut Random(seed);
            while !stop.load(Ordering::Relaxed) {
                guest.shuffle_grants(random);
                let slot = it.request(random);
                guest.write_ring(0, it.at(random.next() as u32) as u64, &slot);
                guest
                    .head(0, 0)
                    .store(guest.produced(0).wrapping_add(random.below(34) as u32), Ordering::SeqCst);
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                guest.path.detach(PORTS[0]);
                let before = it.disk_counts();
                std::thread::yield_now();
                // Nothing is served between `detach` and `attach`.
                assert_eq!(it.disk_counts(), before);
                assert!(guest.path.attach(PORTS[0], it.disk.clone()));
            }
        });
        let end = Instant::now() + Duration::from_millis(150 * rounds.min(1000));
        while Instant::now() < end {
            assert!(guest.path.send(PORTS[0]));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let able: std::collections::BTreeSet<u64> = (3..40).chain([RINGS[0]]).collect();
    assert!(changed(&quiet, &guest.contents()).is_subset(&able));
    assert_eq!(device, guest.device_contents());
    assert_eq!(guest.whose_turn(), FREE);
}
