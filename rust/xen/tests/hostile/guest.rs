//! A guest by hand: real memory, real descriptors, and a generator of what it does.

use nonroot_memory::{Memory, P2M_WRITABLE, PAGE_SIZE};
use nonroot_xen::{Action, Grants, Layout, Path, Place, Port, Turn, PATH};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

pub const PAGE: usize = PAGE_SIZE as usize;
/// Frames of the RAM's backing; the last ones are not writable.
pub const FRAMES: u64 = 64;
pub const READ_ONLY: u64 = 56;
/// Frames that no grant ever names.
pub const NEVER_GRANTED: std::ops::Range<u64> = 40..48;
/// Where memory of another device is mapped (of video, say).
pub const DEVICE: u64 = 0x100;
pub const DEVICE_FRAMES: u64 = 2;
/// Frames of the rings.
pub const RINGS: [u64; 2] = [1, 2];
pub const ENTRIES: u32 = 512;
pub const PORTS: [u32; 2] = [5, 6];
pub const PERMIT: u32 = 1;
pub const READONLY: u32 = 4;
const TABLE: u64 = PAGE_SIZE;

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

pub fn memfd(size: u64) -> File {
    // SAFETY: a name that lives as long as the call; the new descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"nonroot-test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(size).unwrap();
    file
}

pub fn eventfd() -> OwnedFd {
    // SAFETY: the new descriptor is nobody else's.
    unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) }
}

/// How often an eventfd was written.
pub fn count(fd: &OwnedFd) -> u64 {
    let mut value = 0u64;
    // SAFETY: eight bytes that live as long as the call.
    let got = unsafe { libc::read(fd.as_raw_fd(), (&raw mut value).cast(), 8) };
    if got == 8 {
        value
    } else {
        0
    }
}

pub struct Guest {
    pub memory: Arc<Memory>,
    pub ram: File,
    pub device: File,
    own: File,
    journal: File,
    pub path: Arc<Path>,
    pub bell: Arc<OwnedFd>,
}

impl Guest {
    pub fn new() -> Guest {
        let memory = Arc::new(Memory::new());
        let (ram, own, device) =
            (memfd(FRAMES * PAGE_SIZE), memfd(2 * PAGE_SIZE), memfd(DEVICE_FRAMES * PAGE_SIZE));
        for file in [&ram, &own, &device] {
            memory.add_backing(file.as_raw_fd(), file.metadata().unwrap().len()).unwrap();
        }
        memory.map(0, READ_ONLY, 0, 0, P2M_WRITABLE).unwrap();
        memory.map(READ_ONLY, FRAMES - READ_ONLY, 0, READ_ONLY * PAGE_SIZE, 0).unwrap();
        memory.map(DEVICE, DEVICE_FRAMES, 2, 0, P2M_WRITABLE).unwrap();
        for gfn in 0..FRAMES {
            let fill = if RINGS.contains(&gfn) { 0 } else { gfn as u8 + 1 };
            ram.write_all_at(&[fill; PAGE], gfn * PAGE_SIZE).unwrap();
        }
        let path = Path::new(
            memory.clone(),
            Place { backing: 1, offset: 0 },
            1,
            Box::new(|vcpu, vector| {
                assert_eq!((vcpu, vector), (0, 0xf3));
            }),
        );
        path.set_layout(Some(Layout { bits: 64, pending: 2048, mask: 2560, selector: 8 }));
        assert!(path.set_info(0, Some(Place { backing: 1, offset: 0 })));
        assert!(path.set_vector(0, 0xf3));
        let bell = Arc::new(eventfd());
        for port in PORTS {
            path.set_port(port, Some(Port { vcpu: 0, action: Action::Bell(bell.clone()) }));
        }
        Guest { memory, ram, device, own, journal: memfd(PAGE_SIZE), path: Arc::new(path), bell }
    }

    pub fn grants(&self) -> Grants {
        Grants { table: Place { backing: 1, offset: TABLE }, entries: ENTRIES }
    }

    pub fn turn(&self, whose: u32) -> Turn {
        self.set_turn(whose, 0);
        Turn::map(self.journal.as_raw_fd(), 0, 0).unwrap()
    }

    pub fn set_turn(&self, whose: u32, index: u32) {
        self.journal.write_all_at(&whose.to_le_bytes(), 0).unwrap();
        self.journal.write_all_at(&index.to_le_bytes(), 4).unwrap();
    }

    pub fn whose_turn(&self) -> u32 {
        let mut word = [0; 4];
        self.journal.read_exact_at(&mut word, 0).unwrap();
        u32::from_le_bytes(word)
    }

