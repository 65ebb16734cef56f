"""A XenStore of each test's own, for tests with real guests and real backends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.xenstore.client import XenStore
from tests.backends.frontend import xenstore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the store's socket is: ``store/socket``."""
    (tmp_path / "store").mkdir()
    return tmp_path


@pytest.fixture
def store(folder: Path) -> Iterator[XenStore]:
    with xenstore(folder / "store") as client:
        yield client
