"""The contract of engines, run by the kvm engine on whatever KVM this machine has."""

from pathlib import Path

import pytest

from nonroot.engines.kvm import probe
from nonroot.engines.kvm.engine import KvmEngine
from nonroot.engines.protocol import Engine
from nonroot.testing.engine_contract import EngineContract

PROBLEM = probe.problem()
#: Tests of what a KVM without hardware does not do, and why.
WITHOUT_HARDWARE = {
    "test_injected_interrupts_wait_for_the_guest": "it has no interrupt shadow",
    "test_interrupt_window": "it has no interrupt shadow",
    "test_pic_acknowledge": "its IRET and HLT do not wait for interrupts",
    "test_interrupt_commands": "its IRET and HLT do not wait for interrupts",
    "test_nmi": "it does not hold NMIs back until IRET",
    "test_tsc_deadline": "guests read the host's TSC",
    "test_time_stamp_counter": "guests read the host's TSC",
    "test_cpuid_shows_the_policy": "guests see the host's CPUID",
    "test_features_can_be_switched_off": "guests see the host's CPUID",
    "test_triple_fault": "it has no triple faults",
    "test_from_real_to_long_mode": "it does not change modes as a CPU does",
    "test_vector_registers": "it does not know all instructions",
    "test_what_the_cpu_lacks_is_undefined": "it does not know all instructions",
    "test_code_breakpoints_for_the_caller": "it has no debug registers",
    "test_data_breakpoints_for_the_caller": "it has no debug registers",
    "test_the_guest_s_breakpoints": "it has no debug registers",
}
#: The same of QEMU's software CPU, in the bed.
ON_QEMU = {
    "test_code_breakpoints_for_the_caller": "QEMU's CPU does not look at the DR7 that VMRUN loads",
    "test_data_breakpoints_for_the_caller": "QEMU's CPU does not look at the DR7 that VMRUN loads",
}


@pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
@pytest.mark.slow
class TestKvm(EngineContract):
    @pytest.fixture(autouse=True)
    def _skip_what_this_kvm_cannot(self, request: pytest.FixtureRequest) -> None:
        name = request.function.__name__
        if probe.software() and name in WITHOUT_HARDWARE:
            pytest.skip(f"this KVM is {probe.software()}: {WITHOUT_HARDWARE[name]}")
        if Path("/bed").exists() and name in ON_QEMU:
            pytest.skip(ON_QEMU[name])

    def make_engine(self) -> Engine:
        return KvmEngine()
