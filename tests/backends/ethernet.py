"""A guest's network stack in small, for tests: DHCP, ARP, UDP and one TCP connection at a time."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable, Iterator

from nonroot.backends.frame import Frame, ones_sum, segment
from nonroot.backends.link import Link

BROADCAST = b"\xff" * 6
SYN, ACK, FIN, PSH, RST = 2, 16, 1, 8, 4


def checksum(data: bytes) -> bytes:
    return (65535 - ones_sum(data)).to_bytes(2, "big")


def ipv4(source: str, destination: str, protocol: int, payload: bytes, identity: int = 1) -> bytes:
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), identity, 0, 64, protocol, 0)
    addresses = socket.inet_aton(source) + socket.inet_aton(destination)
    return head[:10] + checksum(head + addresses) + addresses + payload


def with_checksum(source: str, destination: str, protocol: int, segment_: bytes, field: int) -> bytes:
    pseudo = socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack(">HH", protocol, len(segment_))
    blank = segment_[:field] + b"\0\0" + segment_[field + 2 :]
    return blank[:field] + checksum(pseudo + blank) + blank[field + 2 :]


def is_right(data: bytes) -> bool:
    """Whether an IPv4 frame's checksums, of IP and of TCP or UDP, are right."""
    end = 14 + int.from_bytes(data[16:18], "big")
    pseudo = data[26:34] + struct.pack(">HH", data[23], end - 34)
    return ones_sum(data[14:34]) == 65535 and ones_sum(pseudo + data[34:end]) == 65535


