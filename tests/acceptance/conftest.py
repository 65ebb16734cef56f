"""A user's folder for running domains of each module's own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.toolstack.client import IDLE_VARIABLE
from tests.acceptance.guests import destroy_all


@pytest.fixture(scope="module", autouse=True)
def runtime() -> Iterator[Path]:
    """Where domain zero, XenStore and domains of this module are; at the end there are no domains."""
    folder = tempfile.mkdtemp(prefix="nrac")  # short: a socket's path must be
    before = {name: os.environ.get(name) for name in ("XDG_RUNTIME_DIR", IDLE_VARIABLE)}
    os.environ |= {"XDG_RUNTIME_DIR": folder, IDLE_VARIABLE: "5"}
    try:
        yield Path(folder) / "nonroot"
    finally:
        destroy_all()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
