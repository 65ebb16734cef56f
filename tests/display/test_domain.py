"""A real domain's screen, keyboard and mouse, as the API and the command show them."""

import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import nonroot
from nonroot.api import Domain
from nonroot.cli.main import main
from nonroot.domain import registry
from nonroot.errors import BadOptionError, NotRunningError, UnsupportedError, WaitTimeoutError
from tests.display.conftest import make
from tests.display.vga_guest import GREETING, linear_pixel
from tests.waiting import PATIENCE, wait_until, wait_until_quiet


def command(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run([sys.executable, "-m", "nonroot", *arguments], capture_output=True, timeout=60, check=False)


def expected_row(text: str, ink: int, paper: int, glyph_line: int = 0) -> list[int]:
    """One line of pixels of text in the guest's font: its glyphs' lines are their codes."""
    row = []
    for character in text:
        bits = ord(character) if character != " " else 0
        row += [ink if bits >> 7 - column & 1 else paper for column in range(8)] + [paper]
    return row


def test_text_and_picture(screen: Domain) -> None:
    assert screen.screen_text().splitlines()[0] == GREETING
    picture = screen.screen()
    assert picture.size == (720, 400)
    assert picture.mode == "RGB"
    # Grey n of the guest's palette is n * 4 + n // 16; colour 0x1e is attribute registers 0x3e on 1.
    ink, paper = 0x3E << 2 | 0x3E >> 4, 1 << 2
    wanted = expected_row(GREETING, ink, paper)
    for y in (0, 7, 15):
        assert [picture.getpixel((x, y)) for x in range(len(wanted))] == [(v, v, v) for v in wanted]
    assert picture.getpixel((719, 399)) == (0, 0, 0)


def test_typing(screen: Domain) -> None:
    screen.keyboard.type("echo me")
    text = screen.wait_for_text("echo me", 10)
    assert "echo me" in text.splitlines()[1]
    screen.keyboard.press("x")
    screen.keyboard.release("x")
    screen.wait_for_text("echo mex", 10)
    with pytest.raises(BadOptionError, match="no key 'nokey'"):
        screen.keyboard.type("<nokey>")
    with pytest.raises(BadOptionError, match="US keyboard"):
        screen.keyboard.type("ü")


def test_waiting_in_vain_says_what_there_was(screen: Domain) -> None:
    with pytest.raises(WaitTimeoutError, match="did not show 'never'") as caught:
        screen.wait_for_text("never", 0.2)
    assert GREETING in caught.value.details["screen"]


def test_the_mouse_takes_what_it_is_given(screen: Domain) -> None:
    screen.mouse.move(3, -4)
    screen.mouse.click("right")
    screen.mouse.wheel(-1)
    with pytest.raises(BadOptionError, match="no button"):
        screen.mouse.click("lefft")
    with pytest.raises(BadOptionError, match="32767"):
        screen.mouse.move(1 << 20, 0)


def test_nobody_looks_while_the_guest_is_halted(screen: Domain) -> None:
    serial = screen._client.request("screen")["serial"]
    pending = screen._client.submit("screen_wait", {"serial": serial})
    # The two questions for the statistics themselves kick the vCPU, and nothing else does.
    wait_until_quiet(lambda: sum(screen.stats.exits.values()), 6, 0.5)
    assert not pending.done()
    screen.keyboard.type("q")
    assert pending.wait(10)["serial"] != serial


def test_by_name(screen: Domain, runtime: Path) -> None:
    assert [entry.name for entry in nonroot.running()] == ["screen"]
    with nonroot.connect("screen") as other:
        assert other.screen_text().startswith(GREETING)
        assert other.facts["memory"] == 16 << 20
        assert other.state == "running"
    assert screen.screen_text().startswith(GREETING), "closing the connection leaves the domain alone"
    with pytest.raises(NotRunningError, match="no running domain 'sreen'; there are: screen"):
        nonroot.connect("sreen")
    assert stat.S_IMODE(runtime.stat().st_mode) == 0o700
    assert stat.S_IMODE((runtime / "screen.sock").stat().st_mode) == 0o600


def test_a_name_is_taken_once(screen: Domain, kernel: Path) -> None:
    with pytest.raises(BadOptionError, match="named 'screen' is running already"):
        make(kernel, name="screen").start()
    with pytest.raises(BadOptionError, match="no name for a domain"):
        make(kernel, name="../escape").start()


@pytest.mark.slow
def test_entries_of_dead_domains_vanish(kernel: Path, runtime: Path) -> None:
    domain = make(kernel).start()
    assert domain.name is not None
    assert domain.name in [entry.name for entry in registry.entries()]
    domain.vnc()
    os.kill(domain.pid, signal.SIGKILL)
    name = domain.name
    wait_until(lambda: not (registry.entries(), list(runtime.glob(f"{name}.*")))[1])
    domain.destroy()


def test_entries_of_domains_that_end_vanish(kernel: Path, runtime: Path) -> None:
    domain = make(kernel, name="short").start()
    domain.vnc()
    assert sorted(path.suffix for path in runtime.glob("short.*")) == [".json", ".sock", ".vnc"]
    domain.destroy()
    wait_until(lambda: not list(runtime.glob("short.*")))


def test_a_picture_has_no_text(kernel: Path) -> None:
    with make(kernel) as domain:
        domain.wait_for_text(GREETING, 30)
        domain.keyboard.type("<f1>")
        wait_until(lambda: domain.screen().size == (320, 200), pause=0.05)
        wait_until(lambda: domain.screen().getpixel((319, 199)) != (0, 0, 0), pause=0.05)
        picture = domain.screen()
        greys = [(v << 2 | v >> 4,) * 3 for v in range(64)]
        assert [picture.getpixel((x, 5)) for x in range(320)] == [greys[x & 63] for x in range(320)]
        with pytest.raises(UnsupportedError, match="picture, not text"):
            domain.screen_text()
        assert domain.stats.exits["Mmio"] < 6000, "stores to mode 13h's memory are no exits, all but the first"


def test_the_linear_framebuffer_is_memory(kernel: Path) -> None:
    with make(kernel) as domain:
        domain.wait_for_text(GREETING, 30)
        exits = domain.stats.exits
        domain.keyboard.type("<f2>")
        wanted = Image.new("RGB", (640, 480))
        wanted.putdata([linear_pixel(number) for number in range(640 * 480)])
        deadline = time.monotonic() + 20
        while domain.screen().tobytes() != wanted.tobytes():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert domain.stats.exits["Mmio"] == exits["Mmio"], "no store to it is an exit"


def test_a_domain_without_a_screen(kernel: Path) -> None:
    with Domain(kernel=kernel, agent=False, memory="16M", console=False) as domain:
        with pytest.raises(UnsupportedError, match="no screen"):
            domain.screen()
        with pytest.raises(UnsupportedError, match="no screen"):
            domain.keyboard.type("x")
        with pytest.raises(UnsupportedError, match="no screen"):
            domain.vnc()


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("type", {"strokes": [[0, True]]}),
        ("type", {"strokes": [[1, 1]]}),
        ("type", {"strokes": [["a", True]] * 3}),
        ("type", {"strokes": [[1, True]] * 10_000}),
        ("type", {}),
        ("pointer", {"dx": 1 << 40}),
        ("pointer", {"dx": "x"}),
        ("screen_wait", {}),
        ("vnc", {"address": 7}),
        ("vnc", {"address": "127.0.0.1:5900"}),
        ("vnc", {"address": "0.0.0.0:5900", "password": "x"}),
        ("vnc", {"password": "much too long"}),
        ("web", {"root": "/nonexistent"}),
        ("register", {"name": 7}),
    ],
)
def test_requests_without_sense_are_refused(screen: Domain, method: str, params: dict[str, Any]) -> None:
    with pytest.raises(BadOptionError):
        screen._client.submit(method, params).wait(30)


