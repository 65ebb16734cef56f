"""Where the ``nonroot`` command starts: with the process of the domain, if there is to be one, before all else."""

import atexit
import contextlib
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["ensure_standard_streams", "entry", "main"]


def main() -> int:
    """Run the command line; returns the exit status."""
    ensure_standard_streams()
    makes_domain = sys.argv[1:2] == ["run"] and not {"--help", "-h"} & set(sys.argv)
    if makes_domain:
        from nonroot.domain import early

        early.start()
    from nonroot.cli.main import main as run

    try:
        return run()
    finally:
        if makes_domain:
            from nonroot.domain.client import DomainClient

            DomainClient.forget_early()


def ensure_standard_streams() -> None:
    """Open what the caller closed (``2>&-``), so that no file of ours gets the number of a standard stream."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def entry() -> "NoReturn":
    """The command's process: what is left to do at its end is done, but for taking Python to pieces."""
    status = main()
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
