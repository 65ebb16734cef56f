"""Checks who may import what, by reading the code: devices know no clock and no I/O, layers point one way.

The rules are the tables below; ARCHITECTURE.md says why. Prints each violation as file:line and ends with 1.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"

# Modules of the outside world: files, processes, sockets, threads, clocks, chance.
OUTSIDE_WORLD = frozenset(
    "asyncio datetime fcntl http io logging mmap multiprocessing os pathlib random secrets select selectors shutil "
    "signal socket subprocess sys tempfile termios threading time tty urllib".split()
)
# Builtins that reach it without an import.
OUTSIDE_BUILTINS = frozenset({"open", "print", "input"})

# These are pure: a device, a table or a loader is a function of what it is given.
PURE = (
    "nonroot.hvm",
    "nonroot.devices",
    "nonroot.spec",
    "nonroot.engines.exits",
    "nonroot.engines.policy",
    "nonroot.engines.state",
    "nonroot.xenstore.relay",
    "nonroot.xenstore.session",
    "nonroot.xenstore.store",
    "nonroot.xenstore.tree",
    "nonroot.xenstore.view",
    "nonroot.xenstore.watches",
    "nonroot.xenstore.wire",
)
# The machine wires pure parts to threads and the clock, and makes its memory; nothing else in hvm may.
NOT_PURE = ("nonroot.hvm.machine", "nonroot.hvm.guest_ram", "nonroot.hvm.ram")

# From the bottom up: a package imports only packages of its own row and of rows above it in this table.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("nonroot.errors", "nonroot._engine", "nonroot.programs", "nonroot.spec"),
    ("nonroot.engines",),
    ("nonroot.hvm", "nonroot.devices", "nonroot.boot", "nonroot.xen"),
    ("nonroot.guests", "nonroot.backends"),
    ("nonroot.stubdom",),
    ("nonroot.domain", "nonroot.xenstore"),
    ("nonroot.display",),
    ("nonroot.api", "nonroot.connecting", "nonroot.toolstack"),
    ("nonroot.testing", "nonroot.cli"),
)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer(module: str) -> int | None:
    for level, packages in enumerate(LAYERS):
        if any(within(module, package) for package in packages):
            return level
    return None


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def for_types_only(tree: ast.Module) -> set[int]:
    """Line numbers under `if TYPE_CHECKING:`."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each import; `from a import b` gives a.b, so that submodules count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                here = here[: len(here) - node.level + is_package]
                base = ".".join([*here, *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(path: Path) -> Iterator[str]:
    module = module_name(path)
    tree = ast.parse(path.read_text(), str(path))
    shown = path.relative_to(ROOT)
    types_only = for_types_only(tree)
    pure = any(within(module, p) for p in PURE) and not any(within(module, p) for p in NOT_PURE)
    mine = layer(module)
    for line, name in imports(tree, module, path.name == "__init__.py"):
        if line in types_only:
            continue
        if pure and name.split(".")[0] in OUTSIDE_WORLD:
            yield f"{shown}:{line}: {module} is pure and may not import {name}"
        theirs = layer(name)
        if mine is not None and theirs is not None and theirs > mine:
            yield f"{shown}:{line}: {module} may not import {name}, which lies above it"
    if pure:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OUTSIDE_BUILTINS:
                yield f"{shown}:{node.lineno}: {module} is pure and may not call {node.func.id}()"


def main() -> int:
    found = [line for path in sorted(SOURCE.rglob("*.py")) for line in violations(path)]
    print("\n".join(found) or "imports: all rules hold")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
