"""Saving a domain, and going on from a saved one: what is in the file beside the machine.

The record ``domain`` says what the domain was made of, and holds what lives outside of its machine: its agent's
greeting, its nodes in XenStore. Everything is checked before it is used; a domain that cannot be made from a file is
not made at all.
"""

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nonroot.backends.overlay import OverlayImage
from nonroot.domain.options import DomainOptions
from nonroot.domain.saved_devices import Layer, SavedDevices, layer_names, put_layer, read_layer
from nonroot.engines.policy import CpuPolicy
from nonroot.errors import BadFileError, BadOptionError, NonrootError, TransientError, UnsupportedError
from nonroot.hvm.device import StateError
from nonroot.hvm.guest_ram import RamBase
from nonroot.hvm.ram import data_extents, ram_file
from nonroot.hvm.saved import restore, take
from nonroot.saved.container import PAGE_SIZE, Reader, Writer
from nonroot.saved.fields import Fields

if TYPE_CHECKING:
    from nonroot.domain.agent import AgentSession
    from nonroot.domain.xen import XenServices
    from nonroot.hvm.machine import Machine

__all__ = [
    "Saved",
    "check_can_be_saved",
    "fill",
    "image",
    "plain_options",
    "read_layers",
    "read_saved",
    "rehearse",
    "write_fork",
    "write_saved",
]

RECORD: Final = "domain"
TOOLSTACK: Final = "toolstack"
"""What the toolstack wants to find again."""
RAM: Final = "ram"


@dataclass(frozen=True, slots=True)
class Saved:
    """What a file says of the domain in it."""

    path: Path
    options: DomainOptions
    """Such that the same machine comes of them."""
    protocol: str
    command_line: str
    cpu: str
    """See :func:`cpu_digest`."""
    machine_ns: int
    """Machine time at which it was saved."""
    wall_ns: int
    """UTC at which it was saved."""
    greeting: bytes
    """The agent's; empty if it has none."""
    by_serial: bool | None
    """Whether the agent uses the serial line; None if it has not said anything."""
    store: Fields | None
    """Its nodes and watches in XenStore."""
    ram: object
    """Of a fork: see :class:`~nonroot.hvm.guest_ram.RamBase`."""
    devices: SavedDevices = field(default_factory=SavedDevices)
    """Its paravirtual disks and cards."""
    is_fork: bool = False
    """Whether the domain that it comes from goes on."""
    records: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    """Of its machine: see :func:`nonroot.hvm.saved.restore`."""
    memories: Mapping[str, int] = field(default_factory=dict)
    """Of its machine, by name, in bytes."""


def cpu_digest(policy: CpuPolicy) -> str:
    """The CPU that a guest sees: domains with the same can go on under each other's engines."""
    plain = replace(policy, hypervisor=())
    facts = [sorted(plain.features), plain.vcpus, plain.tsc_khz, plain.brand, plain.model, plain.stepping]
    facts.append(sorted([index, *values] for index, values in plain.extra_msrs.items()))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_can_be_saved(options: DomainOptions, session: "AgentSession | None") -> None:
    """UnsupportedError or TransientError, one sentence, for a domain that cannot be saved, or not now."""
    if options.shares:
        raise UnsupportedError("a domain with shared folders cannot be saved yet")
    if session is not None and not session.idle:
        raise TransientError("the domain is starting, or a command or copy is under way in it: try again afterwards")


