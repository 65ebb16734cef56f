"""What of Xen a domain is given."""

from dataclasses import dataclass
from typing import Final

from nonroot.errors import BadOptionError

__all__ = ["XenConfig"]

NO_HANDLE: Final = bytes(16)
LAST_DOMID: Final = 0x7FEF


@dataclass(frozen=True, slots=True)
class XenConfig:
    """Xen's side of one domain."""

    domid: int = 1
    """Its number; 0 is the backends'."""
    handle: bytes = NO_HANDLE
    """Its UUID, 16 bytes."""
    console: bool = True
    """Whether there is a paravirtual console, hvc0."""
    store: bool = True
    """Whether there is a ring to XenStore. Guests find it only when something has been attached to it."""

    def check(self) -> None:
        """BadOptionError for what cannot be."""
        if not 1 <= self.domid <= LAST_DOMID:
            raise BadOptionError(f"a domain's number is 1 to {LAST_DOMID}, not {self.domid}")
        if len(self.handle) != len(NO_HANDLE):
            raise BadOptionError(f"a domain's UUID has 16 bytes, not {len(self.handle)}")
