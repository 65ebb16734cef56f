"""The layer under the kvm engine on AMD's guest mode, as QEMU's software CPU has it."""

import shutil
import sys
from pathlib import Path

import pytest

from nonroot.errors import SoftwareMissingError
from tests.kvm_bed import bed

TESTS = sorted((Path(__file__).parents[1] / "engines" / "kvm").glob("test_*.py"))


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.timeout(400)
@pytest.mark.skipif(shutil.which(bed.QEMU) is None, reason="QEMU is not installed")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the bed has Debian's Python 3.11 and our libraries for it")
def test_the_layer_on_svm(tmp_path: Path) -> None:
    try:
        report = bed.run(TESTS, tmp_path)
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    assert report.status == 0, report.text + report.console
    outcomes = report.outcomes()
    assert set(outcomes.values()) == {"PASSED"}, report.text
    assert len(outcomes) >= 20
