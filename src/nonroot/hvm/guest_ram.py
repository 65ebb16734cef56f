"""A domain's RAM and the files behind it: shared with other processes, or its own over a base that stays as it is.

Private RAM shows files that nobody changes any more (a kept boot, or the memory that a domain had when it was forked);
the host copies a page when it is first written. So a domain that goes on from there has its memory at once, and pays
for what it changes. Others cannot see such changes through the files. Whoever needs that (backends, tools that look at
guest memory, a save) has the RAM shared first: its contents are put into a file of its own, at the same host addresses.

A fork of private RAM puts what has changed into another file, a layer over those before, and both domains are private
over all of them.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self

from nonroot._engine import Memory
from nonroot.errors import OutOfMemoryError
from nonroot.hvm.device import StateError
from nonroot.hvm.memory_map import PAGE_SIZE
from nonroot.hvm.ram import data_extents
from nonroot.saved.fields import Fields

__all__ = ["MOST_LAYERS", "GuestRam", "RamBase"]

RAM: Final = 0
"""The number of the RAM's backing."""
COPY_STEP: Final = 64 << 20
MOST_LAYERS: Final = 12
"""More are put into one file."""
MOST_RUNS: Final = 3000
"""So many pieces of a base's layers are mapped at most; the kernel takes some 65,000 for a process."""
GAP: Final = 3
"""Pages between changed ones that are written along with them, for fewer pieces."""

Run = tuple[int, int, int]
"""(offset, bytes, number of the layer) of a piece of RAM."""


class RamBase:
    """The files over which RAM is private: the first for all of it, others for pieces. Owns their descriptors."""

    def __init__(self, layers: Sequence[tuple[int, int]], runs: Sequence[Run] = ()) -> None:
        """``layers``: of each (descriptor, where the RAM begins in it). ``runs``, ascending, lie in other layers."""
        self.layers = list(layers)
        self.runs = list(runs)

    @classmethod
    def described(cls, record: object, files: Sequence[int], size: int) -> Self:
        """What :meth:`description` gave, over ``files``, which are its own then. StateError."""
        fields = Fields("RAM", record)
        offsets = fields.numbers("layers")
        flat = fields.numbers("runs", size)
        if len(offsets) != len(files) or not offsets or len(flat) % 3 or any(offset % PAGE_SIZE for offset in offsets):
            raise StateError("RAM state: its files are others")
        for file, offset in zip(files, offsets, strict=True):
            if os.fstat(file).st_size < offset + size:
                raise StateError("RAM state: a file of it is too short")
        runs = list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))
        place = 0
        for start, length, layer in runs:
            if start < place or not length or (start | length) % PAGE_SIZE or not 0 < layer < len(files):
                raise StateError("RAM state: its pieces are no pieces")
            place = start + length
        if place > size:
            raise StateError("RAM state: a piece lies outside")
        return cls(list(zip(files, offsets, strict=True)), runs)

    def description(self) -> dict[str, Any]:
        """JSON for :meth:`described`."""
        return {
            "layers": [offset for _, offset in self.layers],
            "runs": [number for run in self.runs for number in run],
        }

    def copy(self) -> "RamBase":
        """Another one over the same files."""
        return RamBase([(os.dup(file), offset) for file, offset in self.layers], self.runs)

    def over(self, file: int, changed: Sequence[tuple[int, int]]) -> "RamBase":
        """The same with ``changed`` (offset, bytes), in the layer ``file``, over it."""
        merged = sorted([*_without(self.runs, changed), *((*piece, len(self.layers)) for piece in changed)])
        used = sorted({0, *(layer for _, _, layer in merged)})
        files = [*self.layers, (file, 0)]
        layers = [(os.dup(files[layer][0]), files[layer][1]) for layer in used]
        return RamBase(layers, [(start, length, used.index(layer)) for start, length, layer in merged])

    def map(self, memory: Memory) -> None:
        """Have the RAM private over it. OSError."""
        memory.remap(RAM, *self.layers[0], True)
        self.map_runs(memory)

    def map_runs(self, memory: Memory) -> None:
        """The same but for what lies in the first layer."""
        for start, length, layer in self.runs:
            file, offset = self.layers[layer]
            memory.remap_part(RAM, start, length, file, offset + start, True)

    def write(self, target: int, size: int) -> None:
        """Write all of it into a file, which is empty. OSError."""
        first, offset = self.layers[0]
        for start, length in _within(data_extents(first, offset), offset, size):
            _copy(first, start, target, start - offset, length)
        for start, length, layer in self.runs:
            file, offset = self.layers[layer]
            _copy(file, offset + start, target, start, length)

    def close(self) -> None:
        """Close the files."""
        while self.layers:
            os.close(self.layers.pop()[0])


