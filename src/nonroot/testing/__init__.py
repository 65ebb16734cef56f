"""Test kit for code that uses nonroot: an assembler, the engines' contract suite, pytest fixtures."""
