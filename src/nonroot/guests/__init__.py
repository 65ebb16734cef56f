"""Guest software: kernels and userland, found, fetched and kept in the user's cache.

>>> from nonroot.guests import linux
>>> guest = linux("cloud-amd64")  # fetched at the first call
>>> guest.kernel, guest.initrd  # doctest: +SKIP
"""

from nonroot.guests.linux import DEFAULT_FLAVOUR, FLAVOURS, Guest, cached, fetch, linux, tiny
from nonroot.guests.progress import progress_bar

__all__ = ["DEFAULT_FLAVOUR", "FLAVOURS", "Guest", "cached", "fetch", "linux", "progress_bar", "tiny"]
