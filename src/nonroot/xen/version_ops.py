"""xen_version: what Xen this is."""

from collections.abc import Callable
from typing import Final

from nonroot.xen.abi import (
    EXTRA_VERSION,
    FEATURES,
    PAGE_SIZE,
    VERSION_MAJOR,
    VERSION_MINOR,
    Errno,
    HypercallError,
    Version,
)
from nonroot.xen.call import Call

__all__ = ["VersionOps"]

CAPABILITIES: Final = b"hvm-3.0-x86_32 hvm-3.0-x86_32p hvm-3.0-x86_64 "
VIRT_START: Final = 0xFFFF_8000_0000_0000
VIRT_START_32: Final = 0xF580_0000


class VersionOps:
    """The operations."""

    def __init__(self, handle: bytes) -> None:
        """``handle``: the domain's UUID, 16 bytes."""
        compile_info = b"".join((_text(b"", 64), _text(b"nonroot", 16), _text(b"", 32), _text(b"", 32)))
        self._records: dict[int, Callable[[Call], bytes]] = {
            Version.EXTRAVERSION: lambda call: _text(EXTRA_VERSION.encode(), 16),
            Version.COMPILE_INFO: lambda call: compile_info,
            Version.CAPABILITIES: lambda call: _text(CAPABILITIES, 1024),
            Version.CHANGESET: lambda call: _text(b"unavailable", 64),
            Version.PLATFORM_PARAMETERS: lambda call: call.abi.frame(VIRT_START if call.abi.long else VIRT_START_32),
            Version.GUEST_HANDLE: lambda call: handle,
            Version.COMMANDLINE: lambda call: _text(b"", 1024),
        }

    def __call__(self, call: Call) -> int:
        """The hypercall."""
        command, pointer = call.args[0] & 0xFFFF_FFFF, call.args[1]
        if command == Version.VERSION:
            return VERSION_MAJOR << 16 | VERSION_MINOR
        if command == Version.PAGESIZE:
            if pointer:
                raise HypercallError(Errno.EINVAL)
            return PAGE_SIZE
        if command == Version.GET_FEATURES:
            submap = int.from_bytes(call.read(pointer, 4), "little")
            call.write(pointer + 4, (FEATURES if submap == 0 else 0).to_bytes(4, "little"))
            return 0
        if command == Version.BUILD_ID:
            raise HypercallError(Errno.ENODATA)
        record = self._records.get(command)
        if record is None:
            raise HypercallError(Errno.ENOSYS)
        call.write(pointer, record(call))
        return 0


def _text(text: bytes, size: int) -> bytes:
    return text[: size - 1].ljust(size, b"\0")
