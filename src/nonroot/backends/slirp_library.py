"""libslirp, by ctypes: a TCP/IP stack of a guest's network that lives in a process and makes ordinary sockets.

Source: libslirp 4.7's header libslirp.h (SLIRP_CONFIG_VERSION 4). Everything here is for one thread.
"""

import ctypes
import ipaddress
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from nonroot.errors import BadOptionError, SoftwareMissingError

__all__ = ["LIBRARY", "SlirpStack", "load"]

LIBRARY: Final = "libslirp.so.0"
OLDEST: Final = (4, 6)
_NEEDED: Final = (
    ("libpcre2-8-0", "libpcre2-8.so.0"),
    ("libglib2.0-0", "libglib-2.0.so.0"),
    ("libslirp0", LIBRARY),
)
"""Debian's packages and the libraries in them, each needing the ones before."""

CONFIG_VERSION: Final = 4
NEVER: Final = 0xFFFFFFFF

POLL_IN, POLL_OUT, POLL_PRI, POLL_ERR, POLL_HUP = 1, 2, 4, 8, 16
_TO_SYSTEM: Final = ((POLL_IN, select.POLLIN), (POLL_OUT, select.POLLOUT), (POLL_PRI, select.POLLPRI))
_FROM_SYSTEM: Final = (*_TO_SYSTEM, (POLL_ERR, select.POLLERR), (POLL_HUP, select.POLLHUP))
# Each combination of flags, as the other side has them: these are looked up for every socket in every round.
_ASKED: Final = [sum(there for ours, there in _TO_SYSTEM if events & ours) for events in range(32)]
_HAPPENED: Final = [sum(ours for ours, there in _FROM_SYSTEM if events & there) for events in range(32)]

_SEND = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_ERROR = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)
_CLOCK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_TIMER_DUE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_TIMER_NEW = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
_TIMER_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_TIMER_MOD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
_FD = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)
_NOTIFY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_ADD_POLL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
_GET_EVENTS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


class _Config(ctypes.Structure):
    _fields_ = [
        ("version", ctypes.c_uint32),
        ("restricted", ctypes.c_int),
        ("in_enabled", ctypes.c_bool),
        ("vnetwork", ctypes.c_uint32),
        ("vnetmask", ctypes.c_uint32),
        ("vhost", ctypes.c_uint32),
        ("in6_enabled", ctypes.c_bool),
        ("vprefix_addr6", ctypes.c_uint32 * 4),
        ("vprefix_len", ctypes.c_uint8),
        ("vhost6", ctypes.c_uint32 * 4),
        ("vhostname", ctypes.c_char_p),
        ("tftp_server_name", ctypes.c_char_p),
        ("tftp_path", ctypes.c_char_p),
        ("bootfile", ctypes.c_char_p),
        ("vdhcp_start", ctypes.c_uint32),
        ("vnameserver", ctypes.c_uint32),
        ("vnameserver6", ctypes.c_uint32 * 4),
        ("vdnssearch", ctypes.c_void_p),
        ("vdomainname", ctypes.c_char_p),
        ("if_mtu", ctypes.c_size_t),
        ("if_mru", ctypes.c_size_t),
        ("disable_host_loopback", ctypes.c_bool),
        ("enable_emu", ctypes.c_bool),
        ("outbound_addr", ctypes.c_void_p),
        ("outbound_addr6", ctypes.c_void_p),
        ("disable_dns", ctypes.c_bool),
        ("disable_dhcp", ctypes.c_bool),
    ]


class _Callbacks(ctypes.Structure):
    _fields_ = [
        ("send_packet", _SEND),
        ("guest_error", _ERROR),
        ("clock_get_ns", _CLOCK),
        ("timer_new", _TIMER_NEW),
        ("timer_free", _TIMER_FREE),
        ("timer_mod", _TIMER_MOD),
        ("register_poll_fd", _FD),
        ("unregister_poll_fd", _FD),
        ("notify", _NOTIFY),
        ("init_completed", ctypes.c_void_p),
        ("timer_new_opaque", ctypes.c_void_p),
    ]


