//! Guest memory as instructions see it: segmentation, then the TLB, then the
//! slow path (page walk, A/D bits, MMIO, code invalidation, page crossing).

use crate::cpu::Cpu;
use crate::state::*;
use crate::tlb::{context, ENTRIES};
use crate::walk::{Access, Kind, Translation};
use nonroot_memory::{P2M_CODE, P2M_DIRTY, P2M_FLAGS, P2M_PRESENT, P2M_WRITABLE};

const PAGE_MASK: u64 = !0xfff;

/// Where a linear page leads.
pub enum Target {
    /// RAM: host address of the byte, and the p2m entry of its frame.
    Ram(*mut u8, u64),
    /// Not RAM (or a write to ROM): guest-physical address.
    Mmio(u64),
}

/// Reads `size` (1, 2, 4, 8) bytes at a host address, zero-extended.
///
/// # Safety
/// `host` must be valid for `size` bytes of guest memory.
#[inline(always)]
pub unsafe fn host_load(host: *const u8, size: usize) -> u64 {
    // SAFETY: by the caller's contract; guest memory may change under us, so volatile
    // semantics are not needed but alignment is not guaranteed.
    unsafe {
        match size {
            1 => u64::from(*host),
            2 => u64::from(host.cast::<u16>().read_unaligned()),
            4 => u64::from(host.cast::<u32>().read_unaligned()),
            _ => host.cast::<u64>().read_unaligned(),
        }
    }
}

/// Writes the low `size` (1, 2, 4, 8) bytes at a host address.
///
/// # Safety
/// As for [`host_load`], writable.
#[inline(always)]
pub unsafe fn host_store(host: *mut u8, size: usize, value: u64) {
    // SAFETY: by the caller's contract.
    unsafe {
        match size {
            1 => *host = value as u8,
            2 => host.cast::<u16>().write_unaligned(value as u16),
            4 => host.cast::<u32>().write_unaligned(value as u32),
            _ => host.cast::<u64>().write_unaligned(value),
        }
    }
}

impl Cpu {
    // ---- linear addresses ------------------------------------------------------------

    /// Whether a linear address is canonical (48 bits).
    #[inline(always)]
    pub fn canonical(lin: u64) -> bool {
        ((lin as i64) << 16 >> 16) as u64 == lin
    }

    /// Loads `size` bytes (1, 2, 4, 8) from a linear address with the current
    /// privilege; `seg` decides between #GP and #SS for non-canonical addresses.
    #[inline(always)]
    pub fn load_lin(&mut self, seg: usize, lin: u64, size: usize) -> X<u64> {
        if let Some(host) = self.host_r(lin, size) {
            // SAFETY: a matching entry means that the whole page is mapped RAM.
            return Ok(unsafe { host_load(host, size) });
        }
        self.load_slow(seg, lin, size)
    }

    /// Stores the low `size` bytes to a linear address with the current privilege.
    #[inline(always)]
    pub fn store_lin(&mut self, seg: usize, lin: u64, size: usize, value: u64) -> X {
        if let Some(host) = self.host_rw(lin, size) {
            // SAFETY: a matching write entry means writable, dirty, code-free RAM.
            unsafe { host_store(host, size, value) };
            return Ok(());
        }
        self.store_slow(seg, lin, size, value)
    }

    /// The host address of `size` bytes that may be read and written in place, if
    /// that needs no slow path.
    #[inline(always)]
    pub fn host_rw(&mut self, lin: u64, size: usize) -> Option<*mut u8> {
        debug_assert!(size <= 0x1000);
        // SAFETY: as in host_r.
        let e = unsafe { &(*self.tlb.current).entries[(lin >> 12) as usize & (ENTRIES - 1)] };
        let offset = lin ^ e.write;
        (offset <= 0x1000u64.wrapping_sub(size as u64)).then(|| (e.host + offset) as *mut u8)
    }

