"""A domain whose process has given up the host: what the kernel says of it, and what still works."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot import Domain, _engine
from nonroot.confine import host
from nonroot.domain import registry
from nonroot.domain.options import DomainOptions
from nonroot.domain.sealing import can_be_sealed
from nonroot.errors import UnsupportedError
from nonroot.guests import cached
from nonroot.xenstore import place

LANDLOCK, SECCOMP = _engine.confinement_of_host()


@pytest.fixture(scope="module")
def domain() -> Iterator[Domain]:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    with Domain(memory="128M", kept=True, xen=True, name="sealed-one", sealed=True) as domain:
        domain.wait_ready()
        yield domain
    entries = list(registry.runtime_dir().glob("sealed-one.*"))
    assert entries == [], "its client removes what it could not"


@pytest.mark.skipif(not SECCOMP, reason="this kernel has no seccomp")
def test_the_kernel_confirms_it(domain: Domain) -> None:
    assert host.observe(domain.pid) == ["no-new-privileges", "capabilities", "seccomp"]
    for thread in Path(f"/proc/{domain.pid}/task").iterdir():
        assert "Seccomp:\t2\n" in (thread / "status").read_text(), "every thread"
    messages = domain._client.request("messages")["messages"]
    said = [text for _, text in messages if "confined by" in text]
    assert len(said) == 1
    assert ("landlock" in said[0]) == bool(LANDLOCK)


def test_its_process_starts_and_opens_nothing_more(domain: Domain) -> None:
    with pytest.raises(UnsupportedError, match="sealed when it started: disks and cards"):
        domain.add_disk("/nowhere.img")
    client = domain._client
    with pytest.raises(UnsupportedError, match="sealed when it started: it cannot be renamed"):
        client.request("rename", 30, name="other-one")
    with pytest.raises(UnsupportedError, match="the program that made it only"):
        client.request("save", 30, path="/tmp/nonroot-by-path")
    with pytest.raises(UnsupportedError, match="cannot be kept in a file"):
        client.request("keep_console", 30, path="/tmp/nonroot-console")


def test_it_is_saved_into_a_file_that_its_client_makes(domain: Domain, tmp_path: Path) -> None:
    file = tmp_path / "one.saved"
    domain.save(file, packed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["one.saved"]
    assert file.stat().st_mode & 0o777 == 0o600
    with Domain.restore(file) as again:
        assert again.run("echo again").stdout == "again\n"


def test_its_memory_can_go_back_and_fork(domain: Domain) -> None:
    domain.snapshot()
    domain.run("echo lost > /mark", check=True)
    domain.revert()
    assert domain.run("cat /mark").returncode != 0
    with domain.fork() as child:
        assert child.run("echo child").stdout == "child\n"


@pytest.mark.slow
def test_xenstore_comes_back_through_its_client(domain: Domain) -> None:
    pid = int(place.lock_path().read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    domain._client.request("shutdown", 60, how="poweroff")
    assert int(place.lock_path().read_text().split()[0]) != pid


def test_what_needs_the_host_is_not_sealed() -> None:
    assert can_be_sealed(DomainOptions())
    for options in (
        DomainOptions(disks=["/x.img"]),
        DomainOptions(networks=["user"]),
        DomainOptions(shares=["/x:/y"]),
        DomainOptions(agent=False),
        DomainOptions(display=True),
        DomainOptions(firmware="/bios.bin"),
    ):
        assert not can_be_sealed(options)
