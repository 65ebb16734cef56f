"""`make demo`: boots Linux in a domain, shows its console, runs `uname -a`, powers it off, and says what that took."""

from __future__ import annotations

import os
import sys
import time

import nonroot
from nonroot.errors import NonrootError
from nonroot.guests import progress_bar


def show(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def say(text: str) -> None:
    print(f"\r\n── {text}", flush=True)


def number(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")


def main() -> int:
    started = time.monotonic()
    with progress_bar() as fetching:
        domain = nonroot.Domain(quiet=False, fetch_progress=fetching)
        domain.console.listener = show
        domain.start()
    try:
        fetched = time.monotonic()
        say(f"engine {domain.engine}: {domain.reason}")
        if domain.note:
            say(domain.note)
            stopped = domain.wait(120)
            status = 0 if stopped.reason == "poweroff" else 1
        else:
            result = domain.run(["uname", "-a"], timeout=60)
            say("$ uname -a")
            print(result.stdout, end="", flush=True)
            status = result.returncode
            say("power off")
            stopped = domain.shutdown()
        wall = time.monotonic() - fetched
        stats = domain.stats
        exits = ", ".join(
            f"{number(count)} {kind}" for kind, count in sorted(stats.exits.items(), key=lambda e: -e[1]) if count
        )
        millions = number(stats.instructions / 1e6)
        say(
            f"{stopped.message} · engine {domain.engine} · {millions} million guest instructions · {wall:.1f} s wall"
            f" · exits: {exits}"
        )
        if time.monotonic() - started > wall + 5:
            print(f"   (and {fetched - started:.0f} s to fetch Linux, only this time)")
        print("   Next: .venv/bin/nonroot run    .venv/bin/nonroot run -- sh -c 'cat /proc/cpuinfo'")
        return status
    finally:
        domain.destroy()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NonrootError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