    /// The host address of `size` bytes that may be read in place, if that needs no slow path.
    #[inline(always)]
    pub fn host_r(&mut self, lin: u64, size: usize) -> Option<*const u8> {
        debug_assert!(size <= 0x1000);
        // SAFETY: `current` always points at a live Set of self.tlb.
        let e = unsafe { &(*self.tlb.current).entries[(lin >> 12) as usize & (ENTRIES - 1)] };
        let offset = lin ^ e.read;
        (offset <= 0x1000u64.wrapping_sub(size as u64)).then(|| (e.host + offset) as *const u8)
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, seg: usize, lin: u64, size: usize) -> X<u64> {
        let mut buf = [0u8; 8];
        self.check_data(seg, lin, size)?;
        self.load_bytes_lin(seg, lin, &mut buf[..size], false)?;
        Ok(u64::from_le_bytes(buf))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, seg: usize, lin: u64, size: usize, value: u64) -> X {
        self.check_data(seg, lin, size)?;
        self.store_bytes_lin(seg, lin, &value.to_le_bytes()[..size], false)
    }

    /// #AC where it is on. CPUs may leave operands of 16 bytes and more unchecked (SDM 3A 6.15,
    /// interrupt 17), and this one does.
    fn check_alignment(&mut self, lin: u64, size: usize) -> X {
        let checked = self.tlb.context == context::CHECKED && matches!(size, 2 | 4 | 8);
        if checked && lin & (size as u64 - 1) != 0 {
            return Err(self.fault(vector::AC, Some(0)));
        }
        Ok(())
    }

    /// What the fast path of a data access leaves out: canonical addresses, the limit of
    /// flat segments (which only an access across 4 GiB exceeds), alignment.
    pub(crate) fn check_data(&mut self, seg: usize, lin: u64, size: usize) -> X {
        self.check_canonical(seg, lin, size)?;
        // (An access above 4 GiB is a 64-bit one: a frame that an event pushes on its way out of compatibility mode.)
        let crosses = lin <= 0xffff_ffff && lin + (size as u64 - 1) > 0xffff_ffff;
        if self.flat && seg < seg::FS && crosses {
            let v = if seg == seg::SS { vector::SS } else { vector::GP };
            return Err(self.fault(v, Some(0)));
        }
        self.check_alignment(lin, size)
    }

    /// A data write that is not done: raises what it would raise.
    pub fn probe_write(&mut self, seg: usize, lin: u64, size: usize) -> X {
        if self.host_rw(lin, size).is_some() {
            return Ok(());
        }
        self.check_data(seg, lin, size)?;
        let access = Access { kind: Kind::Write, system: false };
        self.probe(lin, access)?;
        if (lin & 0xfff) as usize + size > 0x1000 {
            self.probe(self.wrap((lin | 0xfff).wrapping_add(1)), access)?;
        }
        Ok(())
    }

    /// Wraps a linear address to 32 bits outside long mode, where addresses have no more.
    #[inline]
    fn wrap(&self, lin: u64) -> u64 {
        if self.mode == Mode::Long64 || self.lma() {
            lin
        } else {
            lin & 0xffff_ffff
        }
    }

    fn check_canonical(&mut self, seg: usize, lin: u64, len: usize) -> X {
        let last = lin.wrapping_add(len as u64 - 1);
        if self.lma() && !(Self::canonical(lin) && Self::canonical(last)) {
            let v = if seg == seg::SS { vector::SS } else { vector::GP };
            return Err(self.fault(v, Some(0)));
        }
        Ok(())
    }

