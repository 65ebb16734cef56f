"""The syntax of xl's configuration files: settings of numbers, strings and lists.

    config    = { [ setting ] ( newline | ";" ) }
    setting   = name ( "=" | "+=" ) value
    value     = number | string | "[" { newline } [ value { "," value } [ "," ] ] "]"

Line breaks are free inside of lists; ``#`` starts a comment; strings take either quotes, end on their line, and know
the escapes of C. A setting that is made again replaces the first; ``+=`` adds to a list or a string.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from nonroot.errors import BadOptionError

__all__ = ["MAX_TEXT", "ConfigSyntaxError", "Setting", "Value", "format_config", "format_value", "parse"]

Value = str | int | list["Value"]
"""A setting's value."""

MAX_TEXT: Final = 1 << 20
"""Characters of a configuration."""
MAX_DEPTH: Final = 16
"""Lists within lists."""
MAX_NUMBER: Final = (1 << 63) - 1

_NAME_START: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_NAME: Final = _NAME_START | frozenset("0123456789")
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_HEX: Final = frozenset("0123456789abcdefABCDEF")


class ConfigSyntaxError(BadOptionError):
    """Text that is no configuration; ``line`` and ``column`` count from 1."""

    def __init__(self, source: str, line: int, column: int, problem: str) -> None:
        super().__init__(f"{source}, line {line}, column {column}: {problem}", line=line, column=column)
        self.line = line
        self.column = column


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, and where it was made."""

    value: Value
    line: int
    column: int


def parse(text: str, source: str = "the configuration") -> dict[str, Setting]:
    """The settings of ``text``, in order of their first appearance. ConfigSyntaxError, with line and column.

    >>> parse("name = 'web'; memory = 0x100")["memory"].value
    256
    """
    if len(text) > MAX_TEXT:
        raise ConfigSyntaxError(source, 1, 1, f"it has {len(text)} characters; {MAX_TEXT} are the most")
    return _Parser(text, source).settings()


class _Parser:
    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._at = 0
        self._line = 1
        self._line_start = 0

    def settings(self) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        while True:
            self._space(lines=True)
            if self._peek() == "":
                return found
            if self._peek() == ";":
                self._at += 1
                continue
            self._setting(found)
            self._space()
            end = self._peek()
            if end not in ("", "\n", ";"):
                raise self._problem(f"{end!r} follows a complete setting; end it with a line break or ';'")

    def _setting(self, found: dict[str, Setting]) -> None:
        line, column = self._line, self._column()
        if self._peek() not in _NAME_START:
            raise self._problem(f"a setting's name is expected, not {self._peek()!r}")
        start = self._at
        while self._peek() in _NAME:
            self._at += 1
        name = self._text[start : self._at]
        self._space()
        add = self._text.startswith("+=", self._at)
        if not add and self._peek() != "=":
            raise self._problem(f"'=' is expected after {name[:60]!r}{self._instead()}")
        self._at += 2 if add else 1
        self._space()
        value = self._value(0)
        if add and name in found:
            value = self._sum(name, found[name].value, value)
        found[name] = Setting(value, line, column)

    def _sum(self, name: str, before: Value, more: Value) -> Value:
        if isinstance(before, list):
            return [*before, *(more if isinstance(more, list) else [more])]
        if isinstance(before, str) and isinstance(more, str):
            return before + more
        raise self._problem(f"{name!r} is {_kind(before)}, to which {_kind(more)} cannot be added")

    def _value(self, depth: int) -> Value:
        first = self._peek()
        if first == "[":
            return self._list(depth)
        if first in ("'", '"') and first:
            return self._string(first)
        if first.isascii() and first.isdigit():
            return self._number()
        if first == "-":
            raise self._problem("numbers cannot be negative here; put it in quotes")
        hint = "; text needs quotes" if first in _NAME_START else ""
        raise self._problem(f"a number, a string in quotes or a list in [] is expected{self._instead()}{hint}")

    def _list(self, depth: int) -> list[Value]:
        if depth >= MAX_DEPTH:
            raise self._problem(f"lists are nested deeper than {MAX_DEPTH}")
        opened = self._line
        self._at += 1
        values: list[Value] = []
        while True:
            self._space(lines=True)
            if self._peek() == "]":
                self._at += 1
                return values
            if self._peek() == "":
                raise self._problem(f"the list that begins in line {opened} does not end")
            values.append(self._value(depth + 1))
            self._space(lines=True)
            if self._peek() == ",":
                self._at += 1
            elif self._peek() == "":
                raise self._problem(f"the list that begins in line {opened} does not end")
            elif self._peek() != "]":
                raise self._problem(f"',' or ']' is expected in a list{self._instead()}")

    def _number(self) -> int:
        start = self._at
        while self._peek() in _NAME:
            self._at += 1
        digits = self._text[start : self._at]
        try:
            if digits[:2] in ("0x", "0X"):
                number = int(digits, 16) if set(digits[2:]) <= _HEX else -1
            else:
                number = int(digits) if digits.isdigit() and len(digits) < 40 else -1
        except ValueError:
            number = -1
        if not 0 <= number <= MAX_NUMBER:
            self._at = start
            raise self._problem(f"{digits[:40]!r} is no number; text needs quotes")
        return number

    def _string(self, quote: str) -> str:
        start = self._at
        self._at += 1
        parts: list[str] = []
        while True:
            character = self._peek()
            if character in ("", "\n"):
                self._at = start
                raise self._problem("this string does not end on its line")
            self._at += 1
            if character == quote:
                return "".join(parts)
            parts.append(self._escape() if character == "\\" else character)

    def _escape(self) -> str:
        character = self._peek()
        if character in ("'", '"', "\\") and character:
            self._at += 1
            return character
        if character in _ESCAPES:
            self._at += 1
            return _ESCAPES[character]
        if character == "x":
            digits = self._text[self._at + 1 : self._at + 3]
            if len(digits) == 2 and set(digits) <= _HEX:
                self._at += 3
                return chr(int(digits, 16))
            raise self._problem("two hexadecimal digits are expected after \\x")
        digits = ""
        while len(digits) < 3 and self._text[self._at + len(digits) : self._at + len(digits) + 1] in tuple("01234567"):
            digits += self._text[self._at + len(digits)]
        if digits and int(digits, 8) < 256:
            self._at += len(digits)
            return chr(int(digits, 8))
        raise self._problem(f"there is no escape \\{character}" if character.strip() else "a backslash at a line's end")

    def _space(self, lines: bool = False) -> None:
        """Skip spaces and comments; with ``lines`` line breaks too."""
        while True:
            character = self._peek()
            if character == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif character in (" ", "\t", "\r") or (lines and character == "\n"):
                self._at += 1
                if character == "\n":
                    self._line += 1
                    self._line_start = self._at
            else:
                return

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _column(self) -> int:
        return self._at - self._line_start + 1

    def _instead(self) -> str:
        found = self._peek()
        if found == "":
            return ", not the end"
        return ", not the line's end" if found == "\n" else f", not {found!r}"

    def _problem(self, problem: str) -> ConfigSyntaxError:
        return ConfigSyntaxError(self._source, self._line, self._column(), problem)


def _kind(value: Value) -> str:
    return "a list" if isinstance(value, list) else "a string" if isinstance(value, str) else "a number"


def format_value(value: Value) -> str:
    """``value`` as :func:`parse` reads it. ValueError for what it could not read.

    >>> format_value(["a", 3])
    '["a", 3]'
    """
    if isinstance(value, list):
        return "[" + ", ".join(format_value(one) for one in value) + "]"
    if isinstance(value, int):
        if not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"{value} cannot be written")
        return str(value)
    return '"' + "".join(_quoted(value)) + '"'


def _quoted(text: str) -> Iterator[str]:
    for character in text:
        if character in '"\\':
            yield "\\" + character
        elif character < " " or character == "\x7f":
            yield f"\\x{ord(character):02x}"
        else:
            yield character


def format_config(settings: Mapping[str, Value]) -> str:
    """A configuration of these settings, one a line. ValueError for a name that is none."""
    for name in settings:
        if not name or name[0] not in _NAME_START or not set(name) <= _NAME:
            raise ValueError(f"{name!r} is no setting's name")
    return "".join(f"{name} = {format_value(value)}\n" for name, value in settings.items())
