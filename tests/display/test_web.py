"""The screen in a browser: who gets in, and that the WebSocket carries VNC."""

import contextlib
import http.client
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin, Subprotocol

from nonroot.api import Domain


@pytest.fixture(scope="module")
def novnc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like noVNC's."""
    root = tmp_path_factory.mktemp("web") / "novnc"
    (root / "core").mkdir(parents=True)
    (root / "vnc.html").write_text("<title>a page</title>")
    (root / "core" / "rfb.js").write_text("export default 1;")
    (root.parent / "secret").write_text("not for the web")
    (root / "leads-out").symlink_to(root.parent / "secret")
    return root


@pytest.fixture(scope="module")
def link(screen: Domain, novnc: Path) -> str:
    screen.vnc()
    return str(screen._client.request("web", 30, root=str(novnc))["url"])


@dataclass
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(port: int, path: str, **headers: str) -> Answer:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


@pytest.fixture(scope="module")
def port(link: str) -> int:
    return urlsplit(link).port or 0


@pytest.fixture(scope="module")
def cookie(link: str, port: int) -> str:
    parts = urlsplit(link)
    answer = ask(port, f"{parts.path}?{parts.query}")
    assert answer.status == 200
    assert b'http-equiv="refresh" content="0;url=/vnc.html?autoconnect=1' in answer.body
    given = answer.headers["Set-Cookie"]
    assert "HttpOnly" in given
    assert "SameSite=Strict" in given
    return given.split(";")[0]


def test_a_link_works_once(link: str, port: int, cookie: str) -> None:
    parts = urlsplit(link)
    assert ask(port, f"{parts.path}?{parts.query}").status == 403
    assert len(parse_qs(parts.query)["token"][0]) >= 32


def test_files_need_the_cookie(port: int, cookie: str) -> None:
    assert ask(port, "/vnc.html").status == 403
    assert ask(port, "/vnc.html", Cookie="nonroot=guess").status == 403
    page = ask(port, "/vnc.html", Cookie=cookie)
    assert (page.status, page.body) == (200, b"<title>a page</title>")
    assert page.headers["X-Frame-Options"] == "DENY"
    script = ask(port, "/core/rfb.js", Cookie=cookie)
    assert script.headers["Content-Type"] == "text/javascript"


@pytest.mark.parametrize(
    "path", ["/../secret", "/%2e%2e/secret", "/core/../../secret", "/leads-out", "//etc/passwd", "/core", "/nothing"]
)
def test_nothing_else_is_served(port: int, cookie: str, path: str) -> None:
    answer = ask(port, path, Cookie=cookie)
    assert answer.status == 404
    assert b"not for the web" not in answer.body


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost:1", "127.0.0.1.evil.example:80"])
def test_other_names_of_this_machine_get_nothing(port: int, cookie: str, host: str) -> None:
    assert ask(port, "/vnc.html", Cookie=cookie, Host=host).status == 403


def test_the_socket_carries_vnc(screen: Domain, port: int, cookie: str) -> None:
    with connect(
        f"ws://127.0.0.1:{port}/websockify",
        origin=Origin(f"http://127.0.0.1:{port}"),
        additional_headers={"Cookie": cookie},
        subprotocols=[Subprotocol("binary")],
    ) as socket:
        assert socket.subprotocol == "binary"
        assert socket.recv(10) == b"RFB 003.008\n"
        socket.send(b"RFB 003.008\n")
        assert socket.recv(10) == b"\1\1"
        socket.send(b"\1")
        assert socket.recv(10) == bytes(4)
        socket.send(b"\1")
        start = socket.recv(10)
        assert isinstance(start, bytes)
        assert struct.unpack(">HH", start[:4]) == (720, 400)
        assert start.endswith(b"screen")
        socket.send(struct.pack(">BBHHHH", 3, 0, 0, 0, 720, 400))
        data = b""
        while len(data) < 16 + 720 * 400 * 4:
            piece = socket.recv(10)
            assert isinstance(piece, bytes)
            data += piece
        assert data[16:] == screen.screen().tobytes("raw", "BGRX")


@pytest.mark.parametrize(
    ("origin", "with_cookie"),
    [("http://evil.example", True), (None, True), ("null", True), ("own", False), ("https://127.0.0.1:1", True)],
)
def test_pages_of_other_sites_get_no_socket(port: int, cookie: str, origin: str | None, with_cookie: bool) -> None:
    given = f"http://127.0.0.1:{port}" if origin == "own" else origin
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(
            f"ws://127.0.0.1:{port}/websockify",
            origin=None if given is None else Origin(given),
            additional_headers={"Cookie": cookie} if with_cookie else {},
        ),
    ):
        pass
    assert refused.value.response.status_code == 403


def test_raw_nonsense(screen: Domain, port: int) -> None:
    for data in (b"\0" * 100, b"GET /\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", b"A" * 100_000):
        with socket.create_connection(("127.0.0.1", port), 10) as raw:
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            try:
                while raw.recv(4096):
                    pass
            except OSError:
                pass
    assert ask(port, "/").status == 403
    assert screen.stats.state == "running"
