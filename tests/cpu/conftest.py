from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from nonroot.testing.differential_host import HostCpu, HostUnavailableError, find_runner


@pytest.fixture(scope="session")
def host() -> Iterator[HostCpu]:
    try:
        runner = find_runner()
    except HostUnavailableError as error:
        pytest.skip(str(error))
    with HostCpu(runner) as cpu:
        yield cpu


@pytest.fixture
def soak_seed() -> int:
    return 1000 + int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
