"""What a saved domain's JSON records are read through: each value is looked at before it is used."""

from collections.abc import Sequence
from typing import Any, Final, Self, cast

from nonroot.hvm.device import StateError

__all__ = ["Fields"]

U64: Final = (1 << 64) - 1
MOST: Final = 1 << 20
"""Items of a list."""


class Fields:
    """A record's values by name. Everything raises StateError for what is missing, of another type or out of range."""

    def __init__(self, what: str, record: object) -> None:
        """``what``: the record's name in messages."""
        if not isinstance(record, dict):
            raise StateError(f"{what} state: it is no record")
        self._what = what
        self._record: dict[str, Any] = record

    def number(self, name: str, maximum: int = U64, minimum: int = 0) -> int:
        """A whole number."""
        return self._number(name, self._get(name), maximum, minimum)

    def optional(self, name: str, maximum: int = U64) -> int | None:
        """A whole number, or None."""
        value = self._get(name)
        return None if value is None else self._number(name, value, maximum)

    def flag(self, name: str) -> bool:
        """A truth value."""
        value = self._get(name)
        if not isinstance(value, bool):
            raise self._bad(name, "is no truth value")
        return value

    def text(self, name: str, length: int = 4096) -> str:
        """A text of at most so many characters."""
        value = self._get(name)
        if not isinstance(value, str) or len(value) > length:
            raise self._bad(name, "is no text")
        return value

    def data(self, name: str, length: int) -> bytes:
        """At most so many bytes, from hexadecimal digits."""
        try:
            return bytes.fromhex(self.text(name, 2 * length))
        except ValueError:
            raise self._bad(name, "is no hexadecimal number") from None

    def numbers(self, name: str, maximum: int = U64) -> list[int]:
        """A list of numbers."""
        values = self._list(name)
        self._column(name, values, maximum)
        return values

    def rows(self, name: str, *maxima: int) -> list[tuple[int, ...]]:
        """A list of lists of numbers, each with its own limit."""
        rows = self._list(name)
        if not all(isinstance(row, list) and len(row) == len(maxima) for row in rows):
            raise self._bad(name, f"has a row without {len(maxima)} numbers")
        for column, most in zip(zip(*rows, strict=True), maxima, strict=False):  # no rows, no columns
            self._column(name, column, most)
        return [tuple(row) for row in rows]

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        values = self._list(name)
        if not all(isinstance(value, str) for value in values):
            raise self._bad(name, "has what is no text")
        return values

    def records(self, name: str) -> list[Self]:
        """A list of records."""
        return [type(self)(f"{self._what} {name}", value) for value in self._list(name)]

    def inner(self, name: str) -> Self:
        """A record inside of this one."""
        return type(self)(f"{self._what} {name}", self._get(name))

    def _get(self, name: str) -> Any:
        if name not in self._record:
            raise self._bad(name, "is missing")
        return self._record[name]

    def _list(self, name: str) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list) or len(value) > MOST:
            raise self._bad(name, "is no list")
        return value

    def _column(self, name: str, values: Sequence[object], maximum: int) -> None:
        """Check many numbers: faster than one by one."""
        if set(map(type, values)) - {int}:
            raise self._bad(name, "has what is no number")
        numbers = cast("Sequence[int]", values)
        if numbers and (min(numbers) < 0 or max(numbers) > maximum):
            raise self._bad(name, f"has a number outside 0..{maximum}")

    def _number(self, name: str, value: object, maximum: int, minimum: int = 0) -> int:
        if type(value) is not int:
            raise self._bad(name, "is no number")
        assert isinstance(value, int)
        if not minimum <= value <= maximum:
            raise self._bad(name, f"is {value}, outside {minimum}..{maximum}")
        return value

    def _bad(self, name: str, problem: str) -> StateError:
        return StateError(f"{self._what} state: {name} {problem}")
