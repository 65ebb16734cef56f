"""A PC under a test: it boots from disks, CDs and floppies; the test looks at its screen and serial line, and types.

The machine runs in real time, as a user's does, and only while the test waits for something.
"""

import os
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.handover import describe_image
from nonroot.backends.image import Image as BackingImage
from nonroot.backends.service import BlockService
from nonroot.devices.display import Console, attach_display
from nonroot.devices.i6300esb import attach_watchdog
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.devices.storage import attach_storage
from nonroot.display.keys import parse_keys, strokes
from nonroot.display.render import Renderer
from nonroot.display.text import screen_rows
from nonroot.domain.pc import VGA_ROM
from nonroot.engines import select
from nonroot.guests.packages import seabios
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig, Outputs
from nonroot.hvm.outcome import Outcome, Reason
from nonroot.hvm.pc import Board
from nonroot.stubdom.model import DeviceModel, Parts
from nonroot.stubdom.proxies import RemoteConsole
from tests.matrix.references import Reference

__all__ = ["Pc", "engines"]

MIB = 1 << 20
SLICE = 0.05
"""Seconds between two looks at the screen."""
KEY_SLICE = 0.015
"""Seconds between two keys."""
SETTLED = 2
"""Seconds that a picture must not change before it becomes a reference."""
WRITE_REFERENCES = os.environ.get("NONROOT_REFERENCES") == "write"


def engines() -> list[str]:
    """Every engine that exists, but not the one that runs two of them side by side to compare them."""
    return sorted(set(select.ENGINES) - {"lockstep"})


