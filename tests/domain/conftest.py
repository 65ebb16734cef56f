import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nonroot.api import Domain
from nonroot.domain import client
from tests.domain.native_agent import NativeAgent, build


@pytest.fixture(scope="session", params=[64, 32])
def agent_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = build(request.param, tmp_path_factory.mktemp("agent"), "-DTEST_STDIO")
    if request.param == 32:
        try:
            with NativeAgent(path):
                pass
        except OSError:
            pytest.skip("this machine's kernel does not run 32-bit programs")
    return path


@pytest.fixture
def agent(agent_path: Path) -> Iterator[NativeAgent]:
    with NativeAgent(agent_path) as running:
        yield running


@pytest.fixture(scope="session")
def native_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(64, tmp_path_factory.mktemp("native"), "-DTEST_STDIO")


@pytest.fixture
def native(native_program: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Domain]]:
    """Makes started domains whose guest is the agent, run on this machine."""
    monkeypatch.setenv("NONROOT_TEST_AGENT", os.fspath(native_program))
    monkeypatch.setattr(client, "PROGRAM", [sys.executable, str(Path(__file__).with_name("native_runner.py"))])
    dummy = tmp_path / "kernel"
    dummy.write_bytes(b"\x7fELF\x02")
    made: list[Domain] = []

    def make(**options: Any) -> Domain:
        domain = Domain(kernel=dummy, initrd=dummy, **options)
        made.append(domain)
        return domain.start()

    yield make
    for domain in made:
        domain.destroy()
