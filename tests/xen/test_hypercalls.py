"""Hypercalls, each against what Xen's headers say, in both interfaces."""

import struct

import pytest

from nonroot.xen import abi
from nonroot.xen.abi import Param
from nonroot.xen.backend import EventChannelError, GrantError
from nonroot.xen.config import XenConfig
from nonroot.xen.layout import TIME_RECORD
from tests.xen.domain import ARGUMENTS, SECOND, SHARED_GFN, WALL, Domain

both = pytest.mark.parametrize("long", [True, False], ids=["64", "32"])
ENOSYS, EINVAL, EPERM, EFAULT, ENOENT, EEXIST, ETIME, ESRCH = -38, -22, -1, -14, -2, -17, -62, -3


def test_cpuid_says_xen_and_the_version() -> None:
    leaves = {(leaf, sub): values for leaf, sub, *values in abi.cpuid_leaves(7, 1_000_000)}
    base = leaves[0x4000_0000, 0xFFFF_FFFF]
    assert struct.pack("<3I", *base[1:]) == b"XenVMMXenVMM"
    assert base[0] == 0x4000_0004
    assert leaves[0x4000_0001, 0xFFFF_FFFF][0] == 4 << 16 | 17
    assert leaves[0x4000_0002, 0xFFFF_FFFF][:2] == [1, 0x4000_0000]
    assert leaves[0x4000_0004, 0xFFFF_FFFF][2] == 7


@pytest.mark.parametrize("khz", [100_000, 1_000_000, 2_500_000, 3_333_333])
def test_the_clock_scale_is_exact(khz: int) -> None:
    mul, shift = abi.tsc_scale(khz)
    assert 1 << 31 <= mul < 1 << 32
    ticks = khz * 1000 * 100  # 100 s
    scaled = (ticks << shift if shift >= 0 else ticks >> -shift) * mul >> 32
    assert abs(scaled - 100 * SECOND) < 100


@both
def test_unknown_hypercalls_and_commands_are_refused(long: bool) -> None:
    domain = Domain(long)
    for number in (0, 1, 6, 11, 19, 27, 31, 33, 36, 41, 55, 127, 128, 0xFFFF_FFFF):
        assert domain.call(number) == ENOSYS
    assert ("xen", "unknown-hypercall-36", 36) in domain.events
    for number in (12, 17, 20, 24, 29, 32, 34):
        assert domain.call(number, 63) == ENOSYS
    domain.vcpu.level = 3
    assert domain.call(17, 0) == EPERM


@both
def test_version(long: bool) -> None:
    domain = Domain(long, XenConfig(handle=bytes(range(16))))
    assert domain.call(17, 0) == 4 << 16 | 17
    assert domain.call(17, 7) == 4096
    result, data = domain.call_with(17, 6, struct.pack("<II", 0, 0))
    assert (result, struct.unpack("<II", data)[1] & 0x305) == (0, 0x305)
    assert domain.call_with(17, 6, struct.pack("<II", 9, 1))[1][4:] == bytes(4)
    assert domain.call_with(17, 3, bytes(1024))[1].startswith(b"hvm-3.0-x86_32 ")
    assert domain.call_with(17, 8, bytes(16))[1] == bytes(range(16))
    assert domain.call(17, 6, 1 << 40 if long else 0xF000_0000) == EFAULT


@both
def test_shared_page_has_clock_and_wall_clock(long: bool) -> None:
    domain = Domain(long)
    before = domain.memory.read(SHARED_GFN * 4096, 64)
    domain.map_shared_info()
    assert domain.memory.read(SHARED_GFN * 4096, 64) != before
    record = TIME_RECORD.unpack(domain.memory.read(SHARED_GFN * 4096 + 32, 32))
    assert record[4]  # a zero would make guests divide by it
    assert record[0] % 2 == 0
    assert record[6] & 1
    domain.call_with(34, 0, struct.pack("<H2xIQ", 0x7FF0, 0, 2 << 56 | 0xF3))  # shows the layout
    wall = domain.abi.wall_clock
    seconds = domain.shared(wall + 4) | domain.shared(domain.abi.wall_clock_high) << 32
    assert (seconds, domain.shared(wall + 8)) == divmod(WALL, SECOND)
    assert domain.shared(wall) % 2 == 0


