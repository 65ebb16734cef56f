"""Seeing and operating a domain's screen: pictures of it, keys, and the VNC server.

What is drawn comes from the display adapter's record and its memory (:mod:`nonroot.display.render`); both reach the
domain's process and its clients through the control socket. Nothing here runs in the domain's own process but
:mod:`nonroot.display.keys`' names.
"""
