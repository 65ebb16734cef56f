"""The power management function of the PIIX4 (8086:7113): configuration space only.

Its registers are :mod:`nonroot.hvm.acpi_pm`, which does not move: the base address register reads as 0x600 whatever the
guest writes. There is no SMBus and no system management mode; DEVACTB says that SMIs are set up already, so
that firmware does not try.

Source: Intel 82371AB datasheet (290562), chapter 7.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.pci_device import UNCONNECTED, PciConnection, PciDevice, PciIdentity
from nonroot.hvm.board import PM1A_EVENT
from nonroot.hvm.device import StateRecord, blob, expect
from nonroot.hvm.irq import SCI
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = ["Piix4Pm", "Piix4PmState"]

PMBA: Final = 0x40
DEVACTB: Final = 0x58
APMC_SMI_ENABLED: Final = 1 << 25
PMREGMISC: Final = 0x80
PMREGMISC_ENABLED: Final = 1


@dataclass(slots=True)
class Piix4PmState(StateRecord):
    """Configuration space."""

    NAME: ClassVar[str] = "piix4-pm"

    config: bytes = blob(CONFIG_SIZE)


class Piix4Pm(PciDevice):
    """00:01.3."""

    def __init__(self, connection: PciConnection = UNCONNECTED) -> None:
        super().__init__(
            "piix4-pm",
            PciIdentity(0x8086, 0x7113, 0x06_80_00, revision=3, interrupt_pin=1),
            (),
            connection,
            header={
                0x3C: (1, SCI),
                PMBA: (4, PM1A_EVENT | 1),
                DEVACTB: (4, APMC_SMI_ENABLED),
                PMREGMISC: (1, PMREGMISC_ENABLED),
            },
        )

    def state(self) -> Piix4PmState:
        """Configuration space."""
        return Piix4PmState(bytes(self.data))

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        self.load_config(expect(Piix4PmState, state).config)
