"""The ACPI tables of a domain: RSDP, XSDT, FADT, FACS, MADT and DSDT.

Ports and interrupts are those of :mod:`nonroot.hvm.board`.
Source: ACPI specification 6.5, chapter 5.2; FADT in the form of revision 5. The VM generation ID: Microsoft's paper of
that name.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nonroot.hvm import aml, board
from nonroot.hvm.acpi_pm import S5
from nonroot.hvm.irq import ISA_TIMER_GSI, SCI, pci_gsi
from nonroot.hvm.memory_map import FIRMWARE_END, FIRMWARE_START, IOAPIC_BASE, LAPIC_BASE, RAM_LOW_END
from nonroot.hvm.pirq import FIRMWARE_ROUTES, pirq_link
from nonroot.hvm.rtc import CENTURY

__all__ = ["AcpiTables", "IsaDevice", "build_tables", "checksum"]

OEM_ID: Final = b"NONRUT"
OEM_TABLE_ID: Final = b"NONROOT "
CREATOR_ID: Final = b"NRUT"
ALIGNMENT: Final = 64

# FADT
PM_PROFILE_ENTERPRISE_SERVER: Final = 4
BOOT_LEGACY_DEVICES: Final = 1 << 0
BOOT_8042: Final = 1 << 1
BOOT_NO_VGA: Final = 1 << 2
BOOT_NO_ASPM: Final = 1 << 4
BOOT_NO_CMOS_RTC: Final = 1 << 5
FLAG_WBINVD: Final = 1 << 0
FLAG_PROC_C1: Final = 1 << 2
FLAG_NO_FIXED_SLEEP_BUTTON: Final = 1 << 5
FLAG_NO_FIXED_RTC_WAKE: Final = 1 << 6
FLAG_TIMER_32_BITS: Final = 1 << 8
FLAG_RESET_REGISTER: Final = 1 << 10
NO_C2: Final = 101
NO_C3: Final = 1001
SPACE_IO: Final = 1

# MADT
PCAT_COMPAT: Final = 1 << 0
LAPIC_ENABLED: Final = 1 << 0
GENERATION_CID: Final = "VM_Gen_Counter"
LEVEL_ACTIVE_HIGH: Final = 0b1101
LAST_XAPIC_ID: Final = 254


@dataclass(frozen=True, slots=True)
class AcpiTables:
    """Tables ready to be placed in guest memory."""

    rsdp: int
    """Guest-physical address of the RSDP."""
    tables: dict[str, tuple[int, bytes]]
    """Signature -> (guest-physical address, bytes)."""

    def image(self) -> list[tuple[int, bytes]]:
        """(guest-physical address, bytes) of everything, the RSDP included."""
        return list(self.tables.values())


@dataclass(frozen=True, slots=True)
class IsaDevice:
    """A device on the ISA bus that the DSDT names."""

    path: str
    """Its name segment: ``KBD``, ``FDC0``."""
    hid: str
    """Its EISA ID."""
    ports: tuple[tuple[int, int], ...] = ()
    """(first port, number of ports)."""
    irq: int | None = None


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes the sum of all bytes zero."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1
    )
    table = bytearray(header + body)
    table[9] = checksum(table)
    return bytes(table)


def _address(space: int, bits: int, access: int, address: int) -> bytes:
    """A generic address structure."""
    return struct.pack("<BBBBQ", space, bits, 0, access, address)


def _fadt(facs: int, dsdt: int, boot: int) -> bytes:
    flags = (
        FLAG_WBINVD
        | FLAG_PROC_C1
        | FLAG_NO_FIXED_SLEEP_BUTTON
        | FLAG_NO_FIXED_RTC_WAKE
        | FLAG_TIMER_32_BITS
        | FLAG_RESET_REGISTER
    )
    body = struct.pack("<IIBBHI4B", facs, dsdt, 0, PM_PROFILE_ENTERPRISE_SERVER, SCI, 0, 0, 0, 0, 0)
    body += struct.pack("<8I", board.PM1A_EVENT, 0, board.PM1A_CONTROL, 0, 0, board.PM_TIMER, board.GPE0, 0)
    body += struct.pack("<8B", 4, 2, 0, 4, 2, 0, 0, 0)
    body += struct.pack("<4H5B", NO_C2, NO_C3, 0, 0, 0, 0, 0, 0, CENTURY)
    body += struct.pack("<HBI", boot, 0, flags)
    body += _address(SPACE_IO, 8, 1, board.RESET_CONTROL) + struct.pack("<BHB", board.RESET_VALUE, 0, 0)
    body += struct.pack("<QQ", 0, dsdt)
    absent = bytes(12)
    body += _address(SPACE_IO, 32, 2, board.PM1A_EVENT) + absent
    body += _address(SPACE_IO, 16, 2, board.PM1A_CONTROL) + absent
    body += absent + _address(SPACE_IO, 32, 3, board.PM_TIMER)
    body += _address(SPACE_IO, 16, 1, board.GPE0) + absent * 3
    return _table(b"FACP", 5, body)


def _facs() -> bytes:
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _madt(apic_ids: list[int], ioapic_id: int) -> bytes:
    body = struct.pack("<II", LAPIC_BASE, PCAT_COMPAT)
    for uid, apic_id in enumerate(apic_ids):
        if apic_id <= LAST_XAPIC_ID:
            body += struct.pack("<BBBBI", 0, 8, uid & 0xFF, apic_id, LAPIC_ENABLED)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, LAPIC_ENABLED, uid)
    body += struct.pack("<BBBBII", 1, 12, ioapic_id, 0, IOAPIC_BASE, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, 0, ISA_TIMER_GSI, 0)
    body += struct.pack("<BBBBIH", 2, 10, 0, SCI, SCI, LEVEL_ACTIVE_HIGH)
    # NMI on LINT1 of every local APIC
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    return _table(b"APIC", 3, body)


def _isa_device(path: str, hid: str, *descriptors: bytes, uid: int | None = None) -> bytes:
    terms = [aml.name("_HID", aml.eisa_id(hid))]
    if uid is not None:
        terms.append(aml.name("_UID", aml.integer(uid)))
    terms.append(aml.name("_CRS", aml.resources(*descriptors)))
    return aml.device(path, *terms)


def _routes(name: str, apic: bool) -> bytes:
    """The routing table of bus 0: to the I/O APIC's inputs, or to the ISA interrupts that firmware chooses."""
    routes = []
    for slot in range(1, 32):
        for pin in range(4):
            gsi = pci_gsi(slot, pin) if apic else FIRMWARE_ROUTES[pirq_link(slot, pin)]
            routes.append(
                aml.package(aml.integer(slot << 16 | 0xFFFF), aml.integer(pin), aml.integer(0), aml.integer(gsi))
            )
    return aml.name(name, aml.package(*routes))