    /// Loads any number of bytes from a linear address. `system`: as supervisor,
    /// whatever CPL is (descriptor tables, TSS).
    pub fn load_bytes_lin(&mut self, seg: usize, lin: u64, out: &mut [u8], system: bool) -> X {
        if out.is_empty() {
            return Ok(());
        }
        self.check_canonical(seg, lin, out.len())?;
        let access = Access { kind: Kind::Read, system };
        let room = (0x1000 - (lin & 0xfff)) as usize;
        if out.len() <= room {
            return self.load_chunk(lin, out, access);
        }
        // Crossing pages: all translations come before any data (and before any MMIO).
        let mut at = room;
        self.probe(lin, access)?;
        while at < out.len() {
            self.probe(self.wrap(lin.wrapping_add(at as u64)), access)?;
            at += 0x1000;
        }
        let (mut at, mut next) = (0, room);
        while at < out.len() {
            let lin = self.wrap(lin.wrapping_add(at as u64));
            self.load_chunk(lin, &mut out[at..next], access)?;
            at = next;
            next = (next + 0x1000).min(out.len());
        }
        Ok(())
    }

    /// Stores any number of bytes to a linear address; nothing is written if any
    /// part would fault.
    pub fn store_bytes_lin(&mut self, seg: usize, lin: u64, data: &[u8], system: bool) -> X {
        if data.is_empty() {
            return Ok(());
        }
        self.check_canonical(seg, lin, data.len())?;
        let access = Access { kind: Kind::Write, system };
        let room = (0x1000 - (lin & 0xfff)) as usize;
        if data.len() <= room {
            return self.store_chunk(lin, data, access);
        }
        let mut at = room;
        self.probe(lin, access)?;
        while at < data.len() {
            self.probe(self.wrap(lin.wrapping_add(at as u64)), access)?;
            at += 0x1000;
        }
        let (mut at, mut next) = (0, room);
        while at < data.len() {
            let lin = self.wrap(lin.wrapping_add(at as u64));
            self.store_chunk(lin, &data[at..next], access)?;
            at = next;
            next = (next + 0x1000).min(data.len());
        }
        Ok(())
    }

    fn probe(&mut self, lin: u64, access: Access) -> X {
        self.translate(lin, access).map(|_| ())
    }

    fn load_chunk(&mut self, lin: u64, out: &mut [u8], access: Access) -> X {
        let t = self.translate(lin, access)?;
        self.data_breakpoint(lin, out.len(), false);
        match self.target(t.gpa, false) {
            Target::Ram(host, _) => {
                // SAFETY: `host` is inside a mapped frame and the chunk does not leave the page.
                unsafe {
                    match out.len() {
                        1 | 2 | 4 | 8 => {
                            let v = host_load(host, out.len());
                            out.copy_from_slice(&v.to_le_bytes()[..out.len()]);
                        }
                        n => std::ptr::copy_nonoverlapping(host, out.as_mut_ptr(), n),
                    }
                }
                self.enter(lin, &t, access, false);
                Ok(())
            }
            Target::Mmio(gpa) => self.mmio_load(gpa, out),
        }
    }

    fn store_chunk(&mut self, lin: u64, data: &[u8], access: Access) -> X {
        let t = self.translate(lin, access)?;
        self.data_breakpoint(lin, data.len(), true);
        match self.target(t.gpa, true) {
            Target::Ram(host, entry) => {
                self.before_ram_write(t.gpa, data.len(), entry);
                // SAFETY: as in load_chunk; the frame is writable.
                unsafe {
                    match data.len() {
                        1 | 2 | 4 | 8 => {
                            let mut v = [0u8; 8];
                            v[..data.len()].copy_from_slice(data);
                            host_store(host, data.len(), u64::from_le_bytes(v));
                        }
                        n => std::ptr::copy_nonoverlapping(data.as_ptr(), host, n),
                    }
                }
                self.enter(lin, &t, access, true);
                Ok(())
            }
            Target::Mmio(gpa) => self.mmio_store(gpa, data),
        }
    }

    /// What is at a guest-physical address.
    #[inline]
    pub fn target(&self, gpa: u64, write: bool) -> Target {
        let entry = self.mem.entry(gpa >> 12);
        let lapic = gpa >> 12 == 0xfee00 || self.lapic_moved;
        if entry & P2M_PRESENT == 0
            || write && entry & P2M_WRITABLE == 0
            || lapic && self.lapic.mmio_page() == Some(gpa & PAGE_MASK)
        {
            Target::Mmio(gpa)
        } else {
            Target::Ram(((entry & !P2M_FLAGS) + (gpa & 0xfff)) as *mut u8, entry)
        }
    }

