"""What the command line says on its own behalf: to stderr, and no more than was asked for."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from nonroot.errors import InternalError, NonrootError

__all__ = ["OWN_FAILURE", "TIMED_OUT", "FetchBar", "Reporter", "sentence"]

OWN_FAILURE = 125
TIMED_OUT = 124


def sentence(error: BaseException | str) -> str:
    """An error as one line without a final full stop, as it follows ``nonroot: ``."""
    text = " ".join(str(error).split())
    return text.removesuffix(".") if text.count(". ") == 0 else text


class Reporter:
    """Progress and messages on stderr.

    Progress is one line that is rewritten, only on a terminal, and gone before the command's own output starts.
    """

    def __init__(self, verbose: int = 0, quiet: bool = False) -> None:
        self.verbose = verbose
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.color = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._began = time.monotonic()

    def progress(self, text: str) -> None:
        """Show what is being done now."""
        if self.verbose:
            self.line(text)
        elif self.terminal and not self.quiet:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            line = f"nonroot: {text}"[: max(columns - 1, 20)]
            styled = f"\x1b[2m{line}\x1b[0m" if self.color else line
            self._raw(f"\r\x1b[K{styled}" if os.environ.get("TERM") != "dumb" else f"{line}\n")
            self._shown = os.environ.get("TERM") != "dumb"

    def clear(self) -> None:
        """Take the progress line away."""
        if self._shown:
            self._raw("\r\x1b[K")
            self._shown = False

    def line(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self._raw(f"nonroot: {text}\n")

    def error(self, error: BaseException | str) -> None:
        """One sentence that says why it did not work; said even with -q."""
        self.clear()
        text = sentence(error)
        if self.color:
            self._raw(f"\x1b[31mnonroot:\x1b[0m {text}\n")
        else:
            self._raw(f"nonroot: {text}\n")
        if isinstance(error, InternalError):
            self._raw("nonroot: this is a defect of nonroot; please report it with the output of NONROOT_DEBUG=1\n")
        if isinstance(error, NonrootError) and os.environ.get("NONROOT_DEBUG") and error.details.get("trace"):
            self._raw(str(error.details["trace"]).rstrip() + "\n")

    def raw(self, text: str) -> None:
        """Text as it is."""
        self.clear()
        self._raw(text)

    @staticmethod
    def _raw(text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more


class FetchBar:
    """The progress bar of fetching guest software: made when it is needed, gone when the domain starts."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._stack = contextlib.ExitStack()
        self._report: Callable[[str, float], None] | None = None

    def __enter__(self) -> "FetchBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def show(self, what: str, share: float) -> None:
        """``what`` is being done, and so much of it (0..1) is."""
        if self._reporter.quiet:
            return
        if self._report is None:
            from nonroot.guests import progress_bar

            self._report = self._stack.enter_context(progress_bar())
        if self._report is not None:
            self._report(what, share)

    def step(self, text: str) -> None:
        """A step of the domain's start: fetching is over."""
        self._stack.close()
        self._report = None
        self._reporter.progress(text)
