"""The hypervisor side of one domain: everything that its hypercalls reach, put together."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from nonroot._engine import Memory, XenPath
from nonroot.hvm.device import Clock, Events, IrqLine, StateError
from nonroot.hvm.memory_map import MemoryMap
from nonroot.saved.fields import Fields
from nonroot.xen.abi import (
    HYPERCALLS,
    MSR_HYPERCALL,
    PAGE_SIZE,
    SLOT_IRET,
    SLOT_SIZE,
    VMASST_RUNSTATE_UPDATE,
    Errno,
    HypercallError,
    Nr,
    Param,
)
from nonroot.xen.backend import EventChannelPort
from nonroot.xen.call import Call, GuestPointers
from nonroot.xen.config import XenConfig
from nonroot.xen.console import ConsoleRing
from nonroot.xen.event_ops import EventOps
from nonroot.xen.events import BackendPort, EventChannels
from nonroot.xen.grant_ops import GrantOps
from nonroot.xen.grants import BackendGrants, GrantTable
from nonroot.xen.hvm_ops import HvmOps
from nonroot.xen.layout import ABI32, ABI64
from nonroot.xen.memory import (
    CONSOLE,
    SHARED_INFO,
    SPECIAL_FRAMES,
    SPECIAL_GFN,
    STORE,
    Physmap,
    Place,
    Words,
)
from nonroot.xen.memory_ops import MemoryOps
from nonroot.xen.sched_ops import SchedOps, Sleeper
from nonroot.xen.shared import SharedInfo
from nonroot.xen.sharing import Sharing
from nonroot.xen.store_ring import StoreRing
from nonroot.xen.upcall import Upcalls
from nonroot.xen.vcpu_ops import VcpuOps
from nonroot.xen.version_ops import VersionOps

__all__ = ["RESERVED", "Surroundings", "XenHost", "XenVcpu"]

RESERVED: Final = (SPECIAL_GFN * PAGE_SIZE, SPECIAL_FRAMES * PAGE_SIZE)
"""(address, bytes) of what the memory map must show as reserved: the rings' frames."""
STORE_GFN: Final = SPECIAL_GFN + 4
CONSOLE_GFN: Final = SPECIAL_GFN + 7
BACKEND_DOMID: Final = 0
RAX: Final = 0
MASK_64: Final = (1 << 64) - 1
CONSOLE_WRITE: Final = 0
LONGEST_MESSAGE: Final = 4096
MAXIMUM_CALLS: Final = 1024
"""Entries of one multicall."""


class XenVcpu(Protocol):
    """What a hypercall needs of a vCPU; see the engine's Vcpu."""

    def hypercall_arguments(self) -> tuple[bool, int, list[int]]:
        """(64-bit code, privilege level, general registers)."""

    def set_register(self, index: int, value: int) -> None:
        """Set a general register."""

    def translate(self, linear: int) -> int | None:
        """Guest-physical address of a linear address."""

    def signal(self, vector: int, mode: int = 0, level: bool = False) -> None:
        """Take an interrupt message."""

    def interrupt(self, vector: int) -> None:
        """Inject a vector."""

    def nmi(self) -> None:
        """Raise an NMI."""

    def flush(self) -> None:
        """Drop cached translations."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the host is connected to in its machine."""

    memory: Memory
    files: list[int]
    """A descriptor of each backing of the memory."""
    memory_map: MemoryMap
    vcpus: Sequence[XenVcpu]
    clock: Clock
    tsc_khz: int
    wall_ns: int
    """UTC at machine time 0."""
    events: Events
    gsi: Callable[[int], IrqLine]
    intx: Callable[[int, int], IrqLine]
    in_thread: Callable[[Callable[[], object]], object]
    """Have something called in the vCPU's thread, at once if this is it."""
    sleep: Sleeper
    shutdown: Callable[[int], object]
    console: Callable[[bytes], object]
    """Takes what the guest writes to hvc0."""
    debug: Callable[[bytes], object]
    """Takes what the guest writes to the hypervisor's own console."""
    share_ram: Callable[[], object] = lambda: None
    """Have the RAM where other mappings and other processes see it."""
    make_path: Callable[[Place], XenPath | None] = lambda shared: None
    """What does a part of this without us, if the engine has it; its argument is the shared page."""


