"""Whatever registers and arguments a guest uses: every hypercall ends with a number, and the domain goes on."""

import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.xen.domain import ARGUMENTS, Domain

NUMBERS = [12, 13, 15, 17, 18, 20, 21, 24, 29, 32, 34]
words = st.one_of(
    st.integers(0, 16),
    st.sampled_from([ARGUMENTS, ARGUMENTS + 64, ARGUMENTS + 4090, 0x7FF0, 0x50, 0xFEFFF, 0xFEE00, 4096, 1 << 28]),
    st.sampled_from([0xFFFF_FFFF, (1 << 64) - 1, 1 << 63, 0x8000_0000, 0xFFFF_FFFC]),
    st.integers(0, (1 << 64) - 1),
)
calls = st.tuples(st.sampled_from(NUMBERS), st.integers(0, 26), st.lists(words, min_size=3, max_size=6))
arguments = st.lists(st.one_of(st.integers(0, 40), words), max_size=10)


@settings(max_examples=25, deadline=None)
@given(st.booleans(), st.lists(st.tuples(calls, arguments), min_size=1, max_size=12))
def test_nothing_that_a_guest_says_breaks_its_hypervisor(long: bool, script: list[tuple]) -> None:  # type: ignore[type-arg]
    domain = Domain(long)
    domain.map_shared_info()
    for (number, command, args), contents in script:
        data = b"".join(struct.pack("<Q" if value >> 32 else "<I", value) for value in contents)
        domain.memory.write(ARGUMENTS, data)
        first = args[0] if number in (13, 15) else command
        pointer = ARGUMENTS if args[1] % 3 else args[1]
        count = args[2] & 0x3FF if number == 20 else args[2]
        more = (ARGUMENTS, *args[3:]) if number == 24 else (count, *args[3:])
        result = domain.call(number, first, pointer, *more)
        assert -200 < result < 1 << 32
        domain.advance(1000)
        due = domain.host.deadline()
        assert due is None or due >= domain.clock.time_ns
    # Still there
    domain.vcpu.level = 0
    assert domain.call(17, 0) == 4 << 16 | 17
    domain.host.reset()
    domain.map_shared_info()


@settings(max_examples=25, deadline=None)
@given(st.binary(min_size=16, max_size=16), st.binary(min_size=24, max_size=24))
def test_rings_with_impossible_indices_do_no_harm(console: bytes, store: bytes) -> None:
    domain = Domain()
    reply = domain.host.attach_store(lambda data: None)
    domain.memory.write(0xFEFFF * 4096 + 3072, console)
    domain.memory.write(0xFEFFC * 4096 + 2048, store)
    for port in (domain.host.console_port, domain.host.store_port):
        domain.call_with(32, 4, struct.pack("<I", port))
    assert domain.host.console is not None
    domain.host.console.input(b"keys")
    reply(b"answer")
    assert len(domain.console) <= 2048
