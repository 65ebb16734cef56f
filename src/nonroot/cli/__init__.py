"""The ``nonroot`` command: one module per family of verbs. Everything it does is a call of the Python API."""