    /// Does what must happen before the vCPU writes to RAM outside the TLB: the
    /// dirty log, and dropping decoded code of the bytes.
    pub fn before_ram_write(&mut self, gpa: u64, len: usize, entry: u64) {
        if self.write_log.is_some() {
            // It is taken back: no code changes, and nothing is dirty that was not.
            self.log_write((entry & !P2M_FLAGS) + (gpa & 0xfff), len);
            return;
        }
        if entry & P2M_DIRTY == 0 {
            self.mem.set_flags(gpa >> 12, P2M_DIRTY);
        }
        if entry & P2M_CODE != 0 {
            self.code_written(gpa, len);
        }
    }

    /// Enters a page into the TLB if nothing about it needs the slow path.
    fn enter(&mut self, lin: u64, t: &Translation, access: Access, write: bool) {
        if access.system
            || !self.config.optimise.tlb
            || self.tlb.context == context::CHECKED
            || self.write_log.is_some()
        {
            return;
        }
        if self.watches_page(lin) {
            return;
        }
        if t.large {
            self.tlb.note_large(lin);
        }
        let page = lin & PAGE_MASK;
        let entry = self.mem.entry(t.gpa >> 12);
        self.tlb.enter(page, entry & !P2M_FLAGS, write && entry & P2M_CODE == 0, t.global);
        if self.audit.is_some() {
            self.audit_translated(lin, t.gpa, access.kind);
        }
    }

    /// Enters the page of `size` bytes at a linear address into the TLB for the present context, if they
    /// lie in one page that needs nothing else; raises nothing.
    pub fn enter_page(&mut self, lin: u64, size: usize, write: bool) -> bool {
        if (lin & 0xfff) as usize + size > 0x1000 || self.lma() && !Self::canonical(lin) {
            return false;
        }
        let access = Access { kind: if write { Kind::Write } else { Kind::Read }, system: false };
        let Ok(t) = self.translate(lin, access) else {
            self.stop = None;
            return false;
        };
        let Target::Ram(_, entry) = self.target(t.gpa, write) else { return false };
        if write && entry & P2M_CODE != 0 {
            return false;
        }
        if write {
            self.before_ram_write(t.gpa, size, entry);
        }
        self.enter(lin, &t, access, write);
        if write {
            self.host_rw(lin, size).is_some()
        } else {
            self.host_r(lin, size).is_some()
        }
    }

    // ---- system structures --------------------------------------------------------------

    /// Loads `size` bytes as supervisor (GDT, LDT, IDT, TSS).
    pub fn load_sys(&mut self, lin: u64, size: usize) -> X<u64> {
        let mut buf = [0u8; 8];
        self.load_bytes_lin(seg::DS, lin, &mut buf[..size], true)?;
        Ok(u64::from_le_bytes(buf))
    }

    /// Stores `size` bytes as supervisor.
    pub fn store_sys(&mut self, lin: u64, size: usize, value: u64) -> X {
        self.store_bytes_lin(seg::DS, lin, &value.to_le_bytes()[..size], true)
    }

    // ---- segmented addresses -----------------------------------------------------------

    /// The linear address of `len` bytes at `offset` in a segment, after all
    /// segment checks. In 64-bit mode only FS and GS have a base.
    #[inline]
    pub fn linear(&mut self, segment: usize, offset: u64, len: usize, write: bool) -> X<u64> {
        if self.mode == Mode::Long64 {
            return Ok(if segment >= seg::FS {
                self.r.seg[segment].base.wrapping_add(offset)
            } else {
                offset
            });
        }
        self.linear_checked(segment, offset, len, write)
    }

