"""
The signal that ends a KVM_RUN: sent by other threads, and by a timer of the vCPU's thread at its deadline.

Threads that run vCPUs block it for good; only KVM_RUN lets it in. So none is lost between two instructions of ours, and
the process needs no handler.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from typing import Final

from nonroot.errors import UnsupportedError

__all__ = ["ALARM", "Alarm", "drain", "own_token"]

ALARM: Final = signal.SIGRTMIN + 5

_SIGEV_THREAD_ID: Final = 4
_TIMER_ABSTIME: Final = 1
_SECOND: Final = 1_000_000_000

_libc: Final = ctypes.CDLL(None, use_errno=True)
_threads: Final = threading.local()


class _Event(ctypes.Structure):
    """``struct sigevent`` with a thread."""

    _fields_ = [
        ("value", ctypes.c_uint64),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    ]


class _Moment(ctypes.Structure):
    """``struct itimerspec``: once, at an absolute time."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "s", "ns")]


_libc.timer_create.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.timer_settime.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
_libc.timer_delete.argtypes = [ctypes.c_void_p]


def own_token() -> object:
    """Something that is this thread's alone, as long as it lives. It blocks the signal from now on."""
    token: object | None = getattr(_threads, "token", None)
    if token is None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {ALARM})
        token = _threads.token = object()
    return token


def drain() -> None:
    """Take the signals that have arrived."""
    while signal.sigtimedwait({ALARM}, 0) is not None:
        pass


class Alarm:
    """A timer that signals the thread that made it."""

    def __init__(self) -> None:
        """UnsupportedError if the kernel gives none."""
        self._id = ctypes.c_void_p()
        event = _Event(signal=ALARM, notify=_SIGEV_THREAD_ID, thread=threading.get_native_id())
        if _libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)) != 0:
            raise UnsupportedError(f"no timer can be had ({os.strerror(ctypes.get_errno())})")
        self._at = 0
        self._moment = _Moment()
        self._address = ctypes.addressof(self._moment)

    def within(self, delay_ns: int) -> None:
        """Signal after so many ns, or earlier: a signal that came too early is followed by no other."""
        now = time.monotonic_ns()
        at = now + max(delay_ns, 1)
        if now < self._at <= at:
            return
        self._moment.s, self._moment.ns = divmod(at, _SECOND)
        _libc.timer_settime(self._id, _TIMER_ABSTIME, self._address, None)
        self._at = at

    def close(self) -> None:
        """End it."""
        _libc.timer_delete(self._id)
