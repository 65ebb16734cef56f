"""The seam between the hypervisor and the backends of paravirtual devices: grants, and event channels.

A backend (block, network, console) acts as a domain of its own, domain 0 unless told otherwise. It gets one
:class:`FrontendAccess` for each domain that it serves. Nothing here says whether it runs in the domain's process or in
another: what it is given could be made of a memfd and an eventfd as well.

    access: FrontendAccess
    ring = access.grants.map(ring_ref, readonly=False)        # 4096 bytes shared with the guest
    port = access.bind_interdomain(guest_port, on_event=wake)  # wake() is called for each notification of the guest
    ...
    data = access.grants.copy_from(ref, offset, length)
    port.notify()

Everything that lies in guest memory is hostile: it can change between two looks. Copy once, then check.
"""

from collections.abc import Callable
from typing import Final, Protocol

__all__ = ["GRANT_PAGE", "EventChannelError", "EventChannelPort", "FrontendAccess", "GrantAccess", "GrantError"]

GRANT_PAGE: Final = 4096
"""Bytes of what one grant reference names."""


class GrantError(Exception):
    """The guest has not granted that; ``status`` is Xen's GNTST number (negative)."""

    def __init__(self, message: str, status: int = -1) -> None:
        super().__init__(message)
        self.status = status


class EventChannelError(Exception):
    """There is no such event channel, or it is not meant for this backend."""


class GrantAccess(Protocol):
    """What a domain has granted to one other domain. All methods: any thread; GrantError for a bad reference.

    Two ways to data. Rings are mapped: loads and stores through the view are seen by the guest at once; aligned 32-bit
    loads and stores (``view.cast("I")``) are single accesses. Bulk data is copied: ``copy_to`` is like DMA, so that
    code which the guest has run from that page is run afresh. Who writes bulk data through a view instead must
    ``unmap`` it before the guest may use it as code; that has the same effect.
    """

    def map(self, ref: int, readonly: bool = False) -> memoryview:
        """The granted page, 4096 bytes; the entry is marked as in use until :meth:`unmap`. Maps of one ref nest."""

    def unmap(self, ref: int) -> None:
        """Undo one :meth:`map`; views of it must not be used any more. GrantError if it is not mapped."""

    def copy_from(self, ref: int, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset`` of the granted page."""

    def copy_to(self, ref: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset`` of the granted page, like DMA; the guest may hear of it after :meth:`settle`."""

    def settle(self) -> None:
        """What was copied to the guest counts as written from now on. To be called before a response is published."""


class EventChannelPort(Protocol):
    """A backend's end of an event channel."""

    @property
    def guest_port(self) -> int:
        """The guest's end."""

    def notify(self) -> None:
        """Raise the event in the guest. Any thread. Nothing happens if the guest has closed its end."""

    def close(self) -> None:
        """Give the channel up; the guest's end becomes unbound. Any thread; closing twice does nothing."""


class FrontendAccess(Protocol):
    """One domain, as a backend that serves it sees it."""

    @property
    def domid(self) -> int:
        """The domain's number."""

    @property
    def grants(self) -> GrantAccess:
        """What it has granted to the backend's domain."""

    def bind_interdomain(
        self, remote_port: int, on_event: Callable[[], object], bell: int | None = None
    ) -> EventChannelPort:
        """
        Bind to a port that the guest allocated for the backend's domain.

        ``on_event`` is called once at the end of the binding (what happened before it is not lost) and then at each
        notification of the guest. It is called in the vCPU's thread, so it must be quick and must not raise: set an
        event, write an eventfd. If all that it does is to write an eventfd, ``bell`` is that: it, or a copy of it, may
        be written instead until the port is closed. EventChannelError if the guest has no such port, or not for this
        backend.
        """
