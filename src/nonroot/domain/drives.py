"""A domain's drives: which image is in which place, opened and locked, and changed while the guest runs.

A PC that is Xen's has its disks twice, as Xen's have: firmware finds them as IDE disks, and a guest that knows Xen
takes those off by the platform device's unplug protocol before it uses the same disks by their paravirtual drivers.
Never both: a paravirtual disk waits until its twin is off and flushed, and the twin is back only after a reset, when
the paravirtual one has ended. Image and lock are the domain's.
"""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.image import Image
from nonroot.backends.vdev import disk_index, disk_name
from nonroot.domain.options import DomainOptions
from nonroot.errors import BadOptionError, TransientError, UnsupportedError

if TYPE_CHECKING:  # a domain without drives, and the command line, do without the devices
    from nonroot.backends.overlay import OverlayImage
    from nonroot.backends.service import BlockService
    from nonroot.devices.block import BlockPort
    from nonroot.devices.storage import Storage
    from nonroot.domain.saved_devices import SavedMedium
    from nonroot.hvm.pc import Board
    from nonroot.stubdom.proxies import RemoteStorage

__all__ = [
    "EMPTY",
    "MOST_DISKS",
    "DiskPlan",
    "Drives",
    "Twin",
    "check_drives",
    "has_named_places",
    "ide_disks",
    "paravirtual_disks",
    "plan_disks",
]

EMPTY: Final = "none"
"""Instead of an image: an empty drive."""
IDE_PLACES: Final = 4
FLOPPY_PLACES: Final = 2
MOST_DISKS: Final = 16
"""Of Xen's: xvda to xvdp."""
FLOPPY_LARGEST: Final = 2_949_120
CD_ORDER: Final = (2, 3, 1, 0)
"""CD-ROM drives are on the secondary channel first, where firmware looks for them; disks take the other places."""


IDE: Final = "ide"
"""The option of a disk that is to be an emulated one although it need not."""
_PLACE: Final = re.compile(r"xvd[a-z]{1,2}|hd[a-d]|sd[a-p]")


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """What one disk of the options is to be."""

    image: str
    """With its options, as :class:`nonroot.backends.drive.Drive` parses them."""
    name: str | None
    """Among Xen's (``xvda``); None: it is none of them."""
    emulated: bool
    """Whether it is an IDE disk; with a name, until the guest unplugs it."""


@dataclass(frozen=True, slots=True)
class Twin:
    """A disk that is both: what Xen's half needs."""

    image: Image
    owned: bool
    """Whether Xen's half has to close the image."""
    drive: Drive


def check_drives(options: DomainOptions) -> None:
    """BadOptionError or BadFileError, one sentence, for drives that cannot be; images are looked at, not locked."""
    if options.xen is False and has_named_places(options):
        raise BadOptionError("only a domain with Xen's disks has names for their places: leave xvda and the like out")
    emulated = [plan for plan in plan_disks(options) if plan.emulated]
    if len(emulated) + len(options.cdroms) > IDE_PLACES:
        raise BadOptionError(f"a domain has at most {IDE_PLACES} disks and CD-ROM drives together that are emulated")
    if len(options.floppies) > FLOPPY_PLACES:
        raise BadOptionError(f"a domain has at most {FLOPPY_PLACES} floppy drives")
    for drive in _drives(options):
        drive.check()


def _place(text: str) -> tuple[str | None, str]:
    """A disk's place (``ide``, ``xvdb``), and the text without it: what is left is the image with its options."""
    path, *words = text.replace(",,", "\0").split(",")
    places = [word for word in words if word == IDE or _PLACE.fullmatch(word)]
    if len(places) > 1:
        raise BadOptionError(f"a disk has one place, not {' and '.join(places)}")
    rest = [path, *(word for word in words if word not in places)]
    return places[0] if places else None, ",".join(rest).replace("\0", ",,")


def _is_paravirtual(options: DomainOptions, place: str | None) -> bool:
    return options.xen is not False and place != IDE