@both
def test_events_reach_the_vcpu_once_until_it_looks(long: bool) -> None:
    domain = Domain(long)
    domain.call_with(34, 0, struct.pack("<H2xIQ", 0x7FF0, 0, 2 << 56 | 0xF3))
    domain.map_shared_info()
    domain.set_vector()
    domain.vcpu.signals.clear()
    domain.set_shared(0, 0)  # nothing is pending
    domain.set_shared(domain.abi.selector, 0, domain.abi.word)
    port = domain.alloc_unbound()
    woken: list[int] = []
    backend = domain.host.bind_interdomain(port, lambda: woken.append(1))
    assert woken == [1]
    assert domain.call_with(32, 4, struct.pack("<I", port))[0] == 0
    assert woken == [1, 1]
    backend.notify()
    backend.notify()
    assert domain.vcpu.signals == [0xF3]
    assert domain.shared(domain.abi.pending) >> port & 1
    assert domain.shared(0, 1) == 1
    assert domain.shared(domain.abi.selector) & 1
    # The guest takes it, and masks the port: silence, but pending; unmasking delivers.
    domain.set_shared(0, 0, 1)
    domain.set_shared(domain.abi.selector, 0)
    domain.set_shared(domain.abi.pending, 0)
    domain.set_shared(domain.abi.mask, 1 << port)
    backend.notify()
    assert domain.vcpu.signals == [0xF3]
    assert domain.shared(domain.abi.pending) >> port & 1
    assert domain.call_with(32, 9, struct.pack("<I", port))[0] == 0
    assert domain.vcpu.signals == [0xF3, 0xF3]
    assert domain.call_with(32, 3, struct.pack("<I", port))[0] == 0
    backend.notify()
    assert len(domain.vcpu.signals) == 2
    with pytest.raises(EventChannelError):
        domain.host.bind_interdomain(port, lambda: None)


def test_ports_are_what_they_were_made_as() -> None:
    domain = Domain()
    domain.map_shared_info()
    unbound = domain.alloc_unbound(5)
    with pytest.raises(EventChannelError):
        domain.host.bind_interdomain(unbound, lambda: None)  # not for domain 0
    assert domain.call_with(32, 4, struct.pack("<I", unbound))[0] == 0  # nobody hears it
    result, data = domain.call_with(32, 1, struct.pack("<III", 0, 0, 0))
    timer = struct.unpack("<III", data)[2]
    assert result == 0
    assert domain.call_with(32, 1, struct.pack("<III", 0, 0, 0))[0] == EEXIST
    assert domain.call_with(32, 1, struct.pack("<III", 3, 0, 0))[0] == EPERM  # domain 0's
    assert domain.call_with(32, 1, struct.pack("<III", 99, 0, 0))[0] == EINVAL
    assert domain.call_with(32, 1, struct.pack("<III", 1, 4, 0))[0] == ENOENT
    assert domain.call_with(32, 4, struct.pack("<I", timer))[0] == EINVAL
    assert domain.call_with(32, 8, struct.pack("<II", timer, 0))[0] == EINVAL
    status = struct.Struct("<H2xIIIII")
    kinds = {}
    for port in (timer, unbound, 4000):
        result, data = domain.call_with(32, 5, status.pack(0x7FF0, port, 9, 9, 9, 9))
        assert result == 0
        kinds[port] = status.unpack(data)[2:5]
    assert kinds == {timer: (4, 0, 0), unbound: (1, 0, 5), 4000: (0, 0, 0)}
    assert domain.call_with(32, 5, status.pack(0x7FF0, 4096, 0, 0, 0, 0))[0] == EINVAL
    # A channel to oneself
    own = domain.alloc_unbound(0x7FF0)
    result, data = domain.call_with(32, 0, struct.pack("<H2xII", 0x7FF0, own, 0))
    other = struct.unpack("<H2xII", data)[2]
    assert result == 0
    domain.set_shared(2048, 0, 8)
    assert domain.call_with(32, 4, struct.pack("<I", other))[0] == 0
    assert domain.shared(2048) >> own & 1


