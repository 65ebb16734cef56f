"""``python -m nonroot.toolstack [--idle SECONDS]``: domain zero. Started by whoever needs it."""

import argparse
import os
import signal
import sys

from nonroot.domain import host
from nonroot.toolstack.server import IDLE_SECONDS, serve


def main() -> int:
    """Serve until there is nothing to do."""
    parser = argparse.ArgumentParser(prog="python -m nonroot.toolstack", description="Domain zero.")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, metavar="SECONDS", help="when to end")
    parser.add_argument("--ready-fd", type=int, default=-1, help="gets a byte when clients are served")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))  # the domains go on
    host.name_process("nonroot-dom0")
    if options.ready_fd >= 0:
        os.set_inheritable(options.ready_fd, False)
    return serve(options.idle, options.ready_fd)


if __name__ == "__main__":
    sys.exit(main())
