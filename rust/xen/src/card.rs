//! A network card's packets both ways, between its rings and a link. Sources: xen/include/public/io/netif.h;
//! the link's messages are those of `nonroot.backends.frame`.
//!
//! A thread of the card's own waits for frames; the guest's packets are sent by the vCPU's thread. At
//! the first thing that is not plainly right the rings are the backend process's for good.

use crate::events::{Path, Served, Service};
use crate::grants::Grants;
use crate::ring::{Place, Ring};
use crate::turn::Turn;
use nonroot_memory::{Memory, MemoryError, PAGE_SIZE};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

const TX_CSUM_BLANK: u16 = 1;
const TX_DATA_VALIDATED: u16 = 2;
const TX_MORE_DATA: u16 = 4;
const TX_EXTRA_INFO: u16 = 8;
const RX_DATA_VALIDATED: u16 = 1;
const RX_CSUM_BLANK: u16 = 2;
const RX_MORE_DATA: u16 = 4;
const RX_EXTRA_INFO: u16 = 8;
const EXTRA_GSO: u8 = 1;
const STATUS_ERROR: i16 = -1;
const STATUS_NULL: i16 = 1;
const MOST_PIECES: usize = 18;

/// Flags of a frame on a link.
const CHECKSUM_BLANK: u8 = 1;
const DATA_VALIDATED: u8 = 2;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 2;
/// Bytes before a frame on a link: flags, type and size of segments.
const HEADER: usize = 4;
const SHORTEST: usize = 14;
const LONGEST: usize = 14 + 65535;
/// Frames each way at a time.
const BUDGET: usize = 64;

/// A connected card.
pub struct Card {
    tx: Ring,
    rx: Ring,
    turn: Turn,
    grants: Grants,
    link: OwnedFd,
    /// An eventfd that makes the thread look again.
    alarm: OwnedFd,
    ports: [u32; 2],
    state: Mutex<State>,
    stopping: AtomicBool,
    packets: AtomicU64,
    bytes: AtomicU64,
}

struct State {
    tx_index: u32,
    rx_index: u32,
    /// A frame for the guest that waits for its pages: this many bytes of `frame`, the header included; 0: none.
    waiting: usize,
    frame: Vec<u8>,
    packet: Vec<u8>,
    /// The link takes no packet at the moment.
    tx_blocked: bool,
    /// The backend process has the rings.
    gone: bool,
}

/// What happened to the next packet or frame.
enum Step {
    Done,
    Nothing,
    Blocked,
    /// Not plainly right.
    Odd,
}

/// What one look at the rings did.
#[derive(Default)]
struct Pumped {
    raise_tx: bool,
    raise_rx: bool,
    /// There may be more to do at once.
    more: bool,
    /// What the thread should wait for has changed.
    changed: bool,
}

