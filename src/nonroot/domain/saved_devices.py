"""What a saved domain's file says of its disks, drives and cards, and how they are made again.

The guest's half is in its memory, in XenStore's nodes and among its event channels. Ours is little: which image or
network each device has, in which state its backend was, and what is in an overlay. Images are not in the file: each
has to be as it was, and that is checked by its size and time of change.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nonroot.backends.drive import Drive
from nonroot.backends.image import MAXIMUM
from nonroot.backends.overlay import CLUSTER, OverlayImage, new_layer
from nonroot.domain.networks import Network
from nonroot.errors import BadFileError, NonrootError, UnsupportedError
from nonroot.hvm.device import StateError
from nonroot.hvm.ram import data_extents
from nonroot.saved.container import Reader, Writer
from nonroot.saved.fields import Fields

__all__ = [
    "Layer",
    "SavedCard",
    "SavedDevices",
    "SavedDisk",
    "SavedMedium",
    "check_can_be_forked",
    "identity",
    "layer_names",
    "put_layer",
    "read_layer",
]

MOST_DEVICES: Final = 64
LAYER: Final = "layer."
"""How the names of overlays' contents begin; the disk's name follows."""
MAP: Final = "map."
"""The same for the maps of their clusters."""
LARGEST_MAP: Final = 1 << 27

Layer = tuple[int, int]
"""Descriptors of an overlay's contents and of the map of its clusters (:meth:`OverlayImage.layer`)."""


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """One of Xen's disks."""

    vdev: str
    number: int
    drive: Drive
    cdrom: bool
    state: int
    """The backend's, a XenbusState."""
    size: int
    """Bytes that the guest sees."""
    identity: tuple[int, int]
    """Size in bytes and time of change (ns) of the image's file."""
    twin: str = ""
    """What the emulated disk is called that is the same; empty: there is none."""
    waits: bool = False
    """Whether that one is the guest's, still."""

    def to_json(self) -> dict[str, Any]:
        """For :meth:`SavedDevices.from_json`."""
        return {
            "vdev": self.vdev,
            "number": self.number,
            "drive": str(self.drive),
            "cdrom": self.cdrom,
            "state": self.state,
            "size": self.size,
            "identity": list(self.identity),
            "twin": self.twin,
            "waits": self.waits,
        }


@dataclass(frozen=True, slots=True)
class SavedMedium:
    """What is in an emulated drive."""

    name: str
    """``disk0`` to ``disk3`` in the order of the options, ``cd0``, ``fd0`` …"""
    drive: Drive
    size: int
    identity: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """For :meth:`SavedDevices.from_json`."""
        return {"name": self.name, "drive": str(self.drive), "size": self.size, "identity": list(self.identity)}


@dataclass(frozen=True, slots=True)
class SavedCard:
    """One network card."""

    number: int
    network: Network
    """With its address."""
    state: int

    def to_json(self) -> dict[str, Any]:
        """For :meth:`SavedDevices.from_json`."""
        publish = [str(one) for one in self.network.publish]
        return {"number": self.number, "network": str(self.network), "publish": publish, "state": self.state}


@dataclass(frozen=True, slots=True)
class SavedDevices:
    """All of them."""

    disks: tuple[SavedDisk, ...] = ()
    cards: tuple[SavedCard, ...] = ()
    media: tuple[SavedMedium, ...] = ()

    @property
    def of_xen(self) -> bool:
        """Whether one of Xen's is among them."""
        return bool(self.disks or self.cards)

    @property
    def overlays(self) -> dict[str, int]:
        """Names of the overlays, and the sizes of their disks in bytes."""
        found = {f"xvd{disk.number}": disk.size for disk in self.disks if disk.drive.overlay and not disk.twin}
        return found | {medium.name: medium.size for medium in self.media if medium.drive.overlay}

    def check_images(self) -> None:
        """BadFileError if an image is not as the guest left it."""
        images: list[SavedDisk | SavedMedium] = [*self.disks, *self.media]
        for one in images:
            if identity(one.drive) != one.identity:
                raise BadFileError(
                    f"the {one.drive.what} {one.drive.path} has been changed since the domain was saved, and its guest "
                    "would destroy what is there now: bring it back as it was then, with its time (cp -p keeps that)"
                )

    def to_json(self) -> dict[str, Any]:
        """For a file."""
        groups: dict[str, Sequence[SavedDisk | SavedCard | SavedMedium]] = {
            "disks": self.disks, "cards": self.cards, "media": self.media,
        }  # fmt: skip
        return {name: [one.to_json() for one in group] for name, group in groups.items()}

    @classmethod
    def from_json(cls, fields: Fields) -> "SavedDevices":
        """StateError, or BadOptionError, for what cannot be."""
        disks, cards, media = fields.records("disks"), fields.records("cards"), fields.records("media")
        if len(disks) + len(cards) + len(media) > MOST_DEVICES:
            raise StateError("domain state: there are too many devices")
        found = cls(tuple(map(_disk, disks)), tuple(map(_card, cards)), tuple(map(_medium, media)))
        numbers = [("vbd", disk.number) for disk in found.disks] + [("vif", card.number) for card in found.cards]
        names = [medium.name for medium in found.media]
        if len(set(numbers)) != len(numbers) or len(set(names)) != len(names):
            raise StateError("domain state: two devices have one number")
        return found


