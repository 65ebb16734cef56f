"""All but the guest: a driver in Python, the device, the thread between, and the server in its own confined process."""

import errno
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends import fuse_abi as fuse
from nonroot.backends.fuse_abi import Opcode
from nonroot.backends.helper import Helper
from nonroot.backends.share import Share, start_share
from nonroot.backends.share_service import ShareService
from nonroot.devices.virtio_pci import NEEDS_RESET, NOTIFY
from nonroot.domain.shares import parse_shares, setup_lines
from nonroot.errors import BadFileError, BadOptionError
from tests.share.fuse_client import Client
from tests.share.virtio_driver import Driver
from tests.waiting import wait_until


class Setting:
    """A device with its server; a thread stands for the vCPU's."""

    def __init__(self, share: Share) -> None:
        self.driver = Driver()
        link, self.helper = start_share(share)
        self._posted: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        device = self.driver.device
        self.service = ShareService(link, self._posted.put, device.interrupt, device.fail)
        device.backend = self.service
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.driver.set_up()

    def _run(self) -> None:
        while (call := self._posted.get()) is not None:
            call()

    def client(self, **how: bool) -> Client:
        return Client(lambda opcode, node, body: self.driver.call(opcode, node, body, **how))

    def close(self) -> Helper:
        self.service.close()
        self._posted.put(None)
        self._thread.join()
        self.helper.close()
        return self.helper


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    (place / "shared").mkdir()
    (place / "secret").write_text("secret")
    return place / "shared"


@pytest.fixture(scope="module")
def setting(folder: Path) -> Iterator[Setting]:
    made = Setting(Share(str(folder), "/mnt"))
    yield made
    assert made.close().process.returncode == 0


@pytest.mark.parametrize("indirect", [False, True])
def test_files_go_through_queues_and_process(setting: Setting, folder: Path, indirect: bool) -> None:
    client = setting.client(indirect=indirect)
    assert setting.helper.facts["unconfined"] == []
    data = os.urandom(300_000)
    _, handle = client.create("file")
    for at in range(0, len(data), 100_000):
        assert client.write(handle, data[at : at + 100_000], at) == 100_000
    assert (folder / "file").read_bytes() == data
    assert b"".join(client.read(handle, 100_000, at) for at in range(0, len(data), 100_000)) == data
    client.names(Opcode.MKDIR, 1, "sub", head=fuse.MKDIR_IN.pack(0o755, 0))
    client.names(Opcode.RENAME, 1, "file", "moved", head=fuse.RENAME_IN.pack(client.walk("sub")))
    assert (folder / "sub/moved").exists()
    assert set(client.list()) == {".", "..", "sub"}
    client.names(Opcode.UNLINK, client.walk("sub"), "moved")
    client.names(Opcode.RMDIR, 1, "sub")


def test_the_server_can_reach_nothing_else(setting: Setting) -> None:
    """What its code would never ask for, its process may not do either."""
    status = Path(f"/proc/{setting.helper.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


CONFINED = """
import os, socket, sys
from nonroot.confine import FOLDER_READER, FOLDER_WRITER, confine
folder, writes = sys.argv[1], sys.argv[2] == "rw"
fd = os.open(folder, os.O_RDONLY)
missing = list(confine(FOLDER_WRITER if writes else FOLDER_READER, folder=fd).missing)
def can(call, *arguments, **more):
    try:
        call(*arguments, **more)
        return "+"
    except OSError as error:
        return str(error.errno)
print(missing, can(os.open, folder + "/../secret", os.O_RDONLY), can(os.listdir, "/"), can(os.listdir, fd),
      can(os.open, "new", os.O_RDWR | os.O_CREAT, dir_fd=fd), can(os.mkdir, "sub", dir_fd=fd),
      can(os.rename, "new", "sub/new", src_dir_fd=fd, dst_dir_fd=fd), can(os.unlink, "../secret", dir_fd=fd),
      can(os.mkfifo, folder + "/../pipe"), can(os.truncate, folder + "/../secret", 0), can(socket.socket),
      can(os.kill, os.getppid(), 0), can(os.chmod, "old", 0o600, dir_fd=fd))
"""


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("rw", "[] 13 13 + + + + 13 13 13 1 1 +"), ("ro", "[] 13 13 + 13 1 1 1 1 1 1 1 1")],
)
def test_the_confined_process_sees_the_folder_only(tmp_path: Path, mode: str, expected: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/old").touch()
    command = [sys.executable, "-P", "-c", CONFINED, str(tmp_path / "shared"), mode]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == expected, result.stderr
    assert (tmp_path / "secret").read_text() == "secret"


def test_messages_of_the_wrong_length_are_answered_with_an_error(setting: Setting) -> None:
    driver = setting.driver
    header = fuse.IN_HEADER.pack(41, Opcode.GETATTR, 99, 1, 0, 0, 1, 0, 0)
    assert driver.exchange(header, 100) == fuse.error_reply(99, errno.EINVAL)
    assert driver.exchange(b"short", 100) == fuse.error_reply(0, errno.EINVAL)
    assert driver.exchange(b"short", 15) == b""
    lookup = fuse.IN_HEADER.pack(42, Opcode.LOOKUP, 99, 1, 0, 0, 1, 0, 0) + b".\0"
    assert driver.exchange(lookup, 8) == b""  # no room for an answer: there is none
    getattr_ = fuse.IN_HEADER.pack(56, Opcode.GETATTR, 99, 1, 0, 0, 1, 0, 0) + bytes(16)
    assert driver.exchange(getattr_, 60) == fuse.error_reply(99, errno.EIO)  # the answer is longer
    assert driver.exchange(fuse.IN_HEADER.pack(48, Opcode.FORGET, 99, 7, 0, 0, 1, 0, 0) + bytes(8), 0, queue=0) == b""


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 300), st.booleans())
def test_random_messages_leave_the_server_alive(setting: Setting, data: bytes, room: int, whole: bool) -> None:
    if whole and len(data) >= 40:
        data = struct.pack("<IIQ", len(data), data[4] % 52, 5) + data[16:]
    answer = setting.driver.exchange(data or b"x", room)
    assert answer == b"" or len(answer) >= 16
    error, _ = setting.driver.call(Opcode.GETATTR, 1, fuse.GETATTR_IN.pack(0, 0))
    assert error == 0


