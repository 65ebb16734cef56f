"""Machines that are saved and restored: the guest cannot tell, whichever engine goes on."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nonroot.engines import select
from nonroot.guests import cached
from nonroot.hvm.device import StateError
from nonroot.hvm.machine import Machine, MachineConfig, Reason
from nonroot.hvm.saved import restore, take
from nonroot.xen.config import XenConfig
from tests.hvm.guests import HALT, POWER_OFF, pvh, say
from tests.saved.machines import Recorded

GUEST = pvh(b"\x90" * 200 + say(b"one\n") + b"\x90" * 200 + say(b"two\n") + POWER_OFF)


def config(**more: Any) -> MachineConfig:
    return MachineConfig(16 << 20, GUEST, base_wall_ns=10**18, virtual_time=(1, 1), **more)


def interpret() -> Any:
    return select.create("interpret")


@pytest.mark.parametrize("xen", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_small_guest(tmp_path: Path, xen: bool, packed: bool) -> None:
    whole = config(xen=XenConfig(domid=3) if xen else None, scramble_seed=7)
    first = Recorded(whole, interpret())
    assert first.machine.run(300).reason == Reason.STOPPED
    first.save(tmp_path / "a", packed)
    second = first.restored(tmp_path / "a", interpret())
    assert take(second.machine) == take(first.machine)
    shown = len(first.output)
    assert first.machine.run() == second.machine.run()
    assert first.output == b"one\ntwo\n"
    assert first.output[shown:] == second.output
    assert first.machine.vcpu.retired() == second.machine.vcpu.retired()


def test_records_of_another_machine_are_refused() -> None:
    plain, xen = Machine(config(), interpret()), Machine(config(xen=XenConfig(domid=1)), interpret())
    for one, other in ((plain, xen), (xen, plain)):
        with pytest.raises(StateError, match="records are not those of this machine"):
            restore(one, take(other))
    records = take(plain)
    del records["device.pit"]
    with pytest.raises(StateError, match="records are not those of this machine"):
        restore(Machine(config(), interpret()), records)
    with pytest.raises(StateError, match="no JSON"):
        restore(Machine(config(), interpret()), take(plain) | {"machine": b"{"})


def try_it(machine: Machine) -> None:
    """Whatever became of it, nothing but the guest can be hurt. It may wait for ever, or run for ever."""
    timer = threading.Timer(0.02, machine.stop)
    timer.start()
    machine.run()
    timer.join()


def damaged(draw: Any, value: Any) -> Any:
    """``value`` with something in it changed."""
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 9)) == 0:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: damaged(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], damaged(draw, value[index]), *value[index + 1 :]]
    return draw(
        st.one_of(
            st.integers(-(1 << 65), 1 << 65),
            st.integers(-1, 4096),
            st.none(),
            st.booleans(),
            st.text(max_size=4),
            st.lists(st.integers(-1, 1 << 64), max_size=4),
        )
    )


@pytest.fixture(scope="module")
def xen_records() -> dict[str, bytes]:
    machine = Machine(config(xen=XenConfig(domid=3)), interpret())
    machine.run(300)
    assert machine.xen is not None
    machine.xen.channels.alloc_unbound(0)
    machine.xen.channels.bind_virq(0, 0)
    machine.xen.physmap.remove(0x200)
    return take(machine)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_records_of_xen(xen_records: dict[str, bytes], data: st.DataObject) -> None:
    record = json.loads(xen_records["xen"])
    for _ in range(data.draw(st.integers(1, 2))):
        record = damaged(data.draw, record)
    machine = Machine(replace(config(xen=XenConfig(domid=4)), kernel=b"", resumed=True, protocol="pvh"), interpret())
    try:
        restore(machine, xen_records | {"xen": json.dumps(record).encode()})
    except StateError:
        return
    try_it(machine)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_hostile_records(xen_records: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(xen_records)))
    bad = bytearray(xen_records[name])
    for _ in range(data.draw(st.integers(1, 3))):
        if bad:
            bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    machine = Machine(replace(config(xen=XenConfig(domid=4)), kernel=b"", resumed=True, protocol="pvh"), interpret())
    try:
        restore(machine, xen_records | {name: bytes(bad)})
    except StateError:
        return
    try_it(machine)


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("xen", [False, True])
def test_linux_at_any_moment_of_its_boot(tmp_path: Path, xen: bool) -> None:
    guest = cached("cloud-amd64")
    if guest is None:
        message = "Debian's cloud-amd64 kernel has not been fetched (make guests)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    line = "panic=-1 cryptomgr.notests rdinit=/bin/busybox -- poweroff -f"
    linux = MachineConfig(
        128 << 20,
        guest.kernel.read_bytes(),
        cmdline=("console=hvc0 " if xen else "console=ttyS0 ") + line,
        initrd=None if guest.initrd is None else guest.initrd.read_bytes(),
        base_wall_ns=10**18,
        virtual_time=(1, 1),
        xen=XenConfig(domid=3) if xen else None,
    )
    fast = "interpret" if select.translator_missing() else "translate"
    first = Recorded(linux, select.create(fast))
    others = []
    for moment, goes_on in ((7_654_321, fast), (150_000_000, fast), (300_000_000, fast), (420_000_000, "interpret")):
        assert first.machine.run(moment).reason == Reason.STOPPED
        first.save(tmp_path / "a", packed=False)
        other = first.restored(tmp_path / "a", select.create(goes_on))
        assert take(other.machine) == take(first.machine)
        others.append((len(first.output), other))
    end = first.machine.run()
    assert end.reason == Reason.POWER_OFF
    for shown, other in others:
        assert other.machine.run() == end
        assert first.output[shown:] == other.output
        assert first.machine.vcpu.retired() == other.machine.vcpu.retired()


def test_a_guest_that_waits(tmp_path: Path) -> None:
    """Halted is a state too."""
    first = Recorded(replace(config(), kernel=pvh(say(b"x") + HALT)), interpret())
    try_it(first.machine)
    assert first.machine.vcpu.state().activity == 1
    first.save(tmp_path / "a")
    second = first.restored(tmp_path / "a", interpret())
    assert second.machine.vcpu.state() == first.machine.vcpu.state()
