"""The file of a saved domain: named records, each with its checksum, and pages of memory, sparse.

Layout, little-endian: a header of one page (:data:`HEADER`, then zeros), the records' contents one after the other, and
the table: JSON that says where each record lies, how it is packed, and its checksum. Contents that are not packed begin
at whole pages, so that they can be taken as they are. The header is written last: a file whose writing was interrupted
is none.

A reader believes nothing: table and records are checked before anything of them is used, and what it allocates is
bounded by the sizes that its caller expects.
"""

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import lz4.block
import xxhash

from nonroot.errors import BadFileError, TransientError

__all__ = ["PAGE_SIZE", "Reader", "Run", "Writer", "draft_of"]

MAGIC: Final = b"NRsaved\0"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQ16s")
"""Magic, version, reserved, the table's place and size in bytes, its checksum (XXH3, 128 bits)."""
PAGE_SIZE: Final = 4096
RUN_PAGES: Final = 1024
"""Pages of one piece: 4 MiB."""
LARGEST_TABLE: Final = 64 << 20
LARGEST_RECORD: Final = 1 << 30
NAME_LENGTH: Final = 80
SMALL: Final = 1 << 18
RAW: Final = "raw"
LZ4: Final = "lz4"
ZERO: Final = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Run:
    """Pages of a memory that follow each other."""

    first: int
    count: int
    contents: memoryview


@contextlib.contextmanager
def draft_of(path: Path, *, durable: bool) -> Iterator[int]:
    """The descriptor of a file beside ``path``, which takes its place if nothing is raised, and goes otherwise.

    ``durable``: have it on the disk before. BadFileError, TransientError.
    """
    draft = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BadFileError(f"{path} cannot be written: {_reason(error)}") from None
    try:
        yield fd
        try:
            if durable:
                os.fsync(fd)
            draft.replace(path)
        except OSError as error:
            raise TransientError(f"{path} cannot be written: {_reason(error)}") from None
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


