"""A folder for running domains that is a test's own, so that nothing is shared with other tests or with the user."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.xenstore import place
from tests.waiting import lives, wait_until


@contextlib.contextmanager
def own_runtime_folder() -> Iterator[Path]:
    """
    ``XDG_RUNTIME_DIR`` is a new folder, with a short name because a socket's path must be short. At the end XenStore's
    process, if one was started there, has ended, and the folder is gone.
    """
    folder = Path(tempfile.mkdtemp(prefix="nrt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        try:
            yield folder
        finally:
            end_xenstore()
            shutil.rmtree(folder, ignore_errors=True)


def end_xenstore() -> None:
    """End XenStore's process of this runtime folder, if there is one."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(place.lock_path().read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not lives(pid))