def _wants_twin(options: DomainOptions, place: str | None) -> bool:
    """Whether a disk of Xen's is to be an emulated one, too: where firmware looks for it, or its name is one's."""
    return options.firmware is not None or (
        place is not None and not place.startswith("xvd") and options.protocol in ("linux64", "linux32")
    )


def has_named_places(options: DomainOptions) -> bool:
    """Whether a disk asks for a place among Xen's."""
    return any(_place(text)[0] not in (None, IDE) for text in options.disks)


def plan_disks(options: DomainOptions) -> list[DiskPlan]:
    """What each disk is to be, in the options' order. BadOptionError if two have one place, or there are too many.

    Of disks that are Xen's and emulated, the first ones are; IDE has no more than four places.
    """
    pairs = [_place(text) for text in options.disks]
    places = [place for place, _ in pairs if _is_paravirtual(options, place)]
    taken: dict[int, str] = {}
    for place in places:
        if place is None:
            continue
        other = taken.setdefault(disk_index(place), place)
        if places.count(place) > 1 or other != place:
            names = " and ".join(dict.fromkeys((other, place)))
            raise BadOptionError(f"two disks have the same place: {names}")
    free = iter([disk_name(index) for index in range(MOST_DISKS) if index not in taken])
    room = IDE_PLACES - len(options.cdroms) - (len(pairs) - len(places))
    found = []
    for place, image in pairs:
        if not _is_paravirtual(options, place):
            found.append(DiskPlan(image, None, True))
            continue
        name = place or next(free, None)
        if name is None:
            raise BadOptionError(f"a domain has at most {MOST_DISKS} disks, xvda to {disk_name(MOST_DISKS - 1)}")
        emulated = room > 0 and _wants_twin(options, place)
        room -= emulated
        found.append(DiskPlan(image, name, emulated))
    return found


def ide_disks(options: DomainOptions) -> list[str]:
    """The images of disks that are emulated."""
    return [plan.image for plan in plan_disks(options) if plan.emulated]


def paravirtual_disks(options: DomainOptions) -> list[tuple[str, str]]:
    """The names of Xen's disks, and their images."""
    return [(plan.name, plan.image) for plan in plan_disks(options) if plan.name is not None]


def _described(image: Image) -> tuple[dict[str, Any], list[int]]:
    from nonroot.backends.handover import describe_image

    found = describe_image(image)
    if found is None:
        raise UnsupportedError(
            "an image that qemu-nbd serves cannot be given to a device model of its own: use device model 'internal'"
        )
    return found


def _disk(text: str) -> Drive:
    return Drive.parse(_place(text)[1])


def _cd(text: str) -> Drive:
    drive = Drive.parse(text, "CD image")
    if drive.overlay:
        raise BadOptionError(f"a CD is read-only, so an overlay on {drive.path} would be of no use")
    return Drive(drive.path, True, False, drive.backing, drive.format, drive.what)


def _floppy(text: str) -> Drive:
    return Drive.parse(text, "floppy image")


def _drives(options: DomainOptions) -> list[Drive]:
    groups: tuple[tuple[Callable[[str], Drive], list[str]], ...] = (
        (_disk, options.disks),
        (_cd, options.cdroms),
        (_floppy, options.floppies),
    )
    return [parse(text) for parse, texts in groups for text in texts if parse is _disk or text != EMPTY]


