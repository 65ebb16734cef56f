"""Names of keys, text as keys, and X11 key symbols: all become scan codes of a US keyboard.

A key's number is its set-1 scan code, plus 0x80 for keys that send an E0 prefix (QEMU's "xt" key numbers).
"""

from collections.abc import Iterator, Sequence
from typing import Final

from nonroot.errors import BadOptionError

__all__ = ["BUTTONS", "KEYS", "Stroke", "key_number", "keysym_to_key", "parse_keys", "strokes"]

Stroke = tuple[int, bool]
"""(key, pressed)."""

BUTTONS: Final = {"left": 0, "right": 1, "middle": 2, "side": 3, "extra": 4}
"""Mouse buttons: name -> bit."""

_ROWS: Final = (
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1E, "asdfghjkl;'`", 'ASDFGHJKL:"~'),
    (0x2B, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
    (0x39, " ", ""),
)
_PLAIN: Final = {character: first + at for first, low, _ in _ROWS for at, character in enumerate(low)}
_SHIFTED: Final = {character: first + at for first, _, high in _ROWS for at, character in enumerate(high)}

_NAMED: Final = {
    "esc": 0x01,
    "backspace": 0x0E,
    "bs": 0x0E,
    "tab": 0x0F,
    "ret": 0x1C,
    "enter": 0x1C,
    "ctrl": 0x1D,
    "shift": 0x2A,
    "shift_r": 0x36,
    "kp_multiply": 0x37,
    "alt": 0x38,
    "spc": 0x39,
    "space": 0x39,
    "caps_lock": 0x3A,
    **{f"f{number}": 0x3A + number for number in range(1, 11)},
    "num_lock": 0x45,
    "scroll_lock": 0x46,
    "kp_7": 0x47,
    "kp_8": 0x48,
    "kp_9": 0x49,
    "kp_subtract": 0x4A,
    "kp_4": 0x4B,
    "kp_5": 0x4C,
    "kp_6": 0x4D,
    "kp_add": 0x4E,
    "kp_1": 0x4F,
    "kp_2": 0x50,
    "kp_3": 0x51,
    "kp_0": 0x52,
    "kp_decimal": 0x53,
    "sysrq": 0x54,
    "less": 0x56,
    "f11": 0x57,
    "f12": 0x58,
    "kp_enter": 0x9C,
    "ctrl_r": 0x9D,
    "kp_divide": 0xB5,
    "print": 0xB7,
    "alt_r": 0xB8,
    "altgr": 0xB8,
    "pause": 0xC6,
    "home": 0xC7,
    "up": 0xC8,
    "pgup": 0xC9,
    "left": 0xCB,
    "right": 0xCD,
    "end": 0xCF,
    "down": 0xD0,
    "pgdn": 0xD1,
    "ins": 0xD2,
    "insert": 0xD2,
    "del": 0xD3,
    "delete": 0xD3,
    "meta": 0xDB,
    "super": 0xDB,
    "meta_r": 0xDC,
    "menu": 0xDD,
    "power": 0xDE,
}
KEYS: Final = {**{name: key for name, key in _PLAIN.items() if name != " "}, **_NAMED}
"""Name -> key: every character of an unshifted key, and the names of the others."""

_SHIFT: Final = KEYS["shift"]
_ESCAPES: Final = {"lt": "<", "gt": ">"}
MAX_TEXT: Final = 4000
"""Characters that are typed at once."""

