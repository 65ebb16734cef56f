"""The benchmark of work rates: its programs on this machine, its arithmetic, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.guests import BenchError, Host, Line, Lines
from bench.userland import MissingToolError, build_work
from bench.work import Result, chosen, items, parse, rows, summarise

SIX = ["sha256", "quicksort", "hash", "copy", "bytecode", "recursion"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build_work(tmp_path_factory.mktemp("work"))
    except MissingToolError as error:
        pytest.skip(str(error))


def test_the_program_does_all_that_is_listed(work: Path) -> None:
    known = subprocess.run([work, "list"], capture_output=True, text=True, check=True).stdout.split()
    assert [item.name for item in items(1, 1) if item.command.startswith("{work} " + item.name)] == known


@pytest.mark.parametrize("name", [*SIX, "mandelbrot", "x87", "fork-exit", "page-fault", "syscall", "pipe"])
def test_a_measurement_here(work: Path, name: str) -> None:
    item = chosen(items(1, 0.02), name)[0]
    lines = Host().run(item.command.format(work=work), 30)
    result = parse(lines, item, "native", 0)
    assert result.units > 0
    assert result.seconds >= 0.02
    assert result.seconds < result.host_seconds + 0.05
    assert parse(Host().run(item.command.format(work=work), 30), item, "native", 1).check == result.check


def test_a_command_is_timed_and_its_output_summed(work: Path) -> None:
    def run(command: str) -> subprocess.CompletedProcess[str]:
        words = [str(work), "time", "sleepy", "3", "sh", "-c", command]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    first, second, failed = run("sleep 0.05; echo one"), run("echo two"), run("exit 3")
    assert first.stdout.startswith("WORK: start\nWORK: name=sleepy units=3 ns=")
    nanoseconds = int(first.stdout.partition("ns=")[2].split()[0])
    assert 50e6 < nanoseconds < 5e9
    assert first.stdout.partition("check=")[2] != second.stdout.partition("check=")[2]
    assert (failed.returncode, failed.stderr) == (1, "work: the command failed\n")


def test_the_data_is_always_the_same_and_as_long_as_asked(work: Path) -> None:
    first, second = (subprocess.run([work, "data", "100001"], capture_output=True, check=True).stdout for _ in "ab")
    assert first == second
    assert len(first) == 100001


def test_lines_are_cut_as_they_come() -> None:
    lines = Lines()
    for part in (b"one\r\ntw", b"o\r\n", b"rest"):
        lines.feed(part)
    lines.end()
    assert [lines.next(1).text, lines.next(1).text] == ["one", "two"]
    with pytest.raises(EOFError):
        lines.next(1)


def test_no_result_is_an_error() -> None:
    item = chosen(items(1, 1), "sha256")[0]
    with pytest.raises(BenchError, match="printed no result"):
        parse([Line(0.0, "WORK: start"), Line(1.0, "Killed")], item, "QEMU", 0)


def test_a_wrong_clock_is_noticed() -> None:
    def result(seconds: float, host: float) -> Result:
        return Result("sha256", "QEMU", 0, 1, seconds, host, "0" * 16, "KiB")

    assert result(2.0, 2.03).clock_is_right
    assert not result(2.0, 2.3).clock_is_right
    assert not result(2.0, 1.0).clock_is_right


def test_ratios_are_taken_pair_by_pair() -> None:
    wanted = chosen(items(1, 1), "cpu")
    results = []
    for item in wanted:
        for number, ours in enumerate((100, 400, 200)):  # a machine that changes its speed hurts both
            for system, units in (("nonroot", 2 * ours), ("QEMU", ours), ("native", 1600)):
                results.append(Result(item.name, system, number, units, 1.0, 1.0, "0" * 16, "KiB"))
    summary = summarise(results, wanted)
    assert summary["work"]["hash"]["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert summary["work"]["hash"]["native_over"] == {"nonroot": 4.0, "QEMU": 8.0}
    assert summary["cpu_geometric_mean"]["ratio"] == pytest.approx(2.0)
    table = rows(summary)
    assert [row[0] for row in table] == [*SIX, "geometric mean of the six"]
    assert table[0][-1] == "1.2–2: aim"
    assert table[-1][-1] == "2.2–3: short"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(BenchError, match="no work named sha255"):
        chosen(items(1, 1), "cpu,sha255")
    result = subprocess.run(
        [sys.executable, "-m", "bench.work", "--only", "nope"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("bench: there is no work named nope")
    assert "Traceback" not in result.stderr
