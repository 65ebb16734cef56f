"""The one error of this package."""

from nonroot.errors import BadFileError

__all__ = ["BootError"]


class BootError(BadFileError):
    """The kernel, initrd or command line cannot be booted; the message is one sentence that says why."""

    code = "boot"