def test_a_driver_that_breaks_its_queue_has_to_reset_and_goes_on(setting: Setting, folder: Path) -> None:
    driver = setting.driver
    driver.ram.write((1 << 20) + driver.AVAILABLE + 2, struct.pack("<H", 5000))
    driver.device.write(NOTIFY + 4, 2, 1)
    wait_until(lambda: driver.device.read(20, 1) & NEEDS_RESET)
    driver.device.write(20, 1, 0)
    driver.ram.data[:] = bytes(len(driver.ram.data))
    driver.set_up()
    (folder / "still").write_text("here")
    client = setting.client()
    assert client.read(client.open(client.walk("still")), 10) == b"here"


def test_a_server_that_is_killed_leaves_errors_not_waiting(tmp_path: Path) -> None:
    setting = Setting(Share(str(tmp_path), "/mnt", read_only=True))
    client = setting.client()
    with pytest.raises(OSError, match="Read-only"):
        client.create("x")
    os.kill(setting.helper.pid, signal.SIGKILL)
    setting.helper.process.wait()
    for _ in range(3):
        error, _ = setting.driver.call(Opcode.GETATTR, 1, fuse.GETATTR_IN.pack(0, 0))
        assert error == errno.ENOTCONN
    setting.close()


# ── what users write ──


def test_shares_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Share.parse("/a:/b") == Share("/a", "/b")
    assert Share.parse(".:/b:ro") == Share(str(tmp_path), "/b", True)
    assert Share.parse("/a:rw:/b/./c//") == Share("/a:rw", "/b/c")
    assert Share.parse("/a:/b:rw") == Share("/a", "/b")
    assert Share.parse(str(Share("/x:y", "/z", True))) == Share("/x:y", "/z", True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("/a", "is no shared folder"),
        ("", "is no shared folder"),
        (":/b", "is no shared folder"),
        ("/a:", "is no shared folder"),
        ("/a:ro", "is no place for a shared folder"),
        ("/a:b", "is no place for a shared folder"),
        ("/a:/b/../c", "is no place for a shared folder"),
        ("/a:/", "cannot be the guest's root"),
        ("/a:/b\nc", "is no shared folder"),
    ],
)
def test_texts_that_are_no_shares(text: str, sentence: str) -> None:
    with pytest.raises(BadOptionError, match=sentence):
        Share.parse(text)


def test_folders_that_cannot_be_shared(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadFileError, match="the folder .*/none does not exist"):
        parse_shares([f"{tmp_path}/none:/b"])
    with pytest.raises(BadFileError, match="/file is not a folder"):
        parse_shares([f"{tmp_path}/file:/b"])
    with pytest.raises(BadOptionError, match="the same place in the guest: /b"):
        parse_shares([f"{tmp_path}:/b", f"{tmp_path}:/b/"])
    with pytest.raises(BadOptionError, match="at most 8 shared folders, not 9"):
        parse_shares([f"{tmp_path}:/b{index}" for index in range(9)])


def test_the_guests_script_mounts_outer_folders_first() -> None:
    lines = setup_lines([Share("/a", "/x/it's", True), Share("/b", "/x")])
    assert lines[1:] == ["share share1 /x nodev,rw", "share share0 '/x/it'\"'\"'s' nodev,ro"]
    assert setup_lines([]) == []
