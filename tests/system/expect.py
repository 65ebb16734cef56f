"""Writes what the engine prints into the expectation files; to be read against the manuals before it is committed."""

from nonroot.engines.native import InterpretEngine
from nonroot.testing.system_guest_run import run_engine
from tests.system.catalogue import EXPECTED, GUESTS

if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    for guest in GUESTS:
        (EXPECTED / f"{guest.name}.txt").write_text(run_engine(InterpretEngine(), guest.build()))