def load(allow_fetch: bool = True) -> ctypes.CDLL:
    """The library: this machine's, else out of Debian's packages in the user's cache.

    SoftwareMissingError if there is none, or only one that is too old.
    """
    try:
        library = ctypes.CDLL(LIBRARY, use_errno=True)
    except OSError:
        library = _from_packages(allow_fetch)
    library.slirp_version_string.restype = ctypes.c_char_p
    version: bytes = library.slirp_version_string()
    if tuple(int(part) for part in version.split(b"-")[0].split(b".")[:2]) < OLDEST:
        raise SoftwareMissingError(f"the network needs libslirp 4.6 or later, and this machine's is {version.decode()}")
    library.slirp_new.restype = ctypes.c_void_p
    library.slirp_new.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.slirp_cleanup.argtypes = [ctypes.c_void_p]
    library.slirp_cleanup.restype = None
    library.slirp_input.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    library.slirp_input.restype = None
    library.slirp_pollfds_fill.argtypes = [ctypes.c_void_p, ctypes.c_void_p, _ADD_POLL, ctypes.c_void_p]
    library.slirp_pollfds_fill.restype = None
    library.slirp_pollfds_poll.argtypes = [ctypes.c_void_p, ctypes.c_int, _GET_EVENTS, ctypes.c_void_p]
    library.slirp_pollfds_poll.restype = None
    # struct in_addr is one 32-bit word, passed as such.
    forward: list[Any] = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_int]
    library.slirp_add_hostfwd.argtypes = forward
    return library


def _from_packages(allow_fetch: bool) -> ctypes.CDLL:
    library = None
    for name, file in _NEEDED:
        try:
            library = ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL, use_errno=True)
            continue
        except OSError:
            pass
        from nonroot.guests import packages

        folder = packages.package(name, allow_fetch=allow_fetch)
        found = sorted(path for path in Path(folder).rglob(file) if path.is_file())
        if not found:
            raise SoftwareMissingError(f"Debian's package {name} does not hold {file}")
        try:
            library = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL, use_errno=True)
        except OSError as error:
            raise SoftwareMissingError(f"{file} cannot be loaded: {error}") from None
    assert library is not None
    return library


def _ipv4(address: ipaddress.IPv4Address) -> int:
    """struct in_addr."""
    return int.from_bytes(address.packed, "little")


def _ipv6(text: str) -> Any:
    packed = ipaddress.IPv6Address(text).packed
    return (ctypes.c_uint32 * 4)(*(int.from_bytes(packed[at : at + 4], "little") for at in range(0, 16, 4)))


