"""Checks that each crate uses every dependency that its Cargo.toml names. Prints the unused ones and ends with 1."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent / "rust"


def unused(manifest: Path) -> list[str]:
    settings = tomllib.loads(manifest.read_text())
    code = "\n".join(
        path.read_text()
        for folder in ("src", "tests", "benches", "examples")
        for path in (manifest.parent / folder).rglob("*.rs")
    )
    names = {**settings.get("dependencies", {}), **settings.get("dev-dependencies", {})}
    return [name for name in names if not re.search(rf"\b{name.replace('-', '_')}\b", code)]


def main() -> int:
    members = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["members"]
    found = [
        f"rust/{member}/Cargo.toml: {name} is not used"
        for member in members
        for name in unused(ROOT / member / "Cargo.toml")
    ]
    print("\n".join(found) or "crates: every dependency is used")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
