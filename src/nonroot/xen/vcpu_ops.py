"""vcpu_op and set_timer_op: what a vCPU shares with the hypervisor, its run states and its timers.

Times are nanoseconds of machine time, which is Xen's system time here.
"""

import struct
from collections.abc import Callable
from typing import Any, Final

from nonroot.hvm.device import StateError
from nonroot.saved.fields import Fields
from nonroot.xen.abi import Errno, HypercallError, VcpuOp, Virq
from nonroot.xen.call import Call
from nonroot.xen.events import EventChannels
from nonroot.xen.layout import ABI32, ABI64, TIME_RECORD, VCPU_INFO_REGISTRATION, Abi
from nonroot.xen.memory import Physmap
from nonroot.xen.shared import SharedInfo

__all__ = ["Timers", "VcpuOps"]

RUNNING: Final = 0
BLOCKED: Final = 2
FUTURE: Final = 1
"""Flag of a single shot: refuse what is past already."""
SHORTEST_PERIOD: Final = 100_000
FAR: Final = 1 << 50
"""A set_timer_op further ahead than that is taken for a mistake."""
MISTAKE_DELAY: Final = 100_000_000


class Timers:
    """One vCPU's periodic timer, single shot and set_timer_op; each raises VIRQ_TIMER."""

    def __init__(self, now_ns: Callable[[], int], rearm: Callable[[], object], fire: Callable[[], object]) -> None:
        self._now_ns = now_ns
        self._rearm = rearm
        self._fire = fire
        self._shot: int | None = None
        self._tick: int | None = None
        self._period = 0

    def reset(self) -> None:
        """Nothing is set."""
        self._shot = self._tick = None
        self._rearm()

    def set_shot(self, deadline: int | None) -> None:
        """Fire once, at once if that time has come; None: not at all."""
        if deadline is not None and deadline <= self._now_ns():
            self._shot = None
            self._fire()
        else:
            self._shot = deadline
        self._rearm()

    def set_period(self, period: int) -> None:
        """Fire every ``period`` ns from now on; 0: not at all."""
        self._period = period
        self._tick = self._now_ns() + period if period else None
        self._rearm()

    def deadline(self) -> int | None:
        """When something is due next."""
        if self._shot is None or self._tick is None:
            return self._tick if self._shot is None else self._shot
        return min(self._shot, self._tick)

    def advance(self, now: int) -> None:
        """Fire what is due; missed ticks are one."""
        fire = False
        if self._shot is not None and self._shot <= now:
            self._shot = None
            fire = True
        if self._tick is not None and self._tick <= now:
            self._tick += (now - self._tick) // self._period * self._period + self._period
            fire = True
        if fire:
            self._fire()
            self._rearm()

    def saved(self) -> dict[str, Any]:
        """What is set."""
        return {"shot": self._shot, "tick": self._tick, "period": self._period}

    def restore(self, record: Fields) -> None:
        """As :meth:`saved` found it. StateError."""
        shot, tick, period = record.optional("shot"), record.optional("tick"), record.number("period", FAR)
        self._shot, self._tick, self._period = shot, tick if period >= SHORTEST_PERIOD else None, period
        self._rearm()


class _Runstate:
    """How long a vCPU ran and was blocked, and where the guest wants to read it."""

    def __init__(self) -> None:
        self.state = RUNNING
        self.since = 0
        self.times = [0, 0, 0, 0]
        self.pieces: list[tuple[int, int]] = []
        self.abi: Abi | None = None

    def change(self, state: int, now: int) -> None:
        self.times[self.state] += max(now - self.since, 0)
        self.state, self.since = state, now

    def pack(self, abi: Abi, now: int) -> bytes:
        times = list(self.times)
        times[self.state] += max(now - self.since, 0)
        return abi.runstate.pack(self.state, self.since, *times)

    def saved(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "since": self.since,
            "times": [self.times],
            "pieces": [list(piece) for piece in self.pieces],
            "long": self.abi is None or self.abi.long,
            "shown": self.abi is not None,
        }

    def restore(self, record: Fields) -> None:
        state, since = record.number("state", 3), record.number("since")
        rows = record.rows("times", *[(1 << 63) - 1] * 4)
        if len(rows) != 1:
            raise StateError("xen run state: times are not there once")
        pieces = record.rows("pieces", 1 << 52, 4096)
        long, shown = record.flag("long"), record.flag("shown")
        self.state, self.since, self.times = state, since, list(rows[0])
        self.pieces = [(gpa, size) for gpa, size in pieces]
        self.abi = (ABI64 if long else ABI32) if shown else None


