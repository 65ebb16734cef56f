"""Display adapters out of records: registers and video memory together are all that the guest and the viewer see."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.devices.display import attach_display
from nonroot.devices.vga_state import MEMORY_SIZE, VgaState
from nonroot.display.render import Renderer
from nonroot.engines import select
from nonroot.hvm.device import StateError
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig
from nonroot.hvm.memory_record import MemoryRecord
from tests.devices.modes import CGA4, MODE_13H, MODE_X, PLANAR, TEXT, Adapter

MODES = (TEXT, CGA4, PLANAR, MODE_13H, MODE_X)
MIB = 1 << 20
OTHER = Adapter()
"""Takes over from the adapter under test; it has been used already."""

# (what: 0 a mode, 1 stores, 2 loads, 3 planes, 4 the Bochs extension, 5 the framebuffer; number; seed)
actions = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)), max_size=12)


def act(adapter: Adapter, script: list[tuple[int, int, int]]) -> list[object]:
    """What a guest does; everything that it reads."""
    seen: list[object] = []
    for what, number, seed in script:
        if what == 0:
            adapter.set_mode(MODES[number % len(MODES)])
        elif what == 1:
            adapter.store(0xA0000 + number * 2 % 0x1FF00, random.Random(seed).randbytes(seed % 40))
        elif what == 2:
            seen.append(adapter.load(0xA0000 + number * 2 % 0x1FF00, seed % 40))
        elif what == 3:
            adapter.sequencer(2, number & 0xF)
            adapter.graphics(5, seed & 0x7B)
        elif what == 4:
            for register, value in ((4, 0), (1, 64 + number % 64), (2, 40), (3, 32), (4, 0x41 | seed & 0x80)):
                adapter.dispi(register, value)
        else:
            place = number * 256 % (MEMORY_SIZE - 0x1_0000)
            adapter.ram.view[place : place + 64] = random.Random(seed).randbytes(64)
    return seen


def take_over(adapter: Adapter, other: Adapter) -> None:
    """Registers and memory of one adapter into another, as bytes."""
    memory, registers = MemoryRecord.of("vga", adapter.ram.view).pack(), adapter.vga.state().pack()
    other.clock.time_ns = adapter.clock.time_ns
    MemoryRecord.unpack("vga", MEMORY_SIZE, memory).apply(other.ram.view)
    other.vga.from_state(VgaState.unpack(registers))


def picture(adapter: Adapter) -> bytes:
    return Renderer(adapter.ram.view).render(adapter.vga.state()).tobytes()


@settings(max_examples=12, deadline=None)
@given(script=actions, later=actions)
def test_modify_snapshot_restore_compare(script: list[tuple[int, int, int]], later: list[tuple[int, int, int]]) -> None:
    adapter = Adapter()
    act(adapter, script)
    take_over(adapter, OTHER)
    assert OTHER.vga.state() == adapter.vga.state()
    assert OTHER.ram.view.obj == adapter.ram.view.obj
    assert picture(OTHER) == picture(adapter)
    # What follows is the same on both.
    assert act(adapter, later) == act(OTHER, later)
    assert OTHER.vga.state() == adapter.vga.state()
    assert OTHER.ram.view.obj == adapter.ram.view.obj


@pytest.mark.parametrize("mode", [TEXT, MODE_13H], ids=["text", "13h"])
def test_a_mapped_window_goes_on(mode: Any) -> None:
    adapter, other = Adapter(), Adapter()
    adapter.set_mode(mode)
    window = 0xB8000 if mode is TEXT else 0xA0000
    for _ in range(2):
        adapter.store(window, bytes(range(1, 100)))
    assert adapter.ram.shown
    take_over(adapter, other)
    assert other.load(window, 99) == bytes(range(1, 100))
    assert picture(other) == picture(adapter)


# ── a whole machine ──


def machine() -> Machine:
    firmware = Firmware(b"\xff" * (128 << 10))
    return Machine(
        MachineConfig(memory_bytes=16 * MIB, firmware=firmware, attach=[attach_display], agent=False),
        select.create("interpret"),
    )


def test_a_machine_s_records_hold_its_video_memory() -> None:
    source, target = machine(), machine()
    for number, value in ((1, 640), (2, 480), (3, 32), (4, 0x41)):
        source.ports.write(0x1CE, 2, number)
        source.ports.write(0x1CF, 2, value)
    video = source.board.memories["vga"].view
    video[:16] = bytes(range(16))
    target.board.memories["vga"].view[0x10_0000:0x10_0004] = b"gone"
    source.pci.write(0, 4, 0x8000_0070)
    source.pci.write(6, 1, 0x4A)
    source.memory.write(0xA_0000, b"management")
    records = source.device_states()
    assert {"memory.vga", "memory.smram"} < set(records)
    assert len(records["memory.vga"]) < 10_000
    target.restore_device_states(records)
    assert target.device_states() == records
    assert target.board.memories["vga"].view == video
    assert target.memory.read(0xA_0000, 10) == b"management"


def test_hostile_memory_changes_nothing() -> None:
    target = machine()
    records = target.device_states()
    target.board.memories["vga"].view[:4] = b"kept"
    before = target.device_states()
    for bad in (b"", records["memory.smram"], records["memory.vga"] + b"\0"):
        with pytest.raises(StateError):
            target.restore_device_states(records | {"memory.vga": bad})
    del records["memory.vga"]
    with pytest.raises(StateError, match="not those"):
        target.restore_device_states(records)
    assert target.device_states() == before


def test_system_management_ram_covers_the_window() -> None:
    target = machine()
    target.ports.write(0x3CE, 2, 0x0506)  # graphics mode, window at 0xA0000
    target.ports.write(0x3CE, 2, 0xFF08)
    target.ports.write(0x3C4, 2, 0x0F02)
    target.ports.write(0x3C4, 2, 0x0E04)  # chain-4: memory as it is
    for _ in range(8):
        target.mmio.write(0xA_0000, 1, 0x11)
    assert target.memory.read(0xA_0000, 1) == b"\x11"
    target.pci.write(0, 4, 0x8000_0070)
    target.pci.write(6, 1, 0x4A)
    assert target.memory.read(0xA_0000, 1) == b"\0"
    target.memory.write(0xA_0000, b"\x22")
    target.memory.write(0xB_FFFF, b"\x33")
    target.pci.write(6, 1, 0x1A)  # closed and locked
    assert target.memory.lookup(0xA0) is None
    assert target.mmio.read(0xA_0000, 1) == 0x11
    target.pci.write(6, 1, 0x4A)
    assert target.memory.lookup(0xA0) is None
    target.pci.reset()
    target.pci.write(0, 4, 0x8000_0070)
    target.pci.write(6, 1, 0x4A)
    assert target.memory.read(0xA_0000, 1) == b"\x22"
    assert target.memory.read(0xB_FFFF, 1) == b"\x33"


def test_the_apm_ports_keep_what_is_written() -> None:
    target = machine()
    target.ports.write(0xB3, 1, 0x01)
    target.ports.write(0xB2, 1, 0x77)
    assert (target.ports.read(0xB2, 1), target.ports.read(0xB3, 1)) == (0x77, 0x01)
    assert target.statistics()["event.piix4-pm.smi-not-raised"] == 1
    other = machine()
    other.restore_device_states(target.device_states())
    assert (other.ports.read(0xB2, 1), other.ports.read(0xB3, 1)) == (0x77, 0x01)