class GuestRam:
    """The RAM of one machine. In the vCPU's thread, between two instructions; while nobody else writes to it."""

    def __init__(self, memory: Memory, files: list[int], size: int, base: RamBase | None) -> None:
        """``files``: of each backing a descriptor, the RAM's first. ``base``: of private RAM, already mapped."""
        self._memory = memory
        self._files = files
        self._size = size
        self._base = None if base is None else base.copy()
        self._remembered: RamBase | None = None
        self._still_remembered = False  # whether it is private over just that
        self.on_change: Callable[[], object] = lambda: None
        """Called when another file is behind the RAM."""

    @property
    def is_private(self) -> bool:
        """Whether others cannot see it."""
        return self._base is not None

    def begin(self, base: RamBase) -> None:
        """Be private over ``base``, whatever was there before. OutOfMemoryError."""
        try:
            base.map(self._memory)
        except OSError as error:
            raise OutOfMemoryError(f"the host cannot map the memory: {error.strerror}") from None
        old, self._base = self._base, base.copy()
        if old is not None:
            old.close()
        self._show(base.layers[0][0])
        self.on_change()

    def share(self) -> None:
        """Have it in a file of its own, ``files[0]``. Nothing happens if it is. OutOfMemoryError."""
        base = self._base
        if base is None:
            return
        fd = os.memfd_create("nonroot-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self._size)
            base.write(fd, self._size)
            self._memory.write_private(RAM, fd)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory.remap(RAM, fd, 0, False)
            self._show(fd)
        except OSError as error:
            raise OutOfMemoryError(f"the host cannot give {self._size >> 20} MiB of memory: {error.strerror}") from None
        finally:
            os.close(fd)
        self._base, self._still_remembered = None, False
        base.close()
        self.on_change()

    def freeze(self) -> RamBase:
        """
        Have it in files that stay as they are now, over which it is private from now on: a copy of those.

        OutOfMemoryError.
        """
        try:
            if self._base is not None and not self._add_layer(self._base):
                self.share()
            if self._base is None:
                self._base = RamBase([(_reopened(self._files[RAM]), 0)])
                self._base.map(self._memory)
                self.on_change()
            return self._base.copy()
        except OSError as error:
            raise OutOfMemoryError(f"the host cannot map the memory again: {error.strerror}") from None

    def remember(self) -> None:
        """:meth:`freeze`, and be able to :meth:`revert` to what it is now. OutOfMemoryError."""
        base = self.freeze()
        if self._remembered is not None:
            self._remembered.close()
        self._remembered, self._still_remembered = base, True

    def revert(self) -> None:
        """As it was at the last :meth:`remember`; nothing happens without. The vCPUs are to be flushed."""
        if self._remembered is None:
            return
        self._memory.revert(RAM)  # also tells whoever caches what is in the memory
        if self._still_remembered:
            return
        try:
            self._remembered.map(self._memory)
        except OSError as error:
            raise OutOfMemoryError(f"the host cannot map the memory again: {error.strerror}") from None
        if self._base is not None:
            self._base.close()
        self._base, self._still_remembered = self._remembered.copy(), True
        self._show(self._base.layers[0][0])
        self.on_change()

    def close(self) -> None:
        """For the end of the machine."""
        for base in (self._base, self._remembered):
            if base is not None:
                base.close()
        self._base = self._remembered = None

    def _add_layer(self, base: RamBase) -> bool:
        """Have what has changed in one more layer; whether that is possible."""
        if len(base.layers) > MOST_LAYERS:
            return False
        fd = os.memfd_create("nonroot-layer", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self._size)
            changed = self._memory.write_private(RAM, fd, GAP)
            if not changed:
                return True
            new = base.over(fd, changed)
            if len(new.runs) > MOST_RUNS:
                new.close()
                return False
            for start, length in changed:
                self._memory.remap_part(RAM, start, length, fd, start, True)
        finally:
            os.close(fd)
        self._base, self._still_remembered = new, False
        base.close()
        return True

    def _show(self, fd: int) -> None:
        shown = _reopened(fd)
        os.dup2(shown, self._files[RAM], inheritable=False)
        os.close(shown)


def _reopened(fd: int) -> int:
    """A descriptor that can only be read; a sealed process can make one of a memory file's, not of another file's."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        return os.dup(fd)
    return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)


def _without(runs: Sequence[Run], cut: Sequence[tuple[int, int]]) -> Iterator[Run]:
    """``runs`` but for what ``cut`` covers; both ascending."""
    index = 0
    for start, length, layer in runs:
        place, end = start, start + length
        while index and sum(cut[index - 1]) > place:
            index -= 1
        while index < len(cut) and cut[index][0] < end:
            first, last = cut[index][0], sum(cut[index])
            if last > place:
                if first > place:
                    yield place, first - place, layer
                place = last
            index += 1
        if place < end:
            yield place, end - place, layer


def _copy(source: int, at: int, target: int, place: int, length: int) -> None:
    os.lseek(target, place, os.SEEK_SET)
    while length:
        done = os.sendfile(target, source, at, min(COPY_STEP, length))
        if done == 0:
            return  # the file ends there: zeros
        at, length = at + done, length - done


def _within(extents: Iterator[tuple[int, int]], offset: int, size: int) -> Iterator[tuple[int, int]]:
    for start, length in extents:
        first, end = max(start, offset), min(start + length, offset + size)
        if first >= offset + size:
            return
        if end > first:
            yield first, end - first