class Pc:
    """A machine with firmware (or a kernel), drives, a screen and a keyboard."""

    def __init__(
        self,
        *,
        engine: str = "interpret",
        memory: int = 128 * MIB,
        cd: Path | None = None,
        disks: Sequence[str | Path] = (),
        floppy: Path | None = None,
        boot: str = "cd",
        scramble: int | None = None,
        model: str = "internal",
        **config: Any,
    ) -> None:
        """``model``: where the devices are: ``internal``, in this process; ``stub``, ``dom0``: in one of their own."""
        self.serial = bytearray()
        self.debug = bytearray()
        self._services: list[BlockService] = []
        self._drives = (cd, list(disks), floppy)
        self._strokes: deque[tuple[int, bool]] = deque()
        self.outcome: Outcome | None = None
        self._direct = "kernel" in config
        if not self._direct and "firmware" not in config:
            bios = seabios()
            roms = {VGA_ROM: bios.vga.read_bytes()}
            config["firmware"] = Firmware(bios.image.read_bytes(), boot, option_roms=roms)
        self.console: Console | RemoteConsole | None = None
        self.model: DeviceModel | None = None
        self._images: list[BackingImage] = []
        attach = [self._attach_drives, self._attach_console, attach_watchdog]
        if model != "internal":
            self.model = DeviceModel(self._parts(), domid=1, confined=model == "stub")
            attach = [self._attach_model]
        self.machine = Machine(
            MachineConfig(
                memory_bytes=memory,
                attach=attach,
                agent=False,
                scramble_seed=scramble,
                base_wall_ns=time.time_ns(),
                **config,
            ),
            select.create(engine),
            Outputs(console=self._take_serial, debug=self.debug.extend),
        )

    def _take_serial(self, number: int, data: bytes) -> None:
        if number == 0:
            self.serial += data

    def _attach_console(self, board: Board) -> None:
        self.console = attach_display(board)

    def _attach_drives(self, board: Board) -> None:
        cd, disks, floppy = self._drives

        def service(drive: Drive) -> BlockService:
            made = BlockService(open_image(drive), board.post)
            self._services.append(made)
            return made

        drives: list[Disk | CdRom | None] = [Disk(service(Drive.parse(str(disk)))) for disk in disks]
        drives += [None] * (2 - len(drives))
        drives.append(CdRom(None if cd is None else service(Drive(str(cd), read_only=True))))
        drives.append(None)
        floppies = [] if floppy is None else [service(Drive(str(floppy), read_only=True))]
        attach_storage(board, drives, floppies, enabled=self._direct)

    def _parts(self) -> Parts:
        """What a device model elsewhere is made of: the same drives, screen and watchdog."""
        cd, disks, floppy = self._drives
        files: list[int] = []

        def medium(drive: Drive) -> dict[str, Any]:
            image = open_image(drive)
            self._images.append(image)
            described = describe_image(image)
            assert described is not None
            files.extend(described[1])
            return {"image": described[0], "files": len(described[1])}

        drives: list[dict[str, Any] | None] = [
            {"cd": False, "serial": "NR00000001", "medium": medium(Drive.parse(str(disk)))} for disk in disks
        ]
        drives += [None] * (2 - len(drives))
        disc = None if cd is None else medium(Drive(str(cd), read_only=True))
        drives += [{"cd": True, "serial": "NR00000003", "medium": disc}, None]
        floppies = [] if floppy is None else [medium(Drive(str(floppy), read_only=True))]
        return Parts(["storage", "display", "watchdog"], drives, floppies, files, self._direct)

    def _attach_model(self, board: Board) -> None:
        assert self.model is not None
        self.model.attach(board)
        self.console = self.model.console

    # ── what a person does ──

    def rows(self) -> list[str]:
        """The lines of the screen; none while it shows a picture."""
        assert self.console is not None
        vga = self.console.vga
        return screen_rows(vga.state(), vga.ram.view) or []

    def text(self) -> str:
        """The screen as one text."""
        return "\n".join(self.rows())

    def picture(self) -> Image.Image:
        """The screen as a picture."""
        assert self.console is not None
        vga = self.console.vga
        return Renderer(vga.ram.view).render(vga.state())

    def shows(self, name: str, seconds: float = 60, differing: float = 0.01) -> None:
        """Run until the screen shows the stored reference ``name``, but for a share ``differing`` of its fields."""
        if WRITE_REFERENCES:
            self._store_reference(name, seconds, differing)
            return
        wanted = Reference.load(name)
        closest = 1.0

        def is_shown() -> bool:
            nonlocal closest
            share = wanted.differing(self.picture())
            closest = min(closest, share)
            return share <= differing

        try:
            self.run_until(is_shown, seconds, f"{name} was not shown")
        except AssertionError as error:
            file = self._save_picture(name)
            raise AssertionError(f"{error}\n{closest:.1%} of the fields differed at best; see {file}") from None

    def _store_reference(self, name: str, seconds: float, differing: float) -> None:
        last = Reference.of(self.picture())
        since = time.monotonic()

        def is_settled() -> bool:
            nonlocal last, since
            picture = self.picture()
            if last.differing(picture) > differing:
                last, since = Reference.of(picture), time.monotonic()
            return time.monotonic() - since > SETTLED

        self.run_until(is_settled, seconds, f"{name} does not settle")
        Reference.of(self.picture()).store(name)
        self._save_picture(name)

    def _save_picture(self, name: str) -> Path:
        file = Path(tempfile.gettempdir()) / f"nonroot-{name}.png"
        self.picture().save(file)
        return file

    def press(self, text: str) -> None:
        """Press keys, one after the other, while the machine runs: text, and names as in ``<ret>``."""
        self._strokes.extend(strokes(parse_keys(text)))
        self.run_until(lambda: not self._strokes, 30, "the keys were not taken")

    def hold(self, key: str, until: Callable[[], bool], problem: str) -> None:
        """Hold a key down until ``until``: for a program that asks which keys are down, as games do."""
        down, up = strokes(parse_keys(key))
        self._strokes.append(down)
        self.run_until(until, 30, problem)
        self._strokes.append(up)
        self.run_until(lambda: not self._strokes, 30, "the key was not released")

    def send(self, text: str) -> None:
        """Type on the serial line."""
        self.machine.console_input(text.encode())

    def wait_screen(self, pattern: str, seconds: float = 60) -> str:
        """Run until the screen's text matches; the match."""
        return self._wait(pattern, self.text, seconds)

    def wait_serial(self, pattern: str, seconds: float = 60) -> str:
        """Run until what came over the serial line since the last such wait matches; the match."""
        found = self._wait(pattern, lambda: self.serial.decode(errors="replace"), seconds)
        text = self.serial.decode(errors="replace")
        self.serial = bytearray(text[text.index(found) + len(found) :].encode())
        return found

    def _wait(self, pattern: str, source: Callable[[], str], seconds: float) -> str:
        found: list[str] = []

        def matches() -> bool:
            match = re.search(pattern, source(), re.MULTILINE)
            if match:
                found.append(match.group())
            return bool(match)

        self.run_until(matches, seconds, f"{pattern!r} did not appear")
        return found[-1]

    def run_until(self, condition: Callable[[], bool], seconds: float, problem: str) -> None:
        """Run until ``condition``; AssertionError with what can be seen after ``seconds`` of wall time."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.outcome is None, f"{problem}: the machine ended, {self.outcome}\n{self.describe()}"
            assert time.monotonic() < end, f"{problem} in {seconds} s\n{self.describe()}"
            self._step()

    def _step(self) -> None:
        assert self.console is not None
        if self._strokes:
            key, pressed = self._strokes[0]
            if self.console.ps2.key(key, pressed):
                self._strokes.popleft()
        timer = threading.Timer(KEY_SLICE if self._strokes else SLICE, self.machine.stop)
        timer.start()
        try:
            outcome = self.machine.run()
        finally:
            timer.cancel()
        if outcome.reason is not Reason.STOPPED:
            self.outcome = outcome

    def run_to_end(self, seconds: float = 60) -> Outcome:
        """Run until the machine ends by itself."""
        self.run_until(lambda: self.outcome is not None, seconds, "the machine did not end")
        assert self.outcome is not None
        return self.outcome

    def describe(self) -> str:
        """Screen, end of the serial output, end of the firmware's messages."""
        parts: Iterable[str] = (
            "── screen ──",
            self.text(),
            "── serial ──",
            self.serial[-2000:].decode(errors="replace"),
            "── firmware ──",
            self.debug[-1000:].decode(errors="replace"),
            str(self.machine.statistics()),
        )
        return "\n".join(parts)

    # ── life ──

    def close(self) -> None:
        """Give the images back."""
        for service in self._services:
            service.close()
        if self.model is not None:
            self.model.close()
        for image in self._images:
            image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