class Drives:
    """Opens and locks all images when it is made; the loop's thread uses it, except for :meth:`attach`."""

    def __init__(self, options: DomainOptions, layers: dict[str, tuple[int, int]] | None = None) -> None:
        """BadFileError, BadOptionError or UnsupportedError for the first image that cannot be used.

        ``layers``: what is in overlays already, by the names that :meth:`suspend` gives; taken out.
        """
        self._layers = {} if layers is None else layers
        self._media: list[tuple[Image, Drive]] = []
        self._virtual_time = options.virtual_time
        self._firmware = options.firmware is not None
        self._open: list[Image] = []
        self._services: list[BlockService] = []
        self._board: Board | None = None
        self.storage: Storage | None = None
        """The controllers, once attached."""
        self._remote: RemoteStorage | None = None  # the same, if they are in another process
        self._given: dict[tuple[str, int], Image] = {}  # that other process's
        try:
            plans = [plan for plan in plan_disks(options) if plan.emulated]
            disks = [self._image(_disk(plan.image), f"disk{index}") for index, plan in enumerate(plans)]
            cds = [None if text == EMPTY else self._image(_cd(text)) for text in options.cdroms]
            self._floppies = [
                None if text == EMPTY else self._floppy_image(text, f"fd{index}")
                for index, text in enumerate(options.floppies)
            ]
            self._disks = disks
        except BaseException:
            self.close()
            raise
        self._places: list[tuple[bool, Image | None] | None] = [None] * IDE_PLACES
        for place, cd in zip(CD_ORDER, cds, strict=False):
            self._places[place] = (True, cd)
        free = (place for place in range(IDE_PLACES) if self._places[place] is None)
        self._twins: dict[int, tuple[str, Image, Drive]] = {}
        for place, disk, plan in zip(free, disks, plans, strict=False):
            self._places[place] = (False, disk)
            if plan.name is not None:
                self._twins[place] = plan.name, disk, _disk(plan.image)
        self._twin_services: dict[int, BlockService] = {}
        self.on_twins: Callable[[set[str]], object] = lambda names: None
        """Called in the vCPU's thread, with the names of Xen's disks whose twins are off, when that has changed."""
        self._cd_places = CD_ORDER[: len(cds)]
        self.wanted = bool(disks or cds or self._floppies or self._firmware)
        """Whether the machine has controllers at all."""

    def _image(self, drive: Drive, name: str = "") -> Image:
        image = open_image(drive, self._layers.pop(name, None))
        self._open.append(image)
        self._media.append((image, drive))
        return image

    def _floppy_image(self, text: str, name: str = "") -> Image:
        drive = _floppy(text)
        image = self._image(drive, name)
        if image.size > FLOPPY_LARGEST:
            raise BadOptionError(f"the {drive.what} {drive.path} has {image.size} bytes, more than a floppy of 2.88 MB")
        return image

    def attach(self, board: "Board") -> None:
        """Put the drives onto the board. In the thread that makes the machine."""
        from nonroot.devices.ide_unit import CdRom, Disk
        from nonroot.devices.storage import attach_storage
        from nonroot.xen.platform_pci import XenPlatform

        self._board = board
        drives: list[Disk | CdRom | None] = []
        for number, place in enumerate(self._places):
            if place is None:
                drives.append(None)
                continue
            is_cd, image = place
            port = None if image is None else self._service(image)
            if port is not None and number in self._twins:
                self._twin_services[number] = port
            serial = f"NR{number + 1:08d}"
            if is_cd:
                drives.append(CdRom(port, serial))
            else:
                assert port is not None
                drives.append(Disk(port, serial))
        floppies: list[BlockPort | None] = [None if i is None else self._service(i) for i in self._floppies]
        self.storage = attach_storage(board, drives, floppies, enabled=not self._firmware)
        platform = next((device for device in board.devices if isinstance(device, XenPlatform)), None)
        if platform is not None:
            platform.unplug = self._unplug

    # ── saved domains ──

    def _present(self) -> dict[str, Image]:
        """What is in the drives now, by their names."""
        found = {f"disk{index}": image for index, image in enumerate(self._disks)}
        storage = self.storage
        if storage is None:
            return found
        for index, place in enumerate(self._cd_places):
            drive = storage.ide.units[place].drive
            found |= {} if drive is None or drive.port is None else {f"cd{index}": _image_of(drive.port)}
        for index, port in enumerate([] if storage.floppy is None else storage.floppy.media):
            found |= {} if port is None else {f"fd{index}": _image_of(port)}
        return found

    def check_can_be_forked(self) -> None:
        """UnsupportedError if there is an image that the guest writes to."""
        from nonroot.domain.saved_devices import check_can_be_forked

        for name, image in self._present().items():
            if not name.startswith("cd"):
                check_can_be_forked(self._drive(image))

    def suspend(self) -> "tuple[SavedMedium, ...]":
        """Have what was written in the images, while no vCPU runs; what is to be saved. TransientError.

        In the vCPU's thread. Requests that are done but not answered are made again by whoever goes on.
        """
        from nonroot.domain.saved_devices import SavedMedium, identity

        try:
            for service in self._services:
                service.settle()
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise TransientError(f"a disk image cannot be written: {reason}") from None
        present = [(name, image, self._drive(image)) for name, image in self._present().items()]
        return tuple(SavedMedium(name, drive, image.size, identity(drive)) for name, image, drive in present)

    def overlays(self) -> "dict[str, OverlayImage]":
        """Overlays by the names of their drives."""
        from nonroot.backends.overlay import OverlayImage

        return {name: image for name, image in self._present().items() if isinstance(image, OverlayImage)}

    def inserted(self) -> tuple[list[str], list[str]]:
        """The options of CDs and floppies, such that the same are in the drives."""
        present = self._present()

        def text(name: str) -> str:
            return str(self._drive(present[name])) if name in present else EMPTY

        cds = [text(f"cd{index}").removesuffix(",ro") for index in range(len(self._cd_places))]
        return cds, [text(f"fd{index}") for index in range(len(self._floppies))]

    def _drive(self, image: Image) -> Drive:
        return next(drive for known, drive in self._media if known is image)

    # ── a device model in another process ──

    def describe(self) -> tuple[list[dict[str, Any] | None], list[dict[str, Any] | None], list[int]]:
        """
        What a device model in another process needs: its drives, its floppies, and descriptors of their media.

        See :class:`nonroot.stubdom.model.Parts`. UnsupportedError for an image that cannot be given away.
        """
        files: list[int] = []

        def medium(place: tuple[str, int], image: Image | None) -> dict[str, Any] | None:
            if image is None:
                return None
            description, more = _described(image)
            self._given[place] = image
            files.extend(more)
            return {"image": description, "files": len(more)}

        drives: list[dict[str, Any] | None] = []
        for number, found in enumerate(self._places):
            if found is None:
                drives.append(None)
                continue
            is_cd, image = found
            serial = f"NR{number + 1:08d}"
            drives.append({"cd": is_cd, "serial": serial, "medium": medium(("cd", number), image)})
        floppies = [medium(("fd", number), image) for number, image in enumerate(self._floppies)]
        return drives, floppies, files

    def attach_remote(self, board: "Board", storage: "RemoteStorage") -> None:
        """The drives are on the board, in another process."""
        from nonroot.xen.platform_pci import XenPlatform

        self._remote = storage
        platform = next((device for device in board.devices if isinstance(device, XenPlatform)), None)
        if platform is not None:
            platform.unplug = self._unplug

    # ── disks that are Xen's, too ──

    def twins(self) -> dict[str, Twin]:
        """Of each such disk, by Xen's name: what Xen's half uses while the emulated one is off. To be called once.

        Files are shared by descriptors, so that the lock is one; other images by one object.
        """
        from nonroot.backends.handover import describe_image, image_from

        found = {}
        for name, image, drive in self._twins.values():
            described = describe_image(image)
            if described is None:
                found[name] = Twin(image, False, drive)
            else:
                description, files = described
                found[name] = Twin(image_from(description, [os.dup(fd) for fd in files]), True, drive)
        return found

    def _unplug(self, mask: int) -> None:
        """The guest has given up what ``mask`` says, or a reset has given all back. In the vCPU's thread."""
        from nonroot.backends.raw import RawImage
        from nonroot.xen.platform_pci import UNPLUG_AUXILIARY, UNPLUG_DISKS

        storage, remote = self.storage, self._remote
        off = set()
        for place, (name, image, _) in self._twins.items():
            if mask & UNPLUG_DISKS or (mask & UNPLUG_AUXILIARY and place > 0):
                with contextlib.suppress(OSError):  # a full or failing disk: the guest was told of its writes
                    if remote is not None:
                        remote.unplug(place)
                    elif storage is not None:
                        storage.ide.unplug(place)
                        self._twin_services[place].settle()
                off.add(name)
            else:
                if isinstance(image, RawImage):
                    image.look_again()
                if remote is not None:
                    remote.plug(place)
                elif storage is not None:
                    storage.ide.plug(place)
        self.on_twins(off)

    def _service(self, image: Image) -> "BlockService":
        from nonroot.backends.service import LATENCY_NS, BlockService

        board = self._board
        assert board is not None
        service = BlockService(image, board.post, board.clock, LATENCY_NS if self._virtual_time else None)
        self._services.append(service)
        return service

    # ── media, while the guest runs ──

    def _place(self, name: str) -> tuple[str, int]:
        """("cd", IDE unit) or ("fd", drive). BadOptionError, UnsupportedError."""
        kind, number = name[:2], name[2:]
        known = {"cd": self._cd_places, "fd": tuple(range(len(self._floppies)))}
        if kind not in known or not number.isascii() or not number.isdigit():
            raise BadOptionError(f"there is no drive {name!r}: use cd0, cd1, fd0 or fd1")
        if int(number) >= len(known[kind]) or (self.storage is None and self._remote is None):
            raise UnsupportedError(f"this domain was made without the drive {name}")
        return kind, known[kind][int(number)]

    def eject(self, name: str, force: bool) -> Callable[[], dict[str, Any]]:
        """What takes the medium out, in the vCPU's thread; it says {"ejected": false} if the guest has locked it."""
        kind, place = self._place(name)
        remote = self._remote
        if remote is not None:
            return lambda: {"ejected": self._ejected(kind, place, remote.eject(kind == "fd", place, force))}
        storage = self.storage
        assert storage is not None

        def take_out() -> dict[str, Any]:
            if kind == "fd":
                assert storage.floppy is not None
                storage.floppy.insert(place, None)
                return {"ejected": True}
            return {"ejected": storage.ide.eject(place, force)}

        return take_out

    def insert(self, name: str, text: str) -> Callable[[], dict[str, Any]]:
        """Open an image now; what puts it into the drive is to be called in the vCPU's thread."""
        kind, place = self._place(name)
        image = self._floppy_image(text) if kind == "fd" else self._image(_cd(text))
        remote = self._remote
        if remote is not None:
            try:
                description, files = _described(image)
            except UnsupportedError:
                self._open.remove(image)
                image.close()
                raise

            def give() -> dict[str, Any]:
                remote.insert(kind == "fd", place, description, files)
                self._ejected(kind, place, True)
                self._given[kind, place] = image
                return {}

            return give
        service = self._service(image)
        storage = self.storage
        assert storage is not None

        def put_in() -> dict[str, Any]:
            if kind == "fd":
                assert storage.floppy is not None
                storage.floppy.insert(place, service)
            else:
                storage.ide.insert(place, service)
            return {}

        return put_in

    def _ejected(self, kind: str, place: int, is_out: bool) -> bool:
        image = self._given.pop((kind, place), None) if is_out else None
        if image is not None:
            self._open = [other for other in self._open if other is not image]
            self._media = [pair for pair in self._media if pair[0] is not image]
            with contextlib.suppress(OSError):
                image.close()
        return is_out

    def release(self) -> None:
        """Close images that are in no drive any more."""
        storage = self.storage
        if storage is None:
            return
        ports = [unit.drive.port for unit in storage.ide.units if unit.drive is not None]
        ports += storage.floppy.media if storage.floppy is not None else []
        ports += self._twin_services.values()
        for service in [service for service in self._services if all(service is not port for port in ports)]:
            self._services.remove(service)
            self._open = [image for image in self._open if image is not service.image]
            self._media = [pair for pair in self._media if pair[0] is not service.image]
            with contextlib.suppress(OSError):
                service.close()

    def close(self) -> None:
        """Close everything, in any thread; what is on its way may fail."""
        for image in self._open:
            with contextlib.suppress(OSError):
                image.close()
        self._open.clear()


def _image_of(port: "BlockPort") -> Image:
    """What is behind a drive's medium."""
    from nonroot.backends.service import BlockService

    assert isinstance(port, BlockService)
    return port.image