def write_saved(
    path: str,
    packed: bool,
    machine: "Machine",
    options: DomainOptions,
    command_line: str,
    by_serial: bool | None,
    greeting: bytes,
    xen: "XenServices | None",
    toolstack: dict[str, Any] | None = None,
    file: int | None = None,
    devices: SavedDevices | None = None,
    overlays: Mapping[str, OverlayImage] | None = None,
    fork: bool = False,
) -> dict[str, Any]:
    """
    Save a domain whose vCPU stands, in the vCPU's thread. ``toolstack``: put into the file for the toolstack. ``file``:
    the descriptor of an empty file, which the caller puts at ``path``; None: that is done here. ``devices``: suspended,
    with what is in ``overlays``. ``fork``: this domain goes on, too.

    BadFileError or TransientError (a full disk) leave the domain, and a file that was there before, as they were.
    """
    facts = _facts(machine, options, command_line, by_serial, greeting, xen)
    facts |= {"devices": (devices or SavedDevices()).to_json(), "fork": fork}
    records = take(machine)
    machine.ram.share()
    with Writer(path, packed, file=file) as writer:
        _put(writer, facts, records, toolstack)
        with _ram(machine) as (fd, contents):
            writer.memory(RAM, contents, data_extents(fd))
        for name, overlay in (overlays or {}).items():
            put_layer(writer, name, overlay)
        return {"bytes": writer.size}


def write_fork(
    machine: "Machine",
    options: DomainOptions,
    command_line: str,
    by_serial: bool | None,
    greeting: bytes,
    xen: "XenServices | None",
) -> list[int]:
    """
    What a fork of the domain goes on from, as descriptors: its records, and its RAM, over which both are private then.

    In the vCPU's thread, while it stands. TransientError, OutOfMemoryError.
    """
    facts = _facts(machine, options, command_line, by_serial, greeting, xen)
    records = take(machine)
    base = machine.ram.freeze()
    described = os.memfd_create("nonroot-records", os.MFD_CLOEXEC)
    try:
        with Writer("the records", packed=False, durable=False, file=described) as writer:
            _put(writer, facts | {"ram": base.description()}, records, None)
    except BaseException:
        os.close(described)
        base.close()
        raise
    return [described, *(file for file, _ in base.layers)]


def rehearse(machine: "Machine", options: DomainOptions) -> None:
    """
    Go through what a fork of this machine, which is new and has not run, will do when it is filled.

    What Python has done before it does in half the time: its code is specialized, and its pages are its own.
    """
    described = os.memfd_create("nonroot-rehearsal", os.MFD_CLOEXEC)
    try:
        with Writer("a rehearsal", packed=False, durable=False, file=described) as writer:
            _put(writer, _facts(machine, options, "", None, b"", None), take(machine), None)
        restore(machine, read_saved(f"/proc/self/fd/{described}", options).records)
    finally:
        os.close(described)


def plain_options(options: DomainOptions) -> dict[str, Any]:
    """Such that the same machine comes of them, whatever this one goes on from."""
    return options.to_wire() | {"saved": None, "kept": False, "layers": []}


def _facts(
    machine: "Machine",
    options: DomainOptions,
    command_line: str,
    by_serial: bool | None,
    greeting: bytes,
    xen: "XenServices | None",
) -> dict[str, Any]:
    return {
        "options": plain_options(options),
        "protocol": machine.protocol,
        "command_line": command_line,
        "cpu": cpu_digest(machine.policy),
        "machine_ns": machine.vcpu.now_ns(),
        "wall_ns": time.time_ns(),
        "greeting": greeting.hex(),
        "by_serial": by_serial,
        "store": None if xen is None else xen.saved(),
    }


def _put(writer: Writer, facts: dict[str, Any], records: dict[str, bytes], toolstack: dict[str, Any] | None) -> None:
    writer.record(RECORD, json.dumps(facts).encode())
    if toolstack is not None:
        writer.record(TOOLSTACK, json.dumps(toolstack).encode())
    for name, record in records.items():
        writer.record(name, record)


