"""Everything that the CPU promises is there, by iced's instruction codes."""

from typing import Any

import iced_x86
import pytest

from nonroot import _engine

iced: Any = iced_x86

#: Extensions that the CPU policy can promise, and what every x86-64 CPU has.
PROMISED = frozenset(
    "INTEL8086 INTEL8086_ONLY INTEL186 INTEL286 INTEL386 INTEL486 X64 CMOV CPUID CX8 FPU FPU287 FPU387 FXSR MMX MSR "
    "MULTIBYTENOP PAUSE RDPMC SEP SSE SSE2 SYSCALL TSC CMPXCHG16B SSE3 SSSE3 SSE4_1 SSE4_2 AES PCLMULQDQ POPCNT LZCNT "
    "MOVBE BMI1 BMI2 ADX RDRAND RDSEED FSGSBASE INVPCID RDTSCP CLFSH CLFLUSHOPT PREFETCHW XSAVE XSAVEOPT XSAVEC SMAP "
    "AVX AVX2 FMA F16C".split()
)
#: In the tables with a common extension, but of no CPU since long.
OBSOLETE = frozenset(
    "Frstpm Jmpe_rm16 Jmpe_rm32 Jmpe_disp16 Jmpe_disp32 Storeall Loadall286 Loadall386 Mov_r32_tr Mov_tr_r32 "
    "Xbts_r16_rm16 Xbts_r32_rm32 Ibts_rm16_r16 Ibts_rm32_r32 Cmpxchg486_rm8_r8 Cmpxchg486_rm16_r16 Cmpxchg486_rm32_r32 "
    "Fnstdw_AX Fnstsg_AX Rsm Vmgexit Vmgexit_F2".split()
)


@pytest.fixture(scope="module")
def coverage() -> dict[str, str]:
    return dict(_engine.coverage())


def test_nothing_promised_is_missing(coverage: dict[str, str]) -> None:
    features = {value: name for name, value in vars(iced.CpuidFeature).items() if isinstance(value, int)}
    codes = {name.upper(): value for name, value in vars(iced.Code).items() if isinstance(value, int)}
    missing = []
    for name, how in coverage.items():
        if how != "missing" or name in OBSOLETE:
            continue
        instruction = iced.Instruction()
        instruction.code = codes[name.upper()]
        needed = {features[feature] for feature in instruction.cpuid_features()}
        if needed <= PROMISED:
            missing.append((name, sorted(needed)))
    assert not missing


def test_obsolete_codes_are_no_excuse(coverage: dict[str, str]) -> None:
    assert {name for name in OBSOLETE if coverage[name] != "missing"} == set()


def test_the_report_is_complete(coverage: dict[str, str]) -> None:
    assert set(coverage.values()) == {"interpreted", "native", "missing"}
    assert coverage["Add_rm32_r32"] == coverage["Iretq"] == coverage["Ud2"] == "interpreted"
    assert coverage["Addps_xmm_xmmm128"] == coverage["Fadd_m32fp"] == "native"
    assert coverage["Vmlaunch"] == "missing"
    assert len(coverage) > 2500
