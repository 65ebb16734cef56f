//! Guest memory: backings (memfds mapped into this process) and the p2m, the
//! only way from a guest frame number to host memory.
//!
//! `p2m entry = host address of the frame | flags`. Frames without an entry are
//! not RAM: an access to them is an MMIO exit.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes in a guest frame.
pub const PAGE_SIZE: u64 = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// The frame is backed by memory.
pub const P2M_PRESENT: u64 = 1 << 0;
/// The guest may write the frame (clear: ROM, writes become MMIO exits).
pub const P2M_WRITABLE: u64 = 1 << 1;
/// Decoded instructions of this frame exist: a write must invalidate them.
pub const P2M_CODE: u64 = 1 << 2;
/// The frame was written since the dirty log was last taken.
pub const P2M_DIRTY: u64 = 1 << 3;
/// Another process may write the frame (DMA): it is never run from decoded code.
pub const P2M_FOREIGN: u64 = 1 << 4;
/// All flag bits of an entry; the rest is the host address.
pub const P2M_FLAGS: u64 = PAGE_SIZE - 1;

/// Pieces of host memory that one [`Memory::read_file`] fills at most: the kernel's IOV_MAX.
pub const MAX_PIECES: usize = 1024;

/// Entries of /proc/self/pagemap that are read at once; bits of an entry (admin-guide/mm/pagemap): there, or
/// swapped out; a page of a file, or shared.
const PAGEMAP_PIECE: u64 = 4096;
const PAGEMAP_THERE: u64 = 3 << 62;
const PAGEMAP_FILE: u64 = 1 << 61;

static PAGE_MAP: Mutex<Option<(u32, Arc<File>)>> = Mutex::new(None);

/// This process's table of pages, opened once: a process that has given up its files cannot do so any more.
pub fn page_map() -> std::io::Result<Arc<File>> {
    let mut known = PAGE_MAP.lock().unwrap();
    let process = std::process::id();
    match &*known {
        Some((opener, file)) if *opener == process => Ok(file.clone()),
        _ => {
            let file = Arc::new(File::open("/proc/self/pagemap")?);
            *known = Some((process, file.clone()));
            Ok(file)
        }
    }
}

const LEAF_SHIFT: u32 = 9;
const LEAF_ENTRIES: usize = 1 << LEAF_SHIFT;
/// Guest-physical address bits (1 TiB).
pub const PHYS_BITS: u32 = 40;
const TOP_ENTRIES: usize = 1 << (PHYS_BITS - PAGE_SHIFT - LEAF_SHIFT);

type Leaf = [AtomicU64; LEAF_ENTRIES];

struct Backing {
    base: *mut u8,
    size: u64,
    /// Some of it is private.
    private: bool,
}

/// A run of frames as [`Memory::runs`] reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First guest frame.
    pub gfn: u64,
    /// Number of frames.
    pub count: u64,
    /// Backing that holds them.
    pub backing: usize,
    /// Byte offset of the first frame in the backing.
    pub offset: u64,
    /// P2M flags of the run.
    pub flags: u64,
}

/// Why a memory operation was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryError {
    /// A frame number or address is beyond [`PHYS_BITS`].
    OutOfRange,
    /// No backing of that number, or the range is not inside it.
    BadBacking,
    /// Part of the range is not RAM.
    NotRam(u64),
    /// The host's system call failed with this errno.
    System(i32),
}

/// The memory of one domain.
pub struct Memory {
    backings: Mutex<Vec<Backing>>,
    top: Box<[AtomicPtr<Leaf>]>,
    /// Entries of `top` beyond this are not used.
    top_used: AtomicUsize,
    stale_code: Mutex<Vec<u64>>,
    stale_pending: AtomicBool,
    generation: AtomicU64,
    dirty_generation: AtomicU64,
    private: AtomicBool,
}