def _generation(address: int) -> bytes:
    """The device that says where the VM generation ID is; event 0 says that it has changed."""
    identity = aml.device(
        "VGEN",
        aml.name("_HID", aml.string("NRUT0001")),
        aml.name("_CID", aml.string(GENERATION_CID)),
        aml.name("_DDN", aml.string(GENERATION_CID)),
        aml.name("ADDR", aml.package(aml.integer(address & 0xFFFF_FFFF), aml.integer(address >> 32))),
    )
    changed = aml.method("_E00", 0, aml.notify(aml.name_string("\\_SB.VGEN"), 0x80))
    return aml.scope("\\_SB", identity) + aml.scope("\\_GPE", changed)


def _dsdt(apic_ids: list[int], uarts: int, extra: Sequence[IsaDevice], generation: int | None) -> bytes:
    processors = [
        aml.device(f"C{uid:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(uid)))
        for uid in range(len(apic_ids))
    ]
    isa = [
        _isa_device("RTC", "PNP0B00", aml.io_port(board.RTC, 2), aml.irq(board.RTC_IRQ)),
        _isa_device("TIMR", "PNP0100", aml.io_port(board.PIT, 4), aml.irq(board.PIT_IRQ)),
        _isa_device(
            "PIC", "PNP0000", *(aml.io_port(base, 2) for base in (board.PIC_MASTER, board.PIC_SLAVE, board.ELCR))
        ),
    ]
    for index, (base, line) in enumerate(board.UARTS[:uarts]):
        isa.append(_isa_device(f"COM{index + 1}", "PNP0501", aml.io_port(base, 8), aml.irq(line), uid=index + 1))
    for part in extra:
        resources = [aml.io_port(first, count) for first, count in part.ports]
        if part.irq is not None:
            resources.append(aml.irq(part.irq))
        isa.append(_isa_device(part.path, part.hid, *resources))
    bridge = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.word_bus_number(0, 0xFF),
                aml.io_port(board.PCI_CONFIG, 8),
                aml.word_io(0x0000, 0x0CF7),
                aml.word_io(0x0D00, 0xFFFF),
                aml.dword_memory(RAM_LOW_END, IOAPIC_BASE - 1),
            ),
        ),
        _routes("PRTA", apic=True),
        _routes("PRTP", apic=False),
        aml.method(
            "_PRT",
            0,
            aml.if_then(aml.name_string("\\PICM"), aml.return_value(aml.name_string("PRTA"))),
            aml.return_value(aml.name_string("PRTP")),
        ),
        aml.device("ISA", aml.name("_ADR", aml.integer(1 << 16)), *isa),
    )
    # What no driver may claim: the fixed ACPI hardware and the agent channel.
    reserved = _isa_device("RSVD", "PNP0C02", aml.io_port(board.PM1A_EVENT, 14), aml.io_port(board.AGENT, 12), uid=0)
    sleep = aml.package(aml.integer(S5), aml.integer(0), aml.integer(0), aml.integer(0))
    model = aml.name("\\PICM", aml.integer(0)) + aml.method(
        "\\_PIC", 1, aml.store(aml.argument(0), aml.name_string("\\PICM"))
    )
    body = model + aml.scope("\\_SB", *processors, bridge, reserved) + aml.name("\\_S5", sleep)
    if generation is not None:
        body += _generation(generation)
    return _table(b"DSDT", 2, body)


