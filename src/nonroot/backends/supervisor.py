"""The domain's end of its backend process: starts it, gives it devices, carries events, and replaces it when it dies.

A device that is served has its eventfds here, and its journal, its image's file and its link: nothing that matters lies
in the process alone. When it ends without having been asked, what it had mapped or was writing is found in the grant
table's marks, and another one attaches to the same rings: requests without a response are done again. The guest sees
a pause. A process that dies too often is not replaced: its devices are closed, with a sentence.
"""

import contextlib
import fcntl
import os
import select
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from nonroot.backends.data_path import SHARED_BYTES, TURN_OFFSET
from nonroot.backends.helper import Helper, start_helper
from nonroot.backends.message import LostError, message_pair, receive, send
from nonroot.backends.ring import Turn
from nonroot.errors import NonrootError
from nonroot.xen.sharing import Sharing

__all__ = ["MOST_DEATHS", "BackendProcess", "Served"]

MOST_DEATHS: Final = 5
"""In :data:`DEATH_SECONDS`; the next one is the last."""
DEATH_SECONDS: Final = 20.0
ANSWER_SECONDS: Final = 60.0
"""For one request. Stopping waits for the storage; a process that takes longer is ended, and replaced."""
CLOSE_SECONDS: Final = 5.0


class Served:
    """A device that the process serves, or will serve again."""

    def __init__(
        self,
        device: str,
        request: dict[str, Any],
        descriptors: Sequence[int],
        failed: Callable[[str], object],
        ports: int,
    ) -> None:
        """``request`` and ``descriptors``: see :mod:`nonroot.backends.process`; ``ports``: of the guest's, 1 or 2."""
        self.device, self.failed = device, failed
        self.request = {**request, "device": device}
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.notify_fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(ports)]
        self.journal = os.memfd_create("nonroot-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.journal, SHARED_BYTES)
        # The engine has a page of it mapped: the process cannot take that away.
        fcntl.fcntl(self.journal, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.lend(to_engine=False)
        self._descriptors = list(descriptors)
        self._lock = threading.Lock()
        self.notify: list[Callable[[], object]] = []
        """Raises the guest's events, one for each of ``notify_fds``."""

    @property
    def descriptors(self) -> list[int]:
        """For the process."""
        return [self.wake_fd, *self.notify_fds, self.journal, *self._descriptors]

    def wake(self) -> None:
        """The guest has something. Any thread; quick; nothing happens when the device is served no more."""
        with self._lock:
            if self.wake_fd >= 0:
                os.eventfd_write(self.wake_fd, 1)

    def lend(self, to_engine: bool) -> None:
        """Have the engine serve the rings, or else the process."""
        turn = Turn.ENGINE if to_engine else Turn.BACKEND
        os.pwrite(self.journal, turn.to_bytes(4, sys.byteorder), TURN_OFFSET)

    def close(self) -> None:
        """Served no more."""
        with self._lock:
            for fd in (self.wake_fd, *self.notify_fds, self.journal):
                os.close(fd)
            self.wake_fd, self.notify_fds = -1, []


class BackendProcess:
    """Methods: any thread."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self._lock = threading.RLock()
        self._served: dict[str, Served] = {}
        self._helper: Helper | None = None
        self._control: socket.socket | None = None
        self._poll: select.epoll | None = None
        self._deaths: deque[float] = deque()
        self._given_up = ""
        self._closing = False
        self._threads: list[threading.Thread] = []
        self.replaced = 0
        """How many times a process has taken over from a dead one."""

    @property
    def pid(self) -> int | None:
        """Of the process that serves now."""
        helper = self._helper
        return None if helper is None else helper.pid

    def prepare(self) -> None:
        """Start it meanwhile: it will be needed."""
        thread = threading.Thread(target=self._prepare, name="nonroot-backend-start", daemon=True)
        thread.start()

    def _prepare(self) -> None:
        with contextlib.suppress(NonrootError, OSError), self._lock:
            self._ensure()

    def serve(self, served: Served) -> str | None:
        """Begin to serve a device whose ports are bound. A sentence if that cannot be."""
        with self._lock:
            if self._given_up:
                return self._given_up
            try:
                self._ensure()
            except NonrootError as error:
                return str(error)
            self._served[served.device] = served
            refused = self._give(served)
            if refused is not None:
                self._forget(served)
            return refused

    def stop(self, served: Served) -> None:
        """Serve it no more; when this returns, the process uses nothing of it."""
        with self._lock:
            if self._served.get(served.device) is served:
                with contextlib.suppress(LostError):
                    self._ask({"op": "stop", "device": served.device})
                self._forget(served)
        served.close()

    def resized(self, served: Served) -> None:
        """Its image has another size."""
        with self._lock, contextlib.suppress(LostError):
            self._ask({"op": "resized", "device": served.device})

    def close(self) -> None:
        """The end. Safe to call again."""
        with self._lock:
            self._closing = True
            helper, self._helper = self._helper, None
            control, self._control = self._control, None
            if control is not None:
                control.close()
            threads, self._threads = self._threads, []
        if helper is not None:
            helper.close(CLOSE_SECONDS)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    # ── inside, with the lock held ──

    def _ensure(self) -> None:
        if self._helper is not None or self._closing:
            return
        control, their_control = message_pair()
        access, their_access = message_pair()
        memory = self._sharing.descriptors()
        work = {"memory": memory, "control": their_control.fileno(), "access": their_access.fileno()}
        with their_control, their_access:
            try:
                helper = start_helper(
                    "nonroot.backends.process", work, [*memory, their_control.fileno(), their_access.fileno()]
                )
            except BaseException:
                control.close()
                access.close()
                raise
            finally:
                for fd in memory:
                    os.close(fd)
        control.settimeout(ANSWER_SECONDS)
        self._helper, self._control = helper, control
        poll = self._poll = select.epoll()
        poll.register(access, select.EPOLLIN)
        thread = threading.Thread(
            target=self._carry, args=(helper, access, poll), name="nonroot-backend-events", daemon=True
        )
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [thread]
        thread.start()

    def _give(self, served: Served) -> str | None:
        """Have the process serve it; if it is lost, its replacement will be asked. What it refuses with."""
        assert self._poll is not None
        with contextlib.suppress(ValueError, FileExistsError):  # it has ended meanwhile; or it is known
            for fd in served.notify_fds:
                self._poll.register(fd, select.EPOLLIN)
        try:
            answer = self._ask(served.request, served.descriptors)
        except LostError:
            return None
        return answer.get("error")

    def _forget(self, served: Served) -> None:
        self._served.pop(served.device, None)
        if self._poll is not None and not self._poll.closed:
            for fd in served.notify_fds:
                with contextlib.suppress(OSError):
                    self._poll.unregister(fd)

    def _ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
        """One request. LostError; then the process is gone, or as good as that."""
        if self._control is None:
            raise LostError("there is no backend process")
        try:
            send(self._control, request, descriptors)
            return receive(self._control)[0]
        except LostError:
            if self._helper is not None:
                self._helper.process.kill()
            raise

    # ── the thread of one process ──

    def _carry(self, helper: Helper, access: socket.socket, poll: select.epoll) -> None:
        """Events to the guest, and answers to the process, until it ends."""
        with access, poll:
            with contextlib.suppress(LostError):
                while True:
                    for fd, _ in poll.poll():
                        if fd == access.fileno():
                            self._hear(access)
                        else:
                            self._notify(fd)
            helper.process.kill()  # if it only closed its socket
            helper.process.wait()
            self._ended(helper)

    def _hear(self, access: socket.socket) -> None:
        message, descriptors = receive(access)
        for fd in descriptors:
            os.close(fd)
        frames = message.get("frames", [])
        match message.get("op"):
            case "touch":
                self._sharing.touch(frames)
            case "keep":
                for gfn in frames:
                    self._sharing.keep(gfn)
            case "release":
                for gfn in frames:
                    self._sharing.release(gfn)
            case "failed":
                served = self._served.get(message["device"])
                if served is not None:
                    served.failed(message["reason"])
                return
        send(access, {})

    def _notify(self, fd: int) -> None:
        try:
            os.eventfd_read(fd)
        except OSError:
            return  # closed meanwhile, or read already
        for served in list(self._served.values()):
            for number, own in enumerate(served.notify_fds):
                if own == fd and number < len(served.notify):
                    served.notify[number]()

    def _ended(self, helper: Helper) -> None:
        """A process is gone. If that was not wanted, another takes over."""
        with self._lock:
            if self._closing or self._helper is not helper:
                return
            self._helper = None
            if self._control is not None:
                self._control.close()
                self._control = None
            self._sharing.died()
            now = time.monotonic()
            self._deaths.append(now)
            while now - self._deaths[0] > DEATH_SECONDS:
                self._deaths.popleft()
            if len(self._deaths) > MOST_DEATHS:
                self._give_up(f"the backend process has died {len(self._deaths)} times in {DEATH_SECONDS:.0f} seconds")
                return
            if not self._served:
                return  # another is started when it is needed
            try:
                self._ensure()
            except (NonrootError, OSError) as error:
                self._give_up(f"the backend process has died, and another cannot be started: {error}")
                return
            self.replaced += 1
            for served in list(self._served.values()):
                reason = self._give(served)
                if reason is not None:
                    served.failed(reason)

    def _give_up(self, reason: str) -> None:
        self._given_up = reason
        for served in list(self._served.values()):
            served.failed(reason)
