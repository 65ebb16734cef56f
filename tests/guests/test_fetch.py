"""Fetching Linux guests with the real apt from a repository on disk."""

import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from nonroot.errors import BadOptionError, SoftwareMissingError
from nonroot.guests import cached, fetch, linux
from nonroot.guests.apt import Apt
from tests.guests.repository import Repository, static_program

pytestmark = pytest.mark.skipif(
    not shutil.which("apt-get") or not shutil.which("dpkg-deb"), reason="this machine has no apt"
)

KERNEL = b"\0" * 0x202 + b"HdrS" + b"a kernel" * 1000


@pytest.fixture(scope="module")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return static_program(tmp_path_factory.mktemp("busybox"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busybox: bytes) -> Repository:
    made = Repository(tmp_path / "repository")
    made.add("linux-image-cloud-amd64", "6.1.9-1", {}, depends="linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)")
    files = {"boot/vmlinuz-6.1.0-9-cloud-amd64": KERNEL, "lib/modules/6.1.0-9-cloud-amd64/modules.dep": b"x.ko:\n"}
    made.add("linux-image-6.1.0-9-cloud-amd64", "6.1.9-1", files)
    made.add("busybox-static", "1.35-1", {"bin/busybox": busybox})
    monkeypatch.setenv("APT_CONFIG", str(made.configuration()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return made


def test_the_metapackage_leads_to_the_kernel(repository: Repository) -> None:
    steps: list[str] = []
    guest = linux("cloud-amd64", progress=lambda what, share: steps.append(f"{what} {share:.0f}"))
    assert (guest.version, guest.source, guest.bits, guest.note) == ("6.1.0-9-cloud-amd64", "apt", 64, None)
    assert guest.kernel.read_bytes() == KERNEL
    assert guest.modules is not None
    assert (guest.modules / "modules.dep").is_file()
    assert guest.initrd is not None
    archive = guest.initrd.read_bytes()
    for name in (b"init\0", b"bin/busybox\0", b"bin/ash\0", b"etc/passwd\0", b"dev/console\0", b"TRAILER!!!\0"):
        assert name in archive
    assert any(step.startswith("Fetching linux-image-6.1.0-9-cloud-amd64") for step in steps)


def test_the_second_time_needs_no_apt(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    first = linux("cloud-amd64")
    monkeypatch.setenv("PATH", "/nowhere")
    second = linux("cloud-amd64")
    assert (second.source, second.kernel) == ("cache", first.kernel)


@pytest.mark.parametrize("victim", ["kernel", "initrd"])
def test_damage_is_noticed_and_mended(repository: Repository, victim: str) -> None:
    good = linux("cloud-amd64")
    path: Path = getattr(good, victim)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert cached("cloud-amd64") is None
    assert linux("cloud-amd64").source == "apt"
    assert path.read_bytes() == data


def test_a_missing_file_or_record_is_damage(repository: Repository) -> None:
    guest = linux("cloud-amd64")
    guest.kernel.unlink()
    assert linux("cloud-amd64").source == "apt"
    manifest = guest.kernel.parents[1] / "manifest.json"
    for text in ("", "[]", '{"sha256": 3}', '{"sha256": {}}'):
        manifest.write_text(text)
        assert cached("cloud-amd64") is None


def test_a_damaged_package_is_refused(repository: Repository) -> None:
    package = next(repository.packages.glob("linux-image-6*.deb"))
    package.write_bytes(package.read_bytes()[:-1] + b"!")
    with pytest.raises(
        SoftwareMissingError, match=r"the package linux-image-6\.1\.0-9-cloud-amd64 could not be fetched"
    ):
        fetch("cloud-amd64")
    assert cached("cloud-amd64") is None


def test_a_flavour_that_the_sources_lack(repository: Repository) -> None:
    with pytest.raises(SoftwareMissingError, match="no package linux-image-amd64 for amd64"):
        fetch("amd64")


def test_an_unknown_flavour() -> None:
    with pytest.raises(BadOptionError, match="no kernel flavour 'plan9'; there are: cloud-amd64"):
        linux("plan9")


def test_refresh_takes_the_newer_kernel_and_only_then(repository: Repository, busybox: bytes) -> None:
    assert fetch("cloud-amd64").version == "6.1.0-9-cloud-amd64"
    unchanged = fetch("cloud-amd64", refresh=True)
    assert unchanged.source == "cache"
    repository.add("linux-image-cloud-amd64", "6.1.10-1", {}, depends="linux-image-6.1.0-10-cloud-amd64")
    repository.add("linux-image-6.1.0-10-cloud-amd64", "6.1.10-1", {"boot/vmlinuz-6.1.0-10-cloud-amd64": KERNEL})
    assert fetch("cloud-amd64").version == "6.1.0-9-cloud-amd64"
    newer = fetch("cloud-amd64", refresh=True)
    assert (newer.version, newer.source, newer.modules) == ("6.1.0-10-cloud-amd64", "apt", None)
    assert linux("cloud-amd64").version == "6.1.0-10-cloud-amd64"


def test_old_lists_that_name_gone_files_are_updated(repository: Repository) -> None:
    Apt(Path(os.environ["XDG_CACHE_HOME"]) / "nonroot" / "apt", "amd64").update()
    next(repository.packages.glob("linux-image-6*.deb")).unlink()
    repository.add("linux-image-cloud-amd64", "6.1.10-1", {}, depends="linux-image-6.1.0-10-cloud-amd64")
    repository.add("linux-image-6.1.0-10-cloud-amd64", "6.1.10-1", {"boot/vmlinuz-6.1.0-10-cloud-amd64": KERNEL})
    assert fetch("cloud-amd64").version == "6.1.0-10-cloud-amd64"


def test_the_systems_apt_is_left_alone(repository: Repository, tmp_path: Path) -> None:
    # A hook as machines have them: it must not run for us.
    configuration = Path(os.environ["APT_CONFIG"])
    trace = tmp_path / "hook-ran"
    hook = f'APT::Update::Post-Invoke {{ "touch {trace}"; }};\nAPT::Update::Post-Invoke-Success:: "touch {trace}";\n'
    configuration.write_text(configuration.read_text() + hook)
    system = [Path("/var/lib/apt/lists"), Path("/var/cache/apt"), Path("/var/lib/dpkg/status")]
    before = [path.stat().st_mtime_ns for path in system if path.exists()]
    fetch("cloud-amd64")
    assert [path.stat().st_mtime_ns for path in system if path.exists()] == before
    assert not trace.exists()


def test_packages_without_a_static_busybox_are_refused(repository: Repository) -> None:
    repository.add("busybox-static", "1.36-1", {"bin/busybox": b"#!/bin/sh\n"})
    with pytest.raises(SoftwareMissingError, match="do not hold one kernel and one static busybox"):
        fetch("cloud-amd64")
    assert [path.name for path in (Path(os.environ["XDG_CACHE_HOME"]) / "nonroot" / "linux").iterdir()] == []


def _fetch_in_process(answers: "multiprocessing.Queue[tuple[str, str]]") -> None:
    guest = fetch("cloud-amd64")
    answers.put((guest.source, guest.version))


def test_several_processes_fetch_once(repository: Repository) -> None:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    workers = [context.Process(target=_fetch_in_process, args=(answers,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = sorted(answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert found == [("apt", "6.1.0-9-cloud-amd64"), ("cache", "6.1.0-9-cloud-amd64"), ("cache", "6.1.0-9-cloud-amd64")]


def test_lists_are_fetched_once_a_day(repository: Repository, tmp_path: Path) -> None:
    apt = Apt(tmp_path / "apt", "amd64")
    assert apt.update()
    assert not apt.update()
    stamp = tmp_path / "apt" / "amd64" / "updated"
    os.utime(stamp, (time.time() - 90000,) * 2)
    assert apt.update()


def test_no_reachable_source(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "repository" / "etc" / "sources.list").write_text("deb [trusted=yes] copy:/nowhere/at/all ./\n")
    with pytest.raises(SoftwareMissingError, match="package lists could not be fetched|no package"):
        fetch("cloud-amd64")


def test_the_record_names_the_packages(repository: Repository) -> None:
    guest = fetch("cloud-amd64")
    record = json.loads((guest.kernel.parents[1] / "manifest.json").read_text())
    assert record["package"] == "linux-image-6.1.0-9-cloud-amd64 6.1.9-1, busybox-static 1.35-1"
    assert set(record["sha256"]) == {"boot/vmlinuz-6.1.0-9-cloud-amd64", "boot/initramfs.cpio", "bin/busybox"}
