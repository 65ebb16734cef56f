"""What every hypervisor device promises, tested on every registered one."""

import importlib
import inspect
import pkgutil
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nonroot.devices
import nonroot.hvm
import nonroot.xen
from nonroot.hvm.device import Device, StateError, StateRecord
from tests.hvm.makers import KINDS, Kind, Outside

ALL = sorted(KINDS, key=lambda kind: kind.__name__)
every_device = pytest.mark.parametrize("device_type", ALL, ids=lambda kind: kind.__name__)

# (what: 0 read, 1 write, 2 let time pass, 3 input from outside; offset; size; value)
Action = tuple[int, int, int, int]
actions = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 0xFF), st.integers(0, 2), st.integers(0, 0xFFFF_FFFF)), max_size=60
)


def act(device: Device, outside: Outside, kind: Kind, script: list[Action]) -> list[int]:
    """Do what the guest and the world could do; everything that was read."""
    seen = []
    for what, offset, size_index, value in script:
        size = kind.sizes[size_index % len(kind.sizes)]
        offset %= kind.length - size + 1
        if what == 0:
            result = device.read(offset, size)
            assert 0 <= result < 1 << 8 * size
            seen.append(result)
        elif what == 1:
            device.write(offset, size, value & (1 << 8 * size) - 1)
        elif what == 2:
            pass_time(device, outside, value * 7)
        else:
            poke(device, value)
        seen.append(int(outside.high()))
    return seen


def pass_time(device: Any, outside: Outside, duration: int) -> None:
    if not hasattr(device, "deadline"):  # isinstance of a protocol takes thirty times as long
        outside.clock.time_ns += duration
        return
    end = outside.clock.time_ns + duration
    for _ in range(50):
        deadline = device.deadline()
        if deadline is None or deadline > end:
            break
        outside.clock.time_ns = max(outside.clock.time_ns, deadline)
        device.advance(outside.clock.time_ns)
        after = device.deadline()
        assert after is None or after > deadline, "a deadline that was met comes again"
    outside.clock.time_ns = end
    device.advance(end)


def poke(device: Any, value: int) -> None:
    """Inputs that are not register accesses."""
    if hasattr(device, "receive"):
        device.receive(value.to_bytes(4, "little")[: value % 5])
    if hasattr(device, "set_modem_lines"):
        device.set_modem_lines(value & 0xFF)
    if hasattr(device, "set_line"):
        line = value % 16
        device.set_line(line if line != 2 else 3, bool(value & 0x100))
    if hasattr(device, "eoi"):
        device.eoi(value >> 8 & 0xFF)
    if hasattr(device, "acknowledge"):
        assert 0 <= device.acknowledge() < 256
    if hasattr(device, "key"):
        device.key(value & 0xFF, bool(value & 0x100))
        device.move(value % 700 - 350, value // 700 % 700 - 350, value >> 24 & 3, value >> 20 & 7)
    if hasattr(device, "config_write") and hasattr(device, "config_read"):
        device.config_write(value & 0xFC, 4, value >> 3)
        assert 0 <= device.config_read(value >> 8 & 0xFC, 4) < 1 << 32
    if hasattr(device, "press_power_button"):
        device.press_power_button()


def test_every_device_is_registered() -> None:
    found = set()
    for package in (nonroot.hvm, nonroot.devices, nonroot.xen):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if info.name in ("nonroot.hvm.machine", "nonroot.hvm.ram"):
                continue
            for _, thing in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                if all(hasattr(thing, name) for name in ("read", "write", "reset", "state", "from_state")):
                    found.add(thing)
    bases = {base for kind in KINDS for base in kind.__mro__[1:]}
    assert {kind for kind in found - bases if not getattr(kind, "_is_protocol", False)} == set(KINDS)


@every_device
def test_is_a_device(device_type: type) -> None:
    assert isinstance(KINDS[device_type].make(Outside()), Device)


@every_device
@settings(max_examples=60, deadline=None)
@given(script=actions, later=actions)
def test_snapshot_and_restore_are_exact(device_type: type, script: list[Action], later: list[Action]) -> None:
    kind, outside = KINDS[device_type], Outside()
    device = kind.make(outside)
    act(device, outside, kind, script)
    record = device.state()
    packed = record.pack()
    assert len(packed) == type(record).size()

    elsewhere = Outside()
    elsewhere.clock.time_ns = outside.clock.time_ns
    other = kind.make(elsewhere)
    act(other, elsewhere, kind, [(1, n, 0, 0xA5) for n in range(8)])
    elsewhere.clock.time_ns = outside.clock.time_ns
    other.from_state(type(record).unpack(packed))
    assert other.state() == record
    assert other.state().pack() == packed
    assert elsewhere.level == outside.high()
    # What follows is the same on both.
    assert act(device, outside, kind, later) == act(other, elsewhere, kind, later)
    assert device.state() == other.state()


@every_device
def test_reset_gives_the_state_of_a_new_device(device_type: type) -> None:
    kind, outside = KINDS[device_type], Outside()
    device = kind.make(outside)
    fresh = device.state()
    act(device, outside, kind, [(1, n, 0, 0x5A) for n in range(min(kind.length, 16))])
    device.reset()
    if device_type.__name__ == "Rtc":
        # The battery keeps time, memory and control register A.
        now = device.state()
        assert getattr(now, "reg_b") & 0x70 == 0  # noqa: B009
    else:
        assert device.state() == fresh
    assert not outside.high()


@every_device
def test_truncated_padded_and_foreign_records_are_refused(device_type: type) -> None:
    device = KINDS[device_type].make(Outside())
    record = type(device.state())
    good = device.state().pack()
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        good[:4],
        b"x" + good[1:],
        bytes(len(good)),
        good[:8] + b"\xff" + good[9:],
    ):
        with pytest.raises(StateError):
            record.unpack(bad)
    other = next(k for k in ALL if k is not device_type)
    with pytest.raises(StateError):
        device.from_state(KINDS[other].make(Outside()).state())


@every_device
def test_out_of_range_fields_are_refused_and_change_nothing(device_type: type) -> None:
    kind = KINDS[device_type]
    device = kind.make(Outside())
    before = device.state().pack()
    record: Any = device.state()
    refused = 0
    for f in fields(record):
        for bad in (-1 << 70, 1 << 70, "text", None, b"\0" * 100_000, (1,)):
            with pytest.raises(StateError):
                device.from_state(replace(record, **{f.name: bad}))
            refused += 1
    assert refused >= 6
    assert device.state().pack() == before


@every_device
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_hostile_records_are_refused_or_harmless(device_type: type, data: st.DataObject) -> None:
    kind, outside = KINDS[device_type], Outside()
    device = kind.make(outside)
    record = type(device.state())
    packed = bytearray(device.state().pack())
    body = record._HEADER.size
    positions = st.integers(body, min(len(packed), body + 400) - 1)
    for position, value in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=8)):
        packed[position] = value
    try:
        device.from_state(record.unpack(bytes(packed)))
    except StateError:
        return
    assert isinstance(device.state(), StateRecord)
    script = [(n % 4, n, n % 3, n * 0x1234567 & 0xFFFF_FFFF) for n in range(24)]
    for what, offset, size_index, value in script:
        if what != 2:
            act(device, outside, kind, [(what, offset, size_index, value)])
    device.state().pack()
