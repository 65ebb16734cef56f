"""The client's end of a domain's control socket, and the start of the domain's process.

A reader thread takes everything that the domain sends: replies wake whoever asked, streams and events go to callbacks
(in that thread; a callback that blocks stops the domain's output, which is the back-pressure). That thread also starts
the process, so that the kernel's parent-death signal works whichever thread of the caller made the domain.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nonroot import programs
from nonroot.domain import early, host
from nonroot.domain.child import Child, EarlyChild, Template
from nonroot.domain.wire import VERSION, Kind, Message, WireDecoder, WireError, pack, pack_json
from nonroot.errors import DomainLostError, InternalError, NonrootError, TransientError, error_from_wire

__all__ = ["PROGRAM", "DomainClient", "Pending"]

PROGRAM = list(early.PROGRAM)
"""What is run as a domain's process."""


class Pending:
    """The reply to come of one request."""

    def __init__(self, client: "DomainClient", number: int) -> None:
        self.number = number
        self.fds: list[int] = []
        self._client = client
        self._done = threading.Event()
        self._result: dict[str, Any] | None = None
        self._error: NonrootError | None = None

    def done(self) -> bool:
        """Whether the reply is there."""
        return self._done.is_set()

    def wait(self, timeout: float | None = None) -> dict[str, Any]:
        """The result; raises the error that came instead. TimeoutError after ``timeout`` seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def settle(self, result: dict[str, Any] | None, error: NonrootError | None) -> None:
        """Called by the reader."""
        self._result, self._error = result, error
        self._done.set()


class DomainClient:
    """One connection to one domain process, started by :meth:`spawn`."""

    def __init__(self, program: Sequence[str] | None = None) -> None:
        """``program``: what to run as the domain's process, instead of ours."""
        self._program = list(program or PROGRAM)
        self.on_event: Callable[[dict[str, Any]], None] = lambda record: None
        self.on_console: Callable[[bytes], None] = lambda data: None
        self.on_stream: Callable[[Kind, bytes], None] | None = None
        self.on_lost: Callable[[NonrootError], None] = lambda error: None
        self.pid = 0
        self._credit = 0
        self._credit_changed = threading.Condition()
        self._lock = threading.Lock()
        self._pending: dict[int, Pending] = {}
        self._next = 1
        self._closing = False
        self._lost: NonrootError | None = None
        self._socket: socket.socket | None = None
        self._process: Child | None = None
        self._trace_fd = -1
        self._thread: threading.Thread | None = None

    # ── start and end ──

    @classmethod
    def started_early(cls) -> "DomainClient | None":
        """The client of the process that :func:`nonroot.domain.early.start` has started, once."""
        started = early.started()
        if started is None:
            return None
        client = cls()
        client._socket, client._trace_fd, client.pid = started.control, started.output, started.pid
        client._process = EarlyChild(started.pid)
        client._thread = threading.Thread(target=client._read_only, name="nonroot-client", daemon=True)
        client._thread.start()
        return client

    @classmethod
    def forget_early(cls) -> None:
        """No domain was made after all."""
        client = cls.started_early()
        if client is not None:
            client.kill()
            client.close()

    def spawn(self) -> None:
        """Start a domain's process. TransientError if the host has no process or memory for it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket = ours
        self._trace_fd = os.memfd_create("nonroot-domain-stderr", os.MFD_CLOEXEC)
        started = threading.Event()
        failure: list[OSError] = []
        self._thread = threading.Thread(
            target=self._read, args=(theirs, started, failure), name="nonroot-client", daemon=True
        )
        self._thread.start()
        started.wait()
        if failure:
            self.close()
            raise TransientError(f"the domain's process cannot be started: {failure[0].strerror or failure[0]}")

    def connect(self, path: str | os.PathLike[str]) -> None:
        """Connect to a running domain's socket, instead of starting one. DomainLostError if nobody answers there."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            sock.close()
            raise DomainLostError(f"the domain does not answer: {(error.strerror or str(error)).lower()}") from None
        self._socket = sock
        self._thread = threading.Thread(target=self._read_only, name="nonroot-client", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the domain, at once if it does not end by itself, and forget it. Safe to call again."""
        if self._closing:
            return
        self._closing = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._process is not None:
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self.kill()
                self._process.wait()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        if self._socket is not None:
            self._socket.close()
        if self._trace_fd >= 0:
            os.close(self._trace_fd)
            self._trace_fd = -1

    def kill(self) -> None:
        """End the domain's process without asking it; there is nothing on disk that it could leave behind."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    @property
    def alive(self) -> bool:
        """Whether the domain's process still answers."""
        return self._lost is None and not self._closing

    # ── requests ──

    def submit(
        self, method: str, params: dict[str, Any] | None = None, blob: bytes = b"", fds: Sequence[int] = ()
    ) -> Pending:
        """Send a request; ``fds`` are copied to the domain. DomainLostError if the process has gone."""
        with self._lock:
            pending = Pending(self, self._next)
            self._next += 1
            self._pending[pending.number] = pending
        try:
            record = {"id": pending.number, "method": method, "params": params or {}}
            self._send(pack_json(record, blob), fds)
        except NonrootError:
            self._pending.pop(pending.number, None)
            raise
        return pending

    def request(self, method: str, timeout: float | None = None, blob: bytes = b"", **params: Any) -> dict[str, Any]:
        """Send a request and wait for its result. TimeoutError after ``timeout`` seconds."""
        return self.submit(method, params, blob).wait(timeout)

    def send(self, kind: Kind, body: bytes) -> None:
        """Send a stream message."""
        self._send(pack(kind, body))

    def send_within_credit(self, kind: Kind, data: bytes, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Send stdin or files as the domain takes them; false if ``give_up`` became true or the domain went."""
        size = max(len(data), 1)
        with self._credit_changed:
            while self._credit < size:
                if self._lost is not None or give_up():
                    return False
                self._credit_changed.wait(0.2)
            self._credit -= len(data)
        self.send(kind, data)
        return True

    def forget_credit(self) -> None:
        """A new operation starts with what the domain grants it."""
        with self._credit_changed:
            self._credit = 0

    def wake_senders(self) -> None:
        """Let :meth:`send_within_credit` look at ``give_up`` now."""
        with self._credit_changed:
            self._credit_changed.notify_all()

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        if self._socket is None or self._lost is not None or self._closing:
            raise self._lost or DomainLostError("the domain has ended")
        try:
            with self._lock:
                sent = socket.send_fds(self._socket, [data], list(fds)) if fds else 0
                self._socket.sendall(memoryview(data)[sent:])
        except OSError:
            raise self._lost_error() from None

    # ── the reader thread ──

    def _read(self, theirs: socket.socket, started: threading.Event, failure: list[OSError]) -> None:
        try:
            self._start_process(theirs)
        except OSError as error:
            failure.append(error)
            started.set()
            return
        finally:
            theirs.close()
        started.set()
        self._read_only()
        if self._process is not None:
            # The process dies with this thread; it shall have the time to leave the list of running domains.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)

    def _read_only(self) -> None:
        host.leave_signals_to_others()
        try:
            reason = self._receive()
        except Exception as unexpected:  # a defect here must not leave callers waiting for ever
            reason = InternalError(f"the domain's client failed: {unexpected!r}")
        self._fail_all(reason)

    def _start_process(self, theirs: socket.socket) -> None:
        child: Child | None = None
        if self._program == early.PROGRAM:
            template = Template.for_another()
            child = None if template is None else template.start(theirs, self._trace_fd)
        if child is None:
            program = [*self._program, "--control-fd", str(theirs.fileno())]
            child = programs.start(program, stdout=self._trace_fd, stderr=self._trace_fd, fds=[theirs.fileno()])
        self._process = child
        self.pid = self._process.pid

    def _receive(self) -> NonrootError:
        decoder = WireDecoder()
        sock = self._socket
        assert sock is not None
        fds: list[int] = []
        while True:
            try:
                data, received, _, _ = socket.recv_fds(sock, 1 << 18, 16)
            except OSError:
                data, received = b"", []
            fds += received
            if not data:
                for fd in fds:
                    os.close(fd)
                return self._lost_error()
            try:
                for message in decoder.feed(data):
                    self._dispatch(message, fds)
            except WireError as error:
                return InternalError(f"the domain's process speaks nonsense: {error}")

    def _dispatch(self, message: Message, fds: list[int]) -> None:
        if message.kind == Kind.CONSOLE:
            self.on_console(message.body)
        elif message.kind == Kind.CREDIT:
            with self._credit_changed:
                self._credit += struct.unpack("<I", message.body)[0]
                self._credit_changed.notify_all()
        elif message.kind != Kind.JSON:
            if self.on_stream is not None:
                self.on_stream(message.kind, message.body)
        elif "id" in message.record:
            pending = self._pending.pop(message.record["id"], None)
            count = message.record.get("fds", 0)
            mine, fds[:] = fds[:count], fds[count:]
            if pending is None:
                for fd in mine:
                    os.close(fd)
            elif "error" in message.record:
                pending.settle(None, error_from_wire(message.record["error"]))
            else:
                pending.fds = mine
                pending.settle(message.record.get("result", {}), None)
        else:
            self.on_event(message.record)

    def _lost_error(self) -> NonrootError:
        if self._closing or self._process is None:
            return DomainLostError("the domain has ended")
        deadline = time.monotonic() + 2
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        status = self._process.poll()
        trace = self._trace()
        if status is not None and status < 0:
            name = signal.Signals(-status).name if -status in signal.valid_signals() else f"signal {-status}"
            if name == "SIGKILL":
                return DomainLostError("the domain's process was killed, perhaps because the host ran out of memory")
            if name in ("SIGTERM", "SIGINT", "SIGHUP"):
                return DomainLostError(f"the domain's process was ended from outside ({name})")
            return InternalError(f"the domain's process crashed ({name})", trace=trace)
        if trace:
            return InternalError("the domain's process failed: " + trace.strip().splitlines()[-1][:300], trace=trace)
        return DomainLostError("the domain's process has ended")

    def _trace(self) -> str:
        if self._trace_fd < 0:
            return ""
        size = os.fstat(self._trace_fd).st_size
        return os.pread(self._trace_fd, 16384, max(0, size - 16384)).decode("utf-8", "replace")

    def _fail_all(self, error: NonrootError) -> None:
        self._lost = error
        with self._lock:
            pending = list(self._pending.values())
            self._pending.clear()
        for one in pending:
            one.settle(None, error)
        self.wake_senders()
        if not self._closing:
            self.on_lost(error)


def check_version(record: dict[str, Any]) -> None:
    """InternalError if the domain's process is of another version than this client."""
    if record.get("version") != VERSION:
        raise InternalError(f"the domain's process speaks version {json.dumps(record.get('version'))}, not {VERSION}")
