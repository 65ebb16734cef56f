"""The keyboard controller, the keyboard and the mouse; sequences from the IBM PS/2 technical reference."""

import os
import random
from dataclasses import dataclass, field

import pytest

from nonroot.devices.ps2 import COMMAND, DATA, KEY_NS, KEYS_WAITING, Ps2Controller
from nonroot.devices.ps2_codes import PAUSE, PRINT, SET2_TO_SET1, scan_codes
from nonroot.hvm.clock import ManualClock


@dataclass
class Line:
    level: bool = False
    edges: int = 0

    def __call__(self, level: bool) -> None:
        self.edges += level and not self.level
        self.level = level


@dataclass
class Seat:
    clock: ManualClock = field(default_factory=ManualClock)
    keyboard: Line = field(default_factory=Line)
    mouse: Line = field(default_factory=Line)
    resets: list[int] = field(default_factory=list)
    a20: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = Ps2Controller(
            self.clock, self.keyboard, self.mouse, lambda: self.resets.append(1), set_a20=self.a20.append
        )

    def command(self, *values: int) -> None:
        self.device.write(COMMAND, 1, values[0])
        for value in values[1:]:
            self.device.write(DATA, 1, value)

    def status(self) -> int:
        return self.device.read(COMMAND, 1)

    def drain(self) -> bytes:
        """What the guest reads while there is something."""
        result = bytearray()
        while self.status() & 1:
            result.append(self.device.read(DATA, 1))
            assert len(result) < 1000
        return bytes(result)

    def to_keyboard(self, *values: int) -> bytes:
        for value in values:
            self.device.write(DATA, 1, value)
        return self.drain()

    def to_mouse(self, *values: int) -> bytes:
        result = b""
        for value in values:
            self.command(0xD4, value)
            result += self.drain()
        return result

    def set_up(self, mode: int = 0x47) -> None:
        """As a BIOS does: self-test, both ports on, interrupts, translation."""
        self.command(0xAA)
        assert self.drain() == b"\x55"
        self.command(0x60, mode)

    def keys(self, *strokes: tuple[int, bool]) -> bytes:
        result = b""
        for key, pressed in strokes:
            self.device.key(key, pressed)
            self.clock.run(self.device, KEY_NS)
            result += self.drain()
        return result


@pytest.fixture
def seat() -> Seat:
    made = Seat()
    made.set_up()
    return made


# ── controller ──


def test_self_test_and_interface_tests() -> None:
    seat = Seat()
    assert seat.status() & 0x04 == 0
    seat.command(0xAA)
    assert seat.status() & 0x05 == 0x05
    assert seat.drain() == b"\x55"
    for test in (0xAB, 0xA9):
        seat.command(test)
        assert seat.drain() == b"\0"


def test_command_byte_and_ram(seat: Seat) -> None:
    seat.command(0x20)
    assert seat.drain() == b"\x47"
    seat.command(0xAD)
    seat.command(0xA7)
    seat.command(0x20)
    assert seat.drain() == b"\x77"
    seat.command(0x65, 0xAB)
    seat.command(0x25)
    assert seat.drain() == b"\xab"


def test_a20(seat: Seat) -> None:
    seat.command(0xD1, 0xDD)
    seat.command(0xD0)
    assert seat.drain()[0] & 2 == 0
    seat.command(0xDF)
    seat.command(0xD0)
    assert seat.drain()[0] & 2
    assert seat.a20 == [False, True]


@pytest.mark.parametrize("command", [(0xFE,), (0xF0,), (0xD1, 0x02)])
def test_reset_pulses(seat: Seat, command: tuple[int, ...]) -> None:
    seat.command(*command)
    assert seat.resets == [1]


def test_a_pulse_of_other_lines_resets_nothing(seat: Seat) -> None:
    seat.command(0xFF)
    seat.command(0xF1)
    assert seat.resets == []


def test_loopback_commands(seat: Seat) -> None:
    seat.command(0xD2, 0x5A)
    assert seat.status() & 0x21 == 0x01
    assert seat.keyboard.level
    assert seat.drain() == b"\x5a"
    seat.command(0xD3, 0xA5)
    assert seat.status() & 0x21 == 0x21
    assert seat.mouse.level
    assert seat.drain() == b"\xa5"
    assert not seat.mouse.level


# ── keyboard ──


