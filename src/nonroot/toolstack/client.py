"""The toolstack's client: requests to domain zero, which is started if it does not run."""

import contextlib
import fcntl
import json
import os
import select
import socket
import sys
import time
from types import TracebackType
from typing import Any, Final, Self

from nonroot import programs
from nonroot.domain import registry
from nonroot.errors import TransientError, WaitTimeoutError, error_from_wire
from nonroot.toolstack import place

__all__ = ["IDLE_VARIABLE", "Toolstack"]

IDLE_VARIABLE: Final = "NONROOT_DOM0_IDLE"
"""Seconds after which a domain zero that is started ends, when it has nothing to do."""
START_SECONDS: Final = 30.0
REPLY_SECONDS: Final = 330.0


class Toolstack:
    """A connection to domain zero. Not for several threads at once."""

    def __init__(self) -> None:
        """Connect, and start domain zero if need be. TransientError if that is not possible."""
        self._socket, self._buffer, self._next = socket.socket(), b"", 1
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self._connect():
                with contextlib.suppress(TransientError):
                    self.request("hello")
                    return
            if time.monotonic() > deadline:
                raise TransientError(f"domain zero does not answer; {place.log_path()} may say why")
            _start()

    @staticmethod
    def nothing_runs() -> bool:
        """Whether neither a domain runs nor domain zero, which may be about to start one."""
        return not registry.entries() and not place.socket_path().exists()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. The domains go on."""
        self._socket.close()

    def hang_up(self) -> None:
        """End a request that another thread waits for, with a TransientError there."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> bool:
        self._socket.close()
        self._socket, self._buffer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), b""
        try:
            self._socket.connect(os.fspath(place.socket_path()))
        except OSError:
            return False
        return True

    def request(self, method: str, timeout: float | None = REPLY_SECONDS, **params: Any) -> dict[str, Any]:
        """The result; raises the error that came instead. WaitTimeoutError, TransientError if domain zero ends."""
        number, self._next = self._next, self._next + 1
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            data = json.dumps({"id": number, "method": method, "params": params}).encode() + b"\n"
            self._socket.settimeout(timeout)
            self._socket.sendall(data)
            while True:
                line, newline, rest = self._buffer.partition(b"\n")
                if newline:
                    self._buffer = rest
                    record = json.loads(line)
                    if record.get("id") != number:
                        continue  # the answer to something that was given up
                    if "error" in record:
                        raise error_from_wire(record["error"])
                    result: dict[str, Any] = record["result"]
                    return result
                if deadline is not None:
                    self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
                more = self._socket.recv(1 << 16)
                if not more:
                    raise TransientError("domain zero has ended; the domains have not: try again")
                self._buffer += more
        except TimeoutError:
            raise WaitTimeoutError(f"domain zero did not answer in {timeout:g} seconds") from None
        except OSError as error:
            raise TransientError(f"domain zero cannot be reached: {error.strerror or error}") from None


def _start() -> None:
    """Start domain zero, if nobody else does at this moment."""
    with (place.folder() / "start").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with probe, contextlib.suppress(OSError):
            probe.connect(os.fspath(place.socket_path()))
            return
        log = place.log_path()
        if log.exists() and log.stat().st_size > 1 << 20:
            log.unlink()
        ready, theirs = os.pipe()
        command = [sys.executable, "-P", "-m", "nonroot.toolstack", "--ready-fd", str(theirs)]
        idle = os.environ.get(IDLE_VARIABLE, "")
        if idle.replace(".", "", 1).isdigit():
            command += ["--idle", idle]
        try:
            with log.open("ab") as messages:
                process = programs.start(command, stdout=messages, stderr=messages, fds=[theirs])
        except OSError as error:
            raise TransientError(f"domain zero cannot be started: {error.strerror or error}") from None
        finally:
            os.close(theirs)
        try:
            select.select([ready], [], [], START_SECONDS)
            served = os.read(ready, 1) if select.select([ready], [], [], 0)[0] else b""
        finally:
            os.close(ready)
        if not served:
            status = process.poll()
            if status not in (None, 0, 3):
                lines = log.read_text(errors="replace").strip().splitlines()
                raise TransientError(f"domain zero does not start: {lines[-1] if lines else status}")
            time.sleep(0.05)
        process.returncode = 0  # it is nobody's child to wait for: it outlives us
