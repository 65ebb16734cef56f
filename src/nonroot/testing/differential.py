"""Runs generated instruction sequences on two CPUs and reports every difference, shrunk to one instruction.

The judge is the host's CPU (``host``), or another configuration of the engine. From the command line::

    python -m nonroot.testing.differential --seed 7 --cases 10000
    python -m nonroot.testing.differential --seed 7 --only 1234          # one case, with its states
    python -m nonroot.testing.differential --judge fast --off fast-ops   # engine against engine

Exit status 1 if something differs.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from iced_x86 import Decoder, Formatter, FormatterSyntax

from nonroot import _engine
from nonroot.testing.differential_case import (
    DATA_REGIONS,
    PAGE,
    REGISTERS_64,
    VISIBLE_FLAGS,
    Case,
    Result,
    flag_names,
)  # fmt: skip
from nonroot.testing.differential_compare import differences, executed
from nonroot.testing.differential_engine import EngineCpu
from nonroot.testing.differential_host import HostCpu, host_gdt
from nonroot.testing.generator import Generator
from nonroot.testing.generator_codes import code_name, code_number

BATCH = 1000


class CpuUnderTest(Protocol):
    """What runs cases."""

    def run(self, cases: list[Case], template: bytes) -> list[Result]:
        """Results of ``cases``, each on data pages that start as ``template``."""


@dataclass
class Failure:
    """A case on which the CPUs disagree."""

    case: Case
    #: The single instruction that does it, with its own starting state; None if only the sequence does.
    single: Case | None
    found: list[str]
    judge: Result
    tested: Result
    seed: int
    bits: int

    def report(self) -> str:
        """Assembly, starting state and differences."""
        case = self.single or self.case
        lines = [f"seed {self.seed}, case {self.case.seed}, {self.bits}-bit:"]
        lines += [f"    {line}" for line in disassemble(case, self.bits)]
        if self.single is None and len(self.case.starts) > 2:
            lines.append("  (no instruction of the sequence does it alone)")
        lines += [f"  {text}" for text in self.found]
        lines.append(f"  before: {registers(case.gpr, case.rflags, self.bits)}")
        lines.append(f"  judge:  {registers(self.judge.gpr, self.judge.rflags, self.bits)}")
        lines.append(f"  tested: {registers(self.tested.gpr, self.tested.rflags, self.bits)}")
        return "\n".join(lines)

    @property
    def key(self) -> str:
        """What failures of the same kind share: the instruction's code and the first difference's first word."""
        case = self.single or self.case
        decoder = Decoder(self.bits, case.code, ip=case.rip)
        names = [code_name(int(instruction.code)) for instruction in decoder]
        return f"{names[-1] if names else 'nothing'}: {self.found[0].split()[0]}"


@dataclass
class Report:
    """What a run found."""

    cases: int = 0
    #: Instructions that the judge executed.
    instructions: int = 0
    #: How often each of iced's codes was generated.
    codes: Counter[int] = field(default_factory=Counter)
    #: How cases ended, by exception vector.
    endings: Counter[int] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    #: Cases that differ in undefined flags only, by the last instruction's code.
    undefined: Counter[str] = field(default_factory=Counter)
    timeouts: int = 0


def disassemble(case: Case, bits: int) -> Iterator[str]:
    """The case's instructions as assembly, with their bytes."""
    formatter = Formatter(FormatterSyntax.INTEL)
    decoder = Decoder(bits, case.code, ip=case.rip)
    for number, start in enumerate(case.starts[:-1]):
        offset, end = start - case.rip, case.starts[number + 1] - case.rip
        if offset >= len(case.code):
            return
        decoder.position = offset
        decoder.ip = start
        yield f"{start:#x}  {case.code[offset:end].hex():<32} {formatter.format(decoder.decode())}"


