"""The text of a screen in a text mode, from the display adapter's registers and memory."""

from typing import Final

from nonroot.devices.vga_state import SHADOW, SHADOW_SIZE, Picture, VgaState, picture

__all__ = ["Memory", "cells", "screen_rows"]

TEXT_CELLS: Final = SHADOW_SIZE // 2
_CONTROL: Final = " ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼"
_CP437: Final = _CONTROL + bytes(range(0x20, 0x100)).decode("cp437").replace("\x7f", "⌂").replace("\xa0", " ")

Memory = memoryview | bytes | bytearray


def cells(state: VgaState, shown: Picture, memory: Memory) -> list[bytes]:
    """Characters and attributes in turns, a row each."""
    rows = []
    width = shown.columns
    for row in range(shown.rows):
        address = shown.start + row * shown.stride if row < shown.split else (row - shown.split) * shown.stride
        first = address // 4
        if state.shadow:
            if first + width <= TEXT_CELLS:
                rows.append(bytes(memory[SHADOW + 2 * first : SHADOW + 2 * (first + width)]))
                continue
            wrapped = bytearray()
            for column in range(width):
                place = SHADOW + 2 * ((first + column) % TEXT_CELLS)
                wrapped += memory[place : place + 2]
            rows.append(bytes(wrapped))
            continue
        line = bytearray(2 * width)
        characters = bytes(memory[4 * first : 4 * (first + width) : 4])
        attributes = bytes(memory[4 * first + 1 : 4 * (first + width) + 1 : 4])
        line[0 : 2 * len(characters) : 2] = characters
        line[1 : 2 * len(attributes) + 1 : 2] = attributes
        rows.append(bytes(line))
    return rows


def screen_rows(state: VgaState, memory: Memory) -> list[str] | None:
    """The lines of a text mode, without trailing blanks; None if the screen shows a picture."""
    shown = picture(state)
    if not shown.is_text:
        return None
    return ["".join(_CP437[byte] for byte in row[0::2]).rstrip() for row in cells(state, shown, memory)]
