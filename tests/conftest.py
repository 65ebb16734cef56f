"""What every test needs of the process that it runs in."""

import signal
from collections.abc import Iterator

import pytest

from tests.runtime import own_runtime_folder

# Commands in the background of a script, and of some CI systems, start with SIGINT ignored, and everything that they
# start inherits that. A handler of our own does not outlive exec: children then have the default again.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_runtime_folder() -> Iterator[None]:
    """Domains of tests are not among the user's own, and what serves them does not outlive the tests."""
    with own_runtime_folder():
        yield
