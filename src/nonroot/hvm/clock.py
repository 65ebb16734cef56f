"""Machine time. Devices see only these objects; none of them ticks."""

from collections.abc import Callable

from nonroot.hvm.device import TimedDevice

__all__ = ["MachineClock", "ManualClock", "earliest"]


class MachineClock:
    """The clock of a running machine: the engine's time, and a note that some device's deadline has changed."""

    __slots__ = ("dirty", "now_ns")

    def __init__(self, now_ns: Callable[[], int]) -> None:
        """``now_ns`` is the engine's clock, called directly."""
        self.now_ns = now_ns
        self.dirty = True

    def rearm(self) -> None:
        """A device's deadline has changed: the run loop asks for all of them again."""
        self.dirty = True


class ManualClock:
    """A clock that moves only when told; for tests of devices."""

    __slots__ = ("dirty", "time_ns")

    def __init__(self, time_ns: int = 0) -> None:
        self.time_ns = time_ns
        self.dirty = False

    def now_ns(self) -> int:
        """The time last set."""
        return self.time_ns

    def rearm(self) -> None:
        """A device's deadline has changed."""
        self.dirty = True

    def run(self, device: TimedDevice, duration_ns: int) -> None:
        """Let ``duration_ns`` pass for one device, stopping at each of its deadlines as the run loop does."""
        end = self.time_ns + duration_ns
        while (deadline := device.deadline()) is not None and deadline <= end:
            self.time_ns = max(self.time_ns, deadline)
            device.advance(self.time_ns)
        self.time_ns = end
        device.advance(end)


def earliest(devices: tuple[TimedDevice, ...]) -> int | None:
    """The next deadline of all devices (ns); None if nothing is due ever."""
    deadline: int | None = None
    for device in devices:
        candidate = device.deadline()
        if candidate is not None and (deadline is None or candidate < deadline):
            deadline = candidate
    return deadline
