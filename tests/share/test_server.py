"""The server of a shared folder, asked directly: what it does, and what it refuses."""

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends import fuse_abi as fuse
from nonroot.backends.fuse_abi import Opcode, Set
from nonroot.backends.share_nodes import Nodes
from tests.share.fuse_client import Client, local


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "secret").write_text("not yours")
    return shared


@pytest.fixture
def client(folder: Path) -> Iterator[Client]:
    mask = os.umask(0)
    with local(folder) as (asked, _):
        yield asked
    os.umask(mask)


def descriptors(folder: Path) -> int:
    """How many open descriptors lead to the folder or into it: its server's, whatever else this process opens."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # another thread's, closed meanwhile
            place = link.readlink()
            count += place == folder or folder in place.parents
    return count


def refused(number: int, call: Callable[..., object], *arguments: Any, **more: Any) -> None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        call(*arguments, **more)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def test_files_are_made_written_read_and_cut(client: Client, folder: Path) -> None:
    node, handle = client.create("one", mode=0o640)
    assert client.write(handle, b"hello world") == 11
    assert client.read(handle, 5, 6) == b"world"
    assert client.read(handle, 100, 11) == b""
    status = (folder / "one").stat()
    assert stat.S_IMODE(status.st_mode) == 0o640
    found = client.getattr(node)
    assert (found.size, found.inode, found.links, found.uid, found.gid) == (11, status.st_ino, 1, 0, 0)
    assert client.setattr(node, Set.SIZE, size=4).size == 4
    assert (folder / "one").read_bytes() == b"hell"
    client.request(Opcode.FSYNC, node, fuse.FSYNC_IN.pack(handle, 0))
    client.release(handle)
    refused(errno.EBADF, client.read, handle, 1)
    refused(errno.EEXIST, client.create, "one", flags=os.O_RDWR | os.O_EXCL)
    again, handle = client.create("one")
    assert again == node
    assert client.read(handle, 100) == b"hell"
    (folder / "one").write_bytes(b"from the host")
    assert client.read(handle, 100) == b"from the host"


def test_appending_goes_to_the_end_wherever_that_is_by_now(client: Client, folder: Path) -> None:
    _, handle = client.create("log", flags=os.O_WRONLY | os.O_APPEND)
    client.write(handle, b"one\n")
    with (folder / "log").open("ab") as file:
        file.write(b"host\n")
    client.write(handle, b"two\n", 4)
    assert (folder / "log").read_bytes() == b"one\nhost\ntwo\n"


def test_names_move_and_go(client: Client, folder: Path) -> None:
    client.names(Opcode.MKDIR, 1, "d", head=fuse.MKDIR_IN.pack(0o755, 0))
    d = client.walk("d")
    node, handle = client.create("f")
    client.write(handle, b"data")
    client.names(Opcode.RENAME, 1, "f", "g", head=fuse.RENAME_IN.pack(d))
    assert (folder / "d/g").read_bytes() == b"data"
    client.names(Opcode.LINK, 1, "hard", head=fuse.LINK_IN.pack(node))
    assert (folder / "hard").stat().st_ino == (folder / "d/g").stat().st_ino
    assert client.lookup("hard")[0] == node
    assert client.getattr(node).links == 2
    client.names(Opcode.SYMLINK, 1, "soft", "d/g")
    assert client.request(Opcode.READLINK, client.walk("soft")) == b"d/g"
    assert stat.S_ISLNK(client.getattr(client.walk("soft")).mode)
    client.names(Opcode.RENAME2, 1, "hard", "soft", head=fuse.RENAME2_IN.pack(1, 2))
    assert (folder / "hard").is_symlink()
    client.names(Opcode.LINK, 1, "another", head=fuse.LINK_IN.pack(client.walk("hard")))
    assert (folder / "another").is_symlink()
    refused(errno.EEXIST, client.names, Opcode.RENAME2, 1, "hard", "soft", head=fuse.RENAME2_IN.pack(1, 1))
    refused(errno.EINVAL, client.names, Opcode.RENAME2, 1, "hard", "x", head=fuse.RENAME2_IN.pack(1, 4))
    refused(errno.ENOTEMPTY, client.names, Opcode.RMDIR, 1, "d")
    client.names(Opcode.UNLINK, d, "g")
    client.names(Opcode.UNLINK, 1, "soft")
    assert client.read(handle, 4) == b"data"  # open, though it has no name any more
    assert client.getattr(node).links == 0
    client.release(handle)
    client.names(Opcode.RMDIR, 1, "d")
    assert sorted(path.name for path in folder.iterdir()) == ["another", "hard"]


def test_modes_and_times_are_set(client: Client, folder: Path) -> None:
    node, handle = client.create("f")
    client.release(handle)
    client.setattr(node, Set.MODE, mode=stat.S_IFREG | 0o751)
    assert stat.S_IMODE((folder / "f").stat().st_mode) == 0o751
    assert client.setattr(node, Set.MTIME, mtime=1_000_000_000).mtime == 1_000_000_000
    assert client.setattr(node, Set.MTIME, mtime=(1 << 64) - 100).mtime == -100
    assert client.setattr(node, Set.MTIME | Set.MTIME_NOW).mtime > 1_600_000_000
    assert client.setattr(node, Set.UID, uid=0).uid == 0
    client.names(Opcode.SYMLINK, 1, "dangling", "nowhere")
    link = client.walk("dangling")
    assert client.setattr(link, Set.MTIME, mtime=77).mtime == 77
    refused(errno.EOPNOTSUPP, client.setattr, link, Set.MODE, mode=0o777)
    client.names(Opcode.MKDIR, 1, "sticky", head=fuse.MKDIR_IN.pack(0o1777, 0))
    assert stat.S_IMODE((folder / "sticky").stat().st_mode) == 0o1777


def test_what_could_harm_the_host_is_refused(client: Client, folder: Path) -> None:
    node, handle = client.create("f")
    client.release(handle)
    refused(errno.EPERM, client.setattr, node, Set.UID, uid=1234)
    refused(errno.EPERM, client.setattr, node, Set.MODE, mode=0o4755)
    refused(errno.EPERM, client.create, "g", mode=0o2755)
    device = fuse.MKNOD_IN.pack(stat.S_IFCHR | 0o666, 0x103, 0)
    refused(errno.EPERM, client.names, Opcode.MKNOD, 1, "null", head=device)
    client.names(Opcode.MKNOD, 1, "pipe", head=fuse.MKNOD_IN.pack(stat.S_IFIFO | 0o600, 0, 0))
    assert (folder / "pipe").is_fifo()
    refused(errno.EINVAL, client.open, client.walk("pipe"))  # would block us
    refused(errno.EINVAL, client.setattr, client.walk("pipe"), Set.SIZE)
    refused(errno.EINVAL, client.create, "pipe")
    refused(errno.EINVAL, client.open, 1)


@pytest.mark.parametrize("name", ["..", ".", "", "../secret", "/etc/passwd", "a/b", "x" * 256])
def test_there_is_no_way_out_by_names(client: Client, name: str) -> None:
    expected = errno.ENAMETOOLONG if len(name) > 255 else errno.EINVAL
    refused(expected, client.lookup, name)
    refused(expected, client.create, name)
    refused(expected, client.names, Opcode.MKDIR, 1, name, head=fuse.MKDIR_IN.pack(0o755, 0))
    refused(expected, client.names, Opcode.SYMLINK, 1, name, "x")
    refused(expected, client.names, Opcode.UNLINK, 1, name)
    refused(expected, client.names, Opcode.RENAME, 1, name, "x", head=fuse.RENAME_IN.pack(1))
    refused(expected, client.names, Opcode.RENAME, 1, "x", name, head=fuse.RENAME_IN.pack(1))


def test_there_is_no_way_out_by_links(client: Client, folder: Path) -> None:
    (folder / "out").symlink_to("../secret")
    (folder / "up").symlink_to("..")
    out, up = client.walk("out"), client.walk("up")
    assert client.request(Opcode.READLINK, out) == b"../secret"
    refused(errno.EINVAL, client.open, out)
    refused(errno.EINVAL, client.create, "out")
    refused(errno.EINVAL, client.setattr, out, Set.SIZE)
    refused(errno.ENOTDIR, client.lookup, "secret", up)
    refused(errno.ENOTDIR, client.create, "x", up)
    refused(errno.ENOTDIR, client.open, up, opcode=Opcode.OPENDIR)
    assert (folder / "../secret").read_text() == "not yours"


def test_a_folder_that_is_replaced_by_a_link_leads_nowhere_else(client: Client, folder: Path, tmp_path: Path) -> None:
    """The host swaps a folder that the guest knows for a link: the guest still has the folder, not the link's goal."""
    (folder / "d").mkdir()
    (folder / "d/mine").touch()
    d = client.walk("d")
    (folder / "d").rename(folder / "e")
    (folder / "d").symlink_to(tmp_path)
    refused(errno.ENOENT, client.lookup, "secret", d)
    assert client.lookup("mine", d)


