"""Where domain zero keeps its things, in the user's folder for running domains."""

from pathlib import Path

from nonroot.domain.registry import runtime_dir

__all__ = ["console_path", "domains_folder", "folder", "lock_path", "log_path", "logs_folder", "socket_path"]


def folder() -> Path:
    """A folder that only this user can enter. TransientError if there is none."""
    path = runtime_dir() / "dom0"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def socket_path() -> Path:
    """What the toolstack's clients connect to."""
    return folder() / "socket"


def lock_path() -> Path:
    """Locked by domain zero for as long as it serves."""
    return folder() / "lock"


def log_path() -> Path:
    """Domain zero's own messages."""
    return folder() / "log"


def domains_folder() -> Path:
    """A record for each domain that domain zero has made, by UUID."""
    path = folder() / "domains"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def logs_folder() -> Path:
    """The domains' consoles, and what their processes said."""
    path = folder() / "logs"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def console_path(name: str) -> Path:
    """The scrollback of the last domain of that name."""
    return logs_folder() / f"{name}.console"
