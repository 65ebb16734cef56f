"""Where XenStore's process is, in the user's folder for running domains, and how it is started when it is needed."""

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

from nonroot import programs
from nonroot.domain.registry import runtime_dir
from nonroot.xenstore.errors import XenStoreLostError

__all__ = ["ensure", "folder", "journal_path", "lock_path", "open_socket", "socket_path"]

_START_SECONDS = 20.0


def folder() -> Path:
    """A folder that only this user can enter. TransientError if there is none."""
    path = runtime_dir() / "xenstore"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def socket_path() -> Path:
    """What clients connect to."""
    return folder() / "socket"


def journal_path() -> Path:
    """The saved state."""
    return folder() / "journal"


def lock_path() -> Path:
    """Locked by the process for as long as it serves; its process id is in it."""
    return folder() / "lock"


def open_socket(path: Path) -> socket.socket | None:
    """A connection to the process at ``path``; None if nobody serves there. OSError for other reasons."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
        return connection
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BaseException:
        connection.close()
        raise


def ensure() -> Path:
    """The socket's path, when somebody serves there: the process is started if need be. XenStoreLostError."""
    path = socket_path()
    with contextlib.suppress(OSError):
        connection = open_socket(path)
        if connection is not None:
            connection.close()
            return path
    with (folder() / "start").open("a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # one starter at a time
        _start(path)
    return path


def _start(path: Path) -> None:
    log = folder() / "log"
    if log.exists() and log.stat().st_size > 1 << 20:
        log.unlink()
    with log.open("ab") as messages:
        connection = open_socket(path)
        if connection is not None:  # another starter was quicker
            connection.close()
            return
        command = [sys.executable, "-P", "-m", "nonroot.xenstore", "--detach"]
        process = programs.start(command, stdout=messages, stderr=messages)
        try:
            status = process.wait(_START_SECONDS)  # it detaches when it listens
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise XenStoreLostError(f"XenStore's process did not start within {_START_SECONDS:.0f} seconds") from None
    if status:
        lines = log.read_text(errors="replace").strip().splitlines()
        raise XenStoreLostError(f"XenStore's process did not start: {lines[-1] if lines else f'status {status}'}")