class XenHost:
    """See the module."""

    def __init__(self, config: XenConfig, machine: Surroundings) -> None:
        """BadOptionError for a configuration that cannot be; OutOfMemoryError."""
        config.check()
        self.domid = config.domid
        self.counts: Counter[str] = Counter()
        """Hypercalls by name."""
        self._config = config
        self._machine = machine
        self._shot: int | None = None
        memory, clock, vcpus = machine.memory, machine.clock, machine.vcpus
        count = len(vcpus)
        self.physmap = Physmap(memory, machine.files, machine.share_ram, machine.memory_map.memory_bytes)
        self.path = machine.make_path(self.physmap.own(SHARED_INFO))
        """Does a part of all this in the engine; None: nobody does."""
        self.shared = SharedInfo(self.physmap, count, machine.tsc_khz, machine.wall_ns, self.path)
        self.upcalls = Upcalls(
            vcpus, clock, self.shared.upcall_pending, machine.gsi, machine.intx, machine.in_thread, self.path
        )
        self.channels = EventChannels(self.shared, config.domid, count, self.upcalls.tell, self.path)
        self.table = GrantTable(self.physmap)
        self.grants = BackendGrants(self.table, self.physmap, BACKEND_DOMID)
        """What the domain has granted to domain 0."""
        self.sharing = Sharing(self.physmap, self.table)
        """For backends in processes of their own."""
        self._grant_ops = GrantOps(self.table, self.physmap, config.domid)
        self._hvm = HvmOps(self.shared, self.upcalls, config.domid, clock.now_ns, self._flush)
        self._vcpu_ops = VcpuOps(
            self.shared,
            self.channels,
            self.physmap,
            count,
            clock.now_ns,
            clock.rearm,
            lambda vcpu: vcpus[vcpu].nmi(),
            self.upcalls.tell,
        )
        words = Words(memory)
        page = self.physmap.own(CONSOLE)
        self.console: ConsoleRing | None = None
        if config.console:
            self.console = ConsoleRing(words, page, self.physmap.view(page), machine.console)
        page = self.physmap.own(STORE)
        self.store = StoreRing(words, page, self.physmap.view(page)) if config.store else None
        self._store_attached = False
        self._pointers = [GuestPointers(memory, vcpu.translate) for vcpu in vcpus]
        sched = SchedOps(self.channels, self.shared, config.domid, clock.now_ns, machine.sleep, machine.shutdown)
        self._memory_ops = MemoryOps(self.physmap, self.table, machine.memory_map, config.domid)
        self._handlers: dict[int, Callable[[Call], int]] = {
            Nr.MEMORY_OP: self._memory_ops,
            Nr.MULTICALL: self._multicall,
            Nr.SET_TIMER_OP: self._vcpu_ops.set_timer,
            Nr.XEN_VERSION: VersionOps(config.handle),
            Nr.CONSOLE_IO: self._console_io,
            Nr.GRANT_TABLE_OP: self._grant_ops,
            Nr.VM_ASSIST: _vm_assist,
            Nr.VCPU_OP: self._vcpu_ops,
            Nr.SCHED_OP: sched,
            Nr.EVENT_CHANNEL_OP: EventOps(self.channels, config.domid),
            Nr.HVM_OP: self._hvm,
        }
        self._rings()

    # ── for the machine, in the vCPU's thread ──

    def hypercall(self, index: int = 0) -> None:
        """A VMCALL or VMMCALL of vCPU ``index``: do it, and put the result into RAX."""
        vcpu = self._machine.vcpus[index]
        long, level, registers = vcpu.hypercall_arguments()
        if level:
            result = -Errno.EPERM
        else:
            result = self.dispatch(Call.from_registers(long, registers, index, self._pointers[index]))
        self.upcalls.look()
        vcpu.set_register(RAX, result & (MASK_64 if long else 0xFFFF_FFFF))

    def dispatch(self, call: Call) -> int:
        """The result of a hypercall, as a signed number."""
        handler = self._handlers.get(call.number)
        if handler is None:
            known = min(HYPERCALLS, call.number)
            self._machine.events("xen", f"unknown-hypercall-{known}", call.number)
            return -Errno.ENOSYS
        name = Nr(call.number).name.lower()
        self.counts[name] += 1
        try:
            return handler(call)
        except HypercallError as error:
            detail = call.args[0] & 0xFFFF_FFFF
            command = min(64, detail)
            self._machine.events("xen", f"{name}-{command}-{error.errno.name}", detail)
            return -error.errno

    def read_msr(self, msr: int) -> int | None:
        """The value of one of Xen's registers; None: there is none."""
        return 0 if msr == MSR_HYPERCALL else None

    def write_msr(self, msr: int, value: int, index: int = 0) -> bool:
        """A guest wants its hypercall page. False for #GP."""
        if msr != MSR_HYPERCALL or value & PAGE_SIZE - 1:
            return False
        gfn = value // PAGE_SIZE
        if self.physmap.page(gfn) is None:
            return False
        long, _, _ = self._machine.vcpus[index].hypercall_arguments()
        self._machine.memory.write(gfn * PAGE_SIZE, hypercall_page())
        self.shared.use_abi(ABI64 if long else ABI32)
        return True

    def deadline(self) -> int | None:
        """When a timer is due."""
        due = [d for d in (self._vcpu_ops.deadline(), self.upcalls.deadline()) if d is not None]
        return min(due, default=None)

    def advance(self, now_ns: int) -> None:
        """Timers that are due fire."""
        self._vcpu_ops.advance(now_ns)
        self.upcalls.advance(now_ns)

    def slept(self, since_ns: int, index: int = 0) -> None:
        """A vCPU was halted from ``since_ns`` until now."""
        self._vcpu_ops.slept(index, since_ns)

    def reset(self) -> None:
        """The machine starts again: as at power-on. Backends lose their channels and grants."""
        self.channels.reset()
        if self.path is not None:
            self.path.reset()
        self.grants.close()
        self._grant_ops.reset()
        self.upcalls.reset()
        self._vcpu_ops.reset()
        self.table.reset()
        self.physmap.reset()
        self.shared.reset()
        self._rings()

    # ── saved domains; the vCPU stands ──

    def saved(self) -> tuple[dict[str, Any], bytes]:
        """Everything that the guest could notice, and the contents of the pages that it shares with us."""
        ports = {} if self.store is None else {"store": self._store_port.guest_port}
        if self.console is not None:
            ports["console"] = self._console_port.guest_port
        record: dict[str, Any] = {
            "physmap": self.physmap.saved(),
            "shared": self.shared.saved(),
            "channels": self.channels.saved(),
            "ports": ports,
            "params": list(self._hvm.params),
            "upcalls": self.upcalls.saved(),
            "vcpus": self._vcpu_ops.saved(),
            "shot": None if self.path is None else self.path.shot(),
            "grant_frames": self.table.frames,
            "grants": self._grant_ops.saved(),
            "limit": self._memory_ops.limit,
            "console": None if self.console is None else self.console.saved(),
            "store": None if self.store is None else self.store.saved(),
        }
        return record, self.physmap.own_record()

    def restore(self, record: Fields, own: bytes) -> None:
        """
        As :meth:`saved` found it, but that backends of devices have to come again. Before the guest goes on.

        StateError: this host is of no use then.
        """
        params = record.numbers("params")
        if len(params) != len(self._hvm.params):
            raise StateError("xen state: params are not as many as there are")
        self.channels.reset()
        self.physmap.restore(record.inner("physmap"), own)
        self.shared.restore(record.inner("shared"))
        self.table.restore(record.number("grant_frames", self.table.maximum, 1))
        self._grant_ops.restore(record.inner("grants"))
        ports = record.inner("ports")
        own_ports: dict[int, Callable[[], object]] = {}
        if self.store is not None:
            self.store.restore(record.inner("store"))
            own_ports[ports.number("store", 4096, 1)] = self.store.event
        if self.console is not None:
            self.console.restore(record.inner("console"))
            own_ports[ports.number("console", 4096, 1)] = self.console.event
        bound = self.channels.restore(record.inner("channels"), own_ports)
        if self.store is not None:
            self._store_port = bound[ports.number("store")]
            self.store.notify = self._store_port.notify
        if self.console is not None:
            self._console_port = bound[ports.number("console")]
            self.console.notify = self._console_port.notify
        self._hvm.params[:] = params
        self.upcalls.restore(record.inner("upcalls"), params[Param.CALLBACK_IRQ])
        self._vcpu_ops.restore(record.inner("vcpus"))
        self._shot = record.optional("shot")
        self._memory_ops.limit = record.number("limit", 1 << 40)

    def rearm(self) -> None:
        """Let the timers run, and upcalls come, that :meth:`restore` found; once the vCPU's state is complete."""
        shot, self._shot = self._shot, None
        if shot is not None:
            if self.path is not None:
                self.path.set_shot(shot, self._machine.clock.now_ns())
            else:
                self._vcpu_ops.timers[0].set_shot(shot)
        self.upcalls.rearm()

    # ── for backends; see nonroot.xen.backend.FrontendAccess ──

    def bind_interdomain(
        self, remote_port: int, on_event: Callable[[], object], bell: int | None = None
    ) -> EventChannelPort:
        """Bind to a port that the guest allocated for domain 0. Any thread."""
        return self.channels.bind_backend(remote_port, on_event, bell=bell)

    def attach_store(
        self, feed: Callable[[bytes], object], room: Callable[[], bool] = lambda: True
    ) -> Callable[[bytes], object]:
        """
        Connect a XenStore server before the guest starts: ``feed`` takes the guest's bytes, in the vCPU's thread; what
        is returned takes the server's, in any thread. While there is no ``room``, nothing is taken from the guest.

        RuntimeError if the domain has no ring for it.
        """
        store = self.store
        if store is None:
            raise RuntimeError("this domain has no ring to XenStore")
        self._store_attached = True
        store.attach(feed, room)
        self._hvm.params[Param.STORE_PFN] = STORE_GFN
        self._hvm.params[Param.STORE_EVTCHN] = self._store_port.guest_port
        return lambda data: self._machine.in_thread(lambda: store.deliver(data))

    @property
    def store_port(self) -> int:
        """The guest's event channel to XenStore; 0 if there is no ring."""
        return self._store_port.guest_port if self.store is not None else 0

    @property
    def console_port(self) -> int:
        """The guest's event channel of its console; 0 if there is none."""
        return self._hvm.params[Param.CONSOLE_EVTCHN]

    def set_param(self, param: Param, value: int) -> None:
        """Set a parameter, as the toolstack does."""
        self._hvm.params[param] = value

    def limit_memory(self, size: int) -> None:
        """Let the guest have ``size`` bytes at most; what it has beyond that it keeps. Any thread."""
        self._memory_ops.limit = size >> 12

    def close(self) -> None:
        """For the end of the domain."""
        self.physmap.close()

    # ── inside ──

    def _rings(self) -> None:
        """What the toolstack prepares: the rings' pages, channels and grants."""
        params = self._hvm.params
        params[:] = [0] * len(params)
        if self.store is not None:
            self.store.reset()
            self.physmap.place_page(STORE_GFN, self.physmap.own(STORE))
            self.table.grant(1, BACKEND_DOMID, STORE_GFN)
            self._store_port = self._bind(self.store.event)
            self.store.notify = self._store_port.notify
            if self._store_attached:
                params[Param.STORE_PFN], params[Param.STORE_EVTCHN] = STORE_GFN, self._store_port.guest_port
        if self.console is not None:
            self.console.reset()
            self.physmap.place_page(CONSOLE_GFN, self.physmap.own(CONSOLE))
            self.table.grant(0, BACKEND_DOMID, CONSOLE_GFN)
            self._console_port = self._bind(self.console.event)
            self.console.notify = self._console_port.notify
            params[Param.CONSOLE_PFN] = CONSOLE_GFN
            params[Param.CONSOLE_EVTCHN] = self._console_port.guest_port

    def _bind(self, on_event: Callable[[], object]) -> BackendPort:
        return self.channels.bind_backend(self.channels.alloc_unbound(BACKEND_DOMID), on_event)

    def _flush(self) -> None:
        for vcpu in self._machine.vcpus:
            vcpu.flush()

    def _console_io(self, call: Call) -> int:
        if call.args[0] & 0xFFFF_FFFF != CONSOLE_WRITE:
            raise HypercallError(Errno.ENOSYS)
        left, pointer = call.args[1] & 0xFFFF_FFFF, call.args[2]
        if left > 1 << 20:
            raise HypercallError(Errno.E2BIG)
        while left:
            size = min(left, LONGEST_MESSAGE)
            self._machine.debug(call.read(pointer, size))
            pointer, left = pointer + size, left - size
        return 0

    def _multicall(self, call: Call) -> int:
        pointer, count = call.args[0], call.args[1] & 0xFFFF_FFFF
        layout = call.abi.multicall
        if count > MAXIMUM_CALLS:
            raise HypercallError(Errno.E2BIG)
        for index in range(count):
            place = pointer + index * layout.size
            number, _, *args = layout.unpack(call.read(place, layout.size))
            if number == Nr.MULTICALL:
                result = -Errno.EINVAL
            else:
                inner = Call(call.abi, call.vcpu, number & 0xFFFF_FFFF, tuple(args), call.memory)
                result = self.dispatch(inner)
            call.write(place, layout.pack(number, result, *args))
        return 0


def hypercall_page() -> bytes:
    """Slots of 32 bytes: MOV EAX, number; VMCALL; RET. IRET, which such guests do not have, is UD2."""
    page = bytearray()
    for number in range(HYPERCALLS):
        code = b"\x0f\x0b" if number == SLOT_IRET else b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x01\xc1\xc3"
        page += code.ljust(SLOT_SIZE, b"\xcc")
    return bytes(page)


def _vm_assist(call: Call) -> int:
    if call.args[0] & 0xFFFF_FFFF > 1 or call.args[1] & 0xFFFF_FFFF != VMASST_RUNSTATE_UPDATE:
        raise HypercallError(Errno.EINVAL)
    # Records are only written while the vCPU does not run: nothing to mark.
    return 0
