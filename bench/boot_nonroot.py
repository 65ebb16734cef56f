"""One boot under nonroot for bench/boot.py: the console on stdout, the counters in a file."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import nonroot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("kernel", "initrd", "append", "memory", "report", "engine"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    domain = nonroot.Domain(
        options.kernel, options.initrd, options.append, options.memory, options.engine, agent=False, xen=False
    )
    domain.console.listener = lambda data: _write_all(data)
    with domain:
        stopped = domain.wait(300)
        report = {**asdict(domain.stats), "stopped": stopped.reason, "description": domain.description}
        Path(options.report).write_text(json.dumps(report))
    if stopped.reason != "poweroff":
        raise SystemExit(f"the guest did not power off: {stopped.message}")


def _write_all(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
