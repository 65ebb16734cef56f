"""How this package starts processes: a new Python that finds it, in a session of its own, with little inherited."""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from typing import IO

__all__ = ["environment", "start"]


def environment() -> "dict[str, str]":
    """Ours, such that a new Python finds this package."""
    package = os.path.realpath(__file__)  # pathlib would take longer to load than all else here
    for _ in ("programs.py", "nonroot"):
        package = os.path.split(package)[0]
    environment = dict(os.environ)
    search = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    if os.path.split(package)[1] not in ("site-packages", "dist-packages"):
        search.append(package)
    if search:
        environment["PYTHONPATH"] = os.pathsep.join(search)
    return environment


def start(
    program: "Sequence[str]",
    *,
    stdout: "int | IO[bytes]",
    stderr: "int | IO[bytes] | None" = None,
    fds: "Sequence[int]" = (),
) -> "subprocess.Popen[bytes]":
    """
    Start ``program``, with nothing to read, in ``/``, so that it holds no folder of the caller's.

    :param stdout: where it prints, and ``stderr`` where its errors go: ours by default.
    :param fds: descriptors that keep their numbers.
    :raises OSError: if the host has no process, descriptor or memory for it.
    """
    import subprocess  # nonroot.domain.early, which needs only the environment, is in a hurry

    return subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=fds,
        env=environment(),
        cwd="/",
        start_new_session=True,
    )
