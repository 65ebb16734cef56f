"""What xl's settings mean for a domain here: checked, with one sentence for whatever cannot be."""

import difflib
import uuid as uuids
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nonroot.backends.vdev import disk_index
from nonroot.boot.bzimage import is_bzimage
from nonroot.domain.initramfs import kernel_bits
from nonroot.domain.networks import parse_networks
from nonroot.domain.options import DomainOptions
from nonroot.domain.registry import check_name
from nonroot.domain.viewers import parse_address
from nonroot.domain.xen_choice import choose_xen
from nonroot.errors import BadFileError, BadOptionError, UnsupportedError
from nonroot.toolstack.disks import DiskSpec, parse_disk
from nonroot.toolstack.vifs import parse_vif, with_mac
from nonroot.toolstack.xlcfg import MAX_TEXT, Value, parse

__all__ = ["ACTIONS", "Config", "Policy", "fetch_software", "read_config", "settle_xen"]

DEFAULT_MEMORY: Final = 256
"""MiB."""
BZIMAGE_HEAD: Final = 4096
"""Bytes that say whether a file is a bzImage."""
FIRMWARE: Final = {"seabios": "seabios", "ovmf": "ovmf"}
ACTIONS: Final = ("destroy", "restart", "rename-restart", "preserve")
"""What can be done with a domain that has stopped."""
_MORE_ACTIONS: Final = ("coredump-destroy", "coredump-restart", "soft-reset")

WITHOUT_EFFECT: Final = frozenset(
    "acpi acpi_s3 acpi_s4 altp2m apic blkdev_start cap claim_mode cpu_weight cpus cpus_soft device_model_args "
    "device_model_args_hvm device_model_override device_model_user device_model_version driver_domain gfx_passthru hap "
    "hpet init_seclabel keymap localtime max_event_channels max_grant_frames max_grant_version max_maptrack_frames "
    "monitor on_watchdog nestedhvm nodes nomigrate nx opengl pae passthrough pool rdm sched_params sdl seclabel "
    "shadow_memory smbios spice timer_mode tsc_mode usb usbdevice vendor_device vga videoram viridian vpt_align "
    "xen_platform_pci xenpcie stdvga vncunused soundhw vkb suppress_spurious_page_faults "
    "exec_tls vmtrace_buf_kb vpmu iommu_page_limit cpuid mca_caps e820_host bios_path_override ms_vm_genid".split()
)
"""Settings that a Xen of hardware has use for and this one has not; a warning says so."""

NOT_YET: Final = {
    "bootloader": "nonroot does not run bootloaders such as pygrub; use type='hvm', or kernel and ramdisk",
    "pci": "nonroot passes no PCI devices through",
    "usbdev": "nonroot has no USB controllers",
    "usbctrl": "nonroot has no USB controllers",
    "vfb": "nonroot has no paravirtual screen; use type='hvm'",
    "vtpm": "nonroot has no TPM",
    "p9": "nonroot's guests have no 9pfs yet",
    "pvcalls": "nonroot's guests have no pvcalls",
    "channel": "nonroot's guests have no channels beside the console",
    "rdm_mem_boundary": "nonroot passes no PCI devices through",
    "dtdev": "nonroot passes no devices through",
    "irqs": "nonroot passes no devices through",
    "ioports": "nonroot passes no devices through",
    "iomem": "nonroot passes no devices through",
    "rtc_timeoffset": "nonroot's clocks show UTC; leave rtc_timeoffset out",
    "acpi_firmware": "nonroot takes no further ACPI tables",
    "smbios_firmware": "nonroot takes no further SMBIOS tables",
    "spiceport": "nonroot shows screens by VNC, not by SPICE",
    "device_tree": "nonroot's guests are x86 PCs, which have no device tree",
}
"""Settings that are known and cannot be done: why."""


@dataclass(slots=True)
class Policy:
    """What domain zero does when a domain has stopped: one of :data:`ACTIONS` for each reason."""

    on_poweroff: str = "destroy"
    on_reboot: str = "restart"
    on_crash: str = "destroy"


@dataclass(slots=True)
class Config:
    """A domain as its configuration describes it."""

    name: str
    uuid: str
    kind: str
    """``pvh`` or ``hvm``."""
    options: DomainOptions
    firmware: str | None = None
    """Firmware to fetch (``seabios``, ``ovmf``), or an image's path; None for a kernel."""
    default_guest: bool = False
    """Boot the guest software that ``nonroot run`` boots: nothing else is named."""
    policy: Policy = field(default_factory=Policy)
    disks: list[DiskSpec] = field(default_factory=list)
    vnc: dict[str, str] | None = None
    """``address`` and ``password`` of a VNC server to start; None starts one when somebody wants to look."""
    settings: dict[str, Value] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    """One sentence each, about settings without effect and unknown ones."""


