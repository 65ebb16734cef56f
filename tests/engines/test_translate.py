"""The contract of engines, run by the translator: blocks translated at once, each optimisation off, and in lockstep."""

from collections.abc import Mapping
from typing import Any

import pytest

from nonroot import _engine
from nonroot.engines.native import LockstepEngine, TranslateEngine
from nonroot.engines.protocol import Engine, EngineOptions
from nonroot.testing.engine_contract import EngineContract

UNAVAILABLE = _engine.translate_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"{UNAVAILABLE}")

INTERPRETER = {name for name, _ in _engine.optimisations()}
SWITCHES = [name for name, _ in _engine.optimisations(True) if name not in INTERPRETER]


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


class TestLockstep(EngineContract):
    def make_engine(self) -> Engine:
        return LockstepEngine()


@pytest.mark.parametrize("off", [*([name] for name in SWITCHES), SWITCHES, ["tlb"]], ids="+".join, scope="class")
class TestOptimisationsOff(EngineContract):
    @pytest.fixture(autouse=True)
    def _switch_off(self, off: list[str]) -> None:
        self.options = EngineOptions(off=frozenset(off))

    def make_engine(self) -> Engine:
        return EagerEngine()
