"""Small references of what a screen shows: its size, and the mean colour of each of 40 × 25 fields.

A reference is a file of text in ``tests/matrix/references``, made by our own renderer from a guest's screen. Two
pictures are alike if they have the same size and few fields differ by more than a letter or two do.

After a change of what is shown, ``make matrix REFERENCES=write`` (or ``NONROOT_REFERENCES=write`` in the environment of
some of the tests) writes the references anew, from the screens as the tests see them once they have settled, and the
pictures into the folder for temporary files: look at those before you commit.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from PIL import Image

__all__ = ["COLUMNS", "FOLDER", "ROWS", "Reference"]

FOLDER = Path(__file__).with_name("references")
COLUMNS, ROWS = 40, 25
STEP = 17
"""A component has one hexadecimal digit: 0 … 15 stand for 0 … 255."""
NEAR = 1.5 * STEP
"""Components that differ by less are the same: digits that are others make a step, where there is no text it is 3."""


@dataclass(frozen=True)
class Reference:
    """A picture, roughly."""

    size: tuple[int, int]
    """Pixels."""
    rows: tuple[str, ...]
    """Three digits a field: red, green, blue."""

    @classmethod
    def of(cls, picture: Image.Image) -> Self:
        """The reference that this picture makes."""
        fields = _fields(picture)
        rows = []
        for row in range(ROWS):
            colours = fields[row * COLUMNS : (row + 1) * COLUMNS]
            rows.append("".join(f"{round(part / STEP):x}" for colour in colours for part in colour))
        return cls(picture.size, tuple(rows))

    @classmethod
    def load(cls, name: str) -> Self:
        """The stored one. FileNotFoundError if there is none of that name."""
        data = json.loads((FOLDER / f"{name}.json").read_text())
        return cls((data["size"][0], data["size"][1]), tuple(data["rows"]))

    def store(self, name: str) -> None:
        """Write it."""
        FOLDER.mkdir(exist_ok=True)
        text = json.dumps({"size": self.size, "rows": self.rows}, indent=1)
        (FOLDER / f"{name}.json").write_text(text + "\n")

    def differing(self, picture: Image.Image) -> float:
        """The share of fields that differ, 0 … 1; 1 if the size does."""
        if picture.size != self.size:
            return 1.0
        count = 0
        for index, colour in enumerate(_fields(picture)):
            row, column = divmod(index, COLUMNS)
            digits = self.rows[row][3 * column : 3 * column + 3]
            count += any(abs(int(digit, 16) * STEP - part) > NEAR for digit, part in zip(digits, colour, strict=True))
        return count / (COLUMNS * ROWS)


def _fields(picture: Image.Image) -> list[tuple[int, int, int]]:
    """The mean colour of each field, row by row."""
    small = picture.convert("RGB").resize((COLUMNS, ROWS), Image.Resampling.BOX)
    data = small.tobytes()
    return [(data[place], data[place + 1], data[place + 2]) for place in range(0, len(data), 3)]
