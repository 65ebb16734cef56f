"""What outlives a card that the engine serves, and what its backend process may do to it."""

import os
import socket
from pathlib import Path

import pytest

from nonroot._engine import Memory, XenPath
from nonroot.backends.supervisor import Served
from nonroot.engines.native import InterpretEngine
from nonroot.engines.policy import CpuPolicy
from tests.waiting import wait_until

PAGE = 4096
PAGES = 8
PORT = 5


def card_threads() -> set[str]:
    """Threads of cards in this process."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == "nonroot-card":
                found.add(task.name)
        except OSError:
            continue  # it has just ended
    return found


def test_a_cards_thread_ends_with_its_path() -> None:
    before = card_threads()
    memory, engine = Memory(), InterpretEngine()
    vcpu = engine.create_vcpu(memory, CpuPolicy.build(engine.cpu_features))
    pages, turns = os.memfd_create("pages"), os.memfd_create("turns")
    bell = os.eventfd(0, os.EFD_NONBLOCK)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        os.ftruncate(pages, PAGES * PAGE)
        os.pwrite(turns, (1).to_bytes(4, "little") + bytes(PAGE - 4), 0)
        memory.map(0, PAGES, memory.add_backing(pages, PAGES * PAGE), 0)
        path = XenPath(memory, [vcpu.raw], (0, 0))
        path.layout(64, 2048, 2560, 8)
        path.info(0, (0, 0))
        path.vector(0, 0xF3)
        path.bell(PORT, 0, bell)
        assert path.add_card(
            (PORT, PORT), (0, PAGE), (0, 2 * PAGE), (turns, 0), (0, 3 * PAGE, 512), near.fileno(), bell
        )
        assert wait_until(lambda: card_threads() - before)
        del path
        assert wait_until(lambda: not card_threads() - before)
    for descriptor in (pages, turns, bell):
        os.close(descriptor)


def test_the_file_with_the_rings_turns_keeps_its_size() -> None:
    served = Served("device", {}, [], lambda reason: None, 1)
    size = os.fstat(served.journal).st_size
    for other in (0, size + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(served.journal, other)
    served.close()
