"""The process of one domain, and how its clients talk to it.

One domain, one process: a crash or an escape stays there. :mod:`nonroot.domain.process` is that process (``python -m
nonroot.domain``), :mod:`nonroot.domain.client` the other end of its control socket, :mod:`nonroot.domain.wire` the
protocol between them, and :mod:`nonroot.domain.frames` the one between the domain process and the agent in the guest.
"""
