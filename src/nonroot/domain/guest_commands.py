"""Commands in a domain's guest, files to and from it, and a shell on its console: the part of the public class."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nonroot.domain.client import DomainClient
from nonroot.domain.command import Command, Completed, Input
from nonroot.domain.files import TreeWriter, read_tree
from nonroot.domain.frames import Entry
from nonroot.domain.wire import Kind
from nonroot.errors import BadOptionError, CommandFailedError, NonrootError, NotRunningError

__all__ = ["RunsCommands"]

DEFAULT_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "TERM": "dumb",
}
"""What commands in the guest find in their environment, before the caller's own additions."""

MAX_OUTPUT = 256 << 20
MAX_FILES = 4 << 30


class RunsCommands:
    """What a domain's public class offers of its guest's agent; see :class:`nonroot.Domain`."""

    _client: DomainClient
    _operation: threading.Lock
    """Held while a command or a copy is under way."""

    def wait_ready(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait until commands can run."""
        raise NotImplementedError

    def _request(self, method: str, **params: Any) -> dict[str, Any]:
        raise NotImplementedError

    # ── commands ──

    def run(
        self,
        cmd: str | Sequence[str | os.PathLike[str]],
        stdin: Input = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        timeout: float | None = None,
        *,
        check: bool = False,
        copy_in: Iterable[tuple[str | os.PathLike[str], str]] = (),
        copy_out: Iterable[tuple[str, str | os.PathLike[str]]] = (),
        max_output: int = MAX_OUTPUT,
    ) -> Completed:
        """Run a command in the guest and wait for its end. One domain runs any number of commands, one after the other.

        :param cmd: program and arguments; a single text is run by the guest's ``/bin/sh``.
        :param stdin: bytes, text, a binary file or a file descriptor; without it the command's stdin is empty.
        :param env: added to the guest's small environment (PATH, HOME, TERM).
        :param cwd: the directory to run in; ``/`` without it.
        :param timeout: seconds for the command, not counting the boot.
        :param check: raise CommandFailedError if the status is not 0.
        :param copy_in: (host path, guest path) pairs to copy before, as ``cp -r`` does.
        :param copy_out: (guest path, host path) pairs to copy after it has ended, whatever its status.
        :param max_output: bytes of output; OutputLimitError beyond.
        :raises CommandTimeoutError: it did not end in time; its output so far is in the error.
        :raises DomainStoppedError: the guest powered off, rebooted or crashed before.
        """
        for source, destination in copy_in:
            self.copy_in(source, destination)
        completed = self.popen(cmd, stdin, env, cwd, max_output=max_output).wait(timeout)
        for guest_path, host_path in copy_out:
            self.copy_out(guest_path, host_path)
        if check and completed.returncode:
            last = completed.stderr.strip().splitlines()[-1:] or [""]
            error = CommandFailedError(
                f"{completed.args[0]} ended with status {completed.returncode}"
                + (f": {last[0][:200]}" if last[0] else "")
            )
            error.details["returncode"] = completed.returncode
            error.completed = completed
            raise error
        return completed

    def popen(
        self,
        cmd: str | Sequence[str | os.PathLike[str]],
        stdin: Input = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        *,
        tty: tuple[int, int] | None = None,
        on_output: Callable[[Kind, bytes], None] | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> Command:
        """Start a command and return at once; see :meth:`run`.

        :param tty: (rows, columns): run it on a terminal of that size.
        :param on_output: called with (``Kind.STDOUT`` or ``Kind.STDERR``, bytes) as output comes, in the client's
            reader thread; while it blocks, the command's output waits.
        """
        if isinstance(cmd, str):
            argv = ["/bin/sh", "-c", cmd]
        else:
            argv = [os.fspath(word) for word in cmd]
        if not argv or not argv[0]:
            raise BadOptionError("the command is empty")
        self.wait_ready()
        if not self._operation.acquire(blocking=False):
            raise NotRunningError("another command or copy is still under way in this domain")
        params: dict[str, Any] = {"env": {**DEFAULT_ENVIRONMENT, **(env or {})}, "cwd": cwd or "/"}
        if tty is not None:
            params |= {"tty": True, "rows": tty[0], "cols": tty[1]}
        return Command(self._client, argv, params, stdin, on_output, max_output, self._operation.release)

    # ── files ──

    def copy_in(self, source: str | os.PathLike[str], destination: str) -> None:
        """Copy a host file or directory into the guest, as ``cp -r`` does; missing directories are made.

        BadFileError if the host's side cannot be read, GuestFileError if the guest's cannot be written.
        """
        tree = read_tree(source)
        first = next(tree)
        name = Path(os.path.abspath(source)).name or "root"  # noqa: PTH100 - resolve() would follow links
        with self._exclusive() as client:
            pending = client.submit("copy_in", {"destination": destination, "name": name})
            failure: NonrootError | None = None
            try:
                self._send_piece(first)
                for piece in tree:
                    if pending.done() or not self._send_piece(piece):
                        break
            except NonrootError as error:
                failure = error
            client.submit("end_of_input")
            pending.wait()
            if failure is not None:
                raise failure

    def copy_out(self, source: str, destination: str | os.PathLike[str], *, limit: int = MAX_FILES) -> list[str]:
        """Copy a guest file or directory to the host, as ``cp -r`` does.

        Returns one sentence for each thing that was left out (devices, links that lead out of the copied directory).

        :param limit: bytes of content; OutputLimitError beyond.
        :raises GuestFileError: the guest's side cannot be read.
        :raises BadFileError: the host's side cannot be written.
        """
        writer = TreeWriter(destination, source.rstrip("/").rpartition("/")[2], limit)
        failure: list[NonrootError] = []

        def take(kind: Kind, body: bytes) -> None:
            if failure:
                return
            try:
                if kind == Kind.ENTRY:
                    writer.entry(Entry.parse(body))
                elif kind == Kind.DATA:
                    writer.data(body)
            except NonrootError as error:
                failure.append(error)
                client.submit("cancel")

        with self._exclusive(take) as client:
            try:
                client.submit("copy_out", {"path": source}).wait()
            except NonrootError:
                if not failure:
                    raise
            finally:
                writer.close()
        if failure:
            raise failure[0]
        return writer.skipped

    # ── a shell on the console ──

    def start_shell(self, rows: int = 24, cols: int = 80, env: Mapping[str, str] | None = None) -> None:
        """Run an interactive shell on the guest's console as soon as it has booted; then no commands can run.

        When it ends, the guest powers off.
        """
        environment = {**DEFAULT_ENVIRONMENT, "TERM": "vt100", **(env or {})}
        self._request("shell", argv=["/bin/sh", "-l"], env=environment, rows=rows, cols=cols)

    def resize(self, rows: int, cols: int) -> None:
        """Tell the shell's terminal its size."""
        self._request("window_size", rows=rows, cols=cols)

    # ── inside ──

    @contextlib.contextmanager
    def _exclusive(self, stream: Callable[[Kind, bytes], None] | None = None) -> Iterator[DomainClient]:
        self.wait_ready()
        if not self._operation.acquire(blocking=False):
            raise NotRunningError("another command or copy is still under way in this domain")
        client = self._client
        try:
            client.forget_credit()
            client.on_stream = stream
            yield client
        finally:
            client.on_stream = None
            self._operation.release()

    def _send_piece(self, piece: Entry | bytes) -> bool:
        kind, body = (Kind.ENTRY, piece.pack()) if isinstance(piece, Entry) else (Kind.DATA, piece)
        return self._client.send_within_credit(kind, body)
