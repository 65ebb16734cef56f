"""The protocol's parser and the encoders, by themselves."""

import os
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nonroot.display import rfb
from nonroot.display.encode import Encoder, Pixels
from nonroot.display.rfb import Encoding, PixelFormat, ProtocolError, RfbSession
from nonroot.display.vnc import des_response

HANDSHAKE = b"RFB 003.008\n\1\1"


def session(check: object = None) -> RfbSession:
    made = RfbSession((640, 480), "title", check, bytes(range(16)))  # type: ignore[arg-type]
    made.outgoing.clear()
    return made


def started() -> RfbSession:
    made = session()
    assert made.feed(HANDSHAKE) == [rfb.Started(True)]
    assert made.started
    return made


def test_handshakes() -> None:
    made = session()
    made.feed(b"RFB 003.008\n")
    assert made.outgoing == b"\1\1"
    made.feed(b"\1\0")
    assert made.outgoing[2:6] == bytes(4)
    assert made.outgoing[6:10] == struct.pack(">HH", 640, 480)
    assert made.outgoing.endswith(b"\0\0\0\5title")
    old = session()
    old.feed(b"RFB 003.003\n\1")
    assert old.outgoing[:4] == struct.pack(">I", 1)
    assert old.started
    middle = session()
    middle.feed(b"RFB 003.007\n\1\1")
    assert middle.outgoing[2:4] == struct.pack(">H", 640), "3.7 has no result without authentication"


@pytest.mark.parametrize("version", [3, 7, 8])
def test_passwords(version: int) -> None:
    def check(challenge: bytes, response: bytes) -> bool:
        return response == des_response(b"secret", challenge)

    hello = b"RFB 003.00%d\n" % version + (b"" if version == 3 else b"\2")
    good = session(check)
    good.feed(hello)
    assert good.outgoing.endswith(bytes(range(16)))
    good.outgoing.clear()
    good.feed(des_response(b"secret", bytes(range(16))) + b"\1")
    assert good.outgoing[:4] == bytes(4)
    assert good.started
    bad = session(check)
    bad.feed(hello)
    bad.outgoing.clear()
    with pytest.raises(ProtocolError, match="wrong password"):
        bad.feed(des_response(b"secreT", bytes(range(16))))
    assert bad.outgoing[:4] == b"\0\0\0\1"
    assert not bad.started


def test_the_cipher_is_the_one_that_viewers_have() -> None:
    # Made with an independent implementation: DES with the bits of each key byte mirrored.
    assert des_response(b"", bytes(16)) == bytes.fromhex("8ca64de9c1b123a7") * 2
    assert des_response(b"a", bytes(16)) != des_response(b"b", bytes(16))
    assert des_response(b"12345678", bytes(16)) == des_response(b"123456789", bytes(16))


def test_nobody_gets_round_the_password() -> None:
    made = session(lambda challenge, response: False)
    with pytest.raises(ProtocolError, match="not offered"):
        made.feed(b"RFB 003.008\n\1")


def test_messages() -> None:
    made = started()
    data = (
        struct.pack(">BBHHHH", 3, 1, 1, 2, 3, 4)
        + struct.pack(">BBxxI", 4, 1, 0x61)
        + struct.pack(">BBHH", 5, 3, 10, 20)
        + struct.pack(">BBHII", 255, 0, 1, 0x61, 0x1E)
        + struct.pack(">B3xI", 6, 5)
        + b"paste"
        + struct.pack(">BxH4i", 2, 4, 16, 0, 12345, -223)
        + b"\0\0\0\0"
        + PixelFormat(16, 16, False, True, (31, 63, 31), (11, 5, 0)).pack()
    )
    wanted: list[object] = [
        rfb.UpdateRequest(True, 1, 2, 3, 4),
        rfb.Key(True, 0x61),
        rfb.Pointer(3, 10, 20),
        rfb.Key(True, 0x61, 0x1E),
        rfb.CutText(5),
        rfb.SetEncodings((Encoding.ZRLE, Encoding.RAW, Encoding.DESKTOP_SIZE)),
        rfb.SetPixelFormat(PixelFormat(16, 16, False, True, (31, 63, 31), (11, 5, 0))),
    ]
    assert made.feed(data) == wanted
    slowly = started()
    assert [event for byte in data for event in slowly.feed(bytes((byte,)))] == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"\x09",
        struct.pack(">B3xI", 6, 1 << 30),
        struct.pack(">B3xi", 6, -4),
        struct.pack(">BxH", 2, 0xFFFF),
        b"\xff\x01",
        b"\0\0\0\0" + PixelFormat(24, 24).pack(),
        b"\0\0\0\0" + PixelFormat(16, 16, maxima=(255, 255, 255)).pack(),
        b"\0\0\0\0" + PixelFormat(32, 24, maxima=(254, 255, 255)).pack(),
        b"\0\0\0\0" + PixelFormat(32, 24, shifts=(0, 4, 16)).pack(),
        b"\0\0\0\0" + PixelFormat(32, 0).pack(),
    ],
)
def test_nonsense_ends_the_conversation(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        started().feed(data)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=12), st.booleans())
def test_anything_is_understood_or_refused(pieces: list[bytes], after_handshake: bool) -> None:
    made = started() if after_handshake else session()
    try:
        for piece in pieces:
            for event in made.feed(piece):
                if isinstance(event, rfb.SetPixelFormat):
                    Pixels(event.format).full(Image.new("RGB", (2, 2), (1, 2, 3)))
    except ProtocolError:
        pass
    assert len(made.outgoing) < 1 << 16


