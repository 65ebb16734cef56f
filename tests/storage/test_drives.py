"""Which image goes where in a domain, and what a user is told when it cannot."""

import os
from pathlib import Path

import pytest

from nonroot import Domain
from nonroot.cli.main import main
from nonroot.domain.drives import Drives, check_drives
from nonroot.domain.options import DomainOptions
from nonroot.errors import BadFileError, BadOptionError, UnsupportedError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


def kinds(options: DomainOptions) -> list[str]:
    drives = Drives(options)
    try:
        return ["-" if place is None else "cd" if place[0] else "disk" for place in drives._places]
    finally:
        drives.close()


def test_places(image: Path) -> None:
    disk = f"{image},ro"
    assert kinds(DomainOptions(disks=[disk])) == ["disk", "-", "-", "-"]
    assert kinds(DomainOptions(disks=[disk, disk, disk], cdroms=["none"])) == ["disk", "disk", "cd", "disk"]
    assert kinds(DomainOptions(disks=[disk] * 4)) == ["disk"] * 4
    assert kinds(DomainOptions(disks=[disk], cdroms=[os.fspath(image), "none"])) == ["disk", "-", "cd", "cd"]
    assert kinds(DomainOptions(cdroms=["none"] * 4)) == ["cd"] * 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"disks": ["{0},ro"] * 3, "cdroms": ["none"] * 2}, "at most 4 disks and CD-ROM drives"),
        ({"floppies": ["none"] * 3}, "at most 2 floppy drives"),
        ({"cdroms": ["{0},overlay"]}, "a CD is read-only"),
        ({"cdroms": ["/nowhere/x.iso"]}, "the CD image /nowhere/x.iso does not exist"),
        ({"floppies": ["/nowhere/x.img"]}, "the floppy image /nowhere/x.img does not exist"),
        ({"disks": ["none"]}, "does not exist"),
    ],
)
def test_drives_that_cannot_be(image: Path, options: dict[str, list[str]], sentence: str) -> None:
    texts = {name: [text.format(image) for text in values] for name, values in options.items()}
    with pytest.raises((BadOptionError, BadFileError), match=sentence):
        check_drives(DomainOptions(**texts))  # type: ignore[arg-type]


def test_a_floppy_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "big.img"
    path.write_bytes(bytes(2_949_120 + 512))
    with pytest.raises(BadOptionError, match="more than a floppy"):
        Drives(DomainOptions(floppies=[os.fspath(path)]))
    with path.open("r+b") as file:
        file.truncate(2_949_120)
    Drives(DomainOptions(floppies=[os.fspath(path)])).close()


def test_a_second_writer_is_refused_and_leaves_no_lock(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    first = Drives(DomainOptions(disks=[os.fspath(image)]))
    with pytest.raises(BadFileError, match="in use"):
        Drives(DomainOptions(disks=[os.fspath(other), os.fspath(image)]))
    Drives(DomainOptions(disks=[os.fspath(other)])).close()
    first.close()


def test_drives_that_are_not_there() -> None:
    drives = Drives(DomainOptions(cdroms=["none"]))
    for name, kind in (
        ("cd1", UnsupportedError),
        ("fd0", UnsupportedError),
        ("hd0", BadOptionError),
        ("cd", BadOptionError),
    ):
        with pytest.raises(kind):
            drives.eject(name, False)
    drives.close()


def test_paths_of_the_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    domain = Domain(disks=["a,,b.img,ro", Path("c,d.img")], cdrom="none", floppy=["f.img"], flavour="amd64")
    options = domain._options
    assert options.disks == [f"{tmp_path}/a,,b.img,ro", f"{tmp_path}/c,,d.img"]
    assert (options.cdroms, options.floppies) == (["none"], [f"{tmp_path}/f.img"])


def test_a_domain_says_at_once_what_is_wrong(tmp_path: Path) -> None:
    domain = Domain(disks=[tmp_path / "missing.img"], flavour="cloud-amd64")
    with pytest.raises(BadFileError, match="missing.img does not exist"):
        domain.start()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--disk", "{0}/missing.img"], "the disk image {0}/missing.img does not exist"),
        (["--disk", "{0}"], "the disk image {0} is a directory"),
        (["--disk", "{0}/empty"], "the disk image {0}/empty is empty"),
        (["--disk", "{0}/empty,rw"], "'rw' is no option of a disk image"),
        (["--cdrom", "{0}/missing.iso"], "the CD image {0}/missing.iso does not exist"),
        (["--floppy", "{0}/missing.img"], "the floppy image {0}/missing.img does not exist"),
    ],
)
def test_the_command_says_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").touch()
    # A kernel that is no kernel: the drives are looked at before it.
    (tmp_path / "kernel").write_bytes(b"x")
    status = main(["run", "--kernel", f"{tmp_path}/kernel", *(word.format(tmp_path) for word in arguments)])
    out, err = capfd.readouterr()
    assert (status, out) == (125, "")
    assert sentence.format(tmp_path) in err
    assert len(err.strip().splitlines()) == 1