def registers(gpr: list[int], rflags: int, bits: int) -> str:
    """All registers in one line."""
    count = 8 if bits == 32 else 16
    names = zip(REGISTERS_64[:count], gpr, strict=False)
    return " ".join(f"{name}={value:x}" for name, value in names) + f" flags={flag_names(rflags & VISIBLE_FLAGS)}"


def _truncated(case: Case, count: int) -> Case:
    """The case's first ``count`` instructions."""
    length = case.starts[count] - case.rip
    return replace(
        case, code=case.code[:length], starts=case.starts[: count + 1], undefined=case.undefined[: count + 1]
    )


def _after(case: Case, number: int, state: Result, template: bytes) -> Case:
    """Instruction ``number`` of the case alone, from the state that its predecessors left."""
    patches = []
    offset = 0
    for base, pages in DATA_REGIONS:
        for at in range(0, pages * PAGE, 64):
            piece = state.data[offset + at : offset + at + 64]
            if piece != template[offset + at : offset + at + 64]:
                patches.append((base + at, piece))
        offset += pages * PAGE
    start, end = case.starts[number], case.starts[number + 1]
    return replace(
        case,
        code=case.code[start - case.rip : end - case.rip],
        rip=start,
        rflags=state.rflags & ~0x10000,
        gpr=state.gpr,
        fs_base=state.fs_base,
        gs_base=state.gs_base,
        vector=state.vector,
        patches=patches,
        starts=[start, end],
        undefined=[0, case.undefined[number + 1]],
    )


class Comparison:
    """Compares two CPUs on the cases of one seed."""

    def __init__(self, judge: CpuUnderTest, tested: CpuUnderTest, generator: Generator, *, exact: bool = False) -> None:
        """``exact``: undefined flags must agree too (engine against engine)."""
        self.judge = judge
        self.tested = tested
        self.generator = generator
        self.exact = exact
        self.bits = generator.bits

    def _differ(self, case: Case) -> tuple[list[str], Result, Result]:
        template = self.generator.template
        judge, tested = self.judge.run([case], template)[0], self.tested.run([case], template)[0]
        return self._found(case, judge, tested)[0], judge, tested

    def _found(self, case: Case, judge: Result, tested: Result) -> tuple[list[str], int]:
        found, undefined = differences(case, judge, tested, host=not self.exact)
        if self.exact and undefined:
            found.append(f"undefined flags {flag_names(undefined)} differ")
        return found, undefined

    def shrink(self, case: Case) -> Failure | None:
        """The failure of a case, shrunk; None if it does not happen again."""
        found, judge, tested = self._differ(case)
        if not found:
            return None
        failure = Failure(case, None, found, judge, tested, self.generator.seed, self.bits)
        count = len(case.starts) - 1
        if len(case.code) != case.starts[-1] - case.rip:
            return failure
        for length in range(1, count + 1):
            shorter = _truncated(case, length)
            found, judge, tested = self._differ(shorter)
            if found:
                failure = Failure(case, shorter, found, judge, tested, self.generator.seed, self.bits)
                break
        else:
            return failure
        if length > 1:
            before = self.judge.run([_truncated(case, length - 1)], self.generator.template)[0]
            if before.rip == case.starts[length - 1] and before.vector_number == 3:
                single = _after(case, length - 1, before, self.generator.template)
                found, judge, tested = self._differ(single)
                if found:
                    failure = Failure(case, single, found, judge, tested, self.generator.seed, self.bits)
        return failure

    def run(self, first: int, count: int, report: Report, *, most: int = 20) -> None:
        """Compares cases ``first`` to ``first + count - 1``; stops after ``most`` failures."""
        at = first
        while at < first + count and len(report.failures) < most:
            size = min(BATCH, first + count - at)
            made = [self.generator.case(index) for index in range(at, at + size)]
            self.compare([case for case, _ in made], report, most=most)
            for _, codes in made:
                report.codes.update(codes)
            at += size

    def compare(self, cases: list[Case], report: Report, *, most: int = 20) -> None:
        """Compares the given cases."""
        template = self.generator.template
        judged = self.judge.run(cases, template)
        tested = self.tested.run(cases, template)
        for case, left, right in zip(cases, judged, tested, strict=True):
            report.cases += 1
            report.instructions += executed(case, left)
            report.endings[left.vector_number] += 1
            report.timeouts += left.status == "timeout"
            found, undefined = self._found(case, left, right)
            if undefined and not found:
                report.undefined[self._last(case, left)] += 1
            if found and len(report.failures) < most:
                failure = self.shrink(case)
                if failure is None:  # a flake is a failure too: something is not reproducible
                    failure = Failure(case, None, [*found, "(not again)"], left, right, self.generator.seed, self.bits)
                report.failures.append(failure)

    def _last(self, case: Case, result: Result) -> str:
        number = case.starts.index(result.rip) if result.rip in case.starts else len(case.starts) - 1
        if number == 0:
            return "nothing"
        decoder = Decoder(self.bits, case.code[case.starts[number - 1] - case.rip :], ip=case.starts[number - 1])
        return code_name(int(decoder.decode().code))


