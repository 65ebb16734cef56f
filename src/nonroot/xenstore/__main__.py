"""``python -m nonroot.xenstore``: XenStore's process. Clients start it when they need it; see docs/xenstore.md."""

import argparse
import faulthandler
import os
import sys
from pathlib import Path

from nonroot.confine import XENSTORE, confine
from nonroot.domain import host
from nonroot.errors import NonrootError
from nonroot.xenstore import place
from nonroot.xenstore.daemon import Busy, Server, install_signals

__all__ = ["main"]

IDLE_SECONDS = 600.0


def main() -> None:
    """Serve until nobody has needed it for a while."""
    parser = argparse.ArgumentParser(prog="python -m nonroot.xenstore", description="XenStore of one user.")
    parser.add_argument("--folder", type=Path, help="where its files are (default: the user's)")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, metavar="SECONDS", help="end when unused so long")
    parser.add_argument("--detach", action="store_true", help="go to the background when it serves")
    options = parser.parse_args()
    faulthandler.enable()
    try:
        folder = options.folder or place.folder()
        server = Server(folder, options.idle)
    except (Busy, NonrootError, ValueError) as error:
        sys.exit(f"nonroot-xenstored: {error}")
    except OSError as error:
        sys.exit(f"nonroot-xenstored: {error.filename or 'its folder'}: {error.strerror or error}")
    ready, say_ready = os.pipe()
    if options.detach and os.fork():
        os.close(say_ready)
        os._exit(0 if os.read(ready, 1) else 1)
    server.sign()
    install_signals(server)
    host.name_process("nr-xenstored")
    inside = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    force = confine(XENSTORE, folder=inside)
    os.close(inside)
    print(f"nonroot-xenstored {os.getpid()}: serving, confined by {', '.join(force.names)}", file=sys.stderr)
    sys.stderr.flush()
    os.write(say_ready, b"!")
    os.close(say_ready)
    os.close(ready)
    server.serve()


if __name__ == "__main__":
    main()
