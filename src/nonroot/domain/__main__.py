"""``python -m nonroot.domain --control-fd N [--socket PATH]``: the process of one domain. Started by its client."""

import faulthandler
import gc
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

gc.disable()  # until everything is loaded: there is no garbage yet, only much to look through

from nonroot.domain import host  # noqa: E402
from nonroot.domain.process import DomainProcess  # noqa: E402

__all__ = ["main", "serve"]


def main() -> NoReturn:
    """Serve until the domain ends; never returns."""
    number, path = _arguments(sys.argv[1:])
    faulthandler.enable()
    gc.freeze()
    gc.enable()
    control = socket.socket(fileno=number)
    os.set_inheritable(number, False)
    serve(control, path)


def _arguments(given: list[str]) -> tuple[int, str | None]:
    """A connected Unix stream socket; a path to listen at for further clients. Only programs give these."""
    options = dict(zip(given[::2], given[1::2], strict=False))
    control = options.pop("--control-fd", "")
    path = options.pop("--socket", None)
    if options or len(given) % 2 or not control.isdecimal():
        sys.exit("usage: python -m nonroot.domain --control-fd N [--socket PATH]")
    return int(control), path


def serve(control: socket.socket, path: str | None = None) -> NoReturn:
    """Be the process of one domain, with a client at ``control``, and further ones at ``path``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the client's business
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    host.die_with_parent()
    host.name_process("nonroot-domain")
    listener = None
    if path:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.umask(0o077)
        listener.bind(path)
        listener.listen(8)
    status = 0
    try:
        DomainProcess(control, listener).run()
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        if path:
            Path(path).unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the vCPU's thread need not be asked: memory is all that it has


if __name__ == "__main__":
    main()
