"""Commands in a guest, as a client runs them: their streams, signals and ends."""

import contextlib
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from nonroot.domain import host
from nonroot.domain.client import DomainClient, Pending
from nonroot.domain.wire import Kind
from nonroot.errors import BadOptionError, CommandTimeoutError, NonrootError, OutputLimitError, UnsupportedError

__all__ = ["Command", "Completed", "outcome", "shell_status"]

Input = bytes | str | IO[bytes] | int | None
STDIN_STEP = 64 * 1024


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended."""

    args: list[str]
    returncode: int
    """Its exit status; -n if signal n killed it; 126 or 127 if it could not be executed or found."""
    stdout_bytes: bytes
    stderr_bytes: bytes
    how: str
    """``exited``, ``signalled``, ``not_executable`` or ``not_found``."""
    seconds: float
    """Wall time from its start to its end."""

    @property
    def stdout(self) -> str:
        """Its standard output as UTF-8; bytes that are none become surrogate escapes, so nothing is lost."""
        return self.stdout_bytes.decode("utf-8", "surrogateescape")

    @property
    def stderr(self) -> str:
        """Its standard error output, as :attr:`stdout`."""
        return self.stderr_bytes.decode("utf-8", "surrogateescape")


def outcome(report: dict[str, Any], argv: list[str], cwd: str) -> tuple[int, str]:
    """(returncode, how) of an exit report. BadOptionError or UnsupportedError if the command never got so far."""
    kind, value = report.get("kind"), int(report.get("value", 0))
    if kind == "exited":
        return value, "exited"
    if kind == "signalled":
        return -value, "signalled"
    reason = os.strerror(value).lower()
    if kind == "exec_failed":
        return (127, "not_found") if value in (2, 20) else (126, "not_executable")
    if kind == "chdir_failed":
        raise BadOptionError(f"the guest cannot enter the directory {cwd}: {reason}")
    raise UnsupportedError(f"the guest cannot start {argv[0]}: {reason}")


def shell_status(returncode: int) -> int:
    """The status as shells show it: 128 + n for a command that signal n killed."""
    return returncode if returncode >= 0 else 128 - returncode


class Command:
    """One command under way. :meth:`wait` for its end; until then no other can run in the domain."""

    def __init__(
        self,
        client: DomainClient,
        argv: list[str],
        params: dict[str, Any],
        stdin: Input,
        on_output: Callable[[Kind, bytes], None] | None,
        max_output: int,
        ended: Callable[[], None],
    ) -> None:
        """``on_output`` gets output as it comes; without it, it is collected, ``max_output`` bytes at most."""
        self.args = argv
        self._client = client
        self._cwd = str(params.get("cwd") or "/")
        self._on_output = on_output
        self._max_output = max_output
        self._collected = {Kind.STDOUT: bytearray(), Kind.STDERR: bytearray()}
        self._too_much = False
        self._ended = ended
        self._finished = threading.Event()
        self._began = time.monotonic()
        self._feeder: threading.Thread | None = None
        try:
            self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC)
        except OSError:
            ended()
            raise
        client.on_stream = self._stream
        client.forget_credit()
        try:
            self._pending: Pending = client.submit("run", {**params, "argv": argv, "stdin": stdin is not None})
            if stdin is not None:
                self._feeder = threading.Thread(target=self._feed, args=(stdin,), name="nonroot-stdin", daemon=True)
                self._feeder.start()
        except BaseException:
            self._end()
            raise

    @property
    def stdout_bytes(self) -> bytes:
        """Standard output collected so far."""
        return bytes(self._collected[Kind.STDOUT])

    @property
    def stderr_bytes(self) -> bytes:
        """Standard error output collected so far."""
        return bytes(self._collected[Kind.STDERR])

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's whole process group; if it has ended, nothing happens."""
        if not self._finished.is_set():
            self._client.request("signal", 10, number=int(number))

    def kill(self) -> None:
        """SIGKILL for the command's process group."""
        self.send_signal(signal.SIGKILL)

    def resize(self, rows: int, cols: int) -> None:
        """The size of its terminal, if it has one."""
        if not self._finished.is_set():
            self._client.request("window_size", 10, rows=rows, cols=cols)

    def done(self) -> bool:
        """Whether it has ended."""
        return self._pending.done()

    def wait(self, timeout: float | None = None) -> Completed:
        """Wait for its end.

        CommandTimeoutError after ``timeout`` seconds (the command is killed); OutputLimitError if it wrote too much.
        """
        try:
            report = self._pending.wait(timeout)
        except TimeoutError:
            self._stop()
            error = CommandTimeoutError(f"{self.args[0]} did not end within {timeout:g} seconds and was killed")
            error.stdout, error.stderr = self.stdout_bytes, self.stderr_bytes
            raise error from None
        except NonrootError:
            self._end()
            raise
        except BaseException:
            self._stop()
            raise
        self._end()
        if self._too_much:
            raise OutputLimitError(f"{self.args[0]} wrote more than {self._max_output} bytes and was killed")
        returncode, how = outcome(report, self.args, self._cwd)
        seconds = time.monotonic() - self._began
        return Completed(self.args, returncode, self.stdout_bytes, self.stderr_bytes, how, seconds)

    # ── inside ──

    def _stream(self, kind: Kind, data: bytes) -> None:
        if self._on_output is not None:
            self._on_output(kind, data)
            return
        if kind not in self._collected or self._too_much:
            return
        if sum(map(len, self._collected.values())) + len(data) > self._max_output:
            self._too_much = True
            self._client.submit("signal", {"number": int(signal.SIGKILL)})
            return
        self._collected[kind] += data

    def _stop(self) -> None:
        with contextlib.suppress(NonrootError, TimeoutError):
            self.kill()
            self._pending.wait(5)
        self._end()

    def _end(self) -> None:
        if self._finished.is_set():
            return
        self._finished.set()
        self._client.on_stream = None
        self._client.wake_senders()
        os.write(self._wake_write, b"x")
        if self._feeder is not None and self._feeder is not threading.current_thread():
            self._feeder.join(1)
        if self._feeder is None or not self._feeder.is_alive():
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._ended()

    def _feed(self, source: bytes | str | IO[bytes] | int) -> None:
        """The thread that sends stdin on; it never reads ahead of what the guest takes by more than the credit."""
        host.leave_signals_to_others()
        with contextlib.suppress(NonrootError, OSError, ValueError):
            if isinstance(source, str):
                source = source.encode("utf-8", "surrogateescape")
            if isinstance(source, bytes):
                for at in range(0, len(source), STDIN_STEP):
                    if not self._send(source[at : at + STDIN_STEP]):
                        return
            elif isinstance(source, int):
                self._feed_descriptor(source)
            else:
                while piece := source.read(STDIN_STEP):
                    if not self._send(piece):
                        return
            if not self._finished.is_set():
                self._client.submit("end_of_input")

    def _feed_descriptor(self, fd: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ)
            try:
                selector.register(fd, selectors.EVENT_READ)
                pollable = True
            except PermissionError:  # a regular file is always readable
                pollable = False
            while not self._finished.is_set():
                if pollable and any(key.fd == self._wake_read for key, _ in selector.select()):
                    return
                piece = os.read(fd, STDIN_STEP)
                if not piece or not self._send(piece):
                    return

    def _send(self, piece: bytes) -> bool:
        return self._client.send_within_credit(Kind.STDIN, piece, self._finished.is_set)
