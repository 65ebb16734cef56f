import pytest

from nonroot.devices.ps2_codes import scan_codes
from nonroot.display.keys import KEYS, key_number, keysym_to_key, parse_keys, strokes
from nonroot.errors import BadOptionError


def test_every_character_of_a_us_keyboard() -> None:
    chords = parse_keys("".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "<") + "<lt>\n\t")
    assert len(chords) == 97
    assert len({tuple(chord) for chord in chords}) == 97


def test_known_keys() -> None:
    assert parse_keys("aA1!") == [[0x1E], [0x2A, 0x1E], [0x02], [0x2A, 0x02]]
    assert parse_keys("<ctrl-alt-del>") == [[0x1D, 0x38, 0xD3]]
    assert parse_keys("<ctrl-c><CTRL-->") == [[0x1D, 0x2E], [0x1D, 0x0C]]
    assert parse_keys("<f12><up><ret><->") == [[0x58], [0xC8], [0x1C], [0x0C]]


def test_chords_are_released_in_reverse() -> None:
    assert list(strokes([[1, 2], [3]])) == [(1, True), (2, True), (2, False), (1, False), (3, True), (3, False)]


@pytest.mark.parametrize("name", sorted(KEYS))
def test_every_key_has_scan_codes(name: str) -> None:
    assert scan_codes(key_number(name), True, 2)
    assert scan_codes(key_number(name), True, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<", "no closing"),
        ("<>", "names no key"),
        ("<retrun>", "did you mean"),
        ("é", "no key for 'é'"),
        ("\x00", "no key for"),
        ("a" * 5000, "too many"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(BadOptionError, match=message):
        parse_keys(text)


def test_keysyms() -> None:
    known = {0x61: 0x1E, 0x41: 0x1E, 0x21: 0x02, 0xFF0D: 0x1C, 0xFF1B: 0x01, 0xFFBE: 0x3B, 0xFFC9: 0x58, 0xFF52: 0xC8}
    assert {keysym: keysym_to_key(keysym) for keysym in known} == known
    assert keysym_to_key(0x20) == 0x39
    assert keysym_to_key(0x1000000) is None
    assert keysym_to_key(0) is None