def test_translation_is_the_documented_one() -> None:
    for key in [*range(1, 0x54), 0x54, 0x56, 0x57, 0x58]:
        make, release = scan_codes(key, True, 2), scan_codes(key, False, 2)
        assert len(make) == 1
        assert release == b"\xf0" + make
        assert SET2_TO_SET1[make[0]] == key, hex(key)
    # Some that everybody knows: escape, A, enter, F1, F7, keypad plus.
    known = {0x01: 0x76, 0x1E: 0x1C, 0x1C: 0x5A, 0x3B: 0x05, 0x41: 0x83, 0x4E: 0x79, 0x58: 0x07, 0x57: 0x78}
    assert {key: scan_codes(key, True, 2)[0] for key in known} == known


def test_a_key_is_translated_and_interrupts(seat: Seat) -> None:
    assert seat.keys((0x1E, True), (0x1E, False)) == b"\x1e\x9e"
    assert seat.keyboard.edges == 2
    assert seat.keys((0xC8, True), (0xC8, False)) == b"\xe0\x48\xe0\xc8"
    assert seat.mouse.edges == 0


def test_without_translation_it_is_set_2(seat: Seat) -> None:
    seat.command(0x60, 0x07)
    assert seat.keys((0x1E, True), (0x1E, False)) == b"\x1c\xf0\x1c"


def test_pause_and_print(seat: Seat) -> None:
    assert seat.keys((PAUSE, True), (PAUSE, False)) == b"\xe1\x1d\x45\xe1\x9d\xc5"
    assert seat.keys((PRINT, True), (PRINT, False)) == b"\xe0\x2a\xe0\x37\xe0\xb7\xe0\xaa"


def test_scan_code_set_1(seat: Seat) -> None:
    assert seat.to_keyboard(0xF0, 0x00) == b"\xfa\xfa\x41"  # translated: set 2
    seat.command(0x60, 0x07)
    assert seat.to_keyboard(0xF0, 0x01) == b"\xfa\xfa"
    assert seat.to_keyboard(0xF0, 0x00) == b"\xfa\xfa\x01"
    assert seat.keys((0x1E, True), (0x1E, False)) == b"\x1e\x9e"
    assert seat.to_keyboard(0xF0, 0x03) == b"\xfa\xfe"


def test_keyboard_commands(seat: Seat) -> None:
    assert seat.to_keyboard(0xEE) == b"\xee"
    assert seat.to_keyboard(0xF2) == b"\xfa\xab\x41"
    assert seat.to_keyboard(0xED, 0x05) == b"\xfa\xfa"
    assert seat.device.leds == 5
    assert seat.to_keyboard(0xF3, 0x20) == b"\xfa\xfa"
    assert seat.to_keyboard(0xFF) == b"\xfa\xaa"
    assert seat.device.leds == 0
    assert seat.to_keyboard(0x77) == b"\xfe"
    assert seat.to_keyboard(0xF5) == b"\xfa"
    assert seat.keys((0x1E, True)) == b""
    assert seat.to_keyboard(0xF4) == b"\xfa"
    assert seat.keys((0x1E, True)) == b"\x1e"
    assert seat.to_keyboard(0xFE) == b"\x1e"


def test_a_new_command_cancels_an_argument(seat: Seat) -> None:
    assert seat.to_keyboard(0xED, 0xF4) == b"\xfa\xfa"
    assert seat.device.leds == 0


def test_a_disabled_keyboard_waits(seat: Seat) -> None:
    seat.command(0xAD)
    assert seat.keys((0x1E, True)) == b""
    seat.command(0xAE)
    assert seat.drain() == b"\x1e"


def test_typed_keys_come_one_by_one_in_machine_time(seat: Seat) -> None:
    text = [(key, pressed) for key in range(2, 50) for pressed in (True, False)]
    for key, pressed in text:
        assert seat.device.key(key, pressed)
    assert seat.device.keys_waiting == len(text) - 1
    got = seat.drain()
    assert got == b"\x02"
    for _ in range(len(text) - 1):
        deadline = seat.device.deadline()
        assert deadline is not None
        seat.clock.time_ns = deadline
        seat.device.advance(deadline)
        got += seat.drain()
    assert got == bytes(key | (0 if pressed else 0x80) for key, pressed in text)
    assert seat.clock.time_ns == (len(text) - 1) * KEY_NS
    assert seat.device.deadline() is None, "nothing ticks when there is nothing to type"


def test_keys_that_nobody_reads_wait_and_wake_nobody(seat: Seat) -> None:
    for number in range(10_000):
        seat.device.key(0x1E, not number % 2)
        seat.clock.run(seat.device, KEY_NS)
    assert seat.device.deadline() is None
    assert seat.device.keys_waiting == KEYS_WAITING // 2
    assert not seat.device.key(0x1E, True)
    assert seat.drain()[:4] == b"\x1e\x9e\x1e\x9e"
    assert seat.device.deadline() is not None


# ── mouse ──


