"""What the boot matrix runs on: every engine, the translating one once more with scattered memory, and stub domains."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nonroot.errors import SoftwareMissingError, UnsupportedError
from nonroot.guests.packages import package
from tests.matrix.pc import Pc, engines

SCRAMBLE_SEED = 20_250_101


@dataclass(frozen=True)
class Maker:
    """Makes the PCs of one row of the matrix, and closes them."""

    engine: str
    scramble: int | None
    model: str
    made: list[Pc]

    def __call__(self, **options: object) -> Pc:
        try:
            pc = Pc(engine=self.engine, scramble=self.scramble, model=self.model, **options)  # type: ignore[arg-type]
        except UnsupportedError as error:
            pytest.skip(str(error))
        except SoftwareMissingError as error:
            pytest.skip(str(error))
        self.made.append(pc)
        return pc


ROWS = [
    *(pytest.param((name, None, "internal"), id=name) for name in engines()),
    pytest.param((engines()[-1], SCRAMBLE_SEED, "internal"), id=f"{engines()[-1]}-scrambled", marks=pytest.mark.slow),
    pytest.param((engines()[-1], None, "stub"), id=f"{engines()[-1]}-stub"),
    pytest.param((engines()[-1], SCRAMBLE_SEED, "stub"), id=f"{engines()[-1]}-stub-scrambled", marks=pytest.mark.slow),
]


@pytest.fixture(params=ROWS)
def make(request: pytest.FixtureRequest) -> Iterator[Maker]:
    """A maker of PCs; the test runs for every row."""
    engine, scramble, model = request.param
    maker = Maker(engine, scramble, model, [])
    yield maker
    for pc in maker.made:
        pc.close()


def fetched(name: str, path: str, architecture: str = "amd64") -> Path:
    """A file out of a Debian package; the test is skipped where it cannot be had."""
    try:
        found = sorted(package(name, architecture).glob(path))
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    assert found, f"{name} has no {path}"
    return found[-1]
