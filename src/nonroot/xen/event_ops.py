"""event_channel_op: the guest's requests about its event channels."""

import struct
from collections.abc import Callable

from nonroot.xen.abi import DOMID_SELF, Errno, Event, HypercallError
from nonroot.xen.call import Call
from nonroot.xen.events import EventChannels, Kind

__all__ = ["EventOps"]

_INTERDOMAIN = struct.Struct("<H2xII")
_THREE = struct.Struct("<III")
_TWO = struct.Struct("<II")
_UNBOUND = struct.Struct("<HHI")
_STATUS = struct.Struct("<H2xIIIII")


class EventOps:
    """The operations on one domain's channels. In the vCPU's thread."""

    def __init__(self, channels: EventChannels, domid: int) -> None:
        self._channels = channels
        self._domid = domid
        self._handlers: dict[int, Callable[[Call], None]] = {
            Event.BIND_INTERDOMAIN: self._bind_interdomain,
            Event.BIND_VIRQ: self._bind_virq,
            Event.CLOSE: lambda call: channels.close(_port(call)),
            Event.SEND: lambda call: channels.send(_port(call)),
            Event.STATUS: self._status,
            Event.ALLOC_UNBOUND: self._alloc_unbound,
            Event.BIND_IPI: self._bind_ipi,
            Event.BIND_VCPU: self._bind_vcpu,
            Event.UNMASK: lambda call: channels.unmask(_port(call)),
            Event.RESET: self._reset,
        }

    def __call__(self, call: Call) -> int:
        """The hypercall. FIFO channels are refused like anything unknown: guests use two levels then."""
        handler = self._handlers.get(call.args[0] & 0xFFFF_FFFF)
        if handler is None:
            raise HypercallError(Errno.ENOSYS)
        handler(call)
        return 0

    def _is_self(self, domid: int) -> bool:
        return domid in (DOMID_SELF, self._domid)

    def _bind_interdomain(self, call: Call) -> None:
        remote, remote_port, _ = _INTERDOMAIN.unpack(call.read(call.args[1], _INTERDOMAIN.size))
        if not self._is_self(remote):
            raise HypercallError(Errno.ESRCH)
        port = self._channels.bind_loopback(remote_port)
        call.write(call.args[1], _INTERDOMAIN.pack(remote, remote_port, port))

    def _bind_virq(self, call: Call) -> None:
        virq, vcpu, _ = _THREE.unpack(call.read(call.args[1], _THREE.size))
        call.write(call.args[1], _THREE.pack(virq, vcpu, self._channels.bind_virq(virq, vcpu)))

    def _status(self, call: Call) -> None:
        domid, number, _, _, _, _ = _STATUS.unpack(call.read(call.args[1], _STATUS.size))
        if not self._is_self(domid):
            raise HypercallError(Errno.EPERM)
        port = self._channels.status(number)
        first, second = {
            Kind.UNBOUND: (port.remote, 0),
            Kind.INTERDOMAIN: (port.remote, port.remote_port),
            Kind.VIRQ: (port.virq, 0),
        }.get(port.kind, (0, 0))
        call.write(call.args[1], _STATUS.pack(domid, number, port.kind, port.vcpu, first, second))

    def _alloc_unbound(self, call: Call) -> None:
        domid, remote, _ = _UNBOUND.unpack(call.read(call.args[1], _UNBOUND.size))
        if not self._is_self(domid):
            raise HypercallError(Errno.EPERM)
        call.write(call.args[1], _UNBOUND.pack(domid, remote, self._channels.alloc_unbound(remote)))

    def _bind_ipi(self, call: Call) -> None:
        vcpu, _ = _TWO.unpack(call.read(call.args[1], _TWO.size))
        call.write(call.args[1], _TWO.pack(vcpu, self._channels.bind_ipi(vcpu)))

    def _bind_vcpu(self, call: Call) -> None:
        port, vcpu = _TWO.unpack(call.read(call.args[1], _TWO.size))
        self._channels.bind_vcpu(port, vcpu)

    def _reset(self, call: Call) -> None:
        if not self._is_self(int.from_bytes(call.read(call.args[1], 2), "little")):
            raise HypercallError(Errno.EPERM)
        self._channels.reset()


def _port(call: Call) -> int:
    return int.from_bytes(call.read(call.args[1], 4), "little")
