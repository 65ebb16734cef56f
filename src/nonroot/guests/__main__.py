"""Guest software from the shell: ``python -m nonroot.guests fetch [--refresh] FLAVOUR…`` and ``path FLAVOUR…``."""

import argparse
import sys

from nonroot.errors import NonrootError
from nonroot.guests import FLAVOURS, cached, fetch, progress_bar


def main() -> int:
    """Return the process's exit status: 1 if some flavour cannot be had, each said in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m nonroot.guests", description="Guest software in the user's cache.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching = verbs.add_parser("fetch", help="fetch Debian kernels with busybox, where the cache has none")
    fetching.add_argument("--refresh", action="store_true", help="look for newer ones")
    showing = verbs.add_parser("path", help="print kernel and initramfs of a fetched flavour")
    for verb in (fetching, showing):
        verb.add_argument("flavour", nargs="+", choices=list(FLAVOURS))
    options = parser.parse_args()
    failed = False
    for flavour in options.flavour:
        try:
            if options.verb == "fetch":
                with progress_bar() as progress:
                    guest = fetch(flavour, progress=progress, refresh=options.refresh)
                if guest.source == "apt":
                    print(f"nonroot: Linux {guest.version} is ready", file=sys.stderr)
            elif kept := cached(flavour):
                print(kept.kernel, kept.initrd)
            else:
                failed = True
                print(f"nonroot: {flavour} has not been fetched", file=sys.stderr)
        except NonrootError as error:
            failed = True
            print(f"nonroot: {error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
