//! Requests between a hypervisor and a device model, in Xen's page layout (public/hvm/ioreq.h): a page
//! with one `ioreq` for each vCPU, a page with the ring of posted writes, and beside them a page and a
//! ring of our own: who sleeps, the machine's time, and what the device model asks of the hypervisor.
//!
//! Both sides have the file mapped and neither trusts the other: every index is bounded where it is
//! used, everything is read once.

use std::os::fd::RawFd;
use std::sync::atomic::{fence, AtomicBool, AtomicU32, AtomicU64, AtomicU8, Ordering};
use std::time::{Duration, Instant};

/// Bytes of the part before the data area.
pub const DATA: usize = 0x5000;

const BUFFERED: usize = 0x1000;
const CONTROL: usize = 0x2000;
const OPS: usize = 0x3000;

/// One for each vCPU that fits the page.
pub const MOST_VCPUS: usize = 128;
const SLOT: usize = 32;
const SLOT_DATA: usize = 8;
const SLOT_COUNT: usize = 16;
const SLOT_SIZE: usize = 20;
const SLOT_FLAGS: usize = 30;
const SLOT_TYPE: usize = 31;

/// IOREQ_BUFFER_SLOT_NUM.
pub const BUFFER_SLOTS: u32 = 511;
/// STATE_IOREQ_NONE.
pub const NONE: u8 = 0;
/// STATE_IOREQ_READY.
pub const READY: u8 = 1;
/// STATE_IOREQ_INPROCESS.
pub const IN_PROCESS: u8 = 2;
/// STATE_IORESP_READY.
pub const RESPONSE: u8 = 3;
const STATE: u8 = 0x0f;

const MODEL_SLEEPS: usize = 0x00;
const CALLER_SLEEPS: usize = 0x04;
const OPS_WRITE: usize = 0x08;
const OPS_READ: usize = 0x0c;
const DEADLINE: usize = 0x10;
const NOW: usize = 0x18;
const GENERATION: usize = 0x20;

/// Operations that can wait to be looked at.
pub const OPS_SLOTS: u32 = 128;
const OP: usize = 64;
const OP_STATUS: usize = 48;

/// The longest that anybody spins before it sleeps.
pub const LONGEST_SPIN: Duration = Duration::from_micros(40);
/// A sleep that was shorter than this was mostly the time that falling asleep and waking takes, on both sides.
const SHORT_SLEEP: Duration = Duration::from_micros(300);
const YIELD_AFTER: Duration = Duration::from_micros(4);
const FIRST_SPIN_NS: u32 = 5_000;

/// Xen's `struct ioreq`, but for the event channel's number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Port, guest-physical address, or what else the type says.
    pub addr: u64,
    /// What is written, or where the data lies.
    pub data: u64,
    /// Repetitions.
    pub count: u32,
    /// Bytes of one.
    pub size: u32,
    /// data_is_ptr (bit 4), dir (bit 5: a read), df (bit 6).
    pub flags: u8,
    /// IOREQ_TYPE_….
    pub kind: u8,
}

/// Xen's `struct buf_ioreq`: a posted write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posted {
    /// IOREQ_TYPE_….
    pub kind: u8,
    /// log2 of the bytes.
    pub size: u8,
    /// Below 1 MiB.
    pub addr: u32,
    /// All of it, or half of eight bytes.
    pub data: u32,
}

impl Posted {
    fn pack(self) -> u64 {
        let head =
            u64::from(self.kind) | u64::from(self.size & 3) << 10 | u64::from(self.addr & 0xf_ffff) << 12;
        head | u64::from(self.data) << 32
    }

    fn unpack(word: u64) -> Posted {
        Posted {
            kind: word as u8,
            size: (word >> 10) as u8 & 3,
            addr: (word >> 12) as u32 & 0xf_ffff,
            data: (word >> 32) as u32,
        }
    }
}

/// What the device model asks of the hypervisor: one of Xen's dm_op, or one like them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Operation {
    /// For which domain.
    pub domid: u16,
    /// Which.
    pub op: u16,
    /// Bit 0: somebody waits for the status.
    pub flags: u32,
    /// What it needs.
    pub args: [u64; 5],
}

/// Why the hypervisor's wait for a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// With the reply.
    Data(u64),
    /// The device model asks for something first.
    Operations,
    /// The device model is gone.
    Lost,
    /// It takes too long.
    Late,
}

