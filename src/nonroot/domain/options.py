"""What a domain is made of, as the user asks for it: parsed, checked, and carried to the domain's process."""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nonroot.engines import select
from nonroot.errors import BadFileError, BadOptionError

__all__ = ["MAX_MEMORY", "MIN_MEMORY", "DomainOptions", "host_memory", "parse_size", "readable_size"]

PROTOCOLS = ("auto", "pvh", "linux64", "linux32", "multiboot")
MIN_MEMORY = 4 << 20
MAX_MEMORY = 512 << 30
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes of ``"256M"``, ``"1G"``, ``"1.5GiB"`` or a number; units are powers of 1024. BadOptionError if it is none.

    >>> parse_size("256M")
    268435456
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise BadOptionError(f"the {what} must be a number of bytes or text like '256M', not {text!r}")
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    if match is None or len(text) > 40:
        raise BadOptionError(f"{text[:40]!r} is no {what}: write it like 256M or 1G")
    number, unit = match.groups()
    factor = _UNITS[unit.upper()]
    return int(number) * factor if "." not in number else int(float(number) * factor)


def readable_size(size: int) -> str:
    """``size`` bytes in the largest unit that divides it.

    >>> readable_size(268435456)
    '256M'
    """
    for unit in "TGMK":
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


@dataclass(slots=True)
class DomainOptions:
    """Checked by :meth:`check`; all paths absolute."""

    kernel: str | None = None
    """A bzImage or an ELF; None takes the fetched (or built-in) guest software."""
    initrd: str | None = None
    append: str = ""
    """Added to the kernel's command line, so that it can override what is there."""
    memory: int = 256 << 20
    """Bytes."""
    engine: str = "auto"
    virtual_time: bool = False
    seed: int = 0
    """Of the machine's randomness in virtual time (RDRAND); otherwise the host's is used."""
    scramble_seed: int | None = None
    """Place every frame of guest memory at a random place of its backing; the guest cannot tell."""
    quiet: bool = True
    """Ask the kernel to print little."""
    agent: bool = True
    """Put our init into the initramfs, so that commands can be run."""
    agent_ports: bool = True
    """Let the agent use its I/O ports; without them it uses the second serial port."""
    off: list[str] = field(default_factory=list)
    """The engine's optimisations to switch off."""
    protocol: str = "auto"
    """How the kernel is entered: auto, pvh, linux64 or linux32."""
    firmware: str | None = None
    """A BIOS image to start in, instead of a kernel."""
    vga_bios: str | None = None
    """The VGA adapter's BIOS, for the firmware."""
    boot: str = "cd"
    """What the firmware boots from, in order: a floppy, c disk, d CD."""
    boot_menu: bool = False
    """Let the firmware offer its boot menu."""
    serial_firmware: bool = False
    """Have the firmware show its text on the first serial port too."""
    disks: list[str] = field(default_factory=list)
    """Disk images with their options, as :class:`nonroot.backends.drive.Drive` parses them."""
    cdroms: list[str] = field(default_factory=list)
    """CD images; ``none`` is an empty drive."""
    floppies: list[str] = field(default_factory=list)
    """Floppy images; ``none`` is an empty drive."""
    reboot: bool = True
    """Whether a reset starts a guest of firmware again; other guests end with it."""

    xen: bool | None = False
    """Be a Xen for the guest, with a console of its own (hvc0); None: if that is possible."""
    networks: list[str] = field(default_factory=list)
    """The networks of its cards, as :class:`nonroot.domain.networks.Network` parses them."""
    publish: list[str] = field(default_factory=list)
    """Ports of this machine that lead into the guest: ``[ADDRESS:]PORT:GUEST-PORT[/udp]``."""
    shares: list[str] = field(default_factory=list)
    """Folders of this machine that the guest has too: ``HOST:GUEST[:ro]``, as :class:`nonroot.backends.share.Share`
    parses them."""
    setup: bool = False
    """The initramfs has the userland that nonroot makes: a script of ours brings the devices up in it."""
    modules: str | None = None
    """The folder ``lib/modules/VERSION`` of the kernel, if it is guest software of ours."""
    name: str = ""
    """As XenStore shows it; empty takes one from its number."""
    domid: int = 0
    """Its number as Xen's domain; 0 takes a free one."""
    saved: str | None = None
    """The file of a saved domain to go on from; what the machine is made of is in there."""
    kept: bool = False
    """That file is a boot that was kept: its memory is mapped as it lies there, without a look at its checksums."""
    layers: list[int] = field(default_factory=list)
    """Descriptors of the files with that domain's RAM, over which ours is private; it is not in the other then."""
    display: bool = False
    """Have a display adapter, keyboard and mouse also without firmware, which has them always."""
    device_model: str = "internal"
    """Where emulated devices are: ``internal``, ``stub`` or ``dom0``; see :mod:`nonroot.domain.device_model`."""

    @property
    def interpreted(self) -> str:
        """What is asked for that guest mode cannot do; empty if nothing is."""
        if self.virtual_time:
            return "virtual time"
        if self.off:
            return "without optimisations, having none"
        return "a display" if self.display or self.firmware is not None else ""

    @property
    def left_to_others(self) -> str:
        """For what ``auto`` does not take guest mode, though it may be asked for; empty for nothing."""
        return "Xen's hypercalls without changing the guest's code" if self.xen is not False else select.UNPROVEN

    def check(self) -> None:
        """BadOptionError or BadFileError, one sentence, for what could not work."""
        if self.memory < MIN_MEMORY:
            raise BadOptionError(
                f"{readable_size(self.memory)} of memory is too little; {readable_size(MIN_MEMORY)} are the least"
            )
        if self.memory > MAX_MEMORY:
            raise BadOptionError(
                f"{readable_size(self.memory)} of memory is too much; {readable_size(MAX_MEMORY)} are the most"
            )
        host = host_memory()
        if self.memory > host:
            raise BadOptionError(
                f"{readable_size(self.memory)} of memory is more than this machine has ({host >> 20} MiB with its swap)"
            )
        if self.memory % 4096:
            raise BadOptionError(f"{self.memory} bytes of memory are no whole number of 4 KiB pages")
        select.choose(self.engine, interpreted=self.interpreted or self.left_to_others)
        if self.engine == select.KVM and self.interpreted:
            raise BadOptionError(f"the {self.engine} engine cannot do {self.interpreted}; use another engine")
        if self.protocol not in PROTOCOLS:
            raise BadOptionError(f"there is no boot protocol {self.protocol!r}; there are: {', '.join(PROTOCOLS)}")
        if self.firmware is not None:
            self._check_firmware()
        if self.initrd is not None and self.kernel is None:
            raise BadOptionError("an initrd needs its kernel: give both")
        if "\0" in self.append or "\n" in self.append:
            raise BadOptionError("the kernel's command line cannot contain line breaks or NUL characters")
        if len(os.fsencode(self.append)) > 2000:
            raise BadOptionError(f"the kernel's command line has {len(self.append)} characters; 2000 are the most")
        for seed in (self.seed, self.scramble_seed or 0):
            if not 0 <= seed < 1 << 64:
                raise BadOptionError("a seed must be a number from 0 to 2^64 - 1")
        files = (
            (self.kernel, "kernel"),
            (self.initrd, "initrd"),
            (self.firmware, "firmware"),
            (self.vga_bios, "VGA BIOS"),
        )
        for path, what in files:
            if path is not None:
                check_readable(path, what)
        from nonroot.domain.device_model import check_device_model
        from nonroot.domain.drives import check_drives
        from nonroot.domain.networks import parse_networks

        check_device_model(self.device_model)
        check_drives(self)
        if self.shares:
            from nonroot.domain.shares import parse_shares

            parse_shares(self.shares)
            if self.virtual_time:
                raise BadOptionError("a shared folder takes the time that it takes: it cannot be had in virtual time")
        if parse_networks(self.networks, self.publish) and self.xen is False:
            raise BadOptionError("network cards are Xen's: a domain that is none of Xen's can have no network")

    def _check_firmware(self) -> None:
        if self.kernel is not None or self.initrd is not None:
            raise BadOptionError("a guest starts in firmware or in a kernel, not in both")
        if self.agent:
            raise BadOptionError("commands can be run only in a kernel that nonroot starts itself, not from a disk")
        if not self.boot or set(self.boot) - set("acd") or len(set(self.boot)) != len(self.boot):
            raise BadOptionError(
                f"{self.boot!r} is no boot order: use the letters a (floppy), c (disk) and d (CD), each once"
            )

    @property
    def has_display(self) -> bool:
        """Whether there is a screen."""
        return self.display or self.firmware is not None

    def to_wire(self) -> dict[str, Any]:
        """As the ``create`` request carries it."""
        values = ((name, getattr(self, name)) for name in _NAMES)
        return {name: list(value) if isinstance(value, list) else value for name, value in values}

    @classmethod
    def from_wire(cls, record: dict[str, Any]) -> "DomainOptions":
        """BadOptionError if a name is unknown; the values are checked by :meth:`check`."""
        unknown = set(record).difference(_NAMES)
        if unknown:
            raise BadOptionError(f"unknown option: {', '.join(sorted(unknown))}")
        return cls(**record)


_NAMES = tuple(f.name for f in fields(DomainOptions))


def host_memory() -> int:
    """Bytes of memory and swap that this machine has; a very large number if it does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return sum(int(lines[name].split()[0]) << 10 for name in ("MemTotal", "SwapTotal"))
    except (OSError, ValueError, KeyError):
        return MAX_MEMORY


def check_readable(path: str, what: str) -> None:
    """BadFileError if ``path`` is not a readable, non-empty file."""
    try:
        with Path(path).open("rb") as file:
            if not file.read(1):
                raise BadFileError(f"the {what} {path} is empty")
    except OSError as error:
        raise BadFileError(f"the {what} {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise BadFileError(f"the {what}'s path {path!r} is no path") from None
