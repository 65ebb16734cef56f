"""Signals of the command line: passed on to the guest's command at first, the end of the domain at the second.

A handler of Python's runs wherever the main thread is, so it does next to nothing: before the command runs it raises
:class:`InterruptedBySignal` there; afterwards it hands the signal to a thread that may take locks.

Python only notes a signal and runs the handler later, in the main thread. One that comes just before that thread goes
to sleep on a lock does not end the sleep, and would wait as long as the lock does. Python's wake-up descriptor tells a
thread of its own of each signal; that thread then pokes the main thread, which ends the sleep.
"""

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from nonroot.domain import host

__all__ = ["InterruptedBySignal", "SignalRelay"]

FATAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
POKE = signal.SIGURG
"""Means nothing to anybody here; a call that it interrupts goes on."""
POKES = (0.02, 0.1, 0.5)
"""Seconds to wait before each poke: the first could come too early as well."""


class InterruptedBySignal(BaseException):
    """Raised in the main thread; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SignalRelay:
    """Context manager that owns the fatal signals and SIGWINCH while a domain lives."""

    def __init__(self, kill: Callable[[], None]) -> None:
        """``kill`` ends the domain without asking it; it must be safe to call at any time."""
        self.killed_by = 0
        """The signal that ended the domain."""
        self._kill = kill
        self._forward: Callable[[int], None] | None = None
        self._resize: Callable[[], None] | None = None
        self._seen = 0
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._old: dict[int, Any] = {}
        self._thread: threading.Thread | None = None
        self._poker: threading.Thread | None = None
        self._over = threading.Event()
        self._wake_write = self._old_wake = -1

    def __enter__(self) -> "SignalRelay":
        read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._wake_write, False)  # Python asks for it
        self._old_wake = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._old[POKE] = signal.signal(POKE, lambda number, frame: None)
        main = threading.get_ident()
        self._poker = threading.Thread(target=self._poke, args=(read, main), name="nonroot-poke", daemon=True)
        self._poker.start()
        for number in (*FATAL, signal.SIGWINCH):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wake)
        os.close(self._wake_write)
        self._over.set()
        if self._poker is not None:
            self._poker.join()
        for number, old in self._old.items():
            signal.signal(number, old)
        if self._thread is not None:
            self._queue.put(0)
            self._thread.join(2)

    def forward_to(self, forward: Callable[[int], None] | None, resize: Callable[[], None] | None = None) -> None:
        """From now on (or no longer, if None) the first fatal signal goes to ``forward``.

        ``resize`` is called now and then: the terminal may have changed between somebody's look at it and this.
        """
        self._forward, self._resize = forward, resize
        if resize is not None:
            self._queue.put(signal.SIGWINCH)
        if self._thread is None and (forward or resize):
            self._thread = threading.Thread(target=self._relay, name="nonroot-signals", daemon=True)
            self._thread.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGWINCH:
            if self._resize is not None:
                self._queue.put(number)
            return
        self._seen += 1
        if self._forward is not None and self._seen == 1 and number != signal.SIGHUP:
            self._queue.put(number)
            return
        first = not self.killed_by
        self.killed_by = number
        if self._forward is None and first:
            raise InterruptedBySignal(number)
        self._kill()

    def _poke(self, read: int, main: int) -> None:
        host.leave_signals_to_others()
        while numbers := os.read(read, 256):
            if any(number != POKE for number in numbers):
                for seconds in POKES:
                    if not self._over.wait(seconds):
                        signal.pthread_kill(main, POKE)
        os.close(read)

    def _relay(self) -> None:
        host.leave_signals_to_others()
        while number := self._queue.get():
            with contextlib.suppress(Exception):  # the domain may be gone already; the main thread says so
                if number == signal.SIGWINCH:
                    if self._resize is not None:
                        self._resize()
                elif self._forward is not None:
                    self._forward(number)
