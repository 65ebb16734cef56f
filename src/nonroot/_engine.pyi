"""The Rust engines. Python code uses them through :mod:`nonroot.engines`."""

from typing import Any, Self, final

__all__ = [
    "VERSION",
    "Companion",
    "IoreqPages",
    "Memory",
    "Vcpu",
    "XenPath",
    "agent",
    "close_others",
    "confinement_of_host",
    "coverage",
    "drop_capabilities",
    "enter_namespaces",
    "open_page_map",
    "optimisations",
    "refuse_privileges",
    "restrict_calls",
    "restrict_files",
    "tiny_guest",
    "translate_unavailable",
]

VERSION: str

@final
class IoreqPages:
    """The pages between a hypervisor and a device model, mapped by one of the two: see :mod:`nonroot.hvm.ioreq`.

    ``event`` is an eventfd (that does not block), ``life`` a socket that the other side closes when it ends, or -1.
    What waits spins for a short while, then sleeps, without the GIL.
    """

    def __new__(cls, fd: int, length: int, vcpus: int) -> Self:
        """Map ``length`` bytes. OSError."""
    # ── the hypervisor's side ──
    def submit(self, vcpu: int, kind: int, flags: int, addr: int, data: int, size: int, count: int, event: int) -> None:
        """Put a request into a vCPU's slot, and wake the device model at ``event`` if it sleeps."""
    def reply(self, vcpu: int, event: int, life: int, seconds: float) -> tuple[int, int]:
        """What comes next: (0, data) the reply · (1, 0) an operation · (2, 0) the other side is gone · (3, 0) late."""
    def post(self, kind: int, addr: int, size: int, data: int, event: int) -> bool:
        """Post a write. False if it cannot be: the ring is full, or ``size`` is not 1, 2, 4 or 8."""
    def posted(self) -> int:
        """Writes that were posted and are not done."""
    def operation(self) -> tuple[int, int, int, list[int]] | None:
        """(domid, op, flags, five arguments) of the oldest operation that is not finished."""
    def finish_operation(self, status: int, event: int) -> None:
        """It is finished."""
    def wait_for_event(self, event: int, life: int) -> bool:
        """Sleep until somebody writes to ``event``; False if the other side is gone."""
    def stamp(self, now_ns: int, generation: int) -> None:
        """Stamp the machine's time, and its p2m's generation."""
    def deadline(self) -> int:
        """When something of the device model's is due (ns); 2^64 - 1: never."""
    def state(self, vcpu: int) -> int:
        """The state of a vCPU's slot."""
    # ── the device model's side ──
    def next(self, event: int, life: int, seconds: float | None = None) -> tuple[Any, ...]:
        """What to do next: (4,) see who has poked · (5, [(kind, addr, log2 of the size, data), …]) writes ·
        (6, vcpu, kind, flags, addr, data, size, count) a request · (2,) the other side is gone · (3,) nothing came.
        """
    def finish_writes(self, count: int) -> None:
        """The first so many of the posted writes are done."""
    def respond(self, vcpu: int, data: int, event: int) -> None:
        """Reply to a request, and wake the hypervisor at ``event`` if it sleeps."""
    def restart(self) -> None:
        """Requests that a process before this one had begun are to be done."""
    def push(self, domid: int, op: int, flags: int, args: list[int]) -> int | None:
        """Ask for an operation; its number. None if too many wait."""
    def wake_caller(self, event: int) -> None:
        """Wake the hypervisor's vCPU if it sleeps in :meth:`reply`: there are operations."""
    def status(self, index: int, event: int, life: int) -> int | None:
        """Wait until operation ``index`` is finished; its status. None: the other side is gone."""
    def now(self) -> int:
        """The machine's time as it was last stamped (ns)."""
    def generation(self) -> int:
        """The p2m's generation as it was last stamped."""
    def pushed(self) -> int:
        """How many operations have been asked for, modulo 2^32: the number of the next."""
    def set_deadline(self, deadline_ns: int) -> None:
        """When something is due."""
    def poke(self, event: int) -> None:
        """Have :meth:`next`, called on this same object, return. Any thread."""
    def spin_ns(self) -> int:
        """How long the next wait spins before it sleeps."""

