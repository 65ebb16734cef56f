"""Xen's interface for guests: hypercalls, event channels, grants, shared memory, time, and the consoles' rings.

``abi`` and its siblings hold numbers and layouts, ``host`` is the hypervisor side of one domain, ``backend`` is the
seam to what serves its paravirtual devices. docs/xen.md says what of Xen there is.
"""