    pub fn has_engine(&self) -> bool {
        self.whose_turn() == PATH
    }

    pub fn ring(number: usize) -> Place {
        Place { backing: 0, offset: RINGS[number] * PAGE_SIZE }
    }

    pub fn word(&self, backing: usize, offset: u64) -> &AtomicU32 {
        self.memory.word(backing, offset).unwrap()
    }

    pub fn entry(&self, reference: u32) -> (&AtomicU32, &AtomicU32) {
        let at = TABLE + u64::from(reference) * 8;
        (self.word(1, at), self.word(1, at + 4))
    }

    pub fn grant(&self, reference: u32, flags: u32, gfn: u64) {
        let (word, frame) = self.entry(reference);
        frame.store(gfn as u32, Ordering::SeqCst);
        word.store(flags, Ordering::SeqCst);
    }

    /// The frame that a grant lets domain 0 use, by the rules of grant_table.h.
    pub fn granted(&self, reference: u32, write: bool) -> Option<u64> {
        if reference >= ENTRIES {
            return None;
        }
        let (word, frame) = self.entry(reference);
        let (word, gfn) = (word.load(Ordering::SeqCst), u64::from(frame.load(Ordering::SeqCst)));
        let fine = word & 3 == PERMIT && word >> 16 == 0 && !(write && word & READONLY != 0);
        (fine && gfn < if write { READ_ONLY } else { FRAMES }).then_some(gfn)
    }

    /// All frames that some grant lets domain 0 write.
    pub fn writable(&self) -> BTreeSet<u64> {
        (0..ENTRIES).filter_map(|reference| self.granted(reference, true)).collect()
    }

    /// Some grants; most of them are good ones.
    pub fn shuffle_grants(&self, random: &mut Random) {
        for reference in 0..24 {
            let mut gfn = random.below(NEVER_GRANTED.start - 3) + 3;
            let mut flags = PERMIT;
            match random.below(16) {
                0 => flags |= READONLY,
                1 => flags = random.next() as u32,
                2 => flags |= 5 << 16,
                3 => gfn = READ_ONLY + random.below(FRAMES - READ_ONLY),
                4 => gfn = [FRAMES, 1 << 28, 0xffff_ffff, 0xfee00][random.below(4) as usize],
                5 => gfn = DEVICE + random.below(DEVICE_FRAMES),
                6 => flags |= 0x18,
                _ => {}
            }
            self.grant(reference, flags, gfn);
        }
    }

    pub fn reference(random: &mut Random) -> u32 {
        if random.once_in(12) {
            [ENTRIES, ENTRIES - 1, u32::MAX, 1 << 29][random.below(4) as usize]
        } else {
            random.below(24) as u32
        }
    }

    pub fn contents(&self) -> Vec<u8> {
        let mut all = vec![0; (FRAMES as usize) * PAGE];
        self.ram.read_exact_at(&mut all, 0).unwrap();
        all
    }

    pub fn device_contents(&self) -> Vec<u8> {
        let mut all = vec![0; DEVICE_FRAMES as usize * PAGE];
        self.device.read_exact_at(&mut all, 0).unwrap();
        all
    }

    pub fn table(&self) -> Vec<u8> {
        let mut all = vec![0; PAGE];
        self.own.read_exact_at(&mut all, TABLE).unwrap();
        all
    }

    pub fn write_ring(&self, number: usize, at: u64, data: &[u8]) {
        self.ram.write_all_at(data, RINGS[number] * PAGE_SIZE + at).unwrap();
    }

    /// A word of a ring's head: 0 req_prod, 1 req_event, 2 rsp_prod, 3 rsp_event.
    pub fn head(&self, number: usize, index: u64) -> &AtomicU32 {
        self.word(0, RINGS[number] * PAGE_SIZE + 4 * index)
    }

    pub fn produced(&self, number: usize) -> u32 {
        self.head(number, 2).load(Ordering::SeqCst)
    }
}

/// Frames whose bytes differ.
pub fn changed(before: &[u8], after: &[u8]) -> BTreeSet<u64> {
    let pairs = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
    pairs.filter(|(_, (one, other))| one != other).map(|(gfn, _)| gfn as u64).collect()
}

/// Times of a generated test: `NONROOT_FUZZ_ROUNDS`, or `usual`; and the seed: `NONROOT_FUZZ_SEED`, or 1.
pub fn rounds(usual: u64) -> (u64, u64) {
    let read =
        |name: &str, usual: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(usual);
    (read("NONROOT_FUZZ_ROUNDS", usual), read("NONROOT_FUZZ_SEED", 1))
}
