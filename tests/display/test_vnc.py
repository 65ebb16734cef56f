"""The VNC server of a real domain, with viewers of our own: what they see, what they can do, and what they cannot."""

import contextlib
import random
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.api import Domain
from nonroot.display.rfb import PixelFormat
from nonroot.display.vnc import MAX_VIEWERS, des_response
from nonroot.domain.viewers import parse_address
from nonroot.errors import BadOptionError, TransientError
from tests.display.conftest import make
from tests.display.vga_guest import GREETING
from tests.display.vnc_client import DESKTOP_SIZE, EXTENDED_KEYS, POINTER_MOTION, RAW, TIGHT, ZRLE, VncClient
from tests.waiting import PATIENCE, wait_until, wait_until_quiet


@pytest.fixture(scope="module")
def path(screen: Domain) -> str:
    address = screen.vnc()
    assert address.startswith("unix:")
    return address.removeprefix("unix:")


@pytest.fixture
def viewer(path: str) -> Iterator[VncClient]:
    client = VncClient.unix(path)
    yield client
    client.close()


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def follows(viewer: VncClient, screen: Domain) -> bool:
    """Whether a viewer shows what there is; if not, it gets one more update."""
    if viewer.picture.tobytes() == screen.screen().tobytes():
        return True
    viewer.request()
    viewer.update()
    return False


def test_the_socket_is_private(screen: Domain, path: str) -> None:
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700
    assert screen.vnc() == f"unix:{path}", "asked again, it is the same"


def test_the_first_picture(screen: Domain, viewer: VncClient) -> None:
    assert viewer.name == "screen"
    assert viewer.picture.size == (720, 400)
    viewer.request(False)
    viewer.update()
    assert viewer.picture.tobytes() == screen.screen().tobytes()