def read_saved(path: str, asked: DomainOptions) -> Saved:
    """
    What is in a file, as a domain with the options ``asked`` would go on from it. BadFileError, BadOptionError.

    Of ``asked``, those count that the machine does not depend on: the engine, its optimisations, name and number.
    """
    with Reader(path) as reader:
        raw = reader.record(RECORD)
        others = {RECORD, TOOLSTACK, *layer_names(reader)}
        records = {name: reader.record(name) for name in reader.names if name not in others}
        memories = {name: size for name, size in reader.memories.items() if name not in others}
    try:
        record = json.loads(raw)
        fields = Fields(RECORD, record)
        options = DomainOptions.from_wire(dict(record.get("options", {})))
        options.check()
        options = replace(
            options,
            engine=asked.engine,
            off=asked.off,
            name=asked.name,
            domid=asked.domid,
            saved=os.fspath(path),
            kept=asked.kept,
            layers=asked.layers,
        )
        by_serial = record.get("by_serial")
        if by_serial not in (None, True, False):
            raise StateError("domain state: by_serial is no truth value")
        return Saved(
            Path(path),
            options,
            fields.text("protocol", 20),
            fields.text("command_line"),
            fields.text("cpu", 64),
            fields.number("machine_ns", (1 << 63) - 1),
            fields.number("wall_ns", (1 << 63) - 1),
            fields.data("greeting", 1 << 16),
            by_serial,
            None if record.get("store") is None else fields.inner("store"),
            record.get("ram"),
            SavedDevices() if record.get("devices") is None else SavedDevices.from_json(fields.inner("devices")),
            record.get("fork") is True,
            records,
            memories,
        )
    except (StateError, BadOptionError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path} is no saved domain that could be restored: {error}") from None


def image(saved: Saved) -> RamBase | None:
    """What RAM is that is to be mapped; the caller closes it. None: it is to be read. BadFileError."""
    options = saved.options
    if options.layers:
        try:
            return RamBase.described(saved.ram, options.layers, options.memory)
        except (StateError, OSError) as error:
            raise _bad(saved, str(error)) from None
    if not options.kept:
        return None
    if saved.memories.get(RAM) != saved.options.memory:
        raise _bad(saved, "its memory has another size")
    with Reader(saved.path) as reader:
        place = reader.image(RAM)
    if place is None:
        raise _bad(saved, "its memory does not lie there as it is")
    return RamBase([place])


def fill(machine: "Machine", saved: Saved) -> None:
    """Have a new machine go on from a file; private RAM is there already. BadFileError: it is of no use then."""
    if cpu_digest(machine.policy) != saved.cpu:
        raise UnsupportedError(
            f"{saved.path} cannot be restored here: its guest was running on a CPU with other features"
        )
    if saved.memories != ({} if saved.options.layers else {RAM: saved.options.memory}):
        raise _bad(saved, "its memory has another size")
    try:
        if not machine.ram.is_private:
            with Reader(saved.path) as reader:
                _load(reader, machine)
        restore(machine, saved.records)
    except StateError as error:
        raise _bad(saved, str(error)) from None
    except OSError as error:
        raise TransientError(f"{saved.path} cannot be restored: {(error.strerror or str(error)).lower()}") from None


def read_layers(saved: Saved) -> dict[str, Layer]:
    """What is in the overlays of a file's disks, by name; the descriptors are the caller's. BadFileError."""
    found: dict[str, Layer] = {}
    try:
        if saved.devices.overlays:
            with Reader(saved.path) as reader:
                for name, size in saved.devices.overlays.items():
                    found[name] = read_layer(reader, name, size)
    except (NonrootError, StateError, OSError) as error:
        for layer in found.values():
            os.close(layer[0])
            os.close(layer[1])
        raise error if isinstance(error, NonrootError) else _bad(saved, str(error)) from None
    return found


def _load(reader: Reader, machine: "Machine") -> None:
    fd = ram_file(machine.memory_files)
    try:
        for run in reader.runs(RAM):
            _write(fd, run.contents, run.first * PAGE_SIZE)
    finally:
        os.close(fd)


def _bad(saved: Saved, why: str) -> BadFileError:
    return BadFileError(f"{saved.path} is no saved domain that could be restored: {why}")


def _write(fd: int, contents: memoryview, place: int) -> None:
    while len(contents):
        done = os.pwrite(fd, contents, place)
        contents, place = contents[done:], place + done


@contextlib.contextmanager
def _ram(machine: "Machine") -> Iterator[tuple[int, memoryview]]:
    fd = ram_file(machine.memory_files)
    try:
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as contents, memoryview(contents) as view:
            yield fd, view
    finally:
        os.close(fd)