impl Card {
    /// `tx`, `rx`: the rings' pages; `ports`: the guest's, of packets and of frames. `link`: a SOCK_SEQPACKET
    /// socket.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        memory: &Arc<Memory>,
        tx: Place,
        rx: Place,
        ports: [u32; 2],
        turn: Turn,
        grants: Grants,
        link: OwnedFd,
        alarm: OwnedFd,
    ) -> Result<Card, MemoryError> {
        let tx = Ring::new(memory, &[tx], 12)?;
        let rx = Ring::new(memory, &[rx], 8)?;
        let state = State {
            tx_index: tx.published(),
            rx_index: rx.published(),
            waiting: 0,
            frame: vec![0; HEADER + LONGEST + 1],
            packet: Vec::with_capacity(HEADER + LONGEST),
            tx_blocked: false,
            gone: !turn.is_path(),
        };
        Ok(Card {
            tx,
            rx,
            turn,
            grants,
            link,
            alarm,
            ports,
            state: Mutex::new(state),
            stopping: AtomicBool::new(false),
            packets: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The thread's work until [`Card::stop`], or until the backend process has the rings.
    pub fn run(&self, path: &Weak<Path>) {
        // What happened before is looked for at once.
        wake(self.alarm.as_raw_fd());
        loop {
            let (events, gone) = {
                let state = self.state();
                let receives = if state.waiting == 0 { libc::POLLIN } else { 0 };
                (receives | if state.tx_blocked { libc::POLLOUT } else { 0 }, state.gone)
            };
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            if gone {
                if let Some(path) = path.upgrade() {
                    path.ring(self.ports[0]);
                }
                return;
            }
            let link = if events == 0 { -1 } else { self.link.as_raw_fd() };
            let mut fds = [
                libc::pollfd { fd: self.alarm.as_raw_fd(), events: libc::POLLIN, revents: 0 },
                libc::pollfd { fd: link, events, revents: 0 },
            ];
            // SAFETY: two entries that live as long as the call.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
            if fds[0].revents != 0 {
                let mut count = 0u64;
                // SAFETY: eight bytes that live as long as the call.
                unsafe { libc::read(self.alarm.as_raw_fd(), (&raw mut count).cast(), 8) };
            }
            loop {
                let Some(path) = path.upgrade() else { return };
                if self.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let pumped = self.pump(path.memory());
                for (wanted, port) in [(pumped.raise_tx, self.ports[0]), (pumped.raise_rx, self.ports[1])] {
                    if wanted {
                        path.raise(port);
                    }
                }
                if !pumped.more {
                    break;
                }
            }
        }
    }

    /// Nothing is moved any more when this returns, and the thread ends soon.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.state().gone = true;
        wake(self.alarm.as_raw_fd());
    }

    /// Moves packets and frames.
    fn pump(&self, memory: &Memory) -> Pumped {
        let mut state = self.state();
        let state = &mut *state;
        let mut out = Pumped::default();
        if state.gone {
            return out;
        }
        let (was_blocked, was_waiting) = (state.tx_blocked, state.waiting != 0);
        let (tx_start, rx_start) = (state.tx_index, state.rx_index);
        state.tx_blocked = false;
        let mut odd = false;
        let mut left = BUDGET;
        while left > 0 && !odd {
            match self.send_packet(memory, state) {
                Step::Done => left -= 1,
                // An index that comes and goes is looked at so often, too, and not for ever.
                Step::Nothing if self.tx.final_check(state.tx_index, 1) => left -= 1,
                Step::Nothing => break,
                Step::Blocked => {
                    state.tx_blocked = true;
                    break;
                }
                Step::Odd => odd = true,
            }
        }
        out.more = left == 0;
        left = BUDGET;
        while left > 0 && !odd {
            match self.receive_frame(memory, state) {
                Step::Done => left -= 1,
                Step::Nothing | Step::Blocked => break,
                Step::Odd => odd = true,
            }
        }
        out.more |= left == 0;
        out.raise_tx = self.tx.push(tx_start, state.tx_index);
        out.raise_rx = self.rx.push(rx_start, state.rx_index);
        if odd {
            state.gone = true;
            out.more = false;
            self.turn.leave();
        }
        out.changed = odd || state.tx_blocked != was_blocked || (state.waiting != 0) != was_waiting;
        out
    }

    /// The guest's next packet goes to the link.
    fn send_packet(&self, memory: &Memory, state: &mut State) -> Step {
        let Some(available) = self.tx.pending(state.tx_index) else { return Step::Odd };
        if available == 0 {
            return Step::Nothing;
        }
        let mut taken = 0;
        let mut take = |slot: &mut [u8]| -> bool {
            if taken == available {
                return false;
            }
            self.tx.read(state.tx_index.wrapping_add(taken), slot);
            taken += 1;
            true
        };
        let mut slot = [0u8; 12];
        if !take(&mut slot) {
            return Step::Odd;
        }
        let first = Piece::parse(&slot);
        let (mut gso_type, mut gso_size) = (0, 0);
        let extra = first.flags & TX_EXTRA_INFO != 0;
        if extra {
            let mut record = [0u8; 12];
            // Type, flags (1: another one follows), size, protocol.
            if !take(&mut record) || record[0] != EXTRA_GSO || record[1] & 1 != 0 {
                return Step::Odd;
            }
            (gso_type, gso_size) = (record[4], u16::from_le_bytes([record[2], record[3]]));
            if gso_size == 0 || !matches!(gso_type, GSO_TCP4 | GSO_TCP6) {
                return Step::Odd;
            }
        }
        let mut pieces = [first; MOST_PIECES];
        let mut count = 1;
        while pieces[count - 1].flags & TX_MORE_DATA != 0 {
            if count == MOST_PIECES || !take(&mut slot) {
                return Step::Odd;
            }
            pieces[count] = Piece::parse(&slot);
            count += 1;
        }
        let total = usize::from(first.size);
        let others: usize = pieces[1..count].iter().map(|piece| usize::from(piece.size)).sum();
        if total < SHORTEST || others > total {
            return Step::Odd;
        }
        let mut flags = 0;
        if first.flags & TX_CSUM_BLANK != 0 || extra {
            flags |= CHECKSUM_BLANK | DATA_VALIDATED;
        }
        if first.flags & TX_DATA_VALIDATED != 0 {
            flags |= DATA_VALIDATED;
        }
        let packet = &mut state.packet;
        packet.clear();
        packet.extend([flags, gso_type]);
        packet.extend(gso_size.to_le_bytes());
        for (number, piece) in pieces[..count].iter().enumerate() {
            let size = if number == 0 { total - others } else { usize::from(piece.size) };
            let offset = usize::from(piece.offset);
            if offset + size > PAGE_SIZE as usize {
                return Step::Odd;
            }
            let Some(page) = self.grants.page(memory, piece.reference, false) else { return Step::Odd };
            let at = packet.len();
            packet.resize(at + size, 0);
            // SAFETY: `size` bytes inside a mapped page into as many of the packet; the guest may change
            // them meanwhile, and there are no references to them.
            unsafe {
                std::ptr::copy_nonoverlapping(page.host.add(offset), packet.as_mut_ptr().add(at), size)
            };
        }
        match transfer(self.link.as_raw_fd(), packet) {
            Ok(()) => {}
            Err(libc::EAGAIN | libc::ENOBUFS) => return Step::Blocked,
            // Too long for the socket's buffer: gone, as on a wire.
            Err(libc::EMSGSIZE) => {}
            Err(_) => return Step::Odd,
        }
        let mut index = state.tx_index;
        let mut respond = |id: u16, status: i16| {
            let [a, b] = id.to_le_bytes();
            let [c, d] = status.to_le_bytes();
            self.tx.write(index, &[a, b, c, d]);
            index = index.wrapping_add(1);
        };
        respond(first.id, 0);
        if extra {
            respond(0, STATUS_NULL);
        }
        pieces[1..count].iter().for_each(|piece| respond(piece.id, 0));
        state.tx_index = index;
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(total as u64, Ordering::Relaxed);
        Step::Done
    }

    /// The link's next frame goes to the guest.
    fn receive_frame(&self, memory: &Memory, state: &mut State) -> Step {
        if state.waiting == 0 {
            // SAFETY: as many bytes as the buffer has.
            let got = unsafe {
                libc::recv(
                    self.link.as_raw_fd(),
                    state.frame.as_mut_ptr().cast(),
                    state.frame.len(),
                    libc::MSG_DONTWAIT,
                )
            };
            let Ok(got) = usize::try_from(got) else {
                let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
                return if matches!(errno, libc::EAGAIN | libc::EINTR) { Step::Nothing } else { Step::Odd };
            };
            if got == 0 {
                return Step::Odd; // closed: the process says so
            }
            let (flags, kind) = (state.frame[0], state.frame[1]);
            let size = u16::from_le_bytes([state.frame[2], state.frame[3]]);
            let fits = (HEADER + SHORTEST..=HEADER + LONGEST).contains(&got);
            if !fits || flags & !3 != 0 || kind > GSO_TCP6 || (kind != 0) != (size != 0) {
                return Step::Done; // no frame
            }
            state.waiting = got;
        }
        let length = state.waiting - HEADER;
        let (flags, kind) = (state.frame[0], state.frame[1]);
        let size = u16::from_le_bytes([state.frame[2], state.frame[3]]);
        let needed = length.div_ceil(PAGE_SIZE as usize) as u32 + u32::from(kind != 0);
        match self.rx.pending(state.rx_index) {
            None => return Step::Odd,
            Some(available) if available >= needed => {}
            Some(_) if self.rx.final_check(state.rx_index, needed) => {}
            Some(_) => return Step::Blocked,
        }
        let mut marks = 0;
        if flags & CHECKSUM_BLANK != 0 {
            marks |= RX_CSUM_BLANK | RX_DATA_VALIDATED;
        }
        if flags & DATA_VALIDATED != 0 {
            marks |= RX_DATA_VALIDATED;
        }
        if kind != 0 {
            marks |= RX_EXTRA_INFO;
        }
        let data = &state.frame[HEADER..HEADER + length];
        let pieces = data.chunks(PAGE_SIZE as usize);
        let last = pieces.len() - 1;
        for (number, piece) in pieces.enumerate() {
            let mut request = [0u8; 8];
            self.rx.read(state.rx_index, &mut request);
            let reference = u32::from_le_bytes([request[4], request[5], request[6], request[7]]);
            let written = self.grants.write(memory, reference, |page| {
                // SAFETY: at most a page's bytes into a mapped page of memory that the guest shares, to
                // which there are no references.
                unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), page.host, piece.len()) };
                memory.written(page.gfn);
            });
            let status = if written { piece.len() as i16 } else { STATUS_ERROR };
            let more = if number < last { RX_MORE_DATA } else { 0 };
            let mut response = [0u8; 8];
            response[..2].copy_from_slice(&request[..2]);
            response[4..6].copy_from_slice(&(marks | more).to_le_bytes());
            response[6..].copy_from_slice(&status.to_le_bytes());
            self.rx.write(state.rx_index, &response);
            state.rx_index = state.rx_index.wrapping_add(1);
            if marks & RX_EXTRA_INFO != 0 {
                // The next slot carries the record instead.
                let [low, high] = size.to_le_bytes();
                self.rx.write(state.rx_index, &[EXTRA_GSO, 0, low, high, kind, 0, 0, 0]);
                state.rx_index = state.rx_index.wrapping_add(1);
            }
            marks = 0;
        }
        state.waiting = 0;
        self.packets.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(length as u64, Ordering::Relaxed);
        Step::Done
    }
}