def test_mouse_reset_and_identity(seat: Seat) -> None:
    assert seat.to_mouse(0xFF) == b"\xfa\xaa\x00"
    assert seat.to_mouse(0xF2) == b"\xfa\x00"
    assert seat.to_mouse(0xE9) == b"\xfa\x00\x02\x64"
    assert seat.mouse.edges > 0


def test_mouse_movement(seat: Seat) -> None:
    seat.device.move(1, 1)
    assert seat.drain() == b"", "reporting is off"
    assert seat.to_mouse(0xF4) == b"\xfa"
    seat.device.move(5, -3, buttons=1)
    assert seat.drain() == bytes((0x09, 5, 3))
    seat.device.move(-1, 2, buttons=0)
    assert seat.drain() == bytes((0x38, 0xFF, 0xFE))
    seat.device.move(600, 0)
    assert seat.drain() == bytes((0x08, 255, 0, 0x08, 255, 0, 0x08, 90, 0))
    assert seat.to_mouse(0xF5) == b"\xfa"


def test_wheel(seat: Seat) -> None:
    assert seat.to_mouse(0xF3, 200, 0xF3, 100, 0xF3, 80, 0xF2) == b"\xfa" * 7 + b"\x03"
    seat.to_mouse(0xF4)
    seat.device.move(0, 0, -1)
    assert seat.drain() == bytes((0x08, 0, 0, 0xFF))


def test_five_buttons(seat: Seat) -> None:
    seat.to_mouse(0xF3, 200, 0xF3, 100, 0xF3, 80)
    seat.to_mouse(0xF3, 200, 0xF3, 200, 0xF3, 80)
    assert seat.to_mouse(0xF2) == b"\xfa\x04"
    seat.to_mouse(0xF4)
    seat.device.move(0, 0, 1, buttons=0x11)
    assert seat.drain() == bytes((0x09, 0, 0, 0x21))


def test_remote_and_wrap_mode(seat: Seat) -> None:
    seat.to_mouse(0xF0, 0xF4)
    seat.device.move(7, 0)
    assert seat.drain() == b""
    assert seat.to_mouse(0xEB) == bytes((0xFA, 0x08, 7, 0))
    assert seat.to_mouse(0xEE, 0x12, 0xEC, 0xE9)[:3] == b"\xfa\x12\xfa"


def test_a_guest_that_does_not_read_loses_no_movement(seat: Seat) -> None:
    seat.to_mouse(0xF4)
    for _ in range(100):
        seat.device.move(1, 0)
    data = seat.drain()
    assert sum(data[1::3]) == 100


def test_a_guest_that_does_not_read_loses_no_click(seat: Seat) -> None:
    seat.to_mouse(0xF4)
    for buttons in (None, 1, 0):
        seat.device.move(0 if buttons is not None else 5, 0, buttons=buttons)
    assert seat.drain() == bytes((0x08, 5, 0, 0x09, 0, 0, 0x08, 0, 0))
    for count in range(200):
        seat.device.move(1, 0, buttons=count & 1)
    data = seat.drain()
    assert sum(data[1::3]) == 200
    assert data[-3] & 1


def test_mouse_and_keyboard_share_the_buffer(seat: Seat) -> None:
    seat.to_mouse(0xF4)
    seat.device.key(0x1E, True)
    seat.device.move(1, 0)
    kinds = []
    while seat.status() & 1:
        kinds.append(bool(seat.status() & 0x20))
        assert (seat.mouse.level, seat.keyboard.level) == (kinds[-1], not kinds[-1])
        seat.device.read(DATA, 1)
    assert kinds == [False, True, True, True]


# ── anything ──


def hammer(rounds: int, seed: int) -> None:
    rng = random.Random(seed)
    seat = Seat()
    device, clock = seat.device, seat.clock
    getrandbits = rng.getrandbits
    for _ in range(rounds):
        kind = getrandbits(3)
        if kind < 3:
            device.write(kind & 1, 1, getrandbits(8))
        elif kind < 5:
            assert 0 <= device.read(kind & 1, 1) < 256
        elif kind == 5:
            device.key(getrandbits(8), bool(getrandbits(1)))
        elif kind == 6:
            device.move(getrandbits(10) - 512, getrandbits(10) - 512, getrandbits(3) - 4, getrandbits(5))
        else:
            clock.run(device, getrandbits(24))
    device.state().pack()


def test_random_accesses_never_raise() -> None:
    hammer(100_000, 3)


@pytest.mark.soak
def test_ten_million_random_accesses_never_raise() -> None:
    hammer(10_000_000, int(os.environ.get("NONROOT_SOAK_ROUND", "0")))
