"""The contract of engines, run by the interpreter: with everything on, and with each optimisation off."""

import pytest

from nonroot import _engine
from nonroot.engines.native import InterpretEngine
from nonroot.engines.protocol import Engine, EngineOptions, Vcpu
from nonroot.testing.engine_contract import EngineContract

OPTIMISATIONS = [name for name, _ in _engine.optimisations()]


class TestInterpret(EngineContract):
    def make_engine(self) -> Engine:
        return InterpretEngine()

    def test_it_is_an_engine(self) -> None:
        assert isinstance(self.make_engine(), Engine)
        assert isinstance(self.machine("hlt").vcpu, Vcpu)


@pytest.mark.parametrize("off", [*([name] for name in OPTIMISATIONS), OPTIMISATIONS], ids="+".join, scope="class")
class TestOptimisationsOff(EngineContract):
    @pytest.fixture(autouse=True)
    def _switch_off(self, off: list[str]) -> None:
        self.options = EngineOptions(off=frozenset(off))

    def make_engine(self) -> Engine:
        return InterpretEngine()
