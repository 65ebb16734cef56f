"""What the domain's process asks of the Linux kernel under it."""

import ctypes
import os
import signal

__all__ = ["die_with_parent", "keep_alive_without_parent", "leave_signals_to_others", "name_process"]

_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def _prctl(option: int, argument: object) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with_parent() -> None:
    """Let the kernel kill this process when the thread that started it ends. OSError if it will not."""
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


def keep_alive_without_parent() -> None:
    """Undo :func:`die_with_parent`, for a domain that outlives its client."""
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(0))


def leave_signals_to_others() -> None:
    """
    Let the process's other threads take its signals.

    Python's handlers run in the main thread, but a signal that the kernel gives to another thread does not wake it up.
    """
    signal.pthread_sigmask(
        signal.SIG_BLOCK,
        {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCHLD},
    )


def name_process(name: str) -> None:
    """The process's name in ``ps -o comm``; at most 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(os.fsencode(name)[:15]))
