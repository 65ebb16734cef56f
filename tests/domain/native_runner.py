"""A domain's process whose "guest" is the agent itself, run on this machine: everything but the machine is real.

It stands in for :class:`nonroot.domain.runner.Runner` where the machine does not matter, so that streams, signals,
files and the command line are tested in milliseconds. Tests with real guests are beside it.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

from nonroot.domain import host
from nonroot.domain.mailbox import Mailbox
from nonroot.domain.options import DomainOptions
from nonroot.domain.process import DomainProcess
from nonroot.domain.runner import Stop
from nonroot.errors import NonrootError, UnsupportedError

AGENT = os.environ.get("NONROOT_TEST_AGENT", "")


class NativeRunner:
    def __init__(self, options: DomainOptions, progress: Callable[[str], None]) -> None:
        self.mailbox = Mailbox()
        self.seat = None
        self.xen = None
        self.options = options
        self._console = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        self._to = bytearray()
        self._changed = threading.Condition()
        progress("starting the agent")

    def describe(self) -> dict[str, Any]:
        return {"engine": "native", "reason": "this is a test", "command_line": self.options.append}

    def check_can_be_saved(self, forking: bool) -> None:
        raise UnsupportedError("this is no machine that could be saved")

    def start(self) -> None:
        program = AGENT
        for word in self.options.append.split():
            if word.startswith("test.program="):
                program = word.partition("=")[2]
        self.print(b"Linux version 0.0 (test)\r\n")
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for work in (self._read, self._write):
            threading.Thread(target=work, daemon=True).start()
        if "test.panic" in self.options.append:
            self.print(b"[    0.5] Kernel panic - not syncing: test of the panic\r\n---[ end Kernel panic")
            self.stopped(Stop("reset", "the guest reset itself"))

    def print(self, data: bytes) -> None:
        self._console += data
        self.mailbox.post("console")

    def take_console(self) -> bytes:
        data, self._console = bytes(self._console), bytearray()
        return data

    def stopped(self, stop: Stop) -> None:
        self.mailbox.post("stopped", stop)

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        while data := os.read(self._process.stdout.fileno(), 1 << 16):
            self.mailbox.post("agent", data, len(data))
        self._process.wait()
        self.print(b"reboot: Power down\r\n")
        self.stopped(Stop("poweroff", "the guest powered off"))

    def _write(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._to))
                piece = bytes(self._to[:4096])
            try:
                n = os.write(self._process.stdin.fileno(), piece)
            except OSError:
                return
            with self._changed:
                del self._to[:n]
            self.mailbox.post("space")

    def send(self, data: bytes) -> None:
        with self._changed:
            self._to += data
            self._changed.notify_all()

    def waiting(self) -> int:
        return len(self._to)

    needs_polling = False
    state = "running"

    def release(self, pieces: int) -> None:
        pass

    def console_input(self, data: bytes) -> None:
        self.print(data.replace(b"\r", b"\r\n"))
        if b"\x04" in data:
            self.stopped(Stop("poweroff", "the guest powered off"))

    def call(self, question: Callable[[], dict[str, Any]], answer: Callable[[Any], None]) -> None:
        try:
            answer(question())
        except NonrootError as error:
            answer(error)

    def pause(self, answer: Callable[[Any], None]) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        answer({})

    def unpause(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def statistics(self) -> dict[str, Any]:
        return {
            "state": "running",
            "instructions": 12345,
            "machine_seconds": 1.5,
            "wall_seconds": 2.5,
            "cpu_seconds": 0.5,
            "exits": {"port_io": 7, "halt": 9},
            "engine": {},
        }


def main() -> None:
    fd = int(sys.argv[sys.argv.index("--control-fd") + 1])
    host.die_with_parent()
    DomainProcess(socket.socket(fileno=fd), make_runner=cast(Any, NativeRunner)).run()
    os._exit(0)


if __name__ == "__main__":
    main()