class Writer:
    """Writes a saved domain beside its path, and puts it there when it is complete.

    Use it as a context manager: what raises inside leaves nothing behind, and a file that was there before as it was.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        packed: bool = True,
        durable: bool | None = None,
        file: int | None = None,
    ) -> None:
        """``packed``: compress; without, it is larger, and read quicker. ``durable``: have it on the disk before it is
        there; None: if it is packed. ``file``: a descriptor of an empty file that has no path.

        BadFileError if there can be no file.
        """
        self._path = Path(path)
        self._has_path = file is None
        self._draft = self._path.with_name(f".{self._path.name}.{os.urandom(4).hex()}")
        self._packed = packed
        self._durable = packed if durable is None else durable
        self._records: list[dict[str, Any]] = []
        self._memories: dict[str, dict[str, Any]] = {}
        self._place = PAGE_SIZE
        try:
            if file is not None:
                fd = os.dup(file)
            else:
                fd = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadFileError(f"{self._path} cannot be written: {_reason(error)}") from None
        self._file: BinaryIO = os.fdopen(fd, "wb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()
            if self._has_path:
                with contextlib.suppress(FileNotFoundError):
                    self._draft.unlink()

    def record(self, name: str, contents: bytes) -> None:
        """Add a record. TransientError if the disk is full or fails."""
        self._records.append({"name": name, "size": len(contents)} | self._put(contents))

    def memory(self, name: str, contents: memoryview, extents: Iterator[tuple[int, int]]) -> None:
        """
        Add the pages of ``contents`` that are not all zeros; ``extents``: (offset, bytes) of what may be.

        What is not packed lies there as it is, holes included, so that it can be mapped (:meth:`Reader.image`).
        """
        runs = []
        image = None if self._packed else self._aligned()
        for first, count in _runs(contents, extents):
            piece = contents[first * PAGE_SIZE : (first + count) * PAGE_SIZE]
            place = None if image is None else image + first * PAGE_SIZE
            runs.append([first, count, *self._put(piece, place).values()])
        self._memories[name] = {"size": len(contents), "image": image, "runs": runs}
        if image is not None:
            self._place = image + len(contents)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._place

    def _aligned(self) -> int:
        return -(-self._place // PAGE_SIZE) * PAGE_SIZE

    def _put(self, contents: bytes | memoryview, at: int | None = None) -> dict[str, Any]:
        data: bytes | memoryview = contents
        packing = RAW
        if self._packed:
            packed = lz4.block.compress(contents, store_size=False)
            if len(packed) < len(contents):
                data, packing = packed, LZ4
        place = at if at is not None else self._aligned() if packing == RAW else self._place
        self._write(place, data)
        self._place = place + len(data)
        return {
            "place": place,
            "stored": len(data),
            "packing": packing,
            "checksum": xxhash.xxh3_128_hexdigest(data),
        }

    def _write(self, place: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        fd = self._file.fileno()
        try:
            while len(view):
                done = os.pwrite(fd, view, place)
                view, place = view[done:], place + done
        except OSError as error:
            raise TransientError(f"{self._path} cannot be written: {_reason(error)}") from None

    def _finish(self) -> None:
        table = json.dumps({"records": self._records, "memories": self._memories}).encode()
        self._write(self._place, table)
        header = HEADER.pack(MAGIC, VERSION, 0, self._place, len(table), xxhash.xxh3_128_digest(table))
        self._write(0, header.ljust(PAGE_SIZE, b"\0"))
        try:
            if self._durable:
                os.fsync(self._file.fileno())
            if self._has_path:
                self._draft.replace(self._path)
        except OSError as error:
            raise TransientError(f"{self._path} cannot be written: {_reason(error)}") from None


class Reader:
    """A saved domain. Use it as a context manager. Everything raises BadFileError if the file is no such thing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and checks its table."""
        self._path = Path(path)
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            self._map: mmap.mmap | None = None
        except OSError as error:
            raise BadFileError(f"the saved domain {self._path} cannot be read: {_reason(error)}") from None
        except ValueError:
            raise BadFileError(f"the saved domain's path {str(path)!r} is no path") from None
        try:
            self._size = os.fstat(self._fd).st_size
            self._map = mmap.mmap(self._fd, self._size, mmap.MAP_PRIVATE, mmap.PROT_READ) if self._size else None
            self._records, self._memories = self._read_table()
        except OSError as error:
            self.close()
            raise BadFileError(f"the saved domain {self._path} cannot be read: {_reason(error)}") from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Closing twice does nothing."""
        fd, self._fd = self._fd, -1
        self._map = None  # unmapped when nobody uses what was given out any more
        if fd >= 0:
            os.close(fd)

    @property
    def names(self) -> set[str]:
        """The names of the records."""
        return set(self._records)

    @property
    def memories(self) -> dict[str, int]:
        """The names of the memories, and their sizes in bytes."""
        return {name: facts["size"] for name, facts in self._memories.items()}

    def record(self, name: str) -> bytes:
        """A record's contents."""
        facts = self._records.get(name)
        if facts is None:
            raise self._bad(f"it has no record {name!r}")
        contents = self._get(facts["place"], facts["stored"], facts["packing"], facts["checksum"], facts["size"])
        return bytes(contents)

    def image(self, name: str) -> tuple[int, int] | None:
        """
        (a new descriptor, offset) of a memory that lies in the file as it is; None if it does not.

        Nothing of it has been checked but that it is there.
        """
        place = self._memories[name]["image"]
        return None if place is None else (os.dup(self._fd), place)

    def runs(self, name: str) -> Iterator[Run]:
        """A memory's pages that are not all zeros, ascending; each is checked before it is given out."""
        for first, count, place, stored, packing, checksum in self._memories[name]["runs"]:
            yield Run(first, count, self._get(place, stored, packing, checksum, count * PAGE_SIZE))

    # ── inside ──

    def _bad(self, what: str) -> BadFileError:
        return BadFileError(f"{self._path} is no saved domain that could be restored: {what}")

    def _read(self, place: int, size: int) -> memoryview:
        if self._map is None or place + size > self._size or os.fstat(self._fd).st_size < self._size:
            raise self._bad("it is truncated")
        if size <= SMALL:  # cheaper than to map it
            data = os.pread(self._fd, size, place)
            if len(data) != size:
                raise self._bad("it is truncated")
            return memoryview(data)
        return memoryview(self._map)[place : place + size]

    def _read_table(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        if self._size < PAGE_SIZE:
            raise self._bad("it is too short")
        magic, version, reserved, place, size, checksum = HEADER.unpack(self._read(0, HEADER.size))
        if magic != MAGIC:
            raise self._bad("it begins differently")
        if version != VERSION or reserved:
            raise self._bad(f"it has version {version}, this nonroot reads version {VERSION}")
        if size > LARGEST_TABLE or not PAGE_SIZE <= place <= self._size - size:
            raise self._bad("it is truncated")
        table = self._read(place, size)
        if xxhash.xxh3_128_digest(table) != checksum:
            raise self._bad("its table is damaged")
        try:
            parsed = json.loads(bytes(table))
            records = {facts["name"]: facts for facts in parsed["records"]}
            memories = dict(parsed["memories"])
            if len(records) != len(parsed["records"]):
                raise ValueError("a record is there twice")
            for name, facts in records.items():
                self._check_name(name)
                self._check(facts["place"], facts["stored"], facts["packing"], facts["checksum"])
                if type(facts["size"]) is not int or not 0 <= facts["size"] <= LARGEST_RECORD:
                    raise ValueError("a record's size is none")
            for name, facts in memories.items():
                self._check_name(name)
                self._check_runs(facts["size"], facts["runs"])
                image = facts["image"]
                if image is not None:
                    self._check(image, facts["size"], RAW, "")
                    if image % PAGE_SIZE:
                        raise ValueError("an image is at no page")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self._bad(f"its table makes no sense ({error})") from None
        return records, memories

    def _check_name(self, name: object) -> None:
        if not isinstance(name, str) or not name or len(name) > NAME_LENGTH:
            raise ValueError("a name is none")

    def _check(self, place: object, stored: object, packing: object, checksum: object) -> None:
        if type(place) is not int or type(stored) is not int or stored < 0 or place < PAGE_SIZE:
            raise ValueError("a place is none")
        assert isinstance(place, int)
        assert isinstance(stored, int)
        if stored > self._size or place > self._size - stored:
            raise ValueError("a record lies outside of the file")
        if packing not in (RAW, LZ4) or not isinstance(checksum, str):
            raise ValueError("a packing is not known")

    def _check_runs(self, size: object, runs: object) -> None:
        if type(size) is not int or size < 0 or size % PAGE_SIZE or not isinstance(runs, list):
            raise ValueError("a memory's size is none")
        assert isinstance(size, int)
        free = 0
        for first, count, place, stored, packing, checksum in runs:
            if type(first) is not int or type(count) is not int or first < free or not 1 <= count <= RUN_PAGES:
                raise ValueError("pages are out of order")
            self._check(place, stored, packing, checksum)
            free = first + count
        if free > size // PAGE_SIZE:
            raise ValueError("pages lie outside of their memory")

    def _get(self, place: int, stored: int, packing: str, checksum: str, size: int) -> memoryview:
        data: memoryview = self._read(place, stored)
        if xxhash.xxh3_128_hexdigest(data) != checksum:
            raise self._bad("its contents are damaged")
        if packing == LZ4:
            try:
                data = memoryview(lz4.block.decompress(data, uncompressed_size=size))
            except (lz4.block.LZ4BlockError, ValueError, MemoryError):
                raise self._bad("its contents are damaged") from None
        if len(data) != size:
            raise self._bad("its contents are damaged")
        return data


def _runs(contents: memoryview, extents: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(first page, pages) of what is not all zeros, at most :data:`RUN_PAGES` each."""
    for offset, length in extents:
        start = -1
        first, end = offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)
        for page in range(first, end + 1):
            used = page < end and bytes(contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) != ZERO
            if start >= 0 and (not used or page - start == RUN_PAGES):
                yield start, page - start
                start = -1
            if used and start < 0:
                start = page


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