@pytest.mark.parametrize("plus", [False, True])
def test_folders_are_listed_in_pieces(client: Client, folder: Path, plus: bool) -> None:
    names = {f"file-{index:03d}{'x' * (index % 50)}" for index in range(300)}
    for name in names:
        (folder / name).touch()
    (folder / "sub").mkdir()
    (folder / "link").symlink_to("sub")
    strange = os.fsdecode(b"\xff\xfe name")
    (folder / strange).touch()
    found = client.list(plus=plus, size=1000)
    assert set(found) == names | {"sub", "link", strange, ".", ".."}
    if plus:
        assert found["."] == 0
        assert client.getattr(found["sub"]).mode & stat.S_IFDIR
    else:
        assert (found["sub"], found["link"], found[strange]) == (4, 10, 8)


def test_nothing_changes_what_is_read_only(folder: Path) -> None:
    (folder / "f").write_text("text")
    (folder / "d").mkdir()
    with local(folder, read_only=True) as (client, _):
        node = client.walk("f")
        assert client.read(client.open(node), 10) == b"text"
        before = [(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()]
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, 3):
            refused(errno.EROFS, client.open, node, flags)
        refused(errno.EROFS, client.create, "new")
        refused(errno.EROFS, client.setattr, node, Set.SIZE)
        refused(errno.EROFS, client.setattr, node, Set.MTIME)
        refused(errno.EROFS, client.write, client.open(node), b"x")
        refused(errno.EROFS, client.names, Opcode.MKDIR, 1, "e", head=fuse.MKDIR_IN.pack(0o755, 0))
        refused(errno.EROFS, client.names, Opcode.MKNOD, 1, "e", head=fuse.MKNOD_IN.pack(0o644, 0, 0))
        refused(errno.EROFS, client.names, Opcode.SYMLINK, 1, "e", "f")
        refused(errno.EROFS, client.names, Opcode.LINK, 1, "e", head=fuse.LINK_IN.pack(node))
        refused(errno.EROFS, client.names, Opcode.UNLINK, 1, "f")
        refused(errno.EROFS, client.names, Opcode.RMDIR, 1, "d")
        refused(errno.EROFS, client.names, Opcode.RENAME, 1, "f", "g", head=fuse.RENAME_IN.pack(1))
        refused(errno.EROFS, client.names, Opcode.RENAME2, 1, "f", "g", head=fuse.RENAME2_IN.pack(1, 0))
        refused(errno.EROFS, client.request, Opcode.FALLOCATE, 1, fuse.FALLOCATE_IN.pack(1, 0, 10, 0))
        assert [(path.name, path.stat().st_mtime_ns) for path in folder.iterdir()] == before


