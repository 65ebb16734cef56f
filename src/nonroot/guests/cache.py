"""The user's cache: where fetched guest software lies, who may change it, and how damage is noticed."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from nonroot.errors import SoftwareMissingError

__all__ = ["cache_dir", "damaged", "locked", "publish", "seal", "write_atomically"]

_MANIFEST = "manifest.json"


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/nonroot`` (``~/.cache/nonroot``), made if needed.

    Where that cannot be written (no home, read-only), a folder of the user's own under the temporary folder.
    SoftwareMissingError if there is no place at all.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    wanted = Path(base) if base.startswith("/") else Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111
    candidates = [wanted / "nonroot", Path(tempfile.gettempdir()) / f"nonroot-{os.getuid()}"]
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Somebody else's folder under /tmp is not ours to trust.
            if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK | os.X_OK):
                return folder
    tried = " and ".join(str(folder) for folder in candidates)
    raise SoftwareMissingError(f"there is no folder for guest software that can be written: tried {tried}")


@contextlib.contextmanager
def locked(name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the cache's lock ``name`` against other processes; ``waiting`` is called once if somebody else has it."""
    path = cache_dir() / f"{name}.lock"
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing; readers see the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, files: list[Path], **facts: str) -> None:
    """Record the SHA-256 of ``files`` (inside ``folder``) and some facts, for :func:`damaged` to compare."""
    sums = {str(path.relative_to(folder)): _sha256(path) for path in files}
    write_atomically(folder / _MANIFEST, json.dumps({"sha256": sums, **facts}, indent=1).encode())


def damaged(folder: Path) -> str | None:
    """Why a sealed folder cannot be used, as half a sentence; None if it is as it was sealed."""
    try:
        sums = json.loads((folder / _MANIFEST).read_bytes())["sha256"]
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def publish(draft: Path, final: Path) -> None:
    """Move a complete folder into its place, replacing what is there. The caller holds the lock."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    draft.rename(final)
    shutil.rmtree(old, ignore_errors=True)
