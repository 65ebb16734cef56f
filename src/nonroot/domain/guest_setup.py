"""What guest software of ours needs for its devices: modules of its kernel, and a script that brings devices up.

Both go into one more archive of the initramfs. The agent runs the script before it greets; without an agent, a small
init runs it before the initramfs's own. What the script says is a complaint for the user. All this is for the userland
that nonroot makes (busybox); a user's own initramfs gets the devices and nothing else.
"""

import gzip
import io
import ipaddress
import lzma
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zstandard

from nonroot.boot.cpio import Cpio
from nonroot.domain.networks import Network

__all__ = ["INIT_PATH", "GuestSetup", "Module", "find_modules"]

FOLDER: Final = ".nonroot"
INIT_PATH: Final = f"/{FOLDER}/init"
"""PID 1 where there is no agent: it sets up, and goes on as the initramfs's own /init."""
FILE_SYSTEMS: Final = ("ext4", "crc32c_generic", "vfat", "nls_cp437", "nls_ascii", "isofs")
"""Modules that mount needs for usual disks; a kernel that has them built in has no such files."""
MOUNTABLE: Final = ("ext4", "vfat", "iso9660")
"""What mount tries where no type is given: naming them loads their modules."""
MAX_MODULE: Final = 64 << 20

PROLOGUE: Final = """\
#!/bin/sh
# Written by nonroot. Brings up the devices that this domain was made with; what it says is shown to the user.
driver() { # BUS-NAME MODULE: is there a driver for such devices?
    modprobe "$2" 2>/dev/null
    [ -d "/sys/bus/xen/drivers/$1" ] && return
    echo "the guest's kernel has no driver $2"
    return 1
}
there() { # COMMAND...: wait until it succeeds, for some 20 seconds
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -gt 800 ] && return 1
        usleep 25000
    done
}
card() { # INDEX: its name is in $dev then
    dev=$(ls /sys/bus/xen/devices/vif-$1/net 2>/dev/null)
    [ -n "$dev" ]
}
"""

INIT: Final = """\
#!/bin/sh
# Written by nonroot: PID 1 until the devices are there.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
/.nonroot/setup
umount /sys /proc
exec /init
"""

END: Final = """\
#!/bin/sh
# Written by nonroot: PID 1 is a shell, which hears no signals, so this ends the guest itself.
umount -a -r 2>/dev/null
sync
exec busybox {verb} -f
"""

DHCP: Final = """\
#!/bin/sh
# Written by nonroot: what udhcpc calls.
case "$1" in
deconfig)
    ifconfig "$interface" 0.0.0.0 up
    ;;
bound | renew)
    ifconfig "$interface" "$ip" netmask "${subnet:-255.255.255.0}" ${mtu:+mtu "$mtu"}
    for gateway in $router; do
        route add default gw "$gateway" dev "$interface"
        break
    done
    mkdir -p /etc
    for server in $dns; do
        echo "nameserver $server"
    done > /etc/resolv.conf
    ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Module:
    """A kernel module, and what it says of itself."""

    name: str
    path: str
    """Below the folder of modules, without the ending of a compression: ``kernel/fs/ext4/ext4.ko``."""
    data: bytes
    """The ELF file, not compressed."""
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


@dataclass(slots=True)
class GuestSetup:
    """What a domain's devices need of its guest software."""

    disks: list[str] = field(default_factory=list)
    """The names of Xen's disks: ``xvda``."""
    networks: list[Network] = field(default_factory=list)
    modules: Path | None = None
    """The folder ``lib/modules/VERSION`` of the kernel that boots; None: what it needs is built in, or missing."""
    more_modules: list[str] = field(default_factory=list)
    """Names of modules that are loaded besides."""
    more_lines: list[str] = field(default_factory=list)
    """Further lines of the script."""
    agent: bool = True
    """Whether PID 1 is our agent."""
    attachable: bool = False
    """Whether disks and cards of Xen's may come later, though there are none yet: their drivers are loaded."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.disks or self.networks or self.more_lines or not self.agent)

    def archive(self) -> bytes:
        """The initramfs's further archive. BadFileError if the kernel's modules cannot be read."""
        archive = Cpio()
        archive.directory(FOLDER)
        archive.file(f"{FOLDER}/setup", self.script().encode(), mode=0o755)
        archive.file(f"{FOLDER}/dhcp", DHCP.encode(), mode=0o755)
        if not self.agent:
            archive.file(f"{FOLDER}/init", INIT.encode(), mode=0o755)
            for verb in ("poweroff", "reboot", "halt"):
                archive.file(
                    f"bin/{verb}", END.format(verb="poweroff" if verb == "halt" else verb).encode(), mode=0o755
                )
        mounts = bool(self.disks) or self.attachable
        if mounts:
            archive.directory("etc")
            archive.file("etc/filesystems", "\n".join([*MOUNTABLE, ""]).encode())
        if self.modules is not None:
            _add_modules(archive, self.modules, [*self._drivers(), *(FILE_SYSTEMS if mounts else ())])
        return archive.finish()

    def _drivers(self) -> list[str]:
        # Both, if there is one: a disk may be attached later to a guest that has only cards, and the other way round.
        both = ["xen-blkfront", "xen-netfront"] if self.disks or self.networks or self.attachable else []
        return [*both, *self.more_modules]

    def script(self) -> str:
        """The shell's."""
        lines = [PROLOGUE, *(f"modprobe {name} 2>/dev/null" for name in self.more_modules)]
        if self.disks:
            found = [f'there [ -b /dev/{name} ] || echo "the guest has found no disk {name}"' for name in self.disks]
            lines += _if("driver vbd xen-blkfront", found)
        if self.networks:
            cards = [
                line
                for index, network in enumerate(self.networks)
                for line in _if(
                    f"there card {index}",
                    _card(index, network),
                    [f'echo "the guest has found no network card {index}"'],
                )
            ]
            lines += _if("driver vif xen-netfront", cards)
        later = {"xen-blkfront": self.disks, "xen-netfront": self.networks}
        if any(later.values()) or self.attachable:
            lines += [f"modprobe {name} 2>/dev/null" for name, now in later.items() if not now]
        return "\n".join([*lines, *self.more_lines, ""])


