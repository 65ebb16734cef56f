"""A virtio driver in Python for a device in Python: registers, split queues, and a FUSE client on top."""

from __future__ import annotations

import struct
import threading
from typing import Any

from nonroot.backends import fuse_abi as fuse
from nonroot.devices.pci_device import PciConnection
from nonroot.devices.virtio_fs import VirtioFs
from nonroot.devices.virtio_pci import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    ISR,
    NOTIFY,
)
from nonroot.hvm.pci import COMMAND, COMMAND_MASTER, COMMAND_MEMORY

RAM = 8 << 20


class Ram:
    """Guest memory as a bus master sees it."""

    def __init__(self) -> None:
        self.data = bytearray(RAM)

    def read(self, address: int, length: int) -> bytes:
        data = bytes(self.data[address : address + length]) if address < RAM else b""
        return data + b"\xff" * (length - len(data))

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        if address + len(data) <= RAM:
            self.data[address : address + len(data)] = data

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        return -1


class Driver:
    """Sets the device up, and sends requests through its two queues."""

    DESCRIPTORS, AVAILABLE, USED, BUFFERS = 0x1000, 0x6000, 0x8000, 0x20000

    def __init__(self, tag: str = "share0") -> None:
        self.ram = Ram()
        self.line = False
        self.interrupts = threading.Semaphore(0)
        self.device = VirtioFs(tag, 0, PciConnection(irq=self._irq, dma=self.ram))
        self.device.reset()
        self.device.config_write(COMMAND, 2, COMMAND_MEMORY | COMMAND_MASTER)
        self._available = [0, 0]
        self._seen = [0, 0]
        self._unique = 1

    def _irq(self, level: bool) -> None:
        if level and not self.line:
            self.interrupts.release()
        self.line = level

    def level(self) -> bool:
        """Of the interrupt line."""
        return self.line

    def set_up(self, queues: int = 2, size: int = 128) -> None:
        device = self.device
        device.write(20, 1, ACKNOWLEDGE)
        device.write(20, 1, ACKNOWLEDGE | DRIVER)
        for word in (0, 1):
            device.write(0, 4, word)
            offered = device.read(4, 4)
            device.write(8, 4, word)
            device.write(12, 4, offered)
        device.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert device.read(20, 1) & FEATURES_OK
        for queue in range(queues):
            device.write(22, 2, queue)
            device.write(24, 2, size)
            base = queue << 20
            for register, place in ((32, self.DESCRIPTORS), (40, self.AVAILABLE), (48, self.USED)):
                device.write(register, 4, base + place)
                device.write(register + 4, 4, 0)
            device.write(28, 2, 1)
        device.write(20, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        self._available, self._seen = [0, 0], [0, 0]
        self.size = size

    # ── one request at a time ──

    def put_descriptor(self, queue: int, index: int, address: int, length: int, flags: int, following: int) -> None:
        at = (queue << 20) + self.DESCRIPTORS + 16 * index
        self.ram.write(at, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, queue: int, head: int) -> None:
        base = (queue << 20) + self.AVAILABLE
        self.ram.write(base + 4 + 2 * (self._available[queue] % self.size), struct.pack("<H", head))
        self._available[queue] = self._available[queue] + 1 & 0xFFFF
        self.ram.write(base + 2, struct.pack("<H", self._available[queue]))
        self.device.write(NOTIFY + 4 * queue, 2, queue)

    def used(self, queue: int) -> tuple[int, int] | None:
        base = (queue << 20) + self.USED
        (index,) = struct.unpack("<H", self.ram.read(base + 2, 2))
        if index == self._seen[queue]:
            return None
        head, length = struct.unpack("<II", self.ram.read(base + 4 + 8 * (self._seen[queue] % self.size), 8))
        self._seen[queue] = self._seen[queue] + 1 & 0xFFFF
        return head, length

    def wait(self, queue: int, seconds: float = 10.0) -> tuple[int, int]:
        while (found := self.used(queue)) is None:
            assert self.interrupts.acquire(timeout=seconds), "no interrupt came"
            self.device.read(ISR, 1)
        return found

    def exchange(self, message: bytes, room: int, indirect: bool = False, queue: int = 1) -> bytes:
        """A request in pieces, and what came back."""
        base = (queue << 20) + self.BUFFERS
        self.ram.write(base, message)
        answer = base + len(message) + 64
        half = len(message) // 2
        segments = [(base, half, 0), (base + half, len(message) - half, 0)]
        if room:
            segments += [(answer, min(room, 10), 2), (answer + min(room, 10), max(room - 10, 0), 2)]
        for index, (address, length, flags) in enumerate(segments):
            last = index == len(segments) - 1
            flags |= 0 if last else 1
            if indirect:
                self.ram.write(base - 0x1000 + 16 * index, struct.pack("<QIHH", address, length, flags, index + 1))
            else:
                self.put_descriptor(queue, index, address, length, flags, index + 1)
        if indirect:
            self.put_descriptor(queue, 0, base - 0x1000, 16 * len(segments), 4, 0)
        self.offer(queue, 0)
        head, written = self.wait(queue)
        assert head == 0
        assert written <= room
        return self.ram.read(answer, written)

    # ── FUSE ──

    def call(self, opcode: int, node: int = 1, body: bytes = b"", room: int = 1 << 17, **how: Any) -> tuple[int, bytes]:
        """(errno, what came back)."""
        self._unique += 2
        header = fuse.IN_HEADER.pack(40 + len(body), opcode, self._unique, node, 0, 0, 1, 0, 0)
        reply = self.exchange(header + body, room, **how)
        length, error, unique = fuse.OUT_HEADER.unpack_from(reply)
        assert unique == self._unique
        assert length == len(reply)
        return -error, reply[16:]

    def config(self) -> bytes:
        return b"".join(self.device.read(CONFIG + at, 4).to_bytes(4, "little") for at in range(0, 40, 4))


def init_body() -> bytes:
    return fuse.INIT_IN.pack(7, 36, 1 << 17, 0xFFFFFFFF) + bytes(48)
