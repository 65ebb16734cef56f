"""A machine as records, and a machine that goes on from them.

In the vCPU's thread, between two instructions. The records do not depend on the engine: a machine that was saved under
one goes on under another, if the CPU that its guest sees is the same.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from nonroot.engines.state import StateError as VcpuStateError
from nonroot.engines.state import VcpuState
from nonroot.hvm.device import StateError
from nonroot.saved.fields import Fields

if TYPE_CHECKING:
    from nonroot.hvm.machine import Machine

__all__ = ["restore", "take"]

VCPU: Final = "vcpu0"
MACHINE: Final = "machine"
XEN: Final = "xen"
XEN_PAGES: Final = "xen.pages"
DEVICE_PREFIX: Final = "device."
MOST_INPUT: Final = 16 << 20


def take(machine: "Machine") -> dict[str, bytes]:
    """Everything of a machine but its RAM."""
    machine.flush_output()
    records = {DEVICE_PREFIX + name: record for name, record in machine.device_states().items()}
    records[VCPU] = machine.vcpu.state().to_bytes()
    records[MACHINE] = json.dumps(
        {"input": [data.hex() for data in machine.waiting_input()], "resets": machine.resets}
    ).encode()
    if machine.xen is not None:
        record, pages = machine.xen.saved()
        records[XEN], records[XEN_PAGES] = json.dumps(record).encode(), pages
    return records


def restore(machine: "Machine", records: Mapping[str, bytes]) -> None:
    """
    Have a new machine, made of the same parts, go on where another one was. Its RAM has been filled.

    StateError if a record is hostile, missing or unknown; the machine is of no use then.
    """
    devices = {name.removeprefix(DEVICE_PREFIX): r for name, r in records.items() if name.startswith(DEVICE_PREFIX)}
    rest = {name for name in records if not name.startswith(DEVICE_PREFIX)}
    expected = {VCPU, MACHINE} | (set() if machine.xen is None else {XEN, XEN_PAGES})
    if rest != expected:
        raise StateError("the records are not those of this machine")
    facts = Fields(MACHINE, _json(records[MACHINE]))
    try:
        state = _vcpu_state(records[VCPU])
        machine.vcpu.set_state(state)
        # Their memory, and the machine's time, are there before the devices.
        if machine.xen is not None:
            machine.xen.restore(Fields(XEN, _json(records[XEN])), records[XEN_PAGES])
        machine.restore_device_states(devices)
        machine.put_waiting_input([_input(text) for text in facts.texts("input")])
        machine.resets = facts.number("resets")
        # Devices that drove their lines may have sent the local APIC what it knows already.
        machine.vcpu.set_state(state)
        if machine.xen is not None:
            machine.xen.rearm()
    except (VcpuStateError, ValueError) as error:
        raise StateError(str(error)) from None
    machine.vcpu.flush()
    machine.clock.rearm()


@lru_cache(maxsize=4)
def _vcpu_state(data: bytes) -> VcpuState:
    """A record; who goes back to a snapshot again and again needs the same one."""
    return VcpuState.from_bytes(data)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise StateError("a record is no JSON") from None


def _input(text: str) -> bytes:
    if len(text) > 2 * MOST_INPUT:
        raise StateError("machine state: input is too long")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise StateError("machine state: input is no hexadecimal number") from None