def test_ports_run_out_and_are_found_again() -> None:
    domain = Domain(long=False)
    domain.call_with(34, 0, struct.pack("<H2xIQ", 0x7FF0, 0, 2 << 56 | 0xF3))
    taken = [domain.alloc_unbound() for _ in range(1024 - 1 - 2)]
    assert domain.call_with(32, 6, struct.pack("<HHI", 0x7FF0, 0, 0))[0] == -28
    assert domain.call_with(32, 3, struct.pack("<I", taken[7]))[0] == 0
    assert domain.alloc_unbound() == taken[7]


@both
def test_timers(long: bool) -> None:
    domain = Domain(long)
    domain.call_with(34, 0, struct.pack("<H2xIQ", 0x7FF0, 0, 2 << 56 | 0xF3))
    domain.map_shared_info()
    _, data = domain.call_with(32, 1, struct.pack("<III", 0, 0, 0))
    port = struct.unpack("<III", data)[2]

    def fired() -> bool:
        pending = domain.shared(domain.abi.pending) >> port & 1
        domain.set_shared(domain.abi.pending, 0)
        return bool(pending)

    singleshot = domain.abi.singleshot
    domain.memory.write(ARGUMENTS, singleshot.pack(5000, 0))
    assert domain.call(24, 8, 0, ARGUMENTS) == 0
    assert domain.host.deadline() == 5000
    domain.advance(4999)
    assert not fired()
    domain.advance(1)
    assert fired()
    assert domain.host.deadline() is None
    domain.memory.write(ARGUMENTS, singleshot.pack(100, 1))
    assert domain.call(24, 8, 0, ARGUMENTS) == ETIME
    domain.memory.write(ARGUMENTS, singleshot.pack(100, 0))
    assert domain.call(24, 8, 0, ARGUMENTS) == 0
    assert fired()
    assert domain.call(24, 8, 1, ARGUMENTS) == ENOENT
    domain.memory.write(ARGUMENTS, struct.pack("<Q", 1_000_000))
    assert domain.call(24, 6, 0, ARGUMENTS) == 0
    for _ in range(3):
        domain.advance(1_000_000)
        assert fired()
    domain.advance(10_000_000)  # missed ticks are one
    assert fired()
    assert domain.call(24, 7, 0) == 0
    assert domain.host.deadline() is None
    when = domain.clock.time_ns + 777
    assert domain.call(15, when & (1 << 64 if long else 1 << 32) - 1, 0 if long else when >> 32) == 0
    assert domain.host.deadline() == when
    assert domain.call(15, 0, 0) == 0
    assert domain.host.deadline() is None


@both
def test_vcpu_info_moves_with_what_is_pending(long: bool) -> None:
    domain = Domain(long)
    domain.call_with(34, 0, struct.pack("<H2xIQ", 0x7FF0, 0, 2 << 56 | 0xF3))
    domain.map_shared_info()
    domain.set_vector()
    domain.memory.write(ARGUMENTS, struct.pack("<QII", 0x60, 4096 - 60, 0))
    assert domain.call(24, 10, 0, ARGUMENTS) == EINVAL  # across a page
    domain.memory.write(ARGUMENTS, struct.pack("<QII", 1 << 40, 0, 0))
    assert domain.call(24, 10, 0, ARGUMENTS) == EINVAL
    domain.memory.write(ARGUMENTS, struct.pack("<QII", 0x60, 128, 0))
    assert domain.call(24, 10, 0, ARGUMENTS) == 0
    assert domain.call(24, 10, 0, ARGUMENTS) == EINVAL  # once only
    place = 0x60 * 4096 + 128
    assert domain.memory.read(place, 1) == b"\1"
    assert domain.memory.read(place + 32, 32) == domain.host.shared.time_record()
    domain.memory.write(place, bytes(32))
    port = domain.alloc_unbound()
    backend = domain.host.bind_interdomain(port, lambda: None)
    domain.vcpu.signals.clear()
    domain.set_shared(domain.abi.pending, 0)
    backend.notify()
    assert domain.memory.read(place, 1) == b"\1"
    assert domain.vcpu.signals == [0xF3]
    assert domain.shared(0, 1) in (0, 1)  # the old place is the guest's to use


