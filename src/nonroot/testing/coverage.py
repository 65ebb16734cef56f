"""Which instructions the engine has, and which of them are compared with the host CPU: ``docs/isa-coverage.md``.

    python -m nonroot.testing.coverage            # prints the table
    python -m nonroot.testing.coverage --write docs/isa-coverage.md

Counted are iced's instruction codes: an opcode with an operand size, such as ``Add_rm32_r32``.
"""

import argparse
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from iced_x86 import CpuidFeature

from nonroot import _engine
from nonroot.testing.generator_codes import code_number, features_of, usable_codes

_HEAD = """# Instructions

Made by `python -m nonroot.testing.coverage --write docs/isa-coverage.md`; `tests/cpu/test_coverage.py` fails if
the engine has or compares fewer than this page says.

Counted are instruction codes as the iced decoder names them (an opcode with an operand size), legacy and VEX, by the
CPU extension that they belong to. **Interpreted** codes are implemented in Rust; **native** ones run on the host's CPU
over the guest's registers, if the host has the extension. **Compared** ones are generated with operands, faults and
flags of all kinds and compared with the host's CPU (see [cpu-tests.md](cpu-tests.md)); what is not compared has no
reproducible result (time, randomness, identity), is privileged beyond its fault, or differs between AMD's and Intel's
CPUs.

| extension | codes | interpreted | native | missing | compared |
|---|---:|---:|---:|---:|---:|
"""


@dataclass
class Row:
    """Codes of one extension, by what the engine does with them."""

    codes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    compared: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(len(names) for names in self.codes.values())

    @property
    def executed(self) -> int:
        """Those that the engine has."""
        return self.total - len(self.codes["missing"])


def _extensions() -> dict[int, str]:
    return {int(getattr(CpuidFeature, name)): name for name in dir(CpuidFeature) if name.isupper() and name[0] != "_"}


def rows() -> dict[str, Row]:
    """The table, by extension."""
    names = _extensions()
    compared = {info.code for bits in (32, 64) for info in usable_codes(bits, everywhere=True)}
    table: dict[str, Row] = defaultdict(Row)
    for name, how in _engine.coverage():
        code = code_number(name)
        extension = " + ".join(sorted(names[feature] for feature in features_of(code))) or "none"
        row = table[extension]
        row.codes[how].append(name)
        if code in compared:
            row.compared.append(name)
    return dict(sorted(table.items()))


def report() -> str:
    """The document."""
    table = rows()
    text = _HEAD
    executed = {name: row for name, row in table.items() if row.executed}
    for name, row in executed.items():
        how = [len(row.codes[kind]) for kind in ("interpreted", "native", "missing")]
        text += f"| {name} | {row.total} | {how[0]} | {how[1]} | {how[2]} | {len(row.compared)} |\n"
    sums = [sum(len(row.codes[kind]) for row in executed.values()) for kind in ("interpreted", "native", "missing")]
    total, compared = sum(row.total for row in executed.values()), sum(len(row.compared) for row in executed.values())
    text += f"| **all** | {total} | {sums[0]} | {sums[1]} | {sums[2]} | {compared} |\n"
    text += "\n## Executed but not compared\n\n"
    for name, row in executed.items():
        left = [code for kind in ("interpreted", "native") for code in row.codes[kind] if code not in set(row.compared)]
        if left:
            text += f"* {name}: {', '.join(f'`{code}`' for code in left)}\n"
    text += "\n## Missing\n\nOf extensions that the engine has otherwise:\n\n"
    for name, row in executed.items():
        if row.codes["missing"]:
            text += f"* {name}: {', '.join(f'`{code}`' for code in row.codes['missing'])}\n"
    text += f"\nWhole extensions: {', '.join(name for name, row in table.items() if not row.executed)}.\n"
    return text


def promised(document: str) -> dict[str, tuple[int, int]]:
    """Extension -> (codes executed, codes compared) of a document that :func:`report` made."""
    found = {}
    for line in document.splitlines():
        match = re.fullmatch(r"\| ([A-Z0-9_ +a-z]+) \| \d+ \| (\d+) \| (\d+) \| \d+ \| (\d+) \|", line)
        if match:
            found[match[1]] = (int(match[2]) + int(match[3]), int(match[4]))
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m nonroot.testing.coverage", description="Instructions of the engine."
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the document instead of printing it")
    chosen = parser.parse_args(arguments)
    if chosen.write:
        chosen.write.write_text(report())
    else:
        print(report(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