def build_tables(
    apic_ids: list[int],
    uarts: int = 2,
    ioapic_id: int = 0,
    extra: Sequence[IsaDevice] = (),
    has_vga: bool = False,
    has_8042: bool = False,
    has_rtc: bool = True,
    generation: int | None = None,
) -> AcpiTables:
    """
    Tables for vCPUs with these APIC ids.

    ``extra``: further devices to name. ``has_vga``, ``has_8042`` and ``has_rtc`` let systems look for those without
    names; where there are neither VGA nor RTC, Linux takes a Xen domain for PVH. ``generation``: where the VM
    generation ID is.
    ValueError if the tables do not fit below 1 MiB.
    """
    boot = BOOT_LEGACY_DEVICES | BOOT_NO_ASPM
    boot |= (0 if has_vga else BOOT_NO_VGA) | (BOOT_8042 if has_8042 else 0) | (0 if has_rtc else BOOT_NO_CMOS_RTC)
    place = FIRMWARE_START + ALIGNMENT
    end = FIRMWARE_END if generation is None else min(FIRMWARE_END, generation)
    tables: dict[str, tuple[int, bytes]] = {}

    def put(table: bytes) -> int:
        nonlocal place
        address = place
        place = (place + len(table) + ALIGNMENT - 1) & ~(ALIGNMENT - 1)
        if place > end:
            raise ValueError(f"the ACPI tables of {len(apic_ids)} vCPUs do not fit below 1 MiB")
        tables[table[:4].decode()] = (address, table)
        return address

    facs = put(_facs())
    dsdt = put(_dsdt(apic_ids, uarts, extra, generation))
    entries = [put(_fadt(facs, dsdt, boot)), put(_madt(apic_ids, ioapic_id))]
    xsdt = put(_table(b"XSDT", 1, struct.pack(f"<{len(entries)}Q", *entries)))
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = checksum(rsdp[:20])
    rsdp[32] = checksum(rsdp)
    tables["RSDP"] = (FIRMWARE_START, bytes(rsdp))
    return AcpiTables(FIRMWARE_START, tables)
