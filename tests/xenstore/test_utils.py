"""Debian's xenstore-utils against our process."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nonroot.errors import SoftwareMissingError
from nonroot.guests.packages import package
from nonroot.xenstore import place
from nonroot.xenstore.client import XenStore
from tests.xenstore.test_process import end, home

__all__ = ["home"]

Run = Callable[..., str]


@pytest.fixture(scope="module")
def tools() -> tuple[Path, str]:
    """The programs' folder and the library path that they need."""
    try:
        folder = package("xenstore-utils") / "usr/bin"
        libraries = [package(name) for name in ("libxenstore4", "libxentoolcore1")]
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    found = [next((library / "usr/lib").glob("*-linux-gnu")) for library in libraries]
    try:
        subprocess.run([folder / "xenstore-ls", "-h"], capture_output=True, check=False)
    except OSError as error:
        pytest.skip(f"Debian's programs for amd64 do not run here: {error.strerror}")
    return folder, ":".join(map(str, found))


@pytest.fixture
def run(tools: tuple[Path, str], home: Path) -> Run:
    path = place.ensure()
    environment = {**os.environ, "LD_LIBRARY_PATH": tools[1], "XENSTORED_PATH": str(path)}

    def run(tool: str, *arguments: str, status: int = 0) -> str:
        result = subprocess.run(
            [tools[0] / f"xenstore-{tool}", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert result.returncode == status, result.stderr
        return result.stdout

    return run


def test_xenstore_utils(run: Run) -> None:
    run("write", "/a/b", "hello world", "/a/c", "2")  # one transaction
    run("write", "name", "Domain-0")  # relative: domain 0's own
    assert run("read", "/a/b", "/a/c", "name") == "hello world\n2\nDomain-0\n"
    assert run("list", "/a") == "b\nc\n"
    assert run("list", "-p", "/local/domain/0") == "/local/domain/0/name\n"
    run("chmod", "/a/b", "n0", "r7")
    assert run("ls", "-f", "-p", "/a") == '/a/b = "hello world"   (n0,r7)\n/a/c = "2"   (n0)\n'
    run("chmod", "-r", "/a", "r0")
    assert run("ls", "-f", "-p", "/a") == '/a/b = "hello world"   (r0)\n/a/c = "2"   (r0)\n'
    assert run("ls", "/a") == 'b = "hello world"\nc = "2"\n'
    run("exists", "/a/b")
    run("exists", "/a/none", status=1)
    run("read", "/a/none", status=1)
    run("rm", "/a/b")
    run("exists", "/a/b", status=1)
    run("rm", "-t", "/a/c")
    run("exists", "/a", status=1)


@pytest.mark.slow
def test_a_tree_of_many_nodes_is_listed(run: Run) -> None:
    with XenStore() as store:
        for attempt in store.transaction():
            with attempt as t:
                for number in range(600):  # more than fits into one DIRECTORY message
                    t.write(f"/many/node-{number:04}", str(number))
    assert run("ls", "/many") == "".join(f'node-{number:04} = "{number}"\n' for number in range(600))


@pytest.mark.slow
def test_a_watch_and_a_write_by_another(run: Run, tools: tuple[Path, str]) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": tools[1], "XENSTORED_PATH": str(place.socket_path())}
    command = [str(tools[0] / "xenstore-watch"), "-n", "3", "/w"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "/w\n"
        run("write", "/w/x", "1")
        assert watching.stdout.readline() == "/w/x\n"
        run("rm", "/w")
        assert watching.stdout.readline() == "/w\n"
        assert watching.wait(10) == 0


def test_kill_9_between(run: Run) -> None:
    run("write", "/a/b", "kept")
    run("chmod", "/a/b", "n0", "r7")
    before = run("ls", "-f", "-p", "/")
    end(signal.SIGKILL)
    with contextlib.closing(XenStore()):
        pass  # starts it again, as `nonroot xenstore-path` does
    assert run("ls", "-f", "-p", "/") == before
    assert run("read", "/a/b") == "kept\n"


@pytest.mark.slow
def test_domain_permissions_as_the_tools_show_them(run: Run) -> None:
    with XenStore() as store:
        store.introduce(7, 0xFEFFC, 1)
        store.mkdir("/local/domain/7")
        store.set_permissions("/local/domain/7", ["n7"])
        with XenStore(domid=7) as guest:
            guest.write("data/x", "1")
        assert run("ls", "-f", "-p", "/local/domain") == (
            '/local/domain/7 = ""   (n7)\n/local/domain/7/data = ""   (n7)\n/local/domain/7/data/x = "1"   (n7)\n'
        )
        store.release(7)
    assert run("ls", "-f", "/local") == '/local/domain = ""\n'
