"""The guests that a benchmark compares, driven by commands on their serial line; and the host itself, the same way."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import nonroot
from bench.boot import QEMU, QEMU_CPU

APPEND = "console=ttyS0 quiet cryptomgr.notests mitigations=off panic=-1"
"""No mitigations on either side: our CPU says that it needs none, QEMU's does not know."""


class BenchError(Exception):
    """A guest did not do what it was told; one or more lines."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a console and when it was complete, by the host's clock, in seconds."""

    at: float
    text: str


class Lines:
    """Cuts a console's output into lines as they come."""

    def __init__(self) -> None:
        self._partial = b""
        self._lines: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self.tail: list[str] = []

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        *whole, self._partial = (self._partial + data).split(b"\n")
        for line in whole:
            text = line.decode(errors="replace").strip("\r")
            self.tail = [*self.tail[-11:], text]
            self._lines.put(Line(now, text))

    def end(self) -> None:
        self._lines.put(None)

    def next(self, timeout: float) -> Line:
        """TimeoutError after ``timeout`` seconds, EOFError if the console has ended."""
        try:
            line = self._lines.get(timeout=max(0.0, timeout))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise EOFError
        return line


class Machine(Protocol):
    """Where commands run."""

    name: str
    clocksource: str

    def run(self, command: str, timeout: float) -> list[Line]:
        """The output of a command of the shell. BenchError if it fails or takes longer than ``timeout`` seconds."""
        ...

    def close(self) -> None: ...


class _Guest:
    name: str
    clocksource: str

    def __init__(self) -> None:
        self.lines = Lines()

    def type(self, text: str) -> None:
        raise NotImplementedError

    def wait_ready(self, timeout: float) -> None:
        self.clocksource = self._until("WORK: ready", timeout)[-1].text.split()[-1]

    def run(self, command: str, timeout: float) -> list[Line]:
        self.type(command + "\n")
        lines = self._until("WORK: end", timeout)
        if lines[-1].text != "WORK: end 0":
            raise BenchError(f"{self.name}: {command!r} failed:\n" + "\n".join(line.text for line in lines))
        return lines[:-1]

    def _until(self, mark: str, timeout: float) -> list[Line]:
        deadline = time.perf_counter() + timeout
        lines: list[Line] = []
        try:
            while True:
                lines.append(self.lines.next(deadline - time.perf_counter()))
                if lines[-1].text.startswith(mark):
                    return lines
        except (TimeoutError, EOFError) as error:
            what = f"took more than {timeout:.0f} s" if isinstance(error, TimeoutError) else "ended early"
            raise BenchError(f"{self.name} {what}; its console ends:\n" + "\n".join(self.lines.tail)) from None


class NonrootGuest(_Guest):
    """A domain of ours."""

    def __init__(self, kernel: Path, initrd: Path, memory: int, engine: str, off: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.domain = nonroot.Domain(kernel, initrd, APPEND, f"{memory}M", engine, agent=False, off=off, xen=False)
        self.domain.console.listener = self.lines.feed
        self.domain.start()
        self.name = "nonroot"
        self.engine = self.domain.engine

    def type(self, text: str) -> None:
        self.domain.console.write(text)

    def close(self) -> None:
        self.domain.destroy()


class QemuGuest(_Guest):
    """QEMU's software CPU."""

    name = "QEMU"

    def __init__(self, kernel: Path, initrd: Path, memory: int) -> None:
        super().__init__()
        command = [QEMU, "-accel", "tcg,thread=single", "-M", "pc", "-cpu", QEMU_CPU, "-m", str(memory)]
        command += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
        command += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", APPEND]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self._process.stdout.fileno(), 65536):
                self.lines.feed(data)
        self.lines.end()

    def type(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Host:
    """This machine, for the limit."""

    name = "native"

    def __init__(self) -> None:
        self.clocksource = "tsc"
        with contextlib.suppress(OSError):
            source = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
            self.clocksource = source.read_text().strip()

    def run(self, command: str, timeout: float) -> list[Line]:
        lines = Lines()
        process = subprocess.Popen(
            ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            while data := os.read(process.stdout.fileno(), 65536):
                lines.feed(data)
        finally:
            timer.cancel()
            process.stdout.close()
            status = process.wait()
        if status:
            raise BenchError(f"on the host, {command!r} failed with {status}:\n" + "\n".join(lines.tail))
        lines.end()
        result = []
        with contextlib.suppress(EOFError):
            while True:
                result.append(lines.next(0))
        return result

    def close(self) -> None:
        pass