def _if(condition: str, then: list[str], otherwise: list[str] | None = None) -> list[str]:
    lines = [f"if {condition}; then", *(f"    {line}" for line in then)]
    if otherwise:
        lines += ["else", *(f"    {line}" for line in otherwise)]
    return [*lines, "fi"]


def _card(index: int, network: Network) -> list[str]:
    if network.ip is not None:
        address = ipaddress.IPv4Interface(network.ip)
        return [f'ifconfig "$dev" {address.ip} netmask {address.netmask} up']
    if not network.is_user:
        return ['ifconfig "$dev" up']
    return [
        'ifconfig "$dev" up',
        'udhcpc -i "$dev" -n -q -f -t 8 -T 1 -A 1 -s /.nonroot/dhcp > /dev/null 2>&1 ||',
        f'    echo "network card {index} ($dev) was given no address by DHCP"',
    ]


# ── modules ──


def find_modules(folder: Path, names: Iterable[str]) -> list[Module]:
    """The modules of these names and all that they depend on, dependencies first; names without a file are left out.

    ``folder``: ``lib/modules/VERSION``, with the kernel's list ``modules.order``. OSError.
    """
    listed = (folder / "modules.order").read_text().split()
    places = {_canonical(Path(path).name.partition(".ko")[0]): path for path in listed}
    found: dict[str, Module] = {}

    def take(name: str) -> None:
        key = _canonical(name)
        if key in found or key not in places:
            return
        module = _read(folder, places[key])
        if module is None:
            return
        for needed in module.depends:
            take(needed)
        found[key] = module

    for name in names:
        take(name)
    return list(found.values())


def _canonical(name: str) -> str:
    return name.replace("-", "_")


def _xz(file: io.BytesIO) -> bytes:
    with lzma.LZMAFile(file) as stream:
        return stream.read(MAX_MODULE)


def _gzip(file: io.BytesIO) -> bytes:
    with gzip.GzipFile(fileobj=file) as stream:
        return stream.read(MAX_MODULE)


def _zstd(file: io.BytesIO) -> bytes:
    with zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(file, read_across_frames=True) as reader:
        return bytes(reader.read(MAX_MODULE))


_ENDINGS: Final[tuple[tuple[str, Callable[[io.BytesIO], bytes]], ...]] = (
    ("", lambda file: file.read()),
    (".xz", _xz),
    (".zst", _zstd),
    (".gz", _gzip),
)


def _read(folder: Path, path: str) -> Module | None:
    """None if there is no such file, or it is no module."""
    plain = path.partition(".ko")[0] + ".ko"
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    for ending, unpack in _ENDINGS:
        file = folder / (plain + ending)
        if not file.is_file():
            continue
        try:
            data = unpack(io.BytesIO(file.read_bytes()))
            section = ELFFile(io.BytesIO(data)).get_section_by_name(".modinfo")
            texts = [] if section is None else section.data().decode("utf-8", "replace").split("\0")
        except (ELFError, lzma.LZMAError, zstandard.ZstdError, EOFError, gzip.BadGzipFile):
            return None
        facts = [text.partition("=")[::2] for text in texts]
        depends = tuple(name for key, value in facts if key == "depends" for name in value.split(",") if name)
        aliases = tuple(value for key, value in facts if key == "alias")
        return Module(Path(plain).stem, plain, data, depends, aliases)
    return None


def _add_modules(archive: Cpio, folder: Path, names: list[str]) -> None:
    """The files, and the tables that modprobe reads."""
    modules = find_modules(folder, names)
    root = f"lib/modules/{folder.name}"
    folders = ["lib", "lib/modules", root]
    for module in modules:
        parents = list(Path(module.path).parents)[-2::-1]
        folders += [f"{root}/{parent}" for parent in parents]
    for name in dict.fromkeys(folders):
        archive.directory(name)
    for module in modules:
        archive.file(f"{root}/{module.path}", module.data)
    paths = {_canonical(module.name): module.path for module in modules}
    depends = {module.path: [paths[_canonical(name)] for name in module.depends] for module in modules}

    def all_of(path: str) -> list[str]:
        """What modprobe is to load before, the last one first: so nothing comes before what it needs itself."""
        below = [one for needed in depends[path] for one in (*all_of(needed)[::-1], needed)]
        return list(dict.fromkeys(below))[::-1]

    dep = "".join(f"{module.path}: {' '.join(all_of(module.path))}".rstrip() + "\n" for module in modules)
    alias = "".join(f"alias {name} {_canonical(module.name)}\n" for module in modules for name in module.aliases)
    archive.file(f"{root}/modules.dep", dep.encode())
    archive.file(f"{root}/modules.alias", alias.encode())
