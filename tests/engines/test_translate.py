"""The contract of engines, run by the translator: blocks translated at once, each optimisation off, and in lockstep."""

from collections.abc import Mapping
from typing import Any

import pytest

from nonroot import _engine
from nonroot.engines.exits import Halt
from nonroot.engines.native import SWITCHES, LockstepEngine, TranslateEngine
from nonroot.engines.protocol import Engine, EngineOptions
from nonroot.errors import BadOptionError
from nonroot.testing.engine_contract import EngineContract

UNAVAILABLE = _engine.translate_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"{UNAVAILABLE}")

INTERPRETER = {name for name, _ in _engine.optimisations()}
TRANSLATOR = [name for name, _ in _engine.optimisations(True) if name not in INTERPRETER]


class EagerEngine(TranslateEngine):
    """Translates what it sees for the first time."""

    _more: Mapping[str, Any] = {"translate_after": 1}


class TestTranslate(EngineContract):
    def make_engine(self) -> Engine:
        return EagerEngine()

    def test_it_is_an_engine(self) -> None:
        assert isinstance(self.make_engine(), Engine)

    def test_it_translates(self) -> None:
        machine = self.machine("mov ecx, 1000\nagain: add rax, rcx\ndec ecx\njnz again\nhlt")
        machine.run()
        assert machine.vcpu.state().gpr[0] == 500500
        statistics = machine.vcpu.statistics()
        assert statistics["native_instructions"] > 2900
        assert statistics["translated_blocks"] >= 2

    def test_the_environment_switches_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(SWITCHES, "-chain, -flag-recipes")
        machine = self.machine("mov ecx, 9\nagain: dec ecx\njnz again\nhlt")
        assert isinstance(machine.run(), Halt)
        assert machine.vcpu.statistics()["chained_jumps"] == 0
        for wrong in ("chain", "-nothing"):
            monkeypatch.setenv(SWITCHES, wrong)
            with pytest.raises(BadOptionError):
                self.machine()


class TestLockstep(EngineContract):
    def make_engine(self) -> Engine:
        return LockstepEngine()


ALL_OFF = [*(pytest.param([name], marks=pytest.mark.slow) for name in TRANSLATOR), TRANSLATOR, ["tlb"]]


@pytest.mark.parametrize("off", ALL_OFF, ids="+".join, scope="class")
class TestOptimisationsOff(EngineContract):
    @pytest.fixture(autouse=True)
    def _switch_off(self, off: list[str]) -> None:
        self.options = EngineOptions(off=frozenset(off))

    def make_engine(self) -> Engine:
        return EagerEngine()
