"""Guest software that a test cannot do without."""

import os

import pytest

from nonroot.guests import Guest, cached

__all__ = ["need"]


def need(flavour: str, how: str = "make guests") -> Guest:
    """The fetched guest; in CI its absence is a failure, elsewhere a reason to skip. ``how``: what fetches it."""
    guest = cached(flavour)
    if guest is None:
        message = f"Debian's {flavour} kernel has not been fetched ({how})"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return guest
