"""A vCPU for comparing the engine with the model in :mod:`nonroot.spec`, whose states go in and come out."""

import mmap
import os
from dataclasses import dataclass
from typing import Any

from nonroot import _engine
from nonroot.engines.policy import CRYSTAL_HZ, CpuPolicy
from nonroot.spec.state import Memory, Segment, State
from nonroot.testing.generator_codes import host_flags

SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
RAM_BYTES = 256 << 10
_STAR, _LSTAR, _FMASK = 0xC000_0081, 0xC000_0082, 0xC000_0084


@dataclass
class Outcome:
    """How the engine's run ended: an exception that it reported, or anything else."""

    #: Vector, None if it ended otherwise.
    vector: int | None
    error: int | None
    #: Faulting address, for #PF.
    address: int
    exit: tuple[Any, ...]


class Machine:
    """256 KiB of RAM at 0 and a vCPU."""

    def __init__(self, exits: int = 0xFFFF_FFFF, off: tuple[str, ...] = ()) -> None:
        """``exits``: bitmap of exceptions that end a run instead of being delivered."""
        self._fd = os.memfd_create("nonroot-model")
        os.ftruncate(self._fd, RAM_BYTES)
        self.ram = mmap.mmap(self._fd, RAM_BYTES)
        self._memory = _engine.Memory()
        self._memory.map(0, RAM_BYTES >> 12, self._memory.add_backing(self._fd, RAM_BYTES), 0)
        policy = CpuPolicy.build(host_flags())
        options: dict[str, Any] = {
            "tsc_khz": policy.tsc_khz, "apic_bus_hz": CRYSTAL_HZ, "exception_exits": exits, "off": list(off),
        }  # fmt: skip
        self.vcpu = _engine.Vcpu(
            self._memory, 0, list[tuple[int, int, int, int, int, int]](policy.cpuid()), policy.msrs(), options
        )
        self._base = self.vcpu.state()

    def close(self) -> None:
        """Releases the memory."""
        self.ram.close()
        os.close(self._fd)

    def fill(self, contents: dict[int, bytes], background: bytes = bytes([0xCC]) * RAM_BYTES) -> None:
        """Fills RAM: ``contents`` by address, ``background`` elsewhere."""
        image = bytearray(background)
        for address, data in contents.items():
            image[address : address + len(data)] = data
        # Only the pages that differ: what was decoded from others stays.
        now = bytes(self.ram)
        for big in range(0, RAM_BYTES, 1 << 16):
            if now[big : big + (1 << 16)] == image[big : big + (1 << 16)]:
                continue
            for at in range(big, big + (1 << 16), 4096):
                if now[at : at + 4096] != image[at : at + 4096]:
                    self._memory.write(at, bytes(image[at : at + 4096]))

    def memory(self) -> Memory:
        """RAM as it is now, for the model; outside it reads as zeros, as the engine's MMU sees it."""
        snapshot = bytes(self.ram)

        def read(physical: int, size: int) -> bytes:
            return snapshot[physical : physical + size].ljust(size, b"\0") if physical < RAM_BYTES else bytes(size)

        return Memory(read)

    def run(self, state: State, instructions: int = 20, interrupt: int | None = None) -> Outcome:
        """Runs from ``state`` until an exit or for that many instructions. ``interrupt``: a vector to inject first."""
        raw = dict(self._base)
        raw.update(
            gpr=tuple(state.gpr),
            rip=state.rip,
            rflags=state.rflags | 2,
            segments=tuple(
                (s.selector, s.base, s.limit, s.access) for s in (state.segments[name] for name in SEGMENTS)
            ),
            gdtr=state.gdtr,
            idtr=state.idtr,
            cr0=state.cr0,
            cr2=0,
            cr3=state.cr3,
            cr4=state.cr4,
            efer=state.efer,
            pdpte=state.pdpte,
            injected=interrupt,
            msrs={**self._base["msrs"], _STAR: state.star, _LSTAR: state.lstar, _FMASK: state.fmask},
        )
        self.vcpu.set_state(raw)
        exit_ = self.vcpu.run(None, raw["retired"] + instructions)
        if exit_[0] == 10:
            return Outcome(exit_[1], exit_[2], exit_[3], exit_)
        return Outcome(None, None, 0, exit_)

    def state(self) -> State:
        """The vCPU's state as the model has it."""
        raw = self.vcpu.state()
        return State(
            gpr=list(raw["gpr"]),
            rip=raw["rip"],
            rflags=raw["rflags"],
            segments={name: Segment(*values) for name, values in zip(SEGMENTS, raw["segments"], strict=True)},
            gdtr=tuple(raw["gdtr"]),
            idtr=tuple(raw["idtr"]),
            cr0=raw["cr0"],
            cr3=raw["cr3"],
            cr4=raw["cr4"],
            efer=raw["efer"],
            pdpte=raw["pdpte"],
            memory=self.memory(),
        )

    def changed(self, before: Memory) -> dict[int, int]:
        """Bytes of RAM that differ from the model's memory after its writes: physical address to what is there."""
        expected = bytearray(before._backing(0, RAM_BYTES))
        for address, value in before.writes.items():
            if address < RAM_BYTES:
                expected[address] = value
        found = bytes(self.ram)
        if found == expected:
            return {}
        return {at: found[at] for at in range(RAM_BYTES) if found[at] != expected[at]}


def same_segment(model: Segment, engine: Segment) -> bool:
    """Whether two segment registers agree; of an unusable one only the selector counts."""
    if not model.usable or not engine.usable:
        return model.usable == engine.usable and model.selector == engine.selector
    return model == engine
