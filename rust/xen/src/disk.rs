//! A disk's requests, done at once where that waits for nothing: plain reads of what the host has in its
//! page cache, and plain writes into it. Everything else is the backend's. Source: xen/include/public/io/blkif.h.

use crate::events::{Served, Service};
use crate::grants::{add_piece, Grants};
use crate::ring::{Place, Ring};
use crate::turn::Turn;
use nonroot_memory::{Memory, MemoryError};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const READ: u8 = 0;
const WRITE: u8 = 1;
const INDIRECT: u8 = 6;
const MOST_SEGMENTS: usize = 11;
/// Segments of an indirect request: 1 MiB.
const MOST_INDIRECT: usize = 256;
const SEGMENT: usize = 8;
const SECTOR: u64 = 512;
const LONGEST_REQUEST: usize = 112;
/// Bytes that are moved for one notification; the rest is the backend's, while the guest goes on.
const BUDGET: u64 = 8 << 20;
/// A write that took longer than this has waited for the storage; for some time the backend does them.
const SLOW: Duration = Duration::from_millis(20);
const PENANCE: Duration = Duration::from_secs(1);

/// A connected disk.
pub struct Disk {
    port: u32,
    ring: Ring,
    turn: Turn,
    grants: Grants,
    long: bool,
    image: OwnedFd,
    /// Bytes of the image that can be read and written here.
    end: AtomicU64,
    writable: bool,
    state: Mutex<State>,
    requests: AtomicU64,
    bytes: AtomicU64,
}

#[derive(Default)]
struct State {
    pieces: Vec<libc::iovec>,
    frames: Vec<u64>,
    writes_from: Option<Instant>,
}

// SAFETY: the pieces are addresses of guest memory that is mapped as long as the disk's ring keeps it.
unsafe impl Send for State {}

struct Request {
    write: bool,
    indirect: bool,
    id: u64,
    sector: u64,
    count: usize,
}

