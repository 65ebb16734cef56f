"""save, restore and cache: what the verbs do, and what they refuse."""

import json
from pathlib import Path

from nonroot.domain.boot_cache import folder
from nonroot.saved.container import Reader
from tests.toolstack.conftest import Run
from tests.toolstack.test_dom0 import create
from tests.waiting import wait_until


def names(nonroot: Run) -> dict[str, str]:
    return {one["name"]: one["state"] for one in nonroot("list", "--json").json if one["name"] != "Domain-0"}


def test_save_ends_and_restore_goes_on(nonroot: Run, tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "alpha.saved"
    create(nonroot, tiny, "alpha")
    uuid = next(one["uuid"] for one in nonroot("list", "--json").json if one["name"] == "alpha")
    outcome = nonroot("save", "alpha", str(file), "--json")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.json["domain"] == "alpha"
    assert 0 < outcome.json["bytes"] <= file.stat().st_size
    assert names(nonroot) == {}
    assert nonroot("restore", str(file)).status == 0
    assert list(names(nonroot)) == ["alpha"]
    assert next(one["uuid"] for one in nonroot("list", "--json").json if one["name"] == "alpha") == uuid
    assert nonroot("restore", str(file)).err == "nonroot: a domain named 'alpha' is running already\n"
    assert nonroot("restore", "--name", "beta", "-p", "--json", str(file)).json["name"] == "beta"
    assert sorted(names(nonroot)) == ["alpha", "beta"]
    for name in ("alpha", "beta"):
        assert nonroot("destroy", name).status == 0


def test_checkpoint_and_paused(nonroot: Run, tiny: str, tmp_path: Path) -> None:
    create(nonroot, tiny, "alpha")
    assert nonroot("save", "-c", "alpha", str(tmp_path / "a")).status == 0
    assert nonroot("save", "-p", "alpha", str(tmp_path / "b")).status == 0
    assert nonroot("save", "alpha", str(tmp_path / "c")).status == 0  # a paused one too
    assert names(nonroot) == {}
    for file in ("a", "b", "c"):
        with Reader(tmp_path / file) as reader:
            assert json.loads(reader.record("toolstack"))["name"] == "alpha"


def test_forks(nonroot: Run, tiny: str) -> None:
    create(nonroot, tiny, "alpha")
    outcome = nonroot("fork", "-n", "2", "--json", "alpha")
    assert (outcome.status, [one["name"] for one in outcome.json]) == (0, ["alpha-1", "alpha-2"])
    assert len({one["uuid"] for one in nonroot("list", "--json").json if one["name"] != "Domain-0"}) == 3
    assert nonroot("fork", "-p", "--name", "trial", "alpha-1").status == 0
    assert names(nonroot)["trial"] in ("created", "paused")
    assert nonroot("fork", "alpha").status == 0
    assert sorted(names(nonroot)) == ["alpha", "alpha-1", "alpha-2", "alpha-3", "trial"]
    assert nonroot("fork", "-n", "2", "--name", "x", "alpha").err == "nonroot: --name is for a single fork\n"
    assert nonroot("fork", "--name", "trial", "alpha").err == "nonroot: a domain named 'trial' is running already\n"
    wait_until(lambda: not [path for path in folder().iterdir() if path.name.startswith(".fork")])


def test_refusals(nonroot: Run, tiny: str, tmp_path: Path) -> None:
    create(nonroot, tiny, "alpha")
    for arguments, sentence in (
        (("save", "-c", "-p", "alpha", "x"), "--checkpoint and --paused exclude each other"),
        (("save", "none", str(tmp_path / "x")), "there is no domain 'none'; there are: alpha"),
        (("save", "alpha", str(tmp_path / "none" / "x")), "cannot be written: no such file or directory"),
        (("restore", str(tmp_path / "missing")), "cannot be read: no such file or directory"),
        (("restore", tiny), "is no saved domain that could be restored"),
        (("restore", "--name", "1", "x"), "cannot be read"),
        (("cache", "list", "--all"), "--all goes with prune"),
    ):
        outcome = nonroot(*arguments)
        assert outcome.status == 125
        assert sentence in outcome.err
        assert outcome.err.count("\n") == 1
    assert list(names(nonroot)) == ["alpha"]


def test_cache(nonroot: Run) -> None:
    shown = nonroot("cache", "list", "--json")
    assert shown.status == 0
    assert all({"file", "bytes", "used"} <= set(one) for one in shown.json)
    assert nonroot("cache", "list").status == 0