def _disk(fields: Fields) -> SavedDisk:
    cdrom = fields.flag("cdrom")
    return SavedDisk(
        fields.text("vdev", 20),
        fields.number("number", (1 << 29) - 1),
        Drive.parse(fields.text("drive", 1 << 13), "CD image" if cdrom else "disk image"),
        cdrom,
        _state(fields),
        fields.number("size", MAXIMUM),
        _identity(fields),
        fields.text("twin", 20),
        fields.flag("waits"),
    )


def _medium(fields: Fields) -> SavedMedium:
    drive = Drive.parse(fields.text("drive", 1 << 13))
    return SavedMedium(fields.text("name", 20), drive, fields.number("size", MAXIMUM), _identity(fields))


def _identity(fields: Fields) -> tuple[int, int]:
    known = fields.numbers("identity")
    if len(known) != 2:
        raise StateError("domain state: a disk image's size and time are none")
    return known[0], known[1]


def _card(fields: Fields) -> SavedCard:
    return SavedCard(
        fields.number("number", 255),
        Network.parse(fields.text("network", 400), fields.texts("publish")),
        _state(fields),
    )


def _state(fields: Fields) -> int:
    return fields.number("state", 6)


def check_can_be_forked(drive: Drive) -> None:
    """UnsupportedError for an image that the guest writes to."""
    if not drive.read_only and not drive.overlay:
        raise UnsupportedError(
            f"the guest writes to the {drive.what} {drive.path}, so that no other can go on from it: give the domain "
            "the disk with ,overlay (its changes are thrown away) or ,ro"
        )


def identity(drive: Drive) -> tuple[int, int]:
    """An image's size in bytes, and its time of change; zeros if it cannot be looked at."""
    try:
        status = Path(drive.path).stat()
    except OSError:
        return (0, 0)
    return (status.st_size, status.st_mtime_ns)


# ── overlays ──


def layer_names(reader: Reader) -> set[str]:
    """Of the memories and records in a file that belong to overlays."""
    return {name for name in (*reader.memories, *reader.names) if name.startswith((LAYER, MAP))}


def put_layer(writer: Writer, name: str, image: OverlayImage) -> None:
    """Write what is in an overlay, while nobody writes to it."""
    with image.contents() as (contents, bits):
        layer = image.layer()
        if layer is None:
            raise BadFileError("an overlay of an image of more than 16 TiB cannot be saved")
        writer.record(f"{MAP}{name}", bytes(bits).rstrip(b"\0"))
        writer.memory(f"{LAYER}{name}", contents, data_extents(layer[0]))


def read_layer(reader: Reader, name: str, size: int) -> Layer:
    """An overlay's contents out of a file, for an image of ``size`` bytes; the caller's. BadFileError, StateError."""
    bits, clusters = reader.record(f"{MAP}{name}"), -(-size // CLUSTER)
    if len(bits) > min(LARGEST_MAP, -(-clusters // 8)):
        raise StateError("domain state: an overlay is larger than its disk")
    if not 0 <= reader.memories.get(f"{LAYER}{name}", -1) <= clusters * CLUSTER:
        raise StateError("domain state: an overlay is larger than its disk")
    contents, bitmap = new_layer(size)
    try:
        os.pwrite(bitmap, bits, 0)
        for run in reader.runs(f"{LAYER}{name}"):
            view, place = run.contents, run.first * CLUSTER
            while len(view):
                done = os.pwrite(contents, view, place)
                view, place = view[done:], place + done
    except (NonrootError, OSError):
        os.close(contents)
        os.close(bitmap)
        raise
    return contents, bitmap