    #[inline(never)]
    fn linear_checked(&mut self, segment: usize, offset: u64, len: usize, write: bool) -> X<u64> {
        let s = self.r.seg[segment];
        let fault = if segment == seg::SS { vector::SS } else { vector::GP };
        let offset = offset & 0xffff_ffff;
        let last = offset + (len as u64 - 1);
        if self.protected() {
            let bad_type = s.ar & ar::UNUSABLE != 0
                || if write {
                    s.ar & (ar::CODE | ar::RW) != ar::RW
                } else {
                    s.ar & (ar::CODE | ar::RW) == ar::CODE
                };
            if bad_type {
                return Err(self.fault(if s.ar & ar::UNUSABLE != 0 { fault } else { vector::GP }, Some(0)));
            }
        }
        let limit = u64::from(s.limit);
        let expand_down = s.ar & (ar::CODE | ar::DC) == ar::DC && s.ar & ar::S != 0;
        let out = if expand_down {
            let top = if s.ar & ar::DB != 0 { 0xffff_ffff } else { 0xffff };
            offset <= limit || last > top
        } else {
            last > limit
        };
        if out {
            return Err(self.fault(fault, Some(0)));
        }
        Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
    }

    /// Loads `size` (1, 2, 4, 8) bytes at `segment:offset`.
    #[inline]
    pub fn load(&mut self, segment: usize, offset: u64, size: usize) -> X<u64> {
        let lin = self.linear(segment, offset, size, false)?;
        self.load_lin(segment, lin, size)
    }

    /// Stores `size` (1, 2, 4, 8) bytes at `segment:offset`.
    #[inline]
    pub fn store(&mut self, segment: usize, offset: u64, size: usize, value: u64) -> X {
        let lin = self.linear(segment, offset, size, true)?;
        self.store_lin(segment, lin, size, value)
    }

    /// Loads bytes at `segment:offset`.
    pub fn load_bytes(&mut self, segment: usize, offset: u64, out: &mut [u8]) -> X {
        let lin = self.linear(segment, offset, out.len(), false)?;
        self.load_bytes_lin(segment, lin, out, false)
    }

    /// Stores bytes at `segment:offset`; all or nothing.
    pub fn store_bytes(&mut self, segment: usize, offset: u64, data: &[u8]) -> X {
        let lin = self.linear(segment, offset, data.len(), true)?;
        self.store_bytes_lin(segment, lin, data, false)
    }

    /// Raises whatever a store of `len` bytes would raise, without storing.
    pub fn probe_store(&mut self, segment: usize, offset: u64, len: usize) -> X {
        let lin = self.linear(segment, offset, len, true)?;
        self.check_canonical(segment, lin, len)?;
        let access = Access { kind: Kind::Write, system: false };
        self.probe(lin, access)?;
        let last = self.wrap(lin.wrapping_add(len as u64 - 1));
        if last & PAGE_MASK != lin & PAGE_MASK {
            self.probe(last & PAGE_MASK, access)?;
        }
        Ok(())
    }

    /// Raises whatever a load of `len` bytes would raise, without loading.
    pub fn probe_load(&mut self, segment: usize, offset: u64, len: usize) -> X {
        let lin = self.linear(segment, offset, len, false)?;
        self.check_canonical(segment, lin, len)?;
        let access = Access { kind: Kind::Read, system: false };
        self.probe(lin, access)?;
        let last = self.wrap(lin.wrapping_add(len as u64 - 1));
        if last & PAGE_MASK != lin & PAGE_MASK {
            self.probe(last & PAGE_MASK, access)?;
        }
        Ok(())
    }

    /// Reads, changes and writes back `size` bytes; returns the old value. With
    /// `lock` the change is one atomic host operation (as XCHG and LOCK need).
    /// `f` may be called more than once and must depend on its argument alone;
    /// `None` writes the old value back.
    #[inline]
    pub fn rmw(
        &mut self,
        segment: usize,
        offset: u64,
        size: usize,
        lock: bool,
        f: impl FnMut(u64) -> u64,
    ) -> X<u64> {
        let lin = self.linear(segment, offset, size, true)?;
        self.rmw_lin(segment, lin, size, lock, f)
    }

