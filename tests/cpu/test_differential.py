"""Generated sequences on the engine and on the host CPU, and on the engine with and without its optimisations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nonroot import _engine
from nonroot.testing.differential import Comparison, Report, engine_codes, with_gdt_of_host
from nonroot.testing.differential_case import Case, Result
from nonroot.testing.differential_engine import EngineCpu
from nonroot.testing.differential_host import HostCpu
from nonroot.testing.generator import Generator
from nonroot.testing.generator_codes import code_name, code_number, usable_codes

OPTIMISATIONS = [name for name, _ in _engine.optimisations()]


def run(comparison: Comparison, instructions: int, *, most: int = 10) -> Report:
    report = Report()
    first = 0
    while report.instructions < instructions and len(report.failures) < most:
        comparison.run(first, 2000, report, most=most)
        first += 2000
    return report


def check(report: Report) -> None:
    assert not report.failures, "\n\n" + "\n\n".join(failure.report() for failure in report.failures)
    # Generated branches go forward, so that only jumps to a register's value can run in circles.
    assert report.timeouts <= report.cases // 1000


def host_against_engine(host: HostCpu, bits: int, seed: int, instructions: int) -> Report:
    engine = EngineCpu()
    with_gdt_of_host(host, engine)
    report = run(Comparison(host, engine, Generator(seed, bits)), instructions)
    engine.close()
    return report


@pytest.mark.parametrize(("bits", "instructions"), [(64, 70_000), (32, 30_000)])
def test_host_and_engine_agree(host: HostCpu, bits: int, instructions: int) -> None:
    report = host_against_engine(host, bits, 1, instructions)
    check(report)
    assert report.instructions >= instructions
    usable = {info.code for info in usable_codes(bits)}
    missing = usable - report.codes.keys()
    assert len(missing) <= len(usable) // 100, [code_name(code) for code in missing]
    # Ends, page faults, #GP, #UD, #DE, #AC, #DB, #MF, #XM: every kind of ending must be among them.
    assert {0, 1, 3, 6, 13, 14, 16, 17, 19} <= report.endings.keys()


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("off", [*OPTIMISATIONS, "all"])
def test_optimisations_change_nothing(off: str, bits: int) -> None:
    names = tuple(OPTIMISATIONS) if off == "all" else (off,)
    fast, slow = EngineCpu(), EngineCpu(names)
    comparison = Comparison(fast, slow, Generator(2, bits), exact=True)
    check(run(comparison, 8_000 if off in ("all", "fast-ops") else 1_500))
    fast.close()
    slow.close()


class Wrong:
    """An engine with a bug: AND of 32 bits leaves CF set."""

    def __init__(self, engine: EngineCpu) -> None:
        self.engine = engine

    def run(self, cases: list[Case], template: bytes) -> list[Result]:
        return [
            replace(result, rflags=result.rflags | 1) if self.last_is_and(case, result) else result
            for case, result in zip(cases, self.engine.run(cases, template), strict=True)
        ]

    @staticmethod
    def last_is_and(case: Case, result: Result) -> bool:
        if result.vector_number != 3 or result.rip not in case.starts[1:]:
            return False
        start = case.starts[case.starts.index(result.rip) - 1]
        return case.code[start - case.rip : start - case.rip + 1] == b"\x25"  # and eax, imm32


def test_a_wrong_flag_is_found_and_shrunk() -> None:
    right, wrong = EngineCpu(), EngineCpu()
    comparison = Comparison(right, Wrong(wrong), Generator(3))
    report = Report()
    comparison.run(0, 4000, report, most=1)
    assert report.failures
    failure = report.failures[0]
    text = failure.report()
    assert "and eax" in text
    assert "CF" in failure.found[0]
    shrunk = failure.single or failure.case
    assert len(shrunk.starts) == 2
    # The printed numbers make the same failure again.
    again = Report()
    comparison.run(failure.case.seed, 1, again)
    assert again.failures[0].report() == text


def test_engine_has_what_the_generator_makes() -> None:
    implemented = engine_codes()
    missing = [info.name for bits in (64, 32) for info in usable_codes(bits) if info.code not in implemented]
    assert not missing


def test_names_go_both_ways() -> None:
    assert code_name(code_number("Add_rm8_r8")) == "ADD_RM8_R8"


@pytest.mark.soak
@pytest.mark.parametrize("bits", [64, 32])
def test_host_and_engine_agree_for_long(host: HostCpu, soak_seed: int, bits: int) -> None:
    check(host_against_engine(host, bits, soak_seed, 1_000_000))


@pytest.mark.soak
@pytest.mark.parametrize("bits", [64, 32])
def test_fast_and_general_agree_for_long(soak_seed: int, bits: int) -> None:
    comparison = Comparison(EngineCpu(), EngineCpu(tuple(OPTIMISATIONS)), Generator(soak_seed, bits), exact=True)
    check(run(comparison, 1_000_000))
