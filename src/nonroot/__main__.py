"""``python -m nonroot`` is the ``nonroot`` command."""

from nonroot.cli.start import entry

entry()