@both
def test_runstate(long: bool) -> None:
    domain = Domain(long)
    domain.memory.write(ARGUMENTS, struct.pack("<Q", ARGUMENTS + 4096 - 16))  # across two pages
    assert domain.call(24, 5, 0, ARGUMENTS) == 0
    domain.clock.time_ns = 1000
    domain.host.slept(400)
    layout = domain.abi.runstate
    state, since, running, _, blocked, _ = layout.unpack(domain.memory.read(ARGUMENTS + 4080, layout.size))
    assert (state, since, running, blocked) == (0, 1000, 400, 600)
    domain.memory.write(ARGUMENTS, struct.pack("<Q", 1 << 50))
    assert domain.call(24, 5, 0, ARGUMENTS) == EFAULT


def test_callbacks_by_vector_and_by_line() -> None:
    domain = Domain()
    domain.map_shared_info()
    port = domain.alloc_unbound()
    backend = domain.host.bind_interdomain(port, lambda: None)

    def clear() -> None:
        domain.set_shared(0, 0, 16)
        domain.set_shared(2048, 0, 8)

    param = struct.Struct("<H2xIQ")
    clear()
    assert domain.call_with(34, 0, param.pack(0x7FF0, 0, 2 << 56 | 0xF3))[0] == 0
    backend.notify()
    assert domain.vcpu.injected == [0xF3]
    clear()
    assert domain.call_with(34, 0, param.pack(0x7FF0, 0, 10))[0] == 0
    backend.notify()
    assert domain.lines.get(10) is True
    due = domain.host.deadline()
    assert due is not None
    domain.advance(due)
    assert domain.lines.get(10) is True
    clear()
    domain.advance(due)
    assert domain.lines.get(10) is False
    assert domain.host.deadline() is None
    assert domain.call_with(34, 0, param.pack(0x7FF0, 0, 1 << 56 | 5 << 11 | 1))[0] == 0
    backend.notify()
    assert domain.lines.get((5, 1)) is True
    clear()
    domain.call(17, 0)  # any hypercall looks
    assert domain.lines.get((5, 1)) is False
    assert domain.call_with(34, 23, struct.pack("<IB3x", 0, 15))[0] == EINVAL
    assert domain.call_with(34, 23, struct.pack("<IB3x", 1, 32))[0] == EINVAL


def test_parameters() -> None:
    domain = Domain()
    param = struct.Struct("<H2xIQ")

    def get(index: int) -> tuple[int, int]:
        result, data = domain.call_with(34, 1, param.pack(0x7FF0, index, 0))
        return result, param.unpack(data)[2]

    assert get(Param.CONSOLE_PFN) == (0, 0xFEFFF)
    assert get(Param.CONSOLE_EVTCHN)[1] == domain.host.console_port
    assert get(Param.STORE_PFN) == (0, 0)  # nothing serves it
    domain.host.attach_store(lambda data: None)
    assert get(Param.STORE_PFN) == (0, 0xFEFFC)
    assert get(9)[0] == EPERM
    assert get(39)[0] == EINVAL
    assert domain.call_with(34, 0, param.pack(0x7FF0, 1, 5))[0] == EPERM
    assert domain.call_with(34, 0, param.pack(2, 0, 5))[0] == ESRCH


