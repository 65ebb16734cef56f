"""Domains that start in firmware, through the API and the command line."""

import os
from pathlib import Path

import pytest

import nonroot
from nonroot.cli.main import main
from nonroot.domain.options import DomainOptions
from nonroot.errors import BadOptionError
from tests.platform.test_reset import BY_CF9, rom

SPIN = bytes.fromhex("ebfe")
# Until PM1_STS has the power button's bit: mov dx, 0x600; in ax, dx; test ah, 1; jz; then the ROM's power-off.
UNTIL_POWER_BUTTON = bytes.fromhex("ba0006 ed f6c401 74fa ba0406 b80034 ef")


def image(tmp_path: Path, code: bytes, rounds: int = 3) -> Path:
    path = tmp_path / "bios.bin"
    path.write_bytes(rom(code, rounds))
    return path


def options(**more: object) -> dict[str, object]:
    return {"memory": "16M", "fetch": False, "timeout": 30, **more}


def test_resets_are_no_end(tmp_path: Path) -> None:
    with nonroot.Domain(firmware=image(tmp_path, BY_CF9), **options()) as domain:  # type: ignore[arg-type]
        assert domain.wait(30).reason == "poweroff"
        assert domain.console.text == "123"


def test_resets_can_be_an_end(tmp_path: Path) -> None:
    with nonroot.Domain(firmware=image(tmp_path, BY_CF9), reboot=False, **options()) as domain:  # type: ignore[arg-type]
        assert domain.wait(30).reason == "reset"
        assert domain.console.text == "1"


def test_the_reset_button(tmp_path: Path) -> None:
    with nonroot.Domain(firmware=image(tmp_path, SPIN), **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        domain.reset()
        domain.console.expect("2", 30)
        domain.reset()
        assert domain.wait(30).reason == "poweroff"


def test_the_power_button(tmp_path: Path) -> None:
    with nonroot.Domain(firmware=image(tmp_path, UNTIL_POWER_BUTTON), **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        assert domain.stopped is None
        domain.press_power_button()
        assert domain.wait(30).reason == "poweroff"


def test_the_buttons_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = f"buttons-{os.getpid()}"
    with nonroot.Domain(firmware=image(tmp_path, UNTIL_POWER_BUTTON), name=name, **options()) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        assert main(["reset", name]) == 0
        domain.console.expect("2", 30)
        assert main(["power-button", name]) == 0
        assert domain.wait(30).reason == "poweroff"
    assert main(["reset", name]) == 125
    assert name in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"boot": "x"}, "boot order"),
        ({"boot": ""}, "boot order"),
        ({"boot": "cc"}, "boot order"),
        ({"agent": True}, "commands"),
        ({"kernel": "/etc/hostname"}, "not in both"),
    ],
)
def test_bad_options(tmp_path: Path, wrong: dict[str, object], words: str) -> None:
    given = {"firmware": str(image(tmp_path, SPIN)), "agent": False, "memory": 16 << 20, **wrong}
    with pytest.raises(BadOptionError, match=words):
        DomainOptions(**given).check()  # type: ignore[arg-type]


def test_an_image_of_a_strange_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bios.bin"
    path.write_bytes(b"x" * 1000)
    with pytest.raises(BadOptionError, match="1000 bytes"):
        nonroot.Domain(firmware=path, **options()).start()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--boot", "cdx"], "boot order"), (["--boot", "c", "--", "true"], "command"), (["--firmware", "/none"], "/none")],
)
def test_the_command_line_refuses(arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--no-fetch", *arguments]) == 125
    said = capfd.readouterr()
    assert words in said.err
    assert said.out == ""
    assert said.err.count("\n") == 1