    /// [`Cpu::rmw`] at a linear address.
    #[inline]
    pub fn rmw_lin(
        &mut self,
        segment: usize,
        lin: u64,
        size: usize,
        lock: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> X<u64> {
        if let Some(host) = self.host_rw(lin, size) {
            // SAFETY: `host` is writable guest RAM for `size` bytes.
            return Ok(unsafe { host_rmw(host, size, lock, f) });
        }
        self.check_data(segment, lin, size)?;
        let access = Access { kind: Kind::Write, system: false };
        if (lin & 0xfff) as usize + size <= 0x1000 {
            let t = self.translate(lin, access)?;
            if let Target::Ram(host, entry) = self.target(t.gpa, true) {
                self.data_breakpoint(lin, size, true);
                self.before_ram_write(t.gpa, size, entry);
                self.enter(lin, &t, access, true);
                // SAFETY: as above.
                return Ok(unsafe { host_rmw(host, size, lock, f) });
            }
        } else {
            self.probe(lin, access)?;
            // The fault address of the second page is its first byte.
            self.probe(self.wrap((lin | 0xfff).wrapping_add(1)), access)?;
        }
        let old = self.load_slow(segment, lin, size)?;
        let new = f(old);
        self.store_slow(segment, lin, size, new)?;
        Ok(old)
    }

    // ---- stack ---------------------------------------------------------------------------

    /// Pushes `size` bytes (2, 4, 8).
    #[inline]
    pub fn push(&mut self, size: usize, value: u64) -> X {
        let sp = self.r.gpr[reg::RSP].wrapping_sub(size as u64) & self.stack_mask();
        self.store(seg::SS, sp, size, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pops `size` bytes (2, 4, 8).
    #[inline]
    pub fn pop(&mut self, size: usize) -> X<u64> {
        let sp = self.r.gpr[reg::RSP] & self.stack_mask();
        let value = self.load(seg::SS, sp, size)?;
        self.set_sp(sp.wrapping_add(size as u64));
        Ok(value)
    }
}

/// Read-modify-write at a host address; returns the old value.
///
/// # Safety
/// `host` must be valid, writable guest memory for `size` bytes.
#[inline(always)]
unsafe fn host_rmw(host: *mut u8, size: usize, lock: bool, mut f: impl FnMut(u64) -> u64) -> u64 {
    // SAFETY: by the caller's contract.
    unsafe {
        if lock && host as usize & (size - 1) == 0 {
            return atomic_rmw(host, size, f);
        }
        // A misaligned locked access is a split lock on hardware; vCPUs of one domain that
        // share memory in parallel do not exist yet, so a plain sequence is enough.
        let old = host_load(host, size);
        let new = f(old);
        host_store(host, size, new);
        old
    }
}

/// # Safety
/// As for [`host_rmw`]; `host` is aligned to `size`.
#[inline(always)]
unsafe fn atomic_rmw(host: *mut u8, size: usize, mut f: impl FnMut(u64) -> u64) -> u64 {
    use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering::SeqCst};
    macro_rules! go {
        ($atomic:ty, $int:ty) => {{
            // SAFETY: aligned, valid, and only ever accessed as raw memory.
            let cell = unsafe { &*host.cast::<$atomic>() };
            let mut old = cell.load(SeqCst);
            loop {
                match cell.compare_exchange_weak(old, f(u64::from(old)) as $int, SeqCst, SeqCst) {
                    Ok(old) => break u64::from(old),
                    Err(now) => old = now,
                }
            }
        }};
    }
    match size {
        1 => go!(AtomicU8, u8),
        2 => go!(AtomicU16, u16),
        4 => go!(AtomicU32, u32),
        _ => go!(AtomicU64, u64),
    }
}
