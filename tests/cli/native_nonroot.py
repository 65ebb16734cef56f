"""The ``nonroot`` command with domains whose guest is the agent, run on this machine."""

import sys
from pathlib import Path

from nonroot.domain import client

client.PROGRAM[:] = [sys.executable, str(Path(__file__).parents[1] / "domain" / "native_runner.py")]

if __name__ == "__main__":
    from nonroot.cli.main import main

    sys.exit(main())