def test_holes_space_and_the_file_system(client: Client, folder: Path) -> None:
    node, handle = client.create("f")
    client.request(Opcode.FALLOCATE, node, fuse.FALLOCATE_IN.pack(handle, 0, 100_000, 0))
    assert (folder / "f").stat().st_size == 100_000
    end = client.request(Opcode.LSEEK, node, fuse.LSEEK_IN.pack(handle, 0, os.SEEK_HOLE))
    assert fuse.LSEEK_OUT.unpack(end)[0] <= 100_000
    refused(errno.EINVAL, client.request, Opcode.LSEEK, node, fuse.LSEEK_IN.pack(handle, 0, 0))
    numbers = fuse.STATFS_OUT.unpack(client.request(Opcode.STATFS, 1))
    assert numbers[0] == os.statvfs(folder).f_blocks
    client.request(Opcode.SYNCFS, 1, bytes(8))


def test_more_files_than_descriptors(folder: Path) -> None:
    for index in range(40):
        path = folder / f"d{index}" / "e"
        path.mkdir(parents=True)
        (path / "f").write_text(str(index))
    with local(folder, most_files=16) as (client, server):
        nodes = [client.walk(f"d{index}/e/f") for index in range(40)]
        assert 1 < descriptors(folder) <= 16
        for index, node in enumerate(nodes):
            handle = client.open(node)
            assert client.read(handle, 10) == str(index).encode()
            client.release(handle)
        (folder / "d0/e/f").rename(folder / "d0/e/g")
        refused(errno.ESTALE, client.getattr, nodes[0])
        (folder / "d1/e/f").unlink()
        (folder / "d1/e/f").mkdir()
        refused(errno.ESTALE, client.getattr, nodes[1])
        server.close()
        assert descriptors(folder) == 1


