"""``python -m nonroot`` is the ``nonroot`` command."""

from nonroot.cli.main import entry

entry()
