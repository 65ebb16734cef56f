from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nonroot.api import Domain
from tests.display.vga_guest import GREETING, write_kernel
from tests.runtime import own_runtime_folder


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[Path]:
    """A list of running domains of this module's own."""
    with own_runtime_folder() as folder:
        yield folder / "nonroot"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_kernel(tmp_path_factory.mktemp("guest") / "vga.elf")


def make(kernel: Path, **options: Any) -> Domain:
    """A domain with a screen; not started."""
    return Domain(kernel=kernel, agent=False, memory="16M", display=True, console=False, **options)


@pytest.fixture(scope="module")
def screen(kernel: Path, runtime: Path) -> Iterator[Domain]:
    """A domain whose guest shows text and echoes keys."""
    with make(kernel, name="screen") as domain:
        domain.wait_for_text(GREETING, 30)
        yield domain
