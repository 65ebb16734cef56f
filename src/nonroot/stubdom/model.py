"""The hypervisor's side of a device model: starts its process, and stands for its devices on the machine's board.

    model = DeviceModel(Parts(["display", "watchdog"]), domid=7)
    MachineConfig(…, attach=[model.attach])

It is one thing that the machine's vCPU thread talks to: every method without another word is for that thread. A request
waits for its answer; what the process asks for meanwhile is done first, in order. What it asks for at other times
(a disk has answered) is found by a thread that only waits, and done between two instructions of the guest.

Whatever the process says is taken for hostile: operations are checked, numbers are bounded, what cannot be is refused.
"""

import base64
import contextlib
import fcntl
import json
import mmap
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from nonroot._engine import IoreqPages
from nonroot.backends.helper import Helper, start_helper
from nonroot.backends.message import LostError, message_pair, receive, send
from nonroot.devices.pci_device import Bar, BarKind, Region
from nonroot.errors import InternalError
from nonroot.hvm import ioreq
from nonroot.hvm.acpi import IsaDevice
from nonroot.hvm.bus import Bus
from nonroot.hvm.device import Device, IrqLine
from nonroot.hvm.dm_op import DmOp, Operations, Shutdown
from nonroot.hvm.ioreq import ALL_ONES, DATA_IS_POINTER, NEVER, READ, IoreqType
from nonroot.hvm.memory_map import PAGE_SIZE, VGA_END, VGA_START
from nonroot.hvm.pc import Board, MachineParts
from nonroot.hvm.ram import BoardRam
from nonroot.stubdom.board import READ_ONLY, RUN
from nonroot.stubdom.media import Media, Parts
from nonroot.stubdom.proxies import (
    MemoryAccess,
    PortAccess,
    RemoteConsole,
    RemoteDevice,
    RemoteFunction,
    RemotePs2,
    RemoteStorage,
    RemoteVga,
)
from nonroot.stubdom.records import answered, records_length

__all__ = ["DeviceModel", "Parts"]

ANSWER_SECONDS: Final = 30.0
"""For one request; a disk's writes are not waited for in one."""
BUILD_SECONDS: Final = 60.0
REPLY: Final = 0
OPERATIONS: Final = 1
LOST: Final = 2
FLAGS: Final = 30
"""Place of a slot's state."""
MOST_DEATHS: Final = 5
"""In :data:`DEATH_SECONDS`; the next one is the last."""
DEATH_SECONDS: Final = 20.0
PROCESS: Final = "nonroot.stubdom.process"
WRITABLE: Final = 1 << 63
MOST_MODIFIED: Final = 1 << 28