class SlirpStack:
    """One guest network. Frames go in by :meth:`input`, and come out of :meth:`poll` and :meth:`input` by ``send``."""

    def __init__(
        self,
        library: ctypes.CDLL,
        send: Callable[[bytes], object],
        *,
        network: ipaddress.IPv4Network,
        host_loopback: bool = False,
        outside: bool = True,
        ipv6: bool = True,
        mtu: int = 1500,
        hostname: str = "",
    ) -> None:
        """``host_loopback``: whether the gateway's address reaches this machine's 127.0.0.1. ``outside``: whether
        anything but this network and published ports can be reached. ``mtu``: bytes, of what is sent to the guest.
        """
        self._library = library
        self._send = send
        self._timers: dict[int, tuple[Any, int | None, int]] = {}
        self._next_timer = 1
        self._poll_set: list[tuple[int, int]] = []
        self._events: list[int] = []
        self.errors = 0
        """Malformed packets of the guest, as far as the library tells."""
        self.network = network
        self.gateway = network.network_address + 2
        self.name_server = network.network_address + 3
        self.guest = network.network_address + 15
        """The address that DHCP gives to the first who asks."""
        self._callbacks = _Callbacks(
            _SEND(self._on_send),
            _ERROR(self._on_error),
            _CLOCK(lambda _: time.monotonic_ns()),
            _TIMER_NEW(self._timer_new),
            _TIMER_FREE(lambda timer, _: self._timers.pop(timer or 0, None) and None),
            _TIMER_MOD(self._timer_mod),
            _FD(lambda fd, _: None),
            _FD(lambda fd, _: None),
            _NOTIFY(lambda _: None),
            None,
            None,
        )
        self._add_poll = _ADD_POLL(self._on_add_poll)
        self._get_events = _GET_EVENTS(self._on_get_events)
        config = _Config(
            version=CONFIG_VERSION,
            restricted=not outside,
            in_enabled=True,
            vnetwork=_ipv4(network.network_address),
            vnetmask=_ipv4(network.netmask),
            vhost=_ipv4(self.gateway),
            in6_enabled=ipv6,
            vprefix_addr6=_ipv6("fec0::"),
            vprefix_len=64,
            vhost6=_ipv6("fec0::2"),
            vhostname=hostname.encode() or None,
            vdhcp_start=_ipv4(self.guest),
            vnameserver=_ipv4(self.name_server),
            vnameserver6=_ipv6("fec0::3"),
            if_mtu=mtu,
            if_mru=65520,
            disable_host_loopback=not host_loopback,
        )
        self._config = config
        stack = library.slirp_new(ctypes.byref(config), ctypes.byref(self._callbacks), None)
        if not stack:
            raise BadOptionError(f"libslirp refuses the network {network} with an MTU of {mtu}")
        self._stack: int | None = stack

    # ── callbacks: nothing may raise through C ──

    def _on_send(self, buffer: int | None, length: int, _: object) -> int:
        if buffer:
            self._send(ctypes.string_at(buffer, length))
        return length

    def _on_error(self, message: bytes, _: object) -> None:
        self.errors += 1

    def _timer_new(self, due: int | None, argument: int | None, _: object) -> int:
        number = self._next_timer
        self._next_timer += 1
        self._timers[number] = (_TIMER_DUE(due or 0), argument, -1)
        return number

    def _timer_mod(self, timer: int | None, expire_ms: int, _: object) -> None:
        if timer in self._timers:
            due, argument, _old = self._timers[timer]
            self._timers[timer] = (due, argument, expire_ms)

    def _on_add_poll(self, fd: int, events: int, _: object) -> int:
        self._poll_set.append((fd, _ASKED[events & 31]))
        return len(self._poll_set) - 1

    def _on_get_events(self, index: int, _: object) -> int:
        if not 0 <= index < len(self._events):
            return 0
        return _HAPPENED[self._events[index] & 31]

    # ── for the loop ──

    def input(self, frame: bytes) -> None:
        """A frame of the guest."""
        self._library.slirp_input(self._stack, frame, len(frame))

    def interest(self) -> tuple[list[tuple[int, int]], float | None]:
        """(descriptor, events for poll(2)) of each socket, and seconds to wait at most."""
        self._poll_set = []
        timeout = ctypes.c_uint32(NEVER)
        self._library.slirp_pollfds_fill(self._stack, ctypes.byref(timeout), self._add_poll, None)
        wait = None if timeout.value == NEVER else timeout.value / 1000
        now = time.monotonic_ns() // 1_000_000
        for _, _, expire in self._timers.values():
            if expire >= 0:
                left = max(0, expire - now) / 1000
                wait = left if wait is None else min(wait, left)
        return self._poll_set, wait

    def poll(self, happened: dict[int, int]) -> None:
        """Tell what happened to the sockets of the last :meth:`interest`, by descriptor; timers that are due run."""
        self._events = [
            happened.get(fd, 0) & (events | select.POLLERR | select.POLLHUP) for fd, events in self._poll_set
        ]
        self._library.slirp_pollfds_poll(self._stack, 0, self._get_events, None)
        now = time.monotonic_ns() // 1_000_000
        for number, (due, argument, expire) in list(self._timers.items()):
            if 0 <= expire <= now and number in self._timers:
                self._timers[number] = (due, argument, -1)
                due(argument)

    def publish(self, udp: bool, host: ipaddress.IPv4Address, host_port: int, guest_port: int) -> OSError | None:
        """Forward a port of this machine to the guest. The error if that cannot be."""
        ctypes.set_errno(0)
        if self._library.slirp_add_hostfwd(self._stack, udp, _ipv4(host), host_port, _ipv4(self.guest), guest_port):
            number = ctypes.get_errno()
            return OSError(number, "")
        return None

    def close(self) -> None:
        """Close all sockets. Safe to call again."""
        stack, self._stack = self._stack, None
        if stack is not None:
            self._library.slirp_cleanup(stack)
