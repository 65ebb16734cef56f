"""A user's folder for running domains of each module's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.toolstack.client import IDLE_VARIABLE
from tests.acceptance.guests import destroy_all
from tests.runtime import own_runtime_folder


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[Path]:
    """Where domain zero, XenStore and domains of this module are; at the end there are no domains."""
    with own_runtime_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(IDLE_VARIABLE, "5")
        try:
            yield folder / "nonroot"
        finally:
            destroy_all()
