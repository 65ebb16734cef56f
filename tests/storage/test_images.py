"""Image files: raw, overlays, other formats; what the host refuses; what the user gets wrong."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.qemu import DAEMON
from nonroot.backends.raw import RawImage
from nonroot.backends.service import perform
from nonroot.devices.block import BlockOp, BlockRequest, BlockStatus
from nonroot.errors import BadFileError, BadOptionError, UnsupportedError
from tests.storage.parts import FailingImage, pattern

MIB = 1 << 20
has_daemon = pytest.mark.skipif(shutil.which(DAEMON) is None, reason=f"{DAEMON} is not installed")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(MIB))
    return path


# ── raw ──


def test_reads_and_writes_reach_the_file(image: Path) -> None:
    raw = RawImage(os.fspath(image))
    assert (raw.size, raw.read_only) == (MIB, False)
    raw.write(512, b"a" * 1024)
    raw.flush()
    assert raw.read(0, 2048) == pattern(512) + b"a" * 1024 + pattern(MIB)[1536:2048]
    raw.close()
    raw.close()
    assert image.read_bytes() == pattern(512) + b"a" * 1024 + pattern(MIB)[1536:]


def test_holes_stay_holes(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    raw = RawImage(os.fspath(path))
    assert raw.read((1 << 40) - 4096, 4096) == bytes(4096)
    raw.write(1 << 39, b"x" * 512)
    raw.flush()
    raw.close()
    assert path.stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("size", [1, 511, 513, 5000])
def test_a_size_that_is_no_whole_number_of_sectors(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd.img"
    path.write_bytes(b"o" * size)
    raw = RawImage(os.fspath(path))
    assert raw.size == -(-size // 512) * 512
    last = raw.size - 512
    assert raw.read(last, 512) == (b"o" * (size - last)).ljust(512, b"\0")
    assert path.stat().st_size == size, "reading changes nothing"
    raw.write(last, b"n" * 512)
    assert raw.read(last, 512) == b"n" * 512
    raw.close()
    assert path.stat().st_size == -(-size // 512) * 512


def test_an_image_that_shrinks_gives_errors_and_no_zeros(image: Path) -> None:
    raw = RawImage(os.fspath(image))
    os.truncate(image, MIB // 2)
    assert raw.read(MIB // 2 - 512, 1024) == pattern(MIB)[MIB // 2 - 512 : MIB // 2], "what is there"
    with pytest.raises(OSError, match="shorter"):
        raw.read(MIB // 2, 512)
    assert perform(raw, BlockRequest(BlockOp.READ, MIB // 2, 512)).status is BlockStatus.IO_ERROR
    raw.close()


def test_a_full_disk_is_an_error_that_keeps_the_rest(image: Path) -> None:
    """/dev/full cannot be an image; a file size limit is as real: EFBIG in a process of its own."""
    program = f"""
import resource, signal, sys
sys.path[:0] = {sys.path!r}
from nonroot.backends.raw import RawImage
from nonroot.backends.service import perform
from nonroot.devices.block import BlockOp, BlockRequest
import os
path = {os.fspath(image)!r}
os.truncate(path, 2 << 20)
raw = RawImage(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
print(perform(raw, BlockRequest(BlockOp.WRITE, 1 << 20, 512, b"x" * 512)).status.name)
print(perform(raw, BlockRequest(BlockOp.WRITE, 0, 512, b"y" * 512)).status.name)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["NO_SPACE", "OK"]
    assert image.read_bytes()[:MIB] == b"y" * 512 + pattern(MIB)[512:]
    assert image.read_bytes()[MIB:] == bytes(MIB)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (errno.EIO, BlockStatus.IO_ERROR),
        (errno.ENOSPC, BlockStatus.NO_SPACE),
        (errno.EDQUOT, BlockStatus.NO_SPACE),
        (errno.EROFS, BlockStatus.READ_ONLY),
        (errno.EBADF, BlockStatus.IO_ERROR),
    ],
)
@pytest.mark.parametrize("op", list(BlockOp))
def test_every_host_error_is_a_status(number: int, status: BlockStatus, op: BlockOp) -> None:
    failing = FailingImage(bytes(4096))
    failing.errno = number
    assert perform(failing, BlockRequest(op, 0, 512, b"d" * 512 if op is BlockOp.WRITE else b"")).status is status


def test_what_could_be_read_before_an_error_is_told() -> None:
    failing = FailingImage(pattern(4096))
    failing.readable = 1300
    result = perform(failing, BlockRequest(BlockOp.READ, 0, 4096))
    assert (result.status, result.data) == (BlockStatus.IO_ERROR, pattern(4096)[:1024])


