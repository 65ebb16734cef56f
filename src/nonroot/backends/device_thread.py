"""The thread of one connected device: it sleeps until the guest or the device's descriptors have something to do."""

import contextlib
import os
import select
import threading
from collections.abc import Callable

from nonroot.backends.link import LinkClosedError
from nonroot.backends.message import LostError
from nonroot.backends.ring import RingError

__all__ = ["DeviceThread"]


class DeviceThread:
    """Calls ``step()`` whenever it may find work. Idle, it costs nothing."""

    def __init__(
        self,
        name: str,
        step: Callable[[], bool],
        interest: Callable[[], list[tuple[int, int]]] = list,
        failed: Callable[[str], object] = lambda _: None,
        wake: int | None = None,
    ) -> None:
        """
        ``step`` returns whether there is more to do at once; ``interest`` tells descriptors and events for poll(2);
        ``failed`` is called in this thread with the reason, after which it ends. ``wake``: the eventfd to sleep on,
        the thread's from now on; without one it makes its own.
        """
        self._step, self._interest, self._failed = step, interest, failed
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if wake is None else wake
        self._stopping = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"nonroot-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """There may be work. Any thread; quick; nothing happens when it has been stopped."""
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End after the step that is being done. Safe to call again, and if it was never started."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    def _run(self) -> None:
        wake = self._wake
        more = True
        known: list[tuple[int, int]] | None = None
        poller = select.poll()
        try:
            while not self._stopping:
                interest = self._interest()
                if interest != known:
                    known = interest
                    poller = select.poll()
                    for fd, events in ((wake, select.POLLIN), *interest):
                        poller.register(fd, events)
                if any(fd == wake for fd, _ in poller.poll(0 if more else None)):
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(wake)
                if not self._stopping:
                    more = self._step()
        except (RingError, LinkClosedError, LostError) as error:
            self._failed(str(error))
