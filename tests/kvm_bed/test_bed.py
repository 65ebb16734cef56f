"""The kvm engine on AMD's guest mode, as QEMU's software CPU has it: its layer and the contract of engines."""

import shutil
import sys
from pathlib import Path

import pytest

from nonroot.errors import SoftwareMissingError
from tests.kvm_bed import bed

LAYER = Path(__file__).parents[1] / "engines"
TESTS = [*sorted((LAYER / "kvm").glob("test_*.py")), LAYER / "conftest.py"]


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which(bed.QEMU) is None, reason="QEMU is not installed")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bed has Debian's Python 3.11 and our libraries for it")
def test_the_engine_on_svm(tmp_path: Path) -> None:
    try:
        report = bed.run(TESTS, tmp_path, 500)
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    assert report.status == 0, report.text + report.console
    outcomes = report.outcomes()
    assert set(outcomes.values()) <= {"PASSED", "SKIPPED"}, report.text
    assert sum(outcome == "PASSED" for outcome in outcomes.values()) >= 120
