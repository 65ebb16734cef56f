"""A progress bar for fetching, on stderr and only where somebody can watch it."""

import contextlib
import sys
from collections.abc import Iterator

from nonroot.guests.apt import Progress as Report

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Report | None]:
    """Gives the callback for :func:`nonroot.guests.linux`.

    A bar if stderr is a terminal; a line per step if it is not; None if ``quiet``. NO_COLOR is honoured.
    """
    if quiet:
        yield None
        return
    # Most who come by here fetch nothing: rich takes longer to load than they have.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = ""

        def line(what: str, share: float) -> None:
            nonlocal last
            if what != last:
                last = what
                print(f"nonroot: {what}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, visible=False)

        def bar(what: str, share: float) -> None:
            if what != progress.tasks[0].description:
                progress.reset(task, description=what, total=1.0, visible=True)
            progress.update(task, completed=share)

        yield bar