// SAFETY: the raw pointers are mmaps owned by this object and never unmapped
// before it is dropped; p2m entries are atomics; the guest memory itself is
// only touched through raw pointers, as memory shared with the guest must be.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty memory: no backing, no frame.
    pub fn new() -> Self {
        // Zeroes of the host's, which cost nothing until they are used.
        let zeroes = Box::into_raw(vec![0usize; TOP_ENTRIES].into_boxed_slice());
        // SAFETY: an AtomicPtr has the layout of a usize, and all zeroes are a null pointer.
        let top = unsafe { Box::from_raw(zeroes as *mut [AtomicPtr<Leaf>]) };
        Memory {
            backings: Mutex::new(Vec::new()),
            top,
            stale_code: Mutex::new(Vec::new()),
            stale_pending: AtomicBool::new(false),
            top_used: AtomicUsize::new(0),
            generation: AtomicU64::new(0),
            dirty_generation: AtomicU64::new(0),
            private: AtomicBool::new(false),
        }
    }

    /// Maps `size` bytes of the file descriptor shared; returns the backing's number.
    pub fn add_backing(&self, fd: i32, size: u64) -> Result<usize, MemoryError> {
        self.add_backing_at(fd, 0, size, false)
    }

    /// Maps `size` bytes from `offset` of the file descriptor on; returns the backing's number. `private`: what is
    /// written is this process's alone, and does not reach the file, which must not change any more.
    pub fn add_backing_at(
        &self,
        fd: i32,
        offset: u64,
        size: u64,
        private: bool,
    ) -> Result<usize, MemoryError> {
        let offset = i64::try_from(offset).map_err(|_| MemoryError::OutOfRange)?;
        // SAFETY: a fresh mapping of a descriptor; no existing memory is affected.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing(private) | libc::MAP_NORESERVE,
                fd,
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(MemoryError::System(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)));
        }
        let mut backings = self.backings.lock().unwrap();
        backings.push(Backing { base: base.cast(), size, private });
        self.private.fetch_or(private, Ordering::AcqRel);
        Ok(backings.len() - 1)
    }

    /// Puts another file behind a backing, at the same host addresses, so that nothing that refers to them need be
    /// told. Its contents must be the same, and nobody may write to the backing meanwhile.
    pub fn remap(&self, backing: usize, fd: i32, offset: u64, private: bool) -> Result<(), MemoryError> {
        self.remap_part(backing, 0, None, fd, offset, private)
    }

    /// The same for `length` bytes (whole pages; None: all that follow) from `start` of a backing on.
    pub fn remap_part(
        &self,
        backing: usize,
        start: u64,
        length: Option<u64>,
        fd: i32,
        offset: u64,
        private: bool,
    ) -> Result<(), MemoryError> {
        let offset = i64::try_from(offset).map_err(|_| MemoryError::OutOfRange)?;
        let mut backings = self.backings.lock().unwrap();
        let b = backings.get_mut(backing).ok_or(MemoryError::BadBacking)?;
        let rest = b.size.checked_sub(start).ok_or(MemoryError::BadBacking)?;
        let length = length.unwrap_or(rest);
        if length == 0 || length > rest || (start | length) % PAGE_SIZE != 0 {
            return Err(MemoryError::BadBacking);
        }
        // SAFETY: the range is inside of a mapping of this object's own, as was checked above; one of the same size
        // replaces it in one step. Guest memory is only touched through raw pointers and atomics, which stay valid.
        let result = unsafe {
            libc::mmap(
                b.base.add(start as usize).cast(),
                length as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                sharing(private) | libc::MAP_NORESERVE | libc::MAP_FIXED,
                fd,
                offset,
            )
        };
        if result == libc::MAP_FAILED {
            return Err(MemoryError::System(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)));
        }
        if private || length == b.size {
            b.private = private;
        }
        self.private.store(backings.iter().any(|b| b.private), Ordering::Release);
        self.changed();
        Ok(())
    }

    /// Whether any of the memory may be this process's alone, over a file: the host maps such pages only once.
    pub fn may_be_private(&self) -> bool {
        self.private.load(Ordering::Acquire)
    }

    /// Host addresses of the backings, in the order of their numbers. They stay where they are.
    pub fn addresses(&self) -> Vec<u64> {
        self.backings.lock().unwrap().iter().map(|b| b.base as u64).collect()
    }

    /// Forgets what was written to a private backing: it is as its file is. Nobody may use it meanwhile, and whoever
    /// caches translations or code must drop them.
    pub fn revert(&self, backing: usize) -> Result<(), MemoryError> {
        let backings = self.backings.lock().unwrap();
        let b = backings.get(backing).ok_or(MemoryError::BadBacking)?;
        // SAFETY: a range of this object's own mapping; its pages are filled from the file again when they are touched.
        let result = unsafe { libc::madvise(b.base.cast(), b.size as usize, libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(MemoryError::System(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)));
        }
        self.changed();
        Ok(())
    }

    /// Writes the pages of a private backing that are this process's own into a file, each at its offset. Returns what
    /// was written, as (offset, length) in ascending order. Pages between such that are no more than `gap` apart are
    /// written too, so that there are fewer pieces.
    pub fn write_private(&self, backing: usize, fd: i32, gap: u64) -> Result<Vec<(u64, u64)>, MemoryError> {
        let (base, size) = {
            let backings = self.backings.lock().unwrap();
            let b = backings.get(backing).ok_or(MemoryError::BadBacking)?;
            (b.base, b.size)
        };
        let system = |error: std::io::Error| MemoryError::System(error.raw_os_error().unwrap_or(0));
        let map = page_map().map_err(system)?;
        let mut entries = vec![0u8; (PAGEMAP_PIECE * 8) as usize];
        let mut runs: Vec<(u64, u64)> = Vec::new(); // first page, pages
        let (mut page, pages) = (0u64, size >> PAGE_SHIFT);
        while page < pages {
            let piece = PAGEMAP_PIECE.min(pages - page);
            let entries = &mut entries[..(piece * 8) as usize];
            map.read_exact_at(entries, ((base as u64 >> PAGE_SHIFT) + page) * 8).map_err(system)?;
            for (index, entry) in entries.chunks_exact(8).enumerate() {
                let entry = u64::from_le_bytes(entry.try_into().unwrap());
                if entry & PAGEMAP_THERE == 0 || entry & PAGEMAP_FILE != 0 {
                    continue;
                }
                let own = page + index as u64;
                match runs.last_mut() {
                    Some((first, count)) if own - (*first + *count) <= gap => *count = own + 1 - *first,
                    _ => runs.push((own, 1)),
                }
            }
            page += piece;
        }
        for (first, count) in &mut runs {
            *first <<= PAGE_SHIFT;
            *count <<= PAGE_SHIFT;
            // SAFETY: inside of the backing's mapping, which lives as long as self.
            unsafe { write_all_at(fd, base.add(*first as usize), *count as usize, *first)? };
        }
        Ok(runs)
    }

    fn used(&self) -> &[AtomicPtr<Leaf>] {
        &self.top[..self.top_used.load(Ordering::Acquire)]
    }

    fn slot(&self, gfn: u64, create: bool) -> Option<&AtomicU64> {
        let top = (gfn >> LEAF_SHIFT) as usize;
        let cell = self.top.get(top)?;
        let mut leaf = cell.load(Ordering::Acquire);
        if leaf.is_null() {
            if !create {
                return None;
            }
            let fresh: Box<Leaf> = Box::new(std::array::from_fn(|_| AtomicU64::new(0)));
            let raw = Box::into_raw(fresh);
            self.top_used.fetch_max(top + 1, Ordering::AcqRel);
            match cell.compare_exchange(ptr::null_mut(), raw, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => leaf = raw,
                Err(other) => {
                    // SAFETY: `raw` came from Box::into_raw above and was not published.
                    drop(unsafe { Box::from_raw(raw) });
                    leaf = other;
                }
            }
        }
        // SAFETY: leaves are published once and freed only when the Memory is dropped.
        let leaf = unsafe { &*leaf };
        Some(&leaf[gfn as usize & (LEAF_ENTRIES - 1)])
    }

    /// The p2m entry of a frame; 0 if it is not RAM.
    #[inline]
    pub fn entry(&self, gfn: u64) -> u64 {
        match self.slot(gfn, false) {
            Some(slot) => slot.load(Ordering::Acquire),
            None => 0,
        }
    }

    /// Sets flag bits of a present frame; returns the entry as it was before.
    #[inline]
    pub fn set_flags(&self, gfn: u64, flags: u64) -> u64 {
        match self.slot(gfn, false) {
            Some(slot) => slot.fetch_or(flags & P2M_FLAGS, Ordering::AcqRel),
            None => 0,
        }
    }

    /// Clears flag bits of a frame; returns the entry as it was before.
    #[inline]
    pub fn clear_flags(&self, gfn: u64, flags: u64) -> u64 {
        match self.slot(gfn, false) {
            Some(slot) => slot.fetch_and(!(flags & P2M_FLAGS), Ordering::AcqRel),
            None => 0,
        }
    }

    /// Points `count` frames from `gfn` on at `offset` in a backing.
    pub fn map(
        &self,
        gfn: u64,
        count: u64,
        backing: usize,
        offset: u64,
        flags: u64,
    ) -> Result<(), MemoryError> {
        let end = gfn.checked_add(count).ok_or(MemoryError::OutOfRange)?;
        if end > 1 << (PHYS_BITS - PAGE_SHIFT) {
            return Err(MemoryError::OutOfRange);
        }
        let base = {
            let backings = self.backings.lock().unwrap();
            let b = backings.get(backing).ok_or(MemoryError::BadBacking)?;
            let bytes = count.checked_mul(PAGE_SIZE).ok_or(MemoryError::BadBacking)?;
            let last = offset.checked_add(bytes).ok_or(MemoryError::BadBacking)?;
            if offset % PAGE_SIZE != 0 || last > b.size {
                return Err(MemoryError::BadBacking);
            }
            b.base as u64 + offset
        };
        for i in 0..count {
            let slot = self.slot(gfn + i, true).ok_or(MemoryError::OutOfRange)?;
            slot.store((base + i * PAGE_SIZE) | (flags & P2M_FLAGS) | P2M_PRESENT, Ordering::Release);
        }
        self.changed();
        Ok(())
    }

    /// Removes frames from the p2m: they are not RAM any more.
    pub fn unmap(&self, gfn: u64, count: u64) {
        for i in 0..count {
            if let Some(slot) = self.slot(gfn + i, false) {
                slot.store(0, Ordering::Release);
            }
        }
        self.changed();
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Changes whenever frames were mapped or unmapped, or what is behind a backing was: whoever caches translations
    /// or code must then drop them.
    #[inline]
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// One frame of the p2m as a run of length 1; None if it is not RAM.
    pub fn lookup(&self, gfn: u64) -> Option<Run> {
        let entry = self.entry(gfn);
        if entry & P2M_PRESENT == 0 {
            return None;
        }
        let host = entry & !P2M_FLAGS;
        let backings = self.backings.lock().unwrap();
        let inside = |b: &Backing| (b.base as u64..b.base as u64 + b.size).contains(&host);
        let backing = backings.iter().position(inside)?;
        let offset = host - backings[backing].base as u64;
        Some(Run { gfn, count: 1, backing, offset, flags: entry & (P2M_WRITABLE | P2M_FOREIGN) })
    }

    /// Changes whenever the dirty log was taken: whoever remembers that a frame is
    /// dirty must then forget it.
    #[inline]
    pub fn dirty_generation(&self) -> u64 {
        self.dirty_generation.load(Ordering::Acquire)
    }

    /// The p2m as runs of frames that are contiguous in their backing.
    pub fn runs(&self) -> Vec<Run> {
        let backings = self.backings.lock().unwrap();
        let mut out: Vec<Run> = Vec::new();
        for (t, cell) in self.used().iter().enumerate() {
            let leaf = cell.load(Ordering::Acquire);
            if leaf.is_null() {
                continue;
            }
            // SAFETY: see slot().
            let leaf = unsafe { &*leaf };
            for (l, slot) in leaf.iter().enumerate() {
                let entry = slot.load(Ordering::Acquire);
                if entry & P2M_PRESENT == 0 {
                    continue;
                }
                let gfn = ((t << LEAF_SHIFT) | l) as u64;
                let host = entry & !P2M_FLAGS;
                let flags = entry & (P2M_WRITABLE | P2M_FOREIGN);
                let Some((backing, b)) = backings
                    .iter()
                    .enumerate()
                    .find(|(_, b)| host >= b.base as u64 && host < b.base as u64 + b.size)
                else {
                    continue;
                };
                let offset = host - b.base as u64;
                if let Some(last) = out.last_mut() {
                    if last.gfn + last.count == gfn
                        && last.backing == backing
                        && last.flags == flags
                        && last.offset + last.count * PAGE_SIZE == offset
                    {
                        last.count += 1;
                        continue;
                    }
                }
                out.push(Run { gfn, count: 1, backing, offset, flags });
            }
        }
        out
    }

    /// Copies guest-physical memory out. Every byte must be RAM.
    pub fn read(&self, gpa: u64, out: &mut [u8]) -> Result<(), MemoryError> {
        self.chunks(gpa, out.len(), |entry, at, from, len| {
            // SAFETY: the entry's page is mapped while self lives; `at + len` stays in it.
            unsafe {
                ptr::copy_nonoverlapping(
                    ((entry & !P2M_FLAGS) as *const u8).add(at),
                    out.as_mut_ptr().add(from),
                    len,
                );
            }
        })
    }

    /// Copies bytes into guest-physical memory, as DMA does: decoded code of the
    /// frames is dropped and they count as dirty. Every byte must be RAM; ROM is
    /// written too (this is how it is loaded).
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.chunks(gpa, data.len(), |_, _, _, _| ())?;
        let mut gfn = gpa >> PAGE_SHIFT;
        self.chunks(gpa, data.len(), |entry, at, from, len| {
            // SAFETY: as in read().
            unsafe {
                ptr::copy_nonoverlapping(
                    data.as_ptr().add(from),
                    ((entry & !P2M_FLAGS) as *mut u8).add(at),
                    len,
                );
            }
            self.written(gfn);
            gfn += 1;
        })
    }

    /// Reads from a file straight into guest-physical memory, `parts` (address, bytes) one after
    /// the other, as far as the host has the bytes at hand: it waits for no disk. Returns how many
    /// bytes from the start arrived; 0 if none were at hand, or if there are more than
    /// [`MAX_PIECES`] pieces. `System` carries the errno of a read that failed. Every byte must be
    /// writable RAM. Decoded code of all the frames is dropped and they count as dirty.
    pub fn read_file(&self, fd: i32, offset: u64, parts: &[(u64, u64)]) -> Result<usize, MemoryError> {
        let mut pieces: Vec<libc::iovec> = Vec::new();
        for &(gpa, length) in parts {
            let length = usize::try_from(length).map_err(|_| MemoryError::OutOfRange)?;
            let mut refused = None;
            self.chunks(gpa, length, |entry, at, from, len| {
                if entry & P2M_WRITABLE == 0 {
                    refused.get_or_insert(gpa + from as u64);
                }
                let host = (entry & !P2M_FLAGS) as usize + at;
                match pieces.last_mut() {
                    Some(last) if last.iov_base as usize + last.iov_len == host => last.iov_len += len,
                    _ => pieces.push(libc::iovec { iov_base: host as *mut libc::c_void, iov_len: len }),
                }
            })?;
            if let Some(at) = refused {
                return Err(MemoryError::NotRam(at));
            }
        }
        if pieces.is_empty() || pieces.len() > MAX_PIECES {
            return Ok(0);
        }
        let offset = i64::try_from(offset).map_err(|_| MemoryError::OutOfRange)?;
        // SAFETY: each piece lies in pages that are mapped while self lives, of memory that the guest
        // shares, to which there are no references; the kernel refuses a bad descriptor or offset.
        let count = unsafe {
            libc::preadv2(fd, pieces.as_ptr(), pieces.len() as libc::c_int, offset, libc::RWF_NOWAIT)
        };
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        // A failed read may have written something too.
        for &(gpa, length) in parts.iter().filter(|part| part.1 > 0) {
            (gpa >> PAGE_SHIFT..=(gpa + length - 1) >> PAGE_SHIFT).for_each(|gfn| self.written(gfn));
        }
        match usize::try_from(count) {
            Ok(count) => Ok(count),
            Err(_) if errno == libc::EAGAIN || errno == libc::EINTR => Ok(0),
            Err(_) => Err(MemoryError::System(errno)),
        }
    }

    /// A present frame has been written from outside the vCPU: its decoded code is dropped and it counts
    /// as dirty.
    #[inline]
    pub fn written(&self, gfn: u64) {
        if self.set_flags(gfn, P2M_DIRTY) & P2M_CODE != 0 {
            self.post_stale_code(gfn);
        }
    }

    fn chunks(
        &self,
        gpa: u64,
        len: usize,
        mut f: impl FnMut(u64, usize, usize, usize),
    ) -> Result<(), MemoryError> {
        gpa.checked_add(len as u64).ok_or(MemoryError::OutOfRange)?;
        let mut done = 0usize;
        while done < len {
            let at = gpa + done as u64;
            let entry = self.entry(at >> PAGE_SHIFT);
            if entry & P2M_PRESENT == 0 {
                return Err(MemoryError::NotRam(at));
            }
            let offset = (at & (PAGE_SIZE - 1)) as usize;
            let n = (PAGE_SIZE as usize - offset).min(len - done);
            f(entry, offset, done, n);
            done += n;
        }
        Ok(())
    }

    /// A frame has been written through another mapping of its backing: its decoded code is dropped and
    /// it counts as dirty.
    pub fn touch(&self, gfn: u64) {
        if self.entry(gfn) & P2M_PRESENT != 0 && self.set_flags(gfn, P2M_DIRTY) & P2M_CODE != 0 {
            self.post_stale_code(gfn);
        }
    }

    /// Another process may write the frame from now on (or no more): until then it is never run from
    /// decoded code. Either way what was decoded of it is dropped, and it counts as dirty.
    pub fn foreign(&self, gfn: u64, on: bool) {
        if self.entry(gfn) & P2M_PRESENT == 0 {
            return;
        }
        let before = if on { self.set_flags(gfn, P2M_FOREIGN) } else { self.clear_flags(gfn, P2M_FOREIGN) };
        if (self.set_flags(gfn, P2M_DIRTY) | before) & P2M_CODE != 0 {
            self.post_stale_code(gfn);
        }
    }

    /// Puts `new` into an aligned 32-bit word of a backing if it is `expected`, in one step for
    /// everybody who shares the memory. Returns what was there.
    pub fn compare_exchange(
        &self,
        backing: usize,
        offset: u64,
        expected: u32,
        new: u32,
    ) -> Result<u32, MemoryError> {
        let word = self.word(backing, offset)?;
        let result = word.compare_exchange(expected, new, Ordering::SeqCst, Ordering::SeqCst);
        Ok(result.unwrap_or_else(|found| found))
    }

    /// An aligned 32-bit word of a backing, which others may change at any time.
    pub fn word(&self, backing: usize, offset: u64) -> Result<&AtomicU32, MemoryError> {
        if offset % 4 != 0 {
            return Err(MemoryError::BadBacking);
        }
        let place = self.place(backing, offset, 4)?;
        // SAFETY: an aligned word inside a mapping that lives as long as self (sizes are multiples of
        // 4096); it is memory shared with the guest, to which there are no references but atomic ones.
        Ok(unsafe { AtomicU32::from_ptr(place.cast()) })
    }

    /// The host address of `length` bytes of a backing; they are mapped as long as self lives.
    pub fn place(&self, backing: usize, offset: u64, length: u64) -> Result<*mut u8, MemoryError> {
        let backings = self.backings.lock().unwrap();
        let b = backings.get(backing).ok_or(MemoryError::BadBacking)?;
        let end = offset.checked_add(length).ok_or(MemoryError::BadBacking)?;
        if end > b.size {
            return Err(MemoryError::BadBacking);
        }
        // SAFETY: the offset is inside the mapping.
        Ok(unsafe { b.base.add(offset as usize) })
    }

    fn post_stale_code(&self, gfn: u64) {
        self.stale_code.lock().unwrap().push(gfn);
        self.stale_pending.store(true, Ordering::Release);
    }

    /// Whether [`Memory::take_stale_code`] has something to return.
    #[inline]
    pub fn stale_code_pending(&self) -> bool {
        self.stale_pending.load(Ordering::Acquire)
    }

    /// Frames whose decoded code was overwritten from outside the vCPU.
    pub fn take_stale_code(&self) -> Vec<u64> {
        self.stale_pending.store(false, Ordering::Release);
        std::mem::take(&mut *self.stale_code.lock().unwrap())
    }

    /// Frames written since the last call, in order; clears the log.
    pub fn take_dirty(&self) -> Vec<u64> {
        let mut out = Vec::new();
        for (t, cell) in self.used().iter().enumerate() {
            let leaf = cell.load(Ordering::Acquire);
            if leaf.is_null() {
                continue;
            }
            // SAFETY: see slot().
            let leaf = unsafe { &*leaf };
            for (l, slot) in leaf.iter().enumerate() {
                if slot.fetch_and(!P2M_DIRTY, Ordering::AcqRel) & P2M_DIRTY != 0 {
                    out.push(((t << LEAF_SHIFT) | l) as u64);
                }
            }
        }
        self.dirty_generation.fetch_add(1, Ordering::AcqRel);
        out
    }

    /// As [`Memory::take_dirty`], for `count` frames from `gfn` on; the rest of the log stays.
    /// A range in which nothing was written costs the guest nothing.
    pub fn take_dirty_in(&self, gfn: u64, count: u64) -> Vec<u64> {
        let end = gfn.saturating_add(count).min(1 << (PHYS_BITS - PAGE_SHIFT));
        let dirty = |&gfn: &u64| {
            self.entry(gfn) & P2M_DIRTY != 0 && self.clear_flags(gfn, P2M_DIRTY) & P2M_DIRTY != 0
        };
        let out: Vec<u64> = (gfn..end).filter(dirty).collect();
        if !out.is_empty() {
            self.dirty_generation.fetch_add(1, Ordering::AcqRel);
        }
        out
    }
}

