"""Domains with Linux that are saved and restored: what the guest, its user and the clock make of it."""

import contextlib
import json
import os
import time
import uuid
from pathlib import Path

import pytest

from nonroot import BadFileError, Domain, DomainStoppedError, TransientError, UnsupportedError
from nonroot.domain import boot_cache
from nonroot.guests import cached
from nonroot.saved.container import Reader

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A domain that has written a file and holds a counter."""
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    path = tmp_path_factory.mktemp("saved") / "a.saved"
    with Domain(memory="128M") as domain:
        domain.run(
            ["sh", "-c", "echo kept > /tmp/file; (while :; do sleep 1000; done) & echo $! > /tmp/pid"], check=True
        )
        domain.save(path)
        assert domain.run(["cat", "/tmp/file"]).stdout == "kept\n"  # it went on
    return path


def test_it_goes_on(saved: Path) -> None:
    with Domain.restore(saved) as domain:
        assert domain.origin == "saved"
        assert domain.wait_ready()["system"] == "Linux"
        result = domain.run(["sh", "-c", "cat /tmp/file; kill -0 $(cat /tmp/pid) && echo alive; dmesg | wc -l"])
        assert result.stdout.startswith("kept\nalive\n")
        assert int(result.stdout.split()[-1]) > 50
        assert domain.memory.read(0, 16)
        assert domain.shutdown().reason == "poweroff"


def test_several_have_clocks_and_randomness_of_their_own(saved: Path) -> None:
    script = "cat /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1; date +%s"
    with Domain.restore(saved, name="one") as one, Domain.restore(saved, name="two", engine="interpret") as two:
        before = time.time()
        first, second = (domain.run(["sh", "-c", script]).stdout.splitlines() for domain in (one, two))
        assert first[0] != second[0]
        assert first[1] != second[1]
        for lines in (first, second):
            assert before - 2 < int(lines[2]) < time.time() + 2
        one.run(["sh", "-c", "echo changed > /tmp/file"])
        assert two.run(["cat", "/tmp/file"]).stdout == "kept\n"


def test_the_kernel_is_told_that_it_is_a_copy(tmp_path: Path) -> None:
    if cached("686-pae") is None:
        pytest.skip("Debian's 686-pae kernel has not been fetched; the cloud kernel has no driver for it")
    with Domain(memory="128M", flavour="686-pae") as domain:
        assert "virtual machine fork" not in domain.run(["dmesg"]).stdout
        domain.save(tmp_path / "a.saved")
    for engine in ("auto", "interpret"):
        with Domain.restore(tmp_path / "a.saved", engine=engine) as domain:
            deadline = time.monotonic() + 30
            while "crng reseeded due to virtual machine fork" not in domain.run(["dmesg"]).stdout:
                assert time.monotonic() < deadline


def test_a_restored_domain_is_saved_again(saved: Path, tmp_path: Path) -> None:
    with Domain.restore(saved) as domain:
        domain.run(["sh", "-c", "echo more >> /tmp/file"], check=True)
        domain.save(tmp_path / "b.saved", packed=False)
    with Domain.restore(tmp_path / "b.saved") as domain:
        assert domain.run(["cat", "/tmp/file"]).stdout == "kept\nmore\n"


def test_not_while_a_command_runs(saved: Path, tmp_path: Path) -> None:
    with Domain.restore(saved) as domain:
        command = domain.popen(["sleep", "1000"])
        with pytest.raises(TransientError, match="try again afterwards"):
            domain.save(tmp_path / "b.saved")
        command.kill()
        command.wait(60)
        domain.save(tmp_path / "b.saved", stay=True)
        assert domain.stats.state == "paused"
        domain.unpause()
        assert domain.run(["echo", "x"]).stdout == "x\n"


def test_a_place_that_is_none_hurts_nobody(saved: Path, tmp_path: Path) -> None:
    with Domain.restore(saved) as domain:
        with pytest.raises(BadFileError, match="cannot be written"):
            domain.save(tmp_path / "none" / "b.saved")
        assert domain.run(["cat", "/tmp/file"]).stdout == "kept\n"


def test_damaged_files_make_no_domain(saved: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.saved"
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 0x40
    for contents in (bytes(data), bytes(data[: len(data) // 2]), b"", b"NRsaved\0" + bytes(8192)):
        bad.write_bytes(contents)
        with pytest.raises(BadFileError, match="no saved domain that could be restored"):
            Domain.restore(bad).start()
    with pytest.raises(BadFileError, match="cannot be read"):
        Domain.restore(tmp_path / "missing").start()


def test_what_cannot_be_saved_yet(tmp_path: Path) -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    with Domain(memory="128M", shares=[f"{tmp_path}:/src"], flavour="cloud-amd64") as domain:
        domain.wait_ready()
        with pytest.raises(UnsupportedError, match="cannot be saved yet"):
            domain.save(tmp_path / "a.saved")


def test_the_cmos_clock_goes_on_while_nothing_runs(saved: Path) -> None:
    with Domain.restore(saved) as domain:
        shown = domain.run(["cat", "/sys/class/rtc/rtc0/since_epoch"]).stdout
    if not shown:
        pytest.skip("a PVH domain of Xen's has no CMOS clock that Linux uses")
    assert abs(int(shown) - time.time()) < 3


def boots_with(mark: str) -> set[Path]:
    """The kept boots whose command line has ``mark``; others may come and go meanwhile."""
    found = set()
    for boot in boot_cache.boots():
        with contextlib.suppress(BadFileError), Reader(boot.path) as reader:
            if mark in json.loads(reader.record("domain"))["command_line"]:
                found.add(boot.path)
    return found


def test_kept_boots(tmp_path: Path) -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    mark = f"nonroot.test={uuid.uuid4().hex}"

    def run(**more: object) -> tuple[str, str | None]:
        with Domain(memory="128M", append=mark, kept=True, **more) as domain:  # type: ignore[arg-type]
            assert mark in domain.run(["cat", "/proc/cmdline"]).stdout
            return domain.origin, domain.note

    try:
        assert run() == ("fresh", None)
        (path,) = boots_with(mark)
        assert run() == ("kept", None)
        assert run(engine="interpret")[0] == "fresh"  # an engine's boots are its own
        assert len(boots_with(mark)) == 2
        with Domain(memory="128M", append=mark, kept=True) as domain:
            assert domain.origin == "kept"
            assert domain.run(["sh", "-c", "echo findme$((20+2)) > /tmp/x"]).returncode == 0
            assert len(domain.memory.read(0x10_0000, 4096)) == 4096
            domain.save(tmp_path / "test.saved")
        with Domain.restore(tmp_path / "test.saved") as domain:
            assert domain.run(["cat", "/tmp/x"]).stdout == "findme22\n"
        data = path.read_bytes()
        path.write_bytes(data[: len(data) - 5000])
        boot, note = run()
        assert boot == "fresh"
        assert note is not None
        assert "it is booted anew" in note
        assert run() == ("kept", None)
    finally:
        for path in boots_with(mark):
            boot_cache.drop(path)


def test_devices_that_come_later_count_too(tmp_path: Path) -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    image = tmp_path / "disk.img"
    image.write_bytes(b"x" * (1 << 20))
    with Domain(memory="128M", kept=True, xen=True) as domain:
        domain.wait_ready()
        domain.snapshot()
        domain.add_disk(os.fspath(image))
        for refused in (domain.fork, domain.snapshot, domain.revert):
            with pytest.raises(UnsupportedError, match="with ,overlay|fork it instead"):
                refused()
        assert domain.run(["echo", "x"]).stdout == "x\n"


def test_a_domain_that_has_stopped(tmp_path: Path) -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    with Domain(memory="128M", kept=True) as domain:
        domain.wait_ready()
        domain.shutdown()
        with pytest.raises(DomainStoppedError, match="the domain has stopped"):
            domain.save(tmp_path / "a.saved")