message = st.one_of(
    st.tuples(st.just(3), st.binary(min_size=9, max_size=9)),
    st.tuples(st.just(4), st.binary(min_size=7, max_size=7)),
    st.tuples(st.just(5), st.binary(min_size=5, max_size=5)),
    st.tuples(st.just(0), st.binary(min_size=19, max_size=19)),
    st.tuples(st.just(255), st.binary(min_size=11, max_size=11)),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(message, max_size=10))
def test_whole_messages_of_any_content(messages: list[tuple[int, bytes]]) -> None:
    made = started()
    try:
        for kind, body in messages:
            for event in made.feed(bytes((kind,)) + body):
                if isinstance(event, rfb.SetPixelFormat):
                    pixels = Pixels(event.format)
                    assert len(pixels.full(Image.new("RGB", (3, 2), (9, 99, 199)))) == 6 * event.format.bits // 8
    except ProtocolError:
        pass


@pytest.mark.soak
def test_conversations_with_flipped_bytes() -> None:
    rng = random.Random(int(os.environ.get("NONROOT_SOAK_ROUND", "0")))
    good = (
        HANDSHAKE
        + struct.pack(">BBHHHH", 3, 1, 0, 0, 640, 480)
        + struct.pack(">BBxxI", 4, 1, 0x61)
        + struct.pack(">BBHH", 5, 3, 10, 20)
        + struct.pack(">BBHII", 255, 0, 1, 0x61, 0x1E)
        + struct.pack(">B3xI", 6, 5)
        + b"paste"
        + struct.pack(">BxH4i", 2, 4, 16, 0, 12345, -223)
        + b"\0\0\0\0"
        + PixelFormat().pack()
    )
    for _ in range(300_000):
        data = bytearray(good)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        made = session()
        try:
            cut = rng.randrange(len(data))
            made.feed(bytes(data[:cut]))
            made.feed(bytes(data[cut:]))
        except ProtocolError:
            continue


FORMATS = [
    PixelFormat(),
    PixelFormat(shifts=(0, 8, 16)),
    PixelFormat(shifts=(24, 16, 8)),
    PixelFormat(big_endian=True),
    PixelFormat(big_endian=True, shifts=(24, 16, 8)),
    PixelFormat(32, 32),
    PixelFormat(16, 16, False, True, (31, 63, 31), (11, 5, 0)),
    PixelFormat(16, 15, True, True, (31, 31, 31), (10, 5, 0)),
    PixelFormat(8, 8, False, True, (7, 7, 3), (0, 3, 6)),
    PixelFormat(32, 30, False, True, (1023, 1023, 1023), (20, 10, 0)),
]


@pytest.mark.parametrize("wanted", FORMATS, ids=str)
def test_pixel_formats(wanted: PixelFormat) -> None:
    rng = random.Random(1)
    picture = Image.new("RGB", (7, 5))
    colours = [(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(35)]
    picture.putdata(colours)
    size = wanted.bits // 8
    data = Pixels(wanted).full(picture)
    for index, colour in enumerate(colours):
        value = int.from_bytes(data[index * size : index * size + size], "big" if wanted.big_endian else "little")
        for channel, maximum, shift in zip(colour, wanted.maxima, wanted.shifts, strict=True):
            assert value >> shift & maximum == (channel * maximum + 127) // 255


def test_the_encoding_is_the_first_that_both_know() -> None:
    encoder = Encoder()
    chosen = [encoder.encoding]
    for known in ((Encoding.DESKTOP_SIZE, Encoding.ZRLE, Encoding.TIGHT), (Encoding.TIGHT, Encoding.RAW)):
        encoder.encodings = known
        chosen.append(encoder.encoding)
    assert chosen == [Encoding.RAW, Encoding.ZRLE, Encoding.TIGHT]