_KEYSYMS: Final = {
    0xFF08: "backspace",
    0xFF09: "tab",
    0xFE20: "tab",
    0xFF0D: "ret",
    0xFF13: "pause",
    0xFF14: "scroll_lock",
    0xFF15: "sysrq",
    0xFF1B: "esc",
    0xFF50: "home",
    0xFF51: "left",
    0xFF52: "up",
    0xFF53: "right",
    0xFF54: "down",
    0xFF55: "pgup",
    0xFF56: "pgdn",
    0xFF57: "end",
    0xFF61: "print",
    0xFF63: "ins",
    0xFF67: "menu",
    0xFF6B: "pause",
    0xFF7E: "altgr",
    0xFE03: "altgr",
    0xFF7F: "num_lock",
    0xFF8D: "kp_enter",
    0xFF95: "kp_7",
    0xFF96: "kp_4",
    0xFF97: "kp_8",
    0xFF98: "kp_6",
    0xFF99: "kp_2",
    0xFF9A: "kp_9",
    0xFF9B: "kp_3",
    0xFF9C: "kp_1",
    0xFF9D: "kp_5",
    0xFF9E: "kp_0",
    0xFF9F: "kp_decimal",
    0xFFAA: "kp_multiply",
    0xFFAB: "kp_add",
    0xFFAD: "kp_subtract",
    0xFFAE: "kp_decimal",
    0xFFAF: "kp_divide",
    **{0xFFB0 + number: f"kp_{number}" for number in range(10)},
    **{0xFFBD + number: f"f{number}" for number in range(1, 13)},
    0xFFE1: "shift",
    0xFFE2: "shift_r",
    0xFFE3: "ctrl",
    0xFFE4: "ctrl_r",
    0xFFE5: "caps_lock",
    0xFFE7: "meta",
    0xFFE8: "meta_r",
    0xFFE9: "alt",
    0xFFEA: "alt_r",
    0xFFEB: "super",
    0xFFEC: "meta_r",
    0xFFFF: "del",
}


def key_number(name: str) -> int:
    """The key of that name; upper case does not matter for names. BadOptionError if there is none.

    >>> hex(key_number("ret"))
    '0x1c'
    """
    key = KEYS.get(name) or KEYS.get(name.lower())
    if key is None:
        import difflib

        near = difflib.get_close_matches(name.lower(), _NAMED, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadOptionError(f"there is no key {name[:40]!r}{hint}")
    return key


def _character(character: str) -> list[int]:
    """The keys held together for one character."""
    if character == "\n":
        return [KEYS["ret"]]
    if character == "\t":
        return [KEYS["tab"]]
    if character in _PLAIN:
        return [_PLAIN[character]]
    if character in _SHIFTED:
        return [_SHIFT, _SHIFTED[character]]
    raise BadOptionError(f"a US keyboard has no key for {character!r}")


def parse_keys(text: str) -> list[list[int]]:
    """Keys held together, one list after the other: characters, and names in ``<>`` joined by ``-``.

    ``<lt>`` is a ``<``. BadOptionError for what no key gives.

    >>> parse_keys("A<ctrl-c>")
    [[42, 30], [29, 46]]
    """
    if len(text) > MAX_TEXT:
        raise BadOptionError(f"{len(text)} characters are too many to type at once; {MAX_TEXT} are the most")
    chords: list[list[int]] = []
    at = 0
    while at < len(text):
        if text[at] != "<":
            chords.append(_character(text[at]))
            at += 1
            continue
        end = text.find(">", at)
        if end < 0:
            raise BadOptionError(f"{text[at : at + 20]!r} has no closing '>'; write <lt> for a '<'")
        name = text[at + 1 : end]
        if name in _ESCAPES:
            chords.append(_character(_ESCAPES[name]))
        elif name:
            chords.append([key_number(part) for part in _split(name)])
        else:
            raise BadOptionError("'<>' names no key; write <lt> for a '<'")
        at = end + 1
    return chords


def _split(name: str) -> list[str]:
    """``ctrl-alt-del`` at its hyphens; a hyphen at the end, or alone, is that key."""
    if name == "-":
        return ["-"]
    if name.endswith("--"):
        return [*name[:-2].split("-"), "-"]
    return name.split("-")


def strokes(chords: Sequence[Sequence[int]]) -> Iterator[Stroke]:
    """Press the keys of a chord in order, release them in reverse; then the next."""
    for chord in chords:
        for key in chord:
            yield key, True
        for key in reversed(chord):
            yield key, False


def keysym_to_key(keysym: int) -> int | None:
    """The key that has an X11 key symbol on a US keyboard, shifted or not; None if none has."""
    if 0x20 <= keysym <= 0x7E:
        character = chr(keysym)
        return _PLAIN.get(character) or _SHIFTED.get(character)
    name = _KEYSYMS.get(keysym)
    return None if name is None else KEYS[name]
