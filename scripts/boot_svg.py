"""Makes docs/boot.svg, the README's picture, from what `nonroot demo` prints."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

OUTPUT = Path(__file__).parent.parent / "docs" / "boot.svg"
WIDTH = 118
HEAD, TAIL = 12, 14  # lines shown from the start and from the end


def main() -> None:
    command = [sys.executable, "-m", "nonroot", "demo"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True)
    lines = [line.rstrip() for line in result.stdout.splitlines() if line.strip()]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(Text.assemble(("$ ", "bold green"), ("nonroot demo", "bold")))
    for line in lines[:HEAD]:
        console.print(Text(line), overflow="ellipsis", no_wrap=True)
    console.print(Text(f"  … {len(lines) - HEAD - TAIL} lines …", "dim"))
    for line in lines[-TAIL:-1]:
        console.print(Text(line, "bold" if line.startswith("$ ") else ""), overflow="ellipsis", no_wrap=True)
    console.print(Text(lines[-1], "green"))
    OUTPUT.write_text(console.export_svg(title="nonroot", unique_id="boot"))
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