def test_requests_outside_are_refused() -> None:
    image = FailingImage(bytes(2048 + 512))
    for offset, length in ((8192, 512), (2048, 4096), (-512, 512)):
        assert perform(image, BlockRequest(BlockOp.READ, offset, length)).status is BlockStatus.OUT_OF_RANGE
    assert perform(image, BlockRequest(BlockOp.WRITE, 2560, 512, bytes(512))).status is BlockStatus.OUT_OF_RANGE
    assert perform(image, BlockRequest(BlockOp.READ, 2048, 2048)).data == bytes(2048), "a CD's last block, cut short"


# ── what the user gets wrong ──


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no disk image"),
        (",ro", "names no disk image"),
        ("x.img,rw", "'rw' is no option of a disk image"),
        ("x.img,format=zip", "there is no image format 'zip'"),
        ("x.img,ro,overlay", "exclude each other"),
    ],
)
def test_options_that_mean_nothing(text: str, sentence: str) -> None:
    with pytest.raises(BadOptionError, match=sentence):
        Drive.parse(text)


def test_options_that_mean_something() -> None:
    drive = Drive.parse("/a,,b/c.qcow2,ro,backing")
    assert (drive.path, drive.read_only, drive.backing, drive.effective_format) == ("/a,b/c.qcow2", True, True, "qcow2")
    assert Drive.parse("c.VHD").effective_format == "vpc"
    assert Drive.parse("c.qcow2,format=raw").effective_format == "raw"
    assert Drive.parse("disk").effective_format == "raw"


def test_files_that_are_none(tmp_path: Path, image: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "qcow").write_bytes(b"QFI\xfb" + bytes(508))
    for name, sentence in (
        ("missing", "does not exist"),
        ("empty", "is empty"),
        ("", "is a directory"),
        ("fifo", "neither a file nor a block device"),
        ("qcow", "begins like a qcow2 image: add format=qcow2"),
    ):
        for options in ("", ",ro", ",overlay"):
            with pytest.raises(BadFileError, match=sentence) as caught:
                open_image(Drive.parse(f"{tmp_path / name}{options}"))
            assert "\n" not in str(caught.value)
    open_image(Drive.parse(f"{tmp_path / 'qcow'},format=raw")).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written(image: Path) -> None:
    image.chmod(stat.S_IRUSR)
    with pytest.raises(BadFileError, match="add ,ro .*or ,overlay"):
        open_image(Drive.parse(os.fspath(image)))
    open_image(Drive.parse(f"{image},overlay")).close()
    image.chmod(0)
    with pytest.raises(BadFileError, match="permission denied"):
        open_image(Drive.parse(f"{image},ro"))


# ── locks ──


def test_one_writer_or_many_readers(image: Path) -> None:
    text = os.fspath(image)
    readers = [open_image(Drive.parse(f"{text},ro")), open_image(Drive.parse(f"{text},overlay"))]
    with pytest.raises(BadFileError, match="is in use by .*two writers"):
        open_image(Drive.parse(text))
    for reader in readers:
        reader.close()
    writer = open_image(Drive.parse(text))
    for options in ("", ",ro", ",overlay"):
        with pytest.raises(BadFileError, match="in use by|being written by"):
            open_image(Drive.parse(text + options))
    writer.close()
    open_image(Drive.parse(text)).close()