@dataclass(slots=True)
class _Shared:
    """What both sides have."""

    pages: IoreqPages
    area: memoryview
    file: int
    request: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    reply: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
    operations: int = field(default_factory=lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    @classmethod
    def new(cls) -> "_Shared":
        """Both map it."""
        file = _sealed_file("nonroot-ioreq", ioreq.LENGTH)
        pages = IoreqPages(file, ioreq.LENGTH, 1)
        pages.set_deadline(NEVER)
        return cls(pages, memoryview(mmap.mmap(file, ioreq.LENGTH)), file)

    def close(self) -> None:
        """Close the descriptors; the mapping goes with the object."""
        for fd in (self.file, self.request, self.reply, self.operations):
            if fd >= 0:
                os.close(fd)
        self.file = self.request = self.reply = self.operations = -1


class DeviceModel:
    """One domain's device model, in a process of its own."""

    _board: Board
    _machine: MachineParts

    def __init__(
        self,
        parts: Parts,
        domid: int = 0,
        confined: bool = True,
        virtual_time: bool = False,
        *,
        restarts: bool = True,
        faults: Sequence[tuple[str, int]] = (),
    ) -> None:
        """
        ``confined``: a stub domain; otherwise it runs as Xen's did in domain zero, with all that its user has.

        ``restarts``: a process that dies is replaced, and the devices go on. ``faults``, for tests: at which step each
        of the processes dies, and at the how manieth time.
        """
        self._parts = parts
        self._media = Media(parts)
        self._restarts = restarts
        self._faults = list(faults)
        self._domid = domid
        self._confined = confined
        self._virtual = virtual_time
        self._shared = _Shared.new()
        self.data = self._shared.area[ioreq.DATA : ioreq.DATA + ioreq.DATA_LENGTH]
        self.posts = not virtual_time
        """Whether writes to the VGA's window are posted: in virtual time, nothing happens at its own time."""
        self._helper: Helper | None = None
        self._control, self._theirs = message_pair()
        self._life = self._control.fileno()
        self._memories: list[tuple[str, BoardRam]] = []
        self._bars: dict[int, dict[int, Bar]] = {}
        self._decoded: dict[int, list[Region]] = {}
        self._isa: dict[int, IrqLine] = {}
        self._intx: dict[tuple[int, int], IrqLine] = {}
        self._firmware: dict[str, Any] | None = None
        self._record_sizes: list[int] = []
        self._started = False
        self._gone = False
        self._deadline = NEVER
        self._p2m_file = -1
        self._records_file = -1
        self._words: memoryview | None = None
        self._shown: dict[int, tuple[BoardRam, int]] = {}
        self._given: list[int] = []
        self._deaths: deque[float] = deque()
        self.restarted = 0
        """How often a process has taken over from a dead one."""
        self._listener: threading.Thread | None = None
        self.confinement: dict[str, list[str]] = {}
        """What confines the process, and what could not be had; known once the machine runs."""
        self.requests = 0
        """I/O requests so far."""
        self.console: RemoteConsole | None = None
        """Screen and keyboard, if the process has them."""
        self.storage = RemoteStorage(self, self._give, self._media)
        self._operations = Operations(
            domid,
            {
                DmOp.MAP_IO_RANGE: self._map_io_range,
                DmOp.UNMAP_IO_RANGE: self._unmap_io_range,
                DmOp.TRACK_DIRTY_VRAM: self._track_dirty_vram,
                DmOp.SET_PCI_INTX_LEVEL: self._set_pci_intx_level,
                DmOp.SET_ISA_IRQ_LEVEL: self._set_isa_irq_level,
                DmOp.MODIFIED_MEMORY: self._modified_memory,
                DmOp.INJECT_MSI: self._inject_msi,
                DmOp.REMOTE_SHUTDOWN: self._remote_shutdown,
                DmOp.SHOW_MEMORY: self._show_memory,
                DmOp.HIDE_MEMORY: self._hide_memory,
                DmOp.UPDATE_P2M: self._update_p2m,
                DmOp.REARM: self._rearm,
            },
        )

    @property
    def pid(self) -> int | None:
        """Of its process."""
        return None if self._helper is None else self._helper.pid

    @property
    def refused(self) -> int:
        """How many operations were refused."""
        return self._operations.refused

    def ram(self, name: str) -> BoardRam | None:
        """A device's memory; None if there is none of that name."""
        return dict(self._memories).get(name)

    # ── onto the board ──

    def attach(self, board: Board) -> None:
        """Start the process, and put what it has onto ``board``. NonrootError."""
        assert board.machine is not None, "a board without a machine has no device models elsewhere"
        self._board, self._machine = board, board.machine
        self._start_process()
        facts = self._build(board)
        self._record_sizes = [entry["size"] for entry in facts["devices"]] + [PAGE_SIZE]
        self._plug(board, facts)
        board.timed.append(self)
        if "display" in self._parts.devices or "storage" in self._parts.devices:
            board.make_fw_cfg = self._make_fw_cfg

    def _start_process(self) -> None:
        shared, theirs = self._shared, self._theirs
        events = [shared.request, shared.reply, shared.operations]
        work = {
            "control": theirs.fileno(),
            "pages": shared.file,
            "events": events,
            "vcpus": 1,
            "domid": self._domid,
            "low_end": self._machine.low_end,
            "virtual_time": self._virtual,
            "confined": self._confined,
            "fault": self._faults.pop(0) if self._faults else None,
        }
        self._helper = start_helper(PROCESS, work, [theirs.fileno(), shared.file, *events])
        theirs.close()

    def _build(self, board: Board) -> dict[str, Any]:
        control = self._control
        control.settimeout(BUILD_SECONDS)
        known = dict(self._memories)
        try:
            parts, files = self._media.describe(self._parts)
            send(control, {"op": "build", "parts": parts}, files)
            while True:
                message, _ = receive(control)
                if message.get("op") != "ram":
                    break
                name, size = message["name"], message["size"]
                ram = known.get(name) or board.make_ram(name, size)
                assert isinstance(ram, BoardRam)
                fd = _writable(self._machine.files[ram.file])
                if name not in known:
                    self._memories.append((name, ram))
                send(control, {"number": [n for n, _ in self._memories].index(name)}, [fd])
                os.close(fd)
            return dict(json.loads(bytes(self.data[: message["length"]])))
        except LostError:
            raise InternalError("the device model's process ended while it was made") from None

    def _plug(self, board: Board, facts: dict[str, Any]) -> None:
        ports, mmio = PortAccess(self, "device-model.ports"), MemoryAccess(self, "device-model.mmio")
        vga: RemoteVga | None = None
        ps2: RemotePs2 | None = None
        for entry in facts["devices"]:
            name, record, key = entry["name"], entry["record"], entry["function"]
            device: RemoteDevice
            if name == "vga":
                device = vga = RemoteVga(self, name, record, key, dict(self._memories)["vga"])
            elif name == "ps2":
                device = ps2 = RemotePs2(self, name, record)
            elif key is not None:
                device = RemoteFunction(self, name, record, key)
            else:
                device = RemoteDevice(self, name, record)
            if key is None:
                board.add(device)
            else:
                assert isinstance(device, RemoteFunction)
                self._bars[key] = {bar["index"]: self._bar(bar) for bar in entry["bars"]}
                self._decoded[key] = []
                board.add_remote_pci(key >> 3, key & 7, device, ports, mmio)
        for entry in facts["ranges"]:
            bus: Bus = board.ports if entry["bus"] == "port" else board.mmio
            access: Device = ports if entry["bus"] == "port" else mmio
            bus.add(entry["base"], entry["length"], access, entry["base"], tuple(entry["sizes"]))
        self._isa = {irq: board.isa(irq) for irq in facts["isa"]}
        self._intx = {(slot, pin): board.intx(slot, pin) for slot, pin in facts["intx"]}
        board.cmos.update(dict(facts["cmos"]))
        board.isa_devices += [
            IsaDevice(path, hid, tuple((base, length) for base, length in where), irq)
            for path, hid, where, irq in facts["isa_devices"]
        ]
        board.has_vga |= facts["has_vga"]
        board.has_8042 |= facts["has_8042"]
        board.files.update({name: base64.b64decode(text) for name, text in facts["files"].items()})
        if facts["hides_window"]:
            board.window_hiders.append(lambda hidden: self.control("hide-window", hidden=hidden))
        if vga is not None and ps2 is not None:
            self.console = RemoteConsole(vga, ps2)

    def _bar(self, bar: dict[str, Any]) -> Bar:
        memory = bar["memory"]
        ram = None if memory is None else dict(self._memories)[memory]
        return Bar(bar["index"], BarKind(bar["kind"]), bar["size"], 0, tuple(bar["sizes"]), ram)

    def _make_fw_cfg(self, items: Mapping[int, bytes], files: Mapping[str, bytes]) -> Device:
        from nonroot.devices.fw_cfg import FW_CFG_PORTS
        from nonroot.devices.fw_cfg import LENGTH as FW_CFG_LENGTH

        self._firmware = {
            "items": {key: base64.b64encode(data).decode() for key, data in items.items()},
            "files": {name: base64.b64encode(data).decode() for name, data in files.items()},
        }
        ports = PortAccess(self, "fw-cfg.ports")
        self._board.ports.add(FW_CFG_PORTS, FW_CFG_LENGTH, ports, FW_CFG_PORTS, sizes=(1, 2, 4))
        return RemoteDevice(self, "fw-cfg", "nonroot.devices.fw_cfg:FwCfgState")

    def _start(self) -> None:
        """The machine begins: the process gets its memory, and is confined."""
        self._started = True
        self._machine.share_ram()
        frames = self._machine.memory_bytes // PAGE_SIZE
        self._p2m_file = _sealed_file("nonroot-p2m", _whole_pages((frames + 0x10000) * RUN.size))
        length = records_length(self._record_sizes)
        self._records_file = _sealed_file("nonroot-records", length)
        self._words = memoryview(mmap.mmap(self._records_file, length))[:PAGE_SIZE].cast("Q")
        self._send_start(resume=False, finish=False)

    def _send_start(self, resume: bool, finish: bool) -> None:
        machine = self._machine
        firmware = b"" if self._firmware is None else json.dumps(self._firmware).encode()
        backings = [_writable(fd) for fd in machine.files]
        contents = os.memfd_create("nonroot-firmware", os.MFD_CLOEXEC)
        try:
            os.pwrite(contents, firmware, 0)
            message = {
                "op": "start",
                "firmware": len(firmware),
                "backings": [os.fstat(fd).st_size for fd in backings],
                "low_end": machine.low_end,
                "keep": self._restarts,
                "resume": resume,
                "finish": finish,
                "unplugged": sorted(self._media.unplugged),
            }
            send(self._control, message, [self._p2m_file, contents, self._records_file, *backings])
        except LostError:
            self._end("ended before its guest began")
            return
        finally:
            for fd in (contents, *backings):
                os.close(fd)
        life = self._life
        self._listener = threading.Thread(target=lambda: self._listen(life), name="nonroot-device-model", daemon=True)
        self._listener.start()
        self.confinement = self.control("confinement")

    # ── requests ──

    def request(self, kind: int, flags: int, addr: int, data: int, size: int, count: int) -> int:
        """One I/O request and its answer; all ones from a device model that is gone."""
        if self._gone:
            return ALL_ONES
        if not self._started:
            self._keep_data(self._start)
        pages, shared, board = self._shared.pages, self._shared, self._board
        pages.stamp(board.clock.now_ns(), self._machine.memory.generation())
        self.requests += 1
        payload = b""
        if self._restarts:
            assert self._words is not None
            self._words[1] = self.requests
            if kind == IoreqType.CONTROL or flags & (DATA_IS_POINTER | READ) == DATA_IS_POINTER:
                payload = bytes(self.data[data : data + size * count])
        pages.submit(0, kind, flags, addr, data, size, count, shared.request)
        what, value = pages.reply(0, shared.reply, self._life, ANSWER_SECONDS)
        while what != REPLY:
            if what == OPERATIONS:
                self._operate()
            else:
                known = self._replace("ended" if what == LOST else f"did not answer within {ANSWER_SECONDS:.0f} s")
                if known is not None:
                    value = known
                    break
                self.data[data : data + len(payload)] = payload
                self.requests += 1
                assert self._words is not None
                self._words[1] = self.requests
                pages.submit(0, kind, flags, addr, data, size, count, shared.request)
            what, value = pages.reply(0, shared.reply, self._life, ANSWER_SECONDS)
        if pages.deadline() != self._deadline:
            self._deadline = pages.deadline()
            board.clock.rearm()
        return value

    def _keep_data(self, action: Any) -> None:
        """Starting uses the data area, in which a request may have put its own."""
        kept = bytes(self.data)
        action()
        self.data[:] = kept

    def post(self, addr: int, size: int, value: int) -> bool:
        """Post a write to memory. False if it cannot be: then it is a request."""
        if not self._started or self._gone:
            return False
        return self._shared.pages.post(IoreqType.COPY, addr, size, value, self._shared.request)

    def control(self, op: str, **arguments: Any) -> dict[str, Any]:
        """A control request and its answer; an empty one from a device model that is gone."""
        if not self._started and not self._gone:
            self._start()
        message = json.dumps({"op": op, **arguments}).encode()
        self.data[: len(message)] = message
        length = self.request(IoreqType.CONTROL, 0, 0, 0, 1, len(message))
        if self._gone:
            return {}
        try:
            answer = json.loads(bytes(self.data[: min(length, len(self.data))]))
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self._end("gave an answer that is none")
            return {}
        return answer

    def _operate(self) -> None:
        pages = self._shared.pages
        while (found := pages.operation()) is not None:
            domid, op, _, args = found
            pages.finish_operation(self._operations.do(domid, op, args), self._shared.request)

    def _attend(self) -> None:
        """It has asked for something while no vCPU waited for it."""
        if self._gone:
            return
        if self._shared.pages.posted():
            # Its operations may come from the midst of posted writes; the rest of these comes first.
            self.request(IoreqType.INVALIDATE, 0, 0, 0, 1, 1)
        else:
            self._operate()

    def _listen(self, life: int) -> None:
        while self._shared.pages.wait_for_event(self._shared.operations, life):
            self._board.post(self._attend)
        self._board.post(lambda: self._lost(life))

    def _lost(self, life: int) -> None:
        if not self._gone and life == self._life:
            self._replace("ended")

    def _replace(self, how: str) -> int | None:
        """
        Its process is dead, or of no use: another one takes over. The reply to the present request; None: do it again.

        If nobody can take over, the device model is gone for good.
        """
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - DEATH_SECONDS:
            self._deaths.popleft()
        if not self._restarts or len(self._deaths) > MOST_DEATHS or self._helper is None:
            self._end(how if not self._restarts else f"{how}, and has done so {len(self._deaths)} times")
            return ALL_ONES
        self._operate()
        self._helper.process.kill()
        self._helper.close()
        assert self._words is not None
        number, reply = answered(self._words)
        pending = self._shared.pages.state(0) != ioreq.IoreqState.NONE
        known = reply if pending and number == self.requests else None
        if known is not None:
            self._media.settle()
        slot = self._shared.area[: ioreq.Ioreq.LAYOUT.size]
        slot[FLAGS] = 0  # none
        for address, (ram, length) in list(self._shown.items()):
            ram.hide(address, length)
        self._shown.clear()
        kept = bytes(self.data)
        old = self._control
        self._control, self._theirs = message_pair()
        self._life = self._control.fileno()
        old.close()
        self._start_process()
        self._build(self._board)
        self.restarted += 1
        self._send_start(resume=True, finish=known is not None)
        self.data[:] = kept
        if self._given and known is None and not self._gone:
            send(self._control, {"op": "files"}, self._given)
        return ALL_ONES if self._gone else known

    def _give(self, files: list[int]) -> None:
        """``files`` go with the control request that follows; none: it is over."""
        if not self._started:
            self._start()
        self._given = files
        if files:
            with contextlib.suppress(LostError):  # whoever takes over gets them
                send(self._control, {"op": "files"}, files)

    def _end(self, how: str) -> None:
        if not self._gone:
            self._gone = True
            self._deadline = NEVER
            self._machine.fail(f"its device model {how}")

    # ── time ──

    def deadline(self) -> int | None:
        """When something of the devices is due (machine time, ns)."""
        return None if self._deadline == NEVER else self._deadline

    def advance(self, now_ns: int) -> None:
        """What is due happens."""
        if self._deadline <= now_ns:
            self.request(IoreqType.ADVANCE, 0, 0, 0, 1, 1)

    # ── operations: see nonroot.hvm.dm_op ──

    def _region(self, args: Sequence[int]) -> tuple[int, Region]:
        key, index, base = args[:3]
        bar = self._bars[key][index]
        end = 1 << (16 if bar.kind is BarKind.IO else 32)
        if not 0 < base <= end - bar.size or base % bar.size:
            raise ValueError("no place for a window")
        # On the buses, what is elsewhere is reached by its address.
        return key, Region(Bar(index, bar.kind, bar.size, base, bar.sizes, bar.ram), base)

    def _map_io_range(self, args: Sequence[int]) -> int:
        key, region = self._region(args)
        others = [other for other in self._decoded[key] if other.bar.index != region.bar.index]
        self._decode(key, [*others, region])
        return 0

    def _unmap_io_range(self, args: Sequence[int]) -> int:
        key, region = self._region(args)
        self._decode(key, [other for other in self._decoded[key] if other != region])
        return 0

    def _decode(self, key: int, regions: list[Region]) -> None:
        self._decoded[key] = regions
        self._board.decode(key, regions)

    def _ram(self, number: int) -> BoardRam:
        if number >= len(self._memories):
            raise ValueError("no such memory")
        return self._memories[number][1]

    def _track_dirty_vram(self, args: Sequence[int]) -> int:
        ram = self._ram(args[0])
        dirty = ram.take_dirty()
        bits = sum(1 << page for page in dirty)
        length = (ram.size // PAGE_SIZE + 7) // 8
        self._shared.area[ioreq.BITMAP : ioreq.BITMAP + length] = bits.to_bytes(length, "little")
        return len(dirty)

    def _set_pci_intx_level(self, args: Sequence[int]) -> int:
        self._intx[args[0], args[1]](bool(args[2]))
        return 0

    def _set_isa_irq_level(self, args: Sequence[int]) -> int:
        self._isa[args[0]](bool(args[1]))
        return 0

    def _modified_memory(self, args: Sequence[int]) -> int:
        first, count = args[:2]
        if not 0 < count <= self._machine.memory_bytes // PAGE_SIZE or first + count > MOST_MODIFIED:
            raise ValueError("no such frames")
        memory = self._machine.memory
        for gfn in range(first, first + count):
            memory.touch(gfn)
        return 0

    def _inject_msi(self, args: Sequence[int]) -> int:
        self._machine.inject_msi(args[0] & 0xFFFF_FFFF, args[1] & 0xFFFF_FFFF)
        return 0

    def _remote_shutdown(self, args: Sequence[int]) -> int:
        if Shutdown(args[0]) is Shutdown.REBOOT:
            self._board.request_reset()
        else:
            self._machine.power_off()
        return 0

    def _show_memory(self, args: Sequence[int]) -> int:
        number, address, offset, length = args[:4]
        writable, length = bool(length & WRITABLE), length & ~WRITABLE
        self._legacy_window(address, length)
        self._ram(number).show(address, offset, length, writable)
        self._shown[address] = self._ram(number), length
        return 0

    def _hide_memory(self, args: Sequence[int]) -> int:
        number, address, length = args[:3]
        self._legacy_window(address, length)
        self._ram(number).hide(address, length)
        self._shown.pop(address, None)
        return 0

    def _legacy_window(self, address: int, length: int) -> None:
        """Elsewhere, memory is shown by BARs alone."""
        if not VGA_START <= address < address + length <= VGA_END or (address | length) % PAGE_SIZE:
            raise ValueError("not in the VGA's window")

    def _update_p2m(self, args: Sequence[int]) -> int:
        runs = self._machine.memory.runs()
        packed = b"".join(
            RUN.pack(gfn, count, backing | (0 if writable else READ_ONLY), offset)
            for gfn, count, backing, offset, writable in runs
        )
        if len(packed) > os.fstat(self._p2m_file).st_size:
            raise ValueError("the p2m is in too many pieces")
        os.pwrite(self._p2m_file, packed, 0)
        return len(runs)

    def _rearm(self, args: Sequence[int]) -> int:
        self._deadline = self._shared.pages.deadline()
        self._board.clock.rearm()
        return 0

    def close(self) -> None:
        """The domain is over. Any thread, when the machine does not run."""
        self._gone = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        if self._helper is not None:
            self._helper.close()
        if self._listener is not None:
            self._listener.join()
        self._control.close()
        self._shared.close()
        self._media.close()
        for fd in (self._p2m_file, self._records_file):
            if fd >= 0:
                os.close(fd)
        self._p2m_file = self._records_file = -1


def _sealed_file(name: str, size: int) -> int:
    """Memory that nobody can make shorter under the other."""
    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def _writable(fd: int) -> int:
    """A descriptor of the same memory that can be written."""
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)


def _whole_pages(size: int) -> int:
    return (size + PAGE_SIZE - 1) // PAGE_SIZE * PAGE_SIZE
