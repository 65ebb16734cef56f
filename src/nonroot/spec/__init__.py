"""
A model of the CPU's system side, written from the manuals: page walks, segments, delivery of events, far transfers.

It is the engines' judge and made to be read: plain functions over a small state (:class:`nonroot.spec.state.State`)
and a memory that records writes, with the manual's section in each docstring. Nothing here is fast, and nothing is
shared with the engines.

SDM is the Intel 64 and IA-32 Architectures Software Developer's Manual.
"""
