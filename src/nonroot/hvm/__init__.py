"""The hypervisor of one domain: its own devices, the buses, interrupt routing, ACPI tables and the run loop.

As in Xen, interrupt controllers and timers belong to the hypervisor and not to the device model. The engine owns the
local APIC; everything else is here. Start at :mod:`nonroot.hvm.machine`.
"""
