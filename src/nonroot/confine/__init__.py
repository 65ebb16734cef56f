"""Takes away from processes of ours what they do not need, for good.

    force = confine(BACKEND)                   # once, before other threads start
    force.names, force.missing                 # what is in force, and what this host did not grant, and why

What each kind of process keeps is its :class:`~nonroot.confine.profiles.Profile`. The layers, each of which works
without privileges: limits, no new privileges, no capabilities, namespaces, Landlock, a seccomp filter. A layer that the
kernel or a container's own rules refuse is left out and named, because the process is of use without it.
"""

from nonroot.confine.process import Confinement, confine, give_up_files
from nonroot.confine.profiles import (
    BACKEND,
    DOMAIN,
    FOLDER_READER,
    FOLDER_WRITER,
    NETWORK,
    PLAIN,
    STUB,
    SWITCH,
    XENSTORE,
    Profile,
)

__all__ = [
    "BACKEND",
    "DOMAIN",
    "FOLDER_READER",
    "FOLDER_WRITER",
    "NETWORK",
    "PLAIN",
    "STUB",
    "SWITCH",
    "XENSTORE",
    "Confinement",
    "Profile",
    "confine",
    "give_up_files",
]
