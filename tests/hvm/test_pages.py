"""Every device has a page: registers, what is not emulated, threats."""

import re
from pathlib import Path

import pytest

from tests.hvm.test_contract import ALL

FOLDER = Path(__file__).parents[2] / "docs/devices"
ROWS = re.findall(r"^\| (.*?\]\((\S+)\).*?) \|.*\| (.*?) \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
"""(names, page, modules) of the table of all devices."""


@pytest.mark.parametrize("device_type", ALL, ids=lambda kind: kind.__name__)
def test_every_device_is_in_the_table(device_type: type) -> None:
    module = device_type.__module__.removeprefix("nonroot.").removeprefix("hvm.").replace(".", "/") + ".py"
    assert [page for _, page, modules in ROWS if f"`{module}`" in modules], f"{module} has no page"


@pytest.mark.parametrize("page", sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md"))
def test_every_page_is_complete(page: str) -> None:
    text = (FOLDER / page).read_text()
    for part in ("Not emulated", "Threats"):
        assert re.search(rf"^(\*\*{part}\*\*|## {part}$)", text, re.MULTILINE), f"{page} does not say: {part}"
    assert re.search(r"\b0x[0-9A-F]+|PCI 00:", text), f"{page} does not say where the device is"


def test_every_page_is_in_the_overview() -> None:
    overview = (FOLDER / "README.md").read_text()
    assert [
        path.name for path in FOLDER.glob("*.md") if path.name != "README.md" and f"({path.name})" not in overview
    ] == []