/// What the device model is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Somebody in its own process wants its attention.
    Poked,
    /// Posted writes, in order.
    Writes(Vec<Posted>),
    /// A request of a vCPU.
    Request(usize, Request),
    /// The hypervisor is gone.
    Lost,
    /// Nothing came within the time given.
    Nothing,
}

/// The pages, as one of the two sides has them mapped.
pub struct Pages {
    base: *mut u8,
    length: usize,
    vcpus: usize,
    spin: AtomicU32,
    /// On the only processor, spinning would keep the other side from working.
    alone: bool,
    poked: AtomicBool,
}

// SAFETY: the mapping lives as long as the object, and all accesses are atomic.
unsafe impl Send for Pages {}
// SAFETY: as above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Maps `length` bytes of a file, for so many vCPUs. The errno.
    pub fn map(fd: RawFd, length: usize, vcpus: usize) -> Result<Pages, i32> {
        if length < DATA || vcpus == 0 || vcpus > MOST_VCPUS {
            return Err(libc::EINVAL);
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh shared mapping; no existing memory is affected.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, rights, libc::MAP_SHARED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
        }
        let alone = std::thread::available_parallelism().map_or(true, |n| n.get() < 2);
        let spin = AtomicU32::new(if alone { 0 } else { FIRST_SPIN_NS });
        Ok(Pages { base: base.cast(), length, vcpus, spin, alone, poked: AtomicBool::new(false) })
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        debug_assert!(at % 4 == 0 && at + 4 <= self.length);
        // SAFETY: aligned, inside the mapping, which lives as long as self.
        unsafe { AtomicU32::from_ptr(self.base.add(at).cast()) }
    }

    fn long(&self, at: usize) -> &AtomicU64 {
        debug_assert!(at % 8 == 0 && at + 8 <= self.length);
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.base.add(at).cast()) }
    }

    fn byte(&self, at: usize) -> &AtomicU8 {
        debug_assert!(at < self.length);
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.base.add(at)) }
    }

    fn state(&self, vcpu: usize) -> &AtomicU8 {
        self.byte(vcpu % self.vcpus * SLOT + SLOT_FLAGS)
    }

    /// The state of a vCPU's slot.
    pub fn slot_state(&self, vcpu: usize) -> u8 {
        self.state(vcpu).load(Ordering::Acquire) & STATE
    }

    // ── the hypervisor's side ──

    /// Puts a request into a vCPU's slot. Whether the device model has to be woken.
    pub fn submit(&self, vcpu: usize, request: &Request) -> bool {
        let at = vcpu % self.vcpus * SLOT;
        self.long(at).store(request.addr, Ordering::Relaxed);
        self.long(at + SLOT_DATA).store(request.data, Ordering::Relaxed);
        self.word(at + SLOT_COUNT).store(request.count, Ordering::Relaxed);
        self.word(at + SLOT_SIZE).store(request.size, Ordering::Relaxed);
        self.byte(at + SLOT_TYPE).store(request.kind, Ordering::Relaxed);
        self.state(vcpu).store(request.flags & !STATE | READY, Ordering::Release);
        self.wants_waking(MODEL_SLEEPS)
    }

    /// Waits for the reply to [`Pages::submit`]; what comes first counts. Takes the reply out of the slot.
    pub fn reply(&self, vcpu: usize, event: RawFd, life: RawFd, timeout: Duration) -> Reply {
        let look = || {
            if self.has_operations() {
                return Some(Reply::Operations);
            }
            // The reply after the operations: whoever saw it published has seen those before it, too.
            if self.slot_state(vcpu) == RESPONSE {
                if self.has_operations() {
                    return Some(Reply::Operations);
                }
                let data = self.long(vcpu % self.vcpus * SLOT + SLOT_DATA).load(Ordering::Relaxed);
                self.state(vcpu).store(NONE, Ordering::Release);
                return Some(Reply::Data(data));
            }
            None
        };
        match self.wait(CALLER_SLEEPS, event, life, Some(timeout), look) {
            Ok(reply) => reply,
            Err(true) => Reply::Lost,
            Err(false) => Reply::Late,
        }
    }

    /// Posts a write. None if the ring is full, or its indices make no sense; else whether to wake the other.
    pub fn post(&self, writes: &[Posted]) -> Option<bool> {
        let pointers = self.long(BUFFERED);
        let full = pointers.load(Ordering::Acquire);
        let (read, write) = (full as u32, (full >> 32) as u32);
        let used = write.wrapping_sub(read);
        if used as usize + writes.len() > BUFFER_SLOTS as usize {
            return None;
        }
        for (index, posted) in writes.iter().enumerate() {
            let slot = (write.wrapping_add(index as u32) % BUFFER_SLOTS) as usize;
            self.long(BUFFERED + 8 + 8 * slot).store(posted.pack(), Ordering::Relaxed);
        }
        pointers.fetch_add((writes.len() as u64) << 32, Ordering::Release);
        // As Xen does, so that the indices never wrap where 511 does not divide.
        let mut now = pointers.load(Ordering::Relaxed);
        while now as u32 >= BUFFER_SLOTS && (now >> 32) as u32 >= BUFFER_SLOTS {
            let less = now - (u64::from(BUFFER_SLOTS) << 32 | u64::from(BUFFER_SLOTS));
            match pointers.compare_exchange(now, less, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(seen) => now = seen,
            }
        }
        Some(self.wants_waking(MODEL_SLEEPS))
    }

    /// Posted writes that the device model has not finished.
    pub fn posted(&self) -> u32 {
        let full = self.long(BUFFERED).load(Ordering::Acquire);
        ((full >> 32) as u32).wrapping_sub(full as u32)
    }

    fn has_operations(&self) -> bool {
        self.word(CONTROL + OPS_WRITE).load(Ordering::Acquire)
            != self.word(CONTROL + OPS_READ).load(Ordering::Relaxed)
    }

    /// The oldest operation that is not finished.
    pub fn operation(&self) -> Option<Operation> {
        if !self.has_operations() {
            return None;
        }
        let index = self.word(CONTROL + OPS_READ).load(Ordering::Relaxed);
        let at = OPS + (index % OPS_SLOTS) as usize * OP;
        let head = self.long(at).load(Ordering::Relaxed);
        let mut args = [0; 5];
        for (number, value) in args.iter_mut().enumerate() {
            *value = self.long(at + 8 + 8 * number).load(Ordering::Relaxed);
        }
        Some(Operation { domid: head as u16, op: (head >> 16) as u16, flags: (head >> 32) as u32, args })
    }

    /// Finishes it. Whether somebody who waits for it has to be woken.
    pub fn finish_operation(&self, status: i64) -> bool {
        let index = self.word(CONTROL + OPS_READ);
        let at = OPS + (index.load(Ordering::Relaxed) % OPS_SLOTS) as usize * OP;
        self.long(at + OP_STATUS).store(status as u64, Ordering::Relaxed);
        index.fetch_add(1, Ordering::Release);
        self.wants_waking(MODEL_SLEEPS)
    }

    /// Sleeps until the device model asks for something; whether it lives.
    pub fn wait_for_event(&self, event: RawFd, life: RawFd) -> bool {
        match sleep(event, life, None) {
            Woken::Lost => false,
            Woken::Event | Woken::Late => true,
        }
    }

    /// Stamps the machine's time, and the state of its p2m.
    pub fn stamp(&self, now_ns: u64, generation: u64) {
        self.long(CONTROL + NOW).store(now_ns, Ordering::Relaxed);
        self.long(CONTROL + GENERATION).store(generation, Ordering::Release);
    }

    /// When something of the device model's is due; all ones for never.
    pub fn deadline(&self) -> u64 {
        self.long(CONTROL + DEADLINE).load(Ordering::Acquire)
    }

    // ── the device model's side ──

    /// What to do next; sleeps while there is nothing.
    pub fn next(&self, event: RawFd, life: RawFd, timeout: Option<Duration>) -> Next {
        let look = || {
            if self.poked.swap(false, Ordering::AcqRel) {
                return Some(Next::Poked);
            }
            let writes = self.posted_writes();
            if !writes.is_empty() {
                return Some(Next::Writes(writes));
            }
            (0..self.vcpus)
                .find_map(|vcpu| self.take(vcpu))
                .map(|(vcpu, request)| Next::Request(vcpu, request))
        };
        match self.wait(MODEL_SLEEPS, event, life, timeout, look) {
            Ok(next) => next,
            Err(true) => Next::Lost,
            Err(false) => Next::Nothing,
        }
    }

    fn posted_writes(&self) -> Vec<Posted> {
        let full = self.long(BUFFERED).load(Ordering::Acquire);
        let (read, write) = (full as u32, (full >> 32) as u32);
        let count = write.wrapping_sub(read).min(BUFFER_SLOTS);
        let slot = |index: u32| (read.wrapping_add(index) % BUFFER_SLOTS) as usize;
        let word = |index| self.long(BUFFERED + 8 + 8 * slot(index)).load(Ordering::Relaxed);
        (0..count).map(|index| Posted::unpack(word(index))).collect()
    }

    /// So many of the posted writes are done.
    pub fn finish_writes(&self, count: u32) {
        self.word(BUFFERED).fetch_add(count, Ordering::AcqRel);
    }

    fn take(&self, vcpu: usize) -> Option<(usize, Request)> {
        let state = self.state(vcpu);
        let flags = state.load(Ordering::Acquire);
        if flags & STATE != READY {
            return None;
        }
        // A write that was posted before the request is seen with it; see to those first.
        if self.posted() != 0 {
            return None;
        }
        state.store(flags & !STATE | IN_PROCESS, Ordering::Release);
        let at = vcpu * SLOT;
        let request = Request {
            addr: self.long(at).load(Ordering::Relaxed),
            data: self.long(at + SLOT_DATA).load(Ordering::Relaxed),
            count: self.word(at + SLOT_COUNT).load(Ordering::Relaxed),
            size: self.word(at + SLOT_SIZE).load(Ordering::Relaxed),
            flags: flags & !STATE,
            kind: self.byte(at + SLOT_TYPE).load(Ordering::Relaxed),
        };
        Some((vcpu, request))
    }

    /// Replies. Whether the hypervisor has to be woken.
    pub fn respond(&self, vcpu: usize, data: u64) -> bool {
        self.long(vcpu % self.vcpus * SLOT + SLOT_DATA).store(data, Ordering::Relaxed);
        let state = self.state(vcpu);
        let flags = state.load(Ordering::Relaxed);
        state.store(flags & !STATE | RESPONSE, Ordering::Release);
        self.wants_waking(CALLER_SLEEPS)
    }

    /// A request that a process before this one had begun: it is to be done (again).
    pub fn restart(&self) {
        for vcpu in 0..self.vcpus {
            let state = self.state(vcpu);
            let flags = state.load(Ordering::Acquire);
            if flags & STATE == IN_PROCESS {
                state.store(flags & !STATE | READY, Ordering::Release);
            }
        }
    }

    /// Asks the hypervisor for something; the operation's number. None if too many wait already.
    pub fn push(&self, operation: &Operation) -> Option<u32> {
        let (write, read) = (self.word(CONTROL + OPS_WRITE), self.word(CONTROL + OPS_READ));
        let index = write.load(Ordering::Relaxed);
        if index.wrapping_sub(read.load(Ordering::Acquire)) >= OPS_SLOTS {
            return None;
        }
        let at = OPS + (index % OPS_SLOTS) as usize * OP;
        let head =
            u64::from(operation.domid) | u64::from(operation.op) << 16 | u64::from(operation.flags) << 32;
        self.long(at).store(head, Ordering::Relaxed);
        for (number, value) in operation.args.iter().enumerate() {
            self.long(at + 8 + 8 * number).store(*value, Ordering::Relaxed);
        }
        write.store(index.wrapping_add(1), Ordering::Release);
        Some(index)
    }

    /// How many have been asked for, ever.
    pub fn pushed(&self) -> u32 {
        self.word(CONTROL + OPS_WRITE).load(Ordering::Relaxed)
    }

    /// Whether the hypervisor's vCPU sleeps until it is woken.
    pub fn caller_sleeps(&self) -> bool {
        self.wants_waking(CALLER_SLEEPS)
    }

    /// Waits until an operation is finished; its status. None: the hypervisor is gone.
    pub fn status(&self, index: u32, event: RawFd, life: RawFd) -> Option<i64> {
        let look = || {
            let read = self.word(CONTROL + OPS_READ).load(Ordering::Acquire);
            let is_past = read.wrapping_sub(index) as i32 > 0;
            let at = OPS + (index % OPS_SLOTS) as usize * OP + OP_STATUS;
            is_past.then(|| self.long(at).load(Ordering::Relaxed) as i64)
        };
        self.wait(MODEL_SLEEPS, event, life, None, look).ok()
    }

    /// The machine's time as it was last stamped.
    pub fn now(&self) -> u64 {
        self.long(CONTROL + NOW).load(Ordering::Acquire)
    }

    /// The state of the machine's p2m, likewise.
    pub fn generation(&self) -> u64 {
        self.long(CONTROL + GENERATION).load(Ordering::Acquire)
    }

    /// Says when something is due; all ones for never.
    pub fn set_deadline(&self, deadline_ns: u64) {
        self.long(CONTROL + DEADLINE).store(deadline_ns, Ordering::Release);
    }

    /// Has [`Pages::next`] of this same object return. Whether it has to be woken. Any thread.
    pub fn poke(&self) -> bool {
        self.poked.store(true, Ordering::Release);
        self.wants_waking(MODEL_SLEEPS)
    }

    // ── waiting ──

    /// After something has been published: whether the other side may be asleep. It is told once.
    fn wants_waking(&self, flag: usize) -> bool {
        fence(Ordering::SeqCst);
        let flag = self.word(CONTROL + flag);
        flag.load(Ordering::Relaxed) != 0 && flag.swap(0, Ordering::AcqRel) != 0
    }

    /// Spins for a while, then sleeps until `look` finds something. Err: the other side is gone (true), or late.
    fn wait<T>(
        &self,
        flag: usize,
        event: RawFd,
        life: RawFd,
        timeout: Option<Duration>,
        look: impl Fn() -> Option<T>,
    ) -> Result<T, bool> {
        if let Some(found) = look() {
            return Ok(found);
        }
        let began = Instant::now();
        let spin = Duration::from_nanos(u64::from(self.spin.load(Ordering::Relaxed)));
        loop {
            let spun = began.elapsed();
            if spun >= spin {
                break;
            }
            for _ in 0..32 {
                std::hint::spin_loop();
                if let Some(found) = look() {
                    return Ok(found);
                }
            }
            if spun > YIELD_AFTER {
                // The other side may be waiting for this very processor.
                std::thread::yield_now();
            }
        }
        let slept = Instant::now();
        loop {
            self.word(CONTROL + flag).store(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if let Some(found) = look() {
                self.word(CONTROL + flag).store(0, Ordering::Relaxed);
                self.adapt(slept.elapsed());
                return Ok(found);
            }
            let left = match timeout {
                None => None,
                Some(timeout) => match timeout.checked_sub(began.elapsed()) {
                    Some(left) => Some(left),
                    None => {
                        self.word(CONTROL + flag).store(0, Ordering::Relaxed);
                        return Err(false);
                    }
                },
            };
            if let Woken::Lost = sleep(event, life, left) {
                // What it said before it went counts.
                return look().ok_or(true);
            }
        }
    }

    /// A sleep that was short would better have been a spin; one that was long should have come at once.
    fn adapt(&self, slept: Duration) {
        let spin = self.spin.load(Ordering::Relaxed);
        let longest = LONGEST_SPIN.as_nanos() as u32;
        let new = if slept < SHORT_SLEEP {
            (spin * 2).clamp(FIRST_SPIN_NS, longest)
        } else if spin > 1000 {
            spin / 2
        } else {
            0
        };
        if !self.alone {
            self.spin.store(new, Ordering::Relaxed);
        }
    }

    /// How long the next wait spins (ns).
    pub fn spin_ns(&self) -> u32 {
        self.spin.load(Ordering::Relaxed)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; nobody holds self any more.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

enum Woken {
    Event,
    Lost,
    Late,
}

/// Until an eventfd is written to, or the other side of `life` (-1: nobody looks) is closed.
fn sleep(event: RawFd, life: RawFd, timeout: Option<Duration>) -> Woken {
    let mut fds = [
        libc::pollfd { fd: event, events: libc::POLLIN, revents: 0 },
        libc::pollfd { fd: life, events: 0, revents: 0 },
    ];
    let milliseconds = timeout.map_or(-1, |t| t.as_millis().min(i32::MAX as u128 - 1) as i32 + 1);
    // SAFETY: two valid records.
    let count = unsafe { libc::poll(fds.as_mut_ptr(), 2, milliseconds) };
    if fds[0].revents & libc::POLLIN != 0 {
        let mut value = 0u64;
        // SAFETY: eight bytes for an eventfd's counter; it does not block, there is something to read or not.
        unsafe { libc::read(event, (&raw mut value).cast(), 8) };
        return Woken::Event;
    }
    if fds[1].revents != 0 || fds[0].revents != 0 {
        return Woken::Lost;
    }
    if count == 0 {
        Woken::Late
    } else {
        Woken::Event
    }
}

/// Wakes whoever sleeps on an eventfd.
pub fn ring(event: RawFd) {
    let one = 1u64;
    // SAFETY: eight bytes; an eventfd that is full has been rung.
    unsafe { libc::write(event, (&raw const one).cast(), 8) };
}

#[cfg(test)]
#[path = "ioreq_tests.rs"]
mod tests;
