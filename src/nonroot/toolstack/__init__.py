"""Domain zero and the toolstack: what Xen's users know as ``xl``, and the process behind it.

:mod:`nonroot.toolstack.dom0` is that process (``python -m nonroot.toolstack``), one per user, started when it is
needed; :mod:`nonroot.toolstack.client` talks to it; :mod:`nonroot.toolstack.xlcfg` reads the syntax of xl's
configuration files and :mod:`nonroot.toolstack.config` says what is in them. Described in docs/toolstack.md.
"""