class Host:
    """One network card with an address."""

    def __init__(self, link: Link, mac: bytes = b"\x02\x00\x00\x00\x00\x01", address: str = "0.0.0.0") -> None:
        self.link, self.mac, self.address = link, mac, address
        self.neighbours: dict[str, bytes] = {}
        self.superframes = 0
        self._identity = 0

    def close(self) -> None:
        self.link.close()

    def send(self, destination: bytes, ethertype: int, payload: bytes) -> None:
        self.link.send(Frame(destination + self.mac + ethertype.to_bytes(2, "big") + payload))

    def frames(self, seconds: float = 30.0) -> Iterator[Frame]:
        """Frames as they come; TimeoutError when none has come for so long."""
        while True:
            frame = self.link.receive_frame()
            if frame is None:
                poller = select.poll()
                poller.register(self.link, select.POLLIN | (select.POLLOUT if self.link.busy else 0))
                if not poller.poll(seconds * 1000):
                    raise TimeoutError("no frame came")
                if self.link.busy:
                    self.link.drain()
                continue
            data = frame.data
            if data[12:14] == b"\x08\x06" and data[20:22] == b"\0\1" and socket.inet_ntoa(data[38:42]) == self.address:
                reply = data[14:20] + b"\0\2" + self.mac + data[38:42] + data[22:28] + data[28:32]
                self.send(data[6:12], 0x0806, reply)
                continue
            yield frame

    def resolve(self, address: str) -> bytes:
        """ARP."""
        if address not in self.neighbours:
            ask = (
                b"\0\1\x08\0\6\4\0\1" + self.mac + socket.inet_aton(self.address) + bytes(6) + socket.inet_aton(address)
            )
            self.send(BROADCAST, 0x0806, ask)
            for frame in self.frames():
                if frame.data[12:14] == b"\x08\x06" and frame.data[28:32] == socket.inet_aton(address):
                    self.neighbours[address] = frame.data[22:28]
                    break
        return self.neighbours[address]

    def send_ip(self, address: str, protocol: int, payload: bytes) -> None:
        self._identity += 1
        to = BROADCAST if address == "255.255.255.255" else self.resolve(address)
        self.send(to, 0x0800, ipv4(self.address, address, protocol, payload, self._identity & 0xFFFF))

    def dhcp(self) -> dict[int, bytes]:
        """Get an address; the options of the acknowledgement."""
        options: dict[int, bytes] = {}
        offered = ""
        for kind, answer in ((1, 2), (3, 5)):
            asked = bytes((53, 1, kind))
            if kind == 3:
                asked += bytes((50, 4)) + socket.inet_aton(offered) + bytes((54, 4)) + options[54]
            body = struct.pack(">BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0) + bytes(16) + self.mac.ljust(208, b"\0")
            data = body + b"\x63\x82\x53\x63" + asked + b"\xff"
            packet = struct.pack(">HHHH", 68, 67, 8 + len(data), 0) + data
            self.send_ip("255.255.255.255", 17, with_checksum("0.0.0.0", "255.255.255.255", 17, packet, 6))
            for frame in self.frames():
                if frame.data[23:24] != b"\x11" or frame.data[36:38] != b"\0\x44":
                    continue
                reply = frame.data[42:]
                options, at = {}, 240
                while reply[at] != 255:
                    options[reply[at]] = reply[at + 2 : at + 2 + reply[at + 1]]
                    at += 2 + reply[at + 1]
                assert options[53] == bytes((answer,))
                offered = socket.inet_ntoa(reply[16:20])
                break
        self.address = offered
        return options

    def udp(self, address: str, port: int, data: bytes, own_port: int = 4000) -> bytes:
        """One datagram there and one back."""
        packet = struct.pack(">HHHH", own_port, port, 8 + len(data), 0) + data
        self.send_ip(address, 17, with_checksum(self.address, address, 17, packet, 6))
        for frame in self.frames():
            if frame.data[23:24] == b"\x11" and frame.data[36:38] == own_port.to_bytes(2, "big"):
                assert is_right(frame.data)
                return frame.data[42 : 34 + int.from_bytes(frame.data[38:40], "big")]
        raise AssertionError

    # ── TCP: in order, nothing is lost on a link ──

    def _tcp(
        self, peer: tuple[str, int, int], flags: int, sequence: int, acknowledged: int, payload: bytes = b""
    ) -> None:
        address, port, own = peer
        head = struct.pack(">HHIIBBHHH", own, port, sequence, acknowledged, 0x50, flags, 65535, 0, 0)
        self.send_ip(address, 6, with_checksum(self.address, address, 6, head + payload, 16))

    def tcp_frames(self, own: int, seconds: float = 30.0) -> Iterator[tuple[int, int, int, bytes, Frame]]:
        """(flags, sequence, acknowledged, payload, frame) of what comes to a port; superframes are checked as cut."""
        for whole in self.frames(seconds):
            if whole.data[23:24] != b"\x06" or whole.data[36:38] != own.to_bytes(2, "big"):
                continue
            self.superframes += bool(whole.gso_type)
            for frame in segment(whole):
                data = frame.data
                assert is_right(data)
                start = 34 + (data[46] >> 4) * 4
                sequence, acknowledged = struct.unpack(">II", data[38:46])
                yield data[47], sequence, acknowledged, data[start : 14 + int.from_bytes(data[16:18], "big")], whole

    def exchange(
        self, address: str, port: int, send: bytes, own: int = 5000, size: int = 1400, seconds: float = 30.0
    ) -> bytes:
        """Connect, send all, end; what the other end sent."""
        peer = (address, port, own)
        self._tcp(peer, SYN, 1000, 0)
        sent, acknowledged_by_peer, expected, received = 0, 0, 0, bytearray()
        finished = False
        for flags, sequence, acknowledged, payload, _ in self.tcp_frames(own, seconds):
            assert not flags & RST, "the connection was refused"
            if flags & SYN:
                expected = sequence + 1 & 0xFFFFFFFF
            elif sequence == expected:
                received += payload
                expected = expected + len(payload) & 0xFFFFFFFF
            acknowledged_by_peer = acknowledged - 1001 & 0xFFFFFFFF
            if flags & FIN and sequence + len(payload) & 0xFFFFFFFF == expected:
                self._tcp(peer, ACK, 1001 + sent + finished, expected + 1)
                return bytes(received)
            while sent < len(send) and sent - acknowledged_by_peer < 60_000 - size:
                part = send[sent : sent + size]
                self._tcp(peer, ACK | PSH, 1001 + sent, expected, part)
                sent += len(part)
            if payload or flags & SYN:
                self._tcp(peer, ACK, 1001 + sent + finished, expected)
            if sent == len(send) and not finished:
                finished = True
                self._tcp(peer, ACK | FIN, 1001 + sent, expected)
        raise AssertionError

    def accept(self, port: int, answer: Callable[[bytes], bytes]) -> None:
        """Take one connection, answer its first data, and close."""
        expected, sent, peer = 0, 0, ("", 0, port)
        for flags, sequence, _, payload, frame in self.tcp_frames(port):
            if flags & SYN:
                address = socket.inet_ntoa(frame.data[26:30])
                peer = (address, int.from_bytes(frame.data[34:36], "big"), port)
                expected = sequence + 1
                self._tcp(peer, SYN | ACK, 2000, expected)
            elif payload and not sent:
                expected += len(payload)
                data = answer(payload)
                sent = len(data)
                self._tcp(peer, ACK | PSH | FIN, 2001, expected, data)
            if flags & FIN:
                self._tcp(peer, ACK, 2002 + sent, expected + 1)
                return
