"""What ``nonroot create`` refuses: one sentence, status 125, and no harm to the domain that runs."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nonroot import guests
from nonroot.cli.main import main
from nonroot.errors import SoftwareMissingError
from tests.acceptance.guests import MIB, domains, xl

Refused = Callable[..., None]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def kernel(runtime: Path) -> str:
    try:
        return os.fspath(guests.tiny().kernel)
    except SoftwareMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, good ones and bad ones."""
    path = tmp_path_factory.mktemp("images")
    for name in ("good.img", "shared.img", "other.img"):
        (path / name).write_bytes(bytes(MIB))
    (path / "folder.img").mkdir()
    (path / "empty.img").touch()
    (path / "dangling.img").symlink_to("nowhere")
    (path / "broken.qcow2").write_bytes(b"QFI\xfb\0\0\0\x03" + b"\xff" * 4096)
    (path / "text.qcow2").write_text("no image at all\n" * 100)
    (path / "garbage").write_bytes(b"\x7fELF" + b"\xa5" * 4096)
    (path / "text").write_text("#!/bin/sh\n")
    (path / "shut.img").write_bytes(bytes(MIB))
    (path / "shut.img").chmod(0)
    os.mkfifo(path / "pipe.img")
    return path


@pytest.fixture(scope="module")
def running(kernel: str, folder: Path) -> Iterator[int]:
    """A domain that has its disks; its process. It is the same when all tests are done."""
    made = xl(
        *("create", "--json", "name=first", f"kernel={kernel}", "memory=16", "cmdline=echo", "nonroot_xen=1"),
        f"disk=['{folder}/good.img,raw,xvda,w', '{folder}/shared.img,raw,xvdb,r']",
    )
    pid = int(made.json["pid"])
    yield pid
    found = domains()
    assert list(found) == ["first"]
    assert (found["first"]["pid"], found["first"]["state"]) == (pid, "running")


@pytest.fixture
def refused(running: int, capfd: pytest.CaptureFixture[str]) -> Refused:
    """The command, in this process: what it has to refuse, and a pattern of why."""

    def create(*arguments: str, word: str) -> None:
        capfd.readouterr()
        status = main(["create", *arguments])
        out, err = capfd.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("nonroot: warning: ")]
        assert (status, out, len(lines)) == (125, "", 1), err
        assert lines[0].startswith("nonroot: ")
        assert re.search(word, lines[0]), lines[0]
        assert len(lines[0]) < 400

    return create


