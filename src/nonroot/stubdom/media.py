"""What a device model is made of, and which media its drives have: another process would be given the same."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Media", "Parts"]


@dataclass(frozen=True, slots=True)
class Parts:
    """What the device model consists of."""

    devices: Sequence[str]
    """In order: ``display``, ``watchdog``, ``storage``."""
    drives: Sequence[dict[str, Any] | None] = ()
    """Four places for IDE drives, each {"cd", "serial", "medium"}; a medium is None, or {"image", "files"}: what
    :func:`nonroot.backends.handover.describe_image` says, and the number of its descriptors."""
    floppies: Sequence[dict[str, Any] | None] = ()
    """Media, likewise."""
    files: Sequence[int] = ()
    """The descriptors of all media, in order; they stay the caller's."""
    enabled: bool = False
    """Whether the IDE ports are decoded from the beginning."""


class Media:
    """What is in the drives now. Descriptors are copies of its own."""

    def __init__(self, parts: Parts) -> None:
        files = [os.dup(fd) for fd in parts.files]
        self._drives = [None if place is None else dict(place) for place in parts.drives]
        self._floppies = list(parts.floppies)
        self._files: dict[tuple[bool, int], list[int]] = {}
        self.unplugged: set[int] = set()
        """Places of disks that were taken off."""
        self._change: Callable[[], object] | None = None
        for number, place in enumerate(self._drives):
            self._files[False, number] = _take(files, None if place is None else place["medium"])
        for number, medium in enumerate(self._floppies):
            self._files[True, number] = _take(files, medium)

    def describe(self, parts: Parts) -> tuple[dict[str, Any], list[int]]:
        """As a process gets it, with the descriptors, which stay ours."""
        storage = {"drives": self._drives, "floppies": self._floppies, "enabled": parts.enabled}
        files = [fd for number in range(len(self._drives)) for fd in self._files[False, number]]
        files += [fd for number in range(len(self._floppies)) for fd in self._files[True, number]]
        return {"devices": list(parts.devices), "storage": storage}, files

    def change(self, floppy: bool, place: int, medium: dict[str, Any] | None, files: Sequence[int] = ()) -> None:
        """What is in a drive will be another medium: when :meth:`settle` is called."""

        def apply() -> None:
            for fd in self._files[floppy, place]:
                os.close(fd)
            self._files[floppy, place] = [os.dup(fd) for fd in files]
            if floppy:
                self._floppies[place] = medium
            else:
                drive = self._drives[place]
                assert drive is not None
                drive["medium"] = medium

        self._change = apply

    def plug(self, place: int, on: bool) -> None:
        """A disk will be on its cable, or off."""
        self._change = (lambda: self.unplugged.discard(place)) if on else (lambda: self.unplugged.add(place))

    def settle(self) -> None:
        """The change has been made."""
        change, self._change = self._change, None
        if change is not None:
            change()

    def forget(self) -> None:
        """It has not."""
        self._change = None

    def close(self) -> None:
        """Close the descriptors."""
        for files in self._files.values():
            while files:
                os.close(files.pop())


def _take(files: list[int], medium: dict[str, Any] | None) -> list[int]:
    count = 0 if medium is None else medium["files"]
    own, files[:count] = files[:count], []
    return own
