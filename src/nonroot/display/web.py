"""The screen in a browser: noVNC's files and a WebSocket, on loopback.

A link works once: the browser that opens it gets a cookie, and everything else needs that cookie. The WebSocket needs
the right Origin as well, and every request a Host of this machine: pages of other sites, and names that they make point
here, get nothing.
"""

import hmac
import http
import mimetypes
import secrets
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from nonroot.display.vnc import VncServer

__all__ = ["WebServer"]

LINK_LIFE: Final = 300.0
"""Seconds that a link can wait to be opened."""
PIECE: Final = 1 << 16
"""Bytes of a message."""
COOKIE: Final = "nonroot"
SOCKET_PATH: Final = "/websockify"
PAGE: Final = "/vnc.html?autoconnect=1&amp;resize=scale&amp;path=websockify"
SAFE_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'self' ws:; frame-ancestors 'none'",
}


class WebTransport:
    """A WebSocket's bytes."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection

    async def receive(self) -> bytes:
        """The next message's bytes; none at the end, or for text."""
        try:
            data = await self._connection.recv()
        except ConnectionClosed:
            return b""
        return data if isinstance(data, bytes) else b""

    async def send(self, data: bytes) -> None:
        """Send and wait."""
        try:
            for at in range(0, len(data), PIECE):
                await self._connection.send(data[at : at + PIECE])
        except ConnectionClosed as error:
            raise OSError(str(error)) from None


class WebServer:
    """Links, files and WebSockets."""

    def __init__(self, vnc: VncServer, root: Path) -> None:
        """``root``: noVNC's folder."""
        self._vnc = vnc
        self._root = root.resolve()
        self._session = secrets.token_urlsafe(32)
        self._links: dict[str, float] = {}
        self._port = 0
        self._server: Server | None = None

    async def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""
        self._server = server = await serve(
            self._viewer,
            "127.0.0.1",
            0,
            process_request=self._request,
            select_subprotocol=_subprotocol,
            compression=None,
            max_size=1 << 20,
            server_header=None,
        )
        self._port = next(iter(server.sockets)).getsockname()[1]

    def link(self) -> str:
        """A new link; it works once, within five minutes."""
        now = time.monotonic()
        self._links = {token: until for token, until in self._links.items() if until > now}
        token = secrets.token_urlsafe(24)
        self._links[token] = now + LINK_LIFE
        return f"http://127.0.0.1:{self._port}/?token={token}"

    def _is_host(self, value: str | None) -> bool:
        return value in (f"127.0.0.1:{self._port}", f"localhost:{self._port}")

    def _has_cookie(self, request: Request) -> bool:
        for header in request.headers.get_all("Cookie"):
            for part in header.split(";"):
                name, _, value = part.strip().partition("=")
                if name == f"{COOKIE}{self._port}" and hmac.compare_digest(value.encode(), self._session.encode()):
                    return True
        return False

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """A response, or None to go on with the WebSocket."""
        hosts = request.headers.get_all("Host")
        if len(hosts) != 1 or not self._is_host(hosts[0]):
            return _plain(http.HTTPStatus.FORBIDDEN, "this is not the name of this machine's own server")
        try:
            parts = urlsplit(request.path)
        except ValueError:
            return _plain(http.HTTPStatus.BAD_REQUEST, "no such address")
        if parts.path == "/" and "token" in parse_qs(parts.query):
            return self._open(parse_qs(parts.query)["token"][0])
        if not self._has_cookie(request):
            return _plain(http.HTTPStatus.FORBIDDEN, "open the link that nonroot vncviewer --web gives; it works once")
        if parts.path == SOCKET_PATH:
            origins = request.headers.get_all("Origin")
            if len(origins) != 1 or not self._is_host(origins[0].removeprefix("http://")):
                return _plain(http.HTTPStatus.FORBIDDEN, "a page of another site may not look at this screen")
            return None
        return self._file(parts.path)

    def _open(self, token: str) -> Response:
        until = self._links.pop(token, 0.0)
        if until <= time.monotonic():
            return _plain(http.HTTPStatus.FORBIDDEN, "this link has been used, or is too old; ask for another one")
        # A page of ours that goes on by itself: after a redirect from another site's page, the browser would keep the
        # cookie to itself.
        body = f'<!doctype html><title>nonroot</title><meta http-equiv="refresh" content="0;url={PAGE}">'.encode()
        headers = Headers(SAFE_HEADERS)
        headers["Set-Cookie"] = f"{COOKIE}{self._port}={self._session}; HttpOnly; SameSite=Strict; Path=/"
        headers["Content-Type"] = "text/html; charset=utf-8"
        headers["Content-Length"] = str(len(body))
        return Response(http.HTTPStatus.OK, "OK", headers, body)

    def _file(self, path: str) -> Response:
        wanted = (self._root / unquote(path).lstrip("/")).resolve()
        if not wanted.is_relative_to(self._root) or not wanted.is_file():
            return _plain(http.HTTPStatus.NOT_FOUND, "there is no such file")
        body = wanted.read_bytes()
        headers = Headers(SAFE_HEADERS)
        headers["Content-Type"] = mimetypes.guess_type(wanted.name)[0] or "application/octet-stream"
        if wanted.suffix == ".js":
            headers["Content-Type"] = "text/javascript"  # whatever this machine's table says
        headers["Content-Length"] = str(len(body))
        return Response(http.HTTPStatus.OK, "OK", headers, body)

    async def _viewer(self, connection: ServerConnection) -> None:
        # The cookie has let it in: a password would only be asked where somebody without one could come.
        await self._vnc.serve(WebTransport(connection), trusted=True)


def _subprotocol(connection: ServerConnection, offered: Any) -> Subprotocol | None:
    return Subprotocol("binary") if "binary" in offered else None


def _plain(status: http.HTTPStatus, text: str) -> Response:
    body = f"{text}\n".encode()
    headers = Headers(SAFE_HEADERS)
    headers["Content-Type"] = "text/plain; charset=utf-8"
    headers["Content-Length"] = str(len(body))
    return Response(status, status.phrase, headers, body)
