"""Images of other formats, by QEMU's storage daemon: one small process per image, which serves it to us alone.

The daemon gets a listening socket whose name is gone before it starts: nobody else can connect. Images may name other
files (backing files, extents, external data): a file that somebody gave the user could so reach any file of theirs.
They are refused unless the user says that the image has a backing file.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from nonroot.backends.lock import check_lock
from nonroot.backends.nbd import NbdError, NbdImage
from nonroot.errors import BadFileError, TransientError, UnsupportedError

__all__ = ["DAEMON", "ForeignImage", "open_foreign"]

DAEMON: Final = "qemu-storage-daemon"
EXPORT: Final = "disk"
PR_SET_PDEATHSIG: Final = 1
END_SECONDS: Final = 10.0


class ForeignImage:
    """An image that a daemon of ours serves."""

    def __init__(self, image: NbdImage, process: subprocess.Popen[bytes]) -> None:
        self._image = image
        self._process = process

    @property
    def size(self) -> int:
        """Bytes."""
        return self._image.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self._image.read_only

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the disk."""
        return self._image.read(offset, length)

    def descriptor(self, offset: int, length: int) -> int | None:
        """None: the bytes come through a socket."""
        return None

    def write(self, offset: int, data: bytes) -> None:
        """Write."""
        self._image.write(offset, data)

    def flush(self) -> None:
        """Everything on stable storage, the format's own tables too."""
        self._image.flush()

    def close(self) -> None:
        """End the daemon, which writes what it has. Safe to call again."""
        self._image.close()
        end(self._process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a daemon to end; insist after ten seconds."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def open_foreign(path: str, format_name: str, read_only: bool, backing: bool, what: str = "disk image") -> ForeignImage:
    """Serve an image by a daemon. UnsupportedError if there is none; BadFileError for what it refuses."""
    program = shutil.which(DAEMON)
    if program is None:
        raise UnsupportedError(
            f"{format_name} images need {DAEMON} (in Debian's package qemu-utils or qemu-system-common), "
            "which this machine has not"
        )
    check_lock(path, write=not read_only, what=what)
    if not backing:
        refuse_other_files(path, format_name, what)
    with tempfile.TemporaryDirectory(prefix="nonroot-nbd-") as folder:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"{folder}/socket")
        listener.listen(1)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(f"{folder}/socket")
    messages = tempfile.TemporaryFile(prefix="nonroot-nbd-")  # noqa: SIM115 - closed below
    with listener, messages:
        try:
            process = _start(program, listener, path, format_name, read_only, messages.fileno())
        except BaseException:
            sock.close()
            raise
        listener.close()  # so that the end of the daemon ends the connection
        try:
            image = NbdImage(sock, EXPORT, read_only)
        except NbdError:
            end(process)
            messages.seek(0)
            reason = _reason(messages.read().decode("utf-8", "replace"))
            raise BadFileError(f"the {what} {path} cannot be opened as {format_name}: {reason}") from None
    return ForeignImage(image, process)


def _start(
    program: str, listener: socket.socket, path: str, format_name: str, read_only: bool, messages: int
) -> subprocess.Popen[bytes]:
    node = {
        "driver": format_name,
        "node-name": "image",
        "read-only": read_only,
        "file": {"driver": "file", "filename": path, "read-only": read_only, "locking": "on"},
    }
    command = [
        *(program, "--blockdev", json.dumps(node)),
        *("--nbd-server", f"addr.type=fd,addr.str={listener.fileno()},max-connections=1"),
        *("--export", f"type=nbd,id=export,node-name=image,name={EXPORT},writable={'off' if read_only else 'on'}"),
    ]
    prctl = ctypes.CDLL(None).prctl

    def end_with_us() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a vCPU's thread, which may have called us, takes none
        prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM), 0, 0, 0)

    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            pass_fds=[listener.fileno()],
            cwd="/",
            start_new_session=True,
            preexec_fn=end_with_us,
        )
    except OSError as error:
        raise TransientError(f"{DAEMON} cannot be started: {error.strerror or error}") from None


def _reason(messages: str) -> str:
    """The daemon's last complaint, as the end of a sentence."""
    lines = [line for line in messages.splitlines() if line.strip()]
    if not lines:
        return f"{DAEMON} gave no reason"
    return lines[-1].removeprefix(f"{DAEMON}: ").rpartition("}: ")[2].strip().rstrip(".")


def refuse_other_files(path: str, format_name: str, what: str) -> None:
    """BadFileError if the image's header makes its reader open another file."""
    with contextlib.suppress(OSError, struct.error), Path(path).open("rb") as file:
        head = file.read(112)
        other = ""
        if format_name == "qcow2" and head[:4] == b"QFI\xfb":
            version, backing = struct.unpack_from(">IQ", head, 4)
            incompatible = struct.unpack_from(">Q", head, 72)[0] if version >= 3 else 0
            other = "a backing file" if backing else "an external data file" if incompatible & 4 else ""
        elif format_name == "qed":
            other = "a backing file" if struct.unpack_from("<Q", head, 16)[0] & 1 else ""
        elif format_name == "vmdk":
            file.seek(0)
            other = _vmdk_files(file.read(65536))
        elif format_name in ("vpc", "vhdx") and _is_differencing(path, format_name):
            other = "a parent image"
        if other:
            raise BadFileError(
                f"the {what} {path} makes its reader open {other}: add ,backing if you trust where it comes from"
            )


def _vmdk_files(head: bytes) -> str:
    """What a VMDK's descriptor names: a monolithic sparse image has its only extent in the file itself."""
    if head[:4] != b"KDMV":
        return "other files"
    text = head.lower()
    named = "a parent image" if b"parentfilenamehint" in text else ""
    return named or ("other files" if text.count(b' sparse "') + text.count(b' flat "') > 1 else "")


def _is_differencing(path: str, format_name: str) -> bool:
    """Whether a VHD is one of differences (its footer says so); a VHDX with a parent has a parent locator."""
    with Path(path).open("rb") as file:
        if format_name == "vpc":
            file.seek(-512, os.SEEK_END)
            footer = file.read(512)
            return footer[:8] == b"conectix" and footer[60:64] == b"\0\0\0\x04"
        return "parent_linkage".encode("utf-16-le") in file.read(4 << 20)