@pytest.mark.parametrize("encoding", [RAW, TIGHT, ZRLE])
@pytest.mark.parametrize(
    "wanted",
    [
        PixelFormat(),
        PixelFormat(big_endian=True, shifts=(0, 8, 16)),
        PixelFormat(16, 16, False, True, (31, 63, 31), (11, 5, 0)),
        PixelFormat(8, 8, False, True, (7, 7, 3), (0, 3, 6)),
    ],
    ids=["32", "32be", "16", "8"],
)
def test_encodings(screen: Domain, viewer: VncClient, encoding: int, wanted: PixelFormat) -> None:
    viewer.set_format(wanted)
    viewer.set_encodings(encoding)
    viewer.request(False)
    viewer.update()
    assert set(viewer.seen) == {encoding}
    shown = screen.screen()
    for maximum, channel, original in zip(wanted.maxima, viewer.picture.split(), shown.split(), strict=True):
        levels = [((value * maximum + 127) // 255) * 255 // maximum for value in range(256)]
        assert channel.tobytes() == original.point(levels).tobytes()


@pytest.mark.parametrize("encoding", [RAW, TIGHT, ZRLE])
def test_updates_bring_what_has_changed(screen: Domain, viewer: VncClient, encoding: int) -> None:
    viewer.set_encodings(encoding)
    viewer.request(False)
    viewer.update()
    viewer.seen.clear()
    for letter in "xyz":
        viewer.request()
        screen.keyboard.type(letter)
        assert viewer.update() <= 2, "one place, perhaps with the cursor"
    wait_until(lambda: follows(viewer, screen))


def test_keys_of_a_viewer(screen: Domain, viewer: VncClient) -> None:
    for keysym in b"viewer":
        viewer.key(keysym, True)
        viewer.key(keysym, False)
    screen.wait_for_text("viewer", 10)
    viewer.set_encodings(RAW, EXTENDED_KEYS, POINTER_MOTION)
    viewer.request(False)
    viewer.update()
    assert set(viewer.told) == {EXTENDED_KEYS, POINTER_MOTION}
    for code in (0x2D, 0x2E):  # x, c wherever they are on the viewer's keyboard
        viewer.extended_key(0xFFFFFF, code, True)
        viewer.extended_key(0xFFFFFF, code, False)
    screen.wait_for_text("viewerxc", 10)


def test_the_pointer_is_taken(screen: Domain, viewer: VncClient) -> None:
    for place in range(100):
        viewer.pointer(place, place * 2, place & 1)
    viewer.pointer(5, 5, 8)
    viewer.request(False)
    viewer.update()
    assert viewer.picture.tobytes() == screen.screen().tobytes()


def test_several_viewers_see_the_same(screen: Domain, path: str) -> None:
    viewers = [VncClient.unix(path) for _ in range(4)]
    try:
        for number, one in enumerate(viewers):
            one.set_encodings((RAW, TIGHT, ZRLE, RAW)[number])
            one.request(False)
            one.update()
            one.request()
        screen.keyboard.type("s")
        for one in viewers:
            one.update()
        for one in viewers:
            wait_until(lambda: follows(one, screen))  # noqa: B023 - called before it changes
    finally:
        for one in viewers:
            one.close()


def test_idle_viewers_cost_nothing(screen: Domain, viewer: VncClient) -> None:
    viewer.request(False)
    viewer.update()
    viewer.request()
    pids = [screen.pid, *children(screen.pid)]
    assert len(pids) == 2
    wait_until_quiet(lambda: sum(map(cpu_ticks, pids)), 0, 0.5)


# ── those who mean no good ──


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    return sock


def test_hostile_viewers_hurt_nobody(screen: Domain, path: str) -> None:
    rng = random.Random(11)
    started = b"RFB 003.008\n\1\1"
    attacks = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"RFB 003.008\n\2" + bytes(16),
        started + b"\x06\0\0\0\xff\xff\xff\xff" + bytes(1000),
        started + b"\x02\0\xff\xff" + bytes(4000),
        started + b"\0\0\0\0" + bytes(16),
        started + struct.pack(">BBHHHH", 3, 0, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF) * 500,
        started + struct.pack(">BBHH", 5, 255, 0, 0) * 2000 + struct.pack(">BBHH", 5, 0, 65535, 65535) * 2000,
        started + struct.pack(">BBxxI", 4, 1, 0x1234567) * 5000 + struct.pack(">BBxxI", 4, 1, 0xFFC8) * 50,
        *(started + rng.randbytes(2000) for _ in range(20)),
    ]
    for attack in attacks:
        sock = connect(path)
        sock.sendall(attack)
        sock.shutdown(socket.SHUT_WR)
        try:
            while sock.recv(1 << 16):
                pass
        except OSError:
            pass
        sock.close()
    good = VncClient.unix(path)
    good.request(False)
    good.update()
    wait_until(lambda: follows(good, screen))
    good.close()
    assert len(children(screen.pid)) == 1
    assert screen.stats.state == "running"


def test_a_viewer_that_never_reads_holds_nobody_up(screen: Domain, path: str, viewer: VncClient) -> None:
    lazy = connect(path)
    lazy.sendall(b"RFB 003.008\n\1\1" + struct.pack(">BBHHHH", 3, 0, 0, 0, 720, 400) * 200)
    viewer.request(False)
    viewer.update()
    viewer.request()
    screen.keyboard.type("l")
    viewer.update()
    lazy.close()


@pytest.mark.slow
def test_there_is_room_for_some_and_then_no_more(path: str) -> None:
    def greeted(count: int) -> int:
        socks = [connect(path) for _ in range(count)]
        welcome = 0
        for sock in socks:
            with contextlib.suppress(OSError):
                welcome += sock.recv(12) == b"RFB 003.008\n"
        for sock in socks:
            sock.close()
        assert welcome <= MAX_VIEWERS
        return welcome

    wait_until(lambda: greeted(MAX_VIEWERS + 4) == MAX_VIEWERS, pause=0.1)  # those of the tests before go soon
    wait_until(lambda: greeted(1), pause=0.1)


# ── passwords and addresses ──


@pytest.fixture(scope="module")
def guarded(kernel: Path, runtime: Path) -> Iterator[tuple[str, int]]:
    with make(kernel) as domain:
        domain.wait_for_text(GREETING, 30)
        host, _, port = domain.vnc("127.0.0.1:0", "geheim").partition(":")
        yield host, int(port)


@pytest.mark.slow
@pytest.mark.parametrize("version", [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n"])
def test_a_password_lets_in(guarded: tuple[str, int], version: bytes) -> None:
    client = VncClient(socket.create_connection(guarded), version, lambda challenge: des_response(b"geheim", challenge))
    assert client.kind == 2
    client.request(False)
    client.update()
    client.close()


@pytest.mark.slow
def test_a_wrong_password_does_not(guarded: tuple[str, int]) -> None:
    began = time.monotonic()
    with (
        socket.create_connection(guarded) as sock,
        pytest.raises(PermissionError, match="wrong password"),
    ):
        VncClient(sock, b"RFB 003.008\n", lambda challenge: bytes(16))
    assert time.monotonic() - began > 0.9, "guessing takes its time"


@pytest.mark.slow
def test_it_listens_on_loopback_only(guarded: tuple[str, int]) -> None:
    port = guarded[1]
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [fields[1] for fields in sockets if fields[3] == "0A"]
    assert [address for address in listening if address.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.0.0.0:5900", "this machine only"),
        (":5900", "this machine only.*all addresses"),
        ("example.org:5900", "ssh -L"),
        ("[::]:5900", "this machine only"),
        ("127.0.0.1", "no address"),
        ("127.0.0.1:99999", "no port"),
        ("unix:", "no path"),
        ("unix:" + "x" * 200, "no path"),
        ("5900", "no address"),
    ],
)
def test_other_addresses_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadOptionError, match=message):
        parse_address(text)


def test_addresses() -> None:
    assert str(parse_address("127.0.0.1:5901")) == "127.0.0.1:5901"
    assert parse_address("localhost:0").host == "127.0.0.1"
    assert parse_address("[::1]:7").host == "::1"
    assert parse_address("unix:/tmp/x").path == "/tmp/x"


@pytest.mark.slow
def test_places_that_cannot_be_listened_at(kernel: Path, tmp_path: Path) -> None:
    with make(kernel) as domain:
        file = tmp_path / "file"
        file.write_text("mine")
        with pytest.raises(TransientError, match="cannot listen"):
            domain.vnc(f"unix:{file}")
        assert file.read_text() == "mine"
        with pytest.raises(TransientError, match="cannot listen"):
            domain.vnc("unix:/nonexistent/socket")
        with pytest.raises(BadOptionError, match="needs a password"):
            domain.vnc("127.0.0.1:0")
        assert domain.vnc(f"unix:{tmp_path / 'good'}") == f"unix:{tmp_path / 'good'}"
        with pytest.raises(BadOptionError, match="listens at .* already"):
            domain.vnc(f"unix:{tmp_path / 'other'}")
    wait_until(lambda: not (tmp_path / "good").exists())


def test_the_screen_changes_its_size(kernel: Path) -> None:
    with make(kernel) as domain:
        domain.wait_for_text(GREETING, 30)
        path = domain.vnc().removeprefix("unix:")
        grows, stays = VncClient.unix(path), VncClient.unix(path)
        grows.set_encodings(RAW, DESKTOP_SIZE)
        stays.set_encodings(RAW)
        for one in (grows, stays):
            one.request(False)
            one.update()
        domain.keyboard.type("<f1>")
        deadline = time.monotonic() + PATIENCE
        while grows.picture.size != (320, 200) and time.monotonic() < deadline:
            grows.request()
            grows.update()
        wanted = domain.screen()
        while grows.picture.getpixel((319, 199)) == (0, 0, 0) and time.monotonic() < deadline:
            grows.request()
            grows.update()
        assert grows.picture.size == wanted.size == (320, 200)
        assert grows.picture.getpixel((63, 0)) == (255, 255, 255)
        stays.request(False)
        stays.update()
        assert stays.picture.size == (720, 400)
        assert stays.picture.getpixel((63, 0)) == (255, 255, 255)
        assert stays.picture.getpixel((719, 399)) == (0, 0, 0)
        grows.close()
        stays.close()
