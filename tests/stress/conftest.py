"""Every stress test runs under every engine that exists here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.engines.select import ENGINES
from nonroot.errors import SoftwareMissingError
from nonroot.guests import linux
from tests.stress.userland import Guest, boot

KERNELS = ("cloud-amd64", "686-pae")


def need(flavour: str) -> None:
    try:
        guest = linux(flavour)
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    if guest.flavour != flavour:
        pytest.skip(guest.note or f"there is no {flavour} kernel")


@pytest.fixture(scope="session", params=sorted(set(ENGINES) - {"lockstep"}))
def engine(request: pytest.FixtureRequest) -> str:
    """An engine's name."""
    return str(request.param)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where programs are built."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", params=KERNELS)
def guest(request: pytest.FixtureRequest, engine: str) -> Iterator[Guest]:
    """A guest of each kernel, under each engine."""
    need(request.param)
    with boot(engine, request.param) as domain:
        yield Guest(domain)
