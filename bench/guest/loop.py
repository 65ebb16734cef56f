"""What `python-loop` measures: calls, dictionaries, lists, strings and numbers; prints a checksum."""

import sys


def step(table: dict[int, str], number: int) -> int:
    key = number * 2654435761 % 4093
    text = table.get(key, "")
    table[key] = f"{number:x}{text[:6]}"
    return len(text) + number % 7


def main(count: int) -> None:
    table: dict[int, str] = {}
    total = 0
    recent: list[int] = []
    for number in range(count):
        total += step(table, number)
        recent.append(total)
        if len(recent) == 100:
            recent.sort(reverse=True)
            total = (total ^ sum(recent[::3])) & 0xFFFF_FFFF
            recent.clear()
    print(total, len(table), table[0])


main(int(sys.argv[1]))
