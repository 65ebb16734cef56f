"""
Guest mode on real hardware through /dev/kvm: the ``kvm`` engine (:mod:`nonroot.engines.kvm.engine`) and the layer under
it, virtual machines, memory slots that follow a p2m, and vCPUs that run guest code and return
:mod:`nonroot.engines.exits`.
"""
