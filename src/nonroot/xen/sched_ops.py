"""sched_op: waiting, and the end of the domain."""

import struct
from collections.abc import Callable
from typing import Final

from nonroot.xen.abi import DOMID_SELF, Errno, HypercallError, Sched, Shutdown
from nonroot.xen.call import Call
from nonroot.xen.events import EventChannels
from nonroot.xen.shared import SharedInfo

__all__ = ["SchedOps", "Sleeper"]

MAXIMUM_PORTS: Final = 128
LAST_REASON: Final = max(Shutdown)


Sleeper = Callable[[int | None], object]
"""Lets a vCPU wait inside of a hypercall until something happens, at most until then (machine time, ns)."""


class SchedOps:
    """The operations. In the vCPU's thread."""

    def __init__(
        self,
        channels: EventChannels,
        shared: SharedInfo,
        domid: int,
        now_ns: Callable[[], int],
        sleep: Sleeper,
        shutdown: Callable[[int], object],
    ) -> None:
        self._channels = channels
        self._shared = shared
        self._domid = domid
        self._now_ns = now_ns
        self._sleep = sleep
        self._shutdown = shutdown

    def __call__(self, call: Call) -> int:
        """The hypercall."""
        command, pointer = call.args[0] & 0xFFFF_FFFF, call.args[1]
        if command == Sched.YIELD:
            return 0
        if command == Sched.BLOCK:
            if not self._shared.upcall_pending(call.vcpu):
                self._sleep(None)
            return 0
        if command == Sched.POLL:
            return self._poll(call, pointer)
        if command == Sched.SHUTDOWN:
            return self._end(int.from_bytes(call.read(pointer, 4), "little"))
        if command == Sched.REMOTE_SHUTDOWN:
            domid, reason = struct.unpack("<H2xI", call.read(pointer, 8))
            if domid not in (DOMID_SELF, self._domid):
                raise HypercallError(Errno.ESRCH)
            return self._end(reason)
        if command == Sched.SHUTDOWN_CODE:
            reason = int.from_bytes(call.read(pointer, 4), "little")
            if reason > LAST_REASON:
                raise HypercallError(Errno.EINVAL)
            return 0
        raise HypercallError(Errno.ENOSYS)

    def _end(self, reason: int) -> int:
        if reason > LAST_REASON:
            raise HypercallError(Errno.EINVAL)
        if reason == Shutdown.SUSPEND:
            return 1  # there is nobody yet who would save the domain: cancelled, it goes on at once
        self._shutdown(reason)
        return 0

    def _poll(self, call: Call, pointer: int) -> int:
        ports, count, timeout = call.abi.poll.unpack(call.read(pointer, call.abi.poll.size))
        if count > MAXIMUM_PORTS:
            raise HypercallError(Errno.EINVAL)
        numbers = struct.unpack(f"<{count}I", call.read(ports, 4 * count)) if count else ()
        if any(not 0 < number < self._shared.abi.ports for number in numbers):
            raise HypercallError(Errno.EINVAL)
        if any(self._channels.pending(number) for number in numbers):
            return 0
        if timeout == 0 or timeout > self._now_ns():
            # Guests look again themselves: a poll may end for no reason.
            self._sleep(timeout or None)
        return 0
