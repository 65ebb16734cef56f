"""Windows under the translator: the contract with windows at once, and that they are what memory is reached by."""

from collections.abc import Mapping
from typing import Any

import pytest

from nonroot import _engine
from nonroot.engines.exits import Halt
from nonroot.engines.native import WINDOWS_AFTER, InterpretEngine, TranslateEngine
from nonroot.engines.protocol import Engine
from nonroot.errors import BadOptionError
from nonroot.testing.engine_contract import EngineContract
from tests.engines.test_translate_privilege import CASES, LOG, prepared

UNAVAILABLE = _engine.translate_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"{UNAVAILABLE}")


class WindowsEngine(TranslateEngine):
    """Translates what it sees for the first time, with windows as soon as user code has run."""

    _more: Mapping[str, Any] = {"translate_after": 1, "windows_after": 1}


class TestWindows(EngineContract):
    def make_engine(self) -> Engine:
        return WindowsEngine()

    def test_the_variable_is_a_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(WINDOWS_AFTER, "soon")
        with pytest.raises(BadOptionError, match=WINDOWS_AFTER):
            self.machine()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("off", ["", "jump-lookup", "flag-recipes", "syscalls", "page-groups", "dead-flags"])
def test_user_code_does_what_it_does_without(case: str, off: str) -> None:
    seen = []
    for engine in (InterpretEngine(), WindowsEngine()):
        windows = isinstance(engine, WindowsEngine)
        machine = prepared(engine, **CASES[case], off=frozenset({off} if off and windows else ()))
        assert isinstance(machine.run(limit=200_000), Halt)
        state = machine.vcpu.state()
        seen.append((state.gpr, state.rflags, state.segments, machine.memory.read(LOG, 0x4000), state.cpl))
        if windows:
            assert machine.vcpu.statistics()["window_pages"] > 0
    assert seen[0] == seen[1]


def test_they_can_be_switched_off() -> None:
    machine = prepared(WindowsEngine(), off=frozenset({"windows"}))
    assert isinstance(machine.run(limit=200_000), Halt)
    assert machine.vcpu.statistics()["window_pages"] == 0
