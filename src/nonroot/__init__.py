"""nonroot: a hypervisor that boots unmodified operating systems without root, without a kernel module, without VT-x.

>>> import nonroot
>>> with nonroot.Domain() as d:                      # doctest: +SKIP
...     result = d.run(["uname", "-a"])
...     print(result.stdout)

The names here are the public interface; they are imported when first used, so ``import nonroot`` costs nothing.
"""

TYPE_CHECKING = False  # typing's own would cost the half of what everything here does

if TYPE_CHECKING:
    from typing import Any

    from nonroot.api import Domain as Domain
    from nonroot.api import Statistics as Statistics
    from nonroot.api import Stopped as Stopped
    from nonroot.connecting import RunningDomain as RunningDomain
    from nonroot.connecting import connect as connect
    from nonroot.connecting import running as running
    from nonroot.domain.command import Command as Command
    from nonroot.domain.command import Completed as Completed
    from nonroot.domain.expect import Console as Console
    from nonroot.domain.memory import Memory as Memory
    from nonroot.domain.options import parse_size as parse_size
    from nonroot.errors import BadFileError as BadFileError
    from nonroot.errors import BadOptionError as BadOptionError
    from nonroot.errors import BootTimeoutError as BootTimeoutError
    from nonroot.errors import CommandFailedError as CommandFailedError
    from nonroot.errors import CommandTimeoutError as CommandTimeoutError
    from nonroot.errors import DomainLostError as DomainLostError
    from nonroot.errors import DomainStoppedError as DomainStoppedError
    from nonroot.errors import GuestCrashError as GuestCrashError
    from nonroot.errors import GuestFileError as GuestFileError
    from nonroot.errors import GuestPanicError as GuestPanicError
    from nonroot.errors import InternalError as InternalError
    from nonroot.errors import NonrootError as NonrootError
    from nonroot.errors import NotRunningError as NotRunningError
    from nonroot.errors import OutOfMemoryError as OutOfMemoryError
    from nonroot.errors import OutputLimitError as OutputLimitError
    from nonroot.errors import PermanentError as PermanentError
    from nonroot.errors import SoftwareMissingError as SoftwareMissingError
    from nonroot.errors import TransientError as TransientError
    from nonroot.errors import UnknownOutcomeError as UnknownOutcomeError
    from nonroot.errors import UnsupportedError as UnsupportedError
    from nonroot.errors import UsageError as UsageError
    from nonroot.errors import WaitTimeoutError as WaitTimeoutError

_HOMES = {
    "nonroot.api": ("Domain", "Statistics", "Stopped"),
    "nonroot.connecting": ("RunningDomain", "connect", "running"),
    "nonroot.domain.command": ("Command", "Completed"),
    "nonroot.domain.expect": ("Console",),
    "nonroot.domain.memory": ("Memory",),
    "nonroot.domain.options": ("parse_size",),
    "nonroot.errors": (
        "BadFileError",
        "BadOptionError",
        "BootTimeoutError",
        "CommandFailedError",
        "CommandTimeoutError",
        "DomainLostError",
        "DomainStoppedError",
        "GuestCrashError",
        "GuestFileError",
        "GuestPanicError",
        "InternalError",
        "NonrootError",
        "NotRunningError",
        "OutOfMemoryError",
        "OutputLimitError",
        "PermanentError",
        "SoftwareMissingError",
        "TransientError",
        "UnknownOutcomeError",
        "UnsupportedError",
        "UsageError",
        "WaitTimeoutError",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Command",
    "Completed",
    "Console",
    "Domain",
    "Memory",
    "RunningDomain",
    "Statistics",
    "Stopped",
    "__version__",
    "connect",
    "parse_size",
    "running",
]
__all__ += _HOMES["nonroot.errors"]


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("nonroot")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _HOME_OF:
        from importlib import import_module

        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