def test_the_other_process_is_named_and_its_death_unlocks(image: Path) -> None:
    program = f"""
import sys
sys.path[:0] = {sys.path!r}
from nonroot.backends.raw import RawImage
raw = RawImage({os.fspath(image)!r})
print("locked", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BadFileError, match=rf"process {other.pid} \("):
            open_image(Drive.parse(f"{image},ro"))
        other.kill()
        other.wait()
    open_image(Drive.parse(os.fspath(image))).close()


# ── overlays ──

writes = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20), st.integers(0, 255)), max_size=20)


@settings(max_examples=50, deadline=None)
@given(writes=writes)
def test_an_overlay_reads_as_the_disk_that_was_written(writes: list[tuple[int, int, int]]) -> None:
    base = FailingImage(pattern(75 * 512), read_only=True)
    overlay = OverlayImage(base)
    model = bytearray(base.data)
    for sector, count, byte in writes:
        data = bytes((byte,)) * (min(count, 75 - sector) * 512)
        overlay.write(sector * 512, data)
        model[sector * 512 : sector * 512 + len(data)] = data
        assert overlay.read(sector * 512, len(data)) == data
    assert overlay.read(0, 75 * 512) == model
    assert overlay.read(7 * 512, 20 * 512) == model[7 * 512 : 27 * 512]
    assert base.data == pattern(75 * 512)
    overlay.close()
    assert base.closed


def test_an_overlay_leaves_the_image_alone(image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", os.fspath(tmp_path))
    overlay = open_image(Drive.parse(f"{image},overlay"))
    assert not overlay.read_only
    overlay.write(0, b"gone" * 128)
    overlay.flush()
    assert overlay.read(0, 512) == b"gone" * 128
    assert [path.name for path in tmp_path.iterdir()] == ["disk.img"], "the layer has no name"
    overlay.close()
    assert image.read_bytes() == pattern(MIB)


def test_an_overlay_that_cannot_copy_up_changes_nothing() -> None:
    base = FailingImage(pattern(16 * 512))
    overlay = OverlayImage(base)
    base.readable = 2 * 512
    with pytest.raises(OSError, match="told to"):
        overlay.write(512, b"x" * 512)
    base.readable = base.size
    assert overlay.read(0, base.size) == pattern(16 * 512)
    overlay.close()


def test_no_place_for_an_overlay(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    with pytest.raises(BadFileError, match="an overlay cannot be made in /proc/nowhere: .*; set TMPDIR"):
        open_image(Drive.parse(f"{image},overlay"))
    open_image(Drive.parse(os.fspath(image))).close()


# ── other formats, by QEMU's storage daemon ──


def make_qcow2(path: Path, size: int, backing: Path | None = None) -> None:
    """A qcow2 image, made by the daemon itself (qemu-img may not be there)."""
    with path.open("wb") as file:
        file.truncate(0)
    options = {"driver": "qcow2", "file": "f", "size": size}
    if backing is not None:
        options |= {"backing-file": os.fspath(backing), "backing-fmt": "raw"}
    commands = [
        {"execute": "qmp_capabilities"},
        {"execute": "blockdev-create", "arguments": {"job-id": "j", "options": options}},
    ]
    with subprocess.Popen(
        [DAEMON, "--blockdev", f"driver=file,node-name=f,filename={path}", "--chardev", "stdio,id=c", "--monitor", "c"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for command in commands:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if '"concluded"' in line:
                process.stdin.write('{"execute": "job-dismiss", "arguments": {"id": "j"}}\n{"execute": "quit"}\n')
                process.stdin.flush()
    assert process.returncode == 0


@has_daemon
def test_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make_qcow2(path, 64 * MIB)
    image = open_image(Drive.parse(os.fspath(path)))
    assert (image.size, image.read_only) == (64 * MIB, False)
    assert image.read(0, 1024) == bytes(1024)
    image.write(63 * MIB, b"q" * 4096)
    image.flush()
    with pytest.raises(BadFileError, match=rf"in use by .*\({DAEMON[:15]}\)"):
        open_image(Drive.parse(os.fspath(path)))
    assert perform(image, BlockRequest(BlockOp.WRITE, 64 * MIB, 512, bytes(512))).status is BlockStatus.OUT_OF_RANGE
    image.close()
    assert path.stat().st_size < MIB
    again = open_image(Drive.parse(f"{path},ro"))
    assert again.read_only
    assert again.read(63 * MIB, 4096) == b"q" * 4096
    assert perform(again, BlockRequest(BlockOp.WRITE, 0, 512, bytes(512))).status is BlockStatus.READ_ONLY
    again.close()
    overlay = open_image(Drive.parse(f"{path},overlay"))
    overlay.write(0, b"o" * 512)
    assert overlay.read(0, 1024) == b"o" * 512 + bytes(512)
    overlay.close()


@has_daemon
def test_a_backing_file_must_be_allowed(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "top.qcow2"
    make_qcow2(path, MIB, image)
    with pytest.raises(BadFileError, match="open a backing file: add ,backing"):
        open_image(Drive.parse(os.fspath(path)))
    top = open_image(Drive.parse(f"{path},backing"))
    assert top.read(0, 4096) == pattern(4096)
    top.write(0, b"t" * 512)
    assert top.read(0, 1024) == b"t" * 512 + pattern(1024)[512:]
    top.close()
    assert image.read_bytes() == pattern(MIB)


@has_daemon
def test_an_image_that_is_damaged_or_of_another_format(tmp_path: Path, image: Path) -> None:
    with pytest.raises(BadFileError, match="cannot be opened as qcow2: .*not in qcow2 format"):
        open_image(Drive.parse(f"{image},format=qcow2"))
    (tmp_path / "x.vmdk").write_bytes(b"# Disk DescriptorFile\n" + bytes(512))
    with pytest.raises(BadFileError, match="other files"):
        open_image(Drive.parse(os.fspath(tmp_path / "x.vmdk")))


@has_daemon
def test_a_daemon_that_dies_is_an_io_error(tmp_path: Path) -> None:
    from nonroot.backends.qemu import ForeignImage

    path = tmp_path / "disk.qcow2"
    make_qcow2(path, MIB)
    image = open_image(Drive.parse(os.fspath(path)))
    assert isinstance(image, ForeignImage)
    image._process.kill()
    image._process.wait()
    for _ in range(2):
        assert perform(image, BlockRequest(BlockOp.READ, 0, 512)).status is BlockStatus.IO_ERROR
        assert perform(image, BlockRequest(BlockOp.WRITE, 0, 512, bytes(512))).status is BlockStatus.IO_ERROR
    image.close()


def test_without_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(508))
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UnsupportedError, match=f"qcow2 images need {DAEMON}"):
        open_image(Drive.parse(os.fspath(tmp_path / "disk.qcow2")))
