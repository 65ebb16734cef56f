"""The engine has and compares at least the instructions that docs/isa-coverage.md says."""

from __future__ import annotations

from pathlib import Path

from nonroot.testing import coverage
from nonroot.testing.generator_codes import host_flags

DOCUMENT = Path(__file__).parents[2] / "docs" / "isa-coverage.md"
#: Extensions that need the host's CPU.
NATIVE = {"AVX": "avx", "AVX2": "avx2", "FMA": "fma", "F16C": "f16c", "SHA": "sha_ni", "GFNI": "gfni"}


def test_nothing_is_lost() -> None:
    document = DOCUMENT.read_text()
    promised = coverage.promised(document)
    assert len(promised) > 40
    table = coverage.rows()
    lost = {}
    for extension, (executed, compared) in promised.items():
        needed = [flag for name, flag in NATIVE.items() if name in extension]
        if not host_flags().issuperset(needed):
            continue
        row = table[extension]
        if row.executed < executed or len(row.compared) < compared:
            lost[extension] = (row.executed, len(row.compared))
    assert not lost


def test_the_page_is_read_back() -> None:
    document = coverage.report()
    table = coverage.rows()
    promised = coverage.promised(document)
    assert promised["INTEL8086"] == (table["INTEL8086"].executed, len(table["INTEL8086"].compared))
    assert len(promised) == sum(1 for row in table.values() if row.executed)