# ── the command ──


def test_list(screen: Domain) -> None:
    result = command("list")
    assert result.returncode == 0
    lines = result.stdout.decode().splitlines()
    assert lines[0].split() == ["Name", "ID", "Mem", "VCPUs", "State", "Time(s)"]
    assert lines[1].split()[:2] == ["Domain-0", "0"]
    assert lines[2].split()[0] == "screen"
    assert lines[2].split()[2:4] == ["16", "1"]
    entry = json.loads(command("list", "--json").stdout)[0]
    assert (entry["name"], entry["pid"], entry["display"]) == ("screen", screen.pid, True)


def test_screenshot(screen: Domain, tmp_path: Path) -> None:
    file = tmp_path / "s.png"
    result = command("screenshot", "screen", str(file), "--json")
    assert json.loads(result.stdout) == {"domain": "screen", "file": str(file), "width": 720, "height": 400}
    assert Image.open(file).tobytes() == screen.screen().tobytes()
    assert Image.open(io.BytesIO(command("screenshot", "screen", "-").stdout)).size == (720, 400)
    assert command("screenshot", "--text", "screen").stdout.decode().startswith(GREETING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("screenshot", "screen"), "name the FILE"),
        (("screenshot", "screen", "x.unknown"), "no kind of picture"),
        (("screenshot", "screen", "/nonexistent/x.png"), "cannot be written"),
        (("screenshot", "nobody", "x.png"), "no running domain 'nobody'"),
        (("type", "screen", "<bad>"), "no key 'bad'"),
        (("type", "screen", "<ret"), "no closing"),
        (("run", "--vnc", "0.0.0.0:1"), "this machine only"),
        (("run", "--vnc", "127.0.0.1"), "no address for VNC"),
        (("run", "--name", "a/b"), "no name for a domain"),
    ],
)
def test_mistakes_are_one_sentence(
    screen: Domain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 125
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_type(screen: Domain) -> None:
    assert json.loads(command("type", "screen", "by name", "--json").stdout) == {"domain": "screen", "keys": 7}
    screen.wait_for_text("by name", 10)


def test_names_are_completed(screen: Domain) -> None:
    environment = dict(os.environ, _NONROOT_COMPLETE="bash_complete", COMP_WORDS="nonroot type sc", COMP_CWORD="2")
    result = subprocess.run(
        [sys.executable, "-c", "from nonroot.cli.main import cli; cli(prog_name='nonroot')"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert result.stdout.decode().split() == ["plain,screen"]


@pytest.mark.parametrize("verb", ["list", "screenshot", "type", "vncviewer"])
def test_help_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"  nonroot {verb}" in capsys.readouterr().out


def test_viewers_that_are_not_there(screen: Domain, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "nonroot", "vncviewer", "screen"], capture_output=True, env=environment, check=False
    )
    assert result.returncode == 125
    assert b"no VNC viewer here" in result.stderr
    assert command("vncviewer", "screen", "--address").stdout.startswith(b"unix:/")


@pytest.mark.slow
def test_run_serves_its_screen(kernel: Path, runtime: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nonroot",
            "run",
            "--kernel",
            str(kernel),
            "-m",
            "16M",
            "--name",
            "run",
            "--vnc",
            "--json",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == f"nonroot: domain run: VNC at unix:{runtime / 'run.vnc'}\n".encode()
        with nonroot.connect("run") as running:
            running.wait_for_text(GREETING, 30)
            assert running.vnc() == f"unix:{runtime / 'run.vnc'}"
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=PATIENCE)
    record = json.loads(output)
    assert (record["name"], record["vnc"]) == ("run", f"unix:{runtime / 'run.vnc'}")
    wait_until(lambda: not list(runtime.glob("run.*")))
