"""Every error that nonroot raises on purpose, sorted by what the caller can do about it.

==================  ==================================================================================================
base class          may I retry?
==================  ==================================================================================================
UsageError          No. The caller's mistake: the message says what to change. Nothing was done.
TransientError      Yes, later or with more time or resources: the same call can succeed.
PermanentError      No. The same call will fail the same way: this guest, this kernel or this machine cannot do it.
UnknownOutcomeError Look first. The call may have had its effect in the guest, wholly or in part.
InternalError       A defect of nonroot itself: please report it, with the details that it carries.
==================  ==================================================================================================

Each error has one sentence as its text, and a stable ``code`` that ``nonroot run --json`` prints too.
"""

from typing import Any, ClassVar

__all__ = [
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
    "error_from_wire",
]


class NonrootError(Exception):
    """Base of all. ``details`` holds strings and numbers for tools: console output, paths, errno values."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        """The error as the control protocol carries it; ``is`` has the codes of its base classes, nearest first."""
        codes = list(dict.fromkeys(kind.code for kind in type(self).__mro__ if issubclass(kind, NonrootError)))
        return {"code": self.code, "message": str(self), "details": self.details, "is": codes[1:]}


class UsageError(NonrootError):
    """The caller's mistake; nothing was done."""

    code = "usage"


class BadOptionError(UsageError, ValueError):
    """An option or argument that makes no sense: an absurd size, an unknown engine, a command that is too long."""

    code = "bad_option"


class BadFileError(UsageError):
    """A file that cannot be used: missing, empty, truncated, not a kernel, too large for the memory."""

    code = "bad_file"


class NotRunningError(UsageError):
    """The call needs a domain in another state: not started yet, or already stopped."""

    code = "not_running"


class TransientError(NonrootError):
    """The same call can succeed later."""

    code = "transient"


class OutOfMemoryError(TransientError):
    """The host has not enough memory for the domain now."""

    code = "out_of_memory"


class WaitTimeoutError(TransientError, TimeoutError):
    """What was waited for has not happened in the time allowed."""

    code = "wait_timeout"


class BootTimeoutError(WaitTimeoutError):
    """The guest was not ready in the time allowed; its console output so far is in ``details["console"]``."""

    code = "boot_timeout"


class PermanentError(NonrootError):
    """The same call will fail the same way."""

    code = "permanent"


class UnsupportedError(PermanentError):
    """Something that the machine, the kernel or the engine at hand cannot do."""

    code = "unsupported"


class SoftwareMissingError(PermanentError):
    """There is no guest software to boot, and it could not be fetched."""

    code = "software_missing"


class DomainStoppedError(PermanentError):
    """The guest powered off or rebooted before it did what was asked."""

    code = "stopped"


class GuestCrashError(DomainStoppedError):
    """The guest crashed: a triple fault, or a state that no CPU could leave."""

    code = "crash"


class GuestPanicError(GuestCrashError):
    """The guest's kernel panicked; its console's last lines are in ``details["console"]``."""

    code = "panic"


class GuestFileError(PermanentError):
    """A file could not be copied; ``details`` has the guest's errno and path."""

    code = "guest_file"


class OutputLimitError(PermanentError):
    """The command wrote more than the caller allowed it to; it was killed."""

    code = "output_limit"


class CommandFailedError(PermanentError):
    """``run(check=True)``: the command ended with another status than 0. ``completed`` has its result."""

    code = "command_failed"
    completed: Any = None


class UnknownOutcomeError(NonrootError):
    """The call may have had its effect."""

    code = "unknown_outcome"


class CommandTimeoutError(UnknownOutcomeError, TimeoutError):
    """The command did not end in the time allowed and was killed; its output so far is in ``stdout`` and ``stderr``."""

    code = "timeout"
    stdout: bytes = b""
    stderr: bytes = b""


class DomainLostError(UnknownOutcomeError):
    """The domain's process has gone: killed from outside, or by the host for want of memory."""

    code = "domain_lost"


class InternalError(NonrootError):
    """A defect of nonroot. ``details["trace"]``, where there is one, belongs in a report."""

    code = "internal"


def _tree(root: type[NonrootError]) -> dict[str, type[NonrootError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_wire(record: dict[str, Any]) -> NonrootError:
    """The error that :meth:`NonrootError.to_wire` described, or the nearest class that this process knows."""
    known = _tree(NonrootError)
    bases = record.get("is")
    codes = [record.get("code"), *(bases if isinstance(bases, list) else [])]
    kind = next((known[str(code)] for code in codes if str(code) in known and code != NonrootError.code), InternalError)
    details = record.get("details")
    error = kind.__new__(kind)  # subclasses may have constructors of their own
    NonrootError.__init__(
        error, str(record.get("message", "no reason given")), **(details if isinstance(details, dict) else {})
    )
    return error
