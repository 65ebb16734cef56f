from collections.abc import Iterator
from pathlib import Path

import pytest

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
