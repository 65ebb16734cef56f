"""
Guest mode on real hardware through /dev/kvm: the layer under the ``kvm`` engine.

It makes virtual machines, memory slots that follow a p2m, and vCPUs that run guest code and return
:mod:`nonroot.engines.exits`. The engine itself (local APIC, state records, MSR policy) is not here yet, so that
:mod:`nonroot.engines.select` does not offer it.
"""
