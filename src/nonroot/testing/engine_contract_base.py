"""How the tests of :mod:`nonroot.testing.engine_contract` make machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nonroot.engines.policy import CpuPolicy
from nonroot.engines.protocol import Capability, CapabilityError, Engine, EngineOptions
from nonroot.testing.engine_machine import BareMachine

__all__ = ["EngineBase"]


class EngineBase:
    """Makes machines with the engine under test."""

    #: Options that all machines of this class run with.
    options: EngineOptions = EngineOptions()

    def make_engine(self) -> Engine:
        """The engine under test."""
        raise NotImplementedError

    def policy(self, engine: Engine, **changes: Any) -> CpuPolicy:
        """A CPU that the engine can show."""
        policy = CpuPolicy.of_engine(engine)
        return replace(policy, **changes)

    def machine(self, source: str = "", bits: int = 64, /, scrambled: bool = True, **options: Any) -> BareMachine:
        """A machine with a program; ``options`` are fields of :class:`EngineOptions`."""
        engine = self.make_engine()
        asked = replace(self.options, **options)
        for capability in sorted(asked.needed() - engine.capabilities):
            with pytest.raises(CapabilityError, match=engine.name):
                BareMachine(engine, self.policy(engine), asked)
            pytest.skip(f"the {engine.name} engine refuses {capability.value}, as it says")
        machine = BareMachine(engine, self.policy(engine), asked, scrambled=scrambled)
        return machine.load(source, bits) if source else machine

    def need(self, capability: Capability) -> None:
        """Skip the test if the engine does not claim this."""
        engine = self.make_engine()
        if capability not in engine.capabilities:
            pytest.skip(f"the {engine.name} engine has no {capability.value}")

    def advance(self, machine: BareMachine, count: int) -> None:
        """Run ``count`` instructions; under an engine that does not count them, up to the next exit."""
        counts = Capability.INSTRUCTION_LIMIT in machine.engine.capabilities
        machine.run(limit=count if counts else None)