def engine_codes() -> frozenset[int]:
    """iced's codes that the engine implements."""
    return frozenset(code_number(name) for name, how in _engine.coverage() if how != "missing")


def make_cpu(name: str, off: tuple[str, ...]) -> CpuUnderTest:
    """``host``, ``fast`` (the engine with every optimisation but ``off``) or ``general`` (with none)."""
    if name == "host":
        return HostCpu()
    if name == "general":
        off = tuple(name for name, _ in _engine.optimisations())
    return EngineCpu(off)


def with_gdt_of_host(host: HostCpu, *engines: EngineCpu) -> None:
    """Gives the engines the descriptors that user code can see on the host."""
    for number, descriptor in host_gdt(host).items():
        for engine in engines:
            engine.set_gdt_entry(number, descriptor)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m nonroot.testing.differential", description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cases", type=int, default=25_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="run this one case and print it")
    parser.add_argument("--bits", type=int, choices=(32, 64), default=64)
    parser.add_argument("--focus", default="", help="only instruction codes whose name contains this")
    parser.add_argument("--judge", choices=("host", "fast", "general"), default="host")
    parser.add_argument("--off", default="", help="optimisations of the engine to switch off, comma-separated")
    parser.add_argument("--most", type=int, default=20, help="stop after this many failures")
    parser.add_argument("--brief", action="store_true", help="one line for each kind of failure")
    chosen = parser.parse_args(arguments)
    off = tuple(name for name in chosen.off.split(",") if name)
    generator = Generator(chosen.seed, chosen.bits, chosen.focus)
    judge = make_cpu(chosen.judge, ())
    tested = EngineCpu(off)
    if isinstance(judge, HostCpu):
        with_gdt_of_host(judge, tested)
    comparison = Comparison(judge, tested, generator, exact=chosen.judge != "host")
    report = Report()
    if chosen.only is not None:
        case, _ = generator.case(chosen.only)
        print("\n".join(disassemble(case, chosen.bits)))
        comparison.compare([case], report)
    else:
        start = time.monotonic()
        comparison.run(chosen.first, chosen.cases, report, most=chosen.most)
        seconds = time.monotonic() - start
        print(f"{report.cases} cases, {report.instructions} instructions in {seconds:.1f} s, {len(report.codes)} codes")
    kinds = Counter(failure.key for failure in report.failures)
    if chosen.brief:
        for key, count in kinds.most_common():
            example = next(failure for failure in report.failures if failure.key == key)
            print(f"{count:5} {key}  [case {example.case.seed}] {'; '.join(example.found)[:200]}")
    else:
        for failure in report.failures:
            print(failure.report())
    if report.undefined:
        print("undefined flags differ after:", ", ".join(f"{n} ({c})" for n, c in report.undefined.most_common(40)))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
