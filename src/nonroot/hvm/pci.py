"""The PCI host bridge: configuration mechanism 1, an i440FX (00:00.0) and a PIIX3 ISA bridge (00:01.0).

The i440FX says when the shadowing of 0xC0000..0xFFFFF changes (PAM registers) and when the RAM behind the VGA's window
is seen (SMRAM register), the PIIX3 when a PCI interrupt is routed
to another ISA interrupt; what that means is the machine's.

Source: PCI local bus specification 2.1, chapter 3.2.2.3; Intel 82441FX (290549) and 82371SB (290550) datasheets.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from nonroot.hvm.device import NO_EVENTS, Events, StateError, StateRecord, blob, expect, ignore, u32

__all__ = ["ConfigSpace", "I440Fx", "PciFunction", "PciHost", "PciHostState", "Piix3"]

# Device offsets; the machine maps 0xCF8 here.
CONFIG_ADDRESS: Final = 0
CONFIG_DATA: Final = 4

ADDRESS_ENABLE: Final = 1 << 31
ADDRESS_WRITABLE: Final = 0x80FF_FFFC

CONFIG_SIZE: Final = 256
VENDOR_INTEL: Final = 0x8086

COMMAND: Final = 0x04
COMMAND_IO: Final = 1 << 0
COMMAND_MEMORY: Final = 1 << 1
COMMAND_MASTER: Final = 1 << 2


class PciFunction(Protocol):
    """One PCI function's configuration space as the bridge sees it."""

    def config_read(self, register: int, size: int) -> int:
        """A load that does not cross a doubleword."""

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store that does not cross a doubleword."""


class ConfigSpace:
    """256 bytes of configuration space with a mask of the bits that the guest may write."""

    def __init__(self, header: dict[int, tuple[int, int]], writable: Iterable[tuple[int, int, int]]) -> None:
        """``header``: register -> (size, value at reset). ``writable``: (register, size, mask of writable bits)."""
        reset = bytearray(CONFIG_SIZE)
        for register, (size, value) in header.items():
            reset[register : register + size] = value.to_bytes(size, "little")
        mask = bytearray(CONFIG_SIZE)
        for register, size, bits in writable:
            mask[register : register + size] = bits.to_bytes(size, "little")
        self._reset = bytes(reset)
        self._mask = bytes(mask)
        self.data = bytearray(reset)

    def reset(self) -> None:
        """Values at reset."""
        self.data[:] = self._reset

    def config_read(self, register: int, size: int) -> int:
        """A load."""
        return int.from_bytes(self.data[register : register + size], "little")

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store: read-only bits keep their values."""
        for index in range(register, register + size):
            mask = self._mask[index]
            self.data[index] = self.data[index] & ~mask | value & 0xFF & mask
            value >>= 8

    def acceptable(self, data: bytes) -> bool:
        """Whether ``data`` differs from the reset values only where the guest may write."""
        now, then, mask = (int.from_bytes(each, "little") for each in (data, self._reset, self._mask))
        return len(data) == len(self._reset) and (now ^ then) & ~mask == 0


def _identity(device: int, class_code: int, header_type: int) -> dict[int, tuple[int, int]]:
    return {
        0x00: (2, VENDOR_INTEL),
        0x02: (2, device),
        0x09: (3, class_code),
        0x0E: (1, header_type),
    }


PAM: Final = 0x59
PAM_REGISTERS: Final = 7
SMRAM: Final = 0x72
SMRAM_ENABLED: Final = 1 << 3
SMRAM_LOCKED: Final = 1 << 4
SMRAM_CLOSED: Final = 1 << 5
SMRAM_OPEN: Final = 1 << 6
SMRAM_BASE: Final = 0b010
"""C_BASE_SEG: 0xA0000, the only place that there is."""
PIRQ_ROUTE: Final = 0x60
PIRQS: Final = 4
SUBSYSTEM: Final = (2, 0x1AF4), (2, 0x1100)
"""Subsystem vendor and device, by which SeaBIOS recognises a machine that offers it fw_cfg."""