class VcpuOps:
    """The operations on a domain's vCPUs. In the vCPU's thread."""

    def __init__(
        self,
        shared: SharedInfo,
        channels: EventChannels,
        physmap: Physmap,
        vcpus: int,
        now_ns: Callable[[], int],
        rearm: Callable[[], object],
        nmi: Callable[[int], object],
        tell: Callable[[int], object],
    ) -> None:
        self._shared = shared
        self._physmap = physmap
        self._now_ns = now_ns
        self._nmi = nmi
        self._tell = tell

        def timers(vcpu: int) -> Timers:
            return Timers(now_ns, rearm, lambda: channels.raise_virq(Virq.TIMER, vcpu))

        self.timers = [timers(vcpu) for vcpu in range(vcpus)]
        self._runstates = [_Runstate() for _ in range(vcpus)]

    def reset(self) -> None:
        """As at power-on; what was counted stays."""
        for timers in self.timers:
            timers.reset()
        for runstate in self._runstates:
            runstate.pieces, runstate.abi = [], None

    # ── for the machine ──

    def saved(self) -> dict[str, Any]:
        """Timers and run states."""
        return {
            "timers": [timers.saved() for timers in self.timers],
            "runstates": [runstate.saved() for runstate in self._runstates],
        }

    def restore(self, record: Fields) -> None:
        """As :meth:`saved` found them. StateError."""
        timers, runstates = record.records("timers"), record.records("runstates")
        if len(timers) != len(self.timers) or len(runstates) != len(self._runstates):
            raise StateError("xen vCPU state: it is of another number of vCPUs")
        for ours, saved in zip(self.timers, timers, strict=True):
            ours.restore(saved)
        for runstate, saved in zip(self._runstates, runstates, strict=True):
            runstate.restore(saved)

    def deadline(self) -> int | None:
        """When a timer is due next."""
        due = [deadline for timers in self.timers if (deadline := timers.deadline()) is not None]
        return min(due, default=None)

    def advance(self, now: int) -> None:
        """Fire the timers that are due."""
        for timers in self.timers:
            timers.advance(now)

    def slept(self, vcpu: int, since: int) -> None:
        """The vCPU was blocked from ``since`` until now."""
        runstate = self._runstates[vcpu]
        runstate.change(BLOCKED, since)
        runstate.change(RUNNING, self._now_ns())
        self._show(runstate)

    def _show(self, runstate: _Runstate) -> None:
        if runstate.abi is None:
            return
        data = runstate.pack(runstate.abi, self._now_ns())
        for gpa, size in runstate.pieces:
            try:
                self._physmap.memory.write(gpa, data[:size])
            except (ValueError, OverflowError):
                runstate.pieces, runstate.abi = [], None
                return
            data = data[size:]

    # ── hypercalls ──

    def set_timer(self, call: Call) -> int:
        """set_timer_op: at an absolute time; 0 is never."""
        value = call.args[0] if call.abi.long else call.args[0] | call.args[1] << 32
        if value == 0:
            self.timers[call.vcpu].set_shot(None)
            return 0
        now = self._now_ns()
        if value >= 1 << 63 or value > now + FAR:
            value = now + MISTAKE_DELAY
        self.timers[call.vcpu].set_shot(value)
        return 0

    def __call__(self, call: Call) -> int:
        """vcpu_op."""
        command, vcpu, pointer = call.args[0] & 0xFFFF_FFFF, call.args[1] & 0xFFFF_FFFF, call.args[2]
        if vcpu >= len(self.timers):
            raise HypercallError(Errno.ENOENT)
        handlers: dict[int, Callable[[Call, int, int], int]] = {
            VcpuOp.INITIALISE: self._initialise,
            VcpuOp.UP: lambda call, vcpu, pointer: 0,
            VcpuOp.IS_UP: lambda call, vcpu, pointer: 1,
            VcpuOp.GET_RUNSTATE_INFO: self._get_runstate,
            VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA: self._register_runstate,
            VcpuOp.SET_PERIODIC_TIMER: self._set_periodic,
            VcpuOp.STOP_PERIODIC_TIMER: self._stop_periodic,
            VcpuOp.SET_SINGLESHOT_TIMER: self._set_singleshot,
            VcpuOp.STOP_SINGLESHOT_TIMER: self._stop_singleshot,
            VcpuOp.REGISTER_VCPU_INFO: self._register_info,
            VcpuOp.SEND_NMI: self._send_nmi,
            VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA: self._register_time,
        }
        handler = handlers.get(command)
        if handler is None:
            raise HypercallError(Errno.ENOSYS)
        return handler(call, vcpu, pointer)

    def _initialise(self, call: Call, vcpu: int, pointer: int) -> int:
        raise HypercallError(Errno.EEXIST)  # vCPUs start through their local APICs

    def _get_runstate(self, call: Call, vcpu: int, pointer: int) -> int:
        call.write(pointer, self._runstates[vcpu].pack(call.abi, self._now_ns()))
        return 0

    def _register_runstate(self, call: Call, vcpu: int, pointer: int) -> int:
        (address,) = struct.unpack("<Q", call.read(pointer, 8))
        runstate = self._runstates[vcpu]
        runstate.pieces = call.memory.pieces(address, call.abi.runstate.size, write=True)
        runstate.abi = call.abi
        self._show(runstate)
        return 0

    def _register_time(self, call: Call, vcpu: int, pointer: int) -> int:
        (address,) = struct.unpack("<Q", call.read(pointer, 8))
        record = self._shared.time_record()
        assert len(record) == TIME_RECORD.size
        call.write(address, record)
        return 0

    def _set_periodic(self, call: Call, vcpu: int, pointer: int) -> int:
        (period,) = struct.unpack("<Q", call.read(pointer, 8))
        if not SHORTEST_PERIOD <= period < FAR:
            raise HypercallError(Errno.EINVAL)
        self.timers[vcpu].set_period(period)
        return 0

    def _stop_periodic(self, call: Call, vcpu: int, pointer: int) -> int:
        self.timers[vcpu].set_period(0)
        return 0

    def _set_singleshot(self, call: Call, vcpu: int, pointer: int) -> int:
        self._check_current(call, vcpu)
        timeout, flags = call.abi.singleshot.unpack(call.read(pointer, call.abi.singleshot.size))
        if flags & FUTURE and timeout < self._now_ns():
            raise HypercallError(Errno.ETIME)
        self.timers[vcpu].set_shot(min(timeout, 1 << 62))
        return 0

    def _stop_singleshot(self, call: Call, vcpu: int, pointer: int) -> int:
        self._check_current(call, vcpu)
        self.timers[vcpu].set_shot(None)
        return 0

    def _check_current(self, call: Call, vcpu: int) -> None:
        if vcpu != call.vcpu:
            raise HypercallError(Errno.EINVAL)

    def _register_info(self, call: Call, vcpu: int, pointer: int) -> int:
        frame, offset, _ = VCPU_INFO_REGISTRATION.unpack(call.read(pointer, VCPU_INFO_REGISTRATION.size))
        self._shared.register(vcpu, frame, offset)
        self._shared.mark_all(vcpu)
        self._tell(vcpu)
        return 0

    def _send_nmi(self, call: Call, vcpu: int, pointer: int) -> int:
        self._nmi(vcpu)
        return 0
