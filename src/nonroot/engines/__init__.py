"""
The CPU engines behind one seam.

:mod:`~nonroot.engines.protocol` says what an engine is, :mod:`~nonroot.engines.exits` why a vCPU stops,
:mod:`~nonroot.engines.state` how its state is recorded, :mod:`~nonroot.engines.policy` which CPU guests see,
:mod:`~nonroot.engines.native` binds the Rust engines, :mod:`~nonroot.engines.select` chooses one.
"""