impl Disk {
    /// `port`: the guest's; `places`: the ring's pages; `end`: bytes of the image.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        memory: &Arc<Memory>,
        port: u32,
        places: &[Place],
        long: bool,
        turn: Turn,
        grants: Grants,
        image: OwnedFd,
        end: u64,
        writable: bool,
    ) -> Result<Disk, MemoryError> {
        let ring = Ring::new(memory, places, if long { 112 } else { 108 })?;
        Ok(Disk {
            port,
            ring,
            turn,
            grants,
            long,
            image,
            end: AtomicU64::new(end),
            writable,
            state: Mutex::default(),
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    /// The image has another size.
    pub fn set_end(&self, end: u64) {
        self.end.store(end, Ordering::Relaxed);
    }

    fn parse(&self, slot: &[u8; LONGEST_REQUEST]) -> Option<Request> {
        let word = |at: usize| u64::from_le_bytes(slot[at..at + 8].try_into().unwrap_or_default());
        let (id, sector) = if self.long { (8, 16) } else { (4, 12) };
        let indirect = slot[0] == INDIRECT;
        let operation = if indirect { slot[1] } else { slot[0] };
        let count =
            if indirect { usize::from(slot[2]) | usize::from(slot[3]) << 8 } else { usize::from(slot[1]) };
        let most = if indirect { MOST_INDIRECT } else { MOST_SEGMENTS };
        if !matches!(operation, READ | WRITE) || !(1..=most).contains(&count) {
            return None;
        }
        Some(Request { write: operation == WRITE, indirect, id: word(id), sector: word(sector), count })
    }

    /// Does one request, and writes its response. None: it is the backend's.
    fn perform(&self, memory: &Memory, index: u32, state: &mut State) -> Option<u64> {
        let mut slot = [0u8; LONGEST_REQUEST];
        let slot_bytes = if self.long { 112 } else { 108 };
        self.ring.read(index, &mut slot[..slot_bytes]);
        let request = self.parse(&slot)?;
        if request.write && (!self.writable || state.writes_from.is_some_and(|from| Instant::now() < from)) {
            return None;
        }
        let mut copied = [0u8; MOST_INDIRECT * SEGMENT];
        let bytes = request.count * SEGMENT;
        if request.indirect {
            // After operation, indirect operation, count, id, sector and handle: the pages of segments, the
            // first of which has room for 512.
            let at = if self.long { 28 } else { 24 };
            let reference = u32::from_le_bytes(slot[at..at + 4].try_into().ok()?);
            let page = self.grants.page(memory, reference, false)?;
            // SAFETY: at most 2048 bytes of a mapped page; the guest may change them meanwhile, and there
            // are no references to them.
            unsafe { std::ptr::copy_nonoverlapping(page.host, copied.as_mut_ptr(), bytes) };
        } else {
            let at = if self.long { 24 } else { 20 };
            copied[..bytes].copy_from_slice(&slot[at..at + bytes]);
        }
        state.pieces.clear();
        state.frames.clear();
        let mut sectors = 0;
        for segment in copied[..bytes].chunks_exact(SEGMENT) {
            let reference = u32::from_le_bytes(segment[..4].try_into().ok()?);
            let (first, last) = (u64::from(segment[4]), u64::from(segment[5]));
            if first > last || last > 7 {
                return None;
            }
            let page = self.grants.page(memory, reference, !request.write)?;
            add_piece(&mut state.pieces, page, first * SECTOR, (last - first + 1) * SECTOR);
            if !request.write {
                state.frames.push(page.gfn);
            }
            sectors += last - first + 1;
        }
        let length = sectors * SECTOR;
        let offset = request.sector.checked_mul(SECTOR)?;
        if offset.checked_add(length)? > self.end.load(Ordering::Relaxed) {
            return None;
        }
        let pieces = &state.pieces;
        let count = pieces.len() as libc::c_int;
        let at = i64::try_from(offset).ok()?;
        let done = if request.write {
            let began = Instant::now();
            // SAFETY: each piece lies in pages that are mapped as long as the ring's memory, of memory that
            // the guest shares, to which there are no references.
            let done = unsafe { libc::pwritev(self.image.as_raw_fd(), pieces.as_ptr(), count, at) };
            if began.elapsed() > SLOW {
                state.writes_from = Some(Instant::now() + PENANCE);
            }
            done
        } else {
            // SAFETY: as above.
            let done = unsafe {
                libc::preadv2(self.image.as_raw_fd(), pieces.as_ptr(), count, at, libc::RWF_NOWAIT)
            };
            // A read that failed may have written something, too.
            state.frames.iter().for_each(|&gfn| memory.written(gfn));
            done
        };
        if u64::try_from(done).ok() != Some(length) {
            return None;
        }
        let operation = if request.write { WRITE } else { READ };
        let mut response = [0u8; 16];
        response[..8].copy_from_slice(&request.id.to_le_bytes());
        response[8] = operation;
        self.ring.write(index, &response[..if self.long { 16 } else { 12 }]);
        Some(length)
    }
}

impl Service for Disk {
    fn serve(&self, memory: &Memory) -> Served {
        let Some(mut index) = self.turn.take() else { return Served::default() };
        let mut state = self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let (mut tell, mut all, mut moved) = (false, false, 0);
        'rounds: loop {
            let start = index;
            let Some(count) = self.ring.pending(index) else { break };
            for _ in 0..count {
                let done = if moved < BUDGET { self.perform(memory, index, &mut state) } else { None };
                let Some(bytes) = done else {
                    tell |= self.ring.push(start, index);
                    break 'rounds;
                };
                index = index.wrapping_add(1);
                moved += bytes;
                self.requests.fetch_add(1, Ordering::Relaxed);
            }
            tell |= self.ring.push(start, index);
            if !self.ring.final_check(index, 1) {
                all = true;
                break;
            }
        }
        self.bytes.fetch_add(moved, Ordering::Relaxed);
        self.turn.give(index);
        Served { raise: [tell.then_some(self.port), None], all }
    }

    fn counts(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}
