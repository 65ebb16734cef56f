"""Forks of running domains, and snapshots to go back to."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot import Domain, NotRunningError, TransientError, UnsupportedError
from nonroot.guests import cached
from nonroot.xenstore.client import XenStore

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def base() -> Iterator[Domain]:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    with Domain(memory="128M", kept=True) as domain:
        domain.run(["sh", "-c", "echo base > /tmp/file"], check=True)
        yield domain


def test_boot_is_ready_to_be_forked() -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")
    with Domain.boot(memory="128M") as base:
        children = base.fork(2)
        for child in children:
            with child:
                assert child.run(["uname"]).stdout == "Linux\n"


def read(domain: Domain, path: str = "/tmp/file") -> str:
    return domain.run(["cat", path]).stdout


def test_a_fork_goes_its_own_way(base: Domain) -> None:
    with base.fork() as child:
        assert child.origin == "fork"
        assert child.name != base.name
        assert read(child) == "base\n"
        child.run(["sh", "-c", "echo child > /tmp/file"])
        base.run(["sh", "-c", "echo parent > /tmp/other"])
        assert read(base) == "base\n"
        assert child.run(["cat", "/tmp/other"]).returncode == 1
        assert child.memory.read(0, 4096)
        with child.fork() as grandchild:
            assert read(grandchild) == "child\n"
            grandchild.run(["sh", "-c", "echo grandchild > /tmp/file"])
        assert read(child) == "child\n"


def test_many_forks_have_numbers_of_their_own(base: Domain) -> None:
    children = base.fork(6)
    try:
        for number, child in enumerate(children):
            child.run(["sh", "-c", f"echo {number} > /tmp/number"])
        assert [read(child, "/tmp/number") for child in children] == [f"{n}\n" for n in range(6)]
        random = {child.run(["cat", "/proc/sys/kernel/random/uuid"]).stdout for child in children}
        assert len(random) == 6
        for child in children:
            assert abs(int(child.run(["date", "+%s"]).stdout) - time.time()) < 60
    finally:
        for child in children:
            child.destroy()
    assert read(base) == "base\n"


def test_what_changes_in_xenstore_after_the_next_fork_was_prepared(base: Domain) -> None:
    """Its machine and its nodes are made ahead, as the last fork's were."""
    store = XenStore()

    def home(domain: Domain) -> str:
        return f"/local/domain/{domain.description['domid']}"

    try:
        store.write(f"{home(base)}/data/first", "1")
        with base.fork() as child:
            assert store.read(f"{home(child)}/data/first") == "1"
        deadline = time.monotonic() + 20
        while base._ahead is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert base._ahead is not None
        store.rm(f"{home(base)}/data/first")
        store.write(f"{home(base)}/data/second", "2")
        with base.fork() as child:
            assert store.ls(f"{home(child)}/data") == ["second"]
            assert store.read(f"{home(child)}/domid") == home(child).rpartition("/")[2]
            assert child.run(["true"]).returncode == 0
        store.rm(f"{home(base)}/data/second")
    finally:
        store.close()


def test_forks_are_saved_and_restored(base: Domain, tmp_path: Path) -> None:
    with base.fork() as child:
        child.run(["sh", "-c", "echo child > /tmp/file"])
        child.save(tmp_path / "a.saved")
    with Domain.restore(tmp_path / "a.saved", engine="interpret") as restored:
        assert read(restored) == "child\n"
        with restored.fork() as fork:
            assert fork.engine == "interpret"
            assert read(fork) == "child\n"


def test_snapshots(base: Domain) -> None:
    with base.fork() as domain:
        with pytest.raises(NotRunningError, match="no snapshot"):
            domain.revert()
        domain.snapshot()
        for _ in range(3):
            domain.run(["sh", "-c", "echo x > /tmp/file; dd if=/dev/zero of=/tmp/big bs=1M count=4 2>/dev/null"])
            assert read(domain) == "x\n"
            domain.revert()
            assert read(domain) == "base\n"
            assert domain.run(["test", "-e", "/tmp/big"]).returncode == 1
        domain.run(["sh", "-c", "echo later > /tmp/file"])
        domain.snapshot()
        domain.memory.read(0, 4096)  # its memory is shared now
        domain.run(["sh", "-c", "echo x > /tmp/file"])
        domain.revert(freshen=False)
        assert read(domain) == "later\n"
        domain.pause()
        domain.revert()
        assert domain.stats.state == "paused"
        domain.unpause()
        assert read(domain) == "later\n"


def test_what_is_under_way_is_given_up(base: Domain) -> None:
    with base.fork() as domain:
        domain.snapshot()
        command = domain.popen(["sleep", "1000"])
        for refused in (domain.snapshot, domain.fork):
            with pytest.raises(TransientError, match="try again afterwards"):
                refused()
        failed: list[BaseException] = []

        def wait() -> None:
            try:
                command.wait(100)
            except NotRunningError as error:
                failed.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        domain.revert()
        waiter.join(100)
        assert "gone back to its snapshot" in str(failed[0])
        assert read(domain) == "base\n"


def test_what_cannot_be_forked(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Domain(memory="128M", disks=[image], flavour="cloud-amd64") as domain:
        domain.wait_ready()
        for refused in (domain.snapshot, domain.fork):
            with pytest.raises(UnsupportedError, match="fork it instead|give the domain the disk with ,overlay"):
                refused()
