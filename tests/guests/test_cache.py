"""The cache: whole files or none, damage noticed, one writer at a time."""

import multiprocessing
import os
import tempfile
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from nonroot.errors import SoftwareMissingError
from nonroot.guests import cache


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_folder_is_made_and_private(home: Path) -> None:
    folder = cache.cache_dir()
    assert folder == home / "nonroot"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says so
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "nonroot"


def test_without_a_writable_home_the_temporary_folder_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # a file: nothing can be made in it, even by root
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache.cache_dir() == tmp_path / f"nonroot-{os.getuid()}"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(SoftwareMissingError, match="no folder for guest software that can be written"):
        cache.cache_dir()


def test_a_seal_notices_every_change(home: Path) -> None:
    folder = home / "sealed"
    folder.mkdir()
    (folder / "a").write_bytes(b"one")
    (folder / "b").write_bytes(b"two")
    assert cache.damaged(folder) == "manifest.json is missing"
    cache.seal(folder, [folder / "a", folder / "b"], version="1")
    assert cache.damaged(folder) is None
    (folder / "a").write_bytes(b"onE")
    assert cache.damaged(folder) == "a has changed"
    (folder / "a").write_bytes(b"one")
    (folder / "b").unlink()
    assert cache.damaged(folder) == "b is missing"
    (folder / "manifest.json").write_text("{")
    assert (cache.damaged(folder) or "").startswith("it cannot be read")


def test_a_failed_write_leaves_the_old_file(home: Path) -> None:
    path = home / "file"
    cache.write_atomically(path, b"old")
    with pytest.raises(TypeError):
        cache.write_atomically(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in home.iterdir()] == ["file"]


def test_publish_replaces_a_folder(home: Path) -> None:
    final = home / "final"
    for text in ("one", "two"):
        draft = home / "draft"
        draft.mkdir()
        (draft / "file").write_text(text)
        cache.publish(draft, final)
        assert (final / "file").read_text() == text
    assert [entry.name for entry in home.iterdir()] == ["final"]


def _hold(taken: Event, release: Event) -> None:
    with cache.locked("x"):
        taken.set()
        release.wait(30)


def test_the_lock_keeps_other_processes_out(home: Path) -> None:
    context = multiprocessing.get_context("spawn")
    taken, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(taken, release))
    holder.start()
    assert taken.wait(30)
    order: list[str] = []

    def waiting() -> None:
        order.append("waited")
        release.set()

    with cache.locked("x", waiting):
        order.append("got it")
    holder.join()
    assert order == ["waited", "got it"]
    with cache.locked("x", lambda: order.append("waited again")):
        pass
    assert order == ["waited", "got it"]
