"""Linux's own drivers on our display adapter, keyboard and mouse: bochs-drm with its console, atkbd, psmouse."""

import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from nonroot.api import Domain
from nonroot.domain.wire import Kind
from nonroot.guests.linux import cached
from tests.waiting import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.guest]

FLAVOUR = "amd64"
EVENT = struct.Struct("<qqHHi")
EV_REL, EV_KEY, KEY_N, BTN_LEFT = 2, 1, 49, 0x110


def with_dependencies(root: Path, *names: str) -> list[Path]:
    """Modules in the order of loading."""
    order: list[Path] = []
    for name in names:
        path = next(path for path in root.rglob("*.ko") if path.stem.replace("-", "_") == name)
        found = re.search(rb"\0depends=([^\0]*)", path.read_bytes())
        assert found
        needed = [word for word in found[1].decode().replace("-", "_").split(",") if word]
        order += [*with_dependencies(root, *needed), path]
    return list(dict.fromkeys(order))


@pytest.fixture(scope="module")
def linux() -> Iterator[Domain]:
    guest = cached(FLAVOUR)
    if guest is None or guest.modules is None:
        pytest.skip(f"Debian's {FLAVOUR} kernel has not been fetched (make test-all)")
    modules = with_dependencies(guest.modules, "evdev", "psmouse", "bochs")
    with Domain(display=True, flavour=FLAVOUR, fetch=False) as domain:
        for module in modules:
            domain.copy_in(module, f"/tmp/{module.name}")
        domain.run(" && ".join(f"insmod /tmp/{module.name}" for module in modules), check=True)
        yield domain


def test_the_framebuffer(linux: Domain) -> None:
    assert linux.run("cat /sys/class/graphics/fb0/virtual_size").stdout.strip() == "1024,768"
    assert linux.screen().size == (1024, 768)
    data = bytes((x ^ y) & 0xFF if c < 3 else 0 for y in range(768) for x in range(1024) for c in range(4))
    linux.run("printf '\\033[?25l' > /dev/tty0; cat > /dev/fb0", stdin=data, check=True)
    wanted = Image.frombytes("RGB", (1024, 768), data, "raw", "BGRX")
    deadline = time.monotonic() + PATIENCE
    while linux.screen().tobytes() != wanted.tobytes():  # the kernel copies its shadow soon
        different = ImageChops.difference(linux.screen(), wanted).getbbox()
        assert time.monotonic() < deadline, different
        time.sleep(0.1)


def test_the_keyboard_and_the_mouse(linux: Domain) -> None:
    devices = linux.run("cat /proc/bus/input/devices").stdout

    def events(name: str, count: int, act: Callable[[], object]) -> list[tuple[int, ...]]:
        """What comes of a device after ``act``."""
        block = next(block for block in devices.split("\n\n") if name in block)
        number = re.search(r"event(\d+)", block)
        assert number, block
        output, is_open = bytearray(), threading.Event()

        def collect(kind: Kind, data: bytes) -> None:
            if kind == Kind.STDOUT:
                output.extend(data)
            else:
                is_open.set()

        script = f"exec < /dev/input/event{number[1]}; echo open >&2; head -c {EVENT.size * count}"
        command = linux.popen(script, on_output=collect)
        assert is_open.wait(PATIENCE)
        act()
        command.wait(PATIENCE)
        return [EVENT.unpack_from(output, EVENT.size * index)[2:] for index in range(count)]

    got = events("AT Translated Set 2 keyboard", 6, lambda: linux.keyboard.type("n"))
    assert [event[1:] for event in got if event[0] == EV_KEY] == [(KEY_N, 1), (KEY_N, 0)]

    # One after the other: a mouse that is not asked at once adds up what happens to it.
    got = events("Mouse", 3, lambda: linux.mouse.move(5, -3))
    assert [event for event in got if event[0]] == [(EV_REL, 0, 5), (EV_REL, 1, -3)]
    got = events("Mouse", 4, lambda: linux.mouse.click())
    assert [event for event in got if event[0]] == [(EV_KEY, BTN_LEFT, 1), (EV_KEY, BTN_LEFT, 0)]
