"""The contract of engines, run by the kvm engine on whatever KVM this machine has."""

from nonroot.engines.kvm.engine import KvmEngine
from nonroot.engines.protocol import Engine
from nonroot.testing.engine_contract import EngineContract


class TestKvm(EngineContract):
    def make_engine(self) -> Engine:
        return KvmEngine()
