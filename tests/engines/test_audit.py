"""The contract of engines with the audit on: all that is cached is compared at every exit, slice and invalidation."""

from collections.abc import Mapping
from typing import Any

import pytest

from nonroot import _engine
from nonroot.engines.native import AUDIT, InterpretEngine, TranslateEngine
from nonroot.engines.protocol import Engine
from nonroot.errors import BadOptionError
from nonroot.testing.engine_contract import EngineContract


class AuditedEngine(TranslateEngine):
    """Translates what it sees for the first time."""

    _more: Mapping[str, Any] = {"translate_after": 1}


@pytest.fixture(autouse=True)
def _audit_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(AUDIT, "1")


@pytest.mark.skipif(_engine.translate_unavailable() is not None, reason=f"{_engine.translate_unavailable()}")
class TestTranslate(EngineContract):
    def make_engine(self) -> Engine:
        return AuditedEngine()


class TestInterpret(EngineContract):
    def make_engine(self) -> Engine:
        return InterpretEngine()

    def test_it_audits(self) -> None:
        machine = self.machine("mov ecx, 1000\nagain: add [rsp - 64], rcx\ndec ecx\njnz again\nhlt")
        machine.run()
        statistics = machine.vcpu.statistics()
        assert statistics["audit_rounds"] > 0
        assert statistics["audited_translations"] > 0
        assert statistics["audited_blocks"] > 0

    @pytest.mark.parametrize("wrong", ["tlb", "-1", "1.5", "4294967296", ""])
    def test_what_is_no_number_is_refused(self, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(AUDIT, wrong)
        with pytest.raises(BadOptionError, match=AUDIT):
            self.machine("hlt")
