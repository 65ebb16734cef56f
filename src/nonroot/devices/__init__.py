"""Emulated devices of the PC: what a system that knows nothing of us expects to find.

Each is a pure object, as :mod:`nonroot.hvm.device` says; those on the PCI bus derive from
:class:`nonroot.devices.pci_device.PciDevice`. :mod:`nonroot.hvm.pc` puts them on the board.
"""
