"""Disks and network cards that come and go while Debian's kernel runs, by the toolstack's verbs."""

from pathlib import Path

import pytest

from tests.needed import need
from tests.toolstack.conftest import Run, until

pytestmark = [pytest.mark.slow, pytest.mark.guest]


def test_disks_and_networks_come_and_go(nonroot: Run, tmp_path: Path) -> None:
    need("cloud-amd64")
    image = tmp_path / "data.img"
    image.write_bytes(bytes(8 << 20))
    assert nonroot("create", "name=net", "memory=128", "vif=['bridge=lan']").status == 0
    first = until(lambda: [one for one in nonroot("network-list", "--json", "net").json if one["state"] == "connected"])
    assert [(one["index"], one["network"]) for one in first] == [(0, "lan")]
    assert "lan" in nonroot("network-list", "net").out
    assert nonroot("block-attach", "net", f"{image},raw,xvdb,w").status == 0
    assert "there is a disk xvdb already" in nonroot("block-attach", "net", f"{image},raw,xvdb,w").err
    disks = until(lambda: [one for one in nonroot("block-list", "--json", "net").json if one["state"] == "connected"])
    assert [(one["vdev"], one["target"], one["access"]) for one in disks] == [("xvdb", str(image), "w")]
    assert nonroot("block-detach", "net", "xvdb").status == 0
    until(lambda: not nonroot("block-list", "--json", "net").json)
    assert nonroot("block-attach", "net", f"{image},raw,xvdc,w").status == 0
    mac = "00:16:3e:01:02:03"
    assert nonroot("network-attach", "net", f"mac={mac}", "bridge=lan").status == 0
    until(lambda: [one["state"] for one in nonroot("network-list", "--json", "net").json] == ["connected"] * 2)
    assert f"there is a network card {mac} already" in nonroot("network-attach", "net", f"mac={mac}").err
    assert nonroot("network-detach", "net", "0").status == 0
    until(lambda: [one["mac"] for one in nonroot("network-list", "--json", "net").json] == [mac])
    # Memory has a limit, which can be lowered and raised again, up to what there was.
    assert "its limit cannot be above that" in nonroot("mem-max", "net", "129m").err
    assert nonroot("mem-max", "net", "112m").status == 0
    assert "is limited to 112 MiB" in nonroot("mem-set", "net", "120m").err
    assert nonroot("mem-set", "net", "112m").status == 0
    assert nonroot("mem-max", "net", "128m").status == 0
    # What there is now is there again when it has been started again.
    assert nonroot("reboot", "-w", "--timeout", "120", "--json", "net").json["by"] == "xenstore"
    cards = until(lambda: [one for one in nonroot("network-list", "--json", "net").json if one["state"] == "connected"])
    assert [(one["index"], one["mac"]) for one in cards] == [(0, mac)]
    disks = until(lambda: [one for one in nonroot("block-list", "--json", "net").json if one["state"] == "connected"])
    assert [(one["vdev"], one["target"]) for one in disks] == [("xvdc", str(image))]
    assert nonroot("shutdown", "-w", "--timeout", "120", "net").status == 0


def test_the_first_devices_come_while_it_runs(nonroot: Run, tmp_path: Path) -> None:
    need("cloud-amd64")
    image = tmp_path / "data.img"
    image.write_bytes(bytes(8 << 20))
    assert nonroot("create", "name=bare", "memory=128").status == 0
    assert nonroot("block-list", "--json", "bare").json == nonroot("network-list", "--json", "bare").json == []
    assert nonroot("block-attach", "bare", f"{image},raw,xvda,w").status == 0
    assert nonroot("network-attach", "bare", "bridge=lan").status == 0
    for verb in ("block-list", "network-list"):
        until(lambda: [one["state"] for one in nonroot(verb, "--json", "bare").json] == ["connected"])  # noqa: B023
    assert nonroot("destroy", "bare").status == 0
