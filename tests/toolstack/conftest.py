import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nonroot import guests
from nonroot.cli.main import main
from nonroot.domain import registry
from nonroot.errors import NonrootError, SoftwareMissingError
from nonroot.toolstack.client import IDLE_VARIABLE, Toolstack
from tests.waiting import PATIENCE, wait_until

Run = Callable[..., "Outcome"]


class Outcome:
    """What a command line gave."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.status, self.out, self.err))


def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What ``condition``, which asks processes and costs something, gives as soon as that is true."""
    return wait_until(condition, seconds, pause=0.02)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's runtime folder of this module's own; at the end nothing runs in it."""
    path = tmp_path_factory.mktemp("dom0")
    before = {name: os.environ.get(name) for name in ("XDG_RUNTIME_DIR", IDLE_VARIABLE)}
    os.environ |= {"XDG_RUNTIME_DIR": str(path), IDLE_VARIABLE: "0.3"}
    try:
        yield path / "nonroot"
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@pytest.fixture(scope="module")
def tiny(folder: Path) -> str:
    try:
        return os.fspath(guests.tiny().kernel)
    except SoftwareMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def nonroot(folder: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """The command, in this process. At the end there are no domains."""

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        status = main(list(arguments))
        return Outcome(status, *capfd.readouterr())

    yield run
    while entries := registry.entries():
        with Toolstack() as toolstack:
            for entry in entries:
                with contextlib.suppress(NonrootError):
                    toolstack.request("destroy", domain=entry.name)


def dom0_pid() -> int:
    with Toolstack() as toolstack:
        return int(toolstack.request("hello")["pid"])