impl Service for Card {
    fn serve(&self, memory: &Memory) -> Served {
        let pumped = self.pump(memory);
        if pumped.changed || pumped.more {
            wake(self.alarm.as_raw_fd());
        }
        let gone = self.state().gone;
        Served {
            raise: [pumped.raise_tx.then_some(self.ports[0]), pumped.raise_rx.then_some(self.ports[1])],
            all: !gone,
        }
    }

    fn counts(&self) -> (u64, u64) {
        (self.packets.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

/// A piece of a packet from the guest; the first one's size is the whole packet's.
#[derive(Clone, Copy)]
struct Piece {
    reference: u32,
    offset: u16,
    flags: u16,
    id: u16,
    size: u16,
}

impl Piece {
    fn parse(slot: &[u8; 12]) -> Piece {
        let half = |at: usize| u16::from_le_bytes([slot[at], slot[at + 1]]);
        Piece {
            reference: u32::from(half(0)) | u32::from(half(2)) << 16,
            offset: half(4),
            flags: half(6),
            id: half(8),
            size: half(10),
        }
    }
}

/// Sends one message without waiting. The errno.
fn transfer(fd: RawFd, message: &[u8]) -> Result<(), i32> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message's own bytes.
    let sent = unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), flags) };
    if sent >= 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
}

fn wake(alarm: RawFd) {
    let one = 1u64;
    // SAFETY: eight bytes that live as long as the call.
    unsafe { libc::write(alarm, (&raw const one).cast(), 8) };
}
