"""The pages of I/O requests, and the operations of a device model, without any process."""

import os
import struct
import threading

import pytest

from nonroot._engine import IoreqPages
from nonroot.hvm import ioreq
from nonroot.hvm.dm_op import EINVAL, ENOSYS, EPERM, DmOp, Operations
from nonroot.hvm.ioreq import Ioreq, IoreqState, IoreqType, pci_address, pci_function

REPLY, OPERATIONS, WRITES, REQUEST = 0, 1, 5, 6


@pytest.fixture
def file() -> int:
    fd = os.memfd_create("pages")
    os.ftruncate(fd, ioreq.LENGTH)
    return fd


def event() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK)


def test_a_request_as_it_lies_in_the_page(file: int) -> None:
    hypervisor, model = (IoreqPages(file, ioreq.LENGTH, 2) for _ in range(2))
    wake = event()
    hypervisor.submit(1, IoreqType.PIO, ioreq.READ, 0x1F7, 0, 1, 1, wake)
    found = Ioreq.unpack(os.pread(file, 32, 32))
    assert found == Ioreq(0x1F7, 0, 1, 1, IoreqState.READY, IoreqType.PIO, ioreq.READ)
    assert found.pack() == os.pread(file, 32, 32)
    assert model.next(wake, -1) == (REQUEST, 1, IoreqType.PIO, ioreq.READ, 0x1F7, 0, 1, 1)
    assert Ioreq.unpack(os.pread(file, 32, 32)).state is IoreqState.INPROCESS
    model.respond(1, 0x50, wake)
    assert Ioreq.unpack(os.pread(file, 32, 32)).state is IoreqState.RESPONSE_READY
    assert hypervisor.reply(1, wake, -1, 10.0) == (REPLY, 0x50)
    assert Ioreq.unpack(os.pread(file, 32, 32)).state is IoreqState.NONE


def test_posted_writes_as_they_lie_in_the_ring(file: int) -> None:
    pages = IoreqPages(file, ioreq.LENGTH, 1)
    wake = event()
    assert pages.post(IoreqType.COPY, 0xB8000, 2, 0x0741, wake)
    assert pages.post(IoreqType.COPY, 0xA0000, 8, 0x1122334455667788, wake)
    assert not pages.post(IoreqType.COPY, 0xA0000, 3, 0, wake)
    read, write, *slots = struct.unpack("<IIQQQ", os.pread(file, 32, 0x1000))
    assert (read, write) == (0, 3)
    assert [slot & 0xFF for slot in slots] == [IoreqType.COPY] * 3
    assert [slot >> 12 & 0xFFFFF for slot in slots] == [0xB8000, 0xA0000, 0xA0000]
    assert [slot >> 10 & 3 for slot in slots] == [1, 3, 3]
    assert [slot >> 32 for slot in slots] == [0x0741, 0x55667788, 0x11223344]


def test_waiting_is_sleeping(file: int) -> None:
    hypervisor, model = (IoreqPages(file, ioreq.LENGTH, 1) for _ in range(2))
    wake, woken = event(), event()
    used: list[float] = []

    def serve() -> None:
        _, vcpu, *_ = model.next(wake, -1, 20.0)
        used.append(_thread_seconds())
        model.respond(vcpu, 1, woken)

    thread = threading.Thread(target=serve)
    thread.start()
    threading.Event().wait(0.3)
    hypervisor.submit(0, IoreqType.PIO, 0, 0, 0, 1, 1, wake)
    assert hypervisor.reply(0, woken, -1, 20.0) == (REPLY, 1)
    thread.join()
    assert used[0] < 0.1


def _thread_seconds() -> float:
    import time

    return time.thread_time()


def test_a_late_reply(file: int) -> None:
    pages = IoreqPages(file, ioreq.LENGTH, 1)
    wake = event()
    pages.submit(0, IoreqType.PIO, 0, 0, 0, 1, 1, wake)
    assert pages.reply(0, wake, -1, 0.01)[0] == 3


def test_pci_addresses() -> None:
    assert pci_address(1 << 3 | 1, 0x20) == 9 << 32 | 0x20
    assert pci_function(pci_address(9, 0x20)) == (9, 0x20)


def test_operations_are_for_the_target_alone() -> None:
    done: list[list[int]] = []

    def take(args: object) -> int:
        done.append(list(args))  # type: ignore[call-overload]
        return 3

    def refuse(args: object) -> int:
        raise ValueError("no")

    operations = Operations(7, {DmOp.SET_ISA_IRQ_LEVEL: take, DmOp.SHOW_MEMORY: refuse})
    assert operations.do(7, DmOp.SET_ISA_IRQ_LEVEL, [14, 1]) == 3
    assert operations.do(8, DmOp.SET_ISA_IRQ_LEVEL, [14, 1]) == -EPERM
    assert operations.do(0, DmOp.SET_ISA_IRQ_LEVEL, [14, 1]) == -EPERM
    assert operations.do(7, 9999, []) == -ENOSYS
    assert operations.do(7, DmOp.SHOW_MEMORY, []) == -EINVAL
    assert done == [[14, 1]]
    assert operations.refused == 4
