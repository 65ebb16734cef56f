"""What a user says of a drive, and the image that it names."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nonroot.backends.image import Image
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.raw import RawImage, open_file
from nonroot.errors import BadFileError, BadOptionError

__all__ = ["FORMATS", "Drive", "open_image"]

FORMATS: Final = ("raw", "qcow2", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels")
"""Formats of images; all but raw are read by QEMU's storage daemon."""
SUFFIXES: Final = {
    ".qcow2": "qcow2", ".qed": "qed", ".vmdk": "vmdk", ".vdi": "vdi", ".vhd": "vpc", ".vpc": "vpc", ".vhdx": "vhdx",
    ".hdd": "parallels",
}  # fmt: skip
"""Endings of names that stand for a format; any other is raw. The contents never decide: a guest could write them."""
MAGICS: Final = {
    b"QFI\xfb": "qcow2", b"QED\0": "qed", b"KDMV": "vmdk", b"conectix": "vpc", b"vhdxfile": "vhdx",
    b"WithoutFreeSpace": "parallels", b"<<< ": "vdi",
}  # fmt: skip
"""How files of the formats begin, for a warning."""


@dataclass(frozen=True, slots=True)
class Drive:
    """``IMG[,ro][,overlay][,backing][,format=NAME]``; a comma in the path is written twice."""

    path: str
    read_only: bool = False
    overlay: bool = False
    """Changes go to a layer that is thrown away."""
    backing: bool = False
    """The image may name another file that lies below it."""
    format: str | None = None
    """One of :data:`FORMATS`; None takes it from the file's name."""
    what: str = "disk image"

    @classmethod
    def parse(cls, text: str, what: str = "disk image") -> "Drive":
        """BadOptionError for words that mean nothing, or that exclude each other.

        >>> Drive.parse("a,,b.img,ro")
        Drive(path='a,b.img', read_only=True, overlay=False, backing=False, format=None, what='disk image')
        """
        path, *words = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
        if not path:
            raise BadOptionError(f"{text!r} names no {what}")
        known = {"ro": False, "overlay": False, "backing": False}
        chosen: str | None = None
        for word in words:
            if word in known:
                known[word] = True
            elif word.startswith("format="):
                chosen = word.removeprefix("format=")
                if chosen not in FORMATS:
                    raise BadOptionError(f"there is no image format {chosen!r}; there are: {', '.join(FORMATS)}")
            else:
                raise BadOptionError(
                    f"{word!r} is no option of a {what}: use ro, overlay, backing or format=NAME, "
                    "and write a comma in a path twice"
                )
        if known["ro"] and known["overlay"]:
            raise BadOptionError(f"ro and overlay exclude each other for the {what} {path}")
        return cls(os.path.abspath(path), known["ro"], known["overlay"], known["backing"], chosen, what)  # noqa: PTH100

    def __str__(self) -> str:
        """What :meth:`parse` makes the same of."""
        words = {"ro": self.read_only, "overlay": self.overlay, "backing": self.backing}
        chosen = [] if self.format is None else [f"format={self.format}"]
        return ",".join([self.path.replace(",", ",,"), *(word for word, said in words.items() if said), *chosen])

    @property
    def effective_format(self) -> str:
        """The format that the user or the file's name says."""
        return self.format or SUFFIXES.get(Path(self.path).suffix.lower(), "raw")

    def check(self) -> None:
        """BadFileError, one sentence, if the image is missing, no file, empty, or cannot be read (and written)."""
        fd = open_file(self.path, self.read_only or self.overlay, self.what)
        try:
            head = os.pread(fd, 16, 0)
            if not head:
                raise BadFileError(f"the {self.what} {self.path} is empty")
            if self.format is None and self.effective_format == "raw":
                for magic, name in MAGICS.items():
                    if head.startswith(magic):
                        raise BadFileError(
                            f"the {self.what} {self.path} begins like a {name} image: add format={name}, or format=raw "
                            "if it is none"
                        )
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadFileError(f"the {self.what} {self.path} cannot be read: {reason}") from None
        finally:
            os.close(fd)


def open_image(drive: Drive, layer: tuple[int, int] | None = None) -> Image:
    """
    Open and lock what ``drive`` names. BadFileError, UnsupportedError (a missing program) in one sentence.

    ``layer``: what is in its overlay already, as descriptors that are the image's from now on.
    """
    drive.check()
    below_read_only = drive.read_only or drive.overlay
    image: Image
    if drive.effective_format == "raw":
        image = RawImage(drive.path, below_read_only, drive.what)
    else:
        from nonroot.backends.qemu import open_foreign

        image = open_foreign(drive.path, drive.effective_format, below_read_only, drive.backing, drive.what)
    if not drive.overlay:
        return image
    try:
        return OverlayImage(image) if layer is None else OverlayImage.adopt(image, *layer)
    except BaseException:
        image.close()
        raise