@pytest.mark.parametrize(
    ("disks", "word"),
    [
        (["good.img,raw,xvda,w"], r"good\.img is used by .*first|first.*good\.img|good\.img.*in use"),
        (["good.img,raw,xvda,r"], r"good\.img"),
        (["shared.img,raw,xvda,w"], r"shared\.img"),
        (["other.img,raw,xvda,w", "other.img,raw,xvdb,w"], r"other\.img"),
        (["other.img,raw,xvda,w", "other.img,raw,xvdb,r"], r"other\.img"),
        (["missing.img,raw,xvda,w"], r"missing\.img does not exist"),
        (["dangling.img,raw,xvda,w"], r"dangling\.img does not exist"),
        (["folder.img,raw,xvda,w"], r"folder\.img is (a directory|no file)"),
        (["pipe.img,raw,xvda,w"], r"pipe\.img is"),
        (["empty.img,raw,xvda,w"], r"empty\.img is empty"),
        (["broken.qcow2,qcow2,xvda,w"], r"broken\.qcow2"),
        (["text.qcow2,qcow2,xvda,w"], r"text\.qcow2"),
        (["other.img,tar,xvda,w"], r"there is no format 'tar'"),
        (["other.img,raw,xvda,q"], r"there is no access 'q'"),
        (["other.img,raw"], r"has no vdev"),
        (["other.img,raw,xvd!,w"], r"xvd!"),
        (["other.img,raw,xvda,w", "shared.img,raw,hda,r"], r"the same place"),
        (["other.img,raw,xvda,w,backendtype=magic"], r"there is no backendtype 'magic'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_images(refused: Refused, kernel: str, folder: Path, disks: list[str], word: str) -> None:
    specs = ", ".join(f"'{folder}/{disk}'" for disk in disks)
    refused("name=x", f"kernel={kernel}", "memory=16", "cmdline=idle", "nonroot_xen=1", f"disk=[{specs}]", word=word)


def test_an_image_that_may_not_be_read(refused: Refused, kernel: str, folder: Path) -> None:
    if os.geteuid() == 0 or os.access(folder / "shut.img", os.R_OK):
        pytest.skip("this user may read every file")
    assert stat.S_IMODE((folder / "shut.img").stat().st_mode) == 0
    refused("name=x", f"kernel={kernel}", f"disk=['{folder}/shut.img,raw,xvda,w']", "nonroot_xen=1", word="permission")


def test_readers_share_an_image(running: int, kernel: str, folder: Path) -> None:
    disk = f"disk=['{folder}/shared.img,raw,xvda,r']"
    xl("create", "name=second", f"kernel={kernel}", "memory=16", "cmdline=idle", "nonroot_xen=1", disk)
    assert set(domains()) == {"first", "second"}
    xl("destroy", "second")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (["memory=0"], "memory"),
        (["memory=-5"], "memory"),
        (["memory=1"], "memory|fit"),
        (["memory=99999999"], "memory"),
        (["memory=much"], "memory must be a number"),
        (["memory=16", "maxmem=8"], r"maxmem \(8\) is less than memory"),
        (["vcpus=4"], "one vCPU"),
        (["type=pv"], "no guests of type 'pv'"),
        (["type=amiga"], "there is no type 'amiga'"),
        (["type=pvh", "bios=seabios"], "bios needs type='hvm'"),
        (["kernel=/nowhere"], "the kernel /nowhere cannot be read"),
        (["kernel={folder}"], "the kernel .* (is a directory|cannot be read)"),
        (["kernel={folder}/garbage"], "the kernel"),
        (["kernel={folder}/text"], "kernel"),
        (["ramdisk=/nowhere"], "/nowhere"),
        (["name=../x"], "is no name for a domain"),
        (["name=first"], "a domain named 'first' is running already"),
        (["uuid=1234"], "'1234' is no UUID"),
        (["on_crash=explode"], "there is no action 'explode'"),
        (["on_watchdog=1", "on_crash=coredump-restart"], "no coredump-restart yet"),
        (["vif=['mac=zz']"], "zz"),
        (["vif=['mac=01:00:5e:00:00:01']"], "01:00:5e:00:00:01"),
        (["vif=['bridge=../x']"], "is no network"),
        (["vif=['model=e1000,rate=1Mb/s']"], "'rate' is not supported"),
        (["vif=['type=ioemu']"], "emulates no network cards"),
        (["nonroot_publish=['80']"], "80"),
        (["nonroot_publish=['127.0.0.1:99999:80']"], "99999"),
        (["nonroot_engine=warp"], "warp"),
        (["nonroot_xen=0", "vif=['bridge=lan']"], "nonroot_xen=1"),
        (["pci=['00:1f.2']"], "passes no PCI devices through"),
        (["boot=x", "type=hvm", "kernel="], "boot"),
        (["cmdline=" + "x" * 70_000], "command line"),
        (["serial=tcp:1"], "serial"),
        (["disk=5"], "disk must be a list of strings"),
        (["frobnicate=["], r"frobnicate"),
    ],
    ids=lambda value: value[0][:40] if isinstance(value, list) else "",
)
def test_settings(refused: Refused, kernel: str, folder: Path, settings: list[str], word: str) -> None:
    chosen = [one.format(folder=folder) for one in settings]
    base = {"name": "x", "kernel": kernel, "memory": "16", "cmdline": "idle"}
    base = {key: value for key, value in base.items() if not any(one.startswith(f"{key}=") for one in chosen)}
    refused(*(f"{key}={value}" for key, value in base.items()), *chosen, word=word)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name = 'x'\nmemory = = 3\n", "line 2, column 10"),
        ("name = 'x\n", "line 1"),
        ("disk = [ 'a',\n", "line"),
        ("= 3\n", "line 1"),
        ("name\n", "line"),
        ("name = 'x'\n\xff\n", "line 2"),
        ("x = " + "[" * 10_000, "line 1|nest"),
        ("#" * (2 << 20), "more than"),
    ],
    ids=["no value", "open string", "open list", "no key", "no equals", "not UTF-8", "deep", "long"],
)
def test_files(refused: Refused, tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "x.cfg"
    path.write_bytes(text.encode("latin-1"))
    refused(str(path), word=place)


def test_of_three_that_want_one_image_one_gets_it(running: int, kernel: str, folder: Path) -> None:
    common = [sys.executable, "-P", "-m", "nonroot", "create", f"kernel={kernel}", "memory=16", "cmdline=idle"]
    common += ["nonroot_xen=1", f"disk=['{folder}/other.img,raw,xvda,w']"]
    started = [subprocess.Popen([*common, f"name=w{n}"], stderr=subprocess.PIPE, text=True) for n in range(3)]
    ends = [(process.communicate(timeout=120)[1], process.returncode) for process in started]
    assert sorted(status for _, status in ends) == [0, 125, 125]
    assert all(re.fullmatch(r"nonroot: .*other\.img.*\n", err) for err, status in ends if status)
    (winner,) = set(domains()) - {"first"}
    xl("destroy", winner)
    xl(*common[4:], "name=later")  # the lock went with the domain
    xl("destroy", "later")