def test_open_files_are_limited_and_forgotten_ones_close(folder: Path) -> None:
    (folder / "f").touch()
    with local(folder, most_files=32) as (client, _):
        node = client.walk("f")
        handles = [client.open(node) for _ in range(8)]
        refused(errno.ENFILE, client.open, node)
        refused(errno.ENFILE, client.open, 1, opcode=Opcode.OPENDIR)
        refused(errno.ENFILE, client.create, "g")
        for handle in handles:
            client.release(handle)
        assert client.ask(Opcode.FORGET, node, fuse.FORGET_IN.pack(1 << 60)) == (errno.EAGAIN, b"")
        refused(errno.ESTALE, client.getattr, node)
        assert descriptors(folder) == 1
        node = client.walk("f")
        client.ask(Opcode.BATCH_FORGET, 0, fuse.BATCH_FORGET_IN.pack(1000) + fuse.FORGET_ONE.pack(node, 1))
        refused(errno.ESTALE, client.getattr, node)
        client.open(client.walk("f"))
        client.request(Opcode.DESTROY, 0)
        assert descriptors(folder) == 1


def test_a_guest_that_mounts_anew_begins_anew(client: Client, folder: Path) -> None:
    (folder / "f").touch()
    node = client.walk("f")
    handle = client.open(node)
    data = client.request(Opcode.INIT, 0, fuse.INIT_IN.pack(7, 38, 1 << 17, 0) + bytes(48))
    major, minor, _, flags, _, _, most, _, _, _ = fuse.INIT_OUT.unpack(data)
    assert (major, minor, flags, most) == (7, 31, 0, 1 << 20)
    refused(errno.EBADF, client.read, handle, 1)
    refused(errno.ESTALE, client.getattr, node)
    refused(errno.EPROTO, client.request, Opcode.INIT, 0, fuse.INIT_IN.pack(7, 8, 0, 0))
    refused(errno.ENOSYS, client.request, 22, 1, bytes(8) + b"security.capability\0")


opcodes = st.one_of(st.sampled_from([int(code) for code in Opcode]), st.integers(0, 0xFFFFFFFF))
small = st.one_of(st.integers(0, 12), st.integers(0, (1 << 64) - 1))
pieces = st.lists(
    st.one_of(
        st.binary(max_size=24),
        small.map(lambda value: value.to_bytes(8, "little")),
        st.sampled_from([b"f\0", b"d\0", b"..\0", b"/\0", b"link\0", b"f\0g\0", b"\0", bytes(40)]),
    ),
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.tuples(opcodes, small, pieces), max_size=12))
def test_random_requests_are_answered_and_reach_nothing_else(requests: list[tuple[int, int, list[bytes]]]) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "shared"
        (folder / "d").mkdir(parents=True)
        (folder / "f").write_text("x")
        (folder / "link").symlink_to("../outside")
        outside = Path(place) / "outside"
        outside.write_text("outside")
        with local(folder) as (client, _):
            client.walk("d")
            client.walk("f")
            for opcode, node, body in requests:
                error, _ = client.ask(opcode, node, b"".join(body))
                assert 0 <= error < 200
        assert outside.read_text() == "outside"
        assert sorted(path.name for path in Path(place).iterdir()) == ["outside", "shared"]


def test_a_moved_folder_cannot_come_to_lie_in_itself(folder: Path) -> None:
    """The host turns a folder inside out while the guest looks: the table stays a tree."""
    (folder / "a/b").mkdir(parents=True)
    nodes = Nodes(os.open(folder, os.O_RDONLY), 8)
    a, _ = nodes.look_up(nodes.root, b"a")
    b, _ = nodes.look_up(a, b"b")
    (folder / "a/b").rename(folder / "b")
    (folder / "a").rename(folder / "b/a")
    again, _ = nodes.look_up(b, b"a")
    assert again is a
    seen = []
    at: object = b
    while at is not None:
        assert at not in seen
        seen.append(at)
        at = at.parent  # type: ignore[attr-defined]
    nodes.clear()
    os.close(nodes.root.fd)
