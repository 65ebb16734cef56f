"""The board: which port and which interrupt line each device has. ACPI tables and the machine's wiring both read it."""

from typing import Final

# Ports
PIC_MASTER: Final = 0x20
PIC_SLAVE: Final = 0xA0
ELCR: Final = 0x4D0
PIT: Final = 0x40
PORT_B: Final = 0x61
I8042_DATA: Final = 0x60
I8042_COMMAND: Final = 0x64
RTC: Final = 0x70
POST: Final = 0x80
PORT_A: Final = 0x92
DEBUG_CONSOLE: Final = 0xE9
FIRMWARE_DEBUG: Final = 0x402
PM1A_EVENT: Final = 0x600
PM1A_CONTROL: Final = 0x604
PM_TIMER: Final = 0x608
GPE0: Final = 0x60C
"""Status and enable register of the general-purpose events, a byte each."""
AGENT: Final = 0x6E0
PCI_CONFIG: Final = 0xCF8
RESET_CONTROL: Final = 0xCF9
RESET_VALUE: Final = 0x06

# ISA interrupts
PIT_IRQ: Final = 0
RTC_IRQ: Final = 8

UARTS: Final = ((0x3F8, 4), (0x2F8, 3), (0x3E8, 4), (0x2E8, 3))
"""(port, ISA interrupt) of ttyS0 … ttyS3; a domain has the first two unless told otherwise."""