@final
class Memory:
    """Guest memory of one domain: backings (memfds) and the p2m."""

    def __new__(cls) -> Self: ...
    def add_backing(self, fd: int, size: int, offset: int = 0, private: bool = False) -> int:
        """
        Map ``size`` bytes from ``offset`` of ``fd`` on; returns the backing's number. OSError if mmap fails.

        Shared; or ``private``: what is written does not reach the file, which must not change any more.
        """
    def remap(self, backing: int, fd: int, offset: int, private: bool) -> None:
        """Put a file with the same contents behind a backing, while nobody writes there. OSError."""
    def remap_part(self, backing: int, start: int, length: int, fd: int, offset: int, private: bool) -> None:
        """The same for ``length`` bytes from ``start`` on: whole pages. OSError; ValueError if they lie outside."""
    def revert(self, backing: int) -> None:
        """Have a private backing as its file is; flush the vCPUs afterwards. OSError."""
    def write_private(self, backing: int, fd: int, gap: int = 0) -> list[tuple[int, int]]:
        """Write those pages of a private backing that are not its file's into another file, at the same offsets, while
        nobody writes there; and what lies between such that are at most ``gap`` pages apart. What was written, as
        (offset, bytes) in ascending order. OSError.
        """
    def map(self, gfn: int, count: int, backing: int, offset: int, writable: bool = True) -> None:
        """Point ``count`` frames from ``gfn`` on at ``offset`` (bytes) of a backing. ValueError if out of range."""
    def unmap(self, gfn: int, count: int) -> None: ...
    def lookup(self, gfn: int) -> tuple[int, int, bool] | None:
        """(backing, offset, writable) of a frame; None if it is not RAM."""
    def runs(self) -> list[tuple[int, int, int, int, bool]]:
        """(gfn, count, backing, offset, writable) for each contiguous run."""
    def addresses(self) -> list[int]:
        """Host addresses of the backings, by number; they stay what they are as long as the memory exists."""
    def generation(self) -> int:
        """Changes with every change of the p2m, and when something else is put behind a backing."""
    def read(self, gpa: int, length: int) -> bytes:
        """Guest-physical bytes. ValueError naming the address if some of it is not RAM."""
    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write like DMA: decoded code is dropped, frames count as dirty; ROM too."""
    def read_file(self, fd: int, offset: int, parts: list[tuple[int, int]]) -> int:
        """
        Read from a file straight into guest-physical memory, as far as the host has the bytes at hand (page cache).

        ``parts``: (address, bytes), filled one after the other. Returns how many bytes from the start arrived, 0 if
        none were at hand, or if the parts are more than the host takes at once. Like :meth:`write`, decoded code is
        dropped and frames count as dirty. ValueError if some of it is not writable RAM, OSError if the read fails or
        the file's system cannot say what is at hand. Releases the GIL.
        """
    def touch(self, gfn: int) -> None:
        """A frame was written through another mapping of its backing: as after ``write``."""
    def foreign(self, gfn: int, on: bool) -> None:
        """Another process may write a frame from now on, or no more; meanwhile it is not run from decoded code.

        Either way what was decoded of it is dropped, and it counts as dirty.
        """
    def compare_exchange(self, backing: int, offset: int, expected: int, new: int) -> int:
        """Put ``new`` into an aligned 32-bit word of a backing if it is ``expected``; what was there. ValueError."""
    def take_dirty(self) -> list[int]:
        """Frames written since the last call, ascending; clears the log."""
    def take_dirty_in(self, gfn: int, count: int) -> list[int]:
        """The same for ``count`` frames from ``gfn`` on; the rest of the log stays."""

@final
class Vcpu:
    """One vCPU under the ``interpret`` engine."""

    def __new__(
        cls,
        memory: Memory,
        apic_id: int,
        cpuid: list[tuple[int, int, int, int, int, int]],
        msrs: dict[int, tuple[int, int]],
        options: dict[str, Any],
    ) -> Self:
        """
        ``cpuid``: (leaf, subleaf, eax, ebx, ecx, edx); subleaf 0xffffffff answers every subleaf. Dynamic bits
        (OSXSAVE, APIC enable, APIC ids, XSAVE sizes) are filled in by the engine.
        ``msrs``: index -> (value at reset, mask of writable bits) of plain storage MSRs; an MSR known neither here nor
        to the engine raises #GP in the guest, or exits if ``options["msr_exits"]`` is true.
        ``options``: ``tsc_khz`` (int, default 1_000_000), ``apic_bus_hz`` (int, 25_000_000),
        ``virtual_time`` (None or (numerator, denominator) ns per retired instruction), ``off`` (names of optimisations
        to switch off, see :func:`optimisations`), ``msr_exits`` (bool), ``exception_exits`` (bitmap of vectors),
        ``cr_exits`` (bool), ``random_seed`` (int, 0: where RDRAND starts under virtual time), ``translate`` (bool: hot
        blocks are translated), ``translate_after`` (int: at the how manieth time), ``windows_after`` (int: user code
        gets windows after so many instructions; 0: the default), ``lockstep`` (bool: every translated block is
        compared with the interpreter, and a difference is a ``Failure``),
        ``audit`` (int: all that is cached is compared at each so many moments, and a difference is a ``Failure``;
        0: never).
        """
    def run(self, deadline_ns: int | None = None, limit: int | None = None) -> tuple[Any, ...]:
        """
        Run until an exit; releases the GIL. ``deadline_ns``: machine time at which to return ``Interrupted`` (also out
        of a halt: with a deadline, HLT inside ``run`` still returns Halt at once). ``limit``: the number of retired
        instructions (total) at which to return ``Interrupted``, exactly.
        Returns a tuple whose first item is the exit's number, see :mod:`nonroot.engines.exits`:
        (0 PORT_IO, port, size, write, count, data: bytes) · (1 MMIO, gpa, size, write, data) · (2 HALT,) ·
        (3 HYPERCALL, vmmcall) · (4 MSR_READ, index) · (5 MSR_WRITE, index, value) · (6 CPUID, leaf, subleaf) ·
        (7 IOAPIC_EOI, vector) · (8 PIC_ACKNOWLEDGE,) · (9 INTERRUPT_WINDOW,) ·
        (10 EXCEPTION, vector, error | None, address) · (11 CR_WRITE, register, value) · (12 DEBUG, dr6) ·
        (13 TRIPLE_FAULT,) · (14 IPI, vector, mode, shorthand, logical, level, assert, destination) ·
        (15 INTERRUPTED,) · (16 FAILURE, reason)
        """
    def complete(self, data: bytes) -> None:
        """Answer the last PORT_IO input, MMIO load, MSR_READ (8 bytes) or CPUID (16 bytes) exit."""
    def fail(self) -> None:
        """Answer the last MSR_READ or MSR_WRITE exit with #GP."""
    def set_pic_vector(self, vector: int) -> None:
        """Answer PIC_ACKNOWLEDGE."""
    def kick(self) -> None:
        """Make ``run`` (or ``wait``) return Interrupted soon, from any thread.

        If it is not running, the next ``run`` returns at once.
        """
    def wait(self, deadline_ns: int | None) -> bool:
        """Sleep (GIL released, no CPU) until an interrupt is deliverable, ``kick``, or machine time reaches the
        deadline; the LAPIC timer is included. True if there is something to run."""
    def set_pic_line(self, asserted: bool) -> None:
        """The PIC's INTR output, from any thread."""
    def signal(self, vector: int, mode: int, level: bool) -> None:
        """Deliver an interrupt message to this LAPIC (mode as in the ICR), from any thread."""
    def lapic_matches(self, destination: int, logical: bool) -> bool: ...
    def nmi(self) -> None: ...
    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt vector as soon as RFLAGS.IF and shadows allow (no LAPIC or PIC involved)."""
    def request_interrupt_window(self, wanted: bool) -> None: ...
    def set_guest_debug(self, single_step: bool, breakpoints: list[tuple[int, int, int]]) -> None:
        """Debug exits for the caller, invisible to the guest.

        Breakpoints are (address, length 1/2/4/8, type 0 exec, 1 write, 3 rw).
        """
    def state(self) -> dict[str, Any]:
        """The complete architectural state, engine-independent; keys in :class:`nonroot.engines.state.VcpuState`."""
    def set_state(self, state: dict[str, Any]) -> None:
        """Check, then apply. ValueError names the bad field; nothing is changed then."""
    def now_ns(self) -> int:
        """Machine time in ns."""
    def set_now_ns(self, now: int) -> None:
        """Move machine time (idle skips in virtual time; restore)."""
    def retired(self) -> int:
        """Guest instructions retired so far (a REP iteration counts as one)."""
    def statistics(self) -> dict[str, int]: ...
    def hypercall_arguments(self) -> tuple[bool, int, list[int]]:
        """What a hypercall is made with: 64-bit code or not, the privilege level, the 16 general registers."""
    def set_register(self, index: int, value: int) -> None:
        """Set a general register, in the order of ``gpr``."""
    def translate(self, linear: int) -> int | None:
        """Guest-physical address of a linear address as supervisor, without side effects; None if not mapped."""
    def flush(self) -> None:
        """Drop all cached translations and decoded code."""

@final
class Companion:
    """
    All of a vCPU but the execution of instructions, for an engine whose guest code something else executes: its local
    APIC, the MSRs that are values only, interrupts, halting, time. For the vCPU's thread.

    ``cr8`` is always the guest's present task priority.
    """

    def __new__(cls, vcpu: Vcpu) -> Self: ...
    def attend(self, interruptible: bool, cr8: int) -> tuple[int, Any, int | None]:
        """
        What is to be done before the guest is entered, as (action, value, when the local APIC's timer is due in ns).

        0: enter it. 1: enter it, and come back as soon as it can take an interrupt. 2: inject the interrupt ``value``,
        then ask again. 3: inject an NMI, then ask again. 4: return the exit ``value``, a tuple as of :meth:`Vcpu.run`.
        5: there is an INIT or start-up IPI: bring the vCPU's state up to date, call :meth:`take_messages`, and load
        what its state is then.

        :param interruptible: it can take an interrupt at this instruction.
        """
    def take_messages(self) -> None: ...
    def halt(self, interrupts_on: bool) -> None:
        """The guest has executed HLT."""
    def shut_down(self) -> None:
        """The guest had a triple fault."""
    def apic_read(self, gpa: int, size: int, cr8: int) -> bytes | None:
        """What a load from the local APIC's page gives; None if that is elsewhere."""
    def apic_write(self, gpa: int, data: bytes, cr8: int) -> int | None:
        """A store to that page; CR8 afterwards, or None."""
    def msr_read(self, index: int, cr8: int) -> tuple[int, int]:
        """(0, value); (1, 0): there is no such register; (2, 0): it cannot be read."""
    def msr_write(self, index: int, value: int, cr8: int) -> tuple[int, int]:
        """The same as for ``msr_read``, and CR8 afterwards."""
    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """What CPUID returns in the present state."""

@final
class XenPath:
    """What of Xen is done inside the engine, without exits and without the GIL: event channels, timers, ready disks.

    It mirrors the tables of :mod:`nonroot.xen`, which tells it of every change, and leaves to that whatever it cannot
    do or finds not plainly right. Any thread. ``vcpu``: its number; ValueError if there is none. ``number``: a port's.
    """

    def __new__(cls, memory: Memory, vcpus: list[Vcpu], shared: tuple[int, int]) -> Self:
        """``shared``: (backing, offset) of the shared page. The vCPUs do their hypercalls by it from now on."""
    def layout(self, bits: int, pending: int, mask: int, selector: int) -> None:
        """Ports of a word, and offsets of the pending bits, the mask, and the selector in a vCPU's information."""
    def info(self, vcpu: int, info: tuple[int, int] | None) -> None:
        """(backing, offset) of a vCPU's information."""
    def vector(self, vcpu: int, vector: int) -> None:
        """A vCPU's upcall vector; 0: it is told in another way, and all its events are left to Python."""
    def timer(self, vcpu: int, port: int) -> None:
        """The port of a vCPU's VIRQ_TIMER; 0: none."""
    def closed(self, number: int) -> None: ...
    def unbound(self, number: int, vcpu: int) -> None:
        """A notification does nothing."""
    def raises(self, number: int, vcpu: int, other: int) -> None:
        """A notification raises ``other``, a port of the same guest."""
    def bell(self, number: int, vcpu: int, bell: int) -> None:
        """A notification writes an eventfd, of which this keeps a copy. OSError."""
    def foreign(self, number: int, vcpu: int) -> None:
        """A notification is left to Python."""
    def add_disk(
        self,
        number: int,
        pages: list[tuple[int, int]],
        long: bool,
        turn: tuple[int, int],
        grants: tuple[int, int, int],
        image: int,
        end: int,
        writable: bool,
    ) -> bool:
        """Serve a disk's ring where that waits for nothing; False if the port has no bell.

        ``pages``: (backing, offset) of the ring's. ``turn``: a descriptor and an offset: the page that says who
        serves the ring. ``grants``: (backing, offset) of the grant table, and its entries. ``image``: a descriptor of
        a file of ``end`` bytes, of which this keeps a copy. OSError, ValueError.
        """
    def add_card(
        self,
        ports: tuple[int, int],
        tx: tuple[int, int],
        rx: tuple[int, int],
        turn: tuple[int, int],
        grants: tuple[int, int, int],
        link: int,
        alarm: int,
    ) -> bool:
        """Serve a card's rings, in a thread of its own and in the vCPU's, until something is not plainly right.

        ``ports``: of packets and of frames. ``link``: a SOCK_SEQPACKET socket, ``alarm``: an eventfd of the thread's;
        of both this keeps copies. The frontend takes all offloads. False if a port has no bell, or the guest is not
        told of events by a vector. OSError, ValueError.
        """
    def resize_disk(self, number: int, end: int) -> None: ...
    def remove(self, number: int) -> None:
        """Serve the port's device no more. When this returns, nothing of it is in use."""
    def send(self, number: int) -> bool:
        """The guest notifies a port; False if that is left to Python, with nothing done. So is ``unmask``."""
    def unmask(self, number: int) -> bool: ...
    def raise_event(self, number: int) -> bool: ...
    def set_shot(self, deadline_ns: int | None, now_ns: int) -> None:
        """The single-shot timer of vCPU 0: at a machine time; None: not at all."""
    def shot(self) -> int | None:
        """When it is due."""
    def reset(self) -> None:
        """As at power-on: everything is forgotten, the layout too."""
    def statistics(self) -> dict[str, int]: ...

def optimisations(translate: bool = False) -> list[tuple[str, str]]:
    """(name, one-line description) of every optimisation, the translator's too if `translate`."""

def translate_unavailable() -> str | None:
    """Why this machine cannot run translated code, one phrase; None if it can."""

def coverage() -> list[tuple[str, str]]:
    """(iced instruction code name, how: "interpreted" | "native" | "missing") for every code of an x86-64 CPU."""

def confinement_of_host() -> tuple[int, bool]:
    """(the version of Landlock that the kernel has, 0 for none; whether it has seccomp's filters)."""

def refuse_privileges() -> None:
    """No program started by this process has more rights, and no other process may look into it. OSError."""

def drop_capabilities(keep: int) -> None:
    """Give up the calling thread's capabilities but those in ``keep``, bits by their numbers. OSError."""

def open_page_map() -> None:
    """Open this process's table of pages, which saving and forking read later. OSError."""

def enter_namespaces() -> None:
    """Enter new namespaces of users, network, IPC and host names, before other threads start. OSError."""

def close_others(first: int, keep: list[int]) -> None:
    """Close all descriptors from ``first`` on that are not in ``keep``. OSError."""

def restrict_files(rules: list[tuple[int, str]], tcp: bool) -> None:
    """Landlock, for this thread and its children: only what lies at or below these descriptors can be reached.

    Each with ``read`` (files), ``list`` (files and folders), ``change`` (all but running and device files) or ``own``
    (plain files and sockets). ``tcp``: TCP ports can be used. OSError, whose text is half a sentence.
    """

def restrict_calls(
    calls: list[str], *, refuse: bool, threads: bool, executable: bool, families: list[int], all_threads: bool
) -> None:
    """seccomp, for this thread and its children, or ``all_threads``: only ``calls``, or (``refuse``) all but them.

    The rest fails with EPERM. See :class:`nonroot.confine.Profile`. OSError, whose text is half a sentence; ValueError
    for names that are no system call's.
    """

def agent(bits: int) -> bytes:
    """The guest agent (a static ELF) for 32- or 64-bit guests. ValueError if this build has none."""

def tiny_guest() -> bytes:
    """The built-in guest: an ELF with a PVH note. ValueError if this build has none."""
