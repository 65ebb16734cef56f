"""A domain without a machine: real memory, a real hypervisor side, and a vCPU that only says what it was told."""

import struct
from collections.abc import Callable
from typing import Any

from nonroot._engine import Memory, XenPath
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.memory_map import MemoryMap
from nonroot.hvm.ram import create_ram
from nonroot.xen.config import XenConfig
from nonroot.xen.host import Surroundings, XenHost
from nonroot.xen.layout import ABI32, ABI64
from nonroot.xen.memory import Place

RAM = 16 << 20
ARGUMENTS = 0x10_0000
"""Where the tests put arguments; linear addresses are guest-physical ones."""
SHARED_GFN = 0x50
SECOND = 1_000_000_000
WALL = 1_700_000_000 * SECOND + 123


class FakeVcpu:
    """One vCPU."""

    def __init__(self) -> None:
        self.long = True
        self.level = 0
        self.registers = [0] * 16
        self.signals: list[int] = []
        self.injected: list[int] = []
        self.nmis = 0

    def hypercall_arguments(self) -> tuple[bool, int, list[int]]:
        return self.long, self.level, list(self.registers)

    def set_register(self, index: int, value: int) -> None:
        assert 0 <= value < 1 << 64
        self.registers[index] = value

    def translate(self, linear: int) -> int | None:
        return linear if linear < 1 << 32 else None

    def signal(self, vector: int, mode: int = 0, level: bool = False) -> None:
        self.signals.append(vector)

    def interrupt(self, vector: int) -> None:
        self.injected.append(vector)

    def nmi(self) -> None:
        self.nmis += 1

    def flush(self) -> None:
        pass


class Domain:
    """A guest by hand."""

    def __init__(
        self,
        long: bool = True,
        config: XenConfig | None = None,
        make_path: Callable[[Memory, Place], XenPath | None] = lambda memory, shared: None,
    ) -> None:
        self.vcpu = FakeVcpu()
        self.vcpu.long = long
        self.abi = ABI64 if long else ABI32
        self.clock = ManualClock()
        self.map = MemoryMap(RAM)
        self.files: list[int] = []
        self.memory = create_ram(self.map, None, self.files)
        self.events: list[tuple[str, str, int]] = []
        self.lines: dict[Any, bool] = {}
        self.sleeps: list[int | None] = []
        self.reasons: list[int] = []
        self.console = bytearray()
        self.debug = bytearray()
        self.host = XenHost(
            config or XenConfig(),
            Surroundings(
                memory=self.memory,
                files=self.files,
                memory_map=self.map,
                vcpus=[self.vcpu],
                clock=self.clock,
                tsc_khz=1_000_000,
                wall_ns=WALL,
                events=lambda device, event, detail: self.events.append((device, event, detail)),
                gsi=lambda gsi: lambda level: self.lines.update({gsi: level}),
                intx=lambda slot, pin: lambda level: self.lines.update({(slot, pin): level}),
                in_thread=lambda action: action(),
                sleep=self.sleeps.append,
                shutdown=self.reasons.append,
                console=self.console.extend,
                debug=self.debug.extend,
                make_path=lambda shared: make_path(self.memory, shared),
            ),
        )

    def call(self, number: int, *args: int) -> int:
        """Make a hypercall; the signed result."""
        order = (7, 6, 2, 10, 8, 9) if self.vcpu.long else (3, 1, 2, 6, 7, 5)
        self.vcpu.registers[0] = number
        for register, value in zip(order, args, strict=False):
            self.vcpu.registers[register] = value & (1 << 64) - 1
        self.host.hypercall()
        result = self.vcpu.registers[0]
        bits = 64 if self.vcpu.long else 32
        return result - (1 << bits) if result >> bits - 1 else result

    def call_with(self, number: int, command: int, data: bytes, *more: int) -> tuple[int, bytes]:
        """A hypercall whose second argument points to ``data``; the result, and what lies there afterwards."""
        self.memory.write(ARGUMENTS, data)
        result = self.call(number, command, ARGUMENTS, *more)
        return result, self.memory.read(ARGUMENTS, len(data))

    def map_shared_info(self, gfn: int = SHARED_GFN) -> None:
        assert self.call_with(12, 7, self.abi.add_to_physmap.pack(0x7FF0, 0, 0, 0, gfn))[0] == 0

    def shared(self, offset: int, length: int = 4) -> int:
        """A number of the shared page."""
        return int.from_bytes(self.memory.read(SHARED_GFN * 4096 + offset, length), "little")

    def set_shared(self, offset: int, value: int, length: int = 4) -> None:
        self.memory.write(SHARED_GFN * 4096 + offset, value.to_bytes(length, "little"))

    def set_vector(self, vector: int = 0xF3) -> None:
        assert self.call_with(34, 23, struct.pack("<IB3x", 0, vector))[0] == 0

    def alloc_unbound(self, remote: int = 0) -> int:
        result, data = self.call_with(32, 6, struct.pack("<HHI", 0x7FF0, remote, 0))
        assert result == 0
        return int(struct.unpack("<HHI", data)[2])

    def advance(self, nanoseconds: int) -> None:
        self.clock.time_ns += nanoseconds
        self.host.advance(self.clock.time_ns)