class I440Fx(ConfigSpace):
    """82441FX host bridge, 8086:1237. DRAM registers keep their values and have no effect."""

    def __init__(self, shadow: Callable[[bytes], object] = ignore, smram: Callable[[bool], object] = ignore) -> None:
        """
        ``shadow`` takes the seven PAM registers whenever one of them was written, or they were reset; ``smram``
        whether system management RAM is open, likewise.
        """
        header = _identity(0x1237, 0x06_00_00, 0)
        header |= {COMMAND: (2, COMMAND_MEMORY | COMMAND_MASTER), 0x06: (2, 0x0280), 0x08: (1, 0x02)}
        header |= {0x2C: SUBSYSTEM[0], 0x2E: SUBSYSTEM[1], SMRAM: (1, SMRAM_BASE)}
        writable = [(0x0D, 1, 0xF8), (0x50, 2, 0xFFFF), (PAM, 7, 0x33_33_33_33_33_33_30), (0x60, 8, (1 << 64) - 1)]
        smram_bits = SMRAM_ENABLED | SMRAM_LOCKED | SMRAM_CLOSED | SMRAM_OPEN
        super().__init__(header, [*writable, (SMRAM, 1, smram_bits)])
        self._shadow = shadow
        self._smram = smram

    def apply(self) -> None:
        """Tell the machine how 0xC0000..0xFFFFF is shadowed, and whether system management RAM is seen."""
        self._shadow(bytes(self.data[PAM : PAM + PAM_REGISTERS]))
        self._apply_smram()

    def _apply_smram(self) -> None:
        both = SMRAM_ENABLED | SMRAM_OPEN
        self._smram(self.data[SMRAM] & both == both)

    def reset(self) -> None:
        """Nothing is shadowed: the firmware's ROM is seen; system management RAM is closed and not locked."""
        super().reset()
        self.apply()

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store; the shadowing follows. What D_LCK has locked stays until the reset."""
        before = self.data[SMRAM]
        super().config_write(register, size, value)
        if register < PAM + PAM_REGISTERS and register + size > PAM:
            self._shadow(bytes(self.data[PAM : PAM + PAM_REGISTERS]))
        if register <= SMRAM < register + size:
            if before & SMRAM_LOCKED:
                self.data[SMRAM] = before & ~SMRAM_CLOSED | self.data[SMRAM] & SMRAM_CLOSED
            elif self.data[SMRAM] & SMRAM_LOCKED:
                self.data[SMRAM] &= ~SMRAM_OPEN
            self._apply_smram()


class Piix3(ConfigSpace):
    """82371SB ISA bridge, 8086:7000. One of several functions in its slot."""

    def __init__(self, route: Callable[[int, int], object] | None = None) -> None:
        """``route`` takes (PIRQ 0..3, value of its route register) whenever one was written, or they were reset."""
        header = _identity(0x7000, 0x06_01_00, 0x80)
        header |= {
            COMMAND: (2, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER),
            0x06: (2, 0x0200),
            0x2C: SUBSYSTEM[0],
            0x2E: SUBSYSTEM[1],
            0x4C: (1, 0x4D),
            0x4E: (2, 0x0003),
            PIRQ_ROUTE: (4, 0x80808080),
        }
        writable = [(COMMAND, 2, 0x0108), (0x4C, 1, 0xFF), (0x4E, 2, 0x01FF), (PIRQ_ROUTE, 4, 0x8F8F8F8F)]
        super().__init__(header, [*writable, (0x69, 1, 0xFE)])
        self._route = route

    def apply(self) -> None:
        """Tell the machine all four routes."""
        if self._route is not None:
            for pirq in range(PIRQS):
                self._route(pirq, self.data[PIRQ_ROUTE + pirq])

    def reset(self) -> None:
        """No PCI interrupt reaches an ISA interrupt."""
        super().reset()
        self.apply()

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store; the routing follows."""
        super().config_write(register, size, value)
        if register < PIRQ_ROUTE + PIRQS and register + size > PIRQ_ROUTE:
            self.apply()


