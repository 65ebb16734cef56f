"""The screen and the keyboard of a PC that boots by SeaBIOS: its text, GRUB's menu, and a command typed into it."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import nonroot
from nonroot.api import Domain
from nonroot.errors import SoftwareMissingError
from nonroot.guests.packages import package
from tests.display.vnc_client import TIGHT, VncClient

pytestmark = [pytest.mark.slow, pytest.mark.guest]

RESCUE_CD = "usr/lib/grub-rescue/grub-rescue-cdrom.iso"


@pytest.fixture(scope="module", params=["internal", "stub"])
def grub(request: pytest.FixtureRequest) -> Iterator[Domain]:
    try:
        cd = package("grub-rescue-pc") / RESCUE_CD
        model = request.param
        domain = Domain(firmware="seabios", cdrom=cd, boot="d", memory="64M", name="grub", device_model=model).start()
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    yield domain
    domain.destroy()


def command(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-m", "nonroot", *arguments], capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("model", ["internal", "stub", "dom0"])
def test_seabios_says_that_nothing_boots(model: str) -> None:
    try:
        with Domain(firmware="seabios", memory="32M", device_model=model) as domain:
            text = domain.wait_for_text("No bootable device", 60)
            assert text.splitlines()[0].startswith("SeaBIOS (version")
            picture = domain.screen()
            assert picture.size == (720, 400)
            assert picture.getcolors(4) is not None, "two colours: grey on black"
            assert domain.stats.exits["Mmio"] < 6000, "the font is loaded by exits, text is not"
    except SoftwareMissingError as error:
        pytest.skip(str(error))


def test_the_menu_and_a_typed_command(grub: Domain, tmp_path: Path) -> None:
    grub.wait_for_text("GNU GRUB", 120)
    with nonroot.connect("grub") as running:
        viewer = VncClient.unix(running.vnc().removeprefix("unix:"))
        viewer.set_encodings(TIGHT)
        viewer.request(False)
        viewer.update()
        # The command line of the rescue CD, by its menu or at once.
        if "grub>" not in grub.screen_text():
            assert command("type", "grub", "c").returncode == 0
            grub.wait_for_text("grub>", 60)
        assert json.loads(command("type", "grub", "echo Typed 6 * 7 = 42<ret>", "--json").stdout)["keys"] > 20
        text = grub.wait_for_text("grub> echo Typed 6 * 7 = 42", 60)
        deadline = time.monotonic() + 60
        while not any(line.startswith("Typed 6 * 7 = 42") for line in text.splitlines()):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
            text = grub.screen_text()
        for key in b"lsx":
            viewer.key(key, True)
            viewer.key(key, False)
        grub.wait_for_text("grub> lsx", 60)
        deadline = time.monotonic() + 20
        while viewer.picture.tobytes() != grub.screen().tobytes():
            assert time.monotonic() < deadline
            viewer.request()
            viewer.update()
        viewer.close()
    file = tmp_path / "grub.png"
    assert command("screenshot", "grub", str(file)).returncode == 0
    assert file.read_bytes()[:4] == b"\x89PNG"