def test_shutdown_and_waiting() -> None:
    domain = Domain()
    domain.map_shared_info()
    domain.set_shared(0, 0, 16)
    assert domain.call_with(29, 2, struct.pack("<I", 1))[0] == 0
    assert domain.call_with(29, 4, struct.pack("<H2xI", 0x7FF0, 3))[0] == 0
    assert domain.call_with(29, 4, struct.pack("<H2xI", 4, 3))[0] == ESRCH
    assert domain.call_with(29, 2, struct.pack("<I", 9))[0] == EINVAL
    assert domain.call_with(29, 2, struct.pack("<I", 2))[0] == 1  # suspend: cancelled
    assert domain.reasons == [1, 3]
    port = domain.alloc_unbound()
    backend = domain.host.bind_interdomain(port, lambda: None)
    domain.set_shared(2048, 0, 8)
    domain.memory.write(ARGUMENTS + 64, struct.pack("<I", port))
    poll = domain.abi.poll.pack(ARGUMENTS + 64, 1, 5000)
    assert domain.call_with(29, 3, poll)[0] == 0
    assert domain.sleeps == [5000]
    backend.notify()
    assert domain.call_with(29, 3, poll)[0] == 0
    assert domain.sleeps == [5000]
    assert domain.call_with(29, 3, domain.abi.poll.pack(ARGUMENTS + 64, 129, 0))[0] == EINVAL
    domain.set_shared(0, 0, 16)
    assert domain.call(29, 1) == 0
    assert domain.sleeps == [5000, None]


def test_hypercall_page() -> None:
    domain = Domain()
    assert not domain.host.write_msr(0x4000_0000, 0x10_0001)
    assert not domain.host.write_msr(0x4000_0000, 1 << 39)
    assert not domain.host.write_msr(0x4000_0001, 0x10_0000)
    assert domain.host.write_msr(0x4000_0000, 0x10_0000)
    page = domain.memory.read(0x10_0000, 4096)
    assert page[17 * 32 : 17 * 32 + 9] == b"\xb8\x11\0\0\0\x0f\x01\xc1\xc3"
    assert page[23 * 32 : 23 * 32 + 2] == b"\x0f\x0b"
    assert domain.host.read_msr(0x4000_0000) == 0
    assert domain.host.read_msr(0x4000_0001) is None


def test_console_output_and_input() -> None:
    domain = Domain()
    console = domain.host.console
    assert console is not None
    page = 0xFEFFF * 4096
    domain.memory.write(page + 1024, b"hello\n")
    domain.memory.write(page + 3084, struct.pack("<I", 6))
    assert len(console) == 0
    assert domain.call_with(32, 4, struct.pack("<I", domain.host.console_port))[0] == 0
    assert domain.console == b"hello\n"
    assert console.connected
    assert domain.memory.read(page + 3080, 4) == struct.pack("<I", 6)
    console.input(b"k" * 1500)
    assert domain.memory.read(page + 3076, 4) == struct.pack("<I", 1024)
    assert len(console) == 476
    domain.memory.write(page + 3072, struct.pack("<I", 1000))
    domain.call_with(32, 4, struct.pack("<I", domain.host.console_port))
    assert len(console) == 0
    # Indices that cannot be are no output, and nothing worse.
    domain.memory.write(page + 3084, struct.pack("<I", 0x8000_0000))
    domain.call_with(32, 4, struct.pack("<I", domain.host.console_port))
    assert domain.console == b"hello\n"
    assert domain.call(18, 0, 5, page + 1024) == 0
    assert domain.debug == b"hello"


def test_store_ring_carries_bytes_both_ways() -> None:
    domain = Domain()
    asked = bytearray()
    reply = domain.host.attach_store(asked.extend)
    page = 0xFEFFC * 4096
    domain.memory.write(page, b"request")
    domain.memory.write(page + 2052, struct.pack("<I", 7))
    domain.call_with(32, 4, struct.pack("<I", domain.host.store_port))
    assert asked == b"request"
    reply(b"x" * 2000)
    assert domain.memory.read(page + 2060, 4) == struct.pack("<I", 1024)
    domain.memory.write(page + 2056, struct.pack("<I", 1024))
    domain.call_with(32, 4, struct.pack("<I", domain.host.store_port))
    assert domain.memory.read(page + 2060, 4) == struct.pack("<I", 2000)


def test_a_restart_is_a_power_on() -> None:
    domain = Domain()
    before = domain.memory.runs()
    domain.map_shared_info()
    domain.set_vector()
    port = domain.alloc_unbound()
    backend = domain.host.bind_interdomain(port, lambda: None)
    domain.host.reset()
    assert domain.memory.runs() == before
    domain.vcpu.signals.clear()
    backend.notify()
    assert domain.vcpu.signals == []
    assert domain.host.console_port == 2
    with pytest.raises(GrantError):
        domain.host.grants.map(9)
