"""The power management function of the PIIX4 (8086:7113): configuration space, and the APM ports.

Its registers are :mod:`nonroot.hvm.acpi_pm`, which does not move: the base address register reads as 0x600 whatever the
guest writes. There is no SMBus and no system management mode: a write to the APM control port raises no SMI. DEVACTB
says that SMIs are set up already, so that firmware does not try: SeaBIOS opens SMRAM otherwise, asks for an SMI, and
waits for its own handler to clear the APM status port.

Source: Intel 82371AB datasheet (290562), chapter 7.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.pci_device import UNCONNECTED, PciConnection, PciDevice, PciIdentity
from nonroot.hvm.board import PM1A_EVENT
from nonroot.hvm.device import NO_EVENTS, Events, StateRecord, blob, expect, u8
from nonroot.hvm.irq import SCI
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = ["APM", "APM_LENGTH", "Piix4Pm", "Piix4PmState"]

APM: Final = 0xB2
"""Port of the APM control register; the status register follows."""
APM_CONTROL: Final = 0
APM_STATUS: Final = 1
APM_LENGTH: Final = 2

PMBA: Final = 0x40
DEVACTB: Final = 0x58
APMC_SMI_ENABLED: Final = 1 << 25
PMREGMISC: Final = 0x80
PMREGMISC_ENABLED: Final = 1


@dataclass(slots=True)
class Piix4PmState(StateRecord):
    """Configuration space and APM registers."""

    NAME: ClassVar[str] = "piix4-pm"

    config: bytes = blob(CONFIG_SIZE)
    apm_control: int = u8()
    apm_status: int = u8()


class Piix4Pm(PciDevice):
    """00:01.3."""

    def __init__(self, connection: PciConnection = UNCONNECTED, events: Events = NO_EVENTS) -> None:
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
        self._events = events
        self._apm = bytearray(APM_LENGTH)

    def read(self, offset: int, size: int) -> int:
        """The APM registers: what was written."""
        return self._apm[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        """The APM registers; the control register would raise an SMI."""
        self._apm[offset] = value & 0xFF
        if offset == APM_CONTROL:
            self._events(self.name, "smi-not-raised", value)

    def reset(self) -> None:
        """Configuration space and APM registers as after power-on."""
        super().reset()
        self._apm[:] = bytes(APM_LENGTH)

    def state(self) -> Piix4PmState:
        """Configuration space and APM registers."""
        return Piix4PmState(bytes(self.data), *self._apm)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        record = expect(Piix4PmState, state)
        self.load_config(record.config)
        self._apm[APM_CONTROL], self._apm[APM_STATUS] = record.apm_control, record.apm_status