@dataclass(slots=True)
class PciHostState(StateRecord):
    """The address register and the configuration spaces of the two bridges."""

    NAME: ClassVar[str] = "pci-host"

    address: int = u32()
    i440fx: bytes = blob(CONFIG_SIZE)
    piix3: bytes = blob(CONFIG_SIZE)

    def check_consistency(self) -> None:
        """Read-only bits have their fixed values."""
        if self.address & ~ADDRESS_WRITABLE:
            raise StateError("pci-host state: address has reserved bits set")
        for name, kind, data in (("i440fx", I440Fx, self.i440fx), ("piix3", Piix3, self.piix3)):
            if not kind().acceptable(data):
                raise StateError(f"pci-host state: {name} differs in read-only bits")
        both = SMRAM_LOCKED | SMRAM_OPEN
        if self.i440fx[SMRAM] & both == both:
            raise StateError("pci-host state: i440fx has SMRAM open and locked")


class PciHost:
    """Ports 0xCF8..0xCFF. The address register takes doublewords only; other accesses to it go elsewhere."""

    name = "pci-host"

    def __init__(
        self,
        events: Events = NO_EVENTS,
        shadow: Callable[[bytes], object] = ignore,
        route: Callable[[int, int], object] | None = None,
        smram: Callable[[bool], object] = ignore,
    ) -> None:
        """``shadow``, ``smram`` and ``route`` as :class:`I440Fx` and :class:`Piix3` say."""
        self._events = events
        self._address = 0
        self._i440fx = I440Fx(shadow, smram)
        self._piix3 = Piix3(route)
        # key: bits 23:8 of the address register (bus, device, function)
        self._functions: dict[int, PciFunction] = {}
        self.add(0, 0, self._i440fx)
        self.add(1, 0, self._piix3)

    def add(self, slot: int, function: int, device: PciFunction) -> None:
        """Put a function on bus 0. ValueError if the place is taken or does not exist."""
        key = slot << 3 | function
        if not (0 <= slot < 32 and 0 <= function < 8) or key in self._functions:
            raise ValueError(f"PCI 00:{slot:02x}.{function} is taken or does not exist")
        self._functions[key] = device

    def set_routes(self, routes: Sequence[int]) -> None:
        """Route PIRQA# … PIRQD# to these ISA interrupts, as firmware would."""
        self._piix3.config_write(PIRQ_ROUTE, PIRQS, int.from_bytes(bytes(routes), "little"))

    def reset(self) -> None:
        """Reset values of the address register and of both bridges."""
        self._address = 0
        self._i440fx.reset()
        self._piix3.reset()

    def read(self, offset: int, size: int) -> int:
        """The address register, or the configuration register it points at; absent functions read as all ones."""
        if offset == CONFIG_ADDRESS and size == 4:
            return self._address
        ones = (1 << 8 * size) - 1
        function = self._selected()
        register = (self._address & 0xFC) + (offset & 3)
        if offset < CONFIG_DATA or function is None or (offset & 3) + size > 4:
            return ones
        return function.config_read(register, size) & ones

    def write(self, offset: int, size: int, value: int) -> None:
        """The address register, or the configuration register it points at."""
        if offset == CONFIG_ADDRESS and size == 4:
            self._address = value & ADDRESS_WRITABLE
            return
        function = self._selected()
        if offset < CONFIG_DATA or function is None or (offset & 3) + size > 4:
            self._events(self.name, "no-function", self._address)
            return
        function.config_write((self._address & 0xFC) + (offset & 3), size, value)

    def _selected(self) -> PciFunction | None:
        if not self._address & ADDRESS_ENABLE:
            return None
        return self._functions.get(self._address >> 8 & 0xFFFF)

    def state(self) -> PciHostState:
        """Address register and both bridges; other functions have records of their own."""
        return PciHostState(self._address, bytes(self._i440fx.data), bytes(self._piix3.data))

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        record = expect(PciHostState, state)
        self._address = record.address
        self._i440fx.data[:] = record.i440fx
        self._piix3.data[:] = record.piix3
        self._i440fx.apply()
        self._piix3.apply()
