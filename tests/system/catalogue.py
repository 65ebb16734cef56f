"""All system test guests, and where their expectations are."""

from pathlib import Path
from typing import Final

from nonroot.testing.system_guest import SystemGuest
from tests.system.guests import exceptions, interrupts, modifying, paging, privilege, segmentation

__all__ = ["EXPECTED", "GUESTS"]

EXPECTED: Final = Path(__file__).parent / "expected"
_MODULES: Final = (paging, exceptions, privilege, segmentation, modifying, interrupts)
GUESTS: Final[tuple[SystemGuest, ...]] = tuple(guest for module in _MODULES for guest in module.guests())
