"""The guest agent, built with -DTEST_STDIO and run on the host as an ordinary process: the real code, but no ports."""

import contextlib
import os
import selectors
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType

import pytest

from nonroot.domain.frames import (
    Entry,
    ExitKind,
    ExitReport,
    FrameDecoder,
    FromGuest,
    StartFlag,
    ToGuest,
    encode,
    encode_start,
)

SOURCE = Path(__file__).parents[2] / "guest" / "agent.c"
FLAGS = [
    "-std=gnu11",
    "-Os",
    "-ffreestanding",
    "-fno-builtin",
    "-fno-pic",
    "-fno-pie",
    "-no-pie",
    "-nostdlib",
    "-static",
]
FLAGS += [
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wl,--build-id=none",
]


def build(bits: int, where: Path, *extra: str) -> Path:
    output = where / f"agent{bits}"
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    subprocess.run([compiler, f"-m{bits}", *FLAGS, *extra, "-o", str(output), str(SOURCE)], check=True)
    return output


class NativeAgent:
    """One running agent and the frames it sent."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.to = self.process.stdin.fileno()
        self.source = self.process.stdout.fileno()
        os.set_blocking(self.to, False)
        os.set_blocking(self.source, False)
        self.decoder = FrameDecoder()
        self.frames: list[tuple[FromGuest, bytes]] = []
        self.pending = bytearray()

    def __enter__(self) -> "NativeAgent":
        assert self.next()[0] == FromGuest.HELLO
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def send(self, kind: ToGuest, payload: bytes = b"") -> None:
        self.pending += encode(kind, payload)

    def start(self, *argv: str | bytes, flags: StartFlag = StartFlag.PIPES, **options: object) -> None:
        env = {b"PATH": b"/usr/bin:/bin"} | options.pop("env", {})  # type: ignore[operator]
        self.pending += encode_start([os.fsencode(a) for a in argv], env, flags=flags, **options)  # type: ignore[arg-type]

    def pump(self, deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.source, selectors.EVENT_READ)
            if self.pending:
                selector.register(self.to, selectors.EVENT_WRITE)
            left = deadline - time.monotonic()
            if left <= 0:
                raise AssertionError(f"the agent is silent; so far: {[(k.name, p[:60]) for k, p in self.frames]}")
            for key, _ in selector.select(left):
                if key.fd == self.to:
                    del self.pending[: os.write(self.to, self.pending)]
                else:
                    data = os.read(self.source, 1 << 16)
                    if not data:
                        raise EOFError
                    self.frames += self.decoder.feed(data)

    def pump_for(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with contextlib.suppress(AssertionError):
            while True:
                self.pump(deadline)

    def next(self, timeout: float = 30) -> tuple[FromGuest, bytes]:
        deadline = time.monotonic() + timeout
        while not self.frames:
            self.pump(deadline)
        return self.frames.pop(0)

    def until(self, kind: FromGuest, timeout: float = 30) -> tuple[bytes, list[tuple[FromGuest, bytes]]]:
        """The payload of the next frame of ``kind``, and all frames before it."""
        before: list[tuple[FromGuest, bytes]] = []
        while True:
            found, payload = self.next(timeout)
            if found == kind:
                return payload, before
            before.append((found, payload))

    def result(self, grant: bool = True, timeout: float = 30) -> tuple[ExitKind, int, bytes, bytes]:
        """(kind, value, stdout, stderr) of the command that was started; grants output as it comes."""
        out = {FromGuest.STDOUT: bytearray(), FromGuest.STDERR: bytearray()}
        while True:
            kind, payload = self.next(timeout)
            if kind in out:
                out[kind] += payload
                if grant:
                    self.send(ToGuest.CREDIT, struct.pack("<I", len(payload)))
            elif kind == FromGuest.EXIT:
                report = ExitReport.parse(payload)
                return report.kind, report.value, bytes(out[FromGuest.STDOUT]), bytes(out[FromGuest.STDERR])

    def run(
        self, *argv: str | bytes, stdin: bytes | None = None, **options: object
    ) -> tuple[ExitKind, int, bytes, bytes]:
        self.start(*argv, flags=StartFlag.NO_STDIN if stdin is None else StartFlag.PIPES, **options)
        if stdin is not None:
            assert len(stdin) <= 65536
            self.send(ToGuest.STDIN, stdin)
            self.send(ToGuest.STDIN_EOF)
        return self.result()

    def copy_in(self, destination: bytes, name: bytes, *entries: tuple[Entry, bytes]) -> tuple[int, bytes]:
        self.send(ToGuest.COPY_IN, struct.pack("<I", 0) + destination + b"\0" + name + b"\0")
        for entry, content in entries:
            self.send(ToGuest.ENTRY, entry.pack())
            for at in range(0, len(content), 50_000):
                self.send(ToGuest.DATA, content[at : at + 50_000])
        self.send(ToGuest.COPY_IN_END)
        payload, _ = self.until(FromGuest.RESULT)
        return struct.unpack_from("<I", payload)[0], payload[4:]

    def copy_out(self, path: bytes, window: int = 1 << 20) -> tuple[int, bytes, list[tuple[Entry, bytes]]]:
        self.send(ToGuest.COPY_OUT, struct.pack("<I", window) + path + b"\0")
        found: list[tuple[Entry, bytes]] = []
        while True:
            kind, payload = self.next()
            if kind == FromGuest.RESULT:
                return struct.unpack_from("<I", payload)[0], payload[4:], found
            self.send(ToGuest.CREDIT, struct.pack("<I", len(payload)))
            if kind == FromGuest.ENTRY:
                found.append((Entry.parse(payload), b""))
            elif kind == FromGuest.DATA:
                entry, content = found.pop()
                found.append((entry, content + payload))

    def children(self) -> set[int]:
        """Process ids of the agent's children that have not been reaped."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return {int(pid) for pid in listed.split()}

    def signal(self, number: signal.Signals) -> None:
        self.send(ToGuest.SIGNAL, struct.pack("<I", number))
