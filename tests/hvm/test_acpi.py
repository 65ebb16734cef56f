"""ACPI tables: checksums, links, agreement with the board, and ACPICA's opinion."""

import shutil
import struct
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from nonroot.hvm import aml, board
from nonroot.hvm.acpi import AcpiTables, build_tables
from nonroot.hvm.memory_map import FIRMWARE_END, FIRMWARE_START


@pytest.fixture(scope="module")
def acpi() -> AcpiTables:
    return build_tables([0, 1, 300], uarts=2, ioapic_id=4)


def body(acpi: AcpiTables, signature: str) -> bytes:
    return acpi.tables[signature][1]


def test_tables_lie_apart_in_the_firmware_area(acpi: AcpiTables) -> None:
    places = sorted((address, address + len(data)) for address, data in acpi.image())
    assert all(a_end <= b_start for (_, a_end), (b_start, _) in pairwise(places))
    assert places[0][0] == acpi.rsdp == FIRMWARE_START
    assert places[-1][1] <= FIRMWARE_END
    assert acpi.tables["FACS"][0] % 64 == 0


@pytest.mark.parametrize("signature", ["DSDT", "FACP", "APIC", "XSDT", "RSDP"])
def test_checksums(acpi: AcpiTables, signature: str) -> None:
    data = body(acpi, signature)
    assert sum(data) & 0xFF == 0
    if signature == "RSDP":
        assert sum(data[:20]) & 0xFF == 0
    else:
        assert struct.unpack_from("<I", data, 4) == (len(data),)


def test_rsdp_leads_to_everything(acpi: AcpiTables) -> None:
    rsdp = body(acpi, "RSDP")
    assert rsdp[:8] == b"RSD PTR "
    assert rsdp[15] == 2
    (xsdt,) = struct.unpack_from("<Q", rsdp, 24)
    assert xsdt == acpi.tables["XSDT"][0]
    entries = struct.unpack_from("<2Q", body(acpi, "XSDT"), 36)
    assert entries == (acpi.tables["FACP"][0], acpi.tables["APIC"][0])
    fadt = body(acpi, "FACP")
    assert len(fadt) == 268
    assert struct.unpack_from("<II", fadt, 36) == (acpi.tables["FACS"][0], acpi.tables["DSDT"][0])
    assert struct.unpack_from("<Q", fadt, 140) == (acpi.tables["DSDT"][0],)


def test_fadt_agrees_with_the_board(acpi: AcpiTables) -> None:
    fadt = body(acpi, "FACP")
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # no SMI command: always ACPI mode
    assert struct.unpack_from("<I", fadt, 56) == (board.PM1A_EVENT,)
    assert struct.unpack_from("<I", fadt, 64) == (board.PM1A_CONTROL,)
    assert struct.unpack_from("<I", fadt, 76) == (board.PM_TIMER,)
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)
    assert fadt[108] == 0x32
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 << 8  # 32-bit timer
    assert flags & 1 << 10  # reset register
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    assert struct.unpack_from("<BBBBQ", fadt, 148) == (1, 32, 0, 2, board.PM1A_EVENT)
    assert struct.unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 2, board.PM1A_CONTROL)
    assert struct.unpack_from("<BBBBQ", fadt, 208) == (1, 32, 0, 3, board.PM_TIMER)


def test_madt(acpi: AcpiTables) -> None:
    madt = body(acpi, "APIC")
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    assert [(e[0], e[1]) for e in entries] == [(0, 8), (0, 8), (9, 16), (1, 12), (2, 10), (2, 10), (4, 6)]
    assert struct.unpack("<BBHIII", entries[2]) == (9, 16, 0, 300, 1, 2)
    assert struct.unpack("<BBBBII", entries[3]) == (1, 12, 4, 0, 0xFEC0_0000, 0)
    assert struct.unpack("<BBBBIH", entries[4]) == (2, 10, 0, 0, 2, 0)
    assert struct.unpack("<BBBBIH", entries[5]) == (2, 10, 0, 9, 9, 13)


@pytest.mark.parametrize("uarts", [1, 2, 4])
def test_dsdt_has_as_many_serial_ports_as_the_machine(uarts: int) -> None:
    dsdt = build_tables([0], uarts).tables["DSDT"][1]
    assert dsdt.count(aml.eisa_id("PNP0501")) == uarts


def test_too_many_vcpus_for_the_space() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        build_tables(list(range(4000)))


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (package acpica-tools) is not installed")
@pytest.mark.parametrize("signature", ["DSDT", "FACP", "APIC", "XSDT", "FACS"])
def test_acpica_accepts_the_tables(acpi: AcpiTables, tmp_path: Path, signature: str) -> None:
    table = tmp_path / "table.dat"
    table.write_bytes(body(acpi, signature))
    done = subprocess.run(["iasl", "-d", table], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    text = (tmp_path / "table.dsl").read_text()
    assert "Incorrect checksum" not in output + text
    assert "Invalid" not in text
    if signature == "DSDT":
        again = subprocess.run(["iasl", "-ve", tmp_path / "table.dsl"], capture_output=True, text=True, check=False)
        assert "0 Errors, 0 Warnings" in again.stdout, again.stdout + again.stderr
        for word in ("PNP0A03", "PNP0501", "PNP0B00", "ACPI0007", "_S5", "_PRT", "_CRS"):
            assert word in text


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_aml_integers(value: int, encoding: str) -> None:
    assert aml.integer(value).hex() == encoding


@pytest.mark.parametrize(
    ("length", "prefix"), [(10, "0b"), (62, "3f"), (63, "4104"), (4093, "4f ff".replace(" ", "")), (5000, "8b3801")]
)
def test_aml_package_lengths(length: int, prefix: str) -> None:
    scope = aml.scope("AAAA", b"\xa3" * (length - 4))
    assert scope[1 : 1 + len(prefix) // 2].hex() == prefix


@pytest.mark.parametrize("bad", ["TOOLONG", "1ABC", "", "ab", "A.B.", "\\"])
def test_aml_bad_names(bad: str) -> None:
    with pytest.raises(ValueError, match="name segment"):
        aml.name(bad, aml.integer(0))


def test_aml_refuses_what_it_cannot_encode() -> None:
    calls: list[Callable[[], bytes]] = [
        lambda: aml.integer(-1),
        lambda: aml.integer(1 << 64),
        lambda: aml.eisa_id("X"),
        lambda: aml.package(*[b"\0"] * 256),
    ]
    for wrong in calls:
        with pytest.raises(ValueError):
            wrong()
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"


@pytest.mark.parametrize("has_rtc", [True, False])
def test_where_there_is_neither_clock_nor_screen_the_fadt_says_so(has_rtc: bool) -> None:
    (flags,) = struct.unpack_from("<H", build_tables([0], has_rtc=has_rtc).tables["FACP"][1], 109)
    assert (bool(flags & 1 << 5), bool(flags & 1 << 2)) == (not has_rtc, True)
