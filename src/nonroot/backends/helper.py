"""Helper processes: a module of this package run as a process of its own, which says when it is ready, or why not.

The process gets its work as JSON, and descriptors by number. It writes one line of JSON when it is ready, and ends when
the last of the sockets that it serves is closed; so it never outlives its users.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from nonroot.errors import InternalError, NonrootError, TransientError, error_from_wire

__all__ = ["Helper", "run_helper", "start_helper"]

READY_SECONDS: Final = 120.0
"""The first start may fetch a package."""
LONGEST_ANSWER: Final = 1 << 16


class Helper:
    """A process that has said that it is ready."""

    def __init__(self, process: subprocess.Popen[bytes], facts: dict[str, Any]) -> None:
        self.process = process
        self.facts = facts
        """What it said of itself."""

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def close(self, seconds: float = 5.0) -> int:
        """Wait for its end, after its sockets have been closed; insist after ``seconds``. Its status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def start_helper(module: str, work: dict[str, Any], fds: Sequence[int] = ()) -> Helper:
    """Run ``module`` with ``work``; ``fds`` keep their numbers. The error that the process tells; TransientError."""
    ours, theirs = socket.socketpair()
    with ours:
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", module, json.dumps({**work, "report": theirs.fileno()})],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[*fds, theirs.fileno()],
                    start_new_session=True,
                )
        except OSError as error:
            raise TransientError(f"a helper process cannot be started: {error.strerror or error}") from None
        ours.settimeout(READY_SECONDS)
        answer = b""
        with contextlib.suppress(OSError):
            while len(answer) < LONGEST_ANSWER and (part := ours.recv(4096)):
                answer += part
    try:
        facts = json.loads(answer)
    except ValueError:
        process.kill()
        process.wait()
        raise InternalError(f"the helper process {module} ended before it was ready") from None
    if "error" in facts:
        process.wait()
        raise error_from_wire(facts["error"])
    return Helper(process, facts)


def run_helper(main: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None]) -> None:
    """The ``__main__`` of a helper: ``main(work, ready)`` calls ``ready(facts)`` once, when it can serve."""
    work = json.loads(sys.argv[1])
    report = socket.socket(fileno=work["report"])
    told = False

    def ready(facts: dict[str, Any]) -> None:
        nonlocal told
        told = True
        with contextlib.suppress(OSError):
            report.sendall(json.dumps(facts).encode())
        report.close()

    try:
        main(work, ready)
    except NonrootError as error:
        if told:
            raise
        ready({"error": error.to_wire()})
    except KeyboardInterrupt:
        os._exit(130)
