"""Makes docs/boot.svg, the README's picture, from a real boot: `.venv/bin/python scripts/boot_svg.py`."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

import nonroot

OUTPUT = Path(__file__).parent.parent / "docs" / "boot.svg"
WIDTH = 118
HEAD, TAIL = 12, 8  # console lines shown from the start and from the end of the boot
COMMANDS = (["uname", "-a"], ["sh", "-c", "grep -m1 'model name' /proc/cpuinfo; free -m | head -n 2"])


def main() -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)

    def typed(command: str) -> None:
        console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))

    with nonroot.Domain(quiet=False) as domain:
        domain.wait_ready()
        lines = [line.rstrip() for line in domain.console.text.splitlines() if line.strip()]
        typed("nonroot run")
        console.print(Text(f"engine {domain.engine}: {domain.reason}", "dim"))
        for line in lines[:HEAD]:
            console.print(Text(line[:WIDTH]))
        console.print(Text(f"  … {len(lines) - HEAD - TAIL} lines …", "dim"))
        for line in lines[-TAIL:]:
            console.print(Text(line[:WIDTH]))
        for command in COMMANDS:
            typed(f"nonroot run -- {command[-1] if command[0] == 'sh' else ' '.join(command)}")
            console.print(Text(domain.run(command, timeout=60).stdout.rstrip()))
        stopped = domain.shutdown()
        stats = domain.stats
    console.print(
        Text(
            f"{stopped.message}; {stats.instructions / 1e6:.0f} million guest instructions, {stats.wall_seconds:.1f} s",
            "dim",
        )
    )
    OUTPUT.write_text(console.export_svg(title="nonroot", unique_id="boot"))
    print(f"written to {OUTPUT}")


if __name__ == "__main__":
    main()
