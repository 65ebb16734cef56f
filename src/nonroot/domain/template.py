"""A process with everything loaded that becomes domains' processes: each is a fork() of it, ready in milliseconds.

It belongs to one client, whose requests come through a socket of packets, each with two descriptors: the domain's end
of its control socket, and a file for what it prints. It answers with the new process's number, and tells how each
ended. It is single-threaded, holds nothing of any domain, and dies with its client.

Packets are JSON: ``{"start": 7, "environment": {…}}`` → ``{"started": 7, "pid": 1234}`` or
``{"started": 7, "errno": 11}``; later ``{"ended": 1234, "status": -9}``.
"""

import contextlib
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import sys
import tempfile
from typing import Any, Final, NoReturn

gc.disable()

import nonroot.domain.guest_devices  # noqa: E402
import nonroot.domain.xen  # noqa: E402
import nonroot.hvm.machine  # noqa: E402
import nonroot.xenstore.client  # noqa: E402, F401
from nonroot.domain import host  # noqa: E402
from nonroot.domain.__main__ import serve  # noqa: E402
from nonroot.engines import select as engines  # noqa: E402

__all__ = ["MAX_PACKET", "main"]

MAX_PACKET: Final = 1 << 17


def main(number: int) -> NoReturn:
    """Serve the client at the other end of the socket ``number`` until it goes; never returns."""
    faulthandler.enable()
    host.die_with_parent()
    host.name_process("nonroot-template")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    requests = socket.socket(fileno=number)
    os.set_inheritable(number, False)
    with contextlib.suppress(Exception):
        engines.create(engines.choose("auto").engine)  # it looks at the host's CPU once
    gc.collect()
    gc.freeze()
    gc.enable()
    woken, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {fd for fd, _ in poll.poll()}
        if woken in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(woken, 4096)
            _bury(requests)
        if number in ready:
            try:
                packet, fds, _, _ = socket.recv_fds(requests, MAX_PACKET, 4)
            except OSError:
                packet, fds = b"", []
            if not packet:
                os._exit(0)
            _start(requests, json.loads(packet), fds, (woken, waker))


def _bury(requests: socket.socket) -> None:
    """Tell of the processes that have ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell(requests, {"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _tell(requests: socket.socket, record: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it has gone: we notice when we read
        requests.send(json.dumps(record).encode())


def _start(requests: socket.socket, request: dict[str, Any], fds: list[int], own: tuple[int, int]) -> None:
    try:
        pid = os.fork()
    except OSError as error:
        _tell(requests, {"started": request["start"], "errno": error.errno})
        pid = -1
    if pid == 0:
        _become_domain(requests, request, fds, own)
    for fd in fds:
        os.close(fd)
    if pid > 0:
        _tell(requests, {"started": request["start"], "pid": pid})


def _become_domain(requests: socket.socket, request: dict[str, Any], fds: list[int], own: tuple[int, int]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for fd in own:
            os.close(fd)
        requests.close()
        control, output = fds
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ.clear()
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        serve(socket.socket(fileno=control))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)
