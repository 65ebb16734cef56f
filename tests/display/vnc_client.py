"""A VNC viewer for tests: it understands everything that the server sends, and keeps the picture."""

import socket
import struct
import zlib
from pathlib import Path

from PIL import Image

from nonroot.display.rfb import PixelFormat

RAW, TIGHT, ZRLE, DESKTOP_SIZE, POINTER_MOTION, EXTENDED_KEYS = 0, 7, 16, -223, -257, -258


class VncClient:
    def __init__(self, sock: socket.socket, version: bytes = b"RFB 003.008\n", response: object = None) -> None:
        """``response``: called with the challenge, if there is one."""
        self.socket = sock
        self.socket.settimeout(20)
        self.buffer = b""
        assert self.read(12) == b"RFB 003.008\n"
        self.send(version)
        if version == b"RFB 003.003\n":
            (kind,) = struct.unpack(">I", self.read(4))
        else:
            kinds = self.read(self.read(1)[0])
            kind = kinds[0]
            self.send(bytes((kind,)))
        self.kind = kind
        if kind == 2:
            assert callable(response)
            self.send(response(self.read(16)))
        if version == b"RFB 003.008\n" or kind == 2:
            (self.result,) = struct.unpack(">I", self.read(4))
            if self.result:
                length = struct.unpack(">I", self.read(4))[0] if version == b"RFB 003.008\n" else 0
                raise PermissionError(self.read(length).decode())
        self.send(b"\1")
        width, height = struct.unpack(">HH", self.read(4))
        self.format = PixelFormat.unpack(self.read(16))
        self.name = self.read(struct.unpack(">I", self.read(4))[0]).decode()
        self.picture = Image.new("RGB", (width, height))
        self.told: list[int] = []
        self.seen: list[int] = []
        self._zrle = zlib.decompressobj()
        self._tight = zlib.decompressobj()

    @classmethod
    def unix(cls, path: str | Path) -> "VncClient":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return cls(sock)

    def read(self, length: int) -> bytes:
        while len(self.buffer) < length:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self.buffer += data
        result, self.buffer = self.buffer[:length], self.buffer[length:]
        return result

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def close(self) -> None:
        self.socket.close()

    # ── messages ──

    def set_format(self, wanted: PixelFormat) -> None:
        self.send(b"\0\0\0\0" + wanted.pack())
        self.format = wanted

    def set_encodings(self, *encodings: int) -> None:
        self.send(struct.pack(f">BxH{len(encodings)}i", 2, len(encodings), *encodings))

    def request(self, incremental: bool = True) -> None:
        self.send(struct.pack(">BBHHHH", 3, incremental, 0, 0, *self.picture.size))

    def key(self, keysym: int, pressed: bool) -> None:
        self.send(struct.pack(">BBxxI", 4, pressed, keysym))

    def extended_key(self, keysym: int, code: int, pressed: bool) -> None:
        self.send(struct.pack(">BBHII", 255, 0, pressed, keysym, code))

    def pointer(self, x: int, y: int, buttons: int = 0) -> None:
        self.send(struct.pack(">BBHH", 5, buttons, x, y))

    def update(self) -> int:
        """The next update; returns how many rectangles it has."""
        while True:
            kind = self.read(1)[0]
            if kind == 1:
                _, count = struct.unpack(">xHH", self.read(5))
                self.read(6 * count)
                continue
            assert kind == 0, kind
            break
        count = int.from_bytes(self.read(3)[1:], "big")
        for _ in range(count):
            x, y, width, height, encoding = struct.unpack(">HHHHi", self.read(12))
            self.seen.append(encoding)
            if encoding == DESKTOP_SIZE:
                self.picture = Image.new("RGB", (width, height))
            elif encoding in (POINTER_MOTION, EXTENDED_KEYS):
                self.told.append(encoding)
            else:
                assert x + width <= self.picture.width
                assert y + height <= self.picture.height
                part = {RAW: self._raw, TIGHT: self._read_tight, ZRLE: self._read_zrle}[encoding](width, height)
                self.picture.paste(part, (x, y))
        return count

    # ── pixels ──

    def _colour(self, data: bytes) -> tuple[int, int, int]:
        value = int.from_bytes(data, "big" if self.format.big_endian else "little")
        red, green, blue = (
            (value >> shift & maximum) * 255 // maximum
            for maximum, shift in zip(self.format.maxima, self.format.shifts, strict=True)
        )
        return red, green, blue

    def _image(self, data: bytes, size: int, width: int, height: int, colour: object = None) -> Image.Image:
        decode = self._colour if colour is None else colour
        assert callable(decode)
        known: dict[bytes, tuple[int, int, int]] = {}
        pixels = []
        for at in range(0, len(data), size):
            piece = data[at : at + size]
            if piece not in known:
                known[piece] = decode(piece)
            pixels.append(known[piece])
        image = Image.new("RGB", (width, height))
        image.putdata(pixels)
        return image

    def _raw(self, width: int, height: int) -> Image.Image:
        size = self.format.bits // 8
        return self._image(self.read(width * height * size), size, width, height)

    def _compact(self, data: bytes) -> tuple[int, int, int]:
        """A compact pixel of three bytes."""
        used = max(m << s for m, s in zip(self.format.maxima, self.format.shifts, strict=True))
        low = used < 1 << 24
        if self.format.big_endian:
            return self._colour(b"\0" + data if low else data + b"\0")
        return self._colour(data + b"\0" if low else b"\0" + data)

    def _read_zrle(self, width: int, height: int) -> Image.Image:
        (length,) = struct.unpack(">I", self.read(4))
        data = self._zrle.decompress(self.read(length))
        small = self.format.bits == 32 and self.format.depth <= 24
        size = 3 if small else self.format.bits // 8
        colour = self._compact if small else self._colour
        image, at = Image.new("RGB", (width, height)), 0
        for y in range(0, height, 64):
            for x in range(0, width, 64):
                w, h = min(64, width - x), min(64, height - y)
                kind, at = data[at], at + 1
                if kind == 0:
                    tile = self._image(data[at : at + w * h * size], size, w, h, colour)
                    at += w * h * size
                elif kind == 1:
                    tile, at = Image.new("RGB", (w, h), colour(data[at : at + size])), at + size
                else:
                    assert kind == 2
                    palette = [colour(data[at : at + size]), colour(data[at + size : at + 2 * size])]
                    at += 2 * size
                    tile, at = _bits(data, at, w, h, palette)
                image.paste(tile, (x, y))
        assert at == len(data)
        return image

    def _read_tight(self, width: int, height: int) -> Image.Image:
        plain = self.format.bits == 32 and self.format.depth == 24 and self.format.maxima == (255, 255, 255)
        size = 3 if plain else self.format.bits // 8
        colour = (lambda data: tuple(data)) if plain else self._colour
        control = self.read(1)[0]
        if control == 0x80:
            return Image.new("RGB", (width, height), colour(self.read(size)))
        if control == 0x40:
            assert self.read(2) == b"\1\1"
            palette = [colour(self.read(size)), colour(self.read(size))]
            data = self._tight_data((width + 7) // 8 * height)
            return _bits(data, 0, width, height, palette)[0]
        assert control == 0
        return self._image(self._tight_data(width * height * size), size, width, height, colour)

    def _tight_data(self, length: int) -> bytes:
        if length < 12:
            return self.read(length)
        packed, shift = 0, 0
        for shift in (0, 7, 14):
            byte = self.read(1)[0]
            packed |= (byte & 0x7F if shift < 14 else byte) << shift
            if shift < 14 and not byte & 0x80:
                break
        data = self._tight.decompress(self.read(packed))
        assert len(data) == length
        return data


def _bits(
    data: bytes, at: int, width: int, height: int, palette: "list[tuple[int, int, int]]"
) -> tuple[Image.Image, int]:
    image = Image.new("RGB", (width, height))
    row = (width + 7) // 8
    image.putdata(
        [palette[data[at + y * row + x // 8] >> 7 - (x & 7) & 1] for y in range(height) for x in range(width)]
    )
    return image, at + row * height
