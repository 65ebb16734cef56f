"""Our init, added to any initramfs: the kernel unpacks one archive after the other; ``rdinit=`` names our program."""

from pathlib import Path

from nonroot.boot.cpio import Cpio, append
from nonroot.errors import BadFileError, UnsupportedError

__all__ = ["AGENT_PATH", "agent_program", "kernel_bits", "with_agent"]

AGENT_PATH = "/.nonroot-agent"
"""Where the agent is in the guest. The initramfs's own ``/init``, if it has one, stays as it is."""


def kernel_bits(path: str) -> int:
    """64 if the kernel can run 64-bit programs, else 32; found in the headers of a bzImage or an ELF. BadFileError."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(0x240)
    except OSError as error:
        raise BadFileError(f"the kernel {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    if head[:4] == b"\x7fELF":
        return 64 if head[4:5] == b"\x02" else 32
    if head[0x202:0x206] == b"HdrS" and int.from_bytes(head[0x206:0x208], "little") >= 0x20C:
        return 64 if head[0x236] & 1 else 32  # xloadflags: XLF_KERNEL_64
    return 32


def agent_program(bits: int) -> bytes:
    """The guest agent as a static ELF. UnsupportedError if this build of nonroot has none."""
    from nonroot import _engine

    try:
        return _engine.agent(bits)
    except ValueError as error:
        raise UnsupportedError(f"commands cannot be run: {error}") from None


def with_agent(initrd: bytes, program: bytes) -> bytes:
    """``initrd`` (compressed or not, or empty) with the agent added as one more archive."""
    archive = Cpio()
    archive.directory("dev")
    archive.device("dev/console", 5, 1)  # the kernel opens it for PID 1; an archive before may lack it
    archive.file(AGENT_PATH.removeprefix("/"), program, mode=0o755)
    ours = archive.finish()
    return append(initrd, ours) if initrd else ours