fn sharing(private: bool) -> libc::c_int {
    if private {
        libc::MAP_PRIVATE
    } else {
        libc::MAP_SHARED
    }
}

/// Writes `length` bytes to a file at `offset`.
///
/// # Safety
/// `from` and the bytes after it are mapped.
unsafe fn write_all_at(fd: i32, from: *const u8, length: usize, offset: u64) -> Result<(), MemoryError> {
    let mut done = 0usize;
    while done < length {
        let place = i64::try_from(offset + done as u64).map_err(|_| MemoryError::OutOfRange)?;
        // SAFETY: the caller's; the kernel refuses a bad descriptor or offset.
        let count = unsafe { libc::pwrite(fd, from.add(done).cast(), length - done, place) };
        match usize::try_from(count) {
            Ok(0) => return Err(MemoryError::System(libc::EIO)),
            Ok(count) => done += count,
            Err(_) => {
                let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
                if errno != libc::EINTR {
                    return Err(MemoryError::System(errno));
                }
            }
        }
    }
    Ok(())
}

impl Drop for Memory {
    fn drop(&mut self) {
        for cell in self.used().iter() {
            let leaf = cell.load(Ordering::Acquire);
            if !leaf.is_null() {
                // SAFETY: leaves come from Box::into_raw in slot().
                drop(unsafe { Box::from_raw(leaf) });
            }
        }
        for b in self.backings.lock().unwrap().iter() {
            // SAFETY: mapped in add_backing with this size; nobody holds self any more.
            unsafe { libc::munmap(b.base.cast(), b.size as usize) };
        }
    }
}
