"""The documents say what is true: dependencies, support statements, links, names of files."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
STATUSES = {"Supported", "Preview", "Experimental", "Not yet"}


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return match[0]


def declared() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = settings["build-system"]["requires"] + settings["project"]["dependencies"]
    for extra in settings["project"]["optional-dependencies"].values():
        requirements += extra
    names = {distribution(requirement) for requirement in requirements}
    for manifest in (ROOT / "rust").glob("*/Cargo.toml"):
        crate = tomllib.loads(manifest.read_text())
        for kind in ("dependencies", "dev-dependencies", "build-dependencies"):
            names |= {name for name in crate.get(kind, {}) if not name.startswith("nonroot-")}
    return names


def test_every_dependency_is_explained_and_nothing_else() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    explained = set(re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE))
    assert explained == declared()


def support() -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    for part in re.split(r"^### ", (ROOT / "SUPPORT.md").read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        lines = re.findall(r"^    ([A-Za-z-]+): (.+)$", body, re.MULTILINE)
        assert title not in sections, f"{title} is there twice"
        assert len(dict(lines)) == len(lines), f"{title} says something twice"
        sections[title] = dict(lines)
    return sections


def test_support_statements_are_well_formed() -> None:
    sections = support()
    assert len(sections) > 10
    for title, facts in sections.items():
        assert set(facts) <= {"Status", "Tested-by", "Security-supported"}, title
        assert facts.get("Status") in STATUSES, title
        # A feature that exists says where its tests are; one that does not, has none.
        assert ("Tested-by" in facts) == (facts["Status"] != "Not yet"), title


@pytest.mark.parametrize(
    ("title", "place"),
    [(title, place) for title, facts in support().items() for place in facts.get("Tested-by", "").split(", ") if place],
)
def test_the_tests_that_support_names_exist(title: str, place: str) -> None:
    path = ROOT / place
    assert path.exists(), f"SUPPORT.md, {title}: {place} does not exist"
    if path.is_dir() and place.startswith("tests/"):
        assert list(path.glob("**/test_*.py")), f"SUPPORT.md, {title}: {place} has no tests"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_exist(document: Path) -> None:
    named = re.findall(r"`((?:src|rust|tests|bench|scripts|docs|guest)/[\w./-]+)`", document.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert missing == []


def test_the_package_is_not_said_to_be_published() -> None:
    for document in DOCUMENTS:
        assert "pip install nonroot" not in document.read_text(), document.name


def test_the_licence_is_the_one_that_is_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License\n")
    assert "END OF TERMS AND CONDITIONS" in text
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"] == "Apache-2.0"
    assert tomllib.loads((ROOT / "rust" / "Cargo.toml").read_text())["workspace"]["package"]["license"] == "Apache-2.0"


def test_tests_that_documents_name_are_there() -> None:
    for document in DOCUMENTS:
        for path, name in re.findall(r"`(tests/[\w/.]+\.py)::(\w+)`", document.read_text()):
            file = ROOT / path
            assert file.is_file(), f"{document.name} names {path}"
            assert re.search(rf"^ *def {name}\(", file.read_text(), re.MULTILINE), (
                f"{document.name} names {path}::{name}"
            )
