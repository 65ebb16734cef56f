"""Event channels with two levels of pending bits, and the upcall that tells a vCPU of them.

Raising sets the port's pending bit; if it was clear and the port is not masked, the word's bit in the vCPU's selector;
if that was clear, the vCPU's upcall_pending, and then the vCPU is told. All bits are in memory that the guest changes
at the same time, so each step is one atomic exchange.

Source: Xen's xen/common/event_2l.c and event_channel.c; public/event_channel.h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from threading import RLock
from typing import Any, Final

from nonroot._engine import XenPath
from nonroot.hvm.device import StateError
from nonroot.saved.fields import Fields
from nonroot.xen.abi import DOMID_SELF, GLOBAL_VIRQS, PER_VCPU_VIRQS, VIRQS, Errno, HypercallError, Virq
from nonroot.xen.backend import EventChannelError
from nonroot.xen.shared import SharedInfo

__all__ = ["BackendPort", "EventChannels", "Kind", "Port"]

BACKEND_DOMID: Final = 0


class Kind(IntEnum):
    """What a port is bound to: EVTCHNSTAT numbers."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


@dataclass(slots=True)
class Port:
    """One port of the guest."""

    kind: Kind
    vcpu: int = 0
    remote: int = 0
    """The other domain, of unbound and interdomain ports."""
    remote_port: int = 0
    virq: int = 0
    backend: "BackendPort | None" = None


class BackendPort:
    """A backend's end; see :class:`nonroot.xen.backend.EventChannelPort`."""

    def __init__(
        self,
        channels: "EventChannels",
        guest_port: int,
        number: int,
        on_event: Callable[[], object],
        bell: int | None = None,
    ) -> None:
        self.guest_port = guest_port
        self.number = number
        """Its number in the backend's domain."""
        self.on_event = on_event
        self.bell = bell
        """The eventfd that ``on_event`` writes, if that is all that it does."""
        self._channels = channels

    def notify(self) -> None:
        """Raise the event in the guest. Any thread."""
        self._channels.notify_guest(self)

    def close(self) -> None:
        """Give the channel up. Any thread."""
        self._channels.close_backend(self)


