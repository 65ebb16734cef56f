"""How a client starts a domain's process: as a program of its own, or out of a template that has everything loaded."""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, ClassVar, Final, Protocol

from nonroot import programs
from nonroot.domain import host

__all__ = ["Child", "EarlyChild", "Template"]

TEMPLATE: Final = "from nonroot.domain.template import main; main({})"
MAX_REQUEST: Final = 1 << 16
"""Bytes of a request to a template; a larger environment needs a program of its own."""


class Child(Protocol):
    """A domain's process, as its client sees it."""

    @property
    def pid(self) -> int:
        """Its number."""

    def poll(self) -> int | None:
        """How it ended: its exit status, or minus a signal's number; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """The same, when it has ended. subprocess.TimeoutExpired."""

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it still runs."""


class _OwnChild:
    """A :class:`Child` that is no :class:`subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def _ended(self, timeout: float | None) -> int | None:
        """How it ended; None if it has not within ``timeout`` seconds. Not asked again when it has."""
        raise NotImplementedError

    def poll(self) -> int | None:
        """How it ended."""
        if self._status is None:
            self._status = self._ended(0)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, when it has."""
        if self._status is None:
            self._status = self._ended(timeout)
        if self._status is None:
            raise subprocess.TimeoutExpired("a domain's process", timeout or 0.0)
        return self._status

    def send_signal(self, sig: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)


class EarlyChild(_OwnChild):
    """A process that :mod:`nonroot.domain.early` has started."""

    def __init__(self, pid: int) -> None:
        super().__init__(pid)
        self._lock = threading.Lock()

    def _ended(self, timeout: float | None) -> int | None:
        if timeout != 0 and self.poll() is None:
            watched = os.pidfd_open(self.pid)
            try:
                select.select([watched], [], [], timeout)
            finally:
                os.close(watched)
        with self._lock:
            if self._status is None:  # otherwise another thread has asked meanwhile
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if ended else None
            return self._status


class Template:
    """
    The template of this process, started when it is first asked for. All methods from any thread.

    See :mod:`nonroot.domain.template`.
    """

    _shared: ClassVar["Template | None"] = None
    _domains: ClassVar[int] = 0
    _shared_lock = threading.Lock()

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._next = 1
        self._started: dict[int, tuple[int, int]] = {}  # request: (process, error number)
        self._ended: dict[int, int] = {}
        self._watched: set[int] = set()
        self._gone = False
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        ready = threading.Event()
        threading.Thread(target=self._serve, args=(theirs, ready), name="nonroot-template", daemon=True).start()
        ready.wait()

    @classmethod
    def shared(cls) -> "Template":
        """The one of this process."""
        with cls._shared_lock:
            found = cls._shared
            if found is None or not found.usable:
                found = cls._shared = cls()
            return found

    @classmethod
    def for_another(cls) -> "Template | None":
        """The one of this process, from its second domain on: most make only one, for which it would be a detour."""
        with cls._shared_lock:
            is_first, cls._domains = cls._domains == 0 and cls._shared is None, cls._domains + 1
        return None if is_first else cls.shared()

    @property
    def usable(self) -> bool:
        """Whether it runs, and is ours: not that of a process that we are a fork of."""
        return not self._gone and self._owner == os.getpid()

    def start(self, control: socket.socket, output: int) -> Child | None:
        """A new process for a domain. None if it cannot be had this way. OSError if the host has none."""
        with self._lock:
            number, self._next = self._next, self._next + 1
        packet = json.dumps({"start": number, "environment": programs.environment()}).encode()
        if len(packet) > MAX_REQUEST or self._gone:
            return None
        try:
            # Once it has been closed, its number is nobody's: sending fails.
            socket.send_fds(self._ours, [packet], [control.fileno(), output])
        except OSError:
            return None
        with self._changed:
            self._changed.wait_for(lambda: number in self._started or self._gone)
            if number not in self._started:
                return None
            pid, error = self._started.pop(number)
        if error:
            raise OSError(error, os.strerror(error))
        return TemplateChild(self, pid)

    def ended(self, pid: int, timeout: float | None = None) -> int | None:
        """How a process ended; None if it has not within ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._ended or self._gone, timeout)
            # With a template that has gone, its processes have gone too: the kernel kills them.
            return self._ended.get(pid, -signal.SIGKILL if self._gone else None)

    def forget(self, pid: int) -> None:
        """Nobody will ask for this process any more."""
        with self._lock:
            self._ended.pop(pid, None)
            self._watched.discard(pid)

    def _serve(self, theirs: socket.socket, ready: threading.Event) -> None:
        # The kernel watches the thread that starts a process: this one lives as long as we do.
        try:
            program = [sys.executable, "-P", "-c", TEMPLATE.format(theirs.fileno())]
            self._process = programs.start(program, stdout=subprocess.DEVNULL, fds=[theirs.fileno()])
        except OSError:
            self._gone = True
        finally:
            theirs.close()
            ready.set()
        host.leave_signals_to_others()
        while not self._gone:
            try:
                packet = self._ours.recv(MAX_REQUEST)
            except OSError:
                packet = b""
            with self._changed:
                if packet:
                    self._take(json.loads(packet))
                else:
                    self._gone = True
                self._changed.notify_all()
        with self._lock:
            self._ours.close()
        if self._process is not None:
            self._process.wait()

    def _take(self, record: dict[str, Any]) -> None:
        if "started" in record:
            pid = int(record.get("pid", 0))
            self._started[record["started"]] = pid, int(record.get("errno", 0 if pid else errno.EAGAIN))
            self._watched.add(pid)
        elif record["ended"] in self._watched:
            self._ended[record["ended"]] = int(record["status"])


class TemplateChild(_OwnChild):
    """A process that a template made."""

    def __init__(self, template: Template, pid: int) -> None:
        super().__init__(pid)
        self._template = template

    def _ended(self, timeout: float | None) -> int | None:
        return self._template.ended(self.pid, timeout)

    def __del__(self) -> None:
        self._template.forget(self.pid)
