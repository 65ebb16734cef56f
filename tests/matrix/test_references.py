"""What a reference notices, and what it overlooks."""

import itertools
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.matrix import modes_guest, references
from tests.matrix.references import COLUMNS, FOLDER, ROWS, Reference

BLUE, GREY = (0, 0, 0xAA), (0xAA, 0xAA, 0xAA)


def page(lines: list[str], size: tuple[int, int] = (720, 400)) -> Image.Image:
    """Text as a program shows it."""
    picture = Image.new("RGB", size, BLUE)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        # Twice, for strokes as bold as a VGA's.
        draw.text((0, 16 * number), line, fill=GREY)
        draw.text((1, 16 * number), line, fill=GREY)
    return picture


TEXTS = [f"line {number}: " + "some text of a program " * 4 for number in range(20)]


def test_a_picture_is_its_own_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "FOLDER", tmp_path)
    picture = page(TEXTS)
    Reference.of(picture).store("page")
    stored = Reference.load("page")
    assert stored == Reference.of(picture)
    assert stored.size == (720, 400)
    assert {len(row) for row in stored.rows} == {3 * COLUMNS}
    assert len(stored.rows) == ROWS
    assert stored.differing(picture) == 0


def test_digits_that_change_are_overlooked_and_other_things_are_not() -> None:
    stored = Reference.of(page(TEXTS))
    assert stored.differing(page([line.replace("1", "7") for line in TEXTS])) < 0.01
    assert stored.differing(page(TEXTS[:10])) > 0.1, "half of the text is missing"
    assert stored.differing(page([])) > 0.2
    assert stored.differing(Image.new("RGB", (720, 400), (0xAA, 0, 0))) == 1, "another background"
    assert stored.differing(page(TEXTS, (640, 400))) == 1, "another size"
    marked = page(TEXTS)
    ImageDraw.Draw(marked).rectangle((0, 160, 719, 175), fill=GREY)
    assert 0.02 < stored.differing(marked) < 0.06, "a line is selected"


def test_noise_is_told_from_a_picture() -> None:
    noise = Image.frombytes("RGB", (320, 200), random.Random(1).randbytes(320 * 200 * 3))
    assert Reference.of(noise).differing(Image.new("RGB", (320, 200))) == 1


def test_the_stored_ones_are_of_different_pictures() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    assert {mode.name for mode in modes_guest.MODES} < set(names)
    stored = {name: Reference.load(name) for name in names}
    for mode in modes_guest.MODES:
        assert stored[mode.name].size == mode.size
    for one, other in itertools.combinations(names, 2):
        left, right = stored[one], stored[other]
        assert left.size != right.size or sum(a != b for a, b in zip(left.rows, right.rows, strict=True)) > 2, other


def test_the_modes_fit_a_boot_sector() -> None:
    image = modes_guest.floppy()
    assert len(image) == modes_guest.FLOPPY_SIZE
    assert image[510:512] == b"\x55\xaa"
