"""Starting a kernel: what to put where in guest memory, and in which state the vCPU enters it.

:func:`nonroot.boot.plan.plan_boot` reads a kernel image and returns a :class:`~nonroot.boot.plan.BootPlan`; everything
here is a function of bytes to bytes. A file that cannot be booted raises :class:`~nonroot.boot.errors.BootError`.
"""