class EventChannels:
    """All event channels of one domain. Any thread."""

    def __init__(
        self,
        shared: SharedInfo,
        domid: int,
        vcpus: int,
        tell: Callable[[int], object],
        path: XenPath | None = None,
    ) -> None:
        """
        ``tell(vcpu)``: upcall_pending of that vCPU has been set; called in any thread. ``path``: does what it can of
        this without us, and is told of every change.
        """
        self._path = path
        self._shared = shared
        self._domid = domid
        self._vcpus = vcpus
        self._tell = tell
        self._lock = RLock()
        self._ports: dict[int, Port] = {}
        self._virqs: dict[tuple[int, int], int] = {}
        self._next_backend_port = 1

    # ── the guest's requests; all raise HypercallError ──

    def alloc_unbound(self, remote: int) -> int:
        """A port that ``remote`` may bind to."""
        with self._lock:
            return self._new(Port(Kind.UNBOUND, remote=self._domid if remote == DOMID_SELF else remote))

    def bind_loopback(self, remote_port: int) -> int:
        """A port bound to another of the same domain, which waits for it."""
        with self._lock:
            other = self._ports.get(remote_port)
            if other is None or other.kind != Kind.UNBOUND or other.remote != self._domid:
                raise HypercallError(Errno.EINVAL)
            port = self._new(Port(Kind.INTERDOMAIN, remote=self._domid, remote_port=remote_port))
            other.kind, other.remote_port = Kind.INTERDOMAIN, port
            self._show(remote_port)
            self._raise(port)
            return port

    def bind_virq(self, virq: int, vcpu: int) -> int:
        """A port for a virtual interrupt."""
        if not 0 <= virq < VIRQS or (virq not in PER_VCPU_VIRQS and vcpu != 0):
            raise HypercallError(Errno.EINVAL)
        if virq in GLOBAL_VIRQS:
            raise HypercallError(Errno.EPERM)
        self._check_vcpu(vcpu)
        with self._lock:
            if (virq, vcpu) in self._virqs:
                raise HypercallError(Errno.EEXIST)
            port = self._new(Port(Kind.VIRQ, vcpu, virq=virq))
            self._virqs[virq, vcpu] = port
            if self._path is not None and virq == Virq.TIMER:
                self._path.timer(vcpu, port)
            return port

    def bind_ipi(self, vcpu: int) -> int:
        """A port for messages to a vCPU."""
        self._check_vcpu(vcpu)
        with self._lock:
            return self._new(Port(Kind.IPI, vcpu))

    def bind_vcpu(self, port: int, vcpu: int) -> None:
        """Have a port's events delivered to another vCPU."""
        self._check_vcpu(vcpu)
        with self._lock:
            found = self._get(port)
            if found.kind == Kind.IPI or (found.kind == Kind.VIRQ and found.virq in PER_VCPU_VIRQS):
                raise HypercallError(Errno.EINVAL)
            found.vcpu = vcpu
            self._show(port)

    def close(self, port: int) -> None:
        """Free a port; the other end becomes unbound."""
        with self._lock:
            found = self._get(port)
            self._forget(port, found)
            if found.kind == Kind.INTERDOMAIN and found.remote == self._domid:
                other = self._ports.get(found.remote_port)
                if other is not None:
                    other.kind, other.remote_port = Kind.UNBOUND, 0
                    self._show(found.remote_port)
            self._shared.clear_pending(port)

    def send(self, port: int) -> None:
        """The guest notifies the other end."""
        with self._lock:
            found = self._get(port)
            backend = None
            if found.kind == Kind.INTERDOMAIN:
                backend = found.backend
                if backend is None:
                    self._raise(found.remote_port)
            elif found.kind == Kind.IPI:
                self._raise(port)
            elif found.kind != Kind.UNBOUND:
                raise HypercallError(Errno.EINVAL)
        if backend is not None:
            backend.on_event()

    def unmask(self, port: int) -> None:
        """Clear the mask bit; what is pending is delivered."""
        with self._lock:
            found = self._get(port)
            if self._shared.unmask(port) and self._shared.select(found.vcpu, port):
                self._tell(found.vcpu)

    def status(self, port: int) -> Port:
        """What a port is; closed ones have a record too."""
        if not 0 < port < self._shared.abi.ports:
            raise HypercallError(Errno.EINVAL)
        return self._ports.get(port, Port(Kind.CLOSED))

    def reset(self) -> None:
        """Close all ports."""
        with self._lock:
            for port in list(self._ports):
                self.close(port)

    # ── the hypervisor's side ──

    def raise_virq(self, virq: int, vcpu: int) -> None:
        """A virtual interrupt; nothing happens if the guest has not bound it."""
        with self._lock:
            port = self._virqs.get((virq, vcpu))
            if port is not None:
                self._raise(port)

    def pending(self, port: int) -> bool:
        """Whether a port's event is pending."""
        return self._shared.is_pending(port)

    def bind_backend(
        self, port: int, on_event: Callable[[], object], domid: int = BACKEND_DOMID, bell: int | None = None
    ) -> BackendPort:
        """Connect a backend to a port that waits for it, and tell it at once. EventChannelError."""
        with self._lock:
            found = self._ports.get(port)
            if found is None or found.kind != Kind.UNBOUND or found.remote != domid:
                raise EventChannelError(f"the domain has no event channel {port} that waits for domain {domid}")
            backend = BackendPort(self, port, self._next_backend_port, on_event, bell)
            self._next_backend_port += 1
            found.kind, found.backend, found.remote_port = Kind.INTERDOMAIN, backend, backend.number
            self._show(port)
        on_event()
        return backend

    def notify_guest(self, backend: BackendPort) -> None:
        """See :meth:`BackendPort.notify`."""
        with self._lock:
            found = self._ports.get(backend.guest_port)
            if found is not None and found.backend is backend:
                self._raise(backend.guest_port)

    def close_backend(self, backend: BackendPort) -> None:
        """See :meth:`BackendPort.close`."""
        with self._lock:
            found = self._ports.get(backend.guest_port)
            if found is not None and found.backend is backend:
                found.kind, found.backend, found.remote_port = Kind.UNBOUND, None, 0
                self._show(backend.guest_port)

    # ── saved domains ──

    def saved(self) -> dict[str, Any]:
        """All ports."""
        with self._lock:
            ports = [
                {
                    "number": number,
                    "kind": int(port.kind),
                    "vcpu": port.vcpu,
                    "own": port.kind in (Kind.UNBOUND, Kind.INTERDOMAIN) and port.remote == self._domid,
                    "remote": port.remote,
                    "remote_port": port.remote_port,
                    "virq": port.virq,
                    "backend": port.backend is not None,
                }
                for number, port in sorted(self._ports.items())
            ]
        return {"ports": ports, "next": self._next_backend_port}

    def restore(self, record: Fields, own: dict[int, Callable[[], object]]) -> dict[int, BackendPort]:
        """
        All ports as :meth:`saved` found them. StateError.

        ``own``: what serves which port; those are bound, told, and returned. Others that had a backend wait for one.
        """
        ports: dict[int, Port] = {}
        for item in record.records("ports"):
            number = item.number("number", self._shared.abi.ports - 1, 1)
            kind = Kind(item.number("kind", Kind.IPI, Kind.UNBOUND))
            port = Port(kind, item.number("vcpu", self._vcpus - 1))
            port.remote = self._domid if item.flag("own") else item.number("remote", DOMID_SELF)
            port.remote_port = item.number("remote_port", 1 << 32)
            port.virq = item.number("virq", VIRQS - 1)
            if kind == Kind.PIRQ or number in ports:
                raise StateError(f"xen events state: port {number} cannot be")
            if item.flag("backend") and number in own and kind == Kind.INTERDOMAIN:
                port.backend = BackendPort(self, number, port.remote_port, own[number])
            elif item.flag("backend"):
                port.kind, port.remote, port.remote_port = Kind.UNBOUND, BACKEND_DOMID, 0
            ports[number] = port
        bound = {number: port.backend for number, port in ports.items() if port.backend is not None}
        if len(bound) != len(own):
            raise StateError("xen events state: a ring has no port")
        following = record.number("next", 1 << 32, 1)
        for number, port in ports.items():
            if port.kind == Kind.INTERDOMAIN and port.backend is None:
                other = ports.get(port.remote_port)
                if other is None or other.kind != Kind.INTERDOMAIN or port.remote != self._domid:
                    raise StateError(f"xen events state: port {number} leads nowhere")
        with self._lock:
            self._ports, self._virqs, self._next_backend_port = ports, {}, following
            for number, port in ports.items():
                self._show(number)
                if port.kind == Kind.VIRQ:
                    self._virqs[port.virq, port.vcpu if port.virq in PER_VCPU_VIRQS else 0] = number
                    if self._path is not None and port.virq == Virq.TIMER:
                        self._path.timer(port.vcpu, number)
        for serve in own.values():
            serve()
        return bound

    # ── inside, with the lock held ──

    def _raise(self, port: int) -> None:
        found = self._ports.get(port)
        if found is not None and self._shared.set_pending(port) and self._shared.select(found.vcpu, port):
            self._tell(found.vcpu)

    def _new(self, port: Port) -> int:
        number = next((n for n in range(1, self._shared.abi.ports) if n not in self._ports), None)
        if number is None:
            raise HypercallError(Errno.ENOSPC)
        self._shared.clear_pending(number)
        self._ports[number] = port
        self._show(number)
        return number

    def _show(self, number: int) -> None:
        """Tell the path what a port is now."""
        path, port = self._path, self._ports.get(number)
        if path is None:
            return
        if port is None:
            path.closed(number)
        elif port.kind == Kind.UNBOUND:
            path.unbound(number, port.vcpu)
        elif port.kind == Kind.IPI:
            path.raises(number, port.vcpu, number)
        elif port.kind == Kind.INTERDOMAIN and port.backend is None:
            path.raises(number, port.vcpu, port.remote_port)
        elif port.kind == Kind.INTERDOMAIN and port.backend is not None and port.backend.bell is not None:
            path.bell(number, port.vcpu, port.backend.bell)
        else:
            path.foreign(number, port.vcpu)

    def _get(self, port: int) -> Port:
        found = self._ports.get(port)
        if found is None:
            raise HypercallError(Errno.EINVAL)
        return found

    def _forget(self, number: int, port: Port) -> None:
        del self._ports[number]
        self._show(number)
        if self._path is not None and port.kind == Kind.VIRQ and port.virq == Virq.TIMER:
            self._path.timer(port.vcpu, 0)
        if port.kind == Kind.VIRQ:
            self._virqs.pop((port.virq, port.vcpu if port.virq in PER_VCPU_VIRQS else 0), None)

    def _check_vcpu(self, vcpu: int) -> None:
        if not 0 <= vcpu < self._vcpus:
            raise HypercallError(Errno.ENOENT)
