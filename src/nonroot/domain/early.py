"""A domain's process that is started before anything else is: it loads its modules while its client loads its own.

This module is imported first by the command: of the standard library it needs next to nothing. The rest of a client,
:mod:`nonroot.domain.client`, takes over what it has started.
"""

import os
import signal
import socket
import sys

from nonroot.programs import environment

__all__ = ["Early", "start", "started"]

_LOADS = "from nonroot.domain.__main__ import main; main()"
PROGRAM = [sys.executable, "-P", "-c", _LOADS]
"""What is run as a domain's process."""
# What a caller left open for its children is not for the domain; with spawn, it is the child that has to close it.
_SPAWNED = "import os; os.closerange(3, {0}); os.closerange({0} + 1, 1 << 30); os.chdir('/'); " + _LOADS


class Early:
    """A started process: our end of its control socket, a file with what it prints, its number."""

    def __init__(self) -> None:
        """OSError if the host has no process, descriptor or memory for it."""
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.output = os.memfd_create("nonroot-domain-stderr", os.MFD_CLOEXEC)
        except OSError:
            self.control.close()
            theirs.close()
            raise
        number = theirs.fileno()
        try:
            theirs.set_inheritable(True)
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-c", _SPAWNED.format(number), "--control-fd", str(number)],
                environment(),
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, self.output, 1),
                    (os.POSIX_SPAWN_DUP2, self.output, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
            )
        except OSError:
            self.control.close()
            os.close(self.output)
            raise
        finally:
            theirs.close()


_started: "Early | None" = None


def start() -> None:
    """Start the process of a domain that is about to be made. It ends when the thread does that started it."""
    global _started
    try:
        _started = Early()
    except OSError:
        return  # whoever makes the domain will see why


def started() -> "Early | None":
    """What :func:`start` has started, once."""
    global _started
    early, _started = _started, None
    return early
