"""
What every engine must do. Subclass :class:`EngineContract` in a test module, give it an engine, pytest does the rest::

    class TestMyEngine(EngineContract):
        def make_engine(self) -> Engine:
            return MyEngine()

Guest programs are assembled on the spot; the memory is scrambled. Tests of what an engine says it cannot do
(:attr:`nonroot.engines.protocol.Engine.capabilities`) check that it refuses instead.
"""

from __future__ import annotations

from nonroot.testing.engine_contract_base import EngineBase
from nonroot.testing.engine_contract_cpu import CpuContract
from nonroot.testing.engine_contract_debug import DebugContract
from nonroot.testing.engine_contract_events import InterruptContract, ThreadContract
from nonroot.testing.engine_contract_memory import PortAndMemoryContract
from nonroot.testing.engine_contract_state import StateContract

__all__ = ["EngineBase", "EngineContract"]


class EngineContract(
    PortAndMemoryContract, CpuContract, InterruptContract, ThreadContract, StateContract, DebugContract
):
    """All of it."""