def read_config(path: Path | None, assignments: list[str], given: Mapping[str, Value] | None = None) -> Config:
    """The file at ``path`` and ``KEY=VALUE`` texts, which win. BadFileError, BadOptionError, UnsupportedError."""
    settings: dict[str, Value] = {}
    if path is not None:
        settings = {name: one.value for name, one in parse(_read(path), str(path)).items()}
    for text in assignments:
        more = {name: one.value for name, one in parse(_quoted(text), f"the argument {text[:60]!r}").items()}
        settings |= more
    settings |= given or {}
    if "name" not in settings and path is not None and path.suffix:
        settings["name"] = path.stem
    return _Interpreter(settings, Path.cwd()).config()


def _quoted(text: str) -> str:
    """``KEY=VALUE`` with quotes around a plain word, as the shell has taken them off."""
    key, equals, value = text.partition("=")
    plain = value.strip()
    if equals and ";" not in plain and plain[:1] not in ("'", '"', "["):
        number = plain.isascii() and (plain.isdigit() or plain[:2].lower() == "0x")
        if not number:
            return f'{key}="' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT + 1)
    except OSError as error:
        raise BadFileError(
            f"the configuration {path} cannot be read: {(error.strerror or str(error)).lower()}"
        ) from None
    if len(data) > MAX_TEXT:
        raise BadFileError(f"the configuration {path} has more than {MAX_TEXT} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadFileError(f"the configuration {path} is no text: line {line} is not UTF-8") from None


class _Interpreter:
    """Takes settings out one by one; what is left is unknown."""

    def __init__(self, settings: dict[str, Value], folder: Path) -> None:
        self._all = dict(settings)
        self._left = dict(settings)
        self._folder = folder
        self._asked: set[str] = set()
        self._warnings: list[str] = []

    def config(self) -> Config:
        name = check_name(self._text("name") or _nameless())
        kind = self._kind()
        disks = self._disks()
        config = Config(name, self._uuid(), kind, DomainOptions(), disks=disks, policy=self._policy())
        config.options = self._options(config)
        self._vnc(config)
        self._serial()
        self._processors()
        self._rest()
        config.settings = self._all | {"name": name, "uuid": config.uuid, "type": kind}
        config.warnings = self._warnings
        return config

    # ── values ──

    def _take(self, name: str) -> Value | None:
        self._asked.add(name)
        return self._left.pop(name, None)

    def _text(self, name: str) -> str:
        value = self._take(name)
        if isinstance(value, list):
            raise BadOptionError(f"{name} must be a string, not a list")
        return "" if value is None else str(value)

    def _number(self, name: str, default: int) -> int:
        value = self._take(name)
        if value is None:
            return default
        if isinstance(value, str):
            try:
                return int(value, 0)
            except ValueError:
                raise BadOptionError(f"{name} must be a number, not {value[:40]!r}") from None
        if isinstance(value, list):
            raise BadOptionError(f"{name} must be a number, not a list")
        return value

    def _texts(self, name: str) -> list[str]:
        value = self._take(name)
        if value is None or value == "":
            return []
        values: list[Value] = value if isinstance(value, list) else [value]
        texts = [one for one in values if isinstance(one, str)]
        if len(texts) != len(values):
            raise BadOptionError(f"{name} must be a list of strings")
        return texts

    def _path(self, name: str) -> str | None:
        text = self._text(name)
        return str(self._folder / text) if text else None

    # ── what they mean ──

    def _kind(self) -> str:
        kind, builder = self._text("type"), self._text("builder")
        if builder not in ("", "hvm", "generic", "linux"):
            raise BadOptionError(f"there is no builder {builder!r}")
        if not kind and builder:
            kind = "hvm" if builder == "hvm" else "pv"
        if not kind:
            kind = "pvh" if self._all.get("kernel") or not self._all.get("disk") else "hvm"
        if kind == "pv":
            raise UnsupportedError("nonroot runs no guests of type 'pv'; their kernels mostly boot with type='pvh' too")
        if kind not in ("pvh", "hvm"):
            raise BadOptionError(f"there is no type {kind!r}; there are: pvh, hvm")
        return kind

    def _uuid(self) -> str:
        text = self._text("uuid")
        try:
            return str(uuids.UUID(text)) if text else str(uuids.uuid4())
        except ValueError:
            raise BadOptionError(f"{text[:60]!r} is no UUID") from None

    def _disks(self) -> list[DiskSpec]:
        disks = [parse_disk(text, self._folder) for text in self._texts("disk")]
        by_number: dict[int, str] = {}
        for disk in disks:
            number = disk_index(disk.vdev)
            if number in by_number:
                raise BadOptionError(f"two disks have the same place: {by_number[number]} and {disk.vdev}")
            by_number[number] = disk.vdev
        return sorted(disks, key=lambda disk: disk_index(disk.vdev))

    def _policy(self) -> Policy:
        policy = Policy()
        for name in ("on_poweroff", "on_reboot", "on_crash"):
            action = self._text(name)
            if action in _MORE_ACTIONS:
                raise UnsupportedError(f"{name}: nonroot has no {action} yet; there are: {', '.join(ACTIONS)}")
            if action and action not in ACTIONS:
                raise BadOptionError(f"{name}: there is no action {action!r}; there are: {', '.join(ACTIONS)}")
            if action:
                setattr(policy, name, action)
        return policy

    def _options(self, config: Config) -> DomainOptions:
        memory = self._number("memory", 0)
        most = self._number("maxmem", 0)
        if min(memory, most) < 0 or (memory == 0 and "memory" in self._all and not most):
            raise BadOptionError(f"memory must be a positive number of MiB, not {min(memory, most)}")
        memory = memory or most or DEFAULT_MEMORY
        if most and most < memory:
            raise BadOptionError(f"maxmem ({most}) is less than memory ({memory}); both are in MiB")
        if most > memory:
            self._warnings.append(f"maxmem has no effect yet: the domain has {memory} MiB from start to end")
        kernel, ramdisk = self._path("kernel"), self._path("ramdisk")
        bios = self._text("bios") or self._text("firmware")
        boot = self._boot()
        firmware = self._firmware(config.kind, kernel, bios)
        cds = [disk for disk in config.disks if disk.is_cd]
        config.firmware = firmware
        config.default_guest = firmware is None and kernel is None
        if config.default_guest and config.disks:
            raise BadOptionError("a domain of type 'pvh' needs its kernel; disks alone boot with type='hvm'")
        if config.default_guest and ramdisk:
            raise BadOptionError("a ramdisk needs its kernel")
        networks = [parse_vif(text) for text in self._texts("vif")]
        chosen = self._all.get("nonroot_xen") is not None
        xen = bool(self._number("nonroot_xen", 0)) if chosen else (None if firmware is None else True)
        if networks and xen is False:
            raise UnsupportedError("vif: nonroot emulates no network cards, and Xen's need nonroot_xen=1")
        publish = self._texts("nonroot_publish")
        parse_networks(networks, publish)
        return DomainOptions(
            kernel=kernel,
            initrd=ramdisk,
            append=self._command_line(),
            memory=memory << 20,
            quiet=False,
            agent=False,
            engine=self._text("nonroot_engine") or "auto",
            protocol="pvh" if config.kind == "pvh" and kernel is not None else "auto",
            boot=boot,
            disks=[disk.drive() for disk in config.disks if not disk.is_cd],
            cdroms=[disk.drive() for disk in cds],
            reboot=config.policy.on_reboot == "restart",
            display=config.kind == "hvm" or bool(self._all.get("vnc")),
            xen=xen,
            networks=networks,
            publish=publish,
        )

    def _firmware(self, kind: str, kernel: str | None, bios: str) -> str | None:
        if bios and kind == "pvh":
            raise BadOptionError("a domain of type 'pvh' starts in its kernel; bios needs type='hvm'")
        if kind == "pvh" or kernel is not None:
            return None
        if "/" in bios:
            return str(self._folder / bios)
        if bios and bios not in FIRMWARE:
            raise BadOptionError(f"there is no bios {bios!r}; there are: {', '.join(FIRMWARE)}, or an image's path")
        return bios or "seabios"

    def _boot(self) -> str:
        boot = self._text("boot") or "cd"
        if "n" in boot:
            self._warnings.append("boot: nonroot's guests do not boot from a network yet, so n is left out")
            boot = boot.replace("n", "") or "cd"
        return boot

    def _command_line(self) -> str:
        cmdline, root, extra = self._text("cmdline"), self._text("root"), self._text("extra")
        if cmdline:
            if root or extra:
                self._warnings.append("root and extra have no effect beside cmdline")
            return cmdline
        return f"root={root} {extra}".strip() if root else extra

    def _vnc(self, config: Config) -> None:
        wanted = self._number("vnc", 0)
        listen, display, password = self._text("vnclisten"), self._number("vncdisplay", -1), self._text("vncpasswd")
        if not wanted or not (listen or display >= 0):
            return
        if listen.startswith("unix:"):
            address = listen
        elif ":" in listen.strip("[]") and display < 0:
            host, _, number = listen.rpartition(":")
            if not number.isdigit():
                raise BadOptionError(f"{listen[:60]!r} is no address for VNC")
            address = f"{host}:{5900 + int(number)}"
        else:
            address = f"{listen or '127.0.0.1'}:{5900 + display if display >= 0 else 0}"
        if not parse_address(address).is_unix and not password:
            raise BadOptionError("VNC on a TCP port needs vncpasswd; without vnclisten it has a private Unix socket")
        config.vnc = {"address": address, "password": password}

    def _serial(self) -> None:
        for text in self._texts("serial"):
            if text not in ("pty", "none", ""):
                raise UnsupportedError(f"serial: nonroot's first serial port is the console, 'pty'; not {text[:40]!r}")

    def _processors(self) -> None:
        if max(self._number("vcpus", 1), self._number("maxvcpus", 1)) > 1:
            raise UnsupportedError("nonroot's domains have one vCPU; leave vcpus and maxvcpus out, or say vcpus=1")

    def _rest(self) -> None:
        for name, reason in NOT_YET.items():
            value = self._take(name)
            if value not in (None, 0, "", "0", []):
                raise UnsupportedError(f"{name}: {reason}")
        no_effect = [name for name in self._left if name in WITHOUT_EFFECT]
        unknown = [name for name in self._left if name not in WITHOUT_EFFECT]
        if no_effect:
            self._warnings.append(f"no effect here: {', '.join(no_effect)}")
        known = [*self._asked, *WITHOUT_EFFECT]
        for name in unknown:
            near = difflib.get_close_matches(name, known, 1)
            self._warnings.append(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def settle_xen(config: Config) -> None:
    """Decide whether the domain is Xen's, once its kernel is known, and what follows for its disks and cards.

    As on a real Xen all are, but for kernels that know nothing of it. UnsupportedError for cards in such a domain.
    """
    options = config.options
    choose_xen(options, "say nonroot_xen=1")
    if options.xen is False:
        return
    if config.kind == "hvm" and options.kernel is not None:
        options.protocol = _pc_protocol(options.kernel)
    disks = [disk for disk in config.disks if not disk.is_cd]
    options.disks = [f"{drive},{disk.vdev}" for drive, disk in zip(options.disks, disks, strict=True)]
    # A card keeps its address when the domain is started again.
    options.networks = [with_mac(text) for text in options.networks]


def _pc_protocol(kernel: str) -> str:
    """How a Xen guest of type ``hvm`` enters its kernel: as from a PC's boot loader."""
    try:
        with Path(kernel).open("rb") as file:
            bootable = is_bzimage(file.read(BZIMAGE_HEAD))
    except OSError:
        return "auto"  # whoever opens it says why not
    if not bootable:
        return "auto"
    return "linux64" if kernel_bits(kernel) == 64 else "linux32"


def _nameless() -> str:
    raise BadOptionError("the domain needs a name: add name='NAME'")


def fetch_software(config: Config, show: Callable[[str, float], None] | None = None) -> str | None:
    """Fill in firmware, or the default guest, and what depends on them; returns a note for the user.

    SoftwareMissingError; UnsupportedError for what the kernel has no drivers for.
    """
    note = _fetch(config, show)
    settle_xen(config)
    return note


def _fetch(config: Config, show: Callable[[str, float], None] | None) -> str | None:
    options = config.options
    if config.firmware is not None:
        from nonroot.guests.packages import ovmf, seabios

        if config.firmware == "ovmf":
            options.firmware = str(ovmf(progress=show, allow_fetch=True))
            return None
        found = seabios(progress=show, allow_fetch=True)
        options.vga_bios = str(found.vga)
        options.firmware = str(found.image) if config.firmware == "seabios" else config.firmware
        return None
    if not config.default_guest:
        return None
    from nonroot import guests

    guest = guests.linux(guests.DEFAULT_FLAVOUR, progress=show, allow_fetch=True)
    options.kernel = str(guest.kernel)
    options.initrd = None if guest.initrd is None else str(guest.initrd)
    options.setup = guest.is_linux
    options.modules = None if guest.modules is None else str(guest.modules)
    return guest.note
